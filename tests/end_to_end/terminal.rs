//! The live console: keys go to the guest, and the escape key ends the run. `script` gives the
//! product a terminal.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use crate::program::{BINARY, Workplace, replay};

const TIME_LIMIT: Duration = Duration::from_secs(60);

/// What a terminal shows, read by a thread, so that a wait for it can end.
struct Screen {
    pieces: Receiver<Vec<u8>>,
    seen: String,
}

impl Screen {
    fn of(mut output: impl Read + Send + 'static) -> Self {
        let (sender, pieces) = channel();
        std::thread::spawn(move || {
            let mut piece = [0; 1024];
            while let Ok(count @ 1..) = output.read(&mut piece) {
                if sender.send(piece[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self { pieces, seen: String::new() }
    }

    /// Waits until `text` has been shown.
    fn wait_for(&mut self, text: &str) {
        while !self.seen.contains(text) {
            match self.pieces.recv_timeout(TIME_LIMIT) {
                Ok(piece) => self.seen.push_str(&String::from_utf8_lossy(&piece)),
                Err(error) => panic!("no {text:?} in {:?}: {error}", self.seen),
            }
        }
    }
}

/// The process that gives the terminal, ended with the test.
struct Terminal(Child);

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
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
    let Ok(script) = spawned else {
        reprise_tests::skipped::skipped("script(1) is not installed");
        return;
    };
    let mut script = Terminal(script);
    let mut keyboard = script.0.stdin.take().expect("stdin is piped");
    let mut screen = Screen::of(script.0.stdout.take().expect("stdout is piped"));
    screen.wait_for("> ");
    // Ctrl-C is a key like any other; `echo` shows only what can be printed.
    keyboard.write_all(b"live\x03 keys\r").expect("the terminal takes keys");
    keyboard.flush().expect("the terminal takes keys");
    screen.wait_for("keys\r");
    keyboard.write_all(b"\x1d").expect("the terminal takes keys");
    keyboard.flush().expect("the terminal takes keys");
    screen.wait_for("status 0");
    // Whoever was in raw mode has given the terminal back.
    screen.wait_for("extproc");
    let seen = &screen.seen;
    let settings = &seen[seen.find("status 0").expect("it was read")..];
    for setting in [" isig", " icanon", " echo", " icrnl"] {
        let holds = settings.replace([';', '\r', '\n'], " ").contains(setting);
        assert!(holds, "{setting} is off in {settings}");
    }
    drop(keyboard);
    assert!(script.0.wait().expect("script can be waited for").success());
    assert!(seen.contains("Ctrl-]"), "the escape key was not told: {seen:?}");
    let replayed = replay(&file, &[]);
    assert_eq!(replayed["ending"], "stopped", "{replayed:#}");
}
