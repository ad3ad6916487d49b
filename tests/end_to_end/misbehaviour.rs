//! Guests that do what no guest should: each ends in a defined way, and that replays too.

use std::time::Duration;

use crate::program::{Workplace, assert_equal_runs, record, replay, replayed_console, reprise};

/// What a deed comes to: the ending, the exit status, and a part of what the console shows.
const ENDS: &[(&str, &str, i32, &str)] = &[
    ("absent", "reset", 0, "absent: done"),
    // (0x10 << 1) | 1, as isa-debug-exit has it.
    ("debug-exit", "debug-exit", 33, "misbehave: debug-exit"),
    ("divide", "reset", 0, "exception 0 "),
    ("double-fault", "reset", 0, "exception 8 "),
    ("halt", "power-off", 0, "misbehave: halt"),
    ("triple-fault", "triple-fault", 0, "misbehave: triple-fault"),
    ("wild-jump", "reset", 0, "exception 14 "),
    ("wild-jump-no-idt", "triple-fault", 0, "misbehave: wild-jump-no-idt"),
    ("wild-page-tables", "triple-fault", 0, "misbehave: wild-page-tables"),
];

#[test]
fn a_deed_that_ends_the_machine_ends_the_recording() {
    let workplace = Workplace::new();
    for (deed, ending, code, console) in ENDS {
        let file = workplace.path(&format!("{deed}.rr"));
        let command_line = format!("do={deed}");
        let guest = ["--engine", "soft", "--image", "misbehave", "--cmdline", &command_line];
        let recorded = record(&guest, &file, *code);
        assert_eq!(recorded["ending"], *ending, "{deed}: {recorded:#}");
        assert_equal_runs(&recorded, &replay(&file, &[]));
        let printed = replayed_console(&file, &[]);
        assert!(printed.contains(console), "{deed}: {printed:?}");
    }
}

/// Where nothing answers there are no instructions either; how that ends is the engine's to say, but
/// it ends, says so, and what was recorded replays.
#[test]
fn a_jump_into_a_device_ends_in_a_defined_way() {
    let workplace = Workplace::new();
    let file = workplace.path("device.rr");
    let guest = ["--engine", "soft", "--image", "misbehave", "--cmdline", "do=wild-jump-device"];
    let words = [&["--json", "record"], &guest[..], &["-o", &file]].concat();
    let finished = reprise(&words).start().finish();
    let recorded = finished.json();
    assert_eq!(recorded["exit_code"], finished.code(), "{recorded:#}");
    assert!(recorded["ending"].is_string(), "{recorded:#}");
    let replayed = replay(&file, &[]);
    assert_eq!(replayed["console_digest"], recorded["console_digest"]);
    assert_eq!(replayed["ending"], recorded["ending"]);
}

#[test]
fn a_deed_that_never_ends_is_stopped_and_replays() {
    let workplace = Workplace::new();
    for deed in ["flood", "idle", "spin"] {
        let (file, console) = (workplace.path(deed), workplace.path(&format!("{deed}.console")));
        let command_line = format!("do={deed}");
        let guest = ["--engine", "soft", "--image", "misbehave", "--cmdline", &command_line];
        let output = ["--console", &console, "-o", &file];
        let words = [&["--json", "record"], &guest[..], &output[..]].concat();
        let mut running = reprise(&words).start();
        running.wait_until("the deed is announced", || {
            std::fs::read_to_string(&console).is_ok_and(|text| text.contains("misbehave: "))
        });
        std::thread::sleep(Duration::from_millis(300));
        running.signal("INT");
        let recorded = running.finish().expect_code(0).json();
        assert_eq!(recorded["ending"], "stopped", "{deed}: {recorded:#}");
        assert_equal_runs(&recorded, &replay(&file, &[]));
    }
}
