//! The formats of lines, parsed again.

use reprise_export::csv::{Csv, HEADING};
use reprise_export::dinero::Dinero;
use reprise_export::perf_script::PerfScript;

use crate::account::{retired, show, with_physical};
use crate::synthetic::{Entry, Executed, Options};

/// Everything that was fetched, read and written, in order: what, address, size.
fn references(entries: &[Entry]) -> Vec<(char, u64, u64)> {
    let mut all = Vec::new();
    for entry in entries {
        let Entry::Instruction(Executed { linear, bytes, retired, accesses, .. }) = entry else {
            continue;
        };
        if *retired {
            all.push(('i', *linear, bytes.len() as u64));
        }
        for one in accesses {
            let size = u64::from(one.size_bytes);
            all.extend(one.kind.reads().then_some(('r', one.address, size)));
            all.extend(one.kind.writes().then_some(('w', one.address, size)));
        }
    }
    all
}

fn hexadecimal(text: &str) -> u64 {
    u64::from_str_radix(text, 16).expect("a hexadecimal number")
}

#[test]
fn dinero_has_a_line_for_each_reference() {
    let mut exporter = Dinero::new(Vec::new());
    let entries = show(Options::new(1), 10_000, &mut exporter);
    let text = String::from_utf8(exporter.into_inner()).expect("text");
    let lines = text.lines().map(|line| {
        let words: Vec<&str> = line.split(' ').collect();
        let [what, address, size] = words[..] else { panic!("{line}") };
        let what = what.chars().next().expect("a letter");
        (what, hexadecimal(address), size.parse().expect("a size"))
    });
    assert!(lines.eq(references(&entries)));
}

#[test]
fn values_separated_by_commas_have_a_row_for_each_reference_and_event() {
    let mut exporter = Csv::new(Vec::new());
    let entries = show(with_physical(2), 10_000, &mut exporter);
    let text = String::from_utf8(exporter.into_inner()).expect("text");
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some(HEADING));
    let columns = HEADING.split(',').count();
    let rows: Vec<Vec<&str>> = lines.map(|line| line.split(',').collect()).collect();
    assert!(rows.iter().all(|row| row.len() == columns));
    let referenced = rows.iter().filter_map(|row| {
        let what = match row[1] {
            "fetch" => 'i',
            "read" => 'r',
            "write" => 'w',
            _ => return None,
        };
        let address = hexadecimal(row[4].strip_prefix("0x").expect("hexadecimal"));
        assert_eq!(row[6].is_empty(), what == 'i', "accesses have physical addresses");
        Some((what, address, row[5].parse().expect("a size")))
    });
    assert!(referenced.eq(references(&entries)));
    let fetches = rows.iter().filter(|row| row[1] == "fetch");
    for (number, row) in fetches.enumerate() {
        assert_eq!(row[0], number.to_string(), "instructions are numbered");
    }
    let events = entries.iter().filter(|entry| matches!(entry, Entry::Event(_))).count();
    let known = ["fetch", "read", "write"];
    assert_eq!(rows.iter().filter(|row| !known.contains(&row[1])).count(), events);
}

#[test]
fn perf_script_has_a_sample_for_each_instruction_and_time_goes_on() {
    let mut exporter = PerfScript::new(Vec::new(), 0);
    let entries = show(Options::new(3), 10_000, &mut exporter);
    let text = String::from_utf8(exporter.into_inner()).expect("text");
    let executed = retired(&entries);
    assert_eq!(text.lines().count(), executed.len());
    let mut before = 0;
    for (line, executed) in text.lines().zip(executed) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, _, "[000]", time, "1", "instructions:", address, "[unknown]", object] = words[..]
        else {
            panic!("{line}")
        };
        assert_eq!(hexadecimal(address), executed.linear);
        assert_eq!(object == "([guest.user])", executed.mode.cpl == 3);
        let (seconds, rest) =
            time.strip_suffix(':').and_then(|time| time.split_once('.')).expect(line);
        let seconds: u64 = seconds.parse().expect("seconds");
        let rest: u64 = rest.parse().expect("nanoseconds");
        let time = seconds * 1_000_000_000 + rest;
        assert!(time >= before, "{line}");
        before = time;
    }
}
