//! `reprise record`: the machine while it is recorded.

use anyhow::{Result, bail};

use super::run::{conclude, obtain, plan};
use crate::cli::RecordArgs;
use crate::output::Output;
use crate::session::file_kind::are_one_file;
use crate::session::record::{self, RecordTo};

/// Said of a recording that has gone from one engine to another.
const NOT_TRAPPED: &str = "where a run moves between engines RDTSC is not trapped: a guest that reads it on kvm may not replay; \
     `reprise info` says what was open";

/// Records a guest.
///
/// # Errors
/// Whatever kept it from running or from being recorded.
pub fn run(arguments: &RecordArgs, output: Output) -> Result<u8> {
    let to = RecordTo {
        path: arguments.output.clone(),
        force: arguments.force,
        checkpoints: arguments.checkpoint_every,
    };
    to.check()?;
    for (option, path) in
        [("--console", &arguments.machine.console), ("--input", &arguments.machine.input)]
    {
        if path.as_ref().is_some_and(|path| are_one_file(path, &to.path)) {
            bail!("{option} and -o are one file: give another name to one of them");
        }
    }
    let guest = obtain(&arguments.guest, output)?;
    let plan = plan(&guest, &arguments.machine, output)?;
    let report = record::record(plan, &to)?;
    let status = conclude(&report, output)?;
    // An engine's failure is the last word: its reason is one line.
    if report.ending != "engine-failed" {
        let shown = to.path.display();
        output.note(format_args!("recorded in {shown}; `reprise replay {shown}` runs it again"));
    }
    let stretches = &report.stretches;
    if stretches.len() > 1 && stretches.iter().any(|stretch| stretch.engine != "soft") {
        output.note(NOT_TRAPPED);
    }
    let checkpoints = report.checkpoints.as_ref();
    if let Some(failure) = checkpoints.and_then(|checkpoints| checkpoints.failure.as_ref()) {
        output.note(format_args!("{failure}; the recording is not concerned"));
    }
    Ok(status)
}
