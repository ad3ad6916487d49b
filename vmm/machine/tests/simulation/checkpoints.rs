//! Checkpoints on simulated hardware: a machine that goes on from any of them, kicked elsewhere, comes
//! to the recorded end, and one that runs there is what the checkpoint says.

use std::cell::RefCell;
use std::rc::Rc;

use reprise_machine::checkpoint::{
    Checkpointer, Consistent, ResumeError, checkpoint, digest, start_checkpoint,
};
use reprise_machine::clock::TimeSource;
use reprise_machine::engine::EngineError;
use reprise_machine::inputs::Replaying;
use reprise_machine::machine::Machine;
use reprise_machine::outcome::{Conclusion, MachineError, Outcome};
use reprise_trace::checkpoint::{MachineState, RamDigest, page_digest};
use reprise_trace::event::Record;
use reprise_trace::log::{LogReader, MemorySink};

use super::program::{FINISHES, Program};
use super::sim_host::World;
use super::toy_engine::{Disturbance, ToyEngine};
use super::{CLOCKS, Clock, Recorded, board, recording, records_of, replaying};
use reprise_random::Random;

const SEEDS: u64 = 60;

/// A checkpoint in memory.
#[derive(Clone)]
struct Kept {
    state: MachineState,
    ram: Vec<(u64, Vec<u8>)>,
}

/// Takes checkpoints at random ticks.
struct Keeping {
    random: Random,
    due: u64,
    kept: Rc<RefCell<Vec<Kept>>>,
}

impl Checkpointer for Keeping {
    fn due_at(&mut self, _tick: u64, _virtual_ns: u64) -> Option<u64> {
        Some(self.due)
    }

    fn start(&mut self, machine: Consistent<'_>) -> Result<bool, EngineError> {
        self.due = machine.tick() + 1 + self.random.below(400);
        let mut ram = Vec::new();
        let state =
            start_checkpoint(machine, &mut |address, page| ram.push((address, page.to_vec())))?;
        self.kept.borrow_mut().push(Kept { state, ram });
        Ok(true)
    }

    fn room(&mut self, _at_once: bool) -> usize {
        usize::MAX
    }

    fn page(&mut self, address: u64, page: &[u8]) {
        let mut kept = self.kept.borrow_mut();
        kept.last_mut().expect("one was started").ram.push((address, page.to_vec()));
    }

    fn complete(&mut self) {}
}

fn record_keeping(
    clock: Clock,
    program: &Program,
    world: &World,
    disturbance: Disturbance,
    seed: u64,
) -> (Recorded, Vec<Kept>) {
    let kept = Rc::new(RefCell::new(Vec::new()));
    let random = Random::new(seed ^ 0x6b65_6570);
    let mut machine = recording(clock, program, world, disturbance, MemorySink::default());
    machine.set_checkpointer(Box::new(Keeping { random, due: 0, kept: kept.clone() }));
    let result = machine.run();
    let (_, _, inputs) = machine.into_parts();
    let (host, sink) = inputs.into_parts();
    let records = records_of(sink.expect("the log is closed").into_reader());
    let recorded = Recorded { result, output: host.output, records };
    let kept = kept.borrow().clone();
    (recorded, kept)
}

fn resumed(
    clock: Clock,
    program: &Program,
    records: &[Record],
    kept: &Kept,
    kicks: Disturbance,
) -> Result<Machine<ToyEngine, Replaying>, ResumeError> {
    let mut engine = ToyEngine::new(clock.kind, program.clone(), kicks);
    kept.ram.iter().for_each(|(address, page)| engine.place(*address, page));
    let behind = records[kept.state.records as usize..].to_vec();
    let inputs = Replaying::new(LogReader::from_records(behind));
    Machine::resume(engine, board(), inputs, clock.time, &kept.state)
}

fn ram_digest(kept: &Kept) -> [u8; 32] {
    let mut ram = RamDigest::default();
    for (address, page) in &kept.ram {
        if let Some(digest) = page_digest(page) {
            ram.page(*address, &digest);
        }
    }
    ram.finish()
}

#[track_caller]
fn assert_same_end(recorded: &Outcome, replayed: &Outcome) {
    let (Conclusion::Ended(one), Conclusion::Ended(other)) =
        (&recorded.conclusion, &replayed.conclusion)
    else {
        panic!("recorded {:?}, replayed {:?}", recorded.conclusion, replayed.conclusion);
    };
    assert_eq!(one, other);
    assert_eq!(recorded.moment, replayed.moment);
    assert_eq!(recorded.effects, replayed.effects);
    assert_eq!(recorded.state, replayed.state);
    if recorded.state.is_some() {
        assert_eq!(recorded.virtual_ns, replayed.virtual_ns);
        assert_eq!(recorded.interrupts, replayed.interrupts);
    }
}

fn for_each_case(case: impl Fn(Clock, u64, &Program)) {
    for clock in CLOCKS {
        for seed in 0..SEEDS {
            let program = Program::random(seed, FINISHES[(seed % FINISHES.len() as u64) as usize]);
            let attempt = std::panic::AssertUnwindSafe(|| case(clock, seed, &program));
            if let Err(panic) = std::panic::catch_unwind(attempt) {
                eprintln!("failed with {clock:?}, seed {seed}");
                std::panic::resume_unwind(panic);
            }
        }
    }
}

#[test]
fn whoever_goes_on_from_a_checkpoint_comes_to_the_recorded_end() {
    let checkpoints = std::cell::Cell::new(0);
    for_each_case(|clock, seed, program| {
        let world = World::typing(seed);
        let (recorded, kept) =
            record_keeping(clock, program, &world, Disturbance::kicks(seed), seed);
        let recording = recorded.result.as_ref().expect("the run ends");
        checkpoints.set(checkpoints.get() + kept.len());
        for kept in kept.iter().step_by(1 + kept.len() / 5) {
            let kicks = Disturbance::kicks(seed + 500);
            let mut machine =
                resumed(clock, program, &recorded.records, kept, kicks).expect("a machine");
            let here = machine.consistent().expect("the engine tells").expect("it stands there");
            assert_eq!(digest(here).expect("a digest"), kept.state.digest(ram_digest(kept)));
            let outcome = machine.run().expect("the replay ends");
            assert_same_end(recording, &outcome);
            assert_eq!(outcome.events + kept.state.records, recording.events);
        }
    });
    assert!(checkpoints.get() > 1_000, "only {} checkpoints", checkpoints.get());
}

#[test]
fn whoever_runs_to_a_checkpoint_is_what_it_says() {
    for_each_case(|clock, seed, program| {
        let world = World::typing(seed);
        let (recorded, kept) =
            record_keeping(clock, program, &world, Disturbance::kicks(seed), seed);
        let kicks = Disturbance::kicks(seed + 700);
        let mut machine = replaying(clock, program, &recorded.records, kicks);
        for kept in &kept {
            let outcome = machine.run_until(kept.state.moment.tick).expect("the replay stops");
            assert!(matches!(outcome.conclusion, Conclusion::TargetReached));
            let here = machine.consistent().expect("the engine tells").expect("it stands there");
            let mut ram = Vec::new();
            let state = checkpoint(here, &mut |address, page| ram.push((address, page.to_vec())));
            assert_eq!(state.expect("a state"), kept.state);
            assert!(ram == kept.ram, "RAM at {}", kept.state.moment);
        }
    });
}

#[test]
fn checkpoints_change_nothing_that_is_recorded() {
    for_each_case(|clock, seed, program| {
        if clock.time == TimeSource::Host {
            return;
        }
        let world = World::empty();
        let (recorded, kept) = record_keeping(clock, program, &world, Disturbance::none(), seed);
        let mut plain =
            recording(clock, program, &world, Disturbance::none(), MemorySink::default());
        assert_same_end(recorded.outcome(), &plain.run().expect("the run ends"));
        assert!(!kept.is_empty());
    });
}

#[test]
fn a_state_that_no_machine_reaches_is_refused() {
    let clock = CLOCKS[0];
    let program = Program::random(1, FINISHES[0]);
    let (recorded, kept) =
        record_keeping(clock, &program, &World::typing(1), Disturbance::none(), 1);
    let last = kept.last().expect("a checkpoint");
    let changes: [fn(&mut MachineState); 8] = [
        |state| state.moment.rip ^= 1,
        |state| state.moment.tick += 1,
        |state| state.virtual_ns += 1,
        |state| state.base_tick = state.moment.tick + 1,
        |state| state.base_ns = u64::MAX,
        |state| state.console.bytes += 1,
        |state| state.devices.truncate(5),
        |state| state.engine.tick += 1,
    ];
    for (number, change) in changes.iter().enumerate() {
        let mut forged = last.clone();
        change(&mut forged.state);
        let result = resumed(clock, &program, &recorded.records, &forged, Disturbance::none());
        assert!(result.is_err(), "change {number}");
    }
}

#[test]
fn a_machine_that_has_run_past_a_boundary_is_not_consistent() {
    let clock = CLOCKS[0];
    let program = Program::random(2, FINISHES[0]);
    let world = World::typing(2);
    let mut machine =
        recording(clock, &program, &world, Disturbance::none(), MemorySink::default());
    assert!(machine.consistent().expect("the engine tells").is_some(), "nothing has happened");
    let ended: Result<Outcome, MachineError> = machine.run();
    assert!(ended.is_ok());
    assert!(machine.consistent().expect("the engine tells").is_none(), "the run has ended");
}
