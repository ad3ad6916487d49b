//! Expands a recording: a replay on the software CPU that shows an observer every instruction.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use reprise_cpu::engine::SoftEngine;
use reprise_cpu::latitude_sites::Sites;
use reprise_expand::pieces::{self, Pieces, Plan};
use reprise_expand::{
    Control, Counting, ExpandError, Expanded, Threads, Towards, Window, approach, expand,
};
use reprise_export::output::PendingFile;
use reprise_export::{Destination, Export, ExportError, ExportOptions, Format};
use reprise_machine::divergence::Divergence;
use reprise_machine::lawful::SetAside;
use reprise_machine::outcome::{Conclusion, Outcome};
use reprise_replay::{OnSoftware, Replayable, Start};
use reprise_trace::checkpoint::CheckpointInfo;
use reprise_trace::instructions::filter::{Filter, Selection};
use reprise_trace::instructions::{
    Contents, Observer, SegmentOptions, Share, TraceHeader, TraceWriter,
};
use reprise_trace::moment::TickKind;
use reprise_trace::stretches::{Course, Stretch};

use super::assembly::SoftOptions;
use super::expand_report::ExpandReport;
use super::makers::{self, MakerDependentReport};
use super::replay::{At, set_aside};
use super::trace_target::{WrongUse, cannot_be_made};
use crate::output::grouped;

/// What becomes of the trace.
#[derive(Debug)]
pub enum Target {
    /// The native format.
    Native(Place),
    /// Another one.
    Export {
        /// Which.
        format: &'static Format,
        /// How.
        options: ExportOptions,
        /// Where to.
        to: Place,
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
    /// What the trace has beside instructions and linear addresses.
    pub contents: Contents,
    /// What of that to keep.
    pub selection: Selection,
    /// The filters as the user gave them: the trace says so.
    pub filters: Vec<String>,
    /// Threads; with 1 the CPU and the trace's writer take turns.
    pub jobs: usize,
    /// Only this share, from 1, of so many.
    pub segment: Option<(u32, u32)>,
    /// How the software CPU is to run.
    pub soft: SoftOptions,
}

/// Expands a recording. `control` tells how far it is, and stops it.
///
/// # Errors
/// The recording cannot be used, the trace cannot be written, or the replay diverged: then there is no
/// trace under the final name.
pub fn expand_recording(
    replayable: &Replayable,
    options: ExpandOptions,
    control: &Control,
) -> Result<ExpandReport> {
    let last = replayable.recording().summary().last_moment.map_or(0, |moment| moment.tick);
    if options.window.from > last {
        bail!(
            "the window begins at tick {}, and the recording ends at tick {}: give an earlier --from",
            grouped(options.window.from),
            grouped(last)
        );
    }
    if options.window.to < options.window.from {
        return Err(WrongUse(format!(
            "the window ends at tick {}, before it begins at tick {}: give a later --to",
            grouped(options.window.to),
            grouped(options.window.from)
        ))
        .into());
    }
    let soft = options.soft;
    let set_up = move |engine: &mut SoftEngine| engine.set_translation(soft.translation);
    let session = Session { replayable, control, options: &options, set_up: &set_up };
    match options.target {
        Target::Discard => session.show(Counting::default(), |counting| {
            Ok(Kept { accesses: Some(counting.accesses), ..Kept::default() })
        }),
        Target::Native(ref to) => session.write(to.open()?),
        Target::Export { format, options: ref export, ref to } => {
            let export = to.export(format, export)?;
            session.show(export, |export| {
                let exported = export.finish()?;
                Ok(Kept { bytes: Some(exported.bytes), accesses: None, notes: exported.notes })
            })
        }
    }
}

/// The stretch that executes what follows a tick.
fn stretch_at(course: &Course, tick: u64) -> &Stretch {
    let begins = |stretch: &&Stretch| stretch.from.is_none_or(|moment| moment.tick <= tick);
    course.stretches.iter().rev().find(begins).unwrap_or(&course.stretches[0])
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

/// What was kept of a trace.
#[derive(Debug, Default)]
struct Kept {
    bytes: Option<u64>,
    accesses: Option<u64>,
    notes: Vec<String>,
}

/// An expansion under way.
struct Session<'a> {
    replayable: &'a Replayable,
    control: &'a Control,
    options: &'a ExpandOptions,
    set_up: &'a (dyn Fn(&mut SoftEngine) + Sync),
}

impl Session<'_> {
    fn trace_header(&self, share: Option<Share>) -> TraceHeader {
        let recording = self.replayable.recording();
        let header = recording.header();
        TraceHeader {
            contents: self.options.contents,
            tick: stretch_at(self.replayable.course(), self.options.window.from).on.tick_kind,
            cpu_model: header.cpu_model.clone(),
            recording: recording.summary().chain.clone(),
            filters: self.options.filters.clone(),
            share,
        }
    }

    /// Instructions of the run before the end of a window to `to`, at `end_tick`, if that is known beforehand.
    fn instruction_at_end(&self, to: u64, end_tick: u64) -> Option<u64> {
        let begins = |stretch: &&Stretch| stretch.from.is_none_or(|moment| moment.tick < to);
        let mut before = self.replayable.course().stretches.iter().take_while(begins);
        if before.all(|stretch| stretch.on.tick_kind == TickKind::Instruction) {
            return Some(end_tick);
        }
        let ends = |info: &CheckpointInfo| info.moment.tick == to;
        let mut checkpoints = self.replayable.checkpoints().iter().enumerate();
        let (index, _) = checkpoints
            .find(|(index, info)| ends(info) && self.replayable.begins_on_soft(*index))?;
        self.replayable.instructions_before(index)
    }

    /// Writes the native format, in pieces.
    fn write(&self, out: NativeFile) -> Result<ExpandReport> {
        let started = Instant::now();
        let all = pieces::pieces(self.replayable, self.options.window);
        let (window, share) = match self.options.segment {
            None => (self.options.window, None),
            Some((number, count)) => {
                let last = self.replayable.recording().summary().last_moment;
                let last_tick = last.map_or(0, |moment| moment.tick);
                let (window, share) = share_of(&all, last_tick, number, count);
                let end_instruction = self.instruction_at_end(window.to, share.end_tick);
                (window, Some(Share { end_instruction, ..share }))
            }
        };
        let header = self.trace_header(share);
        let mut writer = TraceWriter::create(out, &header, SegmentOptions::default())?;
        let plan = Plan {
            replayable: self.replayable,
            window,
            contents: self.options.contents,
            selection: self.options.selection.clone(),
            jobs: self.options.jobs,
            set_up: self.set_up,
        };
        let done = plan.write(&mut writer, self.control)?;
        let checkpoints_verified = done.checkpoints_verified;
        let mut notes = done.left_out.notes();
        notes.extend(stopped_note(done.outcome.as_ref()));
        let totals = writer.totals();
        let bytes = writer.finish(&notes)?.finish().context("the trace cannot be finished")?;
        let kept = Kept { bytes: Some(bytes), accesses: Some(totals.accesses), notes };
        let Pieces { instructions, outcome, set_aside, latitude_sites, .. } = done;
        let ran = Ran { instructions, outcome, set_aside, latitude_sites };
        Ok(self.report(started, &ran, kept, checkpoints_verified))
    }

    /// Shows everything to one observer; `keep` makes its output whole.
    fn show<O: Observer + Send + 'static>(
        &self,
        observer: O,
        keep: impl FnOnce(O) -> Result<Kept>,
    ) -> Result<ExpandReport> {
        let started = Instant::now();
        let (window, contents) = (self.options.window, self.options.contents);
        let threads = if self.options.jobs == 1 { Threads::One } else { Threads::Two };
        let start = self.replayable.nearest(window.from);
        let mut machine = pieces::start(self.replayable, start, self.set_up)?;
        let (observer, ran, notes) = if self.options.selection == Selection::default() {
            let Expanded { observer, outcome, instructions } =
                expand(&mut machine, window, observer, contents, threads, self.control)?;
            (observer, Ran::of(instructions, outcome), Vec::new())
        } else {
            let filter = Filter::new(self.options.selection.clone(), observer);
            let Expanded { observer, outcome, instructions } =
                expand(&mut machine, window, filter, contents, threads, self.control)?;
            let left_out = observer.left_out().notes();
            (observer.into_observer(), Ran::of(instructions, outcome), left_out)
        };
        let latitude_sites = machine.engine().software().latitude_sites();
        // Its memory goes with the process.
        std::mem::forget(machine);
        let ran = Ran { latitude_sites, ..ran };
        if let Some(Outcome { conclusion: Conclusion::Diverged(divergence), .. }) = &ran.outcome {
            return Err(diverged(divergence).into());
        }
        let mut kept = keep(observer)?;
        kept.notes = [notes, stopped_note(ran.outcome.as_ref()), kept.notes].concat();
        Ok(self.report(started, &ran, kept, 0))
    }

    fn report(&self, started: Instant, ran: &Ran, kept: Kept, verified: u64) -> ExpandReport {
        let recording = self.replayable.recording();
        let wall = started.elapsed();
        let mut report = ExpandReport::new(recording, ran.instructions, wall, ran.outcome.as_ref());
        report.format = self.options.target.name();
        report.filters.clone_from(&self.options.filters);
        report.checkpoints_verified = verified;
        report.set_aside =
            set_aside(self.replayable.course(), &ran.set_aside, ran.outcome.as_ref());
        report.maker_dependent = MakerDependentReport::of(&ran.latitude_sites);
        report.set_trace(kept.bytes, kept.accesses);
        report.notes = kept.notes;
        report.notes.extend(makers::note(recording.header(), Some(&ran.latitude_sites)));
        report
    }
}

fn stopped_note(outcome: Option<&Outcome>) -> Vec<String> {
    let stopped = outcome.is_none().then(|| "the expansion was stopped before its end".to_owned());
    stopped.into_iter().collect()
}

/// The window of one share of all pieces of a recording that ends at `last_tick`, and what the trace's
/// header says of it.
fn share_of(all: &[Window], last_tick: u64, number: u32, count: u32) -> (Window, Share) {
    let range = pieces::share(all.len(), number, count);
    let end = all.last().map_or(0, |piece| piece.to);
    let from = all.get(range.start).map_or(end, |piece| piece.from);
    let to = all[range.clone()].last().map_or(from, |piece| piece.to);
    let (first_tick, end_tick) = (from.min(last_tick), to.min(last_tick));
    let share = Share { number, count, first_tick, end_tick, end_instruction: None };
    (Window { from, to }, share)
}

struct Ran {
    outcome: Option<Outcome>,
    instructions: u64,
    set_aside: Vec<SetAside>,
    latitude_sites: Vec<Sites>,
}

impl Ran {
    fn of(instructions: u64, outcome: Option<Outcome>) -> Self {
        let set_aside = outcome.as_ref().map(|outcome| outcome.set_aside.clone());
        let set_aside = set_aside.unwrap_or_default();
        Self { outcome, instructions, set_aside, latitude_sites: Vec::new() }
    }
}

/// Where a point of a run lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Located {
    /// At this tick.
    At(u64),
    /// Behind the recording's end, which is at this guest time, in nanoseconds.
    BehindTheEnd(u64),
}

/// The tick at which a run comes to a point. Guest time is looked for by replaying from the nearest
/// checkpoint before it, which `control` watches and stops.
///
/// # Errors
/// The recording or a checkpoint cannot be used, or the replay fails, diverges or is stopped.
pub fn locate(
    replayable: &Replayable,
    at: At,
    soft: SoftOptions,
    control: &Control,
) -> Result<Located> {
    let virtual_ns = match at {
        At::Tick(tick) => return Ok(Located::At(tick)),
        At::Time(virtual_ns) => virtual_ns,
    };
    let before = |info: &CheckpointInfo| info.virtual_ns <= virtual_ns;
    let nearest = replayable.on_soft().filter(|info| before(info)).last();
    let start = nearest.map_or(Start::Run, |info| replayable.nearest(info.moment.tick));
    let set_up = move |engine: &mut SoftEngine| engine.set_translation(soft.translation);
    let mut machine = pieces::start(replayable, start, &set_up)?;
    let outcome = approach(&mut machine, Towards::Time(virtual_ns), control)?;
    // Its memory goes with the process.
    std::mem::forget(machine);
    match outcome.conclusion {
        Conclusion::Diverged(divergence) => Err(diverged(&divergence).into()),
        _ if outcome.virtual_ns < virtual_ns => Ok(Located::BehindTheEnd(outcome.virtual_ns)),
        _ => Ok(Located::At(outcome.ticks)),
    }
}

fn diverged(divergence: &Divergence) -> ExpandError {
    let what = divergence.difference.to_string();
    ExpandError::Diverged { tick: divergence.moment.tick, what }
}

/// Where a trace goes.
#[derive(Clone, Debug)]
pub enum Place {
    /// A file, or a format's directory.
    Path {
        /// Its name.
        path: PathBuf,
        /// What has that name may go.
        force: bool,
    },
    /// Standard output.
    Pipe,
}

impl Place {
    fn destination(&self) -> Destination {
        match self {
            Self::Path { path, force: false } => Destination::Path(path.clone()),
            Self::Path { path, force: true } => Destination::Over(path.clone()),
            Self::Pipe => Destination::Pipe(Box::new(io::stdout())),
        }
    }

    /// Begins an export to here.
    pub(crate) fn export(
        &self,
        format: &'static Format,
        options: &ExportOptions,
    ) -> Result<Export> {
        match (format.open(options, self.destination()), self) {
            (Err(ExportError::Create(error)), Self::Path { path, .. }) => {
                Err(cannot_be_made(path, &error))
            }
            (opened, _) => Ok(opened?),
        }
    }

    pub(crate) fn open(&self) -> Result<NativeFile> {
        match self {
            Self::Path { path, .. } => {
                let file =
                    PendingFile::create(path).map_err(|error| cannot_be_made(path, &error))?;
                Ok(NativeFile::File(file, 0))
            }
            Self::Pipe => Ok(NativeFile::Pipe(io::stdout(), 0)),
        }
    }
}

/// Where a trace in the native format goes.
pub(crate) enum NativeFile {
    File(PendingFile, u64),
    Pipe(io::Stdout, u64),
}

impl NativeFile {
    /// Gives a file its name; the bytes written.
    pub(crate) fn finish(self) -> io::Result<u64> {
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
