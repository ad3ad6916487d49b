//! RDTSC in sessions with the clock `pmu`: trapped where the kernel's text is known, told where it is not,
//! and what `--engine auto` makes of that. The hardware's own counter runs.

use std::path::Path;

use reprise::session::assembly::SoftOptions;
use reprise::session::choice::{self, Choice, ClockArg, EngineArg, EngineKind, Running};
use reprise::session::expand::locate;
use reprise::session::guest::Guest;
use reprise::session::hardware::BranchHardware;
use reprise::session::pmu_trap::PmuTrap;
use reprise::session::record::{RecordTo, RunPlan, record_on, run_on};
use reprise::session::replay::{At, ReplayOptions, open, open_replayable, replay_on};
use reprise_devices::cpu_model::TimeStampCounter;
use reprise_expand::Control;
use reprise_machine::engine::{Engine, Exit};
use reprise_machine::inputs::{Planned, Then, When};
use reprise_machine::ram::GuestRam;
use reprise_time_stamp_sites::{KernelText, Unpacking};
use reprise_trace::header::{Precaution, Treatment};

use crate::hosts::{Hosts, on_each_host};
use crate::{CheckpointArg, Session, assert_equal, replay};
use reprise_tests::hardware::{CANNOT_TRAP, COUNTS, Refusing, Simulated};
use reprise_tests::linux_image::linux_image;

/// What `--engine auto` takes for this guest.
fn auto(hardware: &impl BranchHardware, guest: &Guest) -> Choice {
    let running = Running::Guest(guest);
    let choice = choice::for_new_run_on(hardware, EngineArg::Auto, ClockArg::Auto, running);
    choice.expect("something can be had")
}

/// A guest whose file tells nothing of its text.
fn without_sections(name: &str) -> Guest {
    /// Where an ELF file says where its sections are, and how many: the format's own numbers.
    const SECTION_FIELDS: [(usize, usize); 2] = [(0x28, 8), (0x3c, 4)];
    let mut guest = Guest::embedded(name).expect("it is listed");
    let mut bytes = guest.kernel.bytes.to_vec();
    for (at, count) in SECTION_FIELDS {
        bytes[at..at + count].fill(0);
    }
    guest.kernel.bytes = bytes.into();
    guest
}

on_each_host!(
    a_guest_that_reads_the_counter_is_recorded_by_auto_and_replays,
    auto_takes_pmu_for_linux_whose_text_it_has_found,
    a_recording_without_the_trap_says_so,
    a_divergence_is_not_taken_for_the_time_that_is_looked_for,
);

/// User code and kernel read the counter, and a replay on other hardware, and on the software CPU, reads
/// what the log has.
fn a_guest_that_reads_the_counter_is_recorded_by_auto_and_replays(hosts: &impl Hosts) {
    if !hosts.traps() {
        return;
    }
    for (command_line, user) in
        [("scale=1 timing=1 tsd=0", true), ("scale=1 timing=1 tsd=1", false)]
    {
        let session = Session::new("compute", command_line);
        let hardware = hosts.running_time_stamps(1);
        let choice = auto(&hardware, &session.guest);
        assert_eq!(choice.kind, EngineKind::Pmu, "{choice:?}");
        let reason = choice.reason.clone().expect("the program chose");
        assert!(reason.contains("RDTSC trapped") && reason.contains(hosts.said()), "{reason}");
        // Which the recording does not find out again.
        assert!(matches!(choice.trap(), Some(PmuTrap::On(_))), "{choice:?}");
        let to =
            RecordTo { path: session.path(), force: false, checkpoints: CheckpointArg::default() };
        let mut plan = session.plan();
        (plan.choice, plan.memory_mib) = (choice, 32);
        let recorded = record_on(&hardware, plan, &to).expect("it records");
        assert!(session.printed().contains("compute: done"), "{:?}", session.printed());
        assert_eq!(recorded.warning, None);
        let header = open(&session.path()).expect("it was written").header().clone();
        assert!(header.logs_time_stamps());
        for run in 2..4 {
            let replayed = replay(&session.path(), &hosts.running_time_stamps(run));
            let replayed = replayed.unwrap_or_else(|error| panic!("run {run}, {user}: {error:#}"));
            assert_equal(&recorded, &replayed.report, run);
        }
        let replayable = open_replayable(&session.path()).expect("it was written");
        let options = ReplayOptions { engine: EngineArg::Soft, ..ReplayOptions::default() };
        let on_soft = replay_on(&Refusing, &replayable, options).expect("it replays").report;
        assert_eq!(on_soft.verified, Some(true), "{on_soft:#?}");
        assert_eq!(on_soft.final_digest, recorded.final_digest);
        // The log is for all instructions, not for each tick.
        let (log, count) = (on_soft.log_bytes.expect("a log"), on_soft.instructions);
        let rate = log as f64 * 1e3 / count.expect("they are counted") as f64;
        assert_eq!(on_soft.bytes_per_kiloinstruction, Some(rate));
        assert!(on_soft.instructions > Some(on_soft.ticks));
    }
}

/// Where there is a counter the kernel has to be unpacked and searched.
fn auto_takes_pmu_for_linux_whose_text_it_has_found(hosts: &impl Hosts) {
    if !hosts.traps() {
        return;
    }
    let Some(image) = linux_image(Path::new(env!("CARGO_TARGET_TMPDIR"))) else { return };
    let mut guest = Guest::embedded("compute").expect("it is listed");
    guest.kernel.bytes = image.kernel.bytes.into();
    guest.cmdline = image.command_line;
    let choice = auto(&hosts.running_time_stamps(1), &guest);
    assert_eq!(choice.kind, EngineKind::Pmu, "{choice:?}");
    assert!(matches!(choice.trap(), Some(PmuTrap::On(_))), "{choice:?}");
}

#[test]
fn where_rdtsc_is_not_trapped_auto_takes_soft_and_says_why() {
    let compute = Guest::embedded("compute").expect("it is listed");
    let mut cannot = Simulated::intel(1);
    cannot.traps = false;
    let unknown = without_sections("compute");
    let mut packed = compute.clone();
    packed.kernel.bytes = b"not ELF".to_vec().into();
    for (hardware, guest, expected) in [
        (&cannot, &compute, CANNOT_TRAP),
        (&Simulated::intel(1), &unknown, "no 64-bit ELF file with sections"),
        (&Simulated::intel(1), &packed, "no 64-bit ELF file with sections"),
    ] {
        let choice = auto(hardware, guest);
        let reason = choice.reason.expect("the program chose");
        assert_eq!(choice.kind, EngineKind::Soft, "{reason}");
        assert!(reason.contains(expected) && reason.contains(COUNTS), "{reason}");
        assert!(!reason.contains('\n'), "{reason}");
    }
    let choice = auto(&Refusing, &compute);
    assert_eq!(choice.kind, EngineKind::Soft, "{:?}", choice.reason);
}

/// The header of a recording says whether the log has what RDTSC gave.
fn a_recording_without_the_trap_says_so(hosts: &impl Hosts) {
    let mut session = Session::new("ticks", "hz=2000 count=5");
    session.guest = without_sections("ticks");
    session.guest.cmdline = "hz=2000 count=5".to_owned();
    session.record(&hosts.host(1));
    let header = open(&session.path()).expect("it was written").header().clone();
    let about = |it: &&Precaution| it.what == Precaution::KERNEL_TIME_STAMPS;
    let about = header.precautions.iter().find(about).expect("it says");
    assert_eq!(about.treatment, Treatment::Open, "{about:?}");
    assert!(about.how.contains("sections"), "{about:?}");
    let replayed = replay(&session.path(), &hosts.host(2)).expect("it replays");
    assert_eq!(replayed.report.verified, Some(true));
}

/// An expansion looks for guest time by replaying. What it finds behind a divergence is no place.
fn a_divergence_is_not_taken_for_the_time_that_is_looked_for(hosts: &impl Hosts) {
    let mut session = Session::new("compute", "");
    session.guest = without_sections("compute");
    session.guest.cmdline = "scale=1 timing=1 tsd=0".to_owned();
    let to = RecordTo { path: session.path(), force: false, checkpoints: CheckpointArg::Never };
    let plan = RunPlan { memory_mib: 32, ..session.plan() };
    record_on(&hosts.running_time_stamps(1), plan, &to).expect("it records");
    let replayable = open_replayable(&session.path()).expect("it was written");
    let options = ReplayOptions { engine: EngineArg::Soft, ..ReplayOptions::default() };
    let report = replay_on(&Refusing, &replayable, options).expect("it replays").report;
    assert_eq!(report.verified, Some(false), "{report:#?}");
    let behind = At::Time(1_000_000_000_000);
    let error = locate(&replayable, behind, SoftOptions::default(), &Control::default());
    let error = error.expect_err("the replay diverges").to_string();
    assert!(error.contains("differs from the recording"), "{error}");
}

/// What the log has of RDTSC cannot be given to a guest whose RDTSC is not trapped.
#[test]
fn a_replay_that_cannot_trap_says_what_to_do() {
    let session = Session::new("ticks", "hz=2000 count=5");
    session.record(&Simulated::intel(1));
    let mut hardware = Simulated::intel(2);
    hardware.traps = false;
    let error = replay(&session.path(), &hardware).expect_err("it is refused").to_string();
    assert!(error.contains(CANNOT_TRAP) && error.contains("--engine soft"), "{error}");
}

#[test]
fn a_kernel_that_is_not_where_it_is_linked_to_is_told() {
    let engine = |kernel| {
        let ram = GuestRam::new(4).expect("the host has 4 MiB");
        let engine =
            Simulated::intel(1).engine(ram, TimeStampCounter::Hidden).expect("it is simulated");
        engine.trapping_time_stamps(kernel).expect("it traps")
    };
    let elsewhere = KernelText {
        entry: 0x10_0000,
        entry_bytes: vec![0x90, 0xf4],
        unpacking: Unpacking::Unknown,
        ..KernelText::default()
    };
    let mut missed = engine(elsewhere.clone());
    assert!(matches!(missed.run(u64::MAX), Ok(Exit::TripleFault | Exit::Unsupported(_))));
    let left: Vec<_> = missed.left_open().into_iter().map(|it| it.what).collect();
    assert_eq!(left, [Precaution::KERNEL_TIME_STAMPS, Precaution::USER_TIME_STAMPS]);
    let entry_bytes = vec![0, 0];
    let there = KernelText { entry_bytes, unpacking: Unpacking::None, ..elsewhere };
    let mut found = engine(there);
    // Zeroed RAM has no exit but a fault without a handler.
    assert!(matches!(found.run(u64::MAX), Ok(Exit::TripleFault | Exit::Unsupported(_))));
    assert_eq!(found.left_open(), []);
    let report = run_on(&Simulated::intel(3), Session::new("hello", "").plan()).expect("it runs");
    assert_eq!(report.warning, None);
}

/// What the header promised before the run, and the run did not keep: here it ends in the boot stub.
#[test]
fn a_recording_says_what_its_run_left_open() {
    let Some(image) = linux_image(Path::new(env!("CARGO_TARGET_TMPDIR"))) else { return };
    let mut session = Session::new("compute", "");
    session.guest.kernel.bytes = image.kernel.bytes.into();
    session.guest.cmdline = image.command_line;
    let to = RecordTo { path: session.path(), force: false, checkpoints: CheckpointArg::Never };
    let plan = vec![Planned { at: When::Tick(1000), then: Then::Stop }];
    let plan = RunPlan { memory_mib: 256, plan, ..session.plan() };
    let recorded = record_on(&Simulated::intel(1), plan, &to).expect("it records");
    let warning = recorded.warning.as_ref().expect("it warns");
    assert!(warning.contains("may differ") && !warning.contains('\n'), "{warning}");
    let replayable = open_replayable(&session.path()).expect("it was written");
    let header = replayable.recording().header();
    assert!(header.logs_time_stamps(), "the header cannot know");
    for what in [Precaution::KERNEL_TIME_STAMPS, Precaution::USER_TIME_STAMPS] {
        let now = replayable.course().precautions(header);
        let about: Vec<_> = now.iter().filter(|it| it.what == what).collect();
        assert!(matches!(about[..], [Precaution { treatment: Treatment::Open, .. }]), "{now:?}");
    }
    let replayed = replay(&session.path(), &Simulated::intel(2)).expect("it replays");
    assert_equal(&recorded, &replayed.report, 2);
}
