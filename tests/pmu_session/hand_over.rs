//! Runs that move between the software CPU and hardware that counts branches.

use std::io::Cursor;

use reprise::session::assembly::SoftOptions;
use reprise::session::checkpoints::{self, CheckpointArg};
use reprise::session::choice::{Choice, EngineArg, EngineKind};
use reprise::session::expand::{ExpandOptions, Place, Target, expand_recording};
use reprise::session::expand_report::ExpandReport;
use reprise::session::hardware::BranchHardware;
use reprise::session::record::{RecordTo, RunPlan, record_on};
use reprise::session::replay::{At, ReplayOptions, open_replayable, replay_on};
use reprise::session::report::SessionReport;
use reprise::session::stretches::{self, ThenArg};
use reprise_cpu::engine::SoftEngine;
use reprise_expand::resimulate::{Against, check_against};
use reprise_expand::{Control, Window};
use reprise_host::CheckpointEvery;
use reprise_machine::engine::Engine;
use reprise_machine::ram::GuestRam;
use reprise_machine::relay::{MakeEngine, Relay};
use reprise_trace::event::HandOver;
use reprise_trace::instructions::filter::Selection;
use reprise_trace::instructions::{Contents, TraceReader};
use reprise_trace::moment::TickKind;

use crate::Session;
use crate::hosts::{Hosts, on_each_host};
use reprise_tests::hardware::{REFUSAL, Refusing};
use reprise_tests::skipped::skipped;

/// No checkpoints.
const NONE: CheckpointArg = CheckpointArg::Never;

fn kind(name: &str) -> EngineKind {
    name.parse::<ThenArg>().expect("it is known").0
}

impl Session {
    /// Records on `first`, and from each moment on the engine beside it.
    fn record_moving(
        &self,
        hardware: &impl BranchHardware,
        first: &str,
        then: &[(At, &str)],
        checkpoints: CheckpointArg,
    ) -> SessionReport {
        let untils: Vec<_> = then.iter().map(|(at, _)| *at).collect();
        let thens: Vec<_> = then.iter().map(|(_, name)| ThenArg(kind(name))).collect();
        let first = kind(first);
        let plan = stretches::plan(first, &untils, &thens).expect("it is a plan");
        let choice = Choice::of(first);
        let plan = RunPlan { choice, plan, soft: SoftOptions::default(), ..self.plan() };
        let to = RecordTo { path: self.path(), force: false, checkpoints };
        let report = record_on(hardware, plan, &to).expect("it records");
        let clocks: Vec<_> = report.stretches.iter().map(|it| it.clock.as_str()).collect();
        eprintln!("{clocks:?}: {} ticks, {} events", report.ticks, report.events);
        assert_eq!(clocks.len(), then.len() + 1, "{report:#?}");
        report
    }
}

on_each_host!(
    hardware_takes_over_and_gives_back,
    checkpoints_lie_in_every_stretch_and_expansion_crosses_hand_overs,
    a_guest_that_never_exits_is_handed_over,
    where_one_engine_of_two_is_lacking_the_software_cpu_executes_both_parts,
    a_replay_from_a_later_stretch_is_by_the_engine_of_that,
    the_software_cpu_takes_over_from_hardware,
);

/// On other hardware, on the software CPU alone, and there where nothing counts.
#[track_caller]
fn replays(session: &Session, recorded: &SessionReport, hosts: &impl Hosts) {
    let replayable = open_replayable(&session.path()).expect("it is a recording");
    let options = |engine| ReplayOptions { engine, ..ReplayOptions::default() };
    let replay = |hardware, engine, run| {
        let replayed = replay_on(&hardware, &replayable, options(engine));
        replayed.unwrap_or_else(|error| panic!("run {run}: {error:#}")).report
    };
    let mut reports: Vec<_> =
        (2..5).map(|run| replay(hosts.host(run), EngineArg::Auto, run)).collect();
    reports.push(replay(hosts.late(5), EngineArg::Auto, 5));
    for report in &reports {
        assert_eq!(report.verification, Some("exact"));
    }
    reports.push(replay(hosts.host(6), EngineArg::Soft, 6));
    let nowhere = replay_on(&Refusing, &replayable, options(EngineArg::Auto));
    reports.push(nowhere.expect("it replays").report);
    for report in &reports[reports.len() - 2..] {
        assert_eq!(report.verification, Some("across-engines"));
    }
    for report in reports {
        assert_eq!(report.verified, Some(true), "{report:#?}");
        assert_eq!(report.final_digest, recorded.final_digest);
        assert_eq!(report.console_digest, recorded.console_digest);
        assert_eq!((report.ticks, report.interrupts), (recorded.ticks, recorded.interrupts));
        assert_eq!(report.recorded_stretches, recorded.stretches);
        let on_soft = report.verification != Some("exact");
        let ran = report.stretches.iter().zip(&recorded.stretches);
        for (ran, recorded) in ran {
            let engine = if on_soft { "soft" } else { recorded.engine.as_str() };
            assert_eq!((ran.engine.as_str(), &ran.clock), (engine, &recorded.clock), "{report:#?}");
        }
    }
}

/// Expands a window of it, in full; the trace's bytes beside the report.
pub(crate) fn expand(session: &Session, window: Window, jobs: usize) -> (ExpandReport, Vec<u8>) {
    let replayable = open_replayable(&session.path()).expect("it is a recording");
    let out = session.directory.path().join("trace");
    let options = ExpandOptions {
        target: Target::Native(Place::Path { path: out.clone(), force: false }),
        window,
        contents: Contents { physical: true, values: true, registers: true, page_walks: false },
        selection: Selection::default(),
        filters: Vec::new(),
        jobs,
        segment: None,
        soft: SoftOptions::default(),
    };
    let report = expand_recording(&replayable, options, &Control::default()).expect("it expands");
    (report, std::fs::read(out).expect("a trace"))
}

/// What is carried out of the trace alone is the guest.
fn comes_out(session: &Session, trace: &[u8]) -> Against {
    let replayable = open_replayable(&session.path()).expect("it is a recording");
    let mut reader = TraceReader::open(Cursor::new(trace)).expect("a trace");
    let first = reader.outline().expect("it is whole").index.first_instruction();
    let against = check_against(&mut reader, first, &replayable, |_| true).expect("it is whole");
    assert_eq!((&against.mismatch, against.end_verified), (&None, true), "{against:?}");
    against
}

/// Adds checkpoints as `reprise checkpoint` does, in place of those that the software CPU cannot begin at.
fn add_checkpoints(session: &Session, every: u64) {
    let replayable = open_replayable(&session.path()).expect("it is a recording");
    let every = CheckpointEvery::Ticks(every);
    let (checkpointer, thread) =
        checkpoints::of_replay(&replayable, &session.path(), every).expect("a thread");
    let (engine, checkpointer) = (EngineArg::Soft, Some(checkpointer));
    let options = ReplayOptions { engine, checkpointer, ..ReplayOptions::default() };
    let replayed = replay_on(&Refusing, &replayable, options).expect("it replays");
    assert_eq!(replayed.report.verified, Some(true));
    let totals = thread.finish();
    assert!(totals.failure.is_none() && totals.count > 0, "{totals:?}");
}

/// From a checkpoint in each stretch a replay comes to the recorded end, on hardware and on the software CPU.
fn replays_from_each_stretch(
    session: &Session,
    recorded: &SessionReport,
    hosts: &impl Hosts,
    only_soft: bool,
) {
    let replayable = open_replayable(&session.path()).expect("it is a recording");
    let bounds: Vec<_> = recorded.stretches.iter().map(|it| it.from_tick).collect();
    for (number, from) in bounds.iter().enumerate() {
        let to = bounds.get(number + 1).copied().unwrap_or(u64::MAX);
        let ticks = replayable.checkpoints().iter().map(|info| info.moment.tick);
        let within: Vec<_> = ticks.filter(|tick| (from + 1..=to).contains(tick)).collect();
        let tick = *within.first().unwrap_or_else(|| panic!("none from {from} to {to}"));
        let replay = |hardware, engine| {
            let from = Some(At::Tick(tick));
            let options = ReplayOptions { engine, from, ..ReplayOptions::default() };
            let replayed = replay_on(&hardware, &replayable, options);
            replayed.unwrap_or_else(|error| panic!("from {tick}: {error:#}")).report
        };
        let mut reports = vec![replay(hosts.host(2), EngineArg::Soft)];
        if !only_soft {
            reports.push(replay(hosts.host(3), EngineArg::Auto));
            reports.push(replay(hosts.late(4), EngineArg::Auto));
        }
        for report in reports {
            assert_eq!(report.verified, Some(true), "from {tick}: {report:#?}");
            assert_eq!(report.from_tick, Some(tick));
            assert_eq!(report.final_digest, recorded.final_digest, "from {tick}");
            assert_eq!(report.console_digest, recorded.console_digest, "from {tick}");
        }
    }
}

fn hardware_takes_over_and_gives_back(hosts: &impl Hosts) {
    let session = Session::new("ticks", "hz=2000 count=60 poll=100");
    let there = (At::Tick(2_000_000), "kvm:pmu");
    let back = (At::Tick(2_100_000), "soft");
    let recorded = session.record_moving(&hosts.host(1), "soft", &[there, back], NONE);
    assert!(session.printed().contains("position hash "), "{:?}", session.printed());
    replays(&session, &recorded, hosts);
}

fn checkpoints_lie_in_every_stretch_and_expansion_crosses_hand_overs(hosts: &impl Hosts) {
    let session = Session::new("ticks", "hz=2000 count=20 poll=100");
    let there = (At::Tick(500_000), "kvm:pmu");
    let back = (At::Tick(560_000), "soft");
    let every = CheckpointArg::Ticks(20_000);
    let recorded = session.record_moving(&hosts.host(1), "soft", &[there, back], every);
    // As the recorder left them: the last stretch's do not say how many instructions lie before.
    replays_from_each_stretch(&session, &recorded, hosts, true);
    add_checkpoints(&session, 20_000);
    replays_from_each_stretch(&session, &recorded, hosts, false);
    let back_at = recorded.stretches[2].from_tick;
    let window = Window { from: 450_000, to: back_at + 50_000 };
    let (report, one) = expand(&session, window, 1);
    let (_, two) = expand(&session, window, 2);
    assert!(one == two, "two threads make another trace");
    assert!(report.instructions > window.to - window.from, "{report:#?}");
    let met = comes_out(&session, &one).checkpoints;
    assert!(met >= 6 && met == report.checkpoints_verified, "{met}: {report:#?}");
    let (all, _) = expand(&session, Window::default(), 2);
    assert_eq!((all.verified, &all.final_digest), (Some(true), &recorded.final_digest));
    assert!(all.instructions > recorded.ticks);
}

/// Nothing but the deadlines' kicks stops the guest, before the hand-over and behind it.
fn a_guest_that_never_exits_is_handed_over(hosts: &impl Hosts) {
    // Its timer follows the host's clock in between, so it counts for long, however busy the host is.
    let session = Session::new("ticks", "hz=500 count=150 poll=100000000");
    let there = (At::Tick(3_000_000), "kvm:pmu");
    let back = (At::Tick(4_000_000), "soft");
    let recorded = session.record_moving(&hosts.host(1), "soft", &[there, back], NONE);
    replays(&session, &recorded, hosts);
}

/// The log names what executes the guest: where that cannot be had, nothing else does.
#[test]
fn a_host_that_lacks_what_is_planned_records_no_other_engine() {
    let session = Session::new("ticks", "hz=2000 count=20");
    let thens = [ThenArg(kind("kvm:pmu"))];
    let plan = stretches::plan(EngineKind::Soft, &[At::Tick(100_000)], &thens).expect("a plan");
    let choice = Choice::of(EngineKind::Soft);
    let plan = RunPlan { choice, plan, soft: SoftOptions::default(), ..session.plan() };
    let to = RecordTo { path: session.path(), force: false, checkpoints: CheckpointArg::Never };
    let error = record_on(&Refusing, plan, &to).expect_err("it records up to there");
    assert_eq!(error.to_string(), REFUSAL);
    let replayable = open_replayable(&session.path()).expect("what was written");
    // The last that is logged is where it would have gone over; nothing has executed behind that.
    let (summary, stretches) = (replayable.recording().summary(), &replayable.course().stretches);
    assert!(!summary.complete && stretches.len() == 2, "{stretches:?}");
    assert_eq!(summary.last_moment, stretches[1].from);
}

/// Whatever makes the engines of a relay: ticks of another kind get into no log.
#[test]
fn an_engine_that_counts_otherwise_takes_nothing_over() {
    let on = |tick_kind| HandOver {
        engine: "kvm".to_owned(),
        clock: "sync".to_owned(),
        tick_kind,
        ns_per_tick: 0,
    };
    let relay = |on: &HandOver| {
        let make: MakeEngine = Box::new(|_, ram| Ok(Box::new(SoftEngine::new(ram)?)));
        Relay::new(GuestRam::new(4).expect("the host has 4 MiB"), on, make)
    };
    let mut relayed = relay(&on(TickKind::Instruction)).expect("it counts instructions");
    let errors = [
        relay(&on(TickKind::Exit)).err(),
        relayed.become_engine(&on(TickKind::ConditionalBranch)).err(),
    ];
    for error in errors {
        let error = error.expect("it is refused").to_string();
        assert!(error.contains("clock sync") && error.contains("--engine soft"), "{error}");
    }
}

/// KVM that is there, and a counter that is not: the software CPU counts exits, and then branches.
fn where_one_engine_of_two_is_lacking_the_software_cpu_executes_both_parts(hosts: &impl Hosts) {
    if !reprise_kvm::opens() {
        skipped("/dev/kvm cannot be opened");
        return;
    }
    let session = Session::new("ticks", "hz=500 count=30 poll=100");
    let there = (At::Tick(40), "kvm:pmu");
    let recorded = session.record_moving(&hosts.host(1), "kvm:sync", &[there], NONE);
    let replayable = open_replayable(&session.path()).expect("it is a recording");
    let options = ReplayOptions::default();
    let report = replay_on(&Refusing, &replayable, options).expect("it replays").report;
    assert_eq!(report.verified, Some(true), "{report:#?}");
    assert_eq!(report.final_digest, recorded.final_digest);
    assert_eq!((report.engine, report.clock), ("soft", "sync"));
}

fn a_replay_from_a_later_stretch_is_by_the_engine_of_that(hosts: &impl Hosts) {
    let session = Session::new("ticks", "hz=2000 count=60 poll=100");
    let there = (At::Tick(200_000), "soft");
    let every = CheckpointArg::Ticks(500_000);
    let recorded = session.record_moving(&hosts.host(1), "kvm:pmu", &[there], every);
    let replayable = open_replayable(&session.path()).expect("it is a recording");
    let last = replayable.checkpoints().last().expect("there are some").moment.tick;
    assert!(last > recorded.stretches[1].from_tick, "{last}");
    for hardware in [true, false] {
        let options = ReplayOptions { from: Some(At::Tick(last)), ..ReplayOptions::default() };
        let report = match hardware {
            true => replay_on(&hosts.host(2), &replayable, options),
            false => replay_on(&Refusing, &replayable, options),
        };
        let report = report.expect("it replays").report;
        assert_eq!((report.from_tick, report.verified), (Some(last), Some(true)), "{report:#?}");
        assert_eq!((report.engine, report.clock), ("soft", "instructions"));
        assert_eq!(report.verification, Some("exact"));
        assert_eq!(report.instructions, Some(recorded.ticks - last));
    }
}

fn the_software_cpu_takes_over_from_hardware(hosts: &impl Hosts) {
    let mut session = Session::new("echo", "");
    session.typed = "one line\ranother line\rquit\r";
    let there = (At::Tick(600), "soft");
    let recorded = session.record_moving(&hosts.host(1), "kvm:pmu", &[there], NONE);
    assert!(session.printed().contains("another line"), "{:?}", session.printed());
    replays(&session, &recorded, hosts);
}
