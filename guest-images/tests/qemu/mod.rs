//! QEMU as an independent machine to run the guests on.

mod machine;

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use machine::{MACHINE, QEMU};

/// What a run came to.
pub(crate) struct Run {
    /// Everything that came out of the console.
    pub(crate) console: String,
    /// `None`: it had to be stopped at the time limit.
    pub(crate) status: Option<ExitStatus>,
}

/// Whether QEMU is here; says so if not.
pub(crate) fn qemu_is_here() -> bool {
    let here = Command::new(QEMU).arg("--version").output().is_ok();
    if !here {
        eprintln!("skipped: {QEMU} is not installed");
    }
    here
}

/// Runs a kernel until it ends the machine or the time is up. Each step of `script` waits for a text
/// on the console, then types another.
pub(crate) fn run(
    kernel: &Path,
    arguments: &[&str],
    script: &[(&str, &str)],
    time_limit: Duration,
) -> Run {
    let mut child = Command::new(QEMU)
        .args(MACHINE)
        .arg("-kernel")
        .arg(kernel)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .expect("QEMU starts");
    let mut keyboard = child.stdin.take().expect("stdin is piped");
    let pieces = read_in_background(child.stdout.take().expect("stdout is piped"));
    let deadline = Instant::now() + time_limit;
    let mut console = Vec::new();
    let mut seen = 0;
    for (awaited, typed) in script {
        let Some(end) = wait_for(awaited, &pieces, &mut console, seen, deadline) else { break };
        seen = end;
        // A machine that has already ended shows in what the caller checks.
        let _ = keyboard.write_all(typed.as_bytes()).and_then(|()| keyboard.flush());
    }
    while receive(&pieces, &mut console, deadline) {}
    let status = if Instant::now() < deadline {
        Some(child.wait().expect("QEMU can be waited for"))
    } else {
        child.kill().expect("QEMU can be killed");
        child.wait().expect("QEMU can be waited for");
        None
    };
    Run { console: String::from_utf8_lossy(&console).into_owned(), status }
}

fn read_in_background(mut output: impl Read + Send + 'static) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut piece = [0; 4096];
        while let Ok(count @ 1..) = output.read(&mut piece) {
            if sender.send(piece[..count].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}

/// Takes one more piece of output; false at its end, or when the time is up.
fn receive(pieces: &Receiver<Vec<u8>>, console: &mut Vec<u8>, deadline: Instant) -> bool {
    match pieces.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        Ok(piece) => {
            console.extend(piece);
            true
        }
        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => false,
    }
}

/// Waits for `text` at or after `from`; where it ends.
fn wait_for(
    text: &str,
    pieces: &Receiver<Vec<u8>>,
    console: &mut Vec<u8>,
    from: usize,
    deadline: Instant,
) -> Option<usize> {
    loop {
        let mut windows = console[from..].windows(text.len());
        if let Some(at) = windows.position(|window| window == text.as_bytes()) {
            return Some(from + at + text.len());
        }
        if !receive(pieces, console, deadline) {
            return None;
        }
    }
}
