//! Recorded on a CPU whose maker leaves undefined flags otherwise, replayed on this one: the comparison
//! sets aside those flags and nothing else, and takes them over, so that what is made of them later is
//! what was recorded.

use std::collections::BTreeSet;

use reprise::session::replay::{self, ReplayOptions};
use reprise_cpu::engine::SoftEngine;
use reprise_cpu::flag_laws::FlagLaws;
use reprise_host::host_info;
use reprise_machine::clock::TimeSource;
use reprise_machine::divergence::{Difference, Divergence};
use reprise_machine::engine::Engine;
use reprise_machine::inputs::{Recording, Replaying, Verification};
use reprise_machine::lawful::Lawful;
use reprise_machine::machine::Machine;
use reprise_machine::outcome::{Conclusion, Outcome};
use reprise_replay::{OnSoftware, RecordedClock, Replayable, Start, compare};
use reprise_trace::header::{Header, HostInfo};
use reprise_trace::log::{LogWriter, MemorySink};
use reprise_trace::moment::TickKind;

use crate::case::{Case, Hardware, Recorded, assert_equal, log_of};
use crate::guest;
use crate::kept::ToFile;
use crate::linux;
use crate::world::SeededWorld;

const OTHER: &str = "OtherMaker";
/// A recording that does not name its CPU counts as this host's.
const THIS: &str = "";

fn other_maker(seed: u64) -> Hardware {
    let intel = Hardware::intel(seed);
    Hardware { disturbance: intel.disturbance.of_other_maker(), ..intel }
}

fn header(case: &Case<'_>, vendor: &str) -> Header {
    let host = HostInfo { cpu_vendor: vendor.to_owned(), ..HostInfo::default() };
    Header { host, ..case.header() }
}

/// Replays on the software CPU what a CPU of this vendor recorded.
fn replay_of(case: &Case<'_>, recorded: &Recorded, header: &Header) -> Outcome {
    replay_on_host(case, recorded, header, 0)
}

/// The same on a host that leaves these flags inverted where they are undefined.
fn replay_on_host(
    case: &Case<'_>,
    recorded: &Recorded,
    header: &Header,
    inverted_flags: u64,
) -> Outcome {
    let (ram, state, board) = case.load();
    let mut engine = RecordedClock::new(ram, header).expect("the host has memory");
    engine.software().invert_undefined_flags(inverted_flags);
    // As on the hardware.
    engine.software().stop_time_stamp_counter();
    engine.set_cpu_state(&state).expect("a first state");
    let inputs = Replaying::new(log_of(&recorded.records)).verifying(Verification::AcrossEngines);
    let mut machine = Machine::new(engine, board, inputs, TimeSource::of(header.ns_per_tick));
    machine.run().expect("the machine runs")
}

fn lawful(outcome: &Outcome) -> Vec<Lawful> {
    outcome.set_aside.iter().map(|it| it.what).collect()
}

fn divergence(outcome: &Outcome) -> &Divergence {
    match &outcome.conclusion {
        Conclusion::Diverged(divergence) => divergence,
        other => panic!("{other:?}"),
    }
}

#[test]
fn flags_of_another_maker_are_set_aside_and_taken_over() {
    let ticks = guest("ticks", "hz=18000 count=60 poll=40", "");
    let echo = guest("echo", "", "first line\rsecond line\rquit\r");
    let mut records = BTreeSet::new();
    for seed in 1..6 {
        for case in [&ticks, &echo] {
            let recorded = case.record(&other_maker(seed));
            let outcome = replay_of(case, &recorded, &header(case, OTHER));
            assert_equal(&recorded.outcome, &outcome, seed);
            assert_eq!(lawful(&outcome), [Lawful::UndefinedFlags], "seed {seed}");
            records.insert(outcome.set_aside[0].records);
            // Whoever takes it for his own CPU's recording finds the first of them.
            let outcome = replay_of(case, &recorded, &header(case, THIS));
            let difference = divergence(&outcome).difference;
            assert!(
                matches!(difference, Difference::CpuState | Difference::Passed),
                "seed {seed}: {difference:?}"
            );
        }
    }
    assert!(records.len() > 1, "records with such flags: {records:?}");
}

#[test]
fn a_recording_of_this_maker_has_nothing_set_aside() {
    let case = guest("ticks", "hz=18000 count=60 poll=40", "");
    let recorded = case.record(&Hardware::intel(5));
    let outcome = replay_of(&case, &recorded, &header(&case, OTHER));
    assert_equal(&recorded.outcome, &outcome, 5);
    assert_eq!(lawful(&outcome), []);
}

#[test]
fn flags_that_the_guest_saved_in_memory_are_told_at_the_end_alone() {
    let case = guest("compute", "scale=1", "");
    for seed in 1..4 {
        let recorded = case.record(&other_maker(seed));
        let outcome = replay_of(&case, &recorded, &header(&case, OTHER));
        let divergence = divergence(&outcome);
        assert_eq!(divergence.difference, Difference::FinalState, "seed {seed}: {divergence}");
        assert_eq!(divergence.moment, recorded.outcome.moment, "seed {seed}");
        assert_eq!(lawful(&outcome), [Lawful::UndefinedFlags], "seed {seed}");
    }
}

/// The header of what this host's CPU recorded, as a host of another model reads it; `None`, which is said, if
/// it is unknown how this CPU leaves undefined flags.
fn measured(case: &Case<'_>) -> Option<Header> {
    let host = host_info();
    let Some(_) = FlagLaws::of(&host.cpu_vendor, host.cpu_family) else {
        eprintln!("skipped: {} was not measured", host.cpu_brand);
        return None;
    };
    let host = HostInfo { cpu_model: host.cpu_model ^ 1, ..host };
    Some(Header { host, ..case.header() })
}

/// A recording of this CPU on a host of another maker: RAM is equal as well.
fn is_equal_on_another_host(case: &Case<'_>, hardware: &Hardware) {
    let Some(header) = measured(case) else { return };
    let recorded = case.record(hardware);
    let seed = hardware.disturbance.seed;
    let outcome = replay_on_host(case, &recorded, &header, u64::MAX);
    assert_equal(&recorded.outcome, &outcome, seed);
    assert_eq!(lawful(&outcome), [], "seed {seed}");
    // What shows that the flags were other ones: without the laws they are missed.
    let outcome = replay_on_host(case, &recorded, &self::header(case, OTHER), u64::MAX);
    eprintln!("seed {seed}, without laws: {:?}, {:?}", outcome.conclusion, outcome.set_aside);
    assert!(!lawful(&outcome).is_empty(), "seed {seed}");
}

#[test]
fn a_measured_cpu_is_followed_on_another_host() {
    for seed in 1..3 {
        is_equal_on_another_host(&guest("compute", "scale=1", ""), &Hardware::intel(seed));
        is_equal_on_another_host(&guest("echo", "", "a line\rquit\r"), &Hardware::intel(seed));
    }
}

#[test]
#[ignore = "takes minutes"]
fn linux_of_a_measured_cpu_is_followed_on_another_host() {
    let Some(image) = linux::image() else { return };
    is_equal_on_another_host(&linux::case(&image), &linux::intel(1));
}

/// Records on the software CPU as another maker's, where a tick is an instruction.
fn recorded_on_software(case: &Case<'_>, seed: u64) -> Recorded {
    let (ram, state, board) = case.load();
    let mut engine = SoftEngine::new(ram).expect("the host has memory");
    engine.invert_undefined_flags(u64::MAX);
    engine.set_cpu_state(&state).expect("a first state");
    let world = SeededWorld::new(seed, case.typed, Default::default());
    let inputs = Recording::new(world, LogWriter::new(MemorySink::default()));
    let time = TimeSource::Ticks { ns_per_tick: 1 };
    let mut machine = Machine::new(engine, board, inputs, time);
    let outcome = machine.run().expect("the machine runs");
    let (_, _, inputs) = machine.into_parts();
    let (world, sink) = inputs.into_parts();
    let mut log = sink.expect("the log is closed").into_reader();
    let next = || log.next_record().expect("the log is whole");
    let records = std::iter::from_fn(next).map(|record| record.get().clone()).collect();
    let console = String::from_utf8_lossy(&world.console).into_owned();
    Recorded { outcome, records, console, counts: Default::default() }
}

fn header_of_software(case: &Case<'_>, vendor: &str) -> Header {
    Header {
        tick_kind: TickKind::Instruction,
        ns_per_tick: 1,
        engine: "soft".to_owned(),
        clock: "instructions".to_owned(),
        ..header(case, vendor)
    }
}

/// Checkpoints of another maker's CPU are come to as well, flags that are undefined there set aside.
#[test]
fn checkpoints_of_another_maker_are_compared() {
    let case = guest("echo", "", "first line\rsecond line\rquit\r");
    let recorded = recorded_on_software(&case, 1);
    let directory = tempfile::TempDir::with_prefix("reprise-test-").expect("a directory");
    let file = directory.path().join("other.rr");
    case.write_as(&recorded, &file, &header_of_software(&case, OTHER));
    let identity = Replayable::open(&file).expect("it opens").recording().identity();
    let (ram, state, board) = case.load();
    let mut engine = SoftEngine::new(ram).expect("the host has memory");
    engine.invert_undefined_flags(u64::MAX);
    engine.set_cpu_state(&state).expect("a first state");
    let inputs = Replaying::new(log_of(&recorded.records));
    let mut machine = Machine::new(engine, board, inputs, TimeSource::Ticks { ns_per_tick: 1 });
    let every = recorded.outcome.ticks / 60;
    machine.set_checkpointer(Box::new(ToFile::beside(&file, &identity, every)));
    assert_equal(&recorded.outcome, &machine.run().expect("the machine runs"), 1);
    drop(machine);

    let replayable = Replayable::open(&file).expect("it opens");
    let mut machine = replayable.soft_machine(Start::Run).expect("it begins");
    let mut others = 0;
    for info in replayable.checkpoints() {
        let tick = info.moment.tick;
        assert!(machine.advance_to(tick).expect("the machine runs").is_none());
        let here = machine.engine().cpu_state().expect("a state").digest();
        others += u32::from(*here.as_bytes() != info.digest.cpu);
        assert_eq!(compare(&mut machine, info).expect("it stands there"), None, "tick {tick}");
    }
    eprintln!("{others} of {} checkpoints have other flags", replayable.checkpoints().len());
    assert!(others > 0);
}

#[test]
fn so_it_is_where_ticks_are_instructions() {
    for seed in 1..5 {
        let case = guest("echo", "", "first line\rsecond line\rquit\r");
        let recorded = recorded_on_software(&case, seed);
        let outcome = replay_of(&case, &recorded, &header_of_software(&case, OTHER));
        assert_equal(&recorded.outcome, &outcome, seed);
        assert_eq!(lawful(&outcome), [Lawful::UndefinedFlags], "seed {seed}");
    }
}

#[test]
fn a_file_says_what_was_set_aside_and_what_the_code_holds() {
    let case = guest("ticks", "hz=18000 count=60 poll=40", "");
    let recorded = case.record(&other_maker(3));
    let directory = tempfile::TempDir::with_prefix("reprise-test-").expect("a directory");
    let file = directory.path().join("other.rr");
    case.write_as(&recorded, &file, &header(&case, OTHER));
    let replayable = replay::open_replayable(&file).expect("it opens");
    let replayed = replay::replay(&replayable, ReplayOptions::default()).expect("it replays");
    let report = replayed.report;
    assert_eq!(report.verified, Some(true), "{report:#?}");
    let set_aside: Vec<_> = report.set_aside.iter().map(|it| it.what.as_str()).collect();
    assert_eq!(
        set_aside,
        [
            "flags that the guest's last instructions left undefined",
            "accessed bits of the guest's page tables"
        ]
    );
    assert_eq!(report.maker_dependent, []);
    let note =
        replayed.notes.iter().find(|note| note.contains("no instruction with an approximate"));
    assert!(note.is_some(), "{:?}", replayed.notes);
}
