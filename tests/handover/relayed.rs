//! Runs on one engine after the other.

use reprise_assist::Assisted;
use reprise_cpu::engine::SoftEngine;
use reprise_kvm::{KvmClock, KvmEngine};
use reprise_machine::engine::{Access, Engine, EngineError, Exit};
use reprise_machine::inputs::{Planned, Then, When};
use reprise_machine::ram::GuestRam;
use reprise_machine::relay::{MakeEngine, Relay};
use reprise_random::Random;
use reprise_replay::RecordedClock;
use reprise_trace::cpu_state::{RCX, RDX};
use reprise_trace::event::HandOver;
use reprise_trace::header::{CpuModelInfo, GuestInfo, Header, HostInfo, MachineInfo};
use reprise_trace::moment::TickKind;

use crate::bare;
use crate::guest::{Guest, SOFT_TIME, assert_same_run, to_instructions};

fn make_engines() -> MakeEngine {
    Box::new(|to: &HandOver, ram: GuestRam| {
        Ok(match (to.engine.as_str(), to.tick_kind) {
            ("kvm", TickKind::Exit) => kvm(ram, KvmClock::Sync)?,
            ("kvm", _) => kvm(ram, KvmClock::Step)?,
            _ => Box::new(SoftEngine::new(ram)?),
        })
    })
}

fn kvm(ram: GuestRam, clock: KvmClock) -> Result<Box<dyn Engine>, EngineError> {
    Ok(Box::new(Assisted::new(KvmEngine::new(ram, clock)?)))
}

fn relay(ram: GuestRam) -> Result<Relay, EngineError> {
    Relay::new(ram, &to_instructions("soft"), make_engines())
}

/// Why this host's KVM cannot be used so, if it cannot.
fn kvm_is_missing(clock: KvmClock) -> bool {
    let ram = GuestRam::new(4).expect("4 MiB");
    let made = KvmEngine::new(ram, clock);
    if let Err(error) = &made {
        eprintln!("skipped: {error}");
    }
    made.is_err()
}

fn hand_over(at: When, to: HandOver) -> Planned {
    Planned { at, then: Then::HandOver(to) }
}

/// Moments in the first so many ticks, in their order, each once.
fn moments(seed: u64, count: usize, ticks: u64) -> Vec<u64> {
    let mut random = Random::new(seed);
    let mut moments: Vec<_> = (0..count).map(|_| 1 + random.below(ticks)).collect();
    moments.sort_unstable();
    moments.dedup();
    moments
}

/// Records with hand-overs at random moments, to `middle` and back, which must change nothing; replays
/// with them, and on the software CPU alone.
fn changes_nothing(guest: &Guest<'_>, middle: &str, handed: usize, ticks: u64, seeds: u64) {
    let plain = guest.record(SOFT_TIME, Vec::new(), SoftEngine::new);
    assert!(plain.outcome.ticks > ticks, "{} has {} ticks", guest.name, plain.outcome.ticks);
    for seed in 0..seeds {
        let what = format!("{}, seed {seed}", guest.name);
        let plan = moments(seed, handed, ticks).into_iter().enumerate().map(|(number, tick)| {
            let engine = if number % 2 == 0 { middle } else { "soft" };
            hand_over(When::Tick(tick), to_instructions(engine))
        });
        let recorded = guest.record(SOFT_TIME, plan.collect(), relay);
        assert_same_run(&plain.outcome, &recorded.outcome, &what);
        assert!(!recorded.outcome.hand_overs.is_empty(), "{what}");
        let replayed = guest.replay(SOFT_TIME, &recorded.records, relay);
        assert_same_run(&recorded.outcome, &replayed, &what);
        assert_eq!(recorded.outcome.hand_overs, replayed.hand_overs, "{what}");
        let alone = guest.replay(SOFT_TIME, &recorded.records, SoftEngine::new);
        assert_same_run(&recorded.outcome, &alone, &what);
    }
}

const HELLO: Guest<'static> = Guest { name: "hello", cmdline: "", typed: "" };
const TICKS: Guest<'static> =
    Guest { name: "ticks", cmdline: "hz=18000 count=40 poll=40", typed: "" };
const COMPUTE: Guest<'static> = Guest { name: "compute", cmdline: "scale=1", typed: "" };

#[test]
fn from_one_software_cpu_to_another_changes_nothing() {
    changes_nothing(&HELLO, "soft", 20, 500, 10);
    changes_nothing(&TICKS, "soft", 20, 1_000_000, 10);
    changes_nothing(&COMPUTE, "soft", 20, 15_000_000, 3);
}

#[test]
fn from_soft_to_stepped_kvm_and_back_changes_nothing() {
    if kvm_is_missing(KvmClock::Step) {
        return;
    }
    changes_nothing(&HELLO, "kvm", 6, 500, 20);
    changes_nothing(&TICKS, "kvm", 4, 20_000, 10);
}

/// What a recording of exits says of itself.
fn header_of_exits() -> Header {
    Header {
        machine: MachineInfo { ram_mib: 4, rtc_start_s: 0 },
        cpu_model: CpuModelInfo { name: String::new(), version: 1 },
        tick_kind: TickKind::Exit,
        ns_per_tick: 0,
        engine: "kvm".to_owned(),
        clock: "sync".to_owned(),
        host: HostInfo::default(),
        guest: GuestInfo { name: String::new(), command_line: String::new(), images: Vec::new() },
        created_unix_s: 0,
        reprise_version: String::new(),
        precautions: Vec::new(),
    }
}

/// Where each access is a tick, nothing may enter amid an instruction: whoever has the engine within must say so.
#[test]
fn between_the_accesses_of_an_instruction_nothing_enters_by_a_relay() {
    /// rep outsb
    const CODE: &[u8] = &[0xf3, 0x6e];
    const ACCESSES: u64 = 3;
    let header = header_of_exits();
    let to =
        HandOver { clock: "sync".to_owned(), tick_kind: TickKind::Exit, ..to_instructions("kvm") };
    let in_place: MakeEngine =
        Box::new(move |_, ram| Ok(Box::new(RecordedClock::new(ram, &header)?)));
    let mut all = vec![("the software CPU in its place", in_place)];
    if !kvm_is_missing(KvmClock::Sync) {
        all.push(("KVM, assisted", make_engines()));
    }
    for (name, make) in all {
        let mut relay = Relay::new(bare::ram(CODE), &to, make).expect("it counts exits");
        let mut state = bare::state();
        (state.gpr[RDX], state.gpr[RCX]) = (0x3f8, ACCESSES);
        relay.set_cpu_state(&state).expect("it takes any");
        for left in (0..ACCESSES).rev() {
            let exit = relay.run(u64::MAX).expect("it runs");
            assert!(matches!(exit, Exit::Access(Access::PortWrite { .. })), "{name}: {exit:?}");
            relay.finish_access(0).expect("it is answered");
            let amid = relay.amid_accesses().expect("it can be asked");
            assert_eq!(amid, left != 0, "{name}, {left} left");
        }
        assert_eq!(relay.tick(), ACCESSES, "{name}");
        assert_eq!(relay.run(u64::MAX).expect("it runs"), Exit::Halt, "{name}");
    }
}
