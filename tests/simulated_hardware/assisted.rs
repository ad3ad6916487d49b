//! Hardware that refuses instructions, which the software CPU executes: wherever that happens, and whether at all,
//! the run is the same.

use reprise_assist::AssistedVcpu;
use reprise_branch_clock::engine::BranchClock;
use reprise_branch_clock::time_stamp_trap::TimeStampTrap;
use reprise_branch_clock::vcpu::Vcpu;
use reprise_machine::engine::EngineError;
use reprise_machine::ram::GuestRam;
use reprise_simulated_hardware::{Disturbance, SimulatedVcpu};
use reprise_trace::event::Event;
use reprise_trace::header::Header;

use crate::case::{Case, Clocked, Hardware, Recorded, assert_equal};
use crate::time_stamps::Trapping;
use crate::{guest, linux};

/// Hardware that is assisted.
#[derive(Clone, Copy, Debug)]
struct Assisted(Hardware);

impl Assisted {
    fn new(seed: u64, refuse_every: u64) -> Self {
        let hardware = Hardware::intel(seed);
        let disturbance = Disturbance { refuse_every: Some(refuse_every), ..hardware.disturbance };
        Self(Hardware { disturbance, ..hardware })
    }
}

impl Clocked for Assisted {
    type Vcpu = AssistedVcpu<SimulatedVcpu>;

    fn hardware(&self) -> &Hardware {
        &self.0
    }

    fn on_hardware(&self, hardware: Hardware) -> Self {
        Self(hardware)
    }

    fn engine(&self, ram: GuestRam) -> Result<BranchClock<Self::Vcpu>, EngineError> {
        self.0.engine(ram)?.with_vcpu_within(|vcpu| Ok(AssistedVcpu::new(vcpu)))
    }

    fn simulated(engine: &BranchClock<Self::Vcpu>) -> &SimulatedVcpu {
        engine.vcpu().inner()
    }

    fn header(&self, case: &Case<'_>) -> Header {
        self.0.header(case)
    }
}

/// How often a recording says that it was assisted.
fn assists(recorded: &Recorded) -> u64 {
    let told = recorded.records.iter().filter_map(|record| match &record.event {
        Event::Assists(assists) => Some(assists.values().sum::<u64>()),
        _ => None,
    });
    told.sum()
}

/// Recorded with refusals, so many instructions from one to the next, and replayed with others and without.
fn replays(case: &Case<'_>, refuse_every: u64, seeds: std::ops::Range<u64>) {
    for seed in seeds {
        let recorded = case.record_on(&Assisted::new(seed, refuse_every)).1;
        let count = assists(&recorded);
        let what = case.source.cmdline;
        eprintln!("{what}, seed {seed}: {count} assists in {} ticks", recorded.outcome.ticks);
        assert!(count > 20, "{what}, seed {seed}: {count}");
        let other = 1_000 + seed;
        let (replay, engine) =
            case.replay_on(&recorded.records, &Assisted::new(other, 2 * refuse_every));
        let replay = replay.unwrap_or_else(|error| panic!("seeds {seed}, {other}: {error}"));
        assert_equal(&recorded.outcome, &replay, other);
        let again: u64 = engine.vcpu().assists().values().sum();
        assert!(again > 20, "{what}, seed {other}: {again}");
        let (replay, _) = case.replay(&recorded.records, &Hardware::intel(other));
        let replay = replay.unwrap_or_else(|error| panic!("seeds {seed}, {other}: {error}"));
        assert_equal(&recorded.outcome, &replay, other);
        case.replay_on_software(&recorded);
    }
}

#[test]
fn guests_whose_instructions_are_refused_replay_with_others_refused_and_with_none() {
    replays(&guest("ticks", "hz=2000 count=20", ""), 1_000, 1..5);
    replays(&guest("echo", "", "first line\rsecond line\rquit\r"), 30, 1..5);
}

#[test]
fn the_hard_positions_replay_with_instructions_refused() {
    for name in ["rep", "straight", "shadow", "hlt", "fault", "window", "user", "code", "ports"] {
        let cmdline = format!("do={name} hz=18000 count=20");
        // Mostly it sleeps.
        let refuse_every = if name == "hlt" { 30 } else { 2_000 };
        replays(&guest("positions", &cmdline, "two at one moment"), refuse_every, 1..2);
    }
}

/// The same, RDTSC trapped.
#[derive(Clone)]
struct Trapped {
    assisted: Assisted,
    trapping: Trapping,
}

impl Trapped {
    /// Linux's hardware, on which this is refused.
    fn new(case: &Case<'_>, seed: u64, refuse_every: Option<u64>) -> Self {
        let hardware = linux::running(linux::intel(seed));
        let disturbance = Disturbance { refuse_every, ..hardware.disturbance };
        let hardware = Hardware { disturbance, ..hardware };
        Self { assisted: Assisted(hardware), trapping: Trapping::of(case, hardware) }
    }
}

impl Clocked for Trapped {
    type Vcpu = TimeStampTrap<AssistedVcpu<SimulatedVcpu>>;

    fn hardware(&self) -> &Hardware {
        self.assisted.hardware()
    }

    fn on_hardware(&self, hardware: Hardware) -> Self {
        Self { assisted: Assisted(hardware), trapping: self.trapping.clone() }
    }

    fn engine(&self, ram: GuestRam) -> Result<BranchClock<Self::Vcpu>, EngineError> {
        self.assisted.engine(ram)?.trapping_time_stamps(self.trapping.kernel())
    }

    fn simulated(engine: &BranchClock<Self::Vcpu>) -> &SimulatedVcpu {
        engine.vcpu().inner().inner()
    }

    fn header(&self, case: &Case<'_>) -> Header {
        self.trapping.header(case)
    }
}

/// Its text is written by refused instructions, too, where it applies its alternatives.
#[test]
fn linux_starts_with_instructions_refused_and_its_time_stamps_trapped() {
    let Some(image) = linux::image() else { return };
    let case = Case { stops_ns: Some(linux::WINDOW_NS), ..linux::case(&image) };
    let hardware = Trapped::new(&case, 1, Some(20_000));
    let (engine, recorded) = case.record_on(&hardware);
    let traps = engine.vcpu().counts().expect("the kernel was entered");
    let (ticks, assists) = (recorded.outcome.ticks, assists(&recorded));
    eprintln!("{assists} assists in {ticks} ticks, {traps:?}");
    assert!(recorded.console.contains("PCI:"), "{}", recorded.console);
    assert!(assists > 1_000, "{assists}");
    linux::expect_trapped(&traps);
    let replay = case.replay_on(&recorded.records, &Trapped::new(&case, 2, Some(30_000))).0;
    assert_equal(&recorded.outcome, &replay.expect("it replays"), 2);
    case.expand(&recorded, &hardware.header(&case));
}
