//! `reprise trace stats`: what a trace amounts to, as text, as JSON, and as a page.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use reprise_export::output::PendingFile;
use reprise_export::page::{Heading, page};
use reprise_export::stats::{Report, Stats};
use reprise_trace::instructions::Ending;
use reprise_trace::instructions::filter::Filter;
use serde::Serialize;

use crate::cli::StatsArgs;
use crate::output::{Output, counted, grouped};
use crate::session::trace_file::{Reached, TraceFile, is_no_input, may_write};

/// Intervals into which the time is divided.
const INTERVALS: u64 = 240;
/// Characters of a recording's chain value that tell it from others.
const SHORT_CHAIN: usize = 16;

/// The report, and what of the trace it is about.
#[derive(Debug, Serialize)]
struct StatsReport {
    file: String,
    /// What the numbers are without: filters of the trace and of this command, and their effects.
    notes: Vec<String>,
    /// The trace was finished, and nothing in it is damaged.
    complete: bool,
    damage: Option<String>,
    #[serde(flatten)]
    report: Report,
}

/// Counts.
///
/// # Errors
/// The trace or the symbols cannot be used, the window lies outside the trace, or the page cannot be
/// written.
pub(super) fn run(arguments: &StatsArgs, output: Output) -> Result<u8> {
    if let Some(path) = &arguments.html {
        is_no_input(path, &[&arguments.file])?;
        may_write(path, arguments.force)?;
    }
    let symbols = super::symbols(&arguments.symbols.files)?;
    let mut trace = TraceFile::open(&arguments.file)?;
    let mut notes = Vec::new();
    let (selection, span) = trace.select(arguments.window.selection(), output, &mut notes)?;
    let stats = Stats::new((span.end - span.start).div_ceil(INTERVALS));
    let mut filter = Filter::new(selection, stats);
    let reached = trace
        .drive(&mut filter, (output, "counting"), Filter::is_past_window)
        .with_context(|| arguments.file.display().to_string())?;
    let report = StatsReport {
        file: arguments.file.display().to_string(),
        notes: [notes, self::notes(&trace, &reached, &arguments.window.as_given())].concat(),
        complete: matches!(trace.outline.ending, Ok(Ending::Complete { .. }))
            && !matches!(reached, Reached::Damaged(_)),
        damage: match &reached {
            Reached::Damaged(damage) => Some(damage.to_string()),
            _ => None,
        },
        report: filter.observer().report(&symbols),
    };
    if let Some(path) = &arguments.html {
        write_page(path, &trace, &report)?;
    }
    let notes = report.notes.iter().map(|note| format!("{note}\n")).collect::<String>();
    output.result(&report, format_args!("{notes}{}", report.report))?;
    Ok(trace.tell(&reached, output))
}

/// What somebody who reads the numbers has to know.
fn notes(trace: &TraceFile, reached: &Reached, filters: &[String]) -> Vec<String> {
    let mut notes = Vec::new();
    for (whose, filters) in
        [("the trace", trace.reader.header().filters.as_slice()), ("this look", filters)]
    {
        if !filters.is_empty() {
            notes.push(format!("filters of {whose}: {}", filters.join(" ")));
        }
    }
    if let Some(share) = trace.reader.header().share {
        notes.push(format!("share {} of {} of an expansion", share.number, share.count));
    }
    if let Ok(Ending::Complete { notes: stored }) = &trace.outline.ending {
        notes.extend_from_slice(stored);
    }
    match reached {
        Reached::End | Reached::Enough => {}
        Reached::CutShort { .. } => notes.push("the trace is cut short".to_owned()),
        Reached::Damaged(damage) => notes.push(format!("{damage}; this is what is before")),
    }
    notes
}

fn write_page(path: &Path, trace: &TraceFile, report: &StatsReport) -> Result<()> {
    let header = trace.reader.header();
    let mut lead = Vec::new();
    if let Some(chain) = header.recording.get(..SHORT_CHAIN) {
        lead.push(format!("of the recording {chain}\u{2026}"));
    }
    let Report { first_instruction, end_instruction, .. } = report.report;
    lead.push(format!(
        "instructions {} to {}, {}",
        grouped(first_instruction),
        grouped(end_instruction),
        counted(trace.outline.totals.segments, "segment")
    ));
    let name = trace.path.file_name().unwrap_or(trace.path.as_os_str());
    let heading = Heading {
        title: name.to_string_lossy().into_owned(),
        lead,
        notes: report.notes.clone(),
        footer: format!("Made by Reprise {}.", env!("CARGO_PKG_VERSION")),
    };
    let text = page(&heading, &report.report);
    let written = PendingFile::create(path).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.finish()
    });
    written.with_context(|| format!("cannot write {}", path.display()))
}
