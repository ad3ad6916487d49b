//! Recorded on a CPU whose maker leaves undefined flags otherwise, replayed on this one: the comparison
//! sets aside those flags and nothing else, and takes them over, so that what is made of them later is
//! what was recorded.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Cursor;
use std::path::Path;

use reprise::session::replay::{self, ReplayOptions};
use reprise_cpu::engine::SoftEngine;
use reprise_cpu::flag_laws::FlagLaws;
use reprise_devices::board::Board;
use reprise_expand::pieces::Plan;
use reprise_expand::resimulate::check_against;
use reprise_expand::{Control, Window};
use reprise_host::host_info;
use reprise_machine::checkpoint;
use reprise_machine::clock::TimeSource;
use reprise_machine::divergence::{Difference, Divergence};
use reprise_machine::engine::{Engine, Exit};
use reprise_machine::inputs::{Planned, Recording, Replaying, Stamp, Then, Verification, When};
use reprise_machine::lawful::{Lawful, Permitted};
use reprise_machine::machine::Machine;
use reprise_machine::outcome::{Conclusion, Outcome};
use reprise_machine::ram::GuestRam;
use reprise_replay::{
    OnSoftware, RecordedClock, Replayable, RewriteError, Rewritten, Start, meet_checkpoint,
    verification,
};
use reprise_trace::checkpoint::CheckpointInfo;
use reprise_trace::cpu_state::{CpuState, DescriptorTable};
use reprise_trace::event::{Event, HandOver, Record};
use reprise_trace::header::{Header, HostInfo};
use reprise_trace::instructions::filter::Selection;
use reprise_trace::instructions::{
    Contents, SegmentOptions, TraceHeader, TraceReader, TraceWriter,
};
use reprise_trace::log::{LogWriter, MemorySink};
use reprise_trace::moment::TickKind;
use reprise_trace::recording::{FORMAT_VERSION, RecordingWriter};
use reprise_trace::stretches::Course;
use tempfile::TempDir;

use crate::case::{Case, Hardware, Recorded, assert_equal, log_of};
use crate::guest;
use crate::kept::ToFile;
use crate::linux;
use crate::world::SeededWorld;

const OTHER: &str = "OtherMaker";
/// Some of such checkpoints lie right behind instructions that leave flags undefined.
const CHECKPOINT_EVERY: u64 = 499;
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
    let course = Course::of(FORMAT_VERSION, header, log_of(&recorded.records));
    let verification = verification(header, &course, "soft");
    let inputs = Replaying::new(log_of(&recorded.records)).verifying(verification);
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
    let Some(_) = FlagLaws::of(&host.cpu_vendor, host.cpu_family, host.cpu_model) else {
        reprise_tests::skipped::skipped(format_args!("{} was not measured", host.cpu_brand));
        return None;
    };
    let host = HostInfo { cpu_model: another_model_of(&host), ..host };
    Some(Header { host, ..case.header() })
}

/// A model that keeps the same laws.
fn another_model_of(host: &HostInfo) -> u32 {
    let same = |model: &u32| FlagLaws::of(&host.cpu_vendor, host.cpu_family, *model).is_some();
    let other = (0..0x100).filter(|model| *model != host.cpu_model).find(same);
    other.expect("a design has several models")
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
    record_on(engine, board, SeededWorld::new(seed, case.typed, Default::default()), Vec::new())
}

fn record_on(engine: SoftEngine, board: Board, world: SeededWorld, plan: Vec<Planned>) -> Recorded {
    let inputs = Recording::new(world, LogWriter::new(MemorySink::default())).with_plan(plan);
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

fn header_of_software(case: &Case<'_>) -> Header {
    Header {
        tick_kind: TickKind::Instruction,
        ns_per_tick: 1,
        engine: "soft".to_owned(),
        clock: "instructions".to_owned(),
        ..header(case, OTHER)
    }
}

#[test]
fn so_it_is_at_checkpoints() {
    let case = guest("echo", "", "first line\rsecond line\rquit\r");
    let recorded = recorded_on_software(&case, 1);
    let header = header_of_software(&case);
    let machine = |inverted_flags| {
        let (ram, state, board) = case.load();
        let mut engine = RecordedClock::new(ram, &header).expect("the host has memory");
        engine.software().invert_undefined_flags(inverted_flags);
        engine.set_cpu_state(&state).expect("a first state");
        let inputs = Replaying::new(log_of(&recorded.records));
        Machine::new(engine, board, inputs, TimeSource::of(1))
    };
    let (mut there, mut here) = (machine(u64::MAX), machine(0));
    let verification = Verification { other_cpu: true, ..Verification::default() };
    let mut met_other_flags = 0;
    for tick in 1..400 {
        let [there_state, here_state] = [&mut there, &mut here].map(|machine| {
            machine.run_until(tick).expect("it runs");
            machine.engine().cpu_state().expect("a state")
        });
        let digest = checkpoint::digest(there.consistent().expect("it stands").expect("it may"));
        let moment = there.engine().moment().expect("a moment");
        let digest = digest.expect("a digest");
        let info = CheckpointInfo { moment, virtual_ns: 0, records: 0, pages: 0, digest };
        let met = meet_checkpoint(&mut here, &info, verification).expect("it compares");
        assert_eq!(met.difference, None, "tick {tick}");
        let lawful: Vec<_> = met.set_aside.iter().map(|it| (it.what, it.first)).collect();
        if there_state == here_state {
            assert_eq!(lawful, [], "tick {tick}");
        } else {
            assert_eq!(lawful, [(Lawful::UndefinedFlags, moment)], "tick {tick}");
            assert_eq!(here.engine().cpu_state().expect("a state"), there_state, "tick {tick}");
            met_other_flags += 1;
        }
    }
    assert!(met_other_flags > 0, "no such flags");
}

/// Records into a file as another maker's software CPU, with its own checkpoints.
fn recorded_to_file(case: &Case<'_>, path: &Path, checkpoint_every: u64) {
    let file = File::create(path).expect("the host has room");
    let header = header_of_software(case);
    let mut writer = RecordingWriter::create(file, &header).expect("it is written");
    writer.write_image(0, case.source.kernel).expect("it is written");
    let identity = writer.identity();
    let (ram, state, board) = case.load();
    let mut engine = SoftEngine::new(ram).expect("the host has memory");
    engine.invert_undefined_flags(u64::MAX);
    engine.set_cpu_state(&state).expect("a first state");
    let world = SeededWorld::new(1, case.typed, Default::default());
    let inputs = Recording::new(world, LogWriter::new(writer));
    let mut machine = Machine::new(engine, board, inputs, TimeSource::of(1));
    machine.set_checkpointer(Box::new(ToFile::beside(path, &identity, checkpoint_every)));
    machine.run().expect("the machine runs");
    let (_, _, inputs) = machine.into_parts();
    let (_, sink) = inputs.into_parts();
    sink.expect("the log is closed").finish().expect("it is written");
}

#[test]
fn a_trace_tells_the_flags_that_a_checkpoint_of_another_maker_has() {
    let case = guest("echo", "", "first line\rquit\r");
    let directory = TempDir::with_prefix("reprise-test-").expect("a directory");
    let path = directory.path().join("other.rr");
    recorded_to_file(&case, &path, CHECKPOINT_EVERY);
    let replayable = Replayable::open(&path).expect("it is a recording");
    let contents = Contents { physical: true, values: true, registers: true, page_walks: false };
    let header = TraceHeader {
        contents,
        tick: TickKind::Instruction,
        cpu_model: header_of_software(&case).cpu_model,
        recording: String::new(),
        filters: Vec::new(),
        share: None,
    };
    let trace = |jobs| {
        let options = SegmentOptions::default();
        let mut writer = TraceWriter::create(Vec::new(), &header, options).expect("it begins");
        let plan = Plan {
            replayable: &replayable,
            window: Window::default(),
            contents,
            selection: Selection::default(),
            jobs,
            set_up: &|_| {},
        };
        let pieces = plan.write(&mut writer, &Control::default()).expect("it expands");
        (pieces, writer.finish(&[]).expect("it is written"))
    };
    let (pieces, one) = trace(1);
    assert!(!pieces.set_aside.is_empty(), "there are such flags");
    assert!(pieces.checkpoints_verified > 1);
    let mut reader = TraceReader::open(Cursor::new(one.clone())).expect("it is a trace");
    let against = check_against(&mut reader, 0, &replayable, |_| true).expect("it can be checked");
    assert_eq!(against.mismatch, None);
    assert_eq!(against.checkpoints, pieces.checkpoints_verified);
    assert!(against.end_verified && trace(2).1 == one);
}

#[test]
fn so_it_is_where_ticks_are_instructions() {
    for seed in 1..5 {
        let case = guest("echo", "", "first line\rsecond line\rquit\r");
        let recorded = recorded_on_software(&case, seed);
        let software = header_of_software(&case);
        let outcome = replay_of(&case, &recorded, &software);
        assert_equal(&recorded.outcome, &outcome, seed);
        assert_eq!(lawful(&outcome), [Lawful::UndefinedFlags], "seed {seed}");
    }
}

/// Rewrites what another maker's software CPU recorded under a seed.
fn rewritten_here(case: &Case<'_>, seed: u64) -> Result<(Replayable, Rewritten), RewriteError> {
    let directory = TempDir::with_prefix("reprise-test-").expect("a directory");
    let paths = ["other.rr", "here.rr"].map(|name| directory.path().join(name));
    let recorded = recorded_on_software(case, seed);
    case.write_as(&recorded, &paths[0], &header_of_software(case));
    let other = Replayable::open(&paths[0]).expect("it is a recording");
    let out = File::create(&paths[1]).expect("the host has room");
    let (_, rewritten) = other.rewrite(out, |inputs| inputs, Machine::run)?;
    assert_eq!(rewritten.outcome.effects, recorded.outcome.effects, "seed {seed}");
    Ok((Replayable::open(&paths[1]).expect("it is a recording"), rewritten))
}

#[test]
fn what_another_maker_recorded_is_rewritten_as_this_cpus_own() {
    let case = guest("echo", "", "first line\rsecond line\rquit\r");
    let mut set_aside = 0;
    for seed in 1..9 {
        let (here, rewritten) = match rewritten_here(&case, seed) {
            Ok(both) => both,
            // An interrupt's frame, which nobody has overwritten, keeps some.
            Err(RewriteError::OtherCpu(_)) => continue,
            Err(error) => panic!("seed {seed}: {error}"),
        };
        set_aside += lawful(&rewritten.outcome).len();
        // Every record is of this CPU, as the header says: nothing has to be set aside.
        assert_eq!(here.recording().header().host, host_info());
        let mut machine = here.soft_machine(Start::Run).expect("it begins");
        let outcome = machine.run().expect("it runs");
        assert!(matches!(outcome.conclusion, Conclusion::Ended(_)), "seed {seed}: {outcome:?}");
        assert_eq!(lawful(&outcome), [], "seed {seed}");
        assert_eq!(outcome.effects, rewritten.outcome.effects, "seed {seed}");
    }
    assert!(set_aside > 0, "some have such flags");
}

#[test]
fn what_another_maker_left_in_memory_is_not_rewritten() {
    let refused = rewritten_here(&guest("compute", "scale=1", ""), 1).expect_err("its RAM differs");
    assert!(matches!(refused, RewriteError::OtherCpu(_)), "{refused}");
    assert!(refused.to_string().contains("--engine soft"), "{refused}");
}

#[test]
fn a_file_says_what_was_set_aside_and_what_the_code_holds() {
    let case = guest("ticks", "hz=18000 count=60 poll=40", "");
    let recorded = case.record(&other_maker(3));
    let directory = TempDir::with_prefix("reprise-test-").expect("a directory");
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

#[test]
fn an_exact_place_comes_first_where_the_machine_stands_by_itself_too() {
    // Comes back to its first instruction in one tick, once with the x87 unit's last instruction as hardware may have
    // it, from then on exactly as recorded.
    const CODE: &[u8] = &[0xdb, 0xe3, 0xeb, 0xfc]; // again: fninit; jmp again
    let case = guest("ticks", "", "");
    let header = header(&case, THIS);
    let engine = |fip| {
        let (mut ram, mut state, board) = case.load();
        let page = state.rip & !0xfff;
        let mut bytes = [0; 4096];
        bytes[..CODE.len()].copy_from_slice(CODE);
        assert!(ram.place(page, &bytes), "it is mapped to itself");
        let mut engine = RecordedClock::new(ram, &header).expect("the host has memory");
        (state.rip, state.fpu.fip) = (page, fip);
        engine.set_cpu_state(&state).expect("a first state");
        (engine, board)
    };
    let (mut there, _) = engine(0x1234);
    assert!(there.pause_at(Some(2)));
    assert_eq!(there.run(1).expect("it runs"), Exit::Kicked);
    let cpu_digest = there.cpu_state().expect("a state").short_digest();
    let moment = there.moment().expect("a moment");
    let record = Record { moment, cpu_digest, event: Event::Console(b"a".to_vec()) };
    let (engine, board) = engine(0x1234);
    let verification = Verification { other_engine: true, ..Verification::default() };
    let inputs = Replaying::new(log_of(&[record])).verifying(verification);
    let mut machine = Machine::new(engine, board, inputs, TimeSource::of(header.ns_per_tick));
    let outcome = machine.run().expect("it runs");
    assert!(matches!(outcome.conclusion, Conclusion::CutShort { .. }), "{outcome:?}");
    assert_eq!((outcome.events, lawful(&outcome)), (1, vec![]));
    assert_eq!(machine.engine().instructions(), Some(2));
}

#[test]
fn a_place_that_is_exactly_the_recorded_one_comes_before_one_that_may_be() {
    // Comes to 0x1d twice in one tick, with other flags that MUL leaves undefined: as its result has them, or as they
    // were before.
    const CODE: &[u8] = &[
        0xbb, 0x01, 0x00, 0x00, 0x00, // mov ebx, 1
        0xb8, 0x01, 0x00, 0x00, 0x00, // mov eax, 1
        0x85, 0xc0, // test eax, eax
        0xf7, 0xe3, // mul ebx
        0xb8, 0x00, 0x00, 0x00, 0x00, // mov eax, 0
        0xba, 0x00, 0x00, 0x00, 0x00, // mov edx, 0
        0xb9, 0x00, 0x00, 0x00, 0x00, // mov ecx, 0
        0x90, // 0x1d: nop
        0xb8, 0x03, 0x00, 0x00, 0x80, // mov eax, 0x80000003
        0x85, 0xc0, // test eax, eax
        0x89, 0x05, 0x00, 0x01, 0x00, 0x00, // mov [0x100 behind, or at 0x100], eax
        0xf7, 0xe3, // mul ebx
        0xb8, 0x00, 0x00, 0x00, 0x00, // mov eax, 0
        0xba, 0x00, 0x00, 0x00, 0x00, // mov edx, 0
        0xeb, 0xe4, // jmp 0x1d
    ];
    const VISITS: [u64; 2] = [7, 15];
    const AF: u64 = 1 << 4;
    let case = guest("ticks", "", "");
    let header = header(&case, OTHER);
    let engine = || {
        let (mut ram, state, _) = case.load();
        let page = state.rip & !0xfff;
        let mut bytes = [0; 4096];
        bytes[..CODE.len()].copy_from_slice(CODE);
        assert!(ram.place(page, &bytes), "it is mapped to itself");
        let mut engine = RecordedClock::new(ram, &header).expect("the host has memory");
        engine.set_cpu_state(&CpuState { rip: page, ..state }).expect("a first state");
        engine
    };
    let stamp_at = |instructions| {
        let mut engine = engine();
        assert!(engine.pause_at(Some(instructions)));
        assert_eq!(engine.run(1).expect("it runs"), Exit::Kicked);
        let cpu_digest = engine.cpu_state().expect("a state").short_digest();
        Stamp { moment: engine.moment().expect("a moment"), cpu_digest }
    };
    let stamps = VISITS.map(stamp_at);
    assert_eq!(stamps[0].moment, stamps[1].moment);
    assert_ne!(stamps[0].cpu_digest, stamps[1].cpu_digest);
    for (stamp, visit) in stamps.iter().zip(VISITS) {
        let mut engine = engine();
        assert_eq!(engine.run_to(stamp).expect("it runs"), Exit::TickReached);
        assert_eq!(engine.instructions(), Some(visit));
        assert_eq!(engine.cpu_state().expect("a state").short_digest(), stamp.cpu_digest);
    }
    // Where there is none, the first that may be is it.
    let mut at_first = engine();
    assert_eq!(at_first.run_to(&stamps[0]).expect("it runs"), Exit::TickReached);
    let mut state = at_first.cpu_state().expect("a state");
    state.rflags ^= AF;
    let like = Stamp { cpu_digest: state.short_digest(), ..stamps[0] };
    let mut engine = engine();
    assert_eq!(engine.run_to(&like).expect("it runs"), Exit::TickReached);
    assert_eq!(engine.instructions(), Some(VISITS[0]));
    // Whoever went ahead to see has written nothing, whichever mode the code is in.
    for engine in [&at_first, &engine] {
        let mut written = [0; 0x400];
        engine.read_ram(state.rip & !0xfff, &mut written);
        assert_eq!((&written[..CODE.len()], &written[0x100..]), (CODE, &[0; 0x300][..]));
        engine.read_ram(0x100, &mut written[..4]);
        assert_ne!(written[..4], [3, 0, 0, 0x80]);
    }
}

/// What another engine may have otherwise another CPU may not, and the other way.
#[test]
fn what_is_permitted_follows_from_who_recorded() {
    const UNDEFINED: u64 = 0x8d5;
    for (other_engine, other_cpu, on_hardware, x87_last_instruction, undefined_flags) in [
        (false, false, false, false, 0),
        (false, false, true, false, 0),
        (true, false, false, true, 0),
        (false, true, false, false, UNDEFINED),
        (false, true, true, true, UNDEFINED),
        (true, true, false, true, UNDEFINED),
    ] {
        let verification = Verification { other_engine, other_cpu, on_hardware };
        let permitted = Permitted { x87_last_instruction, undefined_flags };
        assert_eq!(verification.permits(|| UNDEFINED), permitted, "{verification:?}");
    }
}

/// What the guest makes of undefined flags behind a record is what it made of them there.
#[test]
fn flags_are_taken_over_at_a_record() {
    const CODE: &[u8] = &[
        0xbb, 0x01, 0x00, 0x00, 0x00, // mov ebx, 1
        0xb8, 0x03, 0x00, 0x00, 0x80, // mov eax, 0x80000003
        0xf7, 0xe3, // mul ebx
        0x90, // nop
        0x9f, // lahf
        0x0f, 0x0b, // ud2, of which there is no handler
    ];
    const BEFORE_LAHF: u64 = 4;
    let case = guest("ticks", "", "");
    let header = header_of_software(&case);
    let start = |ram: &mut GuestRam, state: CpuState| {
        let mut bytes = [0; 4096];
        bytes[..CODE.len()].copy_from_slice(CODE);
        let rip = state.rip & !0xfff;
        assert!(ram.place(rip, &bytes), "it is mapped to itself");
        CpuState { rip, idtr: DescriptorTable::default(), ..state }
    };
    let record = |plan| {
        let (mut ram, state, board) = case.load();
        let state = start(&mut ram, state);
        let mut engine = SoftEngine::new(ram).expect("the host has memory");
        engine.invert_undefined_flags(u64::MAX);
        engine.set_cpu_state(&state).expect("a first state");
        record_on(engine, board, SeededWorld::new(1, "", Default::default()), plan)
    };
    let replay = |recorded: &Recorded| {
        let (mut ram, state, board) = case.load();
        let state = start(&mut ram, state);
        let mut engine = RecordedClock::new(ram, &header).expect("the host has memory");
        engine.set_cpu_state(&state).expect("a first state");
        let verification = Verification { other_cpu: true, ..Verification::default() };
        let inputs = Replaying::new(log_of(&recorded.records)).verifying(verification);
        let time = TimeSource::of(header.ns_per_tick);
        Machine::new(engine, board, inputs, time).run().expect("the machine runs")
    };
    let to = HandOver {
        engine: header.engine.clone(),
        clock: header.clock.clone(),
        tick_kind: header.tick_kind,
        ns_per_tick: header.ns_per_tick,
    };
    let at = When::Tick(BEFORE_LAHF);
    let recorded = record(vec![Planned { at, then: Then::HandOver(to) }]);
    let outcome = replay(&recorded);
    assert_equal(&recorded.outcome, &outcome, 1);
    assert_eq!(lawful(&outcome), [Lawful::UndefinedFlags]);
    // Without a record there nobody knows them.
    let outcome = replay(&record(Vec::new()));
    assert_eq!(divergence(&outcome).difference, Difference::CpuState);
}
