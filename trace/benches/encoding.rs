//! What the native trace format costs: how fast it is written and read, and how much room it takes.
//!
//!     cargo bench -p reprise-trace --bench encoding -- [MILLIONS [LEVEL]] [FILE...]
//!
//! Each FILE is a trace, whose first instructions are read and then written again. Without any, two
//! things made by random numbers are: a synthetic machine's trace, and a harder one, in which
//! nearly every load goes where nothing tells. Speeds are by the CPU time of the one thread that works,
//! the best of several tries. Nothing here passes or fails by a time; use a machine on which
//! nothing else runs. The batches are made before the clock starts, and what is written is thrown
//! away.

#[path = "../tests/instructions/synthetic/mod.rs"]
#[allow(dead_code)]
mod synthetic;

use reprise_random::Random;
use std::collections::HashMap;
use std::io::Cursor;
use std::time::{Duration, Instant};

use reprise_trace::header::CpuModelInfo;
use reprise_trace::instructions::{
    AccessKind, Batch, BlockDefinition, BlockEnd, CUT, Contents, Definition, Event, Feed,
    InstructionDefinition, Mode, Observer, Run, SegmentOptions, StaticAccess, TraceError,
    TraceHeader, TraceReader, TraceWriter,
};
use reprise_trace::moment::TickKind;

use synthetic::{Options, Synthetic};

/// Instructions of a batch: some hundred KiB, so that it is still in a cache when it is read.
const BATCH_INSTRUCTIONS: u64 = 60_000;
/// Each measurement is made so often, and the best counts.
const TRIES: usize = 5;

/// Counts instructions: what remains is what it costs to show a trace to anyone.
struct Count(u64);

impl Observer for Count {
    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        self.0 += run.retired() as u64;
        Ok(())
    }

    fn event(&mut self, _: &Event) -> Result<(), TraceError> {
        Ok(())
    }
}

/// Looks at every address and keeps nothing.
struct Look(u64);

impl Observer for Look {
    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        self.0 ^= run.addresses().iter().fold(0, |sum, address| sum ^ address);
        Ok(())
    }

    fn event(&mut self, _: &Event) -> Result<(), TraceError> {
        Ok(())
    }
}

/// Time that this thread had a CPU, which others on the machine change less than time on the wall.
fn cpu_time() -> Option<Duration> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    text.split_whitespace().next()?.parse().ok().map(Duration::from_nanos)
}

fn timed<T>(action: impl FnOnce() -> Result<T, TraceError>) -> Result<(T, Duration), TraceError> {
    let (start, cpu_start) = (Instant::now(), cpu_time());
    action().map(|done| {
        let on_cpu = cpu_time().zip(cpu_start).map(|(end, start)| end - start);
        (done, on_cpu.unwrap_or_else(|| start.elapsed()))
    })
}

/// What is measured: batches, and how many instructions they have.
struct Stretch {
    contents: Contents,
    batches: Vec<Batch>,
    instructions: u64,
}

/// A stretch of the synthetic machine.
fn synthetic(contents: Contents, instructions: u64) -> Stretch {
    let mut machine =
        Synthetic::new(Options { contents, account: false, functions: 300, ..Options::new(1) });
    let mut batches: Vec<Batch> = Vec::new();
    while machine.instructions < instructions {
        batches.push(machine.advance(BATCH_INSTRUCTIONS));
    }
    Stretch { contents, batches, instructions: machine.instructions }
}

/// Hash tables and branches that follow their keys: eight blocks in random order, each with a load of a
/// random object, another one beside it, and a store to a local variable.
fn hard(instructions: u64) -> Stretch {
    let access = |kind, base, displacement| StaticAccess {
        kind,
        size_bytes: 8,
        base,
        displacement,
        step: 0,
    };
    let (read, write) = (AccessKind::Read, AccessKind::Write);
    let block = |id: u32| {
        let with = |accesses| InstructionDefinition {
            bytes: vec![0x48, 0x8b, 0x43, id as u8],
            accesses,
            ..InstructionDefinition::default()
        };
        let instructions = vec![
            with(vec![access(read, 3, 8)]),
            with(vec![]),
            with(vec![access(read, 3, 16)]),
            with(vec![]),
            with(vec![access(write, 5, -16)]),
            with(vec![]),
        ];
        let linear = 0x40_0000 + 64 * u64::from(id);
        let (mode, end) = (Mode::USER, BlockEnd::Other);
        let block =
            BlockDefinition { linear, physical: linear, next_page: None, mode, end, instructions };
        Definition { id, block }
    };
    let mut random = Random::new(7);
    let mut batches = Vec::new();
    let mut made = 0;
    while made < instructions {
        let mut batch = Batch::default();
        if made == 0 {
            batch.definitions = (0..8).map(block).collect();
        }
        for _ in 0..BATCH_INSTRUCTIONS / 6 {
            let object = 0x1000_0000 + 64 * random.below(1 << 16);
            batch.words.push(random.below(8) as u32);
            batch.addresses.extend([object + 8, object + 16, 0x7fff_ffff_e000]);
            made += 6;
        }
        batches.push(batch);
    }
    Stretch { contents: Contents::default(), batches, instructions: made }
}

/// Makes batches again of what a reader shows.
struct Again {
    stretch: Stretch,
    most: u64,
    /// Numbers of the blocks, by the reader's.
    numbers: HashMap<u32, u32>,
    defined: u32,
}

impl Again {
    fn batch(&mut self) -> &mut Batch {
        let is_full = |batch: &Batch| batch.words.len() >= 1 << 14;
        if self.stretch.batches.last().is_none_or(is_full) {
            self.stretch.batches.push(Batch::default());
        }
        self.stretch.batches.last_mut().expect("there is one")
    }
}

impl Observer for Again {
    fn new_blocks(&mut self) {
        self.numbers.clear();
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        if self.stretch.instructions >= self.most {
            return Err(TraceError::Contract("that is enough"));
        }
        let (number, is_new) = match self.numbers.get(&run.id()) {
            Some(number) => (*number, false),
            None => (self.defined, true),
        };
        let batch = self.batch();
        if is_new {
            let block = run.block().to_definition();
            batch.definitions.push(Definition { id: number, block });
        }
        batch.words.push(number);
        if run.is_cut() {
            batch.words.extend([CUT | run.retired() as u32, run.unretired_accesses() as u32]);
        }
        batch.addresses.extend(run.addresses());
        for step in run.steps() {
            if step.retired && step.instruction.is_repeated() {
                batch.counts.push(step.repetitions);
            }
            batch.physical.extend(step.physical);
            batch.values.extend(step.values);
            batch.registers.extend(step.registers);
        }
        if is_new {
            self.numbers.insert(run.id(), number);
            self.defined += 1;
        }
        self.stretch.instructions += run.retired() as u64;
        Ok(())
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        self.batch().push_event(*event);
        Ok(())
    }
}

/// The first instructions of a trace.
fn from_file(path: &str, most: u64) -> Result<Stretch, TraceError> {
    let file = std::fs::File::open(path).map_err(TraceError::Read)?;
    let mut reader = TraceReader::open(std::io::BufReader::new(file))?;
    let contents = reader.header().contents;
    let stretch = Stretch { contents, batches: Vec::new(), instructions: 0 };
    let mut again = Again { stretch, most, numbers: HashMap::new(), defined: 0 };
    match reader.drive(&mut again) {
        Err(error) if again.stretch.instructions < most => Err(error),
        _ => Ok(again.stretch),
    }
}

fn measure(name: &str, stretch: &Stretch, level: i32) -> Result<(), TraceError> {
    let Stretch { contents, batches, instructions } = stretch;
    let header = TraceHeader {
        contents: *contents,
        tick: TickKind::Instruction,
        cpu_model: CpuModelInfo { name: "synthetic".into(), version: 1 },
        recording: String::new(),
        filters: Vec::new(),
        share: None,
    };
    let options = SegmentOptions { level, ..SegmentOptions::default() };
    let mut best = [Duration::MAX; 4];
    let mut file_bytes = 0;
    for _ in 0..TRIES {
        let (_, counting) = timed(|| feed_all(stretch, &mut Count(0)))?;
        let (_, looking) = timed(|| feed_all(stretch, &mut Look(0)))?;
        let (file, writing) = timed(|| {
            let mut writer = TraceWriter::create(Vec::new(), &header, options)?;
            feed_all(stretch, &mut writer)?;
            writer.finish(&[])
        })?;
        let (_, reading) = timed(|| TraceReader::open(Cursor::new(&file))?.drive(&mut Count(0)))?;
        for (best, time) in best.iter_mut().zip([counting, looking, writing, reading]) {
            *best = time.min(*best);
        }
        file_bytes = file.len();
    }
    let instructions = *instructions as f64;
    let accesses: usize = batches.iter().map(|batch| batch.addresses.len()).sum();
    let [count, look, write, read] = best.map(|time| instructions / time.as_secs_f64() / 1e6);
    println!(
        "{name:<22} {:5.2} accesses/instruction; MIPS: count {count:6.0}  look {look:6.0}  \
         write {write:4.0}  read {read:4.0}; {:6.3} bits/instruction",
        accesses as f64 / instructions,
        file_bytes as f64 * 8.0 / instructions,
    );
    Ok(())
}

fn feed_all(stretch: &Stretch, observer: &mut impl Observer) -> Result<(), TraceError> {
    let mut feed = Feed::new(stretch.contents);
    stretch.batches.iter().try_for_each(|batch| feed.push(batch, observer))
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let numbers: Vec<u64> = words.iter().filter_map(|word| word.parse().ok()).collect();
    let files = words.iter().filter(|word| word.parse::<u64>().is_err());
    let most = numbers.first().copied().unwrap_or(20).max(1) * 1_000_000;
    let level = numbers.get(1).copied().unwrap_or(1) as i32;
    let show = |name: &str, stretch: Result<Stretch, TraceError>| {
        if let Err(error) = stretch.and_then(|stretch| measure(name, &stretch, level)) {
            eprintln!("encoding: {name}: {error}");
        }
    };
    files.clone().for_each(|path| show(path, from_file(path, most)));
    if files.count() == 0 {
        let plain = Contents::default();
        show("addresses", Ok(synthetic(plain, most)));
        show("addresses, hard", Ok(hard(most)));
        let physical = Contents { physical: true, ..plain };
        show("addresses, physical", Ok(synthetic(physical, most)));
        // What makes everything also makes random values, which nothing compresses.
        let everything =
            Contents { physical: true, values: true, registers: true, page_walks: true };
        show("everything", Ok(synthetic(everything, most.min(5_000_000))));
    }
}
