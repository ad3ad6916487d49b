//! What a test says that cannot be run here.

use std::fmt::Display;
use std::io::Write;

/// Says it to whoever runs the tests, past the harness, which keeps to itself what a test prints that passes.
pub fn skipped(reason: impl Display) {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    // One write, or the lines of tests that run at once are mixed.
    let line = format!("skipped: {reason} ({test})\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// What is said where nothing counts conditional branches, and why.
pub fn skipped_without_pmu(reason: &str) {
    skipped(format_args!("no PMU: {reason}"));
}
