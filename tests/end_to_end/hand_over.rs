//! Recordings that go from one engine to another, by the command line.

use crate::program::{Workplace, assert_equal_runs, record, replay, run};

fn engines(report: &serde_json::Value) -> Vec<String> {
    let stretches = report["stretches"].as_array().expect("a list");
    stretches.iter().map(|stretch| format!("{}/{}", stretch["engine"], stretch["clock"])).collect()
}

#[test]
fn a_run_stops_where_it_is_told() {
    let workplace = Workplace::new();
    let file = workplace.path("hello.rr");
    let recorded = record(&["--image", "hello", "--until", "300"], &file, 0);
    assert_eq!((&recorded["ticks"], &recorded["ending"]), (&300.into(), &"stopped".into()));
    assert!(recorded["final_digest"].is_string(), "{recorded:#}");
    assert_equal_runs(&recorded, &replay(&file, &[]));
}

#[test]
fn hand_overs_are_recorded_shown_and_followed() {
    let workplace = Workplace::new();
    let file = workplace.path("hello.rr");
    let there_and_back = ["--until", "100", "--then", "soft", "--until", "300", "--then", "soft"];
    let words = [&["--image", "hello", "--engine", "soft"], &there_and_back[..]].concat();
    let recorded = record(&words, &file, 0);
    assert_eq!(engines(&recorded).len(), 3, "{recorded:#}");
    for options in [&[][..], &["--engine", "soft"]] {
        let replayed = replay(&file, options);
        assert_equal_runs(&recorded, &replayed);
        assert_eq!(recorded["stretches"], replayed["stretches"]);
    }
    let info = run(&["--json", "info", &file]).expect_code(0).json();
    assert_eq!(info["stretches"], recorded["stretches"]);
    assert_eq!(info["assists"], 0);
    run(&["expand", &file]).expect_code(0);
}

#[test]
fn kvm_takes_over_and_gives_back() {
    if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        eprintln!("skipped: /dev/kvm cannot be opened");
        return;
    }
    let workplace = Workplace::new();
    let (file, console) = (workplace.path("compute.rr"), workplace.path("console"));
    let guest = ["--image", "compute", "--cmdline", "scale=1", "--console", &console];
    let there = ["--engine", "soft", "--until", "500000", "--then", "kvm"];
    let back = ["--until", "500100", "--then", "soft"];
    let recorded = record(&[&guest[..], &there[..], &back[..]].concat(), &file, 0);
    assert_eq!(engines(&recorded)[1], "\"kvm\"/\"sync\"");
    assert_eq!(engines(&recorded).len(), 3);
    let printed = std::fs::read_to_string(&console).expect("a console");
    assert_eq!(printed, reprise_guest_images::COMPUTE_AT_SCALE_1);
    for _ in 0..3 {
        let replayed = replay(&file, &[]);
        assert_eq!(replayed["verification"], "exact");
        assert_equal_runs(&recorded, &replayed);
    }
    let alone = replay(&file, &["--engine", "soft"]);
    assert_eq!(alone["recorded_stretches"], recorded["stretches"]);
    let ran = ["\"soft\"/\"instructions\"", "\"soft\"/\"sync\"", "\"soft\"/\"instructions\""];
    assert_eq!(engines(&alone), ran);
    assert_eq!(alone["verification"], "across-engines");
    assert_eq!(alone["console_digest"], recorded["console_digest"]);
    // Exits do not say how many instructions lie before what is counted in instructions again.
    let refused = run(&["expand", &file]);
    let reason = refused.expect_reason();
    assert!(reason.contains("at tick 500,1") && reason.contains("--from"), "{reason}");
    let back_at = recorded["stretches"][2]["from_tick"].as_u64().expect("a number").to_string();
    for window in ["--to", "--from"] {
        run(&["expand", &file, window, &back_at]).expect_code(0);
    }
}

#[test]
fn engines_and_moments_that_do_not_go_together_are_wrong_use() {
    let workplace = Workplace::new();
    let console = workplace.path("console");
    std::fs::write(&console, "of another run").expect("a file");
    let guest = ["run", "--image", "hello", "--console", &console];
    for wrong in [
        &["--then", "kvm"][..],
        &["--until", "5", "--until", "9"],
        &["--until", "9", "--then", "soft", "--until", "5"],
        &["--until", "9", "--then", "pmu"],
    ] {
        run(&[&guest[..], wrong].concat()).expect_code(2);
    }
    assert_eq!(std::fs::read_to_string(&console).expect("a file"), "of another run");
}
