//! `reprise expand`, and what `reprise trace` makes of its traces, as a new user meets them: windows of time,
//! broken recordings, wrong use, names of outputs.

use std::fs;
use std::path::Path;

use program::{json, names, run};
use serde_json::Value;
use tempfile::TempDir;

mod program;

/// What `ticks` does: it counts interrupts, and either computes or sleeps until the next.
const BUSY: &[&str] = &["--image", "ticks", "--checkpoint-every", "3000000"];
const SLEEPER: &[&str] =
    &["--image", "ticks", "--cmdline", "hz=1000 count=60 sleep=10", "--checkpoint-every", "9000"];

/// Status, standard output and standard error.
fn told(directory: &TempDir, words: &[&str]) -> (i32, String, String) {
    let output = run(directory, words);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().expect("it exits"), text(&output.stdout), text(&output.stderr))
}

/// A directory with a recording `a.rr`.
fn recorded(guest: &[&str]) -> TempDir {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let words = [&["record", "--engine", "soft", "-o", "a.rr"], guest].concat();
    let (status, _, stderr) = told(&directory, &words);
    assert_eq!(status, 0, "{stderr}");
    directory
}

/// The same, expanded into `a.trace`.
fn expanded(guest: &[&str]) -> TempDir {
    let directory = recorded(guest);
    let (status, _, stderr) = told(&directory, &["expand", "a.rr", "-o", "a.trace"]);
    assert_eq!(status, 0, "{stderr}");
    directory
}

fn count(report: &Value, name: &str) -> u64 {
    report[name].as_u64().unwrap_or_else(|| panic!("no {name}: {report:#}"))
}

#[test]
fn a_window_of_time_is_the_same_in_a_recording_and_in_its_trace() {
    for guest in [BUSY, SLEEPER] {
        let directory = expanded(guest);
        let end_s = json(&directory, &["replay", "a.rr"]).1["virtual_seconds"].as_f64();
        let end_s = end_s.expect("it has an end");
        for (from, to) in [(0.0, 0.1), (0.2, 0.25), (0.5, 0.50001), (0.777, 0.99)] {
            let at = |part: f64| format!("{:.9}s", end_s * part);
            let (from, to) = (at(from), at(to));
            let window = ["--from", &from, "--to", &to];
            let (status, whole) = json(&directory, &[&["expand", "a.rr"], &window[..]].concat());
            let expected = (status == 0).then(|| count(&whole, "instructions"));
            let words = [&["trace", "stats", "a.trace"], &window[..]].concat();
            let (status, stats) = json(&directory, &words);
            match expected.filter(|expected| *expected > 0) {
                Some(expected) => {
                    assert_eq!(
                        (status, count(&stats, "instructions")),
                        (0, expected),
                        "{window:?}"
                    );
                    assert_eq!(stats["notes"].as_array().map(Vec::len), Some(1), "{stats:#}");
                    let words = ["trace", "dump", "a.trace", "--from", &from, "--limit", "1"];
                    let (_, listing) = json(&directory, &words);
                    let mut entries = listing["entries"].as_array().expect("entries").iter();
                    let first = entries.find(|entry| entry["retired"] == true);
                    let first = first.and_then(|entry| entry["number"].as_u64());
                    let end = json(&directory, &["expand", "a.rr", "--to", &from]).1;
                    assert_eq!(first, Some(count(&end, "instructions")), "{window:?}");
                }
                None => assert_eq!(status, 1, "{window:?}: nothing is in it: {stats:#}"),
            }
        }
    }
}

#[test]
fn a_window_in_which_nothing_runs_is_told() {
    let directory = expanded(BUSY);
    for (window, said) in [
        (["--from", "100s"], "the trace's guest time ends at"),
        (["--to", "0s"], "no instruction runs"),
        (["--from", "99999999999"], "holds the instructions"),
    ] {
        for command in [&["dump"][..], &["stats"], &["convert", "-o", "out.csv"]] {
            let words = [&["trace", command[0], "a.trace"], &command[1..], &window].concat();
            let (status, _, stderr) = told(&directory, &words);
            assert_eq!((status, stderr.lines().count()), (1, 1), "{words:?}: {stderr}");
            assert!(stderr.contains(said), "{words:?}: {stderr}");
        }
    }
    let (status, stats) = json(&directory, &["trace", "stats", "a.trace", "--to", "100s"]);
    let notes = stats["notes"].to_string();
    assert!(status == 0 && notes.contains("before --to"), "{notes}");
}

#[test]
fn every_byte_of_a_trace_counts_to_check() {
    let directory = expanded(&["--image", "hello"]);
    let whole = fs::read(directory.path().join("a.trace")).expect("there");
    let mut broken: Vec<Vec<u8>> = (1..=16)
        .map(|from_end| {
            let mut bytes = whole.clone();
            let at = bytes.len() - from_end;
            bytes[at] ^= 1 << (from_end % 8);
            bytes
        })
        .collect();
    broken.extend([1, 10, 16].map(|cut| whole[..whole.len() - cut].to_vec()));
    broken.extend(
        [&b"x"[..], &whole[..], &whole[whole.len() - 16..]].map(|more| [&whole, more].concat()),
    );
    for (number, bytes) in broken.iter().enumerate() {
        fs::write(directory.path().join("broken"), bytes).expect("written");
        let (status, report) = json(&directory, &["trace", "check", "broken"]);
        assert_eq!((status, &report["sound"]), (1, &false.into()), "{number}: {report:#}");
        let (status, info, _) = told(&directory, &["info", "broken"]);
        assert!(status == 0 && info.contains("it was finished, but"), "{number}: {info}");
        let (_, stats) = json(&directory, &["trace", "stats", "broken"]);
        assert_eq!(count(&stats, "instructions"), 530, "what it holds is sound");
    }
    assert_eq!(told(&directory, &["trace", "check", "a.trace"]).0, 0);
    let (_, info, _) = told(&directory, &["info", "a.trace"]);
    assert!(info.contains("trace check") && !info.contains("complete"), "{info}");
}

#[test]
fn a_trace_of_which_nothing_is_whole_is_refused() {
    let directory = expanded(&["--image", "hello"]);
    let whole = fs::read(directory.path().join("a.trace")).expect("there");
    fs::write(directory.path().join("cut"), &whole[..whole.len() / 2]).expect("written");
    for command in [&["dump"][..], &["stats"], &["convert", "-o", "out.csv"]] {
        let words = [&["trace", command[0], "cut"], &command[1..]].concat();
        let (status, _, stderr) = told(&directory, &words);
        assert!(status == 1 && stderr.contains("before its first whole segment"), "{stderr}");
    }
    // As much as traces and recordings have alike is no trace.
    let recording = fs::read(directory.path().join("a.rr")).expect("there");
    fs::write(directory.path().join("first"), &recording[..1]).expect("written");
    let (status, _, stderr) = told(&directory, &["info", "first"]);
    assert!(status == 1 && !stderr.contains("trace"), "{stderr}");
}

/// Fields that a replay and an expansion of the same recording must have alike.
fn verdict(report: &Value) -> [&Value; 4] {
    ["verified", "verified_until", "complete", "damage"].map(|field| &report[field])
}

#[test]
fn a_broken_recording_is_to_expand_what_it_is_to_replay() {
    let typed: String = (0..1500_u32).map(|line| format!("{}\r", line * line)).collect();
    let directory = tempfile::tempdir().expect("a temporary directory");
    fs::write(directory.path().join("typed"), format!("{typed}quit\r")).expect("written");
    let words = ["record", "--engine", "soft", "--image", "echo", "--input", "typed", "-o", "a.rr"];
    assert_eq!(told(&directory, &words).0, 0);
    let whole = fs::read(directory.path().join("a.rr")).expect("there");
    let flipped = |from_end: usize| {
        let mut bytes = whole.clone();
        let at = bytes.len() - from_end;
        bytes[at] ^= 4;
        bytes
    };
    let (mut damaged, mut cut) = (0, 0);
    let cuts = (1..12).map(|part| whole[..whole.len() - part * whole.len() / 16].to_vec());
    let flips = (1..12).map(|part| flipped(part * whole.len() / 16));
    for (number, bytes) in cuts.chain(flips).chain([whole.clone()]).enumerate() {
        fs::write(directory.path().join("b.rr"), bytes).expect("written");
        let (replayed, replay) = json(&directory, &["replay", "b.rr"]);
        let (status, expansion) = json(&directory, &["expand", "b.rr"]);
        assert_eq!(status, replayed, "{number}: {expansion:#}");
        if replay["error"].is_null() {
            assert_eq!(verdict(&expansion), verdict(&replay), "{number}");
        }
        let (_, table, stderr) = told(&directory, &["expand", "b.rr"]);
        let reasons = stderr.lines().filter(|line| !line.contains("seek index")).count();
        assert_eq!(reasons, usize::from(status == 1), "{number}: {stderr}");
        if expansion["damage"].is_string() {
            damaged += 1;
            assert!(stderr.contains("damaged") && !table.contains("cut short"), "{table} {stderr}");
        } else if expansion["complete"] == false {
            cut += 1;
            assert!(status == 1 || table.contains("cut short there"), "{table}");
        }
    }
    assert!(damaged > 2 && cut > 2, "{damaged} are damaged, {cut} are cut");
}

#[test]
fn what_was_compared_with_nothing_is_not_verified() {
    let directory = recorded(&["--image", "hello"]);
    let (status, report) = json(&directory, &["expand", "a.rr", "--from", "100", "--to", "101"]);
    assert_eq!((status, verdict(&report)[..2].to_vec()), (0, vec![&Value::Null; 2]), "{report:#}");
    let (_, table, _) = told(&directory, &["expand", "a.rr", "--to", "101"]);
    assert!(table.contains("nothing: no event lies"), "{table}");
    let (_, report) = json(&directory, &["expand", "a.rr"]);
    assert_eq!(
        (&report["verified"], &report["verified_until"]["tick"]),
        (&true.into(), &530.into())
    );

    let directory = recorded(BUSY);
    let (_, report) = json(&directory, &["expand", "a.rr", "--to", "4000000", "-o", "a.trace"]);
    let until = count(&report["verified_until"], "tick");
    assert!((3_000_000..4_000_000).contains(&until), "a checkpoint was met: {report:#}");
    assert_eq!((&report["verified"], count(&report, "checkpoints_verified")), (&true.into(), 1));
}

#[test]
fn wrong_use_is_known_before_anything_is_touched() {
    let directory = recorded(&["--image", "hello"]);
    fs::write(directory.path().join("kept.csv"), "kept").expect("written");
    let before = names(&directory);
    for wrong in [
        &["expand", "a.rr", "--from", "100", "--to", "50"][..],
        &["expand", "a.rr", "--from", "2s", "--to", "1s"],
        &["expand", "a.rr", "--format", "csv"],
        &["expand", "a.rr", "--segment", "1/2"],
        &["expand", "a.rr", "--interval", "5"],
        &["expand", "a.rr", "--format", "foo", "-o", "kept.csv"],
        &["expand", "a.rr", "--interval", "100", "--format", "csv", "-o", "y"],
        &["expand", "a.rr", "--segment", "1/3", "-o", "z.csv"],
        &["expand", "a.rr", "-o", "y.CSV"],
        &["expand", "a.rr", "-o", "y.csv.bz2"],
        &["expand", "a.rr", "-o", "y.trace.gz"],
        &["expand", "a.rr", "-o", "-", "--format", "parquet"],
        &["expand", "a.rr", "-o", "-", "--json"],
        &["trace", "convert", "absent", "-o", "y.CSV"],
        &["trace", "convert", "absent", "-o", "-", "--json"],
        &["trace", "concat", "absent", "-o", "-", "--json"],
    ] {
        let (status, _, stderr) = told(&directory, wrong);
        assert_eq!((status, stderr.lines().count()), (2, 1), "{wrong:?}: {stderr}");
    }
    let (status, _, stderr) = told(&directory, &["expand", "a.rr", "-o", "absent/y"]);
    assert!(status == 1 && stderr.contains("no directory absent: make it"), "{stderr}");
    let (status, _, stderr) = told(&directory, &["expand", "a.rr", "-o", "."]);
    assert!(status == 1 && stderr.contains("is a directory: give"), "{stderr}");
    for words in [&["-o", "/dev/full"][..], &["-o", "/dev/full", "--format", "csv"]] {
        let (status, _, stderr) = told(&directory, &[&["expand", "a.rr"], words].concat());
        assert!(status == 1 && stderr.contains("make room"), "{stderr}");
    }
    assert_eq!(names(&directory), before);
    assert_eq!(fs::read(directory.path().join("kept.csv")).expect("there"), b"kept");
}

#[test]
fn a_directory_of_tables_is_replaced_and_no_other() {
    let directory = expanded(&["--image", "hello"]);
    let there = |name: &str| directory.path().join(name);
    let expand = ["expand", "a.rr", "-o", "y.parquet"];
    assert_eq!(told(&directory, &expand).0, 0);
    let before = names(&directory);
    let (status, _, stderr) = told(&directory, &expand);
    assert!(status == 1 && stderr.contains("y.parquet exists"), "{stderr}");
    let old = there("y.parquet/instructions/old.parquet");
    fs::write(&old, "").expect("written");
    let forced = [&expand[..], &["--force"]].concat();
    let (status, _, stderr) = told(&directory, &forced);
    assert!(status == 0 && !old.exists(), "{stderr}");
    let convert = ["trace", "convert", "a.trace", "-o", "y.parquet", "--force"];
    assert_eq!(told(&directory, &convert).0, 0);

    // Somebody's own file is in it.
    fs::write(there("y.parquet/notes"), "mine").expect("written");
    let (status, _, stderr) = told(&directory, &forced);
    assert!(status == 1 && stderr.contains("y.parquet exists: delete it"), "{stderr}");
    assert!(Path::new(&there("y.parquet/notes")).exists());
    assert_eq!(names(&directory), before, "nothing half made is left");
}
