//! What a person reads when Reprise itself is at fault: one line, and the process ends.
//!
//! A panic is not caught: the software CPU's handlers are called from generated code, which nothing
//! unwinds through, and a panic on a worker thread would leave the others waiting for it. What the
//! recording's file holds at that moment are whole frames, and perhaps a part of one, which replay.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::PanicHookInfo;

use reprise_host::end_on_panic;

use crate::cli::FAILED;
use crate::output::one_line;

/// From here on a panic on any thread is told in one line on standard error, with `json` also as an
/// object on standard output, and ends the process with status 1 and the terminal as it was found.
pub fn end_with_one_line(json: bool) {
    end_on_panic(FAILED, move |info| tell(info, json));
}

fn tell(info: &PanicHookInfo<'_>, json: bool) {
    let line = line(info);
    // Behind whatever a guest or a progress bar has left on the terminal's line.
    let line_end = if io::stderr().is_terminal() { "\n" } else { "" };
    write_unlocked(io::stderr().as_fd(), &format!("{line_end}reprise: {line}\n"));
    if json {
        let object = serde_json::json!({ "error": line });
        write_unlocked(io::stdout().as_fd(), &format!("{object:#}\n"));
    }
}

/// What it is, where, and what to do.
fn line(info: &PanicHookInfo<'_>) -> String {
    let place = info.location().map_or_else(|| "an unknown place".to_owned(), ToString::to_string);
    let reason = one_line(info.payload_as_str().unwrap_or("no reason given"));
    format!(
        "this is a defect in Reprise: at {place}: {reason}; please report this line with the \
         command that you gave (a recording that was being made replays up to its last whole frame)"
    )
}

/// Writes past the standard streams' locks: the thread that panicked may hold them, and so may one
/// that waits for its reader.
fn write_unlocked(stream: BorrowedFd<'_>, text: &str) {
    if let Ok(descriptor) = stream.try_clone_to_owned() {
        let _ = File::from(descriptor).write_all(text.as_bytes());
    }
}
