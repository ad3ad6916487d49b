//! What the native trace format costs on a synthetic machine's trace: how fast it is written and
//! read, and how much room it takes.
//!
//!     cargo bench -p reprise-trace --bench encoding -- [MILLIONS [LEVEL]]
//!
//! Speeds are by the CPU time of the one thread that works. Nothing here passes or fails by a time;
//! use a machine on which nothing else runs. The batches are made before the clock starts, and
//! what is written is thrown away.

#[path = "../tests/instructions/synthetic/mod.rs"]
#[allow(dead_code)]
mod synthetic;

use std::io::Cursor;
use std::time::{Duration, Instant};

use reprise_trace::header::CpuModelInfo;
use reprise_trace::instructions::{
    Batch, Contents, Event, Feed, Observer, Run, SegmentOptions, TraceError, TraceHeader,
    TraceReader, TraceWriter,
};
use reprise_trace::moment::TickKind;

use synthetic::{Options, Synthetic};

/// Instructions of a batch.
const BATCH_INSTRUCTIONS: u64 = 200_000;

/// Looks at every run and keeps nothing.
struct Nothing(u64);

impl Observer for Nothing {
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

fn measure(name: &str, contents: Contents, millions: u64, level: i32) -> Result<(), TraceError> {
    let mut machine =
        Synthetic::new(Options { contents, account: false, functions: 300, ..Options::new(1) });
    let mut batches: Vec<Batch> = Vec::new();
    while machine.instructions < millions * 1_000_000 {
        batches.push(machine.advance(BATCH_INSTRUCTIONS));
    }
    let header = TraceHeader {
        contents,
        tick: TickKind::Instruction,
        cpu_model: CpuModelInfo { name: "synthetic".into(), version: 1 },
        recording: String::new(),
        filters: Vec::new(),
        share: None,
    };
    let feed_all = |observer: &mut dyn Observer| {
        let mut feed = Feed::new(contents);
        batches.iter().try_for_each(|batch| feed.push(batch, observer))
    };
    let (_, walking) = timed(|| feed_all(&mut Nothing(0)))?;
    let options = SegmentOptions { level, ..SegmentOptions::default() };
    let (file, writing) = timed(|| {
        let mut writer = TraceWriter::create(Vec::new(), &header, options)?;
        let mut feed = Feed::new(contents);
        batches.iter().try_for_each(|batch| feed.push(batch, &mut writer))?;
        writer.finish(&[])
    })?;
    let (_, reading) = timed(|| TraceReader::open(Cursor::new(&file))?.drive(&mut Nothing(0)))?;
    let instructions = machine.instructions as f64;
    let accesses: usize = batches.iter().map(|batch| batch.addresses.len()).sum();
    let mips = |time: Duration| instructions / time.as_secs_f64() / 1e6;
    println!(
        "{name:<22} {:6.2} accesses/instruction  walk {:7.0} MIPS  write {:7.0}  read {:7.0}  {:6.3} bits/instruction",
        accesses as f64 / instructions,
        mips(walking),
        mips(writing),
        mips(reading),
        file.len() as f64 * 8.0 / instructions,
    );
    Ok(())
}

fn main() {
    let numbers: Vec<u64> = std::env::args().filter_map(|word| word.parse().ok()).collect();
    let millions = numbers.first().copied().unwrap_or(40).max(1);
    let level = numbers.get(1).copied().unwrap_or(1) as i32;
    let plain = Contents::default();
    let cases = [
        ("addresses", plain),
        ("addresses, physical", Contents { physical: true, ..plain }),
        ("everything", Contents { physical: true, values: true, registers: true }),
    ];
    for (name, contents) in cases {
        // What makes everything also makes random values, which nothing compresses.
        let millions = if contents.values { millions.min(5) } else { millions };
        if let Err(error) = measure(name, contents, millions, level) {
            eprintln!("encoding: {name}: {error}");
        }
    }
}
