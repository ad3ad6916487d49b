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
use reprise_expand::{Control, Window};
use reprise_trace::instructions::Contents;
use reprise_trace::instructions::filter::Selection;

use crate::Session;
use reprise_tests::hardware::{Refusing, Simulated};

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
        let untils: Vec<_> = then.iter().map(|(at, _)| *at).collect();
        let thens: Vec<_> = then.iter().map(|(_, name)| ThenArg(kind(name))).collect();
        let first = kind(first);
        let plan = stretches::plan(first, &untils, &thens).expect("it is a plan");
        let choice = Choice::of(first);
        let plan = RunPlan { choice, plan, soft: SoftOptions::default(), ..self.plan() };
        let to =
            RecordTo { path: self.path(), force: false, checkpoints: CheckpointArg::default() };
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
    for report in reports {
        assert_eq!(report.verified, Some(true), "{report:#?}");
        assert_eq!(report.final_digest, recorded.final_digest);
        assert_eq!(report.console_digest, recorded.console_digest);
        assert_eq!((report.ticks, report.interrupts), (recorded.ticks, recorded.interrupts));
        // What executes the first is the replay's affair.
        assert_eq!(report.stretches[1..], recorded.stretches[1..]);
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

#[test]
fn the_software_cpu_takes_over_from_hardware() {
    let mut session = Session::new("echo", "");
    session.typed = "one line\ranother line\rquit\r";
    let there = (At::Tick(600), "soft");
    let recorded = session.record_moving(&Simulated::intel(1), "kvm:pmu", &[there]);
    assert!(session.printed().contains("another line"), "{:?}", session.printed());
    replays(&session, &recorded);
}
