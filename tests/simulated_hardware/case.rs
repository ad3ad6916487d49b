//! One guest, recorded and replayed on simulated hardware.

use reprise::boot::{self, GuestSource};
use reprise_branch_clock::engine::{BranchClock, Counts, Parameters};
use reprise_branch_clock::settle::Stand;
use reprise_cpu::engine::SoftEngine;
use reprise_devices::board::{Board, BoardConfig};
use reprise_machine::clock::TimeSource;
use reprise_machine::engine::Engine;
use reprise_machine::inputs::{Recording, Replaying, Verification};
use reprise_machine::machine::Machine;
use reprise_machine::outcome::{Conclusion, MachineError, Outcome};
use reprise_machine::ram::GuestRam;
use reprise_simulated_hardware::resolve::resolve;
use reprise_simulated_hardware::{Disturbance, SimulatedVcpu};
use reprise_trace::cpu_state::CpuState;
use reprise_trace::event::Record;
use reprise_trace::log::{LogWriter, MemorySink};

use crate::world::SeededWorld;

/// Where the real-time clock starts: any time will do, as long as it is always the same.
const RTC_START_S: u64 = 1_700_000_000;

/// A guest, and what is typed to it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case<'a> {
    pub(crate) source: GuestSource<'a>,
    pub(crate) ram_mib: u64,
    pub(crate) typed: &'a str,
}

/// The hardware, and how the clock deals with it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hardware {
    pub(crate) disturbance: Disturbance,
    /// Conditional branches by which an overflow may be late, as the clock believes.
    pub(crate) skid: u64,
    pub(crate) stand: Stand,
}

impl Hardware {
    pub(crate) fn intel(seed: u64) -> Self {
        Self { disturbance: Disturbance::intel(seed), skid: 100, stand: Stand::default() }
    }

    pub(crate) fn zen(seed: u64) -> Self {
        Self { disturbance: Disturbance::zen(seed), skid: 10_000, stand: Stand::default() }
    }
}

/// What a recording left behind.
pub(crate) struct Recorded {
    pub(crate) outcome: Outcome,
    pub(crate) records: Vec<Record>,
    pub(crate) console: String,
    pub(crate) counts: Counts,
}

impl Case<'_> {
    fn load(&self) -> (GuestRam, CpuState, Board) {
        let ram = GuestRam::new(self.ram_mib).expect("the host has RAM");
        let config = BoardConfig { ram_bytes: ram.ram_bytes(), rtc_start_s: RTC_START_S };
        let state = boot::load(&self.source, &ram).expect("it boots");
        (ram, state, Board::new(&config))
    }

    fn start(&self, hardware: &Hardware) -> (BranchClock<SimulatedVcpu>, Board) {
        let (ram, state, board) = self.load();
        let mut vcpu = SimulatedVcpu::new(ram, hardware.disturbance).expect("the host has memory");
        vcpu.hide_time_stamp_counter();
        let parameters = Parameters { skid: hardware.skid, stand: hardware.stand };
        let mut engine = BranchClock::new(vcpu, parameters).expect("it counts");
        engine.set_cpu_state(&state).expect("a first state");
        (engine, board)
    }

    /// Resolves a recording's moments to instruction counts and replays it so on the soft engine.
    pub(crate) fn replay_resolved(&self, recorded: &Recorded) {
        let (ram, state, board) = self.load();
        let log = log_of(&recorded.records);
        let resolved =
            resolve(ram, &state, board, log, Verification::Exact).expect("the host has memory");
        assert_equal(&recorded.outcome, &resolved.outcome, 0);
        let (ram, state, board) = self.load();
        let mut engine = SoftEngine::new(ram).expect("the host has memory");
        engine.hide_time_stamp_counter();
        engine.set_cpu_state(&state).expect("a first state");
        let inputs = Replaying::new(log_of(&resolved.records));
        let mut machine =
            Machine::new(engine, board, inputs, TimeSource::Host).of_free_running_hardware();
        let outcome = machine.run().expect("the machine runs");
        assert_same_end(&recorded.outcome, &outcome, 0);
        assert_eq!(outcome.ticks, resolved.instructions);
    }

    pub(crate) fn record(&self, hardware: &Hardware) -> Recorded {
        let (engine, board) = self.start(hardware);
        let seed = hardware.disturbance.seed;
        let world = SeededWorld::new(seed, self.typed, engine.vcpu().world_clock_ns());
        let inputs = Recording::new(world, LogWriter::new(MemorySink::default()));
        let mut machine = Machine::new(engine, board, inputs, TimeSource::Host);
        let outcome = machine.run().expect("the machine runs");
        let (engine, _, inputs) = machine.into_parts();
        let (world, sink) = inputs.into_parts();
        let mut log = sink.expect("the log is closed").into_reader();
        let next = || log.next_record().expect("the log is whole");
        let records = std::iter::from_fn(next).map(|record| record.get().clone()).collect();
        let console = String::from_utf8_lossy(&world.console).into_owned();
        Recorded { outcome, records, console, counts: engine.counts() }
    }

    pub(crate) fn replay(
        &self,
        records: &[Record],
        hardware: &Hardware,
    ) -> (Result<Outcome, MachineError>, Counts) {
        let (engine, board) = self.start(hardware);
        let inputs = Replaying::new(log_of(records));
        let mut machine = Machine::new(engine, board, inputs, TimeSource::Host);
        let outcome = machine.run();
        (outcome, machine.into_parts().0.counts())
    }
}

/// A log of these records.
pub(crate) fn log_of(records: &[Record]) -> reprise_trace::log::LogReader {
    let mut writer = LogWriter::new(MemorySink::default());
    for record in records {
        writer.append(record.clone()).expect("memory takes it");
    }
    writer.finish().expect("memory takes it").into_reader()
}

/// Holds a replay to its recording.
#[track_caller]
pub(crate) fn assert_equal(recording: &Outcome, replay: &Outcome, seed: u64) {
    assert_same_end(recording, replay, seed);
    assert_eq!(recording.moment, replay.moment, "seed {seed}");
    assert_eq!(recording.ticks, replay.ticks, "seed {seed}");
}

/// The same for a replay under another clock.
#[track_caller]
fn assert_same_end(recording: &Outcome, replay: &Outcome, seed: u64) {
    let (Conclusion::Ended(recorded), Conclusion::Ended(replayed)) =
        (&recording.conclusion, &replay.conclusion)
    else {
        panic!(
            "seed {seed}: recorded {:?}, replayed {:?}",
            recording.conclusion, replay.conclusion
        );
    };
    assert_eq!(recorded, replayed, "seed {seed}");
    assert_eq!(recording.effects, replay.effects, "seed {seed}");
    assert_eq!(recording.state, replay.state, "seed {seed}");
    assert_eq!(recording.events, replay.events, "seed {seed}");
    assert_eq!(recording.virtual_ns, replay.virtual_ns, "seed {seed}");
    assert_eq!(recording.interrupts, replay.interrupts, "seed {seed}");
    assert!(recording.state.is_some(), "the end is an exact moment");
}
