//! The command line as scripts use it: exit statuses, JSON, and what it says when things go wrong.

use std::fs::{self, File};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use program::reprise;
use serde_json::Value;
use tempfile::TempDir;

mod program;

/// A run that takes longer has hung.
const TIME_LIMIT: Duration = Duration::from_secs(120);

/// Waits, but not for ever.
fn finish(mut child: Child) -> Output {
    let began = Instant::now();
    while child.try_wait().expect("a child can be waited for").is_none() {
        if began.elapsed() > TIME_LIMIT {
            let _ = child.kill();
            panic!("the command hangs");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().expect("its output can be read")
}

fn spawn(command: &mut Command) -> Child {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the command starts")
}

fn run(directory: &TempDir, arguments: &[&str]) -> Output {
    finish(spawn(&mut reprise(directory, arguments)))
}

/// Runs with `--json`, and gives status and object.
fn json(directory: &TempDir, arguments: &[&str]) -> (i32, Value) {
    let output = run(directory, &[&["--json"], arguments].concat());
    let stdout = String::from_utf8_lossy(&output.stdout);
    let object = serde_json::from_str(&stdout)
        .unwrap_or_else(|error| panic!("{arguments:?}: {error}: {stdout:?}"));
    (output.status.code().expect("it exits"), object)
}

/// The one line with which a command fails.
fn failure(directory: &TempDir, arguments: &[&str], status: i32) -> String {
    let output = run(directory, arguments);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(status), "{arguments:?}: {stderr}");
    let reasons: Vec<&str> = stderr
        .lines()
        .filter(|line| line.starts_with("reprise: ") && !line.contains("engine soft, clock"))
        .collect();
    assert_eq!(reasons.len(), 1, "{arguments:?}: {stderr}");
    reasons[0].to_owned()
}

fn directory() -> TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

/// Records `echo` with these bytes typed.
fn record_echo(directory: &TempDir, file: &str, typed: &str) -> Value {
    fs::write(directory.path().join("typed"), typed).expect("written");
    let arguments =
        ["record", "--image", "echo", "--engine", "soft", "--input", "typed", "-o", file];
    let (status, report) = json(directory, &arguments);
    assert_eq!(status, 0, "{report}");
    report
}

#[test]
fn a_recording_replays_to_the_same_digests_elsewhere() {
    let directory = directory();
    let recorded = record_echo(&directory, "a.rr", "hello\nquit\n");
    let elsewhere = self::directory();
    fs::copy(directory.path().join("a.rr"), elsewhere.path().join("b.rr")).expect("copied");
    let (status, replayed) = json(&elsewhere, &["replay", "b.rr"]);
    assert_eq!(status, 0, "{replayed}");
    assert_eq!(replayed["verified"], Value::Bool(true));
    assert_eq!(replayed["complete"], Value::Bool(true));
    assert_eq!(replayed["divergence"], Value::Null);
    for field in ["final_digest", "console_digest", "ticks", "events", "log_bytes", "ending"] {
        assert_eq!(recorded[field], replayed[field], "{field}");
        assert!(!recorded[field].is_null(), "{field}");
    }
    let (status, info) = json(&elsewhere, &["info", "b.rr"]);
    assert_eq!(status, 0);
    for field in ["final_digest", "console_digest", "ticks", "instructions", "log_bytes"] {
        assert_eq!(recorded[field], info[field], "{field}");
    }
    let shown = run(&elsewhere, &["replay", "b.rr", "--show-console"]);
    assert!(String::from_utf8_lossy(&shown.stdout).contains("echo: 11 bytes"), "{shown:?}");
}

#[test]
fn a_replay_stops_where_it_is_told() {
    let directory = directory();
    record_echo(&directory, "a.rr", "hello\nquit\n");
    let (status, report) = json(&directory, &["replay", "a.rr", "--until", "1000"]);
    assert_eq!((status, &report["ending"]), (0, &Value::from("target-reached")));
    assert_eq!(report["ticks"], Value::from(1000));
    assert!(report["bytes_per_kiloinstruction"].is_null(), "the log is the whole run's: {report}");
    let told = |until| {
        let output = run(&directory, &["replay", "a.rr", "--until", until]);
        assert!(output.status.success());
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    };
    assert!(told("1").contains("before the first event"), "{}", told("1"));
    let beyond = told("1000000000");
    assert!(beyond.contains("the recording ends at tick"), "{beyond}");
    assert!(beyond.contains("verified to the end"), "{beyond}");
}

#[test]
fn record_tells_where_the_recording_is() {
    let directory = directory();
    let output = run(&directory, &["record", "--image", "hello", "-o", "a.rr"]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("reprise replay a.rr"), "{stderr}");
}

#[test]
fn run_reports_what_record_reports() {
    let directory = directory();
    let guest = ["--image", "hello", "--engine", "soft"];
    let (status, ran) = json(&directory, &[&["run"], &guest[..]].concat());
    assert_eq!(status, 0, "{ran}");
    let arguments = [&["record"], &guest[..], &["-o", "a.rr"]].concat();
    let (_, recorded) = json(&directory, &arguments);
    for field in ["console_digest", "instructions", "ending"] {
        assert_eq!(ran[field], recorded[field], "{field}");
    }
    assert_eq!(ran["log_bytes"], Value::Null);
    let shown = run(&directory, &[&["run"], &guest[..]].concat());
    assert_eq!(shown.stdout, b"Hello from a bare-metal guest.\r\n");
}

#[test]
fn diff_names_the_first_place_that_differs() {
    let directory = directory();
    record_echo(&directory, "a.rr", "hello\nquit\n");
    record_echo(&directory, "b.rr", "hallo\nquit\n");
    let (status, same) = json(&directory, &["diff", "a.rr", "a.rr"]);
    assert_eq!((status, &same["same"]), (0, &Value::Bool(true)));
    let (status, report) = json(&directory, &["diff", "a.rr", "b.rr"]);
    assert_eq!((status, &report["same_log"]), (0, &Value::Bool(false)));
    assert!(report["first_difference"]["text"].is_string(), "{report}");
}

#[test]
fn the_debug_exit_port_sets_the_status() {
    let directory = directory();
    let arguments =
        ["run", "--image", "misbehave", "--cmdline", "do=debug-exit", "--engine", "soft"];
    let (status, report) = json(&directory, &arguments);
    assert_eq!((status, &report["ending"]), (33, &Value::from("debug-exit")));
    assert_eq!(report["exit_code"], Value::from(33));
}

#[test]
fn misbehaving_guests_end_in_a_defined_way_and_replay() {
    let directory = directory();
    for (what, ending) in [
        ("triple-fault", "triple-fault"),
        ("halt", "power-off"),
        ("absent", "reset"),
        ("wild-jump-no-idt", "triple-fault"),
        ("wild-page-tables", "triple-fault"),
    ] {
        let file = format!("{what}.rr");
        let cmdline = format!("do={what}");
        let (status, report) = json(
            &directory,
            &["record", "--image", "misbehave", "--cmdline", &cmdline, "-o", &file],
        );
        assert_eq!((status, &report["ending"]), (0, &Value::from(ending)), "{what}");
        let (status, report) = json(&directory, &["replay", &file]);
        assert_eq!((status, &report["verified"]), (0, &Value::Bool(true)), "{what}");
    }
}

#[test]
fn an_existing_file_is_not_overwritten() {
    let directory = directory();
    fs::write(directory.path().join("mine"), "precious").expect("written");
    let arguments = ["record", "--image", "hello", "-o", "mine"];
    assert!(failure(&directory, &arguments, 1).contains("--force"));
    assert_eq!(fs::read(directory.path().join("mine")).expect("there"), b"precious");
    let forced = run(&directory, &[&arguments[..], &["--force"]].concat());
    assert!(forced.status.success());
}

#[test]
fn wrong_use_has_status_2() {
    let directory = directory();
    for arguments in [
        &["run"][..],
        &["record", "--image", "hello"],
        &["run", "--image", "hello", "--memory", "3"],
        &["replay"],
        &["frobnicate"],
        &["run", "--image", "hello", "--engine", "soft", "--clock", "step"],
    ] {
        assert_eq!(run(&directory, arguments).status.code(), Some(2), "{arguments:?}");
    }
}

#[test]
fn what_cannot_boot_is_refused_in_one_line() {
    let directory = directory();
    let path = |name: &str| directory.path().join(name);
    fs::write(path("empty"), "").expect("written");
    fs::write(path("text"), "not a kernel\n").expect("written");
    fs::write(path("elf"), b"\x7fELF\x02\x01\x01\0").expect("written");
    for (kernel, expected) in [
        ("absent", "cannot read --kernel absent"),
        ("empty", "empty"),
        ("text", "a text file"),
        ("elf", "truncated"),
        (".", "--kernel . is a directory"),
        ("/dev/null", "device"),
    ] {
        let reason = failure(&directory, &["run", "--kernel", kernel], 1);
        assert!(reason.contains(expected), "{reason}");
        let recorded = run(&directory, &["record", "--kernel", kernel, "-o", "x.rr"]);
        assert_eq!(recorded.status.code(), Some(1));
        assert!(!path("x.rr").exists(), "a guest that cannot start leaves no recording");
    }
    let reason = failure(&directory, &["run", "--image", "nothing"], 1);
    assert!(reason.contains("hello"), "{reason}");
    let reason = failure(&directory, &["run", "--image", "hello", "--input", "absent"], 1);
    assert!(reason.contains("absent"), "{reason}");
}

#[test]
fn what_is_no_recording_is_refused_in_one_line() {
    let directory = directory();
    fs::write(directory.path().join("empty"), "").expect("written");
    fs::write(directory.path().join("text"), "not a recording\n").expect("written");
    record_echo(&directory, "whole.rr", "quit\n");
    for file in ["absent", "empty", "text", ".", "/dev/null"] {
        for arguments in [&["replay", file][..], &["info", file], &["diff", file, "whole.rr"]] {
            failure(&directory, arguments, 1);
        }
        let (status, report) = json(&directory, &["info", file]);
        assert_eq!(status, 1);
        assert!(report["error"].is_string(), "{report}");
    }
}

/// Every command ends with a defined status, whatever the file.
fn check_broken(directory: &TempDir, file: &str, what: &str) {
    for arguments in [&["replay", file][..], &["info", file], &["diff", file, "whole.rr"]] {
        let output = run(directory, arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        let status = output.status.code();
        assert!(matches!(status, Some(0 | 1)), "{what} {arguments:?}: {status:?} {stderr}");
        assert!(!stderr.contains("internal error"), "{what} {arguments:?}: {stderr}");
        assert!(
            status == Some(0) || stderr.lines().any(|line| line.starts_with("reprise: ")),
            "{what} {arguments:?}: no reason given"
        );
    }
}

#[test]
fn broken_recordings_end_in_a_reason() {
    let directory = directory();
    record_echo(&directory, "whole.rr", "hello\nquit\n");
    let whole = fs::read(directory.path().join("whole.rr")).expect("there");
    let broken = directory.path().join("broken.rr");
    // The format's own tests cut at every byte; these are for what the commands make of it.
    let cuts = (0..whole.len()).step_by(whole.len() / 12);
    for cut in cuts.chain(whole.len().saturating_sub(80)..whole.len()).step_by(3) {
        fs::write(&broken, &whole[..cut]).expect("written");
        check_broken(&directory, "broken.rr", &format!("cut at {cut}"));
    }
    let seed = 0x2545_f491_4f6c_dd1d_u64;
    println!("seed {seed:#x}");
    let mut random = seed;
    for _ in 0..20 {
        random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        let at = (random >> 20) as usize % whole.len();
        let mut flipped = whole.clone();
        flipped[at] ^= 1 << (random >> 60 & 7);
        fs::write(&broken, &flipped).expect("written");
        check_broken(&directory, "broken.rr", &format!("flip at {at}"));
        let output = run(&directory, &["info", "broken.rr"]);
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(!output.status.success() || text.contains("damaged"), "flip at {at}: {text}");
    }
}

#[test]
fn a_full_disk_stops_the_recording_with_a_reason() {
    let directory = directory();
    let reason =
        failure(&directory, &["record", "--image", "hello", "-o", "/dev/full", "--force"], 1);
    assert!(reason.contains("No space left"), "{reason}");
}

/// Starts to record a guest that never ends, and waits until its log has begun.
fn record_for_ever(directory: &TempDir) -> Child {
    let arguments = ["record", "--image", "misbehave", "--cmdline", "do=spin", "-o", "a.rr"];
    let child = spawn(&mut reprise(directory, &arguments));
    let file = directory.path().join("a.rr");
    let bytes = || fs::metadata(&file).map_or(0, |metadata| metadata.len());
    let (began, mut before) = (Instant::now(), 0);
    // The images come at once, the log's frames a quarter of a second apart.
    while before == 0 || bytes() <= before {
        assert!(began.elapsed() < TIME_LIMIT, "nothing was recorded");
        before = bytes();
        std::thread::sleep(Duration::from_millis(100));
    }
    child
}

fn send(child: &Child, signal: &str) {
    let sent = Command::new("kill").args([signal, &child.id().to_string()]).status();
    assert!(sent.expect("kill runs").success());
}

#[test]
fn a_signal_closes_the_recording() {
    for signal in ["-INT", "-TERM", "-HUP"] {
        let directory = directory();
        let child = record_for_ever(&directory);
        send(&child, signal);
        let output = finish(child);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let (status, report) = json(&directory, &["replay", "a.rr"]);
        assert_eq!((status, &report["complete"]), (0, &Value::Bool(true)), "{report}");
        assert_eq!(report["ending"], Value::from("stopped"));
        assert!(report["final_digest"].is_string());
    }
}

#[test]
fn a_killed_recording_replays_up_to_its_last_frame() {
    let directory = directory();
    let mut child = record_for_ever(&directory);
    std::thread::sleep(Duration::from_millis(600));
    child.kill().expect("it runs");
    let _ = finish(child);
    let (status, report) = json(&directory, &["replay", "a.rr"]);
    assert_eq!(status, 0, "{report}");
    assert_eq!(report["complete"], Value::Bool(false));
    assert_eq!(report["verified"], Value::Bool(true));
    assert!(report["events"].as_u64() >= Some(2), "{report}");
    let output = run(&directory, &["info", "a.rr"]);
    assert!(String::from_utf8_lossy(&output.stdout).contains("cut short"), "{output:?}");
}

#[test]
fn console_output_goes_where_it_is_sent() {
    let directory = directory();
    let (status, _) = json(&directory, &["run", "--image", "hello", "--console", "out"]);
    assert_eq!(status, 0);
    let written = fs::read(directory.path().join("out")).expect("there");
    assert_eq!(written, b"Hello from a bare-metal guest.\r\n");
}

#[test]
fn standard_input_is_typed_when_asked() {
    let directory = directory();
    fs::write(directory.path().join("typed"), "quit\n").expect("written");
    let typed = File::open(directory.path().join("typed")).expect("there");
    let arguments = ["run", "--image", "echo", "--engine", "soft", "--input", "-"];
    let output = finish(spawn(reprise(&directory, &arguments).stdin(typed)));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("echo: 5 bytes"), "{text}");
}
