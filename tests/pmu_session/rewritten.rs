//! Recordings of the software CPU, made by a session with the real host's clock and threads, and replayed
//! with the clock `pmu`.

use reprise::session::assembly::SoftOptions;
use reprise::session::checkpoints::CheckpointArg;
use reprise::session::choice::{Choice, ClockArg, EngineArg, EngineKind};
use reprise::session::hardware::BranchHardware;
use reprise::session::record::RecordTo;
use reprise::session::record::{RunPlan, record_on};
use reprise::session::replay::{At, ReplayOptions, Replayed, open_replayable, replay, replay_on};
use reprise::session::report::SessionReport;

use crate::Session;
use crate::hosts::{Hosts, on_each_host};
use reprise_tests::hardware::{REFUSAL, Refusing};

impl Session {
    fn record_on_software(&self) -> SessionReport {
        let choice = Choice::of(EngineKind::Soft);
        let plan = RunPlan { choice, soft: SoftOptions::default(), ..self.plan() };
        let checkpoints = CheckpointArg::default();
        let to = RecordTo { path: self.path(), force: false, checkpoints };
        record_on(&Refusing, plan, &to).expect("it records")
    }

    fn by_branches() -> ReplayOptions {
        let (engine, clock) = (EngineArg::Kvm, ClockArg::Pmu);
        ReplayOptions { engine, clock, ..ReplayOptions::default() }
    }

    fn replay_by_branches(&self, hardware: &impl BranchHardware, run: u64) -> Replayed {
        let replayable = open_replayable(&self.path()).expect("it is a recording");
        replay_on(hardware, &replayable, Self::by_branches())
            .unwrap_or_else(|error| panic!("run {run}: {error:#}"))
    }
}

on_each_host!(
    ticks_of_the_software_cpu_replays_by_branches,
    echo_of_the_software_cpu_replays_by_branches,
    what_was_rewritten_is_a_recording_of_its_own,
    a_window_is_named_in_seconds,
);

#[track_caller]
fn replays(session: &Session, hosts: &impl Hosts, runs: std::ops::Range<u64>) {
    let recorded = session.record_on_software();
    assert_eq!(recorded.engine, "soft");
    for run in runs {
        for hardware in [hosts.host(run), hosts.late(run)] {
            let replayed = session.replay_by_branches(&hardware, run);
            let report = replayed.report;
            assert_eq!(report.verified, Some(true), "run {run}: {report:#?}");
            assert_eq!((report.engine, report.clock), ("kvm", "pmu"));
            assert_eq!(report.verification, Some("exact"));
            assert_eq!(report.console_digest, recorded.console_digest, "run {run}");
            assert_eq!(report.interrupts, recorded.interrupts, "run {run}");
            assert_eq!(report.ending, recorded.ending, "run {run}");
            assert!(report.final_digest.is_some() && report.ticks < recorded.ticks);
            assert!(replayed.notes[0].starts_with("rewritten for the clock pmu"));
        }
    }
}

fn ticks_of_the_software_cpu_replays_by_branches(hosts: &impl Hosts) {
    replays(&Session::new("ticks", "hz=2000 count=20"), hosts, 1..3);
}

fn echo_of_the_software_cpu_replays_by_branches(hosts: &impl Hosts) {
    let mut session = Session::new("echo", "");
    session.typed = "one line\rquit\r";
    replays(&session, hosts, 1..3);
}

fn what_was_rewritten_is_a_recording_of_its_own(hosts: &impl Hosts) {
    let session = Session::new("ticks", "hz=2000 count=20");
    let recorded = session.record_on_software();
    let file = session.directory.path().join("rewritten.rr");
    let replayable = open_replayable(&session.path()).expect("it is a recording");
    let options = ReplayOptions { rewritten: Some(file.clone()), ..Session::by_branches() };
    let hardware = hosts.host(5);
    replay_on(&hardware, &replayable, options).expect("it replays");
    let rewritten = open_replayable(&file).expect("it is a recording");
    assert_eq!(rewritten.recording().header().clock, "pmu");
    let options = ReplayOptions { engine: EngineArg::Soft, ..ReplayOptions::default() };
    let report = replay(&rewritten, options).expect("it replays").report;
    assert_eq!(report.verified, Some(true), "{report:#?}");
    assert_eq!(report.instructions, Some(recorded.ticks));
    assert_eq!(report.console_digest, recorded.console_digest);
    // Nobody's file is overwritten.
    let options = ReplayOptions { rewritten: Some(file), ..Session::by_branches() };
    let error = replay_on(&hardware, &replayable, options).expect_err("it is there already");
    assert!(error.to_string().contains("--rewritten"), "{error:#}");
}

fn a_window_is_named_in_seconds(hosts: &impl Hosts) {
    let session = Session::new("ticks", "hz=2000 count=20");
    let recorded = session.record_on_software();
    let replayable = open_replayable(&session.path()).expect("it is a recording");
    let until = |at| ReplayOptions { until: Some(at), ..Session::by_branches() };
    let hardware = hosts.host(5);
    let error = replay_on(&hardware, &replayable, until(At::Tick(1_000))).expect_err("no tick");
    assert!(error.to_string().contains("seconds"), "{error:#}");
    let half = (recorded.virtual_seconds * 5e8) as u64;
    let report =
        replay_on(&hardware, &replayable, until(At::Time(half))).expect("it replays").report;
    assert_eq!((report.verified, report.ending), (Some(true), "target-reached"), "{report:#?}");
    assert!(report.interrupts > 5 && report.interrupts < recorded.interrupts, "{report:#?}");
}

#[test]
fn where_nothing_counts_branches_nothing_is_rewritten() {
    let session = Session::new("hello", "");
    session.record_on_software();
    let replayable = open_replayable(&session.path()).expect("it is a recording");
    // Who names the clock alone means the same.
    for engine in [EngineArg::Kvm, EngineArg::Auto] {
        let options = ReplayOptions { engine, ..Session::by_branches() };
        let error = replay_on(&Refusing, &replayable, options).expect_err("no counter");
        assert_eq!(format!("{error:#}"), REFUSAL);
    }
}
