//! One guest, recorded and replayed on simulated hardware.

use reprise::boot::{self, GuestSource};
use reprise_branch_clock::engine::{BranchClock, Counts, Parameters};
use reprise_branch_clock::settle::Stand;
use reprise_devices::board::{Board, BoardConfig};
use reprise_machine::clock::TimeSource;
use reprise_machine::engine::Engine;
use reprise_machine::inputs::{Recording, Replaying};
use reprise_machine::machine::Machine;
use reprise_machine::outcome::{Conclusion, MachineError, Outcome};
use reprise_machine::ram::GuestRam;
use reprise_simulated_hardware::{Disturbance, SimulatedVcpu};
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

    pub(crate) fn exact() -> Self {
        Self { disturbance: Disturbance::none(), skid: 1, stand: Stand::default() }
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
    fn start(&self, hardware: &Hardware) -> (BranchClock<SimulatedVcpu>, Board) {
        let ram = GuestRam::new(self.ram_mib).expect("the host has RAM");
        let config = BoardConfig { ram_bytes: ram.ram_bytes(), rtc_start_s: RTC_START_S };
        let state = boot::load(&self.source, &ram).expect("it boots");
        let vcpu = SimulatedVcpu::new(ram, hardware.disturbance).expect("the host has memory");
        let parameters = Parameters { skid: hardware.skid, stand: hardware.stand };
        let mut engine = BranchClock::new(vcpu, parameters).expect("it counts");
        engine.set_cpu_state(&state).expect("a first state");
        (engine, Board::new(&config))
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
pub(crate) fn assert_equal(recording: &Outcome, replay: &Outcome) {
    let (Conclusion::Ended(recorded), Conclusion::Ended(replayed)) =
        (&recording.conclusion, &replay.conclusion)
    else {
        panic!("recorded {:?}, replayed {:?}", recording.conclusion, replay.conclusion);
    };
    assert_eq!(recorded, replayed);
    assert_eq!(recording.moment, replay.moment);
    assert_eq!(recording.ticks, replay.ticks);
    assert_eq!(recording.effects, replay.effects);
    assert_eq!(recording.state, replay.state);
    assert_eq!(recording.events, replay.events);
    assert_eq!(recording.virtual_ns, replay.virtual_ns);
    assert_eq!(recording.interrupts, replay.interrupts);
    assert!(recording.state.is_some(), "the end is an exact moment");
}
