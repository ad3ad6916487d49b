//! Runs that move between the software CPU and hardware that counts branches.

use reprise::session::assembly::SoftOptions;
use reprise::session::checkpoints::CheckpointArg;
use reprise::session::choice::{Choice, EngineArg, EngineKind};
use reprise::session::expand::{ExpandOptions, Place, Target, expand_recording};
use reprise::session::expand_report::ExpandReport;
use reprise::session::record::{RecordTo, RunPlan, record_on};
use reprise::session::replay::{At, ReplayOptions, open_replayable, replay_on};
use reprise::session::report::SessionReport;
use reprise::session::stretches::{self, ThenArg};
use reprise_cpu::engine::SoftEngine;
use reprise_expand::{Control, Window};
use reprise_machine::engine::Engine;
use reprise_machine::ram::GuestRam;
use reprise_machine::relay::{MakeEngine, Relay};
use reprise_trace::event::HandOver;
use reprise_trace::instructions::Contents;
use reprise_trace::instructions::filter::Selection;
use reprise_trace::moment::TickKind;

use crate::Session;
use reprise_tests::hardware::{REFUSAL, Refusing, Simulated};

fn kind(name: &str) -> EngineKind {
    name.parse::<ThenArg>().expect("it is known").0
}

impl Session {
    /// Records on `first`, and from each moment on the engine beside it.
    fn record_moving(
        &self,
        hardware: &Simulated,
        first: &str,
        then: &[(At, &str)],
    ) -> SessionReport {
        self.record_moving_with(hardware, first, then, CheckpointArg::default())
    }

    fn record_moving_with(
        &self,
        hardware: &Simulated,
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

/// On other hardware, on the software CPU alone, and there where nothing counts.
#[track_caller]
fn replays(session: &Session, recorded: &SessionReport) {
    let replayable = open_replayable(&session.path()).expect("it is a recording");
    let options = |engine| ReplayOptions { engine, ..ReplayOptions::default() };
    let replay = |hardware: &Simulated, engine| {
        let seed = hardware.disturbance.seed;
        let replayed = replay_on(hardware, &replayable, options(engine));
        replayed.unwrap_or_else(|error| panic!("seed {seed}: {error:#}")).report
    };
    let mut reports: Vec<_> =
        (2..5).map(|seed| replay(&Simulated::intel(seed), EngineArg::Auto)).collect();
    reports.push(replay(&Simulated::zen(5), EngineArg::Auto));
    for report in &reports {
        assert_eq!(report.verification, Some("exact"));
    }
    reports.push(replay(&Simulated::intel(6), EngineArg::Soft));
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

/// Expands a window of it.
fn expand(session: &Session, window: Window) -> anyhow::Result<ExpandReport> {
    let replayable = open_replayable(&session.path()).expect("it is a recording");
    let out = session.directory.path().join("trace");
    let options = ExpandOptions {
        target: Target::Native(Place::Path(out)),
        window,
        contents: Contents::default(),
        selection: Selection::default(),
        filters: Vec::new(),
        jobs: 1,
        segment: None,
        soft: SoftOptions::default(),
    };
    expand_recording(&replayable, options, &Control::default())
}

#[test]
fn hardware_takes_over_and_gives_back() {
    let session = Session::new("ticks", "hz=2000 count=60 poll=100");
    let there = (At::Tick(2_000_000), "kvm:pmu");
    let back = (At::Tick(2_100_000), "soft");
    let recorded = session.record_moving(&Simulated::intel(1), "soft", &[there, back]);
    assert!(session.printed().contains("position hash "), "{:?}", session.printed());
    replays(&session, &recorded);
    // Branches do not say how many instructions lie before what is counted in instructions again.
    let refused = expand(&session, Window::default()).expect_err("no count goes on there");
    assert!(refused.to_string().contains("counts instructions"), "{refused}");
    let back_at = recorded.stretches[2].from_tick;
    let before = expand(&session, Window { to: back_at, ..Window::default() });
    assert!(before.expect("it expands").instructions > back_at);
    let behind = expand(&session, Window { from: back_at, ..Window::default() });
    assert_eq!(behind.expect("it expands").final_digest, recorded.final_digest);
}

/// Nothing but the deadlines' kicks stops the guest, before the hand-over and behind it.
#[test]
fn a_guest_that_never_exits_is_handed_over() {
    let session = Session::new("ticks", "hz=500 count=20 poll=100000000");
    let there = (At::Tick(3_000_000), "kvm:pmu");
    let back = (At::Tick(4_000_000), "soft");
    let recorded = session.record_moving(&Simulated::intel(1), "soft", &[there, back]);
    assert!(recorded.virtual_seconds < 2.0, "{} s", recorded.virtual_seconds);
    replays(&session, &recorded);
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
    assert_eq!(replayable.course().stretches.len(), 1);
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
#[test]
fn where_one_engine_of_two_is_lacking_the_software_cpu_executes_both_parts() {
    if !reprise_kvm::opens() {
        eprintln!("skipped: /dev/kvm cannot be opened");
        return;
    }
    let session = Session::new("ticks", "hz=500 count=30 poll=100");
    let there = (At::Tick(40), "kvm:pmu");
    let recorded = session.record_moving(&Simulated::intel(1), "kvm:sync", &[there]);
    let replayable = open_replayable(&session.path()).expect("it is a recording");
    let options = ReplayOptions::default();
    let report = replay_on(&Refusing, &replayable, options).expect("it replays").report;
    assert_eq!(report.verified, Some(true), "{report:#?}");
    assert_eq!(report.final_digest, recorded.final_digest);
    assert_eq!((report.engine, report.clock), ("soft", "sync"));
}

#[test]
fn a_replay_from_a_later_stretch_is_by_the_engine_of_that() {
    let session = Session::new("ticks", "hz=2000 count=60 poll=100");
    let there = (At::Tick(200_000), "soft");
    let every = CheckpointArg::Ticks(500_000);
    let recorded = session.record_moving_with(&Simulated::intel(1), "kvm:pmu", &[there], every);
    let replayable = open_replayable(&session.path()).expect("it is a recording");
    let last = replayable.checkpoints().last().expect("there are some").moment.tick;
    assert!(last > recorded.stretches[1].from_tick, "{last}");
    for hardware in [true, false] {
        let options = ReplayOptions { from: Some(At::Tick(last)), ..ReplayOptions::default() };
        let report = match hardware {
            true => replay_on(&Simulated::intel(2), &replayable, options),
            false => replay_on(&Refusing, &replayable, options),
        };
        let report = report.expect("it replays").report;
        assert_eq!((report.from_tick, report.verified), (Some(last), Some(true)), "{report:#?}");
        assert_eq!((report.engine, report.clock), ("soft", "instructions"));
        assert_eq!(report.verification, Some("exact"));
        assert_eq!(report.instructions, Some(recorded.ticks - last));
    }
}

#[test]
fn the_software_cpu_takes_over_from_hardware() {
    let mut session = Session::new("echo", "");
    session.typed = "one line\ranother line\rquit\r";
    let there = (At::Tick(600), "soft");
    let recorded = session.record_moving(&Simulated::intel(1), "kvm:pmu", &[there]);
    assert!(session.printed().contains("another line"), "{:?}", session.printed());
    replays(&session, &recorded);
}
