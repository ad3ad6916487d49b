//! Recordings whose ticks are no instructions, and pairs with different clocks: what parts them is found by
//! instructions all the same.

use reprise_replay::Start;
use reprise_tests::hardware::Simulated;
use reprise_trace::event::Event;
use serde_json::Value;

use crate::recordings::{Workplace, open, reprise, text};

/// Where the recordings of branches are made.
fn machine() -> Simulated {
    Simulated::intel(1).without_traps()
}

/// The first instruction behind which the CPUs of two replays differ, each of them looked at.
fn first_instruction_apart(a: &std::path::Path, b: &std::path::Path) -> u64 {
    let (one, other) = (open(a), open(b));
    let mut one = one.soft_machine(Start::Run).expect("a machine");
    let mut other = other.soft_machine(Start::Run).expect("a machine");
    for instruction in 1.. {
        let ends = [
            one.advance_to_instruction(instruction).expect("it runs").is_some(),
            other.advance_to_instruction(instruction).expect("it runs").is_some(),
        ];
        use reprise_machine::engine::Engine;
        let states = [
            one.engine().cpu_state().expect("a state"),
            other.engine().cpu_state().expect("a state"),
        ];
        if states[0] != states[1] || ends[0] != ends[1] {
            return instruction - 1;
        }
        assert!(!ends[0], "both end, and are alike");
    }
    unreachable!("they differ")
}

fn names(causes: &Value) -> Vec<&str> {
    let all = causes.as_array().expect("a list").iter();
    all.filter_map(|cause| cause["name"].as_str()).collect()
}

fn diff(a: &std::path::Path, b: &std::path::Path) -> Value {
    let ran = reprise(&["--json", "diff", text(a), text(b)]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    ran.json()
}

fn narrowed(file: &std::path::Path) -> Value {
    let ran = reprise(&["--json", "replay", "--engine", "soft", "--bisect", text(file)]);
    assert_eq!(ran.code, 1, "{} {}", ran.stdout, ran.stderr);
    ran.json()["bisection"].clone()
}

/// Turns a bit of the byte that was typed as the sixth.
fn type_otherwise(records: &mut [reprise_trace::event::Record]) {
    let mut passed = 0;
    for record in records {
        if let Event::Console(bytes) = &mut record.event {
            if let Some(byte) = bytes.get_mut(5 - passed) {
                *byte ^= 1;
                return;
            }
            passed += bytes.len();
        }
    }
    panic!("so much was not typed");
}

#[test]
fn one_typed_byte_is_followed_where_ticks_are_branches() {
    let workplace = Workplace::new();
    let guest = ("echo", "", "same\rone\rquit\r");
    let a = workplace.record_branches("a.rr", guest, &machine());
    let b = workplace.altered("b.rr", &a, |records| type_otherwise(records));
    assert_parted_by_a_typed_byte(&a, &b);
}

#[test]
fn one_typed_byte_is_followed_where_ticks_are_exits() {
    if !kvm_opens() {
        return;
    }
    let workplace = Workplace::new();
    let a = workplace.record_on("a.rr", ["kvm", "sync"], ("echo", "", "same\rone\rquit\r"));
    let b = workplace.altered("b.rr", &a, |records| type_otherwise(records));
    assert_parted_by_a_typed_byte(&a, &b);
}

#[track_caller]
fn assert_parted_by_a_typed_byte(a: &std::path::Path, b: &std::path::Path) {
    let exact = first_instruction_apart(a, b);
    let report = diff(a, b);
    let compared = &report["bisection"];
    let finding = &compared["finding"];
    assert_eq!(
        (&finding["instructions"], &finding["kind"]),
        (&exact.into(), &"instruction".into())
    );
    assert!(finding["instruction"].as_str().is_some_and(|text| text.starts_with("in ")));
    assert_eq!(names(&finding["causes"])[0], "input", "{finding:#}");
    let cause = finding["causes"][0]["text"].as_str().expect("text");
    assert!(cause.contains("byte 5 is 'o'") && cause.contains("'n'"), "{cause}");
    assert_eq!(
        (&finding["cpu"][0]["a"], &finding["cpu"][0]["b"]),
        (&"0x6f".into(), &"0x6e".into())
    );
    // Where it entered, and only there.
    let origin = &compared["origin"];
    let input = report["first_input_difference"]["tick"].as_u64().expect("a tick");
    assert_eq!((&origin["kind"], &origin["sides"][0]["tick"]), (&"entering".into(), &input.into()));
    assert_eq!(compared["comparison"]["other_clocks"], false);
    // The altered copy's own replay says where it is not what its machine did.
    let narrowed = narrowed(b);
    assert!(narrowed["divergence"].is_string(), "{narrowed:#}");
    assert!(narrowed["ran"]["instructions"].as_u64().is_some_and(|count| count > 0));
    assert!(narrowed["engines"]["finding"].is_null(), "{narrowed:#}");
    assert_eq!(names(&narrowed["causes"]).last(), Some(&"altered"), "{narrowed:#}");
}

/// Under two clocks the same things happen at other ticks and times; instructions are what is common.
#[test]
fn recordings_of_two_clocks_are_compared_by_what_they_execute() {
    let workplace = Workplace::new();
    let typed = "same\rone\rquit\r";
    let branches = workplace.record_branches("a.rr", ("echo", "", typed), &machine());
    let other = workplace.record("b.rr", "echo", "same\rtwo\rquit\r", &["--memory", "8"]);
    let report = diff(&branches, &other);
    assert!(report["not_bisected"].is_null(), "{report:#}");
    let compared = &report["bisection"];
    assert_eq!(compared["comparison"]["other_clocks"], true, "{compared:#}");
    let exact = first_instruction_apart(&branches, &other);
    assert_eq!(compared["finding"]["instructions"], exact, "{compared:#}");
    let typed = report["first_typed_difference"].as_str().expect("they were typed otherwise");
    assert!(typed.contains("byte 5 is 'o'") && typed.contains("'t'"), "{typed}");
    let shown = reprise(&["diff", text(&branches), text(&other)]).stdout;
    for part in ["kvm, pmu", "soft, instructions", "the recordings' clocks are not the same"] {
        assert!(shown.contains(part), "no {part:?} in\n{shown}");
    }
    assert!(!shown.contains("uart."), "devices are not compared:\n{shown}");
}

#[test]
fn one_run_under_two_clocks_is_said_to_be_one() {
    let workplace = Workplace::new();
    // It asks nobody for the time, and sleeps for no device.
    let branches = workplace.record_branches("a.rr", ("hello", "", ""), &machine());
    // Nor does it read the real-time clock, which begins at another second.
    std::thread::sleep(std::time::Duration::from_millis(1100));
    let other = workplace.record("b.rr", "hello", "", &["--memory", "8"]);
    let report = diff(&branches, &other);
    assert!(report["bisection"]["finding"].is_null(), "{:#}", report["bisection"]);
    let shown = reprise(&["diff", text(&branches), text(&other)]).stdout;
    assert!(shown.starts_with("CPU and RAM are the same from the first"), "{shown}");
}

/// A counter that counts too much: the CPU is as recorded at another tick than the record says.
#[test]
fn a_counter_that_counts_wrongly_is_told_with_the_right_place() {
    let workplace = Workplace::new();
    let mut hardware = machine();
    hardware.disturbance.overcount_every = Some(3_000);
    let file = workplace.record_branches("a.rr", ("ticks", "hz=2000 count=20", ""), &hardware);
    let narrowed = narrowed(&file);
    assert_eq!(names(&narrowed["causes"])[0], "skid", "{narrowed:#}");
    let elsewhere = &narrowed["around"]["elsewhere"];
    let number = |name: &str| elsewhere[name].as_u64().expect("a number");
    // More were counted than there were.
    assert!(number("recorded_tick") > number("tick"), "{elsewhere:#}");
}

/// One place off, as a skid that was passed over leaves it.
#[test]
fn an_arrival_that_is_one_place_off_is_told() {
    let workplace = Workplace::new();
    let typed = "same\rone\rquit\r";
    let soft = workplace.record("soft.rr", "echo", typed, &["--memory", "8"]);
    let branches = workplace.record_branches("pmu.rr", ("echo", "", typed), &machine());
    for (file, behind) in [(soft, 1), (branches, 2)] {
        let off = workplace.altered("off.rr", &file, |records| {
            let first = records.iter().position(|one| matches!(one.event, Event::Console(_)));
            // The ticks of a log rise.
            for record in &mut records[first.expect("something was typed")..] {
                record.moment.tick += behind;
            }
        });
        let narrowed = narrowed(&off);
        assert_eq!(names(&narrowed["causes"])[0], "skid", "{narrowed:#}");
        let elsewhere = &narrowed["around"]["elsewhere"];
        let number = |name: &str| elsewhere[name].as_u64().expect("a number");
        assert_eq!(number("recorded_tick"), number("tick") + behind, "{elsewhere:#}");
        // The two side by side: the same, given at two places.
        let report = diff(&file, &off);
        let compared = &report["bisection"];
        let first =
            if compared["origin"].is_null() { &compared["finding"] } else { &compared["origin"] };
        assert_eq!(names(&first["causes"])[0], "skid", "{compared:#}");
        std::fs::remove_file(off).expect("it is there");
    }
}

/// The guest reads a counter that runs, and no log has.
#[test]
fn a_time_stamp_that_nobody_logged_is_told() {
    let workplace = Workplace::new();
    let guest = ("compute", "scale=1 timing=1 tsd=0", "");
    let file = workplace.record_branches("a.rr", guest, &machine());
    let narrowed = narrowed(&file);
    assert_eq!(names(&narrowed["causes"])[0], "time-stamp", "{narrowed:#}");
}

#[test]
fn a_time_stamp_that_kvm_answered_itself_is_told() {
    if !kvm_opens() {
        return;
    }
    let workplace = Workplace::new();
    let guest = ("compute", "scale=1 timing=1 tsd=0", "");
    let file = workplace.record_on("a.rr", ["kvm", "sync"], guest);
    if reprise(&["replay", "--engine", "soft", text(&file)]).code == 0 {
        reprise_tests::skipped::skipped("this host's KVM lets RDTSC be trapped");
        return;
    }
    let narrowed = narrowed(&file);
    assert_eq!(names(&narrowed["causes"])[0], "time-stamp", "{narrowed:#}");
}

/// Whether there is a KVM that may be used.
fn kvm_opens() -> bool {
    let opens = reprise_kvm::opens();
    if !opens {
        reprise_tests::skipped::skipped("/dev/kvm cannot be opened");
    }
    opens
}
