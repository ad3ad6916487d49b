//! Sessions with the clock `pmu`, from the plan to the file and back: the code that `reprise record` and
//! `reprise replay` run, the real host's clock, timers and threads with it, on simulated hardware in
//! place of KVM and a counter; and, where this host has a counter, the same tests on that. What only
//! simulated hardware can be told to do (being late or wrong, refusing) is tested on that alone.

mod altered;
mod astray;
mod crossing;
mod hand_over;
mod hosts;
mod rewritten;
mod time_stamps;

use std::path::{Path, PathBuf};
use std::time::Duration;

use reprise::session::assembly::SoftOptions;
use reprise::session::checkpoints::CheckpointArg;
use reprise::session::choice::{Choice, ClockArg, EngineKind};
use reprise::session::guest::Guest;
use reprise::session::hardware::BranchHardware;
use reprise::session::record::{RecordTo, RunPlan, record_on, run_on};
use reprise::session::replay::{ReplayOptions, Replayed, open_replayable, replay_on};
use reprise::session::report::SessionReport;
use reprise::session::trial;
use reprise_host::{ConsoleSink, HostOptions, InputSource};
use reprise_simulated_hardware::{Disturbance, Skid};

use hosts::{Hosts, on_each_host};
use reprise_tests::hardware::{self, Refusing, Simulated};

/// A guest, what is typed to it, and where its files are.
struct Session {
    guest: Guest,
    typed: &'static str,
    time_limit: Option<Duration>,
    memory_mib: u64,
    directory: tempfile::TempDir,
}

impl Session {
    fn new(name: &str, command_line: &str) -> Self {
        let mut guest = Guest::embedded(name).expect("it is listed");
        command_line.clone_into(&mut guest.cmdline);
        let directory = tempfile::tempdir().expect("a temporary directory");
        Self { guest, typed: "", time_limit: None, memory_mib: 4, directory }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("session.rr")
    }

    fn console(&self) -> PathBuf {
        self.directory.path().join("console")
    }

    fn plan(&self) -> RunPlan<'_> {
        let console = std::fs::File::create(self.console()).expect("a console file");
        let host = HostOptions {
            input: InputSource::Bytes(self.typed.as_bytes().to_vec()),
            console: ConsoleSink::File(console),
            time_limit: self.time_limit,
            ..HostOptions::default()
        };
        let (choice, soft) = (Choice::of(EngineKind::Pmu), SoftOptions::default());
        let (guest, memory_mib) = (&self.guest, self.memory_mib);
        RunPlan { guest, choice, plan: Vec::new(), memory_mib, soft, host }
    }

    fn record(&self, hardware: &impl BranchHardware) -> SessionReport {
        self.record_with(hardware, CheckpointArg::default())
    }

    fn record_with(
        &self,
        hardware: &impl BranchHardware,
        checkpoints: CheckpointArg,
    ) -> SessionReport {
        let to = RecordTo { path: self.path(), force: false, checkpoints };
        let report = record_on(hardware, self.plan(), &to).expect("it records");
        assert_eq!((report.engine, report.clock), ("kvm", "pmu"));
        eprintln!(
            "{} ticks, {} events, {} interrupts, {:.3} s of guest time in {:.3} s",
            report.ticks,
            report.events,
            report.interrupts,
            report.virtual_seconds,
            report.wall_seconds
        );
        report
    }

    fn printed(&self) -> String {
        std::fs::read_to_string(self.console()).expect("a console file")
    }
}

fn replay(path: &Path, hardware: &impl BranchHardware) -> anyhow::Result<Replayed> {
    replay_on(hardware, &open_replayable(path)?, ReplayOptions::default())
}

#[track_caller]
fn assert_equal(recorded: &SessionReport, replayed: &SessionReport, seed: u64) {
    assert_eq!(replayed.verified, Some(true), "seed {seed}: {replayed:#?}");
    assert_eq!(replayed.verification, Some("exact"));
    assert_eq!((replayed.engine, replayed.clock), ("kvm", "pmu"));
    assert!(recorded.final_digest.is_some(), "the end is an exact moment");
    assert_eq!(replayed.final_digest, recorded.final_digest, "seed {seed}");
    assert_eq!(replayed.console_digest, recorded.console_digest, "seed {seed}");
    assert_eq!(replayed.ticks, recorded.ticks, "seed {seed}");
    assert_eq!(replayed.interrupts, recorded.interrupts, "seed {seed}");
}

/// Records on one host and replays on others.
fn replays(session: &Session, hosts: &impl Hosts) -> SessionReport {
    let recorded = session.record(&hosts.host(1));
    for run in 2..6 {
        let replayed = replay(&session.path(), &hosts.host(run));
        let replayed = replayed.unwrap_or_else(|error| panic!("run {run}: {error:#}"));
        assert_equal(&recorded, &replayed.report, run);
    }
    recorded
}

on_each_host!(
    ticks_is_recorded_and_replayed,
    echo_is_recorded_and_replayed,
    a_guest_that_never_exits_takes_its_timer_interrupts_in_time,
    a_guest_that_spins_is_stopped_at_an_exact_moment,
    a_run_is_a_recording_without_a_file,
    the_doctors_trial_passes_on_hardware_that_counts_right,
    a_clock_that_is_named_is_not_left_out,
);

fn ticks_is_recorded_and_replayed(hosts: &impl Hosts) {
    let session = Session::new("ticks", "hz=2000 count=20");
    let recorded = replays(&session, hosts);
    assert!(recorded.interrupts >= 20 && session.printed().contains("position hash "));
}

fn echo_is_recorded_and_replayed(hosts: &impl Hosts) {
    let mut session = Session::new("echo", "");
    session.typed = "one line\rquit\r";
    replays(&session, hosts);
    assert!(session.printed().contains("one line"), "{:?}", session.printed());
}

/// The guest leaves for the host only to print at its end. The flush timer kicks it four times a
/// second; that its timer interrupts are on time is the deadline's doing.
fn a_guest_that_never_exits_takes_its_timer_interrupts_in_time(hosts: &impl Hosts) {
    let session = Session::new("ticks", "hz=500 count=20 poll=100000000");
    let recorded = replays(&session, hosts);
    assert!(recorded.interrupts >= 20, "{recorded:#?}");
    // 40 ms, were the machine not busy; 5 s with the flush timer alone.
    assert!(recorded.virtual_seconds < 2.0, "{} s", recorded.virtual_seconds);
}

fn a_guest_that_spins_is_stopped_at_an_exact_moment(hosts: &impl Hosts) {
    let mut session = Session::new("misbehave", "do=spin");
    session.time_limit = Some(Duration::from_millis(600));
    let recorded = replays(&session, hosts);
    assert_eq!(recorded.ending, "stopped");
}

fn a_run_is_a_recording_without_a_file(hosts: &impl Hosts) {
    let session = Session::new("ticks", "hz=2000 count=5");
    let report = run_on(&hosts.host(7), session.plan()).expect("it runs");
    assert_eq!((report.ending, report.clock), ("reset", "pmu"));
}

#[test]
fn zen_replays_though_it_is_late() {
    let session = Session::new("ticks", "hz=500 count=12 poll=100000000");
    let recorded = session.record(&Simulated::zen(1));
    let mut times_late = 0;
    for seed in 2..8 {
        let mut hardware = Simulated::zen(seed);
        // Signals keep the guest from running on: without them, an overflow that is late has its way.
        let skid = Skid::Unbounded { usual: 1_000, seldom: 10 };
        hardware.disturbance =
            Disturbance { skid, kick_every: None, signal_every: None, ..hardware.disturbance };
        let replayed = replay(&session.path(), &hardware);
        let replayed = replayed.unwrap_or_else(|error| panic!("seed {seed}: {error:#}"));
        assert_equal(&recorded, &replayed.report, seed);
        times_late += replayed.notes.iter().filter(|note| note.contains("late")).count();
    }
    eprintln!("{times_late} of 6 replays went back");
    assert!(times_late > 0);
}

#[test]
fn what_hardware_refuses_the_software_cpu_executes_and_the_recording_tells() {
    let session = Session::new("ticks", "hz=2000 count=20");
    let mut refusing = Simulated::intel(1);
    refusing.disturbance.refuse_every = Some(1_000);
    let recorded = session.record(&refusing);
    assert!(recorded.assists > 20, "{recorded:#?}");
    let replayable = open_replayable(&session.path()).expect("it was written");
    let told: u64 = replayable.course().assists.values().sum();
    assert_eq!(told, recorded.assists);
    refusing.disturbance.seed = 2;
    for hardware in [refusing, Simulated::intel(3)] {
        let seed = hardware.disturbance.seed;
        let replayed = replay(&session.path(), &hardware).expect("it replays");
        assert_equal(&recorded, &replayed.report, seed);
        assert_eq!(replayed.report.assists > 20, seed == 2, "seed {seed}");
    }
}

#[test]
fn hardware_that_overcounts_does_not_pass_for_a_replay() {
    let session = Session::new("ticks", "hz=2000 count=20");
    // Nor do checkpoints mend it, of which there are many.
    session.record_with(&Simulated::intel(1), CheckpointArg::Ticks(10_000));
    let mut hardware = Simulated::intel(2);
    hardware.disturbance.overcount_every = Some(5_000);
    let replayed = replay(&session.path(), &hardware).expect("it does not fail, it differs");
    assert_eq!(replayed.report.verified, Some(false));
}

#[test]
fn a_refused_counter_leaves_no_file() {
    let session = Session::new("ticks", "");
    let to = RecordTo { path: session.path(), force: false, checkpoints: CheckpointArg::default() };
    let error = record_on(&Refusing, session.plan(), &to).expect_err("no counter");
    assert_eq!(format!("{error:#}"), hardware::REFUSAL);
    assert!(!session.path().exists());
}

fn the_doctors_trial_passes_on_hardware_that_counts_right(hosts: &impl Hosts) {
    let trial = trial::attempt_on(&hosts.host(3), EngineKind::Pmu);
    assert!(trial.equal && trial.interrupts >= 4, "{trial:?}");
    let trial = trial::attempt_on(&Refusing, EngineKind::Pmu);
    assert_eq!((trial.equal, trial.failure.as_deref()), (false, Some(hardware::REFUSAL)));
}

/// Named by its clock alone, it is that of hardware, not of the software CPU.
fn a_clock_that_is_named_is_not_left_out(hosts: &impl Hosts) {
    let session = Session::new("hello", "");
    session.record(&hosts.host(1));
    let replayable = open_replayable(&session.path()).expect("it was written");
    let options = || ReplayOptions { clock: ClockArg::Pmu, ..ReplayOptions::default() };
    let error = replay_on(&Refusing, &replayable, options()).expect_err("no counter");
    assert!(format!("{error:#}").contains("--engine soft"), "{error:#}");
    let there = replay_on(&hosts.host(2), &replayable, options()).expect("it replays");
    assert_eq!((there.report.engine, there.report.verified), ("kvm", Some(true)));
}
