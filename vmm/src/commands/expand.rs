//! `reprise expand`: every instruction of a recording, or of a window of it.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};
use reprise_expand::{Control, Window};
use reprise_export::Format;
use reprise_host::StopRequests;

use reprise_trace::instructions::Contents;

use crate::cli::ExpandArgs;
use crate::output::{Output, progress_shows};
use crate::session::expand::{ExpandOptions, Target, expand_recording, tick_of};
use crate::session::replay::{self, At};
use crate::session::trace_file::place;

/// How often the bar moves.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// Expands a recording.
///
/// # Errors
/// The recording cannot be used, or the trace cannot be written.
pub fn run(arguments: &ExpandArgs, output: Output) -> Result<u8> {
    let replayable = replay::open_replayable(&arguments.file)?;
    let recording = replayable.recording();
    for note in replayable.notes() {
        output.note(note);
    }
    let control = Control::default();
    let _stop = StopRequests::watch(control.stop_flag())?;
    let soft = arguments.soft.options();
    let tick = |at: Option<At>, otherwise| match at {
        Some(at) => tick_of(&replayable, at, soft),
        None => Ok(otherwise),
    };
    let (from, to) = (tick(arguments.from, 0)?, tick(arguments.to, u64::MAX)?);
    let options = ExpandOptions {
        target: target(arguments)?,
        window: Window { from, to },
        contents: Contents { physical: !arguments.no_physical, values: false, registers: false },
        selection: arguments.filters.selection(),
        filters: arguments.filters.as_given(),
        jobs: arguments.jobs.map_or_else(available_jobs, |jobs| jobs as usize),
        segment: arguments.segment,
        soft,
    };
    let last_tick = recording.summary().last_moment.map(|moment| moment.tick);
    let bar = output
        .instruction_bar("expanding", last_tick.map(|tick| tick.min(to).saturating_sub(from)));
    let watched = control.clone();
    let (over, until_over) = std::sync::mpsc::channel::<()>();
    let progress = progress_shows().then(|| {
        std::thread::spawn(move || {
            use std::sync::mpsc::RecvTimeoutError::Timeout;
            while until_over.recv_timeout(PROGRESS_INTERVAL) == Err(Timeout) {
                bar.set_position(watched.instructions());
            }
            bar.finish_and_clear();
        })
    });
    let report = expand_recording(&replayable, options, &control);
    drop(over);
    if let Some(progress) = progress {
        // It only waits for the channel's end.
        let _ = progress.join();
    }
    let report = report?;
    if arguments.output.as_deref() == Some(Path::new("-")) {
        output.note(report.to_table());
    } else {
        output.result(&report, report.to_table());
    }
    Ok(u8::from(report.verified == Some(false)))
}

fn available_jobs() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn target(arguments: &ExpandArgs) -> Result<Target> {
    let Some(path) = &arguments.output else {
        if arguments.format.is_some() {
            bail!("say where the trace goes: -o FILE, or -o - for a pipe");
        }
        return Ok(Target::Discard);
    };
    let to = place(path, arguments.force)?;
    let format = match arguments.format.as_deref() {
        None => Format::of(path),
        Some("reprise") => None,
        Some(name) => Some(Format::named(name)?),
    };
    let options = arguments.export.options();
    Ok(match format {
        None => Target::Native(to),
        Some(format) => Target::Export { format, options, to },
    })
}
