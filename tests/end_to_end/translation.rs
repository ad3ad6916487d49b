//! Translated code changes nothing that anybody sees: what is recorded with it replays without, and
//! the other way round. And `--profile` says which of the two has run.

use reprise_guest_images::EMBEDDED;
use serde_json::Value;

use crate::linux::workload;
use crate::program::{Workplace, assert_equal_runs, record, replay, run};

const SLOWLY: &[&str] = &["--no-translate"];
/// A guest that runs this long has hot code.
const ENOUGH_TO_BE_HOT: u64 = 1_000_000;

/// Arguments that start an embedded guest; what is typed is in a file of `workplace`.
fn guest(name: &str, workplace: &Workplace) -> Vec<String> {
    let mut words = vec!["--engine".to_owned(), "soft".to_owned(), "--image".to_owned()];
    words.push(name.to_owned());
    match name {
        "compute" => words.extend(["--cmdline".to_owned(), "scale=1".to_owned()]),
        "echo" => {
            let typed = workplace.file("typed", "first line\rsecond line\rquit\r");
            words.extend(["--input".to_owned(), typed]);
        }
        _ => {}
    }
    words
}

fn counts(report: &Value) -> &Value {
    let profile = &report["profile"];
    assert!(profile.is_object(), "{report:#}");
    profile
}

fn count(report: &Value, name: &str) -> u64 {
    counts(report)[name].as_u64().unwrap_or_else(|| panic!("no count {name}: {report:#}"))
}

#[test]
fn what_is_recorded_translated_replays_untranslated_and_the_other_way_round() {
    for image in EMBEDDED {
        let workplace = Workplace::new();
        let words = guest(image.name, &workplace);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        for (recording, replaying) in [(&[][..], SLOWLY), (SLOWLY, &[][..])] {
            let file = workplace.path(&format!("recorded{}.rr", recording.len()));
            let recorded = record(&[&words, recording, &["--profile"]].concat(), &file, 0);
            let replayed = replay(&file, &[replaying, &["--profile"]].concat());
            assert_equal_runs(&recorded, &replayed);
            let (quick, slow) =
                if recording.is_empty() { (&recorded, &replayed) } else { (&replayed, &recorded) };
            let instructions = slow["instructions"].as_u64();
            assert!(count(slow, "instructions_interpreted") > 0, "{slow:#}");
            assert_eq!(count(slow, "units_translated") + count(slow, "entries"), 0);
            if instructions > Some(ENOUGH_TO_BE_HOT) {
                assert!(count(quick, "entries") > 0, "{}: {quick:#}", image.name);
            }
        }
    }
}

#[test]
fn the_linux_workload_replays_untranslated() {
    let Some(workload) = workload() else { return };
    let file = workload.workplace.path("linux.rr");
    let replayed = replay(&file, &["--no-translate", "--profile"]);
    assert_equal_runs(&workload.report, &replayed);
    assert_eq!(count(&replayed, "entries"), 0, "{replayed:#}");
}

#[test]
fn a_profile_counts_what_ran_translated() {
    let compute = ["--engine", "soft", "--image", "compute", "--cmdline", "scale=1", "--profile"];
    let words = [&["--json", "run"], &compute[..]].concat();
    let report = run(&words).expect_code(0).json();
    let instructions = report["instructions"].as_u64().expect("a count");
    for name in ["units_translated", "entries", "left_by_exit", "blocks_searched", "page_walks"] {
        assert!(count(&report, name) > 0, "{name}: {report:#}");
    }
    let interpreted = count(&report, "instructions_interpreted");
    assert!(interpreted > 0, "blocks run some times before they are translated: {report:#}");
    assert!(interpreted < instructions / 10, "hot code is translated: {report:#}");
    let left: u64 = ["left_by_exit", "left_after_operation", "left_for_budget", "stopped"]
        .map(|name| count(&report, name))
        .iter()
        .sum();
    assert_eq!(left, count(&report, "entries"), "what is entered is left: {report:#}");
    assert!(counts(&report)["links_forgotten"].is_array(), "{report:#}");
    let operations = counts(&report)["operations_in_rust"].as_object().expect("by mnemonic");
    assert!(operations.values().all(|count| count.as_u64() > Some(0)), "{report:#}");
}

#[test]
fn a_profile_without_translation_has_zeros() {
    let ticks = ["--engine", "soft", "--image", "ticks", "--profile", "--no-translate"];
    let report = run(&[&["--json", "run"], &ticks[..]].concat()).expect_code(0).json();
    let zero = ["units_translated", "code_dropped", "entries", "left_by_exit"];
    for name in [&zero[..], &["left_after_operation", "left_for_budget", "stopped"]].concat() {
        assert_eq!(count(&report, name), 0, "{name}: {report:#}");
    }
    assert_eq!(counts(&report)["operations_in_rust"], serde_json::json!({}));
    let instructions = report["instructions"].as_u64().expect("a count");
    let interpreted = count(&report, "instructions_interpreted");
    assert_eq!(interpreted, instructions, "{report:#}");
}

#[test]
fn a_profile_is_asked_for_and_shown_as_a_table() {
    let ticks = ["run", "--engine", "soft", "--image", "ticks"];
    let asked = run(&[&ticks[..], &["--profile"]].concat()).expect_code(0);
    for part in ["where the software CPU's time goes", "units translated", "code entered"] {
        assert!(asked.stderr.contains(part), "no {part:?} in\n{}", asked.stderr);
    }
    let unasked = run(&ticks).expect_code(0);
    assert!(!unasked.stderr.contains("units translated"), "{}", unasked.stderr);
    let report = run(&[&["--json"], &ticks[..]].concat()).expect_code(0).json();
    assert!(report["profile"].is_null(), "{report:#}");
}
