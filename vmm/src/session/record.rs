//! Runs a guest, with or without recording it.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use reprise_devices::board::Board;
use reprise_devices::cpu_model;
use reprise_host::{HostError, HostOptions, LogFile, LogTotals, RealHost, host_info};
use reprise_machine::clock::TimeSource;
use reprise_machine::engine::Engine;
use reprise_machine::inputs::Recording;
use reprise_machine::machine::Machine;
use reprise_machine::outcome::Outcome;
use reprise_trace::header::{CpuModelInfo, Header, MachineInfo};
use reprise_trace::log::{DiscardSink, FrameSink, LogError, LogWriter};
use reprise_trace::recording::{RecordingError, RecordingWriter};

use super::assembly::{EngineVisitor, LoadedGuest};
use super::choice::{Choice, EngineKind};
use super::guest::Guest;
use super::report::SessionReport;

/// Where a recording goes.
#[derive(Clone, Debug)]
pub struct RecordTo {
    /// The file.
    pub path: PathBuf,
    /// Overwrite what is there.
    pub force: bool,
}

impl RecordTo {
    /// Tells early that the file is in the way, before a guest is fetched and started for nothing.
    ///
    /// # Errors
    /// The file exists and may not be overwritten.
    pub fn check(&self) -> Result<()> {
        if !self.force && self.path.exists() {
            return Err(self.exists());
        }
        Ok(())
    }

    /// Removes what was created, unless it is a device or a pipe.
    fn remove(&self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|metadata| metadata.is_file()) {
            let _ = fs::remove_file(&self.path);
        }
    }

    fn exists(&self) -> anyhow::Error {
        let shown = self.path.display();
        anyhow!("{shown} exists: give another name, or --force to overwrite it")
    }
}

/// A run to be made.
pub struct RunPlan<'a> {
    /// The guest.
    pub guest: &'a Guest,
    /// What executes it.
    pub choice: Choice,
    /// Guest RAM, in MiB.
    pub memory_mib: u64,
    /// How the machine meets the world.
    pub host: HostOptions,
}

/// Runs the guest without recording it.
///
/// # Errors
/// The guest cannot be loaded, or engine or host refuse something.
pub fn run(plan: RunPlan<'_>) -> Result<SessionReport> {
    let (guest, choice) = (plan.guest, plan.choice.clone());
    let finished = execute(plan, |_| Ok(DiscardSink))?;
    let mut report =
        SessionReport::new("run", &guest.name, choice.kind, &finished.outcome, finished.wall);
    report.engine_reason = choice.reason;
    report.console_failure = finished.console_failure;
    Ok(report)
}

/// Runs the guest and records it.
///
/// # Errors
/// As [`run`], and if the recording cannot be written; what was written then replays.
pub fn record(plan: RunPlan<'_>, to: &RecordTo) -> Result<SessionReport> {
    let (guest, choice) = (plan.guest, plan.choice.clone());
    let mut image_bytes = 0;
    let finished = execute(plan, |header| {
        let opened = open_recording(to, header, guest)?;
        image_bytes = opened.image_bytes;
        Ok(opened.log)
    })
    .inspect_err(|error| {
        // The host refuses before the machine starts, and after the file was begun: there is
        // nothing in it, and it would be in the way of the next attempt.
        if error.is::<HostError>() {
            to.remove();
        }
    })?;
    let LogTotals { log_bytes, file_bytes } = match finished.sink {
        Some(log) => log.finish()?,
        None => bail!("the recording was not closed: what was written before replays"),
    };
    let mut report =
        SessionReport::new("record", &guest.name, choice.kind, &finished.outcome, finished.wall)
            .with_file(log_bytes, image_bytes, file_bytes);
    report.engine_reason = choice.reason;
    report.console_failure = finished.console_failure;
    Ok(report)
}

/// What a run came to.
struct Finished<S> {
    outcome: Outcome,
    sink: Option<S>,
    wall: Duration,
    console_failure: Option<String>,
}

fn execute<S: FrameSink>(
    plan: RunPlan<'_>,
    open_sink: impl FnOnce(&Header) -> Result<S>,
) -> Result<Finished<S>> {
    let RunPlan { guest, choice, memory_mib, host } = plan;
    let now_unix_s = unix_time_s();
    let loaded = LoadedGuest::load(&guest.source(), memory_mib, now_unix_s)
        .with_context(|| format!("cannot start {}", guest.name))?;
    let header = header(guest, choice.kind, memory_mib, now_unix_s);
    let time = choice.kind.time_source();
    loaded.with_engine(choice.kind, Run { time, host, open_sink: || open_sink(&header) })?
}

/// Starts the machine once there is an engine: only then is a file created.
struct Run<F> {
    time: TimeSource,
    host: HostOptions,
    open_sink: F,
}

impl<S: FrameSink, F: FnOnce() -> Result<S>> EngineVisitor for Run<F> {
    type Output = Result<Finished<S>>;

    fn visit<E: Engine>(self, engine: E, board: Board) -> Self::Output {
        let sink = (self.open_sink)()?;
        let host = RealHost::start(self.host, engine.kicker())?;
        let recording = Recording::new(host, LogWriter::new(sink));
        let mut machine = Machine::new(engine, board, recording, self.time);
        let result = machine.run();
        let (_, _, recording) = machine.into_parts();
        let (mut host, sink) = recording.into_parts();
        let wall = host.elapsed();
        let console_failure = host.console_failure().map(ToString::to_string);
        // The terminal is given back before anything is reported.
        drop(host);
        Ok(Finished { outcome: result?, sink, wall, console_failure })
    }
}

struct OpenedRecording {
    log: LogFile,
    image_bytes: u64,
}

/// Creates the file and writes everything that stands before the log.
fn open_recording(to: &RecordTo, header: &Header, guest: &Guest) -> Result<OpenedRecording> {
    let file = create(to)?;
    begin(&file, header, guest).map_err(|error| {
        // Without all images it is no recording that anyone could use.
        to.remove();
        match error.downcast::<RecordingError>() {
            Ok(RecordingError::Log(LogError::Write(error))) => {
                anyhow!("cannot write {}: {error}; make room and record again", to.path.display())
            }
            Ok(other) => other.into(),
            Err(other) => other,
        }
    })
}

fn create(to: &RecordTo) -> Result<File> {
    let shown = to.path.display();
    let mut options = File::options();
    options.write(true);
    if to.force {
        options.create(true).truncate(true);
    } else {
        options.create_new(true);
    }
    match options.open(&to.path) {
        Ok(file) => Ok(file),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Err(to.exists()),
        Err(error) => bail!("cannot create {shown}: {error}; check the path and its permissions"),
    }
}

fn begin(file: &File, header: &Header, guest: &Guest) -> Result<OpenedRecording> {
    let mut writer = RecordingWriter::create(file.try_clone()?, header)?;
    let before_images = writer.total_bytes();
    for (index, (_, image)) in guest.images().enumerate() {
        writer.write_image(index, &image.bytes)?;
    }
    let image_bytes = writer.total_bytes() - before_images;
    Ok(OpenedRecording { log: LogFile::start(writer, file.try_clone()?)?, image_bytes })
}

fn header(guest: &Guest, kind: EngineKind, ram_mib: u64, now_unix_s: u64) -> Header {
    let ns_per_tick = match kind.time_source() {
        TimeSource::Ticks { ns_per_tick } => ns_per_tick,
        TimeSource::Host => 0,
    };
    Header {
        machine: MachineInfo { ram_mib, rtc_start_s: now_unix_s },
        cpu_model: CpuModelInfo { name: cpu_model::NAME.to_owned(), version: cpu_model::VERSION },
        tick_kind: kind.tick_kind(),
        ns_per_tick,
        engine: kind.engine_name().to_owned(),
        clock: kind.clock_name().to_owned(),
        host: host_info(),
        guest: guest.info(),
        created_unix_s: now_unix_s,
        reprise_version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

/// The host's wall clock, which the guest's real-time clock starts from.
fn unix_time_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
