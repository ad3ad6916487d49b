//! A panic, wherever it happens, is one line and status 1. The test's own binary is started again
//! as the process that has the defect.

use std::io::{self, Write};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use reprise::defect::end_with_one_line;
use reprise_host::{HostOptions, InputSource, RealHost, end_on_panic};
use reprise_machine::engine::FlagKick;

/// Tells the child which defect it has.
const DEFECT: &str = "REPRISE_TEST_DEFECT";

/// Called as the software CPU's handlers are: nothing unwinds through it.
extern "sysv64" fn handler() {
    panic!("two\nlines");
}

fn wait_for_ever() -> ! {
    loop {
        thread::park();
    }
}

/// Not a test of its own: the process with the defect.
#[test]
fn process_with_a_defect() {
    let Ok(defect) = std::env::var(DEFECT) else {
        return;
    };
    end_with_one_line(defect.starts_with("json"));
    match defect.as_str() {
        "handler" => handler(),
        "worker" => {
            thread::spawn(|| handler());
            wait_for_ever();
        }
        "everywhere" => {
            end_on_panic(1, |_| {
                eprintln!("told");
                thread::sleep(Duration::from_millis(200));
            });
            let together = Arc::new(Barrier::new(4));
            for _ in 0..4 {
                let together = Arc::clone(&together);
                thread::spawn(move || {
                    together.wait();
                    handler();
                });
            }
            wait_for_ever();
        }
        "json-streams-locked" => {
            let _out = io::stdout().lock();
            let _err = io::stderr().lock();
            thread::spawn(|| handler());
            wait_for_ever();
        }
        "terminal" => {
            let options = HostOptions { input: InputSource::Terminal, ..HostOptions::default() };
            let _host = RealHost::start(options, Arc::new(FlagKick::default())).expect("a host");
            thread::spawn(|| handler());
            wait_for_ever();
        }
        other => unreachable!("no such defect: {other}"),
    }
}

/// The words that start the process with the defect.
fn words() -> [String; 4] {
    let program = std::env::current_exe().expect("this test is a file");
    let program = program.to_str().expect("its path is text").to_owned();
    [program, "--exact".into(), "process_with_a_defect".into(), "--nocapture".into()]
}

fn suffer(defect: &str) -> Output {
    let [program, arguments @ ..] = words();
    Command::new(program)
        .args(arguments)
        .env(DEFECT, defect)
        .output()
        .expect("the test starts again")
}

#[test]
fn a_panic_is_one_line_and_status_1() {
    for defect in ["handler", "worker", "json-streams-locked"] {
        let output = suffer(defect);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{defect}: {} {stderr}", output.status);
        assert_eq!(stderr.lines().count(), 1, "{defect}: {stderr}");
        for part in ["reprise: ", "defect in Reprise", "tests/defect.rs:", "two; lines", "report"] {
            assert!(stderr.contains(part), "{defect}: {part:?} is not in {stderr}");
        }
        // The test harness has begun to speak before the defect.
        let stdout = String::from_utf8_lossy(&output.stdout);
        let object = stdout.find('{').map(|at| serde_json::from_str(&stdout[at..]));
        match object {
            Some(object) => {
                let object: serde_json::Value = object.expect("one JSON object, and no more");
                assert_eq!(
                    format!("reprise: {}", object["error"].as_str().unwrap()),
                    stderr.trim()
                );
            }
            None => assert!(!defect.starts_with("json"), "{stdout}"),
        }
    }
}

#[test]
fn of_many_panics_one_is_told() {
    let output = suffer("everywhere");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!(output.stderr, b"told\n", "{output:?}");
}

#[test]
fn a_panic_gives_the_terminal_back() {
    let command = format!("stty sane; {}; echo status $?; stty -a", words().join(" "));
    let script = Command::new("script")
        .args(["-qfc", &command, "/dev/null"])
        .env(DEFECT, "terminal")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let Ok(mut script) = script else {
        eprintln!("skipped: script(1) is not installed");
        return;
    };
    // A terminal whose keyboard is gone would end the test's process in another way.
    let mut keyboard = script.stdin.take().expect("a pipe");
    keyboard.flush().expect("nothing to write");
    let output = script.wait_with_output().expect("script ends");
    let seen = String::from_utf8_lossy(&output.stdout);
    let settings = &seen[seen.find("status 1").unwrap_or_else(|| panic!("{seen:?}"))..];
    for setting in [" isig", " icanon", " echo", " icrnl"] {
        let holds = settings.replace([';', '\r', '\n'], " ").contains(setting);
        assert!(holds, "{setting} is off in {settings}");
    }
    assert!(seen.contains("defect in Reprise"), "{seen:?}");
}
