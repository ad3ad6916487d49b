//! Every embedded guest, recorded and replayed on the software CPU.

use reprise_guest_images::{COMPUTE_AT_SCALE_1, EMBEDDED, embedded};

use crate::program::{
    Workplace, assert_equal_runs, record, record_and_replay, replay, replayed_console, run,
};

#[test]
fn every_guest_replays_as_it_was_recorded() {
    for guest in EMBEDDED {
        let small: &[&str] = match guest.name {
            "compute" => &["--cmdline", "scale=1"],
            _ => &[],
        };
        let arguments = [&["--engine", "soft", "--image", guest.name], small].concat();
        let recorded = record_and_replay(&arguments);
        assert_eq!(recorded["guest"], guest.name);
        assert!(recorded["console_bytes"].as_u64() > Some(10), "{recorded:#}");
    }
}

#[test]
fn an_engine_is_chosen_with_its_reason_and_recording_changes_nothing() {
    let recorded = record_and_replay(&["--image", "ticks"]);
    assert!(recorded["engine_reason"].is_string(), "{recorded:#}");
    let ran = run(&["--json", "run", "--image", "ticks"]).expect_code(0).json();
    assert_eq!(ran["console_digest"], recorded["console_digest"]);
    assert_eq!(ran["instructions"], recorded["instructions"]);
}

#[test]
fn compute_prints_what_its_sources_compute() {
    let workplace = Workplace::new();
    let (file, console) = (workplace.path("compute.rr"), workplace.path("console"));
    let guest = ["--engine", "soft", "--image", "compute", "--cmdline", "scale=1"];
    record(&[&guest[..], &["--console", &console]].concat(), &file, 0);
    let printed = std::fs::read_to_string(&console).expect("the console was written");
    assert_eq!(printed, COMPUTE_AT_SCALE_1);
    assert_eq!(replayed_console(&file, &[]), printed);
}

#[test]
fn what_is_typed_is_part_of_the_recording() {
    let workplace = Workplace::new();
    let typed = workplace.file("typed", "first line\rsecond line\rquit\r");
    let file = workplace.path("echo.rr");
    let guest = ["--engine", "soft", "--image", "echo", "--input", &typed];
    let recorded = record(&guest, &file, 0);
    // Nobody types during a replay.
    std::fs::remove_file(&typed).expect("the file was there");
    assert_equal_runs(&recorded, &replay(&file, &[]));
    let console = replayed_console(&file, &[]);
    assert!(console.contains("second line\r\n") && console.contains("echo: 28 bytes"), "{console}");
}

#[test]
fn a_recording_replays_elsewhere_with_its_images_gone() {
    let workplace = Workplace::new();
    let kernel = workplace.file("kernel.elf", embedded("ticks").expect("it is listed").image);
    let file = workplace.path("ticks.rr");
    let words = ["--engine", "soft", "--kernel", &kernel, "--cmdline", "count=5", "--memory", "32"];
    let recorded = record(&words, &file, 0);
    std::fs::remove_file(&kernel).expect("the kernel was there");
    let elsewhere = Workplace::new();
    let moved = elsewhere.path("moved.rr");
    std::fs::copy(&file, &moved).expect("a copy");
    drop(workplace);
    assert_equal_runs(&recorded, &replay(&moved, &[]));
    let info = run(&["--json", "info", &moved]).expect_code(0).json();
    assert_eq!(info["images"][0]["name"], "kernel.elf");
    assert!(info["image_bytes"].as_u64() > Some(1000), "{info:#}");
}

#[test]
fn a_replay_stops_at_the_moment_asked_for() {
    let workplace = Workplace::new();
    let file = workplace.path("ticks.rr");
    let recorded = record(&["--engine", "soft", "--image", "ticks"], &file, 0);
    let half = recorded["ticks"].as_u64().expect("a count") / 2;
    let replayed = replay(&file, &["--until", &half.to_string()]);
    assert_eq!(replayed["ending"], "target-reached", "{replayed:#}");
    assert_eq!(replayed["ticks"], half, "{replayed:#}");
}

#[test]
fn ten_replays_of_ten_are_equal() {
    let workplace = Workplace::new();
    let file = workplace.path("ticks.rr");
    let guest = ["--engine", "soft", "--image", "ticks", "--cmdline", "hz=5000 count=20"];
    let recorded = record(&guest, &file, 0);
    for _ in 0..10 {
        assert_equal_runs(&recorded, &replay(&file, &[]));
    }
}
