//! What a command reads, or another process is using, is not written over, whatever the user allows; and a
//! report that gets nowhere is no success.

use std::fs;

use crate::program::{Workplace, record, replay, reprise, reprise_after, run};

const HELLO: &[&str] = &["record", "--engine", "soft", "--image", "hello"];

/// `a.rr` with checkpoints, a link to it, `a.trace`, and its shares `1.trace` and `2.trace`.
fn prepare(workplace: &Workplace) {
    let recording = workplace.path("a.rr");
    record(&["--engine", "soft", "--image", "hello", "--checkpoint-every", "100"], &recording, 0);
    std::os::unix::fs::symlink(&recording, workplace.path("link.rr")).expect("it can be linked");
    let trace = workplace.path("a.trace");
    run(&["expand", &recording, "-o", &trace]).expect_code(0);
    for share in ["1", "2"] {
        let to = workplace.path(&format!("{share}.trace"));
        run(&["expand", &recording, "-o", &to, "--segment", &format!("{share}/2")]).expect_code(0);
    }
}

/// Commands, all of which may overwrite files.
const ONTO_THEMSELVES: &[&[&str]] = &[
    &["expand", "a.rr", "-o", "a.rr", "--force"],
    &["expand", "a.rr", "-o", "link.rr", "--force"],
    &["expand", "a.rr", "-o", "a.rr.checkpoints", "--force"],
    &["trace", "convert", "a.trace", "-o", "./a.trace", "--format", "csv", "--force"],
    &["trace", "stats", "a.trace", "--html", "a.trace", "--force"],
    &["trace", "concat", "1.trace", "2.trace", "-o", "2.trace", "--force"],
    &[
        "record",
        "--engine",
        "soft",
        "--image",
        "hello",
        "-o",
        "new",
        "--console",
        "./new",
        "--force",
    ],
    &["record", "--engine", "soft", "--image", "hello", "-o", "a.rr", "--input", "a.rr", "--force"],
    &["run", "--engine", "soft", "--image", "hello", "--console", "a.rr"],
    &["run", "--engine", "soft", "--image", "hello", "--console", "a.trace"],
];

#[test]
fn no_command_writes_over_what_it_reads() {
    let workplace = Workplace::new();
    prepare(&workplace);
    let contents = || {
        let entries = fs::read_dir(workplace.directory()).expect("it can be read");
        let mut all: Vec<_> = entries
            .map(|entry| entry.expect("it can be read").path())
            .map(|path| (fs::read(&path).expect("it can be read"), path))
            .collect();
        all.sort_by(|(_, one), (_, other)| one.cmp(other));
        all
    };
    let before = contents();
    for words in ONTO_THEMSELVES {
        let refused = reprise(words).in_directory(workplace.directory()).start().finish();
        let refused = refused.expect_code(1);
        assert!(refused.stderr.lines().last().is_some_and(|it| it.contains("give another")));
        assert!(contents() == before, "{words:?} changed a file: {}", refused.stderr);
    }
}

#[test]
fn a_recording_that_is_being_made_is_nobody_elses_to_overwrite() {
    let workplace = Workplace::new();
    let file = workplace.path("busy.rr");
    let words = ["record", "--engine", "soft", "--image", "echo", "--input", "-", "-o", &file];
    let mut first = reprise(&words).with_keyboard().start();
    // Nobody types, and somebody could.
    let _keyboard = first.keyboard();
    first.wait_until("its recording is there", || fs::metadata(&file).is_ok_and(|it| it.len() > 0));
    let second = run(&[HELLO, &["-o", &file, "--force"]].concat()).expect_code(1);
    assert!(second.stderr.contains("by another process"), "{}", second.stderr);
    first.signal("TERM");
    first.finish().expect_code(0);
    assert_eq!(replay(&file, &[])["guest"], "echo");
    run(&[HELLO, &["-o", &file, "--force"]].concat()).expect_code(0);
    assert_eq!(replay(&file, &[])["guest"], "hello");
}

#[test]
fn a_report_that_cannot_be_written_is_a_failure() {
    let workplace = Workplace::new();
    prepare(&workplace);
    for words in [
        &["info", "a.rr"][..],
        &["replay", "a.rr"],
        &["diff", "a.rr", "a.rr"],
        &["expand", "a.rr"],
        &["checkpoint", "a.rr"],
        &["images"],
        &["trace", "check", "a.trace"],
        &["trace", "stats", "a.trace"],
        &["info", "a.trace"],
    ] {
        for json in [&["--json"][..], &[]] {
            let words = [json, words].concat();
            let lost = reprise_after("exec >/dev/full", &words).in_directory(workplace.directory());
            let lost = lost.start().finish().expect_code(1);
            assert!(lost.stderr.contains("cannot be written"), "{words:?}: {}", lost.stderr);
        }
    }
}
