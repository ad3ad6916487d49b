//! Replays a recording, from the images that it embeds, and verifies it.

use std::fs::{self, File};
use std::io::{BufReader, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use reprise_devices::board::Board;
use reprise_devices::cpu_model;
use reprise_host::host_info;
use reprise_machine::clock::TimeSource;
use reprise_machine::engine::{Engine, Kick};
use reprise_machine::inputs::{Replaying, Verification};
use reprise_machine::machine::Machine;
use reprise_machine::outcome::{Conclusion, MachineError, Outcome};
use reprise_trace::header::{Header, ImageRole};
use reprise_trace::log::LogReader;
use reprise_trace::recording::Recording;

use super::assembly::{EngineVisitor, LoadedGuest, SoftOptions};
use super::choice::{self, EngineArg, EngineKind};
use super::file_kind::NoFile;
use super::report::{SessionReport, damage_of};
use crate::boot::GuestSource;

/// How often a replay that is watched says how far it is.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// Told the tick that a replay has reached.
pub type TickObserver = Box<dyn FnMut(u64)>;

/// How to replay.
#[derive(Default)]
pub struct ReplayOptions {
    /// Which engine.
    pub engine: EngineArg,
    /// How the software CPU is to run, if that is the engine.
    pub soft: SoftOptions,
    /// Stop at this tick.
    pub until_tick: Option<u64>,
    /// Console output is written there.
    pub console: Option<Box<dyn Write>>,
    /// Told how far the replay is, a few times a second.
    pub progress: Option<TickObserver>,
}

/// A replay's report, and notes for a person.
#[derive(Debug)]
pub struct Replayed {
    /// What it came to.
    pub report: SessionReport,
    /// What may explain a divergence.
    pub notes: Vec<String>,
    /// What executed it.
    pub kind: EngineKind,
}

/// Opens a recording and checks that it is one.
///
/// # Errors
/// The file cannot be read, is no recording, or has no usable header.
pub fn open(path: &Path) -> Result<Recording> {
    let shown = path.display();
    let unreadable =
        |error| anyhow!("cannot read {shown}: {error}; check the path and its permissions");
    // Before it is opened: a pipe that nobody writes to would not come back.
    let kind = fs::metadata(path).map_err(unreadable)?.file_type();
    if let Some(kind) = NoFile::of(kind) {
        bail!("{shown} is {kind}: give the file that `reprise record` wrote");
    }
    let file = File::open(path).map_err(unreadable)?;
    Recording::open(BufReader::new(file)).with_context(|| shown.to_string())
}

/// Replays a recording.
///
/// # Errors
/// It cannot be used at all, or this host lacks what it needs. A divergence is a report.
pub fn replay(recording: &Recording, options: ReplayOptions) -> Result<Replayed> {
    let header = recording.header();
    let kind = choice::for_replay(options.engine, header)?;
    check_cpu_model(header)?;
    let loaded = load(recording)?;
    let same_engine = choice::recorded_kind(header) == Some(kind);
    let verification = if same_engine { Verification::Exact } else { Verification::AcrossEngines };
    let soft = options.soft;
    let ((outcome, wall), profile) = loaded.with_engine(
        kind,
        soft,
        Replay { log: recording.log(), time: time_source(header), verification, options },
    )?;
    let mut report = report(recording, kind, verification, &outcome?, wall);
    report.profile = profile;
    Ok(Replayed { report, notes: notes(header, same_engine, kind), kind })
}

/// How the recording's virtual time came about.
pub(super) fn time_source(header: &Header) -> TimeSource {
    match header.ns_per_tick {
        0 => TimeSource::Host,
        ns_per_tick => TimeSource::Ticks { ns_per_tick },
    }
}

pub(super) fn check_cpu_model(header: &Header) -> Result<()> {
    let model = &header.cpu_model;
    if model.name != cpu_model::NAME || model.version != cpu_model::VERSION {
        bail!(
            "recorded with CPU model {} version {}, and this Reprise has {} version {}: \
             use the Reprise that recorded it",
            model.name,
            model.version,
            cpu_model::NAME,
            cpu_model::VERSION,
        );
    }
    Ok(())
}

/// Builds the guest from the embedded images, by the code that recorded it.
pub(super) fn load(recording: &Recording) -> Result<LoadedGuest> {
    let header = recording.header();
    let image_of = |role| {
        let index = header.guest.images.iter().position(|image| image.role == role);
        index.map(|index| recording.read_image(index)).transpose()
    };
    let Some(kernel) = image_of(ImageRole::Kernel)? else {
        bail!("the recording embeds no kernel: take another copy");
    };
    let initrd = image_of(ImageRole::Initrd)?;
    let source = GuestSource {
        kernel: &kernel,
        initrd: initrd.as_deref(),
        cmdline: &header.guest.command_line,
    };
    LoadedGuest::load(&source, header.machine.ram_mib, header.machine.rtc_start_s)
        .context("the recorded guest cannot be started")
}

struct Replay {
    log: LogReader,
    time: TimeSource,
    verification: Verification,
    options: ReplayOptions,
}

impl EngineVisitor for Replay {
    type Output = (Result<Outcome, MachineError>, Duration);

    fn visit<E: Engine>(self, engine: E, board: Board) -> (Self::Output, E) {
        let Self { log, time, verification, options } = self;
        let mut inputs = Replaying::new(log).verifying(verification);
        if let Some(mut console) = options.console {
            // Whoever reads it may go away; the replay is worth going on with.
            inputs = inputs.on_console(move |bytes| {
                let _ = console.write_all(bytes);
            });
        }
        let mut kicks = None;
        if let Some(mut progress) = options.progress {
            inputs = inputs.on_progress(move |tick, _| progress(tick));
            kicks = Some(RegularKicks::start(engine.kicker()));
        }
        let mut machine = Machine::new(engine, board, inputs, time);
        let started = Instant::now();
        let outcome = machine.run_until(options.until_tick.unwrap_or(u64::MAX));
        let wall = started.elapsed();
        drop(kicks);
        let (engine, _, _) = machine.into_parts();
        ((outcome, wall), engine)
    }
}

/// Kicks an engine at regular intervals, so that the machine tells how far it is.
struct RegularKicks {
    stop: Option<Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl RegularKicks {
    fn start(kick: Arc<dyn Kick>) -> Self {
        let (stop, stopped) = channel::<()>();
        // Without the thread there is no progress, which is no reason not to replay.
        let thread = std::thread::Builder::new()
            .name("progress".to_owned())
            .spawn(move || {
                use std::sync::mpsc::RecvTimeoutError::Timeout;
                while stopped.recv_timeout(PROGRESS_INTERVAL) == Err(Timeout) {
                    kick.kick();
                }
            })
            .ok();
        Self { stop: Some(stop), thread }
    }
}

impl Drop for RegularKicks {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn report(
    recording: &Recording,
    kind: EngineKind,
    verification: Verification,
    outcome: &Outcome,
    wall: Duration,
) -> SessionReport {
    let (header, summary) = (recording.header(), recording.summary());
    let mut report = SessionReport::new("replay", &header.guest.name, kind, outcome, wall)
        .with_file(summary.log_bytes, summary.image_bytes, summary.file_bytes);
    let nothing_recorded = summary.record_count == 0;
    let agrees = match &outcome.conclusion {
        Conclusion::Ended(_) | Conclusion::TargetReached => true,
        Conclusion::CutShort { .. } => !nothing_recorded,
        Conclusion::Diverged(_) => false,
    };
    let damage = match &outcome.conclusion {
        Conclusion::CutShort { damage: Some(damage) } => Some(damage_of(damage)),
        _ => summary.damage.as_ref().map(ToString::to_string),
    };
    if matches!(outcome.conclusion, Conclusion::TargetReached | Conclusion::Diverged(_)) {
        // The log is the whole run's, and this is a part of it.
        report.bytes_per_kiloinstruction = None;
    }
    // A file that was altered is not the recording, wherever it was altered.
    report.verified = Some(agrees && damage.is_none());
    report.damage = damage;
    // The guest's own status was the recording's; a replay tells whether it is the same run.
    report.exit_code = u8::from(report.verified == Some(false));
    report.verified_until = outcome.verified_until.map(Into::into);
    report.verification = Some(match verification {
        Verification::Exact => "exact",
        Verification::AcrossEngines => "across-engines",
    });
    report.complete = Some(summary.complete);
    report
}

fn notes(header: &Header, same_engine: bool, kind: EngineKind) -> Vec<String> {
    let mut notes = Vec::new();
    if !same_engine {
        notes.push(format!(
            "recorded on engine {} (clock {}), replayed on {}: positions and console output are \
             compared, digests of CPU and RAM are not",
            header.engine,
            header.clock,
            kind.engine_name()
        ));
    }
    let (there, here) = (&header.host, host_info());
    let of = |host: &reprise_trace::header::HostInfo| {
        (host.cpu_vendor.clone(), host.cpu_family, host.cpu_model, host.cpu_stepping)
    };
    if of(there) != of(&here) {
        notes.push(format!(
            "recorded on {:?}, replayed on {:?}: flags and results that the architecture leaves \
             undefined may differ",
            there.cpu_brand, here.cpu_brand
        ));
    }
    notes
}
