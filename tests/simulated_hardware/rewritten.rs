//! Recordings of the software CPU, rewritten for the branch clock and replayed on simulated hardware: each
//! comes to the very state and console that was recorded.

use std::fs::File;
use std::path::Path;

use reprise_branch_clock::engine::{BranchClock, Parameters};
use reprise_devices::time::VirtualTime;
use reprise_guest_images::COMPUTE_AT_SCALE_1;
use reprise_machine::clock::TimeSource;
use reprise_machine::digest::{AccessedBits, StateDigest};
use reprise_machine::engine::{Engine, EngineError};
use reprise_machine::inputs::{Inputs, Recording, Replaying};
use reprise_machine::machine::Machine;
use reprise_machine::outcome::{Conclusion, Outcome};
use reprise_machine::ram::GuestRam;
use reprise_replay::{Replayable, RewriteError, RewritingCounts, Rewritten, Start};
use reprise_simulated_hardware::{Disturbance, SimulatedVcpu, Skid};
use reprise_trace::event::Event;
use reprise_trace::header::Header;
use reprise_trace::log::LogWriter;
use reprise_trace::moment::TickKind;
use reprise_trace::recording::RecordingWriter;
use tempfile::TempDir;

use crate::case::{Case, Hardware};
use crate::guest;
use crate::software::KickedSoftware;
use crate::world::SeededWorld;

const NS_PER_INSTRUCTION: u64 = 1;
const KICK_EVERY: u64 = 3_000;

/// A recording of the software CPU, and the one that it was rewritten as.
pub(crate) struct Pair {
    _directory: TempDir,
    pub(crate) recorded: Outcome,
    devices: [u8; 32],
    pub(crate) console: String,
    pub(crate) result: Rewritten,
    pub(crate) rewritten: Replayable,
}

impl Case<'_> {
    /// The outcome, the devices at its virtual time, and the console.
    fn record_on_software(
        &self,
        path: &Path,
        seed: u64,
        kick_every: u64,
    ) -> (Outcome, [u8; 32], String) {
        let header = Header {
            tick_kind: TickKind::Instruction,
            ns_per_tick: NS_PER_INSTRUCTION,
            engine: "soft".to_owned(),
            clock: "instructions".to_owned(),
            ..self.header()
        };
        let file = File::create(path).expect("the host has room");
        let mut writer = RecordingWriter::create(file, &header).expect("it is written");
        let images = [Some(self.source.kernel), self.source.initrd];
        for (index, image) in images.into_iter().flatten().enumerate() {
            writer.write_image(index, image).expect("it is written");
        }
        let (ram, state, board) = self.load();
        let mut engine = KickedSoftware::new(ram, seed, kick_every);
        engine.set_cpu_state(&state).expect("a first state");
        let world =
            SeededWorld::new(seed, self.typed, engine.world_clock_ns()).stopping_at(self.stops_ns);
        let inputs = Recording::new(world, LogWriter::new(writer));
        let time = TimeSource::Ticks { ns_per_tick: NS_PER_INSTRUCTION };
        let mut machine = Machine::new(engine, board, inputs, time);
        let outcome = machine.run().expect("the machine runs");
        let devices = devices_at_the_end(&mut machine, outcome.virtual_ns);
        let (world, sink) = machine.into_parts().2.into_parts();
        sink.expect("the log is closed").finish().expect("it is written");
        (outcome, devices, String::from_utf8_lossy(&world.console).into_owned())
    }

    /// Records on the software CPU under a seed, and rewrites that.
    pub(crate) fn rewrite(&self, seed: u64) -> Pair {
        self.try_rewrite(seed, KICK_EVERY).unwrap_or_else(|error| panic!("seed {seed}: {error}"))
    }

    pub(crate) fn try_rewrite(&self, seed: u64, kick_every: u64) -> Result<Pair, RewriteError> {
        let directory = tempfile::tempdir().expect("the host has room");
        let paths = ["soft.rr", "rewritten.rr"].map(|name| directory.path().join(name));
        let (recorded, devices, console) = self.record_on_software(&paths[0], seed, kick_every);
        let soft = Replayable::open(&paths[0]).expect("it is a recording");
        let out = File::create(&paths[1]).expect("the host has room");
        let (_, result) = soft.rewrite(out, |inputs| inputs, Machine::run)?;
        let rewritten = Replayable::open(&paths[1]).expect("it is a recording");
        Ok(Pair { _directory: directory, recorded, devices, console, result, rewritten })
    }
}

/// As [`Hardware::engine`], with a time-stamp counter in CPUID: the guest has seen it.
fn showing(hardware: &Hardware, ram: GuestRam) -> Result<BranchClock<SimulatedVcpu>, EngineError> {
    let vcpu = SimulatedVcpu::new(ram, hardware.disturbance)?;
    BranchClock::new(vcpu, Parameters { skid: hardware.skid, stand: hardware.stand })
}

/// Each answered RDTSC carries the devices on, where one that is computed does not: they are compared when all of
/// them have been carried to the run's last moment.
fn devices_at_the_end<E: Engine, I: Inputs>(machine: &mut Machine<E, I>, ns: u64) -> [u8; 32] {
    machine.carry_devices(VirtualTime::from_ns(ns));
    machine.state_digest().expect("it can be asked").devices
}

impl Pair {
    /// Holds a replay to what the software CPU recorded.
    #[track_caller]
    fn assert_same(
        &self,
        outcome: &Outcome,
        devices: [u8; 32],
        exact: Option<StateDigest>,
        seed: u64,
    ) {
        let (Conclusion::Ended(recorded), Conclusion::Ended(replayed)) =
            (&self.recorded.conclusion, &outcome.conclusion)
        else {
            panic!("seed {seed}: {:?}", outcome.conclusion);
        };
        let (there, here) = (&self.recorded, outcome);
        assert_eq!(recorded, replayed, "seed {seed}");
        assert_eq!(there.effects, here.effects, "seed {seed}");
        assert_eq!(there.interrupts, here.interrupts, "seed {seed}");
        let [there_state, here_state] =
            [there, here].map(|it| it.state.expect("the end is an exact moment"));
        assert_eq!(there_state.cpu, here_state.cpu, "seed {seed}: the CPU");
        if let Some(exact) = exact {
            assert_eq!(there_state.ram, exact.ram, "seed {seed}: RAM");
        }
        assert_eq!(self.devices, devices, "seed {seed}: the devices");
    }

    fn run<E: Engine>(
        &self,
        make: impl Fn(GuestRam, u64) -> Result<E, EngineError>,
        sets_accessed_bits: bool,
        seed: u64,
    ) -> u32 {
        let replayable = &self.rewritten;
        let mut machines = 0;
        let arrived = replayable
            .run_going_back(
                replayable.begin(Start::Run).expect("it begins"),
                |beginning| {
                    machines += 1;
                    let machine = machines - 1;
                    beginning.into_machine(|ram| make(ram, machine), |inputs: Replaying| inputs)
                },
                Machine::run,
            )
            .unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        let outcome = arrived.outcome.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        let mut machine = arrived.machine;
        let exact = machine.state_digest_with(AccessedBits::Exact).expect("it can be asked");
        let devices = devices_at_the_end(&mut machine, self.recorded.virtual_ns);
        self.assert_same(&outcome, devices, (!sets_accessed_bits).then_some(exact), seed);
        arrived.times_back
    }

    /// Replays on this hardware.
    pub(crate) fn replay(&self, hardware: &Hardware) -> u32 {
        let Disturbance { seed, access_every, .. } = hardware.disturbance;
        // Another one each time that it goes back.
        let make = |ram, machine: u64| {
            let mut hardware = *hardware;
            hardware.disturbance.seed += machine << 32;
            showing(&hardware, ram)
        };
        self.run(make, access_every.is_some(), seed)
    }

    /// Replays on the software CPU, which finds the branch clock's moments by itself.
    pub(crate) fn replay_on_software(&self) {
        let mut machine = self.rewritten.soft_machine(Start::Run).expect("it begins");
        let outcome = machine.run().expect("it runs");
        let exact = machine.state_digest_with(AccessedBits::Exact).expect("it can be asked");
        let devices = devices_at_the_end(&mut machine, self.recorded.virtual_ns);
        self.assert_same(&outcome, devices, Some(exact), 0);
    }

    pub(crate) fn tell(&self, name: &str) {
        let mut log = self.rewritten.recording().log();
        let (mut times, mut answers, mut others) = (0, 0, 0);
        while let Some(record) = log.next_record().expect("the log is whole") {
            match record.get().event {
                Event::Time(_) => times += 1,
                Event::ClockRead(_) => answers += 1,
                _ => others += 1,
            }
        }
        let Outcome { ticks, interrupts, .. } = self.recorded;
        eprintln!(
            "{name}: {ticks} instructions, {interrupts} interrupts; {times} times, {answers} answers, \
             {others} other records; {:?}",
            self.result.counts
        );
    }
}

/// Hardware without kicks: a replay's are nobody's.
fn quiet(hardware: Hardware) -> Hardware {
    let disturbance = Disturbance { access_every: None, ..hardware.disturbance };
    Hardware { disturbance, ..hardware }
}

#[track_caller]
fn replays_rewritten(
    case: &Case<'_>,
    expected: &str,
    seeds: std::ops::Range<u64>,
) -> RewritingCounts {
    let mut all = RewritingCounts::default();
    for seed in seeds {
        let pair = case.rewrite(seed);
        pair.tell(&format!("seed {seed}"));
        assert!(pair.console.contains(expected), "seed {seed}: {:?}", pair.console);
        assert!(!pair.result.end_is_open, "seed {seed}");
        pair.replay_on_software();
        let other = 1_000 * (seed + 1);
        pair.replay(&quiet(Hardware::intel(other)));
        pair.replay(&Hardware::intel(other + 1));
        pair.replay(&Hardware::zen(other + 2));
        all.put_before += pair.result.counts.put_before;
        all.put_behind += pair.result.counts.put_behind;
    }
    all
}

#[test]
fn hello_is_rewritten() {
    replays_rewritten(&guest("hello", "", ""), "Hello from a bare-metal guest", 0..2);
    replays_rewritten(&guest("hello32", "", ""), "Hello from a 32-bit guest", 0..2);
}

#[test]
fn ticks_is_rewritten() {
    replays_rewritten(&guest("ticks", "hz=18000 count=60 poll=40", ""), "ticks: ", 0..10);
}

#[test]
fn echo_is_rewritten() {
    let case = guest("echo", "", "first line\rsecond line\rquit\r");
    replays_rewritten(&case, "echo: 28 bytes", 0..10);
}

#[test]
fn compute_is_rewritten() {
    replays_rewritten(&guest("compute", "scale=1", ""), COMPUTE_AT_SCALE_1, 0..1);
}

const POSITIONS: [&str; 9] =
    ["rep", "straight", "itself", "shadow", "hlt", "fault", "window", "user", "code"];

fn position(name: &str, seeds: std::ops::Range<u64>) -> RewritingCounts {
    let cmdline = format!("do={name} hz=18000 count=8");
    let case = guest("positions", &cmdline, "two at one moment");
    let counts = replays_rewritten(&case, &format!("positions: {name}, hash "), seeds);
    eprintln!("{name}: {counts:?}");
    counts
}

/// Where interrupts land in a soft recording nobody chose for a branch clock.
#[test]
fn the_hard_positions_are_rewritten() {
    for name in POSITIONS {
        position(name, 0..1);
    }
}

/// Amid shadows some have to be put elsewhere.
#[test]
fn what_enters_in_a_shadow_is_put_beside_it() {
    let counts = position("shadow", 1..5);
    assert!(counts.put_before > 0 && counts.put_behind > 0, "{counts:?}");
}

#[test]
#[ignore = "takes minutes: ten recordings of each position"]
fn the_hard_positions_are_rewritten_ten_of_ten() {
    for name in POSITIONS {
        position(name, 0..10);
    }
}

/// Where memory alone tells the rounds of a loop apart, no clock of branches finds one again.
#[test]
fn what_hardware_cannot_find_is_refused() {
    let case = guest("positions", "do=memory hz=18000 count=20", "");
    let error = case.try_rewrite(0, KICK_EVERY).err().expect("it is refused").to_string();
    assert!(error.contains("no breakpoint finds again"), "{error}");
    assert!(error.contains("--engine soft") && !error.contains('\n'), "{error}");
}

/// Those of user code and of a kernel are answered as recorded, by hardware whose counter shows something else.
#[test]
fn time_stamps_are_answered_as_recorded() {
    for (tsd, user) in [("tsd=0", 5), ("tsd=1", 0)] {
        let cmdline = format!("scale=1 timing=1 {tsd}");
        let case = guest("compute", &cmdline, "");
        let pair = case.rewrite(1);
        pair.tell(tsd);
        let counts = pair.result.counts;
        assert_eq!((counts.time_stamps, counts.user_time_stamps), (5, user), "{tsd}");
        pair.replay_on_software();
        for seed in 2..4 {
            pair.replay(&Hardware::intel(seed));
            pair.replay(&Hardware::zen(seed));
        }
    }
}

/// Guests that wait for their timer in HLT.
#[test]
fn sleeps_are_rewritten() {
    replays_rewritten(&guest("ticks", "hz=1000 count=40 sleep=10", ""), "ticks: ", 0..3);
}

#[test]
fn a_replay_of_what_was_rewritten_goes_back_where_the_counter_was_late() {
    let pair = guest("ticks", "hz=500 count=12 poll=100000000", "").rewrite(1);
    let mut times_back = 0;
    for seed in 2..5 {
        let disturbance = Disturbance {
            skid: Skid::Unbounded { usual: 1_000, seldom: 20 },
            kick_every: None,
            signal_every: None,
            ..Disturbance::zen(seed)
        };
        times_back += pair.replay(&Hardware { disturbance, ..Hardware::zen(seed) });
    }
    eprintln!("{times_back} times back");
    assert!(times_back > 0);
}
