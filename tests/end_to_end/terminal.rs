//! The live console: keys go to the guest, and the escape key ends the run. `script` gives the
//! product a terminal.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::program::{BINARY, Workplace, replay};

const TIME_LIMIT: Duration = Duration::from_secs(60);

/// Reads until `text` has come, and gives everything read.
fn read_until(output: &mut impl Read, text: &str, seen: &mut String) {
    let deadline = Instant::now() + TIME_LIMIT;
    let mut piece = [0; 1024];
    while !seen.contains(text) {
        let count = output.read(&mut piece).expect("the terminal's output");
        assert!(count > 0 && Instant::now() < deadline, "no {text:?} in {seen:?}");
        seen.push_str(&String::from_utf8_lossy(&piece[..count]));
    }
}

#[test]
fn the_console_is_live_and_the_escape_key_stops_the_run() {
    let workplace = Workplace::new();
    let file = workplace.path("live.rr");
    let command = format!(
        "stty sane; {BINARY} record --engine soft --image echo -o {file}; echo status $?; stty -a"
    );
    let spawned = Command::new("script")
        .args(["-qfc", &command, "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut script) = spawned else {
        eprintln!("skipped: script(1) is not installed");
        return;
    };
    let mut keyboard = script.stdin.take().expect("stdin is piped");
    let mut output = script.stdout.take().expect("stdout is piped");
    let mut seen = String::new();
    read_until(&mut output, "> ", &mut seen);
    // Ctrl-C is a key like any other; `echo` shows only what can be printed.
    keyboard.write_all(b"live\x03 keys\r").expect("the terminal takes keys");
    keyboard.flush().expect("the terminal takes keys");
    read_until(&mut output, "keys\r\n", &mut seen);
    keyboard.write_all(b"\x1d").expect("the terminal takes keys");
    keyboard.flush().expect("the terminal takes keys");
    read_until(&mut output, "status 0", &mut seen);
    // Whoever was in raw mode has given the terminal back.
    read_until(&mut output, "iexten", &mut seen);
    let settings = &seen[seen.find("status 0").expect("it was read")..];
    for setting in [" isig", " icanon", " echo", " icrnl"] {
        let holds = settings.replace([';', '\r', '\n'], " ").contains(setting);
        assert!(holds, "{setting} is off in {settings}");
    }
    drop(keyboard);
    assert!(script.wait().expect("script can be waited for").success());
    assert!(seen.contains("Ctrl-]"), "the escape key was not told: {seen:?}");
    let replayed = replay(&file, &[]);
    assert_eq!(replayed["ending"], "stopped", "{replayed:#}");
}
