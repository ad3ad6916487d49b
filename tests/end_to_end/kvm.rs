//! The host's KVM, where there is one: recorded and replayed ten times out of ten. (`crossing.rs` does the
//! same of the clock `sync`, and expands what was recorded.)

use reprise_guest_images::COMPUTE_AT_SCALE_1;
use reprise_tests::skipped::{skipped, skipped_without_pmu};
use serde_json::Value;

use crate::program::{Workplace, assert_equal_runs, record, replay, run};

/// How often each recording must replay equal, and each guest be recorded.
pub(crate) const TIMES: usize = 10;

/// Whether this process may use KVM; says why not.
pub(crate) fn kvm_opens() -> bool {
    let opened = std::fs::File::options().read(true).write(true).open("/dev/kvm");
    if let Err(error) = &opened {
        skipped(format_args!("/dev/kvm: {error}"));
    }
    opened.is_ok()
}

/// Records and replays ten times; the last recording's report.
fn ten_of_ten(guest: &[&str], clock: &str) -> Option<Value> {
    if !kvm_opens() {
        return None;
    }
    let workplace = Workplace::new();
    let mut last = Value::Null;
    for time in 0..TIMES {
        let file = workplace.path(&format!("{time}.rr"));
        let recorded = record(&[&["--engine", "kvm", "--clock", clock], guest].concat(), &file, 0);
        assert_eq!((&recorded["engine"], &recorded["clock"]), (&"kvm".into(), &clock.into()));
        let replayed = replay(&file, &[]);
        assert_eq!(replayed["verification"], "exact", "{replayed:#}");
        assert_equal_runs(&recorded, &replayed);
        last = recorded;
    }
    Some(last)
}

/// Whether this host has a counter for the clock `pmu`; says why not.
pub(crate) fn pmu_counts() -> bool {
    let finding = reprise_kvm::pmu_clock();
    if !finding.available {
        skipped_without_pmu(&finding.reason);
    }
    finding.available
}

/// By branches where something counts them; elsewhere what is lacking is said before anything is done.
#[test]
fn a_recording_of_the_software_cpu_replays_by_branches() {
    let workplace = Workplace::new();
    let file = workplace.path("ticks.rr");
    let recorded = record(&["--image", "ticks", "--engine", "soft"], &file, 0);
    let rewritten = workplace.path("rewritten.rr");
    let by_branches = ["--engine", "kvm", "--clock", "pmu", "--rewritten", &rewritten];
    if pmu_counts() {
        let replayed = replay(&file, &by_branches);
        assert_eq!((&replayed["engine"], &replayed["clock"]), (&"kvm".into(), &"pmu".into()));
        assert_eq!(replayed["verified"], true, "{replayed:#}");
        for field in ["console_digest", "console_bytes", "interrupts", "ending", "ending_detail"] {
            assert_eq!(replayed[field], recorded[field], "{field}: {replayed:#}");
        }
        return;
    }
    let refused = run(&[&["replay", &file], &by_branches[..]].concat());
    assert!(refused.expect_reason().contains("--engine soft"), "{}", refused.expect_reason());
    assert!(!std::path::Path::new(&rewritten).exists());
    // Nor does a run begin that would be handed over to it.
    let then = ["--until", "100", "--then", "kvm:pmu"];
    let never = workplace.path("never.rr");
    let refused = run(&[&["record", "--image", "hello", "-o", &never], &then[..]].concat());
    assert_eq!(refused.code(), 1);
    assert!(!std::path::Path::new(&never).exists());
}

/// A file with what is typed into `echo`.
pub(crate) fn typed(workplace: &Workplace) -> String {
    workplace.file("typed", "one\rtwo\rquit\r")
}

#[test]
fn ticks_under_step() {
    let Some(report) = ten_of_ten(&["--image", "ticks", "--cmdline", "count=3"], "step") else {
        return;
    };
    assert!(report["interrupts"].as_u64() >= Some(3), "{report:#}");
}

/// Where each instruction is stepped nobody asks where the kernel reads the time-stamp counter: of a 32-bit file that
/// is not known.
#[test]
fn a_kernel_whose_text_is_not_known_replays_under_step() {
    ten_of_ten(&["--image", "hello32"], "step");
}

/// Interrupts in user code, and all of it recorded once, since each takes seconds.
#[test]
fn compute_under_step() {
    if !kvm_opens() {
        return;
    }
    let workplace = Workplace::new();
    let file = workplace.path("compute.rr");
    let guest = ["--image", "compute", "--cmdline", "scale=0 hz=1000 timing=1"];
    let recorded =
        record(&[&["--engine", "kvm", "--clock", "step"], &guest[..]].concat(), &file, 0);
    assert!(recorded["interrupts"].as_u64() >= Some(4), "{recorded:#}");
    let replayed = replay(&file, &[]);
    assert_eq!((&replayed["clock"], &replayed["verification"]), (&"step".into(), &"exact".into()));
    assert_equal_runs(&recorded, &replayed);
}

#[test]
fn echo_under_step() {
    let workplace = Workplace::new();
    ten_of_ten(&["--image", "echo", "--input", &typed(&workplace)], "step");
}

/// User code reads the time-stamp counter: refused by CR4.TSD, asked for by the guest's kernel, trapped
/// there, and answered from the log.
#[test]
fn time_stamps_of_user_code_under_sync() {
    if kvm_opens() {
        reads_time_stamps("sync");
    }
}

/// The same, trapped by INT3 in the guest's kernel.
#[test]
fn time_stamps_of_user_code_under_pmu() {
    if !pmu_counts() {
        return;
    }
    let trap = reprise_kvm::time_stamp_trap();
    match trap.available {
        true => reads_time_stamps("pmu"),
        false => skipped(format_args!("RDTSC cannot be trapped: {}", trap.reason)),
    }
}

fn reads_time_stamps(clock: &str) {
    let words = ["--image", "compute", "--cmdline", "scale=1 timing=1"];
    ten_of_ten(&words, clock);
    let workplace = Workplace::new();
    let mut times = std::collections::BTreeSet::new();
    for name in ["a.rr", "b.rr", "c.rr"] {
        let (file, console) = (workplace.path(name), workplace.path(&format!("{name}.console")));
        let engine = ["--engine", "kvm", "--clock", clock, "--console", &console];
        let recorded = record(&[&engine[..], &words[..]].concat(), &file, 0);
        let printed = std::fs::read_to_string(&console).expect("a console");
        let lines: Vec<_> = printed.lines().filter(|line| line.contains("nanoseconds")).collect();
        assert_eq!(lines.len(), 4, "{printed:?}");
        // The host's time, and another each time: it is the log that makes the replay equal.
        for line in &lines {
            let digits = line.rsplit(' ').next().expect("a number");
            let ns = u64::from_str_radix(digits, 16).expect("hexadecimal");
            assert!((1_000..60_000_000_000).contains(&ns), "{line}");
        }
        times.insert(printed);
        let replayed = replay(&file, &[]);
        assert_eq!(replayed["final_digest"], recorded["final_digest"]);
        let info = run(&["--json", "info", &file]).expect_code(0).json();
        let precautions = info["precautions"].as_array().expect("a list");
        let about = |what: &str| precautions.iter().find(|one| one["what"] == what);
        let kernel = about("RDTSC, kernel code").expect("it is told");
        assert_eq!(kernel["treatment"], "Closed", "{kernel}");
    }
    assert_eq!(times.len(), 3, "{times:?}");
}

#[test]
fn ticks_under_pmu() {
    if !pmu_counts() {
        return;
    }
    // With exits and without: there a timer of the host kicks the guest at its deadlines.
    for guest in ["count=40", "hz=1000 count=40 poll=100000000"] {
        let report = ten_of_ten(&["--image", "ticks", "--cmdline", guest], "pmu");
        let report = report.expect("a host with the clock pmu has KVM");
        assert!(report["interrupts"].as_u64() >= Some(40), "{report:#}");
        assert!(report["virtual_seconds"].as_f64() < Some(2.0), "{report:#}");
    }
}

#[test]
fn echo_and_compute_under_pmu() {
    if !pmu_counts() {
        return;
    }
    let workplace = Workplace::new();
    ten_of_ten(&["--image", "echo", "--input", &typed(&workplace)], "pmu");
    ten_of_ten(&["--image", "compute", "--cmdline", "scale=1"], "pmu");
}

/// Where interrupts are hardest to find again, as on simulated hardware.
#[test]
fn hard_positions_under_pmu() {
    const SCENARIOS: [&str; 10] =
        ["rep", "straight", "itself", "memory", "shadow", "hlt", "fault", "window", "user", "code"];
    if !pmu_counts() {
        return;
    }
    let workplace = Workplace::new();
    let typed = workplace.file("typed", "two at one moment");
    for scenario in SCENARIOS {
        eprintln!("{scenario}");
        let command_line = format!("do={scenario} hz=2000 count=20");
        let guest = ["--image", "positions", "--cmdline", &command_line, "--input", &typed];
        let report = ten_of_ten(&guest, "pmu").expect("a host with the clock pmu has KVM");
        assert!(report["interrupts"].as_u64() >= Some(20), "{report:#}");
    }
}

#[test]
fn where_there_is_no_counter_one_line_says_what_to_do() {
    if reprise_kvm::pmu_clock().available {
        return;
    }
    let workplace = Workplace::new();
    let file = workplace.path("hello.rr");
    for command in [&["run"][..], &["record", "-o", &file]] {
        let words = [command, &["--engine", "kvm", "--clock", "pmu", "--image", "hello"]].concat();
        let refused = run(&words);
        let reason = refused.expect_reason();
        assert!(reason.contains("clock pmu") && reason.contains("--engine soft"), "{reason}");
    }
    assert!(!std::path::Path::new(&file).exists());
}

#[test]
fn compute_under_sync_prints_what_its_sources_compute() {
    if !kvm_opens() {
        return;
    }
    let workplace = Workplace::new();
    let console = workplace.path("console");
    let engine = ["--json", "run", "--engine", "kvm", "--clock", "sync"];
    let guest = ["--image", "compute", "--cmdline", "scale=1", "--console", &console];
    run(&[&engine[..], &guest[..]].concat()).expect_code(0);
    assert_eq!(std::fs::read_to_string(&console).expect("a console"), COMPUTE_AT_SCALE_1);
}

#[test]
fn a_guest_that_spins_is_stopped_on_kvm_too() {
    if !kvm_opens() {
        return;
    }
    let workplace = Workplace::new();
    for (clock, deed) in [("step", "spin"), ("sync", "idle")] {
        let (file, console) = (workplace.path(deed), workplace.path(&format!("{deed}.console")));
        let command_line = format!("do={deed}");
        let words = [
            &["--json", "record", "--engine", "kvm", "--clock", clock, "--image", "misbehave"],
            &["--cmdline", &command_line, "--console", &console, "-o", &file][..],
        ]
        .concat();
        let mut running = crate::program::reprise(&words).start();
        running.wait_until("the deed is announced", || {
            std::fs::read_to_string(&console).is_ok_and(|text| text.contains("misbehave: "))
        });
        running.signal("INT");
        let recorded = running.finish().expect_code(0).json();
        assert_eq!(recorded["ending"], "stopped", "{deed}: {recorded:#}");
        let replayed = replay(&file, &[]);
        assert_eq!(replayed["console_digest"], recorded["console_digest"]);
        assert_eq!(replayed["ticks"], recorded["ticks"]);
    }
}
