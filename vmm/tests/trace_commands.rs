//! `reprise trace` and `reprise info` on traces as scripts use them: results, and what is said when
//! things go wrong. The traces are a synthetic machine's, or those of a guest of a few instructions.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;

use program::{json, names, reprise, run};
use reprise_random::Random;
use reprise_trace::header::CpuModelInfo;
use reprise_trace::instructions::{
    Feed, Observer, Position, SegmentOptions, Share, TraceHeader, TraceWriter,
};
use reprise_trace::moment::TickKind;
use serde_json::Value;
use synthetic::{Entry, Options, Synthetic};
use tempfile::TempDir;

mod program;
#[path = "../../trace/tests/instructions/synthetic/mod.rs"]
#[allow(dead_code)]
mod synthetic;

/// Standard output of a command that succeeds.
fn text(directory: &TempDir, arguments: &[&str]) -> String {
    let output = run(directory, arguments);
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

/// The one line with which a command fails.
fn failure(directory: &TempDir, arguments: &[&str]) -> String {
    let output = run(directory, arguments);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {stderr}");
    let lines: Vec<&str> = stderr.lines().collect();
    assert!(lines.len() == 1 && lines[0].starts_with("reprise: "), "{arguments:?}: {stderr}");
    stderr
}

fn header(share: Option<Share>) -> TraceHeader {
    TraceHeader {
        contents: Options::new(1).contents,
        tick: TickKind::Instruction,
        cpu_model: CpuModelInfo { name: "synthetic".into(), version: 1 },
        recording: "00ff00ff00ff00ff00ff".into(),
        filters: Vec::new(),
        share,
    }
}

const INSTRUCTIONS: u64 = 20_000;

/// Writes `whole.trace`, of some segments, and the shares `1.trace` to `4.trace` of the same; gives the
/// machine's own account.
fn traces(directory: &TempDir) -> Vec<Entry> {
    let mut machine = Synthetic::new(Options::new(4));
    let mut feed = Feed::new(Options::new(4).contents);
    let options = SegmentOptions { instructions: 3_000, ..SegmentOptions::default() };
    let mut whole = TraceWriter::create(Vec::new(), &header(None), options).expect("begins");
    let mut position = Position { cr3: machine.cr3(), ..Position::default() };
    whole.begin(&position).expect("begins");
    for number in 1..=4 {
        let batch = machine.advance(INSTRUCTIONS / 4);
        let (first_tick, end_tick) = (position.instruction, machine.instructions);
        let end_instruction = Some(end_tick);
        let share = Some(Share { number, count: 4, first_tick, end_tick, end_instruction });
        let mut share = TraceWriter::create(Vec::new(), &header(share), options).expect("begins");
        share.begin(&position).expect("begins");
        feed.push(&batch, &mut (&mut share, &mut whole)).expect("keeps the contract");
        batch.events.iter().for_each(|event| position.pass_event(event));
        (position.instruction, position.marker_instruction) = (end_tick, position.marker.tick);
        whole.cut().expect("written");
        let file = share.finish(&[]).expect("finished");
        fs::write(directory.path().join(format!("{number}.trace")), file).expect("written");
    }
    let file = whole.finish(&["a note".into()]).expect("finished");
    fs::write(directory.path().join("whole.trace"), file).expect("written");
    machine.entries
}

/// A directory with the traces.
fn directory() -> TempDir {
    let directory = tempfile::tempdir().expect("a temporary directory");
    traces(&directory);
    directory
}

fn retired(entries: &[Entry]) -> u64 {
    let retired = |entry: &&Entry| matches!(entry, Entry::Instruction(one) if one.retired);
    entries.iter().filter(retired).count() as u64
}

#[test]
fn a_listing_has_what_was_asked_for() {
    let directory = directory();
    let window = ["trace", "dump", "whole.trace", "--from", "7_000", "--limit", "12"];
    let lines = text(&directory, &window);
    let numbers: Vec<u64> = lines
        .lines()
        .filter(|line| !line.contains(" -- ") && !line.contains("not retired"))
        .map(|line| line.split_whitespace().next().expect("a number").parse().expect("a number"))
        .collect();
    assert_eq!(numbers, (7_000..7_012).collect::<Vec<_>>(), "{lines}");
    let (status, object) = json(&directory, &window);
    let entries = object["entries"].as_array().expect("entries");
    let instructions: Vec<&Value> =
        entries.iter().filter(|entry| entry["retired"] == Value::Bool(true)).collect();
    assert_eq!((status, instructions.len()), (0, 12), "{object}");
    assert_eq!(instructions[0]["number"], Value::from(7_000));
    let all = text(&directory, &["trace", "dump", "whole.trace", "--user", "--to", "9000"]);
    assert!(all.contains(" 3 0000") && all.contains("instructions left out"), "{all}");
    assert!(!all.contains(" 0 ffffffff"), "kernel code was left out");
    let outside = failure(&directory, &["trace", "dump", "whole.trace", "--from", "900000"]);
    assert!(outside.contains("holds the instructions 0 to"), "{outside}");
}

#[test]
fn a_listing_ends_quietly_when_nobody_reads_it() {
    let directory = directory();
    let mut child = reprise(&directory, &["trace", "dump", "whole.trace"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut first = String::new();
    let mut reader = BufReader::with_capacity(64, child.stdout.take().expect("piped"));
    reader.read_line(&mut first).expect("a line");
    drop(reader);
    let mut said = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut said).expect("text");
    assert_eq!((child.wait().expect("ends").code(), said.as_str()), (Some(0), ""));
}

#[test]
fn statistics_agree_with_the_machine() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let entries = traces(&directory);
    fs::write(
        directory.path().join("System.map"),
        "ffffffff7f000000 T <the&kernel>\nffffffff8f000000 T end\n",
    )
    .expect("written");
    let symbols = ["--symbols", "System.map@1000000", "--html", "page.html"];
    let arguments = [&["trace", "stats", "whole.trace"], &symbols[..]].concat();
    let (status, report) = json(&directory, &arguments);
    assert_eq!((status, &report["instructions"]), (0, &Value::from(retired(&entries))), "{report}");
    assert_eq!(report["complete"], Value::Bool(true));
    assert_eq!(report["notes"], serde_json::json!(["a note"]));
    let intervals = report["intervals"].as_array().expect("intervals");
    assert!(intervals.len() > 100 && intervals.len() <= 241, "{}", intervals.len());
    let symbols = report["top_symbols"].as_array().expect("symbols");
    assert!(symbols.iter().any(|row| row["name"] == "<the&kernel>"), "{symbols:?}");
    let page = fs::read_to_string(directory.path().join("page.html")).expect("written");
    assert!(page.starts_with("<!DOCTYPE html>") && page.trim_end().ends_with("</html>"));
    for foreign in ["http", "<script", "url(", "@import", "<link", "<the&kernel>", "NaN", "inf"] {
        assert!(!page.contains(foreign), "the page has {foreign}");
    }
    assert!(page.contains("&lt;the&amp;kernel&gt;"));
    assert_eq!(page.matches("<svg").count(), 4);
    for tag in ["svg", "table", "div", "tr", "td", "h2", "h3"] {
        let (opened, closed) = (format!("<{tag}"), format!("</{tag}>"));
        let starts = page
            .match_indices(&opened)
            .filter(|(at, _)| page[at + opened.len()..].starts_with([' ', '>']));
        assert_eq!(starts.count(), page.matches(&closed).count(), "{tag}");
    }
    let again = failure(&directory, &arguments);
    assert!(again.contains("--force"), "{again}");
    text(&directory, &[&arguments[..], &["--force"]].concat());
    let part = ["trace", "stats", "whole.trace", "--kernel", "--from", "5000", "--to", "8000"];
    let (_, part) = json(&directory, &part);
    let privileges = part["by_privilege"].as_array().expect("rows");
    assert!(privileges.len() == 1 && privileges[0]["cpl"] == 0, "{privileges:?}");
    assert!(part["instructions"].as_u64() < Some(3_000), "{part}");
    assert!(text(&directory, &["trace", "stats", "whole.trace"]).contains("busiest blocks"));
}

#[test]
fn symbols_that_cannot_be_had_are_told() {
    let directory = directory();
    fs::write(directory.path().join("text"), "no symbols\n").expect("written");
    fs::write(directory.path().join("elf"), b"\x7fELF\x02\x01\x01\0 and no more").expect("written");
    for (file, reason) in [
        ("absent", "cannot read absent"),
        ("text", "has no symbols"),
        ("elf", "malformed ELF"),
        (".", "cannot read ."),
    ] {
        let said = failure(&directory, &["trace", "stats", "whole.trace", "--symbols", file]);
        assert!(said.contains(reason), "{said}");
    }
    let own = env!("CARGO_BIN_EXE_reprise");
    let named =
        text(&directory, &["trace", "dump", "whole.trace", "--limit", "1", "--symbols", own]);
    assert!(!named.is_empty(), "an ELF file has symbols");
}

#[test]
fn a_trace_is_known_to_info() {
    let directory = directory();
    let (status, info) = json(&directory, &["info", "whole.trace"]);
    let bytes = fs::metadata(directory.path().join("whole.trace")).expect("there").len();
    assert_eq!((status, &info["kind"], &info["complete"]), (0, &"trace".into(), &true.into()));
    assert_eq!(info["trace_bytes"], Value::from(bytes));
    let instructions = info["instructions"].as_u64().expect("a number");
    let bits = info["bits_per_instruction"].as_f64().expect("a number");
    assert!((bits - bytes as f64 * 8.0 / instructions as f64).abs() < 1e-9, "{info}");
    assert_eq!(info["end_instruction"], Value::from(instructions));
    assert_eq!(info["notes"], serde_json::json!(["a note"]));
    let (_, share) = json(&directory, &["info", "2.trace"]);
    assert_eq!((&share["share"]["number"], &share["share"]["count"]), (&2.into(), &4.into()));
    assert!(text(&directory, &["info", "2.trace"]).contains("2 of 4, ticks "));
}

#[test]
fn a_sound_trace_passes_and_what_is_wrong_has_a_line() {
    let directory = directory();
    assert!(text(&directory, &["trace", "check", "whole.trace"]).starts_with("sound: "));
    let whole = fs::read(directory.path().join("whole.trace")).expect("there");
    let write = |name: &str, bytes: &[u8]| {
        fs::write(directory.path().join(name), bytes).expect("written");
    };
    let half = whole.len() / 2;
    let mut damaged = whole.clone();
    damaged[half] ^= 4;
    write("damaged", &damaged);
    write("cut", &whole[..half]);
    for (file, reason) in [("damaged", "is damaged at byte"), ("cut", "cut short")] {
        let said = failure(&directory, &["trace", "check", file]);
        assert!(said.contains(reason) && said.contains(file), "{said}");
        let (status, report) = json(&directory, &["trace", "check", file]);
        assert_eq!((status, &report["sound"]), (1, &Value::Bool(false)));
        assert!(report["instructions"].as_u64() > Some(1_000), "what is before counts: {report}");
    }
    // What is whole of it is of use.
    for (file, status) in [("cut", 0), ("damaged", 1)] {
        let (found, report) = json(&directory, &["trace", "stats", file]);
        assert_eq!((found, &report["complete"]), (status, &Value::Bool(false)), "{report}");
        assert!(report["instructions"].as_u64() > Some(1_000), "{report}");
        let listing = run(&directory, &["trace", "dump", file]);
        assert_eq!(listing.status.code(), Some(status));
        assert!(listing.stdout.len() > 100_000);
        assert_eq!(String::from_utf8_lossy(&listing.stderr).lines().count(), 1, "{file}");
    }
    assert!(text(&directory, &["info", "cut"]).contains("cut short"));
}

#[test]
fn what_is_no_trace_is_refused_in_one_line() {
    let directory = directory();
    fs::write(directory.path().join("empty"), "").expect("written");
    fs::write(directory.path().join("text"), "no trace\n").expect("written");
    let record = ["record", "--image", "hello", "--engine", "soft", "-o", "a.rr"];
    assert!(run(&directory, &record).status.success());
    let before = names(&directory);
    for (file, reason) in [
        ("absent", "cannot read absent"),
        ("empty", "empty"),
        ("text", "no Reprise trace"),
        (".", "a directory"),
        ("/dev/null", "a device"),
        ("a.rr", "reprise expand a.rr"),
    ] {
        for arguments in [
            &["trace", "dump", file][..],
            &["trace", "stats", file, "--html", "out"],
            &["trace", "check", file],
            &["trace", "concat", "1.trace", file, "-o", "out"],
            &["trace", "convert", file, "--format", "csv", "-o", "out"],
        ] {
            let said = failure(&directory, arguments);
            assert!(said.contains(reason), "{arguments:?}: {said}");
        }
    }
    assert_eq!(names(&directory), before, "no output is left");
}

#[test]
fn shares_are_joined_in_order_and_not_otherwise() {
    let directory = directory();
    let concat = |shares: &[&str]| {
        [&["trace", "concat"], shares, &["-o", "joined", "--force"]]
            .concat()
            .into_iter()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    for (shares, reason) in [
        (&["1.trace", "3.trace", "4.trace"][..], "3.trace: these traces do not go together"),
        (&["2.trace", "1.trace"], "share 2 of 4 where share 1 is due"),
        (&["1.trace", "2.trace", "2.trace"], "share 2 of 4 where share 3 is due"),
        (&["1.trace", "2.trace", "3.trace"], "share 4 of 4 is due"),
        (&["whole.trace"], "no share"),
    ] {
        let arguments = concat(shares);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let said = failure(&directory, &arguments);
        assert!(said.contains(reason), "{said}");
    }
    assert!(!names(&directory).iter().any(|name| name.starts_with("joined")));
    let all = ["1.trace", "2.trace", "3.trace", "4.trace"];
    let arguments = concat(&all);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    assert!(text(&directory, &arguments).contains("4 shares joined"));
    let listed = |file| text(&directory, &["trace", "dump", file]);
    assert_eq!(listed("joined"), listed("whole.trace"));
    let (_, info) = json(&directory, &["info", "joined"]);
    assert_eq!(info["share"], Value::Null);
    let pipe = run(&directory, &[&["trace", "concat"], &all[..], &["-o", "-"]].concat());
    assert_eq!(pipe.stdout, fs::read(directory.path().join("joined")).expect("there"));
}

#[test]
fn shares_of_an_expansion_make_the_trace_that_one_process_makes() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    fs::write(directory.path().join("typed"), "hello\nquit\n").expect("written");
    let guest = ["record", "--image", "echo", "--engine", "soft", "--input", "typed"];
    let every = ["--checkpoint-every", "1000", "-o", "a.rr"];
    let recorded = run(&directory, &[&guest[..], &every].concat());
    assert!(recorded.status.success(), "{recorded:?}");
    text(&directory, &["expand", "a.rr", "-o", "whole"]);
    // One of them is more than there are pieces between checkpoints, and so empty.
    for share in ["1/6", "2/6", "3/6", "4/6", "5/6", "6/6"] {
        text(&directory, &["expand", "a.rr", "--segment", share, "-o", &share[..1]]);
    }
    text(&directory, &["trace", "concat", "1", "2", "3", "4", "5", "6", "-o", "joined"]);
    let read = |name| fs::read(directory.path().join(name)).expect("there");
    assert!(read("joined") == read("whole"));
    assert!(read("1").len() < read("whole").len());
    text(&directory, &["trace", "check", "joined"]);
}

#[test]
fn a_trace_becomes_another_format() {
    let directory = directory();
    let convert = |more: &[&'static str]| [&["trace", "convert", "whole.trace"], more].concat();
    text(&directory, &convert(&["-o", "out.csv"]));
    let csv = fs::read_to_string(directory.path().join("out.csv")).expect("there");
    let pipe = text(&directory, &convert(&["--format", "csv", "-o", "-"]));
    assert_eq!(csv, pipe);
    let (status, report) = json(&directory, &convert(&["--user", "-o", "user.trace"]));
    assert_eq!((status, &report["format"]), (0, &"reprise".into()), "{report}");
    let (_, info) = json(&directory, &["info", "user.trace"]);
    assert_eq!(info["filters"], serde_json::json!(["--user"]));
    assert_eq!(info["instructions"], report["instructions"]);
    assert!(info["notes"].to_string().contains("of the other privilege"), "{info}");
    let listed =
        |file, more: &[&'static str]| text(&directory, &[&["trace", "dump", file], more].concat());
    assert_eq!(listed("user.trace", &[]), listed("whole.trace", &["--user"]));
    assert!(failure(&directory, &convert(&["-o", "out.csv"])).contains("--force"));
    assert!(
        failure(&directory, &convert(&["-o", "whole.trace", "--force"]))
            .contains("what this command reads")
    );
    let unknown = run(&directory, &convert(&["--format", "elf", "-o", "x"]));
    assert_eq!(unknown.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("no format `elf`"), "{unknown:?}");
}

#[test]
fn a_full_disk_and_a_closed_pipe_are_told() {
    let directory = directory();
    let before = names(&directory);
    let all = ["1.trace", "2.trace", "3.trace", "4.trace"];
    for arguments in [
        &["trace", "convert", "whole.trace", "--format", "csv", "-o", "/dev/full"][..],
        &["trace", "convert", "whole.trace", "-o", "/dev/full"],
        &["trace", "stats", "whole.trace", "--html", "/dev/full"],
        &[&["trace", "concat"], &all[..], &["-o", "/dev/full"]].concat(),
    ] {
        let said = failure(&directory, arguments);
        assert!(said.contains("No space left"), "{said}");
    }
    let arguments = ["trace", "convert", "whole.trace", "--format", "csv", "-o", "-"];
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let mut closed = reprise(&directory, &arguments);
    let output = closed.stdout(writer).output().expect("runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!((output.status.code(), said.lines().count()), (Some(1), 1), "{said}");
    assert!(said.contains("Broken pipe"), "{said}");
    assert_eq!(names(&directory), before);
}

#[test]
fn whatever_a_file_holds_the_commands_end_with_a_reason() {
    let directory = directory();
    let whole = fs::read(directory.path().join("3.trace")).expect("there");
    let seed = 0x9e37_79b9_7f4a_7c15_u64;
    println!("seed {seed:#x}");
    let mut random = Random::new(seed);
    for round in 0..24 {
        let mut broken = whole.clone();
        let at = random.below(whole.len() as u64) as usize;
        match round % 3 {
            0 => broken.truncate(at),
            1 => broken[at] ^= 1 << random.below(8),
            _ => drop(broken.splice(at..(at + 9).min(whole.len()), [0xff; 5])),
        }
        fs::write(directory.path().join("broken"), &broken).expect("written");
        for arguments in [
            &["trace", "dump", "broken"][..],
            &["trace", "stats", "broken"],
            &["trace", "check", "broken"],
            &["info", "broken"],
            &["trace", "concat", "1.trace", "2.trace", "broken", "4.trace", "-o", "joined"],
            &["trace", "convert", "broken", "--format", "dinero", "--force", "-o", "out"],
        ] {
            let output = run(&directory, arguments);
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let status = output.status.code();
            assert!(matches!(status, Some(0 | 1)), "round {round} {arguments:?}: {said}");
            assert!(!said.contains("defect"), "round {round} {arguments:?}: {said}");
            let has_reason = said.lines().count() == 1 && said.starts_with("reprise: ");
            assert!(status == Some(0) || has_reason, "round {round} {arguments:?}: {said}");
            assert!(!names(&directory).iter().any(|name| name.contains("partial")));
        }
        assert!(!names(&directory).contains(&"joined".to_owned()), "round {round}");
    }
}
