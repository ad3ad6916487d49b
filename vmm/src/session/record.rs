//! Runs a guest, with or without recording it.

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use reprise_devices::board::Board;
use reprise_devices::cpu_model;
use reprise_host::{
    CheckpointThread, HostError, HostOptions, ImagesEmbedded, LogFile, LogTotals, RealHost,
    host_info,
};
use reprise_kvm::KvmClock;
use reprise_machine::checkpoint::Checkpointer;
use reprise_machine::clock::TimeSource;
use reprise_machine::digest::AccessedBits;
use reprise_machine::engine::{Engine, EngineError};
use reprise_machine::inputs::{Planned, Recording, Then};
use reprise_machine::machine::Machine;
use reprise_machine::outcome::{MachineError, Outcome};
use reprise_trace::header::{CpuModelInfo, Header, MachineInfo};
use reprise_trace::log::{DiscardSink, FrameSink, LogError, LogWriter};
use reprise_trace::recording::{RecordingError, RecordingWriter};

use super::assembly::{EngineVisitor, LoadedGuest, SoftOptions, TimeStampSites, Traps, Visited};
use super::checkpoints::{self, CheckpointArg, CheckpointReport};
use super::choice::{Choice, EngineKind};
use super::guest::Guest;
use super::hardware::BranchHardware;
use super::pmu_trap::PmuTrap;
use super::precautions;
use super::profile_report::ProfileReport;
use super::report::SessionReport;

/// Where a recording goes.
#[derive(Clone, Debug)]
pub struct RecordTo {
    /// The file.
    pub path: PathBuf,
    /// Overwrite what is there.
    pub force: bool,
    /// How often a checkpoint is kept beside it.
    pub checkpoints: CheckpointArg,
}

impl RecordTo {
    /// Tells early that the file cannot be created, before a guest is fetched and started for
    /// nothing.
    ///
    /// # Errors
    /// The path is a directory, its directory does not exist, or the file exists and may not be
    /// overwritten.
    pub fn check(&self) -> Result<()> {
        let shown = self.path.display();
        if self.path.is_dir() {
            bail!(
                "{shown} is a directory: give a file's name, such as {}",
                self.path.join("run.rr").display()
            );
        }
        let parent = self.path.parent().filter(|parent| !parent.as_os_str().is_empty());
        if let Some(parent) = parent.filter(|parent| !parent.is_dir()) {
            bail!(
                "cannot create {shown}: there is no directory {}; make it, or give another path",
                parent.display()
            );
        }
        if !self.force && self.path.exists() {
            return Err(self.exists());
        }
        if let Some(left_over) = checkpoints::left_over(&self.path).filter(|_| !self.force) {
            let shown = left_over.display();
            bail!("{shown} exists: give another name, or --force to overwrite it");
        }
        Ok(())
    }

    /// Removes what was begun and is of no use to anyone, because nothing happened yet or its images
    /// are not whole: it would be in the way of the next attempt. A device or a pipe stays.
    fn without_use(&self, error: anyhow::Error) -> anyhow::Error {
        if fs::symlink_metadata(&self.path).is_ok_and(|metadata| metadata.is_file()) {
            let _ = fs::remove_file(&self.path);
        }
        let in_machine = match error.downcast_ref::<MachineError>() {
            Some(MachineError::Recording { error, .. }) => Some(error),
            _ => None,
        };
        let in_writer = match error.downcast_ref::<RecordingError>() {
            Some(RecordingError::Log(error)) => Some(error),
            _ => None,
        };
        match in_machine.or(in_writer) {
            Some(LogError::Write(reason)) => {
                let shown = self.path.display();
                anyhow!("cannot write {shown}: {reason}; make room and record again")
            }
            _ => error,
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
    /// What it is to do after that.
    pub plan: Vec<Planned>,
    /// Guest RAM, in MiB.
    pub memory_mib: u64,
    /// How the software CPU is to run, if that is the engine.
    pub soft: SoftOptions,
    /// How the machine meets the world.
    pub host: HostOptions,
}

/// Runs the guest without recording it.
///
/// # Errors
/// The guest cannot be loaded, or engine or host refuse something.
pub fn run(plan: RunPlan<'_>) -> Result<SessionReport> {
    let hardware = plan.choice.hardware();
    run_on(&hardware, plan)
}

/// As [`run`]; where the clock is `pmu`, on this hardware.
///
/// # Errors
/// As [`run`].
pub fn run_on(hardware: &impl BranchHardware, plan: RunPlan<'_>) -> Result<SessionReport> {
    let (guest, choice) = (plan.guest, plan.choice.clone());
    let now_unix_s = unix_time_s();
    let traps = traps(hardware, &plan)?;
    let header = header(&plan, &traps, now_unix_s)?;
    let finished = execute(hardware, plan, &header, &traps, || Ok((DiscardSink, None)))?;
    let mut report =
        SessionReport::new("run", &guest.name, choice.kind, &finished.outcome, finished.wall);
    report.engine_reason.clone_from(&choice.reason);
    finished.tell(&mut report);
    Ok(report)
}

/// Runs the guest and records it.
///
/// # Errors
/// As [`run`], and if the recording cannot be written; what was written then replays.
pub fn record(plan: RunPlan<'_>, to: &RecordTo) -> Result<SessionReport> {
    let hardware = plan.choice.hardware();
    record_on(&hardware, plan, to)
}

/// As [`record`]; where the clock is `pmu`, on this hardware.
///
/// # Errors
/// As [`record`].
pub fn record_on(
    hardware: &impl BranchHardware,
    plan: RunPlan<'_>,
    to: &RecordTo,
) -> Result<SessionReport> {
    let (guest, choice) = (plan.guest, plan.choice.clone());
    let now_unix_s = unix_time_s();
    let traps = traps(hardware, &plan)?;
    let header = header(&plan, &traps, now_unix_s)?;
    let mut begun = None;
    let recorded = execute(hardware, plan, &header, &traps, || {
        let file = create(to)?;
        let embedded = begun.insert(ImagesEmbedded::default());
        let (log, identity) = start_log(&file, &header, guest, embedded)?;
        Ok((log, checkpoints::of_recording(&to.path, identity, to.checkpoints, choice.kind)?))
    })
    .and_then(|mut finished| match finished.sink.take() {
        Some(log) => Ok((finished, log.finish()?)),
        None => bail!("the recording was not closed: what was written before replays"),
    });
    let (finished, totals) = recorded.map_err(|error| match &begun {
        Some(embedded) if !embedded.get() || error.is::<HostError>() => to.without_use(error),
        _ => error,
    })?;
    let LogTotals { image_bytes, log_bytes, file_bytes } = totals;
    let mut report =
        SessionReport::new("record", &guest.name, choice.kind, &finished.outcome, finished.wall)
            .with_file(log_bytes, image_bytes, file_bytes);
    report.engine_reason.clone_from(&choice.reason);
    finished.tell(&mut report);
    Ok(report)
}

/// What a run came to.
struct Finished<S> {
    outcome: Outcome,
    sink: Option<S>,
    wall: Duration,
    console_failure: Option<String>,
    profile: Option<ProfileReport>,
    checkpoints: Option<CheckpointReport>,
}

impl<S> Finished<S> {
    /// Puts what is not in the outcome into the report.
    fn tell(self, report: &mut SessionReport) {
        report.console_failure = self.console_failure;
        report.profile = self.profile;
        report.checkpoints = self.checkpoints;
    }
}

/// What becomes of RDTSC in this run.
fn traps(hardware: &impl BranchHardware, plan: &RunPlan<'_>) -> Result<Traps> {
    let none = Traps::of_relay();
    if hands_over(&plan.plan) {
        return Ok(none);
    }
    let (kernel, command_line) = (&plan.guest.kernel.bytes, &plan.guest.cmdline);
    Ok(match plan.choice.kind {
        EngineKind::Pmu => {
            let anew = || PmuTrap::of_kernel(&hardware.time_stamp_trap(), kernel, command_line);
            Traps { pmu: plan.choice.trap().cloned().unwrap_or_else(anew), ..none }
        }
        EngineKind::Kvm(KvmClock::Sync) => {
            Traps { sync: TimeStampSites::trapped_here(kernel)?, ..none }
        }
        EngineKind::Kvm(KvmClock::Step) | EngineKind::Soft => none,
    })
}

fn hands_over(plan: &[Planned]) -> bool {
    plan.iter().any(|planned| matches!(planned.then, Then::HandOver(_)))
}

/// Where a run's log goes, and who takes its checkpoints.
type Sinks<S> = (S, Option<(Box<dyn Checkpointer>, CheckpointThread)>);

fn execute<S: FrameSink>(
    hardware: &impl BranchHardware,
    plan: RunPlan<'_>,
    header: &Header,
    traps: &Traps,
    open_sinks: impl FnOnce() -> Result<Sinks<S>>,
) -> Result<Finished<S>> {
    let RunPlan { guest, choice, plan, memory_mib, soft, host } = plan;
    let rtc_start_s = header.machine.rtc_start_s;
    let loaded = LoadedGuest::load(&guest.source(), memory_mib, rtc_start_s)
        .with_context(|| format!("cannot start {}", guest.name))?;
    let (time, accessed_bits) = (choice.kind.time_source(), choice.kind.accessed_bits());
    let hands_over = hands_over(&plan);
    let run = Run { time, accessed_bits, host, plan, open_sinks };
    if hands_over {
        return loaded.with_relay(hardware, header, soft, run)?;
    }
    let Visited { output, profile } =
        loaded.with_engine(choice.kind, hardware, traps, soft, run)?;
    Ok(Finished { profile, ..output? })
}

/// Starts the machine once there is an engine: only then is a file created.
struct Run<F> {
    time: TimeSource,
    accessed_bits: AccessedBits,
    host: HostOptions,
    plan: Vec<Planned>,
    open_sinks: F,
}

impl<S: FrameSink, F: FnOnce() -> Result<Sinks<S>>> EngineVisitor for Run<F> {
    type Output = Result<Finished<S>>;

    fn visit<E: Engine>(self, engine: E, board: Board) -> (Self::Output, E) {
        let Self { time, accessed_bits, host, plan, open_sinks } = self;
        let opened =
            open_sinks().and_then(|sinks| Ok((sinks, RealHost::start(host, engine.kicker())?)));
        let ((sink, checkpoints), host) = match opened {
            Ok(opened) => opened,
            Err(error) => return (Err(error), engine),
        };
        let recording = Recording::new(host, LogWriter::new(sink)).with_plan(plan);
        let machine = Machine::new(engine, board, recording, time);
        let mut machine = machine.with_accessed_bits(accessed_bits);
        let checkpoint_thread = checkpoints.map(|(checkpointer, thread)| {
            machine.set_checkpointer(checkpointer);
            thread
        });
        let started = Instant::now();
        let result = machine.run();
        // What follows gives back memory and threads, which is no part of the run.
        let wall = started.elapsed();
        let (engine, _, recording) = machine.into_parts();
        let (mut host, sink) = recording.into_parts();
        let console_failure = host.console_failure().map(ToString::to_string);
        // The terminal is given back before anything is reported.
        drop(host);
        let checkpoints = checkpoint_thread.map(|thread| thread.finish().into());
        let finished = result.map(|outcome| Finished {
            outcome,
            sink,
            wall,
            console_failure,
            profile: None,
            checkpoints,
        });
        (finished.map_err(Into::into), engine)
    }
}

fn create(to: &RecordTo) -> Result<File> {
    let shown = to.path.display();
    let mut options = File::options();
    options.write(true);
    if to.force {
        // Emptied once it is known that nobody uses it.
        options.create(true).truncate(false);
    } else {
        options.create_new(true);
    }
    match options.open(&to.path) {
        Ok(file) => {
            // Where there are no locks nobody is kept out.
            if matches!(file.try_lock(), Err(TryLockError::WouldBlock)) {
                bail!(
                    "{shown} is being recorded or replayed by another process: wait for its end, or give \
                     another name"
                );
            }
            if file.metadata().is_ok_and(|metadata| metadata.is_file()) {
                file.set_len(0).with_context(|| format!("cannot empty {shown}"))?;
            }
            checkpoints::remove_left_over(&to.path)?;
            Ok(file)
        }
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Err(to.exists()),
        Err(error) => bail!("cannot create {shown}: {error}; check the path and its permissions"),
    }
}

/// Writes the header, and leaves the images and the log to a thread. Gives the recording's identity as
/// well.
fn start_log(
    file: &File,
    header: &Header,
    guest: &Guest,
    embedded: &ImagesEmbedded,
) -> Result<(LogFile, [u8; 32])> {
    let writer = RecordingWriter::create(file.try_clone()?, header)?;
    let identity = writer.identity();
    let images = guest.images().map(|(_, image)| Arc::clone(&image.bytes)).collect();
    Ok((LogFile::start(writer, images, embedded, file.try_clone()?)?, identity))
}

fn header(run: &RunPlan<'_>, traps: &Traps, now_unix_s: u64) -> Result<Header> {
    let RunPlan { guest, choice: Choice { kind, .. }, plan, memory_mib: ram_mib, .. } = run;
    let (kind, ram_mib) = (*kind, *ram_mib);
    let ns_per_tick = kind.time_source().ns_per_tick();
    let precautions = precautions::of_run(kind, plan, guest, traps).map_err(EngineError::from)?;
    Ok(Header {
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
        precautions,
    })
}

/// The host's wall clock, which the guest's real-time clock starts from.
fn unix_time_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
