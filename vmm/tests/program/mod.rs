//! Runs the program in a directory of the test's own.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::fs;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

/// The program, its standard input empty.
pub(crate) fn reprise(directory: &TempDir, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_reprise"));
    command.current_dir(directory).args(arguments).stdin(Stdio::null());
    command
}

pub(crate) fn run(directory: &TempDir, arguments: &[&str]) -> Output {
    reprise(directory, arguments).output().expect("the command runs")
}

/// Status, and the one object on standard output.
pub(crate) fn json(directory: &TempDir, arguments: &[&str]) -> (i32, Value) {
    let output = run(directory, &[&["--json"], arguments].concat());
    let object = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{arguments:?}: {error}: {output:?}"));
    (output.status.code().expect("it exits"), object)
}

/// Names in the directory.
pub(crate) fn names(directory: &TempDir) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("can be read");
    let names = entries.map(|entry| entry.expect("an entry").file_name());
    let mut names: Vec<_> = names.map(|name| name.to_string_lossy().into_owned()).collect();
    names.sort();
    names
}
