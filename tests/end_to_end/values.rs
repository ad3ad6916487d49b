//! Traces with values and registers: what is carried out of them, with nothing executed, is the guest.

use std::fs;
use std::io::Cursor;
use std::path::Path;

use reprise_expand::resimulate::{Against, check_against};
use reprise_replay::Replayable;
use reprise_trace::instructions::{
    Event, Observer, Position, Run, SegmentOptions, SystemAccessKind, TraceError, TraceReader,
    TraceWriter,
};
use serde_json::Value;

use crate::linux::workload;
use crate::program::{Workplace, record, run};

/// Expands with everything, in a window.
fn expand_in_full(file: &str, out: &str, arguments: &[&str]) -> Value {
    let words = ["--json", "expand", file, "--full", "-o", out, "--force"];
    run(&[&words[..], arguments].concat()).expect_code(0).json()
}

fn check(out: &str, file: &str) -> Value {
    let report = run(&["--json", "trace", "check", out, "--against", file]).expect_code(0).json();
    assert_eq!(report["sound"], true, "{report:#}");
    assert_eq!(report["against"]["end_verified"], true, "{report:#}");
    report
}

/// The embedded guests, each with its command line and where its window ends.
const GUESTS: &[(&str, &str, u64)] = &[
    ("hello", "", u64::MAX),
    ("hello32", "", u64::MAX),
    ("echo", "", u64::MAX),
    ("ticks", "hz=20000 count=6", u64::MAX),
    ("compute", "scale=1", 700_000),
    ("positions", "do=straight hz=20000 count=4", u64::MAX),
    ("positions", "do=itself hz=20000 count=4", u64::MAX),
    ("positions", "do=memory hz=20000 count=4", u64::MAX),
    ("positions", "do=shadow hz=20000 count=4", u64::MAX),
    ("positions", "do=hlt hz=20000 count=4", u64::MAX),
    ("positions", "do=fault hz=20000 count=4", u64::MAX),
    ("positions", "do=window hz=20000 count=4", u64::MAX),
    ("positions", "do=user hz=20000 count=4", u64::MAX),
    ("positions", "do=code hz=20000 count=4", u64::MAX),
    ("misbehave", "do=absent", u64::MAX),
    ("misbehave", "do=divide", u64::MAX),
    ("misbehave", "do=double-fault", u64::MAX),
    ("misbehave", "do=wild-jump", u64::MAX),
    ("misbehave", "do=wild-jump-no-idt", u64::MAX),
    ("misbehave", "do=wild-page-tables", u64::MAX),
    ("misbehave", "do=triple-fault", u64::MAX),
];

#[test]
fn every_embedded_guest_comes_out_of_its_trace() {
    let workplace = Workplace::new();
    let typed = workplace.file("typed", "a line\rquit\r");
    let (file, out) = (workplace.path("guest.rr"), workplace.path("guest.trace"));
    for (image, cmdline, end) in GUESTS {
        let mut words = vec!["--engine", "soft", "--image", image, "--cmdline", cmdline, "--force"];
        if *image == "echo" {
            words.extend(["--input", &typed]);
        }
        record(&words, &file, 0);
        let report = expand_in_full(&file, &out, &["--to", &end.to_string()]);
        let checked = check(&out, &file);
        assert_eq!(checked["instructions"], report["instructions"], "{image} {cmdline}");
        println!("{image} {cmdline}: {}", checked["against"]);
    }
}

#[test]
fn a_window_may_end_before_the_fault_that_ends_the_guest() {
    let workplace = Workplace::new();
    let (file, out) = (workplace.path("guest.rr"), workplace.path("guest.trace"));
    let words = ["--engine", "soft", "--image", "misbehave", "--cmdline", "do=wild-jump-no-idt"];
    let ticks = record(&words, &file, 0)["ticks"].as_u64().expect("a number");
    // The fault retires nothing: these differ in CR2 alone.
    let registers = [ticks, ticks + 1].map(|to| {
        expand_in_full(&file, &out, &["--to", &to.to_string()]);
        check(&out, &file)["against"]["registers"].as_u64().expect("a number")
    });
    assert_eq!(registers[1], registers[0] + 1);
}

/// A guest with timer interrupts, and a checkpoint in the window that tests look at.
fn ticks(workplace: &Workplace) -> String {
    let file = workplace.path("ticks.rr");
    let words = ["--engine", "soft", "--image", "ticks", "--checkpoint-every", "700000"];
    record(&words, &file, 0);
    file
}

#[test]
fn pieces_are_joined_into_one_trace_that_meets_each_checkpoint() {
    let workplace = Workplace::new();
    let file = ticks(&workplace);
    let (one, two) = (workplace.path("one.trace"), workplace.path("two.trace"));
    let window = ["--from", "300000", "--to", "1600000"];
    let report = expand_in_full(&file, &one, &[&window[..], &["--jobs", "1"]].concat());
    assert_eq!(report["checkpoints_verified"], 2, "{report:#}");
    expand_in_full(&file, &two, &[&window[..], &["--jobs", "2"]].concat());
    let read = |path: &str| fs::read(path).expect("the trace is there");
    assert!(read(&one) == read(&two), "two threads make another trace");
    let checked = check(&one, &file);
    assert_eq!(checked["against"]["checkpoints_verified"], 2, "{checked:#}");
}

#[test]
fn values_are_added_to_a_trace_and_nothing_else_changes() {
    let workplace = Workplace::new();
    let file = ticks(&workplace);
    let list = |arguments: &[&str]| -> Vec<String> {
        let words = ["expand", &file, "--to", "150000", "-o", "-", "--format", "csv"];
        let csv = run(&[&words[..], arguments].concat()).expect_code(0).stdout;
        let csv = String::from_utf8(csv).expect("text");
        csv.lines().map(str::to_owned).collect()
    };
    // Without what only these traces have, and the bytes of accesses.
    let is_old = |line: &&String| {
        !["memory-write", "second-page", "register"]
            .contains(&line.split(',').nth(1).expect("what"))
    };
    let without_value = |line: &String| match line.split(',').nth(1) {
        Some("read" | "write") => line[..=line.rfind(',').expect("columns")].to_owned(),
        _ => line.clone(),
    };
    let plain = list(&[]);
    for added in [&["--values"][..], &["--registers"], &["--full"]] {
        let lines = list(added);
        let old: Vec<String> = lines.iter().filter(is_old).map(without_value).collect();
        assert!(old == plain, "{added:?}");
        assert!(lines.len() > old.len(), "{added:?}");
    }
    let full = list(&["--full"]);
    let loads = full.iter().filter(|line| line.contains(",read,"));
    assert!(loads.clone().count() > 1000);
    loads.for_each(|line| assert!(!line.ends_with(','), "{line}"));
}

/// Which events a trace is left without.
#[derive(Clone, Copy, Debug)]
enum Without {
    Nothing,
    Writes(SystemAccessKind),
    Registers,
    SecondPages,
    Rest,
}

impl Without {
    fn drops(self, event: &Event) -> bool {
        match (self, event) {
            (Self::Writes(without), Event::MemoryWrite { kind, .. }) => *kind == without,
            (Self::Registers, Event::Register { .. }) => true,
            (Self::SecondPages, Event::SecondPage { .. }) => true,
            _ => false,
        }
    }
}

struct Dropping<O> {
    observer: O,
    without: Without,
    runs: usize,
    dropped: usize,
}

impl<O: Observer> Observer for Dropping<O> {
    fn begin(&mut self, position: &Position) -> Result<(), TraceError> {
        self.observer.begin(position)
    }

    fn new_blocks(&mut self) {
        self.observer.new_blocks();
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        self.runs += 1;
        // The second half of one run.
        if matches!(self.without, Without::Rest)
            && self.runs > 100
            && run.retired() > 1
            && self.dropped == 0
        {
            self.dropped = 1;
            return self.observer.run(&run.part(run.first(), run.first() + 1));
        }
        self.observer.run(run)
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        if self.without.drops(event) {
            self.dropped += 1;
            return Ok(());
        }
        self.observer.event(event)
    }

    fn end(&mut self) -> Result<(), TraceError> {
        self.observer.end()
    }
}

fn against_without(trace: &[u8], file: &str, without: Without) -> (Against, usize) {
    let open = |bytes: Vec<u8>| TraceReader::open(Cursor::new(bytes)).expect("a trace");
    let mut reader = open(trace.to_vec());
    let header = reader.header().clone();
    let writer = TraceWriter::create(Vec::new(), &header, SegmentOptions::default());
    let observer = writer.expect("memory");
    let mut dropping = Dropping { observer, without, runs: 0, dropped: 0 };
    reader.drive(&mut dropping).expect("it is whole");
    let Dropping { observer, dropped, .. } = dropping;
    let mut reader = open(observer.finish(&[]).expect("memory"));
    let replayable = Replayable::open(Path::new(file)).expect("a recording");
    let against = check_against(&mut reader, 0, &replayable, |_| true);
    (against.expect("it is whole"), dropped)
}

#[test]
fn what_a_trace_lacks_is_found() {
    use SystemAccessKind::{FrameWrite, WalkWrite};
    let workplace = Workplace::new();
    let file = ticks(&workplace);
    let out = workplace.path("whole.trace");
    // Far enough for interrupts and pages of code at CPL 3.
    expand_in_full(&file, &out, &["--to", "600000"]);
    let trace = fs::read(&out).expect("the trace is there");
    let (whole, _) = against_without(&trace, &file, Without::Nothing);
    assert_eq!((whole.mismatch, whole.end_verified), (None, true));
    let lacks = [
        Without::Writes(WalkWrite),
        Without::Writes(FrameWrite),
        Without::Registers,
        Without::Rest,
    ];
    for without in lacks {
        let (against, dropped) = against_without(&trace, &file, without);
        assert!(dropped > 0, "{without:?} is nothing");
        assert!(against.mismatch.is_some() && !against.end_verified, "{without:?}: {against:?}");
    }
}

/// A copy of a recording, with checkpoints.
fn with_checkpoints(recording: &str, workplace: &Workplace) -> String {
    let file = workplace.path("copy.rr");
    fs::copy(recording, &file).expect("a copy");
    run(&["checkpoint", &file, "--every", "400000000"]).expect_code(0);
    file
}

#[test]
fn linux_comes_out_of_its_trace() {
    let Some(workload) = workload() else { return };
    let workplace = Workplace::new();
    let file = with_checkpoints(&workload.workplace.path("linux.rr"), &workplace);
    let out = workplace.path("linux.trace");
    let replayable = Replayable::open(Path::new(&file)).expect("a recording");
    let checkpoint = replayable.checkpoints().first().expect("it is long").moment.tick;
    let around = [(checkpoint - 400_000, checkpoint + 400_000), (0, 300_000)];
    for (from, to) in around {
        let window = ["--from", &from.to_string(), "--to", &to.to_string(), "--jobs", "2"];
        expand_in_full(&file, &out, &window);
        let checked = check(&out, &file);
        println!("{from} to {to}: {}", checked["against"]);
        let met = u64::from(to > checkpoint);
        assert_eq!(checked["against"]["checkpoints_verified"], met, "{checked:#}");
    }
    // What only Linux has in so short a time.
    expand_in_full(&file, &out, &["--to", "300000"]);
    let trace = fs::read(&out).expect("the trace is there");
    let (against, dropped) = against_without(&trace, &file, Without::SecondPages);
    assert!(dropped == 0 || against.mismatch.is_some(), "{against:?}");
}

/// Minutes: `cargo test --release -p reprise-tests --test end_to_end -- --ignored linux_in_long`.
#[test]
#[ignore = "takes minutes; run it by hand after changes to traces with values"]
fn linux_in_long_windows_comes_out_of_its_trace() {
    let Some(workload) = workload() else { return };
    let workplace = Workplace::new();
    let file = with_checkpoints(&workload.workplace.path("linux.rr"), &workplace);
    let out = workplace.path("linux.trace");
    let replayable = Replayable::open(Path::new(&file)).expect("a recording");
    for info in replayable.checkpoints() {
        let tick = info.moment.tick;
        let window =
            ["--from", &(tick - 30_000_000).to_string(), "--to", &(tick + 30_000_000).to_string()];
        expand_in_full(&file, &out, &window);
        println!("around {tick}: {}", check(&out, &file)["against"]);
    }
}
