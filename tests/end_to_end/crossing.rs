//! Recordings that cross engines: made on the host's KVM, replayed and expanded on the software CPU, and
//! the other way.

use serde_json::Value;

use crate::kvm::{TIMES, kvm_opens, pmu_counts, typed};
use crate::program::{Workplace, record, replay, replayed_console, run};

const KVM: [&str; 3] = ["--engine", "kvm", "--clock"];
/// What a recording of hardware leaves out of its final digest.
const ACCESSED_BITS: &str = "accessed bits of the guest's page tables";

/// Fields that an engine gives again, whatever it is.
#[track_caller]
fn assert_same_run(recorded: &Value, again: &Value, fields: &[&str]) {
    for field in fields {
        assert!(!recorded[field].is_null(), "{field}: {recorded:#}");
        assert_eq!(recorded[field], again[field], "{field}: {recorded:#} {again:#}");
    }
}

/// As [`crosses`], recorded ten times.
fn ten_of_ten_cross(clock: &str, guest: &[&str]) {
    for time in 0..TIMES {
        eprintln!("time {time}");
        if !crosses(clock, guest) {
            return;
        }
    }
}

/// Records on KVM; replays and expands on the software CPU, and replays where it was recorded. Gives false
/// where there is no such clock.
fn crosses(clock: &str, guest: &[&str]) -> bool {
    if !kvm_opens() || clock == "pmu" && !pmu_counts() {
        return false;
    }
    let workplace = Workplace::new();
    let (file, trace) = (workplace.path("kvm.rr"), workplace.path("trace"));
    let recorded = record(&[&KVM[..], &[clock], guest].concat(), &file, 0);
    let replayed = replay(&file, &["--engine", "soft"]);
    assert_eq!(
        (&replayed["engine"], &replayed["verification"]),
        (&"soft".into(), &"across-engines".into())
    );
    let fields = ["final_digest", "console_digest", "ticks", "events", "interrupts", "ending"];
    assert_same_run(&recorded, &replayed, &fields);
    if clock != "step" {
        let again = replay(&file, &["--engine", "kvm"]);
        assert_eq!(again["verification"], "exact", "{again:#}");
        assert_same_run(&recorded, &again, &fields);
    }
    let set_aside = replayed["set_aside"].as_array().expect("a list");
    let what: Vec<_> = set_aside.iter().map(|left_out| &left_out["what"]).collect();
    assert_eq!(what, [ACCESSED_BITS], "{replayed:#}");
    let expanded = run(&["--json", "expand", &file, "-o", &trace]).expect_code(0).json();
    assert_eq!(expanded["verified"], true, "{expanded:#}");
    assert_same_run(&recorded, &expanded, &["final_digest"]);
    assert_eq!(expanded["instructions"], replayed["instructions"]);
    assert!(expanded["instructions"].as_u64() >= recorded["ticks"].as_u64(), "{expanded:#}");
    true
}

/// The CPU in shutdown is compared too.
#[test]
fn a_triple_fault_crosses() {
    for clock in ["sync", "step"] {
        crosses(clock, &["--image", "misbehave", "--cmdline", "do=triple-fault"]);
    }
    replays_stepped(&["--image", "misbehave", "--cmdline", "do=triple-fault"]);
}

#[test]
fn ticks_from_sync() {
    ten_of_ten_cross("sync", &["--image", "ticks", "--cmdline", "count=8"]);
}

#[test]
fn ticks_from_step() {
    crosses("step", &["--image", "ticks", "--cmdline", "count=3"]);
}

#[test]
fn echo_from_sync() {
    let workplace = Workplace::new();
    ten_of_ten_cross("sync", &["--image", "echo", "--input", &typed(&workplace)]);
}

#[test]
fn echo_from_step() {
    let workplace = Workplace::new();
    crosses("step", &["--image", "echo", "--input", &typed(&workplace)]);
}

#[test]
fn compute_from_sync() {
    ten_of_ten_cross("sync", &["--image", "compute", "--cmdline", "scale=1"]);
}

#[test]
fn ticks_from_pmu() {
    for guest in ["count=40", "hz=1000 count=40 poll=100000000"] {
        ten_of_ten_cross("pmu", &["--image", "ticks", "--cmdline", guest]);
    }
}

#[test]
fn echo_from_pmu() {
    let workplace = Workplace::new();
    ten_of_ten_cross("pmu", &["--image", "echo", "--input", &typed(&workplace)]);
}

/// Its user code reads the time-stamp counter.
#[test]
fn compute_from_pmu() {
    ten_of_ten_cross("pmu", &["--image", "compute", "--cmdline", "scale=1 timing=1"]);
}

#[test]
fn a_stepped_recording_replays_on_the_software_cpu_to_the_same_hash() {
    if !kvm_opens() {
        return;
    }
    let workplace = Workplace::new();
    let (file, console) = (workplace.path("ticks.rr"), workplace.path("console"));
    let guest = ["step", "--image", "ticks", "--cmdline", "count=20", "--console", &console];
    record(&[&KVM[..], &guest].concat(), &file, 0);
    let printed = std::fs::read_to_string(&console).expect("the console was written");
    assert!(printed.contains("position hash "), "{printed:?}");
    let replayed = replayed_console(&file, &["--engine", "soft"]);
    assert!(replayed.contains(printed.trim_end()), "{replayed:?} lacks {printed:?}");
}

/// Checkpoints, windows and threads, all in the ticks that `info` shows: exits.
#[test]
fn a_recording_of_exits_is_expanded_in_pieces_and_windows() {
    if !kvm_opens() {
        return;
    }
    let workplace = Workplace::new();
    let path = |name: &str| workplace.path(name);
    let (file, part) = (path("ticks.rr"), path("part"));
    // KVM's own checkpoints are in the way of nothing.
    let guest = ["sync", "--image", "ticks", "--cmdline", "count=60", "--checkpoint-every", "70"];
    let recorded = record(&[&KVM[..], &guest].concat(), &file, 0);
    let end = recorded["ticks"].as_u64().expect("ticks");
    let expand = |arguments: &[&str], out: &str| {
        let words = [&["--json", "expand", &file, "--force", "-o", out], arguments].concat();
        let expanded = run(&words).expect_code(0).json();
        assert_eq!(expanded["verified"], true, "{expanded:#}");
        expanded
    };
    let whole = expand(&[], &part);
    run(&["--json", "checkpoint", &file, "--every", "25"]).expect_code(0);
    let pieces: Vec<Value> =
        ["1", "3"].map(|jobs| expand(&["--jobs", jobs], &path(jobs))).into_iter().collect();
    for expanded in &pieces {
        assert_same_run(&recorded, expanded, &["final_digest"]);
        assert_eq!(expanded["instructions"], whole["instructions"]);
        assert!(expanded["checkpoints_verified"].as_u64() >= Some(3), "{expanded:#}");
    }
    let trace = |name: &str| std::fs::read(path(name)).expect("a trace");
    assert!(trace("1") == trace("3"), "the trace hangs on the number of threads");
    let middle = (end / 2).to_string();
    let halves = [["--to", &middle], ["--from", &middle]].map(|window| expand(&window, &part));
    let count = |expanded: &Value| expanded["instructions"].as_u64().expect("a count");
    assert_eq!(halves.iter().map(count).sum::<u64>(), count(&whole));
    assert_eq!(halves[0]["end_tick"].to_string(), middle);
    let later = replay(&file, &["--engine", "soft", "--from", &middle]);
    assert!(later["from_tick"].as_u64() > Some(0), "{later:#}");
    assert_same_run(&recorded, &later, &["final_digest"]);
}

#[test]
fn info_says_where_a_recording_replays() {
    let workplace = Workplace::new();
    let file = workplace.path("hello.rr");
    record(&["--engine", "soft", "--image", "hello"], &file, 0);
    let info = run(&["--json", "info", &file]).expect_code(0).json();
    let engines: Vec<_> = info["replays_on"].as_array().expect("a list").iter().collect();
    assert_eq!((&engines[0]["engine"], &engines[1]["engine"]), (&"soft".into(), &"kvm".into()));
    assert!(engines[1]["condition"].to_string().contains("CPL0"), "{info:#}");
    assert!(engines[2]["condition"].to_string().contains("--clock pmu"), "{info:#}");
}

/// Records on the software CPU and replays by stepping, on KVM.
fn replays_stepped(guest: &[&str]) -> Option<Value> {
    if !kvm_opens() {
        return None;
    }
    let workplace = Workplace::new();
    let file = workplace.path("soft.rr");
    let recorded = record(&[&["--engine", "soft"], guest].concat(), &file, 0);
    let replayed = replay(&file, &["--engine", "kvm"]);
    assert_eq!((&replayed["engine"], &replayed["clock"]), (&"kvm".into(), &"step".into()));
    let fields = [
        "final_digest",
        "console_digest",
        "ticks",
        "instructions",
        "events",
        "interrupts",
        "ending",
    ];
    assert_same_run(&recorded, &replayed, &fields);
    assert_eq!(replayed["set_aside"], Value::Array(Vec::new()), "{replayed:#}");
    Some(recorded)
}

#[test]
fn a_soft_recording_replays_on_kvm() {
    let workplace = Workplace::new();
    replays_stepped(&["--image", "hello"]);
    replays_stepped(&["--image", "hello32"]);
    replays_stepped(&["--image", "echo", "--input", &typed(&workplace)]);
    replays_stepped(&["--image", "ticks", "--cmdline", "hz=50000 count=3"]);
}

/// User code too, and timer interrupts in it, whose places are in no log.
#[test]
fn a_soft_recording_of_user_code_replays_on_kvm() {
    let guest = ["--image", "compute", "--cmdline", "scale=0 hz=200000 timing=1"];
    let Some(recorded) = replays_stepped(&guest) else { return };
    assert!(recorded["interrupts"].as_u64() >= Some(5), "{recorded:#}");
    let guest = ["--image", "positions", "--cmdline", "do=user hz=200000 count=6"];
    replays_stepped(&guest);
}

#[test]
#[ignore = "a minute or more: run it after a change to the clock step"]
fn soft_recordings_of_all_embedded_guests_replay_on_kvm_ten_of_ten() {
    let workplace = Workplace::new();
    let keys = typed(&workplace);
    for time in 0..10 {
        eprintln!("time {time}");
        replays_stepped(&["--image", "compute", "--cmdline", "scale=0 hz=200000 timing=1"]);
        replays_stepped(&["--image", "echo", "--input", &keys]);
        replays_stepped(&["--image", "hello"]);
        replays_stepped(&["--image", "hello32"]);
        replays_stepped(&["--image", "ticks", "--cmdline", "hz=50000 count=3"]);
    }
    // All but `fault`, in which the guest steps itself: the clock `step` refuses that.
    for scenario in
        ["rep", "straight", "itself", "memory", "shadow", "hlt", "window", "user", "code", "ports"]
    {
        let cmdline = format!("do={scenario} hz=200000 count=8");
        eprintln!("{cmdline}");
        replays_stepped(&["--image", "positions", "--cmdline", &cmdline]);
    }
}

/// Moments in user code are instruction counts: from what is typed into it to the end.
#[test]
fn a_stepped_recording_of_user_code_replays_on_the_software_cpu() {
    crosses("step", &["--image", "compute", "--cmdline", "scale=0 timing=1"]);
}

/// What is typed, and timer interrupts, while the guest is mostly between two elements of one instruction.
#[test]
fn string_instructions_on_ports_from_sync() {
    let workplace = Workplace::new();
    for (rate, typed) in [(300, 1), (2000, 20), (20_000, 0), (60_000, 20)] {
        eprintln!("{rate} interrupts a second, {typed} lines typed");
        let keys = workplace.file("keys", "what is typed amid REP INS. ".repeat(typed));
        let cmdline = format!("do=ports hz={rate} count=24");
        crosses("sync", &["--image", "positions", "--cmdline", &cmdline, "--input", &keys]);
    }
}
