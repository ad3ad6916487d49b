//! `reprise trace convert`: a stored trace in another format, or a part of it in its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use reprise_export::{ExportOptions, Format};
use reprise_host::StopRequests;
use reprise_trace::instructions::filter::{Filter, LeftOut, Selection};
use reprise_trace::instructions::{
    Ending, Observer, SegmentOptions, TraceError, TraceHeader, TraceWriter,
};
use serde::Serialize;

use crate::cli::ConvertArgs;
use crate::output::{Output, byte_size, counted};
use crate::session::expand::Place;
use crate::session::trace_file::{Reached, TraceFile, is_no_input, place};
use crate::session::trace_target::{format_of, with_remedy};

/// What came of it.
#[derive(Debug, Serialize)]
struct ConvertReport {
    format: &'static str,
    /// Instructions read and kept.
    instructions: u64,
    bytes: u64,
    /// What is not in the output, or was added to it.
    notes: Vec<String>,
}

/// Converts.
///
/// # Errors
/// The trace or the format cannot be used, the trace is damaged, the window lies outside it, or the
/// output cannot be written. Then there is none under the final name.
pub(super) fn run(arguments: &ConvertArgs, output: Output) -> Result<u8> {
    let (name, to) = (arguments.format.as_deref(), &arguments.output);
    is_no_input(to, &[&arguments.file])?;
    let format = format_of(name, to, &arguments.export.options(), output.json)?;
    let mut trace = TraceFile::open(&arguments.file)?;
    let mut notes = Vec::new();
    let (selection, _) = trace.select(arguments.window.selection(), output, &mut notes)?;
    let to = place(&arguments.output, arguments.force)?;
    let mut job = Job { trace, selection, output };
    let (mut report, reached) = match format {
        Some(format) => job.export(format, &arguments.export.options(), &to),
        None => job.rewrite(&to, arguments.window.as_given()),
    }
    .map_err(with_remedy)?;
    report.notes.splice(..0, notes);
    let notes = report.notes.iter().map(|note| format!("\n{note}")).collect::<String>();
    let instructions = counted(report.instructions, "instruction");
    let text = format!("{}: {instructions}, {}{notes}", report.format, byte_size(report.bytes));
    super::report(&arguments.output, output, &report, &text)?;
    Ok(job.trace.tell(&reached, output))
}

struct Job {
    trace: TraceFile,
    selection: Selection,
    output: Output,
}

impl Job {
    fn export(
        &mut self,
        format: &'static Format,
        options: &ExportOptions,
        to: &Place,
    ) -> Result<(ConvertReport, Reached)> {
        let (export, left_out, instructions, reached) = self.show(to.export(format, options)?)?;
        let exported = export.finish()?;
        let notes = [left_out.notes(), exported.notes].concat();
        Ok((
            ConvertReport { format: format.name, instructions, bytes: exported.bytes, notes },
            reached,
        ))
    }

    /// Writes the trace's own format.
    fn rewrite(&mut self, to: &Place, filters: Vec<String>) -> Result<(ConvertReport, Reached)> {
        let header = self.trace.reader.header().clone();
        let filters = [header.filters.clone(), filters].concat();
        let header = TraceHeader { filters, share: None, ..header };
        let writer = TraceWriter::create(to.open()?, &header, SegmentOptions::default())?;
        let (writer, mut left_out, instructions, reached) = self.show(writer)?;
        let mut others = Vec::new();
        if let Ok(Ending::Complete { notes }) = &self.trace.outline.ending {
            others.extend(notes.iter().filter(|note| !left_out.add_note(note)).cloned());
        }
        if matches!(reached, Reached::CutShort { .. }) {
            others.push("the trace that this was made from was cut short".to_owned());
        }
        let notes = [left_out.notes(), others].concat();
        let out = writer.finish(&notes)?;
        let bytes = out.finish().context("the output cannot be finished")?;
        Ok((ConvertReport { format: "reprise", instructions, bytes, notes }, reached))
    }

    /// Shows the observer what is selected, and gives it back with what was left out and kept.
    fn show<O: Observer>(&mut self, observer: O) -> Result<(O, LeftOut, u64, Reached)> {
        let stop = Arc::new(AtomicBool::new(false));
        let _stop = StopRequests::watch(stop.clone())?;
        let stopped = || stop.load(Ordering::Relaxed);
        let counting = (observer, Kept(0));
        let mut filter = Filter::new(self.selection.clone(), counting);
        let reached = self.trace.drive(&mut filter, (self.output, "converting"), |filter| {
            filter.is_past_window() || stopped()
        });
        let reached = match reached {
            Ok(Reached::Damaged(damage)) => Err(damage),
            reached => reached,
        };
        let reached = reached.with_context(|| self.trace.path.display().to_string())?;
        if stopped() {
            bail!("stopped: there is no output");
        }
        let left_out = filter.left_out();
        let (observer, Kept(instructions)) = filter.into_observer();
        Ok((observer, left_out, instructions, reached))
    }
}

/// Counts what was kept.
struct Kept(u64);

impl Observer for Kept {
    fn run(&mut self, run: &reprise_trace::instructions::Run<'_>) -> Result<(), TraceError> {
        self.0 += run.retired() as u64;
        Ok(())
    }

    fn event(&mut self, _: &reprise_trace::instructions::Event) -> Result<(), TraceError> {
        Ok(())
    }
}
