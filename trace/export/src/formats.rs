//! The table of formats: what `--format` takes, what the documentation lists and what the tests walk
//! through is this table and nothing else. A new exporter is a row.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use reprise_trace::instructions::{Event, Observer, PlainRuns, Position, Run, TraceError};

use crate::bbv::{self, BasicBlockVectors};
use crate::champsim::ChampSim;
use crate::csv::Csv;
use crate::dinero::Dinero;
use crate::drmemtrace::DrMemTrace;
use crate::gem5::Gem5;
use crate::output::{COMPRESSIONS, Compression, Output};
use crate::parquet::{self, Parquet};
use crate::perf_script::PerfScript;

/// What a user may set. What is not set is as the format's users expect; what a format does not know
/// may not be set, see [`Setting`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExportOptions {
    /// [`Setting::Interval`].
    pub interval_instructions: Option<u64>,
    /// [`Setting::Cpu`].
    pub cpu: Option<u32>,
    /// [`Setting::FileInstructions`].
    pub file_instructions: Option<u64>,
}

/// An option that some formats have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Setting {
    /// Instructions that a line counts.
    Interval,
    /// The number of the CPU that the trace is shown as.
    Cpu,
    /// Instructions whose rows go into one file.
    FileInstructions,
}

/// A row for each [`Setting`].
#[derive(Debug)]
pub struct SettingRow {
    /// Which one.
    pub setting: Setting,
    /// As on the command line.
    pub flag: &'static str,
    /// What it means, with its unit and what holds where it is not set.
    pub summary: &'static str,
    is_set: fn(&ExportOptions) -> bool,
}

/// All settings.
pub const SETTINGS: &[SettingRow] = &[
    SettingRow {
        setting: Setting::Interval,
        flag: "--interval",
        summary: "instructions of each interval; 100000000 if not set",
        is_set: |options| options.interval_instructions.is_some(),
    },
    SettingRow {
        setting: Setting::Cpu,
        flag: "--cpu",
        summary: "number of the CPU that the trace is shown as; 0 if not set",
        is_set: |options| options.cpu.is_some(),
    },
    SettingRow {
        setting: Setting::FileInstructions,
        flag: "--file-instructions",
        summary: "instructions of each file; 16777216 if not set",
        is_set: |options| options.file_instructions.is_some(),
    },
];

/// What an export is on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// One stream of bytes: a file or a pipe.
    Stream,
    /// A directory of files.
    Directory,
}

/// A format. [`FORMATS`] has them all.
#[derive(Debug)]
pub struct Format {
    /// As `--format` takes it.
    pub name: &'static str,
    /// What a file's name ends with, compression apart.
    pub extension: &'static str,
    /// What it is, for help and documentation.
    pub summary: &'static str,
    /// File or directory.
    pub shape: Shape,
    /// The compressions that its readers undo by themselves.
    pub compressions: &'static [Compression],
    /// What can be set.
    pub settings: &'static [Setting],
    start: fn(Destination, &ExportOptions) -> io::Result<Box<dyn Exporter>>,
}

/// What text can be compressed with: whoever reads it undoes that first.
const ANY: &[Compression] = &[Compression::Gzip, Compression::Xz, Compression::Zstd];

/// Every format.
pub const FORMATS: &[Format] = &[
    Format {
        name: "champsim",
        extension: "champsim",
        summary: "ChampSim's records of 64 bytes",
        shape: Shape::Stream,
        compressions: &[Compression::Gzip, Compression::Xz],
        settings: &[],
        start: |to, _| {
            stream(to, ChampSim::new, |exporter| {
                let (out, summary) = exporter.into_parts();
                (out, summary.notes())
            })
        },
    },
    Format {
        name: "drmemtrace",
        extension: "drmemtrace",
        summary: "DynamoRIO's offline memory trace, version 7, of a whole system",
        shape: Shape::Stream,
        compressions: &[Compression::Gzip],
        settings: &[Setting::Cpu],
        start: |to, options| {
            let cpu = options.cpu.unwrap_or(0);
            stream(
                to,
                |out| DrMemTrace::new(out, cpu),
                |exporter| {
                    let (out, summary) = exporter.into_parts();
                    (out, summary.notes())
                },
            )
        },
    },
    Format {
        name: "dinero",
        extension: "din",
        summary: "Dinero IV's extended input (-informat D), a line for each reference",
        shape: Shape::Stream,
        compressions: ANY,
        settings: &[],
        start: |to, _| stream(to, Dinero::new, |exporter| (exporter.into_inner(), Vec::new())),
    },
    Format {
        name: "bbv",
        extension: "bb",
        summary: "SimPoint's basic-block vectors, a line for each interval",
        shape: Shape::Stream,
        compressions: ANY,
        settings: &[Setting::Interval],
        start: |to, options| {
            let interval = options.interval_instructions.unwrap_or(bbv::DEFAULT_INTERVAL);
            stream(
                to,
                |out| BasicBlockVectors::new(out, interval),
                |exporter| {
                    let (out, summary) = exporter.into_parts();
                    (out, summary.notes())
                },
            )
        },
    },
    Format {
        name: "gem5",
        extension: "gem5",
        summary: "gem5's instruction trace (inst.proto)",
        shape: Shape::Stream,
        compressions: &[Compression::Gzip],
        settings: &[Setting::Cpu],
        start: |to, options| {
            let cpu = options.cpu.unwrap_or(0);
            stream(
                to,
                |out| Gem5::new(out, cpu),
                |exporter| {
                    let (out, summary) = exporter.into_parts();
                    (out, summary.notes())
                },
            )
        },
    },
    Format {
        name: "parquet",
        extension: "parquet",
        summary: "Apache Parquet for DuckDB and Spark: tables of instructions, accesses and events",
        shape: Shape::Directory,
        compressions: &[],
        settings: &[Setting::FileInstructions],
        start: |to, options| {
            let instructions = options.file_instructions;
            let instructions = instructions.unwrap_or(parquet::DEFAULT_FILE_INSTRUCTIONS);
            match to {
                Destination::Path(path) => {
                    Ok(Box::new(Parquet::create(&path, instructions)?) as Box<dyn Exporter>)
                }
                Destination::Over(path) => {
                    Ok(Box::new(Parquet::create_over(&path, instructions)?) as Box<dyn Exporter>)
                }
                // `open` has refused it.
                Destination::Pipe(_) => Err(io::ErrorKind::InvalidInput.into()),
            }
        },
    },
    Format {
        name: "csv",
        extension: "csv",
        summary: "comma-separated values, a row for each instruction, access and event",
        shape: Shape::Stream,
        compressions: ANY,
        settings: &[],
        start: |to, _| stream(to, Csv::new, |exporter| (exporter.into_inner(), Vec::new())),
    },
    Format {
        name: "perf-script",
        extension: "perf",
        summary: "text as `perf script` prints it, a sample for each instruction",
        shape: Shape::Stream,
        compressions: ANY,
        settings: &[Setting::Cpu],
        start: |to, options| {
            let cpu = options.cpu.unwrap_or(0);
            stream(
                to,
                |out| PerfScript::new(out, cpu),
                |exporter| (exporter.into_inner(), Vec::new()),
            )
        },
    },
];

/// Where an export goes.
pub enum Destination {
    /// Standard output, or any other pipe.
    Pipe(Box<dyn Write + Send>),
    /// A file, or, if the format needs one, a directory. It has this name when it is whole.
    Path(PathBuf),
    /// The same, in place of what the same format left there before.
    Over(PathBuf),
}

impl std::fmt::Debug for Destination {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Pipe(_) => f.write_str("Pipe"),
            Self::Path(path) => f.debug_tuple("Path").field(path).finish(),
            Self::Over(path) => f.debug_tuple("Over").field(path).finish(),
        }
    }
}

/// Why an export cannot begin or end.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// No such format.
    #[error("there is no format `{asked}`: take reprise or one of {}", names())]
    UnknownFormat {
        /// What was asked for.
        asked: String,
    },
    /// Something is set that the format does not know.
    #[error("{flag} has no effect on the format {format}: leave it out")]
    UnknownSetting {
        /// The option.
        flag: &'static str,
        /// The format.
        format: &'static str,
    },
    /// The file's name asks for a compression that the format's readers do not know.
    #[error("readers of {format} do not take .{extension} files: give the output {advice}")]
    Compression {
        /// The format.
        format: &'static str,
        /// What was asked for.
        extension: &'static str,
        /// What they do take.
        advice: String,
    },
    /// A directory does not go into a pipe.
    #[error("the format {format} is a directory of files and no stream: give a name to -o")]
    NoPipe {
        /// The format.
        format: &'static str,
    },
    /// The output cannot be made.
    #[error("the output cannot be made: {0}")]
    Create(io::Error),
    /// The output cannot be finished. It is gone.
    #[error("the output cannot be finished: {0}")]
    Finish(io::Error),
}

/// The flag of an option that is set and is none of these settings.
pub fn foreign_setting(options: &ExportOptions, settings: &[Setting]) -> Option<&'static str> {
    let foreign = |row: &&SettingRow| (row.is_set)(options) && !settings.contains(&row.setting);
    SETTINGS.iter().find(foreign).map(|row| row.flag)
}

fn names() -> String {
    FORMATS.iter().map(|format| format.name).collect::<Vec<_>>().join(", ")
}

impl Format {
    /// The format of this name.
    ///
    /// # Errors
    /// If there is none; the error names all that there are.
    pub fn named(name: &str) -> Result<&'static Self, ExportError> {
        let found = FORMATS.iter().find(|format| format.name == name);
        found.ok_or_else(|| ExportError::UnknownFormat { asked: name.to_owned() })
    }

    /// The format that a file's name asks for by its ending, behind which a compression may stand.
    pub fn of(path: &Path) -> Option<&'static Self> {
        let stem = match Compression::of(path) {
            Compression::None => path.to_owned(),
            _ => path.with_extension(""),
        };
        let extension = stem.extension()?;
        FORMATS.iter().find(|format| extension == format.extension)
    }

    /// Whether options and destination go with the format: a path, or a pipe.
    ///
    /// # Errors
    /// If they do not.
    pub fn check(&self, options: &ExportOptions, path: Option<&Path>) -> Result<(), ExportError> {
        if let Some(flag) = foreign_setting(options, self.settings) {
            return Err(ExportError::UnknownSetting { flag, format: self.name });
        }
        match path {
            None if self.shape == Shape::Directory => {
                Err(ExportError::NoPipe { format: self.name })
            }
            None => Ok(()),
            Some(path) => self.check_compression(path),
        }
    }

    /// Begins an export.
    ///
    /// # Errors
    /// If an option or the destination does not go with the format, or the output cannot be made.
    pub fn open(
        &'static self,
        options: &ExportOptions,
        to: Destination,
    ) -> Result<Export, ExportError> {
        let path = match &to {
            Destination::Pipe(_) => None,
            Destination::Path(path) | Destination::Over(path) => Some(path.as_path()),
        };
        self.check(options, path)?;
        let exporter = (self.start)(to, options).map_err(ExportError::Create)?;
        Ok(Export { exporter })
    }

    fn check_compression(&self, path: &Path) -> Result<(), ExportError> {
        let wanted = Compression::of(path);
        let row = COMPRESSIONS.iter().find(|(compression, _)| *compression == wanted);
        match row {
            Some((compression, extension)) if !self.compressions.contains(compression) => {
                let known = COMPRESSIONS.iter().filter(|(one, _)| self.compressions.contains(one));
                let known: Vec<String> = known.map(|(_, ending)| format!(".{ending}")).collect();
                let advice = match known.as_slice() {
                    [] => "another name".to_owned(),
                    endings => {
                        format!("a name that ends with {} or none of these", endings.join(", "))
                    }
                };
                Err(ExportError::Compression { format: self.name, extension, advice })
            }
            _ => Ok(()),
        }
    }
}

/// An export under way: an observer. [`Export::finish`] makes its output whole; dropped before that,
/// it leaves no file.
pub struct Export {
    exporter: Box<dyn Exporter>,
}

impl std::fmt::Debug for Export {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Export").finish_non_exhaustive()
    }
}

/// What an export came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exported {
    /// Bytes written, compressed.
    pub bytes: u64,
    /// What the export left out or added, a line each.
    pub notes: Vec<String>,
}

/// Notes on what there is any of.
pub(crate) fn notes(counts: &[(u64, &str)]) -> Vec<String> {
    let any = counts.iter().filter(|(count, _)| *count > 0);
    any.map(|(count, what)| format!("{count} {what}")).collect()
}

impl Export {
    /// Gives the output its final name. The trace has ended before ([`Observer::end`]).
    ///
    /// # Errors
    /// If that fails; there is no output then.
    pub fn finish(self) -> Result<Exported, ExportError> {
        self.exporter.close().map_err(ExportError::Finish)
    }
}

impl Observer for Export {
    fn begin(&mut self, position: &Position) -> Result<(), TraceError> {
        self.exporter.begin(position)
    }

    fn new_blocks(&mut self) {
        self.exporter.new_blocks();
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        self.exporter.run(run)
    }

    fn runs(&mut self, runs: &mut PlainRuns<'_>) -> Result<(), TraceError> {
        self.exporter.runs(runs)
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        self.exporter.event(event)
    }

    fn end(&mut self) -> Result<(), TraceError> {
        self.exporter.end()
    }
}

/// An observer whose output becomes whole.
trait Exporter: Observer + Send {
    fn close(self: Box<Self>) -> io::Result<Exported>;
}

/// An exporter of one stream.
struct Stream<O> {
    observer: O,
    /// Takes the exporter apart: its output, and its notes.
    parts: fn(O) -> (Output, Vec<String>),
}

impl<O: Observer + Send> Exporter for Stream<O> {
    fn close(self: Box<Self>) -> io::Result<Exported> {
        let (output, notes) = (self.parts)(self.observer);
        Ok(Exported { bytes: output.finish()?, notes })
    }
}

impl<O: Observer> Observer for Stream<O> {
    fn begin(&mut self, position: &Position) -> Result<(), TraceError> {
        self.observer.begin(position)
    }

    fn new_blocks(&mut self) {
        self.observer.new_blocks();
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        self.observer.run(run)
    }

    fn runs(&mut self, runs: &mut PlainRuns<'_>) -> Result<(), TraceError> {
        self.observer.runs(runs)
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        self.observer.event(event)
    }

    fn end(&mut self) -> Result<(), TraceError> {
        self.observer.end()
    }
}

impl Exporter for Parquet {
    fn close(self: Box<Self>) -> io::Result<Exported> {
        let summary = self.finish()?;
        Ok(Exported { bytes: summary.bytes, notes: Vec::new() })
    }
}

/// Begins an exporter of one stream.
fn stream<O: Observer + Send + 'static>(
    to: Destination,
    start: impl FnOnce(Output) -> O,
    parts: fn(O) -> (Output, Vec<String>),
) -> io::Result<Box<dyn Exporter>> {
    let output = match to {
        Destination::Pipe(pipe) => Output::pipe(pipe),
        Destination::Path(path) | Destination::Over(path) => Output::file(&path)?,
    };
    Ok(Box::new(Stream { observer: start(output), parts }))
}
