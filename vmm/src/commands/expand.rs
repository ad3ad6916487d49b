//! `reprise expand`: every instruction of a recording, or of a window of it.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail};
use reprise_expand::{Control, Window};
use reprise_export::{Format, foreign_setting};
use reprise_host::StopRequests;
use reprise_replay::checkpoints_path;

use reprise_trace::instructions::Contents;

use crate::cli::ExpandArgs;
use crate::output::{Output, progress_shows, seconds};
use crate::session::expand::{ExpandOptions, Located, Target, expand_recording, locate};
use crate::session::replay::{self, At};
use crate::session::trace_file::{is_no_input, place};
use crate::session::trace_target::{WrongUse, format_of, with_remedy};

/// Parts of the way to a window that a bar shows.
const PARTS: u64 = 1000;
/// How often the bar moves.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// Expands a recording.
///
/// # Errors
/// The recording cannot be used, or the trace cannot be written.
pub fn run(arguments: &ExpandArgs, output: Output) -> Result<u8> {
    let format = check_use(arguments, output)?;
    let replayable = replay::open_replayable(&arguments.file)?;
    let recording = replayable.recording();
    recording.summary().end_note().into_iter().for_each(|note| output.note(note));
    for note in replayable.notes() {
        output.note(note);
    }
    let control = Control::default();
    let _stop = StopRequests::watch(control.stop_flag())?;
    let last_tick = recording.summary().last_moment.map(|moment| moment.tick);
    let instructions = AtomicU64::new(last_tick.unwrap_or(0));
    let report = with_progress(output, &control, &instructions, || {
        let soft = arguments.soft.options();
        let find = |at: At| locate(&replayable, at, soft, &control);
        let from = match arguments.from.map(find).transpose()? {
            Some(Located::At(tick)) => tick,
            Some(Located::BehindTheEnd(end_ns)) => {
                bail!("{}: give an earlier --from", ends_at(end_ns));
            }
            None => 0,
        };
        let to = match arguments.to.map(find).transpose()? {
            Some(Located::At(tick)) => tick,
            Some(Located::BehindTheEnd(end_ns)) => {
                output.note(format_args!("{}, before --to: expanded to its end", ends_at(end_ns)));
                u64::MAX
            }
            None => u64::MAX,
        };
        if let Some(last) = last_tick {
            instructions.store(last.min(to).saturating_sub(from), Ordering::Relaxed);
        }
        let options = options(arguments, format, Window { from, to })?;
        expand_recording(&replayable, options, &control).map_err(with_remedy)
    })?;
    if arguments.output.as_deref() == Some(Path::new("-")) {
        output.note(report.to_table());
    } else {
        output.result(&report, report.to_table())?;
    }
    if let Some(failure) = report.failure() {
        output.note(format_args!("{}: {failure}", arguments.file.display()));
        return Ok(1);
    }
    Ok(0)
}

/// The format that is asked for, if a trace is.
///
/// # Errors
/// The arguments do not go together: [`WrongUse`]; or the trace would go where the recording is.
fn check_use(arguments: &ExpandArgs, output: Output) -> Result<Option<&'static Format>> {
    if let (Some(from), Some(to)) = (arguments.from, arguments.to)
        && from.lies_behind(to)
    {
        let what = "--to lies before --from: give a moment behind it";
        return Err(WrongUse(what.to_owned()).into());
    }
    let (name, options) = (arguments.format.as_deref(), arguments.export.options());
    let Some(path) = &arguments.output else {
        let without_effect = [
            (name.is_some(), "--format"),
            (arguments.segment.is_some(), "--segment"),
            (arguments.force, "--force"),
        ];
        let given = without_effect.into_iter().find(|(given, _)| *given).map(|(_, flag)| flag);
        return match given.or(foreign_setting(&options, &[])) {
            Some(flag) => {
                let what = format!("{flag}: say where the trace goes: -o FILE, or -o - for a pipe");
                Err(WrongUse(what).into())
            }
            None => Ok(None),
        };
    };
    is_no_input(path, &[&arguments.file, &checkpoints_path(&arguments.file)])?;
    let format = format_of(name, path, &options, output.json)?;
    if arguments.segment.is_some() && format.is_some() {
        let what = "only Reprise's own format is made in shares: give -o a name that ends with .trace, and \
                    `reprise trace convert` what `trace concat` makes of them";
        return Err(WrongUse(what.to_owned()).into());
    }
    Ok(format)
}

fn ends_at(end_ns: u64) -> String {
    format!("the recording ends at {:.3} s of guest time", seconds(end_ns))
}

fn options(
    arguments: &ExpandArgs,
    format: Option<&'static Format>,
    window: Window,
) -> Result<ExpandOptions> {
    Ok(ExpandOptions {
        target: target(arguments, format)?,
        window,
        contents: Contents {
            physical: !arguments.no_physical,
            values: arguments.values || arguments.full,
            registers: arguments.registers || arguments.full,
            page_walks: arguments.page_walks,
        },
        selection: arguments.filters.selection(),
        filters: arguments.filters.as_given(),
        jobs: arguments.jobs.map_or_else(available_jobs, |jobs| jobs as usize),
        segment: arguments.segment,
        soft: arguments.soft.options(),
    })
}

/// Does `work`, and shows how far it is: on the way to the window, then in its `instructions`, of which
/// none are known to be there as long as that is 0.
fn with_progress<T>(
    output: Output,
    control: &Control,
    instructions: &AtomicU64,
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    if !progress_shows() {
        return work();
    }
    let (over, until_over) = channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut shown = None;
            while until_over.recv_timeout(PROGRESS_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                let on_the_way = control.approach();
                let (_, bar) = shown
                    .take_if(|(before, _)| *before == on_the_way.is_some())
                    .unwrap_or_else(|| {
                        let total =
                            Some(instructions.load(Ordering::Relaxed)).filter(|all| *all > 0);
                        let bar = match on_the_way {
                            Some(_) => output.bar("replaying to the window", Some(PARTS)),
                            None => output.instruction_bar("expanding", total),
                        };
                        (on_the_way.is_some(), bar)
                    });
                if control.is_stopped() {
                    bar.set_message("stopping");
                }
                bar.set_position(match on_the_way {
                    Some(fraction) => (fraction * PARTS as f64) as u64,
                    None => control.instructions(),
                });
                shown = Some((on_the_way.is_some(), bar));
            }
        });
        let result = work();
        drop(over);
        result
    })
}

fn available_jobs() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn target(arguments: &ExpandArgs, format: Option<&'static Format>) -> Result<Target> {
    let Some(path) = &arguments.output else { return Ok(Target::Discard) };
    let to = place(path, arguments.force)?;
    let options = arguments.export.options();
    Ok(match format {
        None => Target::Native(to),
        Some(format) => Target::Export { format, options, to },
    })
}
