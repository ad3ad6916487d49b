//! A cache that watches a recording while it is expanded, without any file between: misses of a
//! first-level data and instruction cache, for user and kernel code apart.
//!
//!     cargo run --release -p reprise-expand --example cache_simulator -- FILE.rr

use std::path::Path;
use std::process::ExitCode;

use reprise_expand::pieces;
use reprise_expand::{Control, Threads, Window, expand};
use reprise_replay::{Replayable, Start};
use reprise_trace::instructions::{Contents, Event, Observer, Run, TraceError};

const LINE_BYTES: u64 = 64;
const SETS: usize = 64;
const WAYS: usize = 8;

/// 32 KiB, eight ways, indexed and tagged by guest-physical address, the least recently used line goes.
struct Cache {
    /// Line numbers plus one, the most recently used first; zero for none.
    sets: Vec<[u64; WAYS]>,
}

impl Cache {
    fn new() -> Self {
        Self { sets: vec![[0; WAYS]; SETS] }
    }

    /// Whether the line of `physical` was not there; now it is.
    fn misses(&mut self, physical: u64) -> bool {
        let line = physical / LINE_BYTES;
        let set = &mut self.sets[line as usize % SETS];
        let place = set.iter().position(|held| *held == line + 1);
        set[..=place.unwrap_or(WAYS - 1)].rotate_right(1);
        set[0] = line + 1;
        place.is_none()
    }
}

#[derive(Clone, Copy, Default)]
struct Counts {
    instructions: u64,
    fetch_misses: u64,
    accesses: u64,
    data_misses: u64,
}

/// The observer: it is shown each run of a block with what it accessed.
struct Simulation {
    instruction_cache: Cache,
    data_cache: Cache,
    /// For kernel and user code.
    counts: [Counts; 2],
}

impl Observer for Simulation {
    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        let block = run.block();
        let counts = &mut self.counts[usize::from(block.mode().cpl == 3)];
        let physical_of_linear = block.physical().wrapping_sub(block.linear());
        let mut last_line = None;
        for step in run.steps() {
            let physical = step.instruction.linear().wrapping_add(physical_of_linear);
            if last_line != Some(physical / LINE_BYTES) {
                last_line = Some(physical / LINE_BYTES);
                counts.fetch_misses += u64::from(self.instruction_cache.misses(physical));
            }
            counts.instructions += u64::from(step.retired);
            let accesses = step.accesses().filter(|access| access.kind.touches_memory());
            for physical in accesses.filter_map(|access| access.physical) {
                counts.accesses += 1;
                counts.data_misses += u64::from(self.data_cache.misses(physical));
            }
        }
        Ok(())
    }

    /// Interrupts, port accesses, changes of CR3: nothing that this cache cares for.
    fn event(&mut self, _event: &Event) -> Result<(), TraceError> {
        Ok(())
    }
}

fn simulate(file: &str) -> Result<Simulation, Box<dyn std::error::Error>> {
    let replayable = Replayable::open(Path::new(file))?;
    let mut machine = pieces::start(&replayable, Start::Run, &|_| {})?;
    let simulation = Simulation {
        instruction_cache: Cache::new(),
        data_cache: Cache::new(),
        counts: Default::default(),
    };
    let contents = Contents { physical: true, ..Contents::default() };
    let (window, control) = (Window::default(), Control::default());
    let expanded = expand(&mut machine, window, simulation, contents, Threads::Two, &control)?;
    Ok(expanded.observer)
}

fn main() -> ExitCode {
    let Some(file) = std::env::args().nth(1) else {
        eprintln!("give the recording that `reprise record --engine soft` wrote");
        return ExitCode::from(2);
    };
    let simulation = match simulate(&file) {
        Ok(simulation) => simulation,
        Err(error) => {
            eprintln!("{file}: {error}");
            return ExitCode::FAILURE;
        }
    };
    println!(
        "            instructions  fetch misses/1000      accesses  data misses/1000 accesses"
    );
    for (name, counts) in ["kernel", "user"].into_iter().zip(simulation.counts) {
        let per_thousand = |part: u64, whole: u64| part as f64 * 1000.0 / whole.max(1) as f64;
        println!(
            "{name:10} {:>14} {:>18.2} {:>14} {:>25.2}",
            counts.instructions,
            per_thousand(counts.fetch_misses, counts.instructions),
            counts.accesses,
            per_thousand(counts.data_misses, counts.accesses),
        );
    }
    ExitCode::SUCCESS
}
