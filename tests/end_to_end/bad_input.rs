//! What users get wrong: each case ends with its exit status and one line that says what is wrong.

use std::process::Command;

use reprise_guest_images::embedded;

use crate::program::{Workplace, record, replay, reprise, run};

/// Files for the cases below: a name that a case may give, and what is there.
fn prepare(workplace: &Workplace) {
    let ticks = embedded("ticks").expect("it is listed").image;
    workplace.file("empty", "");
    workplace.file("text", "no kernel\n".repeat(1000));
    workplace.file("cut.elf", &ticks[..70]);
    workplace.file("half.elf", &ticks[..ticks.len() / 2]);
    workplace.file("header.elf", &ticks[..20]);
    let mut other_machine = ticks.to_vec();
    other_machine[18] = 0xb7;
    workplace.file("arm.elf", other_machine);
    workplace.file("whole.elf", ticks);
    workplace.file("exists.rr", "something of value");
    workplace.file("initrd", "any bytes");
    workplace.file("large", vec![0x5a; 8 << 20]);
    std::fs::create_dir(workplace.directory().join("directory")).expect("a directory");
    let pipe = Command::new("mkfifo").arg(workplace.path("pipe")).status().expect("mkfifo starts");
    assert!(pipe.success());
    record(&["--engine", "soft", "--image", "hello"], &workplace.path("good.rr"), 0);
}

const HELLO: &[&str] = &["record", "--engine", "soft", "--image", "hello"];
const KERNEL: &[&str] = &["record", "--engine", "soft", "-o", "new.rr", "--kernel"];
const INITRD: &[&str] =
    &["record", "--engine", "soft", "-o", "new.rr", "--kernel", "whole.elf", "--initrd"];

/// A command, more of its words, and what its one line must mention. Exit status 1.
const FAILURES: &[(&[&str], &[&str], &str)] = &[
    (KERNEL, &["absent"], "check the path"),
    (KERNEL, &["empty"], "the kernel is empty"),
    (KERNEL, &["directory"], "is a directory: give a file"),
    (KERNEL, &["text"], "text"),
    (KERNEL, &["cut.elf"], "cut.elf"),
    (KERNEL, &["half.elf"], "half.elf"),
    (KERNEL, &["header.elf"], "header.elf"),
    (KERNEL, &["arm.elf"], "arm.elf"),
    (KERNEL, &["/bin/sh"], "kernel"),
    (KERNEL, &["/dev/zero"], "device"),
    (KERNEL, &["good.rr"], "good.rr"),
    (INITRD, &["absent"], "check the path"),
    (INITRD, &["empty"], "initrd is empty"),
    (INITRD, &["directory"], "--initrd directory is a directory"),
    (INITRD, &["large", "--memory", "4"], "--memory"),
    (INITRD, &["/dev/zero"], "device"),
    (HELLO, &["-o", "exists.rr"], "--force"),
    (HELLO, &["-o", "directory"], "give a file's name"),
    (HELLO, &["-o", "directory", "--force"], "give a file's name"),
    (HELLO, &["-o", "absent/new.rr"], "there is no directory absent; make it"),
    (HELLO, &["-o", "text/new.rr"], "there is no directory text"),
    (HELLO, &["-o", "/dev/full", "--force"], "No space left"),
    (HELLO, &["-o", "new.rr", "--input", "absent"], "give a readable file"),
    (HELLO, &["-o", "new.rr", "--input", "directory"], "give a readable file"),
    (HELLO, &["-o", "exists.rr", "--force", "--input", "absent"], "give a readable file"),
    (HELLO, &["-o", "new.rr", "--console", "absent/console"], "give another --console"),
    (&["run", "--engine", "soft", "--image", "nothing"], &[], "\"nothing\""),
    (&["run", "--engine", "soft", "--image", ""], &[], "hello"),
    (&["run", "--clock", "pmu", "--image", "hello"], &[], "pmu"),
    (&["replay"], &["absent.rr"], "check the path"),
    (&["replay"], &["empty"], "empty: recording had not begun"),
    (&["replay"], &["text"], "no Reprise recording"),
    (&["replay"], &["whole.elf"], "no Reprise recording"),
    (&["replay"], &["directory"], "is a directory: give the file"),
    (&["replay"], &["pipe"], "is a pipe: give the file"),
    (&["info"], &["absent.rr"], "check the path"),
    (&["info"], &["directory"], "is a directory: give the file"),
    (&["info"], &["pipe"], "is a pipe: give the file"),
    (&["info"], &["/dev/zero"], "is a device: give the file"),
    (&["info"], &["empty"], "record again"),
    (&["diff"], &["good.rr", "pipe"], "is a pipe: give the file"),
    (&["info"], &["text"], "no Reprise recording"),
    (&["diff"], &["good.rr", "absent.rr"], "absent.rr"),
    (&["diff"], &["text", "good.rr"], "no Reprise recording"),
    (&["images", "build"], &["hello"], "hello"),
    (&["images", "build"], &["nothing"], "nothing"),
];

/// Exit status 2: clap explains the use.
const WRONG_USE: &[&[&str]] = &[
    &[],
    &["bogus"],
    &["--bogus"],
    &["record"],
    &["record", "--image", "hello"],
    &["record", "--image", "hello", "-o"],
    &["record", "--image", "hello", "-o", ""],
    &["replay", "good.rr", "--rewritten", "new.rr"],
    &["record", "--image", "hello", "--kernel", "whole.elf", "-o", "new.rr"],
    &["record", "--image", "hello", "--initrd", "initrd", "-o", "new.rr"],
    &["run", "--image", "hello", "--engine", "abacus"],
    &["run", "--image", "hello", "--clock", "sundial"],
    &["run", "--image", "hello", "--engine", "soft", "--clock", "step"],
    &["run", "--image", "hello", "--memory", "0"],
    &["run", "--image", "hello", "--memory", "-1"],
    &["run", "--image", "hello", "--memory", "999999999999"],
    &["run", "--image", "hello", "--memory", "99999999999999999999999"],
    &["run", "--image", "hello", "--memory", "much"],
    &["replay"],
    &["replay", "good.rr", "--until", "noon"],
    &["replay", "good.rr", "--engine", "soft", "--clock", "pmu"],
    &["replay", "good.rr", "--clock", "sync"],
    &["diff", "good.rr"],
    &["info", "good.rr", "good.rr"],
];

#[test]
fn a_failure_is_one_line_and_status_1() {
    let workplace = Workplace::new();
    prepare(&workplace);
    for (command, words, expected) in FAILURES {
        let arguments = [*command, *words].concat();
        let start = |words: &[&str]| reprise(words).in_directory(workplace.directory()).start();
        let finished = start(&arguments).finish();
        let reason = finished.expect_reason();
        assert!(reason.contains(expected), "{arguments:?}: {reason:?} does not say {expected:?}");
        assert!(finished.stdout.is_empty(), "{arguments:?} wrote to standard output");
        let left = workplace.directory().join("new.rr").exists();
        assert!(!left, "{arguments:?} left a recording of nothing");
        // The same, for a program to read.
        let finished = start(&[&["--json"], &arguments[..]].concat()).finish();
        let reason = finished.expect_reason().trim_start_matches("reprise: ").to_owned();
        assert_eq!(finished.json()["error"], *reason, "{arguments:?}");
    }
    let kept = std::fs::read(workplace.directory().join("exists.rr")).expect("it exists");
    assert_eq!(kept, b"something of value");
}

#[test]
fn wrong_use_is_status_2() {
    let workplace = Workplace::new();
    let good = workplace.path("good.rr");
    record(&["--engine", "soft", "--image", "hello"], &good, 0);
    for words in WRONG_USE {
        let finished = reprise(words).in_directory(workplace.directory()).start().finish();
        let finished = finished.expect_code(2);
        assert!(finished.stdout.is_empty() && !finished.stderr.is_empty(), "{words:?}");
    }
}

#[test]
fn force_overwrites_and_its_absence_does_not() {
    let workplace = Workplace::new();
    let file = workplace.file("taken.rr", vec![0; 100_000]);
    let words = ["record", "--engine", "soft", "--image", "hello", "-o", &file];
    assert!(run(&words).expect_reason().contains("exists"));
    run(&[&words[..], &["--force"]].concat()).expect_code(0);
    run(&["replay", &file]).expect_code(0);
}

#[test]
fn console_output_that_is_lost_is_told_and_the_recording_stays_good() {
    let workplace = Workplace::new();
    let file = workplace.path("hello.rr");
    let words = ["--json", "record", "--engine", "soft", "--image", "hello", "-o", &file];
    let finished = run(&[&words[..], &["--console", "/dev/full"]].concat()).expect_code(0);
    assert!(finished.stderr.contains("console output was lost"), "{}", finished.stderr);
    assert!(finished.json()["console_failure"].is_string());
    assert_eq!(replay(&file, &[])["console_digest"], finished.json()["console_digest"]);
}

#[test]
fn a_command_line_that_is_too_long_is_refused() {
    let words = ["run", "--engine", "soft", "--image", "hello", "--cmdline", &"x".repeat(100_000)];
    assert!(run(&words).expect_reason().contains("command line"));
}

#[test]
fn without_kvm_the_reason_says_what_to_do() {
    if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok() {
        reprise_tests::skipped::skipped("this host has KVM");
        return;
    }
    let finished = run(&["run", "--engine", "kvm", "--clock", "sync", "--image", "hello"]);
    assert!(finished.expect_reason().contains("/dev/kvm"), "{}", finished.stderr);
}
