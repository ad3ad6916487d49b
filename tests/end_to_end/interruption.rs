//! Recordings whose making is interrupted: asked to stop, killed, or out of disk.

use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};
use std::time::Duration;

use crate::program::{
    BINARY, Running, SIGKILL, Workplace, assert_equal_runs, replay, reprise, run,
};

/// Starts recording a guest whose console goes to a file, and waits for its first output.
fn start_recording(guest: &[&str], file: &str, console: &str) -> Running {
    let words =
        [&["--json", "record", "--engine", "soft"], guest, &["--console", console, "-o", file]]
            .concat();
    let mut running = reprise(&words).start();
    running.wait_until("its first output", || size(console) > 0);
    running
}

fn size(path: &str) -> u64 {
    std::fs::metadata(path).map_or(0, |metadata| metadata.len())
}

const FLOOD: &[&str] = &["--image", "misbehave", "--cmdline", "do=flood"];
const COMPUTE: &[&str] = &["--image", "compute"];

#[test]
fn a_signal_that_asks_to_stop_closes_the_recording() {
    let workplace = Workplace::new();
    for signal in ["INT", "TERM", "HUP"] {
        let (file, console) = (workplace.path(signal), workplace.path(&format!("{signal}.out")));
        let running = start_recording(FLOOD, &file, &console);
        std::thread::sleep(Duration::from_millis(400));
        running.signal(signal);
        let recorded = running.finish().expect_code(0).json();
        assert_eq!(recorded["ending"], "stopped", "{signal}: {recorded:#}");
        assert_equal_runs(&recorded, &replay(&file, &[]));
        let info = run(&["--json", "info", &file]).expect_code(0).json();
        assert_eq!(info["complete"], true, "{signal}: {info:#}");
    }
}

/// The console shows how far the guest was a second before the kill: no less may replay. A test
/// machine may stall for a second at the wrong time, so one trial of three has to hold.
#[test]
fn a_killed_recording_replays_up_to_a_second_before_the_kill() {
    let workplace = Workplace::new();
    let mut trials = Vec::new();
    for trial in 0..3 {
        let (file, console) = (workplace.path(&trial.to_string()), workplace.path("console"));
        let _ = std::fs::remove_file(&console);
        let running = start_recording(FLOOD, &file, &console);
        std::thread::sleep(Duration::from_millis(1000));
        let a_second_before = size(&console);
        std::thread::sleep(Duration::from_millis(1000));
        running.signal("KILL");
        assert_eq!(running.wait().status.signal(), Some(SIGKILL));
        let replayed = replay(&file, &[]);
        assert_eq!(replayed["complete"], false, "{replayed:#}");
        assert_eq!(replayed["ending"], "cut-short", "{replayed:#}");
        let replays_to = replayed["console_bytes"].as_u64().expect("a count");
        assert!(replays_to <= size(&console), "more than there was: {replayed:#}");
        if a_second_before > 0 && replays_to >= a_second_before {
            return;
        }
        trials.push((a_second_before, replays_to));
    }
    panic!("console bytes a second before the kill, and in the replay: {trials:?}");
}

#[test]
fn a_recording_killed_while_it_computes_is_usable() {
    let workplace = Workplace::new();
    let file = workplace.path("compute.rr");
    let console = workplace.path("console");
    let running = start_recording(COMPUTE, &file, &console);
    std::thread::sleep(Duration::from_millis(700));
    running.signal("KILL");
    assert_eq!(running.wait().status.signal(), Some(SIGKILL));
    let info = run(&["--json", "info", &file]).expect_code(0).json();
    assert_eq!((&info["complete"], &info["damage"]), (&false.into(), &serde_json::Value::Null));
    let replayed = replay(&file, &[]);
    assert_eq!(replayed["ticks"], info["ticks"]);
    assert!(replayed["ticks"].as_u64() > Some(1_000_000), "{replayed:#}");
}

/// Records onto a file system of so many KiB, in a namespace of its own where only the product sees
/// it. What the recording left there is then at `saved`, if anything. `None`, said, where the host
/// does not let one mount.
fn record_onto_small_disk(
    workplace: &Workplace,
    disk_kib: u32,
    guest: &str,
    saved: &str,
) -> Option<Output> {
    let mount = workplace.path("small-disk");
    std::fs::create_dir(&mount).expect("a directory");
    let mounted = format!("mount -t tmpfs -o size={disk_kib}k none {mount}");
    let probe = Command::new("unshare").args(["-rm", "sh", "-c", &mounted]).output();
    if !probe.is_ok_and(|output| output.status.success()) {
        reprise_tests::skipped::skipped(
            "this host lets nobody mount a small file system in a namespace",
        );
        return None;
    }
    let script = format!(
        "{mounted} && {{ \"$0\" record --engine soft {guest} --console /dev/null \
         -o {mount}/full.rr; code=$?; cp {mount}/full.rr {saved} 2>/dev/null; exit $code; }}"
    );
    let output = Command::new("unshare")
        .args(["-rm", "sh", "-c", &script, BINARY])
        .output()
        .expect("unshare starts");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.starts_with("reprise: ") && stderr.lines().count() == 1, "{stderr}");
    assert!(stderr.contains("No space left on device"), "{stderr}");
    Some(output)
}

/// Frames are cut at 64 KiB, so two or so fit.
#[test]
fn a_disk_that_fills_up_leaves_what_replays() {
    let workplace = Workplace::new();
    let typed = workplace.file("typed", incompressible_text(250_000));
    let saved = workplace.path("saved.rr");
    let guest = format!("--image echo --input {typed}");
    if record_onto_small_disk(&workplace, 128, &guest, &saved).is_some() {
        assert_cut_short_but_usable(&saved);
    }
}

/// The guest runs already when its images are written, and would run for ever.
#[test]
fn a_disk_too_small_for_the_images_ends_the_run_and_leaves_nothing() {
    let workplace = Workplace::new();
    let saved = workplace.path("saved.rr");
    let guest = "--image misbehave --cmdline do=spin";
    if let Some(output) = record_onto_small_disk(&workplace, 4, guest, &saved) {
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(stderr.contains("make room and record again"), "{stderr}");
        assert!(!std::path::Path::new(&saved).exists(), "nobody could use it");
    }
}

/// A recording that goes into a pipe whose reader leaves.
#[test]
fn a_reader_that_goes_away_leaves_what_replays() {
    let workplace = Workplace::new();
    let (pipe, saved) = (workplace.path("pipe"), workplace.path("saved.rr"));
    let made = Command::new("mkfifo").arg(&pipe).status().expect("mkfifo starts");
    assert!(made.success());
    let typed = workplace.file("typed", incompressible_text(250_000));
    let console = workplace.path("console");
    let guest = ["record", "--engine", "soft", "--image", "echo", "--input", &typed];
    let output = ["--console", &console, "--force", "-o", &pipe];
    let running = reprise(&[&guest[..], &output[..]].concat()).start();
    let mut part = vec![0; 128 << 10];
    let mut reader = std::fs::File::open(&pipe).expect("the pipe's other end");
    reader.read_exact(&mut part).expect("more than that is written");
    drop(reader);
    let finished = running.finish();
    assert!(finished.expect_reason().contains("Broken pipe"), "{}", finished.stderr);
    std::fs::write(&saved, part).expect("a file");
    assert_cut_short_but_usable(&saved);
}

fn assert_cut_short_but_usable(file: &str) {
    let replayed = replay(file, &[]);
    assert_eq!(replayed["complete"], false, "{replayed:#}");
    assert!(replayed["console_bytes"].as_u64() > Some(1000), "{replayed:#}");
}

/// Printable text that no compressor makes much of; a fixed sequence.
fn incompressible_text(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut text = Vec::with_capacity(bytes);
    while text.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        text.push(b' ' + u8::try_from(state % 95).expect("less than 95"));
    }
    text
}
