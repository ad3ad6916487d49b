//! Expands a recording: a replay on the software CPU that shows an observer every instruction.

use std::io::{self, Write};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use reprise_cpu::engine::SoftEngine;
use reprise_expand::{CONTENTS, Control, Counting, Expanded, Threads, Window, expand};
use reprise_export::output::PendingFile;
use reprise_export::{Destination, ExportOptions, Format};
use reprise_machine::inputs::Replaying;
use reprise_machine::machine::Machine;
use reprise_machine::outcome::{Conclusion, Outcome};
use reprise_trace::instructions::filter::{Filter, Selection};
use reprise_trace::instructions::{Observer, SegmentOptions, TraceHeader, TraceWriter};
use reprise_trace::moment::TickKind;
use reprise_trace::recording::Recording;

use super::assembly::SoftOptions;
use super::expand_report::ExpandReport;
use super::replay;

/// What becomes of the trace.
#[derive(Debug)]
pub enum Target {
    /// The native format.
    Native(Destination),
    /// Another one.
    Export {
        /// Which.
        format: &'static Format,
        /// How.
        options: ExportOptions,
        /// Where to.
        to: Destination,
    },
    /// Nothing: it is counted and forgotten.
    Discard,
}

/// How to expand.
#[derive(Debug)]
pub struct ExpandOptions {
    /// What becomes of the trace.
    pub target: Target,
    /// Which part of the recording, in ticks.
    pub window: Window,
    /// What of that to keep.
    pub selection: Selection,
    /// The filters as the user gave them: the trace says so.
    pub filters: Vec<String>,
    /// The observer has a thread of its own.
    pub threads: Threads,
    /// How the software CPU is to run.
    pub soft: SoftOptions,
}

/// Expands a recording. `control` tells how far it is, and stops it.
///
/// # Errors
/// The recording cannot be used, the trace cannot be written, or the replay diverged: then there is no
/// trace under the final name.
pub fn expand_recording(
    recording: &Recording,
    options: ExpandOptions,
    control: &Control,
) -> Result<ExpandReport> {
    let header = recording.header();
    if header.tick_kind != TickKind::Instruction {
        bail!(
            "the recording counts {:?}s, and expansion needs instructions: record with --engine soft",
            header.tick_kind
        );
    }
    let last_tick = recording.summary().last_moment.map_or(0, |moment| moment.tick);
    if options.window.from > last_tick {
        bail!(
            "the window begins at tick {}, and the recording ends at tick {last_tick}",
            options.window.from
        );
    }
    let machine = start(recording, options.soft)?;
    let session = Session { recording, machine, control, window: options.window };
    let kind = options.target.name();
    let (selection, threads) = (options.selection, options.threads);
    let mut report = match options.target {
        Target::Discard => session.run(selection, threads, Counting::default(), |counting, _| {
            Ok(Kept { accesses: Some(counting.accesses), ..Kept::default() })
        }),
        Target::Native(to) => {
            let out = NativeFile::create(to).context("the trace cannot be made")?;
            let header = session.trace_header(options.filters.clone());
            let writer = TraceWriter::create(out, &header, SegmentOptions::default())?;
            session.run(selection, threads, writer, |mut writer, notes| {
                writer.cut()?;
                let totals = writer.totals();
                let out = writer.finish(notes)?;
                let bytes = out.finish().context("the trace cannot be finished")?;
                let accesses = Some(totals.accesses);
                Ok(Kept { bytes: Some(bytes), accesses, notes: Vec::new() })
            })
        }
        Target::Export { format, options, to } => {
            let export = format.open(&options, to)?;
            session.run(selection, threads, export, |export, _| {
                let exported = export.finish()?;
                Ok(Kept { bytes: Some(exported.bytes), accesses: None, notes: exported.notes })
            })
        }
    }?;
    report.format = kind;
    report.filters = options.filters;
    Ok(report)
}

impl Target {
    fn name(&self) -> &'static str {
        match self {
            Self::Native(_) => "reprise",
            Self::Export { format, .. } => format.name,
            Self::Discard => "none",
        }
    }
}

/// A replaying machine before the recording's first instruction.
fn start(recording: &Recording, soft: SoftOptions) -> Result<Machine<SoftEngine, Replaying>> {
    let header = recording.header();
    replay::check_cpu_model(header)?;
    let (engine, board) = replay::load(recording)?.with_soft_engine(soft)?;
    let inputs = Replaying::new(recording.log());
    Ok(Machine::new(engine, board, inputs, replay::time_source(header)))
}

/// What was kept of a trace.
#[derive(Debug, Default)]
struct Kept {
    bytes: Option<u64>,
    accesses: Option<u64>,
    notes: Vec<String>,
}

struct Session<'a> {
    recording: &'a Recording,
    machine: Machine<SoftEngine, Replaying>,
    control: &'a Control,
    window: Window,
}

impl Session<'_> {
    fn trace_header(&self, filters: Vec<String>) -> TraceHeader {
        let header = self.recording.header();
        TraceHeader {
            contents: CONTENTS,
            tick: header.tick_kind,
            cpu_model: header.cpu_model.clone(),
            recording: self.recording.summary().chain.clone(),
            filters,
            share: None,
        }
    }

    /// Runs the expansion; `keep` makes the trace whole, with notes on what is not in it.
    fn run<O: Observer + Send + 'static>(
        mut self,
        selection: Selection,
        threads: Threads,
        observer: O,
        keep: impl FnOnce(O, &[String]) -> Result<Kept>,
    ) -> Result<ExpandReport> {
        let started = Instant::now();
        let (observer, run, mut notes) = if selection == Selection::default() {
            let run = self.expand(observer, threads)?;
            (run.observer, Ran::new(run.outcome, run.instructions), Vec::new())
        } else {
            let run = self.expand(Filter::new(selection, observer), threads)?;
            let left_out = run.observer.left_out().notes();
            let ran = Ran::new(run.outcome, run.instructions);
            (run.observer.into_observer(), ran, left_out)
        };
        if run.outcome.is_none() {
            notes.push("the expansion was stopped before its end".to_owned());
        }
        let kept = keep(observer, &notes)?;
        let wall = started.elapsed();
        let mut report =
            ExpandReport::new(self.recording, run.instructions, wall, run.outcome.as_ref());
        report.set_trace(kept.bytes, kept.accesses);
        report.notes = [notes, kept.notes].concat();
        // Its memory goes with the process.
        std::mem::forget(self.machine);
        Ok(report)
    }

    fn expand<O: Observer + Send + 'static>(
        &mut self,
        observer: O,
        threads: Threads,
    ) -> Result<Expanded<O>> {
        let expanded = expand(&mut self.machine, self.window, observer, threads, self.control);
        let expanded = expanded?;
        if let Some(Outcome { conclusion: Conclusion::Diverged(divergence), .. }) =
            &expanded.outcome
        {
            bail!(
                "the replay differs from the recording at tick {} in {}: run `reprise replay` on it",
                divergence.moment.tick,
                divergence.difference
            );
        }
        Ok(expanded)
    }
}

struct Ran {
    outcome: Option<Outcome>,
    instructions: u64,
}

impl Ran {
    fn new(outcome: Option<Outcome>, instructions: u64) -> Self {
        Self { outcome, instructions }
    }
}

/// Where a trace in the native format goes.
enum NativeFile {
    File(PendingFile, u64),
    Pipe(Box<dyn Write + Send>, u64),
}

impl NativeFile {
    fn create(to: Destination) -> io::Result<Self> {
        Ok(match to {
            Destination::Path(path) => Self::File(PendingFile::create(&path)?, 0),
            Destination::Pipe(pipe) => Self::Pipe(pipe, 0),
        })
    }

    /// Gives a file its name; the bytes written.
    fn finish(self) -> io::Result<u64> {
        match self {
            Self::File(file, bytes) => file.finish().map(|()| bytes),
            Self::Pipe(_, bytes) => Ok(bytes),
        }
    }
}

impl Write for NativeFile {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let (written, bytes) = match self {
            Self::File(file, bytes) => (file.write(buffer)?, bytes),
            Self::Pipe(pipe, bytes) => (pipe.write(buffer)?, bytes),
        };
        *bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::File(file, _) => file.flush(),
            Self::Pipe(pipe, _) => pipe.flush(),
        }
    }
}
