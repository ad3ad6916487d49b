//! Reads a trace for a command: from the place where its window begins, with a progress bar, to its
//! end or to where something is wrong.

use std::fs::{self, File};
use std::io::{self, BufReader};
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use reprise_trace::instructions::filter::Selection;
use reprise_trace::instructions::{
    Ending, Event, Observer, Outline, Position, Run, TimeSearch, TraceError, TraceReader,
};
use reprise_trace::recording::{Recording, RecordingError};

use super::expand::Place;
use super::file_kind::{NoFile, are_one_file};
use super::trace_target::WrongUse;
use crate::output::{Output, counted, grouped, seconds};

/// Bytes read at once.
const BUFFER_BYTES: usize = 1 << 20;

/// A trace that is being read.
#[derive(Debug)]
pub struct TraceFile {
    /// Its name.
    pub path: PathBuf,
    /// Reads it.
    pub reader: TraceReader<BufReader<File>>,
    /// What it holds.
    pub outline: Outline,
    /// Its length.
    pub file_bytes: u64,
    /// The reader stands elsewhere than at the first segment.
    has_moved: bool,
}

/// A place in a trace as a user names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TraceMoment {
    /// Instructions retired before it.
    Instruction(u64),
    /// Guest time in nanoseconds.
    VirtualNs(u64),
}

/// Where a window begins and ends, as far as a user said.
pub type Bounds = [Option<TraceMoment>; 2];

/// Where reading came to.
#[derive(Debug)]
pub enum Reached {
    /// The end.
    End,
    /// The end of what is whole, with so many bytes behind it.
    CutShort {
        /// Bytes of no use.
        unused_bytes: u64,
    },
    /// Whoever looks has seen enough.
    Enough,
    /// What is behind is damaged.
    Damaged(TraceError),
}

/// Opens a file that a command reads.
///
/// # Errors
/// If there is none, or it is a directory, a device or a pipe.
fn open_file(path: &Path) -> Result<File> {
    let shown = path.display();
    let unreadable =
        |error| anyhow!("cannot read {shown}: {error}; check the path and its permissions");
    // Before it is opened: a pipe that nobody writes to would not come back.
    let kind = fs::metadata(path).map_err(unreadable)?.file_type();
    if let Some(kind) = NoFile::of(kind) {
        bail!("{shown} is {kind}: give the file that `reprise expand` wrote");
    }
    File::open(path).map_err(unreadable)
}

/// Opens a trace's header and leaves the rest.
///
/// # Errors
/// If the file cannot be read or is no trace.
pub fn open_reader(path: &Path) -> Result<TraceReader<BufReader<File>>> {
    let file = BufReader::with_capacity(BUFFER_BYTES, open_file(path)?);
    TraceReader::open(file).map_err(|error| match error {
        TraceError::Foreign if is_recording(path) => {
            anyhow!(
                "{0} is a recording: `reprise expand {0} -o TRACE` makes a trace of it",
                path.display()
            )
        }
        error => anyhow!(error).context(path.display().to_string()),
    })
}

/// Bytes in which the beginnings of traces and recordings are alike.
const COMMON_BYTES: u64 = 2;

/// Whether a file starts as traces do, and no recording does.
pub fn is_trace(path: &Path) -> bool {
    let tells = |metadata: fs::Metadata| metadata.is_file() && metadata.len() > COMMON_BYTES;
    let is_file = fs::metadata(path).is_ok_and(tells);
    let opened = is_file.then(|| File::open(path).ok()).flatten();
    opened.is_some_and(|file| {
        !matches!(
            TraceReader::open(file),
            Err(TraceError::Foreign | TraceError::Empty | TraceError::Read(_))
        )
    })
}

fn is_recording(path: &Path) -> bool {
    let opened = File::open(path).ok().map(|file| Recording::open(BufReader::new(file)));
    opened.is_some_and(|opened| !matches!(opened, Err(RecordingError::Foreign)))
}

/// Whether there is a recording or a trace that somebody made.
pub fn holds_work(path: &Path) -> bool {
    let is_file = fs::metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.len() > 0);
    is_file && (is_trace(path) || is_recording(path))
}

/// Refuses to write over what the command reads.
///
/// # Errors
/// If it is one of `inputs`.
pub fn is_no_input(path: &Path, inputs: &[&Path]) -> Result<()> {
    if inputs.iter().any(|input| are_one_file(path, input)) {
        bail!("{} is what this command reads: give another name", path.display());
    }
    Ok(())
}

/// Refuses to write over a file without being told to.
///
/// # Errors
/// If there is a file and `force` is not given.
pub fn may_write(path: &Path, force: bool) -> Result<()> {
    if !force && fs::metadata(path).is_ok_and(|metadata| metadata.is_file()) {
        bail!("{} exists: give another name, or --force to overwrite it", path.display());
    }
    Ok(())
}

/// Where `-o` says.
///
/// # Errors
/// As [`may_write`].
pub fn place(path: &Path, force: bool) -> Result<Place> {
    if path == Path::new("-") {
        return Ok(Place::Pipe);
    }
    may_write(path, force)?;
    Ok(Place::Path { path: path.to_owned(), force })
}

impl TraceFile {
    /// Opens a trace.
    ///
    /// # Errors
    /// If the file cannot be read or is no trace.
    pub fn open(path: &Path) -> Result<Self> {
        let mut reader = open_reader(path)?;
        let shown = || path.display().to_string();
        let outline = reader.outline().with_context(shown)?;
        let file_bytes = fs::metadata(path).map_or(0, |metadata| metadata.len());
        Ok(Self { path: path.to_owned(), reader, outline, file_bytes, has_moved: false })
    }

    /// What filters keep of a window whose times are looked up: the selection, and the instructions by number
    /// that it may keep. The reader then stands at the segment in which it begins. `notes` gets what a person
    /// must know of the window.
    ///
    /// # Errors
    /// If no segment of the trace is whole, or nothing of it is in the window, or the file cannot be read.
    pub fn select(
        &mut self,
        (mut selection, [from, to]): (Selection, Bounds),
        output: Output,
        notes: &mut Vec<String>,
    ) -> Result<(Selection, Range<u64>)> {
        let shown = self.path.display().to_string();
        let index = &self.outline.index;
        let (first, end) = (index.first_instruction(), index.end_instruction());
        if index.segments() == 0
            && let Ok(Ending::CutShort { .. }) = self.outline.ending
        {
            bail!(
                "{shown} was cut short before its first whole segment: expand the recording again"
            );
        }
        let has_bounds = from.is_some() || to.is_some();
        match (from, to) {
            (Some(TraceMoment::Instruction(from)), Some(TraceMoment::Instruction(to)))
            | (Some(TraceMoment::VirtualNs(from)), Some(TraceMoment::VirtualNs(to)))
                if from > to =>
            {
                let what = "--to lies before --from: give a moment behind it";
                return Err(WrongUse(what.to_owned()).into());
            }
            _ => {}
        }
        let from = match from {
            None => first,
            Some(TraceMoment::Instruction(number)) => number,
            Some(TraceMoment::VirtualNs(ns)) => match self.find("--from", ns, output, notes)? {
                Ok(number) => number,
                Err(told) => bail!("{shown}: {told}: give an earlier --from"),
            },
        };
        let to = match to {
            None => u64::MAX,
            Some(TraceMoment::Instruction(number)) => number,
            Some(TraceMoment::VirtualNs(ns)) => {
                self.find("--to", ns, output, notes)?.unwrap_or_else(|told| {
                    notes.push(format!("{told}, before --to: taken to its end"));
                    u64::MAX
                })
            }
        };
        if has_bounds {
            if from >= to {
                bail!("{shown}: no instruction runs from --from to --to: give a wider window");
            }
            if from >= end || to <= first {
                let error = TraceError::NoSuchInstruction { asked: from, first, end };
                return Err(anyhow!(error).context(shown));
            }
            selection.instructions = Some(from..to);
        }
        let start = self.outline.index.segment_of_instruction(from).unwrap_or(0);
        if start > 0 || self.has_moved {
            self.reader.seek_to_segment(&self.outline.index, start)?;
        }
        Ok((selection, from.max(first)..to.min(end)))
    }

    /// The first instruction at this guest time; else, in words, where the trace's time ends.
    fn find(
        &mut self,
        option: &str,
        ns: u64,
        output: Output,
        notes: &mut Vec<String>,
    ) -> Result<Result<u64, String>> {
        let index = &self.outline.index;
        if index.segments() == 0 {
            return Ok(Err("the trace holds no instruction".to_owned()));
        }
        self.reader.seek_to_segment(index, index.segment_before_virtual_ns(ns))?;
        self.has_moved = true;
        let mut search = TimeSearch::new(ns);
        let reached = self.drive(&mut search, (output, "looking for the window"), |search| {
            search.place().is_some()
        });
        let reached = reached.with_context(|| self.path.display().to_string())?;
        let Some(place) = search.place() else {
            let end_s = seconds(search.last_ns());
            return Ok(Err(match reached {
                Reached::Damaged(damage) => {
                    format!("{damage}; the time before that ends at {end_s} s")
                }
                _ => format!("the trace's guest time ends at {end_s} s"),
            }));
        };
        if place.uncertain > 0 {
            notes.push(format!(
                "{option} {} s is instruction {}, at {} s: when the {} before it ran the trace does not \
                 tell",
                seconds(ns),
                grouped(place.instruction),
                seconds(place.virtual_ns),
                counted(place.uncertain, "instruction")
            ));
        }
        Ok(Ok(place.instruction))
    }

    /// Shows `observer` the trace from where the reader stands, until it has seen `enough`. It is told
    /// of the end in any case. Another thread reads and decodes meanwhile.
    ///
    /// # Errors
    /// If the file cannot be read, or the observer fails.
    pub fn drive<O: Observer>(
        &mut self,
        observer: &mut O,
        (output, doing): (Output, &str),
        enough: impl Fn(&O) -> bool,
    ) -> Result<Reached, TraceError> {
        let bar = output.bar(doing, Some(self.file_bytes));
        let mut watched = Watched { observer: &mut *observer, enough: &enough };
        let goes_on = |watched: &mut Watched<'_, O, _>, offset| {
            bar.set_position(offset);
            !enough(watched.observer)
        };
        let reached = match self.reader.drive_ahead(&mut watched, goes_on) {
            Ok(None) => Reached::Enough,
            Ok(Some(Ending::Complete { .. })) => Reached::End,
            Ok(Some(Ending::CutShort { unused_bytes })) => Reached::CutShort { unused_bytes },
            Err(TraceError::Write(error)) if error.kind() == ENOUGH => Reached::Enough,
            Err(damage @ TraceError::Damaged { .. }) => Reached::Damaged(damage),
            Err(error) => return Err(error),
        };
        bar.finish_and_clear();
        observer.end()?;
        Ok(reached)
    }

    /// Says what a person must know of where reading came to; the command's exit status.
    pub fn tell(&self, reached: &Reached, output: Output) -> u8 {
        let shown = self.path.display();
        match reached {
            Reached::End | Reached::Enough => 0,
            Reached::CutShort { unused_bytes } => {
                output.note(format_args!(
                    "{shown} is cut short: its whole segments were used, and {unused_bytes} bytes \
                     behind them were not"
                ));
                0
            }
            Reached::Damaged(damage) => {
                output.note(format_args!("{shown}: {damage}; what is before it was used"));
                1
            }
        }
    }
}

/// What an observer's error is when nothing is wrong.
const ENOUGH: io::ErrorKind = io::ErrorKind::Interrupted;

/// Stops in the middle of a segment.
struct Watched<'a, O, F> {
    observer: &'a mut O,
    enough: &'a F,
}

impl<O: Observer, F: Fn(&O) -> bool> Watched<'_, O, F> {
    fn look(&self) -> Result<(), TraceError> {
        if (self.enough)(self.observer) { Err(TraceError::Write(ENOUGH.into())) } else { Ok(()) }
    }
}

impl<O: Observer, F: Fn(&O) -> bool> Observer for Watched<'_, O, F> {
    fn begin(&mut self, position: &Position) -> Result<(), TraceError> {
        self.observer.begin(position)
    }

    fn new_blocks(&mut self) {
        self.observer.new_blocks();
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        self.observer.run(run)?;
        self.look()
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        self.observer.event(event)?;
        self.look()
    }
}
