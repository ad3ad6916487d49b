//! `reprise checkpoint`: adds checkpoints to a recording by replaying it.

use anyhow::{Result, bail};
use reprise_replay::time_source;
use serde::Serialize;

use super::replay::{bar, failure, verdict};
use crate::cli::CheckpointArgs;
use crate::output::{Output, progress_shows, table};
use crate::session::checkpoints::{self, CheckpointReport};
use crate::session::choice::{self, EngineArg};
use crate::session::replay::{self, ReplayOptions};
use crate::session::report::SessionReport;

/// What the command came to.
#[derive(Debug, Serialize)]
struct AddedReport {
    added: CheckpointReport,
    /// Checkpoints that can be started from now.
    total: usize,
    replay: SessionReport,
}

/// Adds checkpoints.
///
/// # Errors
/// The recording cannot be used at all, or its checkpoints cannot be written.
pub fn run(arguments: &CheckpointArgs, output: Output) -> Result<u8> {
    let replayable = replay::open_replayable(&arguments.file)?;
    let recording = replayable.recording();
    let header = recording.header();
    // Only the software CPU's checkpoints hold an instruction count, which expansion needs.
    choice::for_replay(EngineArg::Soft, header, |_| false)?;
    let Some(every) = arguments.every.every(time_source(header), checkpoints::default_ticks())
    else {
        bail!("--every: give ticks (500000000) or seconds (2s)");
    };
    replayable.notes().iter().for_each(|note| output.note(note));
    let (checkpointer, thread) = checkpoints::of_replay(&replayable, &arguments.file, every)?;
    let options = ReplayOptions {
        engine: EngineArg::Soft,
        soft: arguments.soft.options(),
        checkpointer: Some(checkpointer),
        progress: progress_shows().then(|| bar("replaying", recording, output)),
        ..ReplayOptions::default()
    };
    let replayed = replay::replay(&replayable, options);
    let mut totals = thread.finish();
    if let Some(failure) = totals.failure.take() {
        return Err(failure.into());
    }
    let replayed = replayed?;
    replayed.notes.iter().for_each(|note| output.note(note));
    let report = AddedReport {
        // A replay waits for its checkpoints: how long tells nothing.
        added: CheckpointReport { longest_stop_ms: None, ..totals.into() },
        total: replay::open_replayable(&arguments.file)?.checkpoints().len(),
        replay: replayed.report,
    };
    let rows = [
        ("added", report.added.to_text()),
        ("checkpoints", report.total.to_string()),
        ("replay", verdict(&report.replay)),
    ];
    output.result(&report, table(&rows))?;
    if report.replay.verified == Some(false) {
        output.note(failure(&report.replay));
    }
    Ok(report.replay.exit_code)
}
