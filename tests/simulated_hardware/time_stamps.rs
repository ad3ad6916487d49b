//! Guests that read the time-stamp counter, on hardware whose counter runs: every RDTSC is trapped, and its
//! answer logged.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use reprise_branch_clock::engine::{BranchClock, Parameters};
use reprise_branch_clock::time_stamp_trap::{TimeStampTrap, TrapCounts};
use reprise_devices::board::Board;
use reprise_machine::engine::Engine;
use reprise_simulated_hardware::SimulatedVcpu;
use reprise_time_stamp_sites::KernelText;
use reprise_trace::checkpoint::{EngineState, HiddenState};
use reprise_trace::header::{Header, Precaution, Treatment};

use crate::case::{Case, Hardware, Recorded, assert_equal};
use crate::guest;

type TrappingEngine = BranchClock<TimeStampTrap<SimulatedVcpu>>;

impl Case<'_> {
    /// As [`Case::start`], with RDTSC trapped.
    pub(crate) fn start_trapping(&self, hardware: &Hardware) -> (TrappingEngine, Board) {
        let (ram, state, board) = self.load();
        let mut vcpu = SimulatedVcpu::new(ram, hardware.disturbance).expect("the host has memory");
        vcpu.hide_time_stamp_counter();
        let kernel = KernelText::of_image(self.source.kernel).expect("it has sections");
        let vcpu = TimeStampTrap::new(vcpu, kernel).expect("it traps");
        let parameters = Parameters { skid: hardware.skid, stand: hardware.stand };
        let mut engine = BranchClock::new(vcpu, parameters).expect("it counts");
        engine.set_cpu_state(&state).expect("a first state");
        (engine, board)
    }

    /// The head of a recording that has the time stamps.
    fn trapped_header(&self) -> Header {
        let precaution = Precaution {
            what: Precaution::KERNEL_TIME_STAMPS.to_owned(),
            treatment: Treatment::Closed,
            how: "trapped".to_owned(),
        };
        Header { precautions: vec![precaution], ..self.header() }
    }

    /// As [`Case::record`], and what the trap did.
    pub(crate) fn record_trapping(&self, hardware: &Hardware) -> (Recorded, TrapCounts) {
        let (engine, board) = self.start_trapping(hardware);
        let world_clock_ns: Arc<AtomicU64> = engine.vcpu().inner().world_clock_ns();
        let (engine, recorded) = self.record_on(hardware, engine, board, world_clock_ns);
        let traps = engine.vcpu().counts().expect("the kernel was found");
        (recorded, traps)
    }

    /// Replays on trapping hardware under each seed, and expands on the software CPU.
    #[track_caller]
    pub(crate) fn replays_trapping(
        &self,
        recorded: &Recorded,
        hardware: impl IntoIterator<Item = Hardware>,
    ) {
        for hardware in hardware {
            let (engine, board) = self.start_trapping(&hardware);
            let seed = hardware.disturbance.seed;
            let (replay, _) = Case::replay_on(engine, board, &recorded.records);
            let replay = replay.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
            assert_equal(&recorded.outcome, &replay, seed);
        }
        self.expand(recorded, &self.trapped_header());
    }
}

/// User code's RDTSC: refused by the guest itself and asked by its kernel; and left to the processor, where
/// it is caught at the entry of the guest's #GP handler, and given back as if it had not faulted.
#[test]
fn time_stamps_of_user_code_replay() {
    for (tsd, user) in [("tsd=1", 0), ("tsd=0", 5)] {
        let cmdline = format!("scale=1 timing=1 {tsd}");
        let case = guest("compute", &cmdline, "");
        let (recorded, traps) = case.record_trapping(&Hardware::intel(1));
        eprintln!("{tsd}: {traps:?}");
        assert!(recorded.console.contains("compute: done"), "{:?}", recorded.console);
        assert_eq!((traps.user, traps.kernel), (user, 5 - user), "{traps:?}");
        assert_eq!((traps.open, traps.refused), (0, 0), "{traps:?}");
        assert_eq!(recorded.console.matches("nanoseconds: ").count(), 4);
        case.replays_trapping(&recorded, (2..4).map(Hardware::intel));
    }
}

/// RAM of a checkpoint has the guest's own bytes, and nothing tells the trap how far the kernel was.
#[test]
fn a_trap_takes_and_gives_no_checkpoint() {
    let case = guest("compute", "scale=1", "");
    let (mut plain, _) = case.start(&Hardware::intel(1));
    let (mut trapping, _) = case.start_trapping(&Hardware::intel(1));
    assert!(plain.save().expect("it can be asked").is_some());
    assert!(trapping.save().expect("it can be asked").is_none());
    let cpu = trapping.cpu_state().expect("it can be asked");
    let hidden = HiddenState { engine: String::new(), version: 1, bytes: Vec::new() };
    let error = trapping.restore(&EngineState { tick: 0, cpu, hidden }).expect_err("it is refused");
    assert!(error.to_string().contains("--engine soft"), "{error}");
}
