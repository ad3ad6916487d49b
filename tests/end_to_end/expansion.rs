//! `reprise expand`: every instruction, the same however it was come by, and nothing half done.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use reprise_expand::pieces::Plan;
use reprise_expand::{Control, Counting, Window};
use reprise_replay::Replayable;
use reprise_trace::instructions::filter::Selection;
use reprise_trace::instructions::{
    Contents, Ending, SegmentOptions, TraceHeader, TraceReader, TraceWriter,
};
use serde_json::Value;

use crate::linux::workload;
use crate::program::{Workplace, record, reprise, run};

/// A guest with timer interrupts, and so many checkpoints that a few threads have work.
const TICKS: &[&str] = &["--engine", "soft", "--image", "ticks", "--checkpoint-every", "3000000"];

fn expand(file: &str, arguments: &[&str]) -> Value {
    run(&[&["--json", "expand", file], arguments].concat()).expect_code(0).json()
}

fn count(report: &Value, name: &str) -> u64 {
    report[name].as_u64().unwrap_or_else(|| panic!("no {name}: {report:#}"))
}

/// A recording of [`TICKS`] in a workplace of its own.
fn ticks() -> (Workplace, String, Value) {
    let workplace = Workplace::new();
    let file = workplace.path("ticks.rr");
    let recorded = record(TICKS, &file, 0);
    (workplace, file, recorded)
}

#[test]
fn all_instructions_are_there_and_the_end_is_the_recorded_one() {
    let (_workplace, file, recorded) = ticks();
    let report = expand(&file, &[]);
    assert_eq!(report["instructions"], recorded["instructions"], "{report:#}");
    assert_eq!(report["final_digest"], recorded["final_digest"], "{report:#}");
    assert_eq!(report["verified"], true, "{report:#}");
    assert!(count(&report, "accesses") > 1_000_000, "{report:#}");
    assert!(report["trace_bytes"].is_null(), "{report:#}");
}

#[test]
fn the_trace_is_the_same_on_any_number_of_threads_and_without_translation() {
    let (workplace, file, recorded) = ticks();
    let ways: [&[&str]; 4] =
        [&["--jobs", "1"], &["--jobs", "2"], &["--jobs", "5"], &["--no-translate"]];
    let mut traces = Vec::new();
    for (number, way) in ways.iter().enumerate() {
        let out = workplace.path(&format!("{number}.trace"));
        let report = expand(&file, &[way, &["--page-walks", "-o", &out][..]].concat());
        assert_eq!(report["instructions"], recorded["instructions"], "{way:?}: {report:#}");
        assert!(count(&report, "checkpoints_verified") >= 1, "{way:?}: {report:#}");
        let trace = fs::read(&out).expect("the trace is there");
        assert_eq!(trace.len() as u64, count(&report, "trace_bytes"), "{way:?}");
        traces.push(trace);
    }
    for (way, trace) in ways.iter().zip(&traces) {
        assert!(*trace == traces[0], "{way:?} gives another trace");
    }
    let piped = run(&["expand", &file, "--page-walks", "-o", "-"]).expect_code(0);
    assert!(piped.stdout == traces[0], "a pipe gets another trace");
}

#[test]
fn linux_leaves_the_same_trace_translated_and_not_and_in_pieces() {
    let Some(workload) = workload() else { return };
    let workplace = Workplace::new();
    let file = workload.workplace.path("linux.rr");
    let window = ["--to", "60000000"];
    let mut traces = Vec::new();
    for (number, way) in
        [&["--jobs", "1"][..], &["--jobs", "2", "--no-translate"]].iter().enumerate()
    {
        let out = workplace.path(&format!("{number}.trace"));
        let report = expand(&file, &[way, &window[..], &["--page-walks", "-o", &out]].concat());
        assert_eq!(count(&report, "instructions"), 60_000_000, "{report:#}");
        traces.push(fs::read(&out).expect("the trace is there"));
    }
    assert!(traces[0] == traces[1], "translated code leaves another trace");
    let out = workplace.path("0.trace");
    let stats = run(&["--json", "trace", "stats", &out]).expect_code(0).json();
    for cause in ["for_reads", "for_writes", "for_fetches"] {
        assert!(count(&stats["page_walks"], cause) > 10, "{cause}: {:#}", stats["page_walks"]);
    }
}

#[test]
fn a_window_has_just_the_instructions_asked_for() {
    let (workplace, file, _) = ticks();
    let out = workplace.path("window.trace");
    for (from, to) in [(0, 1), (1_234_567, 7_654_321), (3_000_001, 3_000_002)] {
        let (first, end) = (format!("{from}"), format!("{to}"));
        let report = expand(&file, &["--from", &first, "--to", &end, "-o", &out, "--force"]);
        assert_eq!(count(&report, "instructions"), to - from, "{report:#}");
        assert_eq!(instructions_of(&out), to - from);
    }
}

#[test]
fn shares_join_into_the_trace_that_one_process_writes() {
    let (workplace, file, _) = ticks();
    let whole = workplace.path("whole.trace");
    expand(&file, &["-o", &whole]);
    let shares: Vec<String> = (1..=4)
        .map(|number| {
            let out = workplace.path(&format!("{number}.trace"));
            expand(&file, &["--segment", &format!("{number}/4"), "-o", &out]);
            out
        })
        .collect();
    let joined = workplace.path("joined.trace");
    let words: Vec<&str> = ["trace", "concat", "-o", &joined]
        .into_iter()
        .chain(shares.iter().map(String::as_str))
        .collect();
    run(&words).expect_code(0);
    let read = |path: &str| fs::read(path).expect("the trace is there");
    assert!(read(&joined) == read(&whole), "the shares make another trace");
    run(&["trace", "check", &joined]).expect_code(0);
    let words = ["trace", "concat", "-o", &joined, "--force", &shares[0], &shares[2]];
    let refused = run(&words).expect_code(1);
    assert!(refused.expect_reason().contains("share"), "{}", refused.stderr);
}

#[test]
fn filters_say_what_they_left_out() {
    let (workplace, file, recorded) = ticks();
    let out = workplace.path("filtered.trace");
    let report = expand(&file, &["--user", "-o", &out]);
    assert_eq!(report["filters"], serde_json::json!(["--user"]), "{report:#}");
    let all = count(&recorded, "instructions");
    let note = format!("left out: {all} instructions of the other privilege");
    let notes = report["notes"].as_array().expect("notes");
    assert!(notes.iter().any(|one| one == &Value::from(note.clone())), "{report:#}");
}

#[test]
fn an_idle_guest_is_left_out_in_pieces_as_well() {
    // It sleeps from interrupt to interrupt and prints a dot at every tenth.
    let guest = ["--engine", "soft", "--image", "ticks", "--cmdline", "hz=1000 count=300 sleep=10"];
    let workplace = Workplace::new();
    let file = workplace.path("sleeper.rr");
    let recorded = record(&[&guest[..], &["--checkpoint-every", "9000"]].concat(), &file, 0);
    let all = count(&recorded, "instructions");
    let mut traces = Vec::new();
    for jobs in ["1", "2", "5"] {
        let out = workplace.path(&format!("{jobs}.trace"));
        let report = expand(&file, &["--skip-idle", "--jobs", jobs, "-o", &out]);
        assert_eq!(count(&report, "instructions"), all, "{report:#}");
        assert!(count(&report, "checkpoints_verified") >= 1, "{report:#}");
        assert_eq!(report["filters"], serde_json::json!(["--skip-idle"]), "{report:#}");
        let idle = idle_note(&report);
        assert_eq!(instructions_of(&out) + idle, all, "{report:#}");
        assert!(idle > all / 2, "{idle} of {all} instructions are idle");
        traces.push(fs::read(&out).expect("the trace is there"));
    }
    assert!(traces.iter().all(|trace| *trace == traces[0]), "threads change the trace");
    let (out, whole) = (workplace.path("1.trace"), workplace.path("whole.trace"));
    run(&["trace", "check", &out]).expect_code(0);

    // What it does when it wakes for a tenth interrupt is all there.
    expand(&file, &["-o", &whole]);
    let console = |trace: &str, filters: &[&str]| {
        let words = [&["trace", "dump", trace], filters].concat();
        let listing = run(&words).expect_code(0).stdout;
        String::from_utf8_lossy(&listing).lines().filter(|line| line.contains("port 0x3f8")).count()
    };
    let written = console(&whole, &[]);
    assert!(written >= 30, "{written} accesses to the console's port");
    assert_eq!(console(&out, &[]), written);
    assert_eq!(console(&whole, &["--skip-idle"]), written);

    // A whole trace has no checkpoints that divide a stretch; an idle trace has nothing more to lose.
    let convert = |from: &str, to: &str| {
        let to = workplace.path(to);
        let words = ["--json", "trace", "convert", from, "-o", &to, "--skip-idle"];
        let report = run(&words).expect_code(0).json();
        (to, count(&report, "instructions"), report)
    };
    let (converted, kept, report) = convert(&whole, "converted.trace");
    assert_eq!(kept + idle_note(&report), all, "{report:#}");
    assert!(kept <= instructions_of(&out), "{report:#}");
    let (_, again, report) = convert(&converted, "again.trace");
    assert_eq!(again, kept, "{report:#}");
}

/// Instructions that a report says were an idle guest's.
fn idle_note(report: &Value) -> u64 {
    let notes = report["notes"].as_array().expect("notes").iter();
    let told = notes.filter_map(|note| {
        let words = note.as_str()?.strip_prefix("left out: ")?;
        words.strip_suffix(" instructions of an idle guest")?.parse::<u64>().ok()
    });
    told.sum()
}

#[test]
fn an_interrupted_expansion_leaves_a_whole_shorter_trace() {
    let workplace = Workplace::new();
    let (file, out) = (workplace.path("compute.rr"), workplace.path("compute.trace"));
    let compute = ["--engine", "soft", "--image", "compute", "--checkpoint-every", "never"];
    let recorded = record(&compute, &file, 0);
    let words = ["--json", "expand", &file, "-o", &out];
    let running = reprise(&words).start();
    std::thread::sleep(Duration::from_millis(700));
    running.signal("INT");
    let report = running.finish().expect_code(0).json();
    assert!(report["verified"].is_null(), "{report:#}");
    let instructions = count(&report, "instructions");
    assert!(instructions < count(&recorded, "instructions"), "{report:#}");
    assert_eq!(instructions_of(&out), instructions);
}

/// Whether a process catches SIGINT by now.
fn hears_interrupts(id: u32) -> bool {
    const SIGINT: u64 = 2;
    let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let signals = caught.and_then(|signals| u64::from_str_radix(signals.trim(), 16).ok());
    signals.is_some_and(|signals| signals >> (SIGINT - 1) & 1 == 1)
}

#[test]
fn an_expansion_interrupted_before_its_window_says_so_and_leaves_nothing() {
    let workplace = Workplace::new();
    let file = workplace.path("compute.rr");
    let compute = ["--engine", "soft", "--image", "compute", "--checkpoint-every", "never"];
    let end = count(&record(&compute, &file, 0), "ticks");
    let (tick, time) = (format!("{}", end - 1), format!("{}s", (end - 1) as f64 / 1e9));
    for (number, from) in [&tick, &time, &tick, &tick].into_iter().enumerate() {
        let out = workplace.path(["t.trace", "t.trace", "t.csv", "t.trace"][number]);
        let jobs = ["1", "1", "1", "2"][number];
        // Untranslated, so that the way is long.
        let words = ["expand", &file, "--from", from, "--no-translate", "--jobs", jobs, "-o", &out];
        let mut running = reprise(&words).start();
        let id = running.id();
        running.wait_until("it hears interrupts", || hears_interrupts(id));
        running.signal("INT");
        let finished = running.finish();
        let reason = finished.expect_reason();
        assert!(reason.contains("before the window began"), "{from}: {reason}");
        let left: Vec<_> = fs::read_dir(workplace.directory())
            .expect("the directory")
            .map(|entry| entry.expect("an entry").file_name())
            .filter(|name| name.to_str().is_some_and(|name| !name.starts_with("compute.rr")))
            .collect();
        assert!(left.is_empty(), "{from}: {left:?} is left behind");
    }
}

#[test]
fn a_worker_that_panics_ends_the_expansion() {
    /// Longer than a loaded machine takes for a small guest.
    const LIMIT: Duration = Duration::from_secs(120);
    let (_workplace, file, _) = ticks();
    let (send, ended) = channel();
    std::thread::spawn(move || {
        let replayable = Replayable::open(Path::new(&file)).expect("a recording");
        let header = replayable.recording().header();
        let header = TraceHeader {
            contents: Contents::default(),
            tick: header.tick_kind,
            cpu_model: header.cpu_model.clone(),
            recording: replayable.recording().summary().chain.clone(),
            filters: Vec::new(),
            share: None,
        };
        let mut writer =
            TraceWriter::create(Vec::new(), &header, SegmentOptions::default()).expect("a trace");
        let started = AtomicUsize::new(0);
        let plan = Plan {
            replayable: &replayable,
            window: Window::default(),
            contents: Contents::default(),
            selection: Selection::default(),
            jobs: 2,
            set_up: &|_| assert_eq!(started.fetch_add(1, Ordering::Relaxed), 0, "on purpose"),
        };
        let control = Control::default();
        let ran = catch_unwind(AssertUnwindSafe(|| plan.write(&mut writer, &control)));
        let _ = send.send((ran.is_err(), control.is_stopped()));
    });
    let (panicked, stopped) = ended.recv_timeout(LIMIT).expect("nobody waits for the worker");
    assert!(panicked && stopped, "what a worker panics with is lost");
}

#[test]
fn wrong_use_and_bad_input_leave_one_line_and_no_file() {
    let (workplace, file, _) = ticks();
    let out = workplace.path("out.trace");
    let absent = workplace.path("absent/out.trace");
    let cases: [(&[&str], i32, &str); 8] = [
        (&["-o", &out, "--from", "99999999999"], 1, "the recording ends at tick"),
        (&["-o", &out, "--from", "100s"], 1, "s of guest time: give an earlier --from"),
        (&["-o", &out, "--from", "200", "--to", "100"], 2, "lies before --from"),
        (&["-o", &out, "--format", "vcd"], 2, "there is no format `vcd`"),
        (&["--format", "csv"], 2, "say where the trace goes"),
        (&["-o", &absent], 1, "there is no directory"),
        (&["-o", "/dev/full"], 1, ""),
        (&["-o", &out, "--segment", "9/8"], 2, "1/8 to 8/8"),
    ];
    for (arguments, code, said) in cases {
        let finished = run(&[&["expand", &file], arguments].concat()).expect_code(code);
        assert!(finished.stderr.contains(said), "{arguments:?}: {}", finished.stderr);
        assert!(fs::metadata(&out).is_err(), "{arguments:?} left a file");
    }
    // An end behind the recording's is its end, and that is told.
    let to_the_end = run(&["expand", &file, "--to", "100s"]).expect_code(0);
    assert!(to_the_end.stderr.contains("before --to"), "{}", to_the_end.stderr);
    let foreign = workplace.file("foreign", "no recording at all");
    run(&["expand", &foreign, "-o", &out]).expect_code(1).expect_reason();
    let left = fs::read_dir(workplace.directory()).expect("readable").count();
    assert_eq!(left, 3, "the recording, its checkpoints and the foreign file are left");
}

/// Instructions of a whole trace, by reading all of it.
fn instructions_of(path: &str) -> u64 {
    let bytes = fs::read(path).expect("the trace is there");
    let mut counting = Counting::default();
    let ending = TraceReader::open(&bytes[..]).and_then(|mut reader| reader.drive(&mut counting));
    assert!(matches!(ending, Ok(Ending::Complete { .. })), "{ending:?}");
    counting.instructions
}
