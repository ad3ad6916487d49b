//! Replays a recording, from the images that it embeds, and verifies it.

use std::fs::{self, File};
use std::io::{BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use reprise_cpu::latitude_sites::Sites;
use reprise_kvm::KvmClock;
use reprise_machine::checkpoint::Checkpointer;
use reprise_machine::digest::AccessedBits;
use reprise_machine::inputs::Verification;
use reprise_machine::lawful::SetAside;
use reprise_machine::outcome::{Conclusion, MachineError, Outcome};
use reprise_replay::{Beginning, OnSoftware, ReplayError, Replayable, Start, accessed_bits};
use reprise_trace::event::HandOver;
use reprise_trace::header::{Header, ImageRole};
use reprise_trace::moment::TickKind;
use reprise_trace::recording::Recording;
use reprise_trace::stretches::Course;

use super::assembly::{self, SoftOptions, TimeStampSites};
use super::choice::{ChoiceError, ClockArg, EngineArg, EngineKind};
use super::drive::{Drive, Driven};
use super::file_kind::NoFile;
use super::hardware::{BranchHardware, HostHardware, time_stamp_counter_of};
use super::makers::{self, MakerDependentReport};
use super::pmu_trap::{PmuTrap, not_trapped_here, trapping_engine};
use super::profile_report::ProfileReport;
use super::report::{SessionReport, SetAsideReport, damage_of};
use super::rewriting::{self, ForBranches};
use super::stretches::{self, Followed, PlanError, StretchReport};

/// What [`SessionReport::verification`] says where another engine recorded.
const ACROSS_ENGINES: &str = "across-engines";

/// Told the tick that a replay has reached.
pub type TickObserver = Box<dyn FnMut(u64)>;

/// A point of a run as a user names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// A tick.
    Tick(u64),
    /// Nanoseconds of guest time since the machine started.
    Time(u64),
}

impl At {
    /// Whether a run that came to this tick and this guest time is there, or past it.
    pub fn is_reached(self, tick: u64, virtual_ns: u64) -> bool {
        match self {
            Self::Tick(wanted) => tick >= wanted,
            Self::Time(wanted_ns) => virtual_ns >= wanted_ns,
        }
    }

    /// Whether a run that came to this tick and this guest time is past it.
    pub fn is_passed(self, tick: u64, virtual_ns: u64) -> bool {
        match self {
            Self::Tick(wanted) => tick > wanted,
            Self::Time(wanted_ns) => virtual_ns > wanted_ns,
        }
    }

    /// Whether it lies behind another, if that can be told before a run.
    pub fn lies_behind(self, other: Self) -> bool {
        match (self, other) {
            (Self::Tick(one), Self::Tick(other)) | (Self::Time(one), Self::Time(other)) => {
                one > other
            }
            _ => false,
        }
    }
}

/// How to replay.
#[derive(Default)]
pub struct ReplayOptions {
    /// Which engine.
    pub engine: EngineArg,
    /// How it is to count: as the recording says, or `pmu` where that counts instructions.
    pub clock: ClockArg,
    /// Where a recording that was rewritten for the clock `pmu` is kept.
    pub rewritten: Option<PathBuf>,
    /// Told how far that is.
    pub rewriting: Option<TickObserver>,
    /// How the software CPU is to run, if that is the engine.
    pub soft: SoftOptions,
    /// Begin at the last checkpoint before this, and show the console from here on.
    pub from: Option<At>,
    /// Stop here.
    pub until: Option<At>,
    /// Takes checkpoints on the way.
    pub checkpointer: Option<Box<dyn Checkpointer>>,
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
    pub followed: Followed,
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
    // Held as long as it is read, against `record --force`. One that is still being recorded can be read too.
    let _ = file.try_lock_shared();
    Recording::open(BufReader::new(file)).with_context(|| shown.to_string())
}

/// Opens a recording with the checkpoints beside it.
///
/// # Errors
/// As [`open`]. What is wrong with the checkpoints is told by [`Replayable::trouble`].
pub fn open_replayable(path: &Path) -> Result<Replayable> {
    Ok(Replayable::of(open(path)?, path))
}

/// Replays a recording.
///
/// # Errors
/// It cannot be used at all, or this host lacks what it needs. A divergence is a report.
pub fn replay(replayable: &Replayable, options: ReplayOptions) -> Result<Replayed> {
    replay_on(&HostHardware::default(), replayable, options)
}

/// As [`replay`]; where the clock is `pmu`, on this hardware.
///
/// # Errors
/// As [`replay`].
pub fn replay_on(
    hardware: &impl BranchHardware,
    replayable: &Replayable,
    mut options: ReplayOptions,
) -> Result<Replayed> {
    if let (Some(from), Some(until)) = (options.from, options.until)
        && from.lies_behind(until)
    {
        return Err(PlanError::ends_before(from, until).into());
    }
    let (header, stretches) =
        (replayable.recording().header(), replayable.course().stretches.len());
    options.engine = options.engine.beside(options.clock);
    if !rewriting::is_asked_for(options.engine, options.clock, (header, stretches))? {
        if options.rewritten.is_some() {
            return Err(ChoiceError::NothingRewritten.into());
        }
        return replay_as_recorded(hardware, replayable, options);
    }
    let rewritten = rewriting::for_branches(hardware, replayable, &mut options)?;
    let ForBranches { replayable, notes } = rewritten;
    // Its own clock now.
    (options.engine, options.clock) = (EngineArg::Kvm, ClockArg::Auto);
    let mut replayed = replay_as_recorded(hardware, &replayable, options)?;
    replayed.notes.splice(..0, notes);
    Ok(replayed)
}

/// Replays a recording by its own clock.
fn replay_as_recorded(
    hardware: &impl BranchHardware,
    replayable: &Replayable,
    options: ReplayOptions,
) -> Result<Replayed> {
    let (recording, course) = (replayable.recording(), replayable.course());
    let (whole, engine, soft) = (recording.header(), options.engine, options.soft);
    let follow = |records: u64| {
        let kind_of = |on: &HandOver| stretches::kind_of(hardware, whole, on, engine);
        Followed::of(course.ahead(records), kind_of)
    };
    let mut notes: Vec<_> = recording.summary().end_note().map(str::to_owned).into_iter().collect();
    let beginning = begin(replayable, options.from, follow, &mut notes)?;
    let (followed, from_tick) = (follow(beginning.records())?, beginning.tick());
    let header = &whole.of_stretch(beginning.stretch());
    let verification = followed.verification(header);
    let drive = Drive { replayable, verification, by_relay: followed.by_relay, options };
    let execution = Execution { hardware, recording, header, followed: &followed, engine, soft };
    let ran = execution.run(drive, beginning)?;
    if ran.times_back > 0 {
        let times = ran.times_back;
        notes.push(format!("the counter was late: went back to a checkpoint {times} times"));
    }
    notes.extend(parting_note(&ran));
    let outcome = ran.outcome?;
    let kind = followed.first();
    let mut report = SessionReport::new("replay", &header.guest.name, kind, &outcome, ran.wall);
    if from_tick > 0 {
        report = report.beginning_at(from_tick);
    }
    let recorded = StretchReport::of_log(from_tick, &header.engine, &header.clock, &outcome);
    report = report.of_stretches(recorded, &followed.kinds);
    if let Some(instructions) = ran.executed {
        report = report.having_executed(instructions, tick_name(header.tick_kind));
    }
    let mut report = judged(report, recording, verification, &outcome);
    report.set_aside = set_aside(course, &outcome.set_aside, Some(&outcome));
    report.maker_dependent = MakerDependentReport::of(ran.sites.as_deref().unwrap_or_default());
    report.times_parted = ran.times_parted;
    report.profile = ran.profile;
    notes.extend(report.warning.clone());
    notes.extend(self::notes(header, &report, ran.sites.as_deref()));
    Ok(Replayed { report, notes, followed })
}

/// Tells that the guest went another way, and what came of beginning anew.
fn parting_note(ran: &Ran) -> Option<String> {
    let counted = match ran.times_parted {
        0 => return None,
        1 => "once".to_owned(),
        times => format!("{times} times"),
    };
    let diverged = |outcome: &Outcome| outcome.divergence().is_some();
    Some(match ran.outcome.as_ref().is_ok_and(diverged) {
        true => format!("began anew {counted}, and it differs still"),
        false => format!(
            "the guest went another way than recorded {counted}, and not when it began anew: this processor did \
             what no log has, such as setting an accessed bit early; console output shown before may be of that \
             way; --engine soft is exact"
        ),
    })
}

/// What executes a replay.
struct Execution<'a, H> {
    hardware: &'a H,
    recording: &'a Recording,
    /// Of the stretch that it begins in.
    header: &'a Header,
    followed: &'a Followed,
    engine: EngineArg,
    soft: SoftOptions,
}

impl<H: BranchHardware> Execution<'_, H> {
    fn run(self, drive: Drive<'_>, beginning: Beginning) -> Result<Ran> {
        let Self { hardware, recording, header, followed, engine, soft } = self;
        Ok(match followed.first() {
            _ if followed.by_relay => {
                let make = |on: &HandOver, ram| {
                    let (there, of) = (hardware.clone(), header.clone());
                    let choose = move |on: &HandOver| stretches::kind_of(&there, &of, on, engine);
                    stretches::relay(hardware, ram, on, header, choose, soft)
                };
                Ran::of(drive.run(beginning, make)?).0
            }
            EngineKind::Soft => {
                let make = |_: &HandOver, ram| assembly::replaying_soft_engine(ram, header, soft);
                let (ran, mut engine) = Ran::of(drive.run(beginning, make)?);
                let executed = Some(engine.instructions_executed());
                let sites = Some(engine.software().latitude_sites());
                Ran { executed, sites, profile: assembly::leave(engine), ..ran }
            }
            EngineKind::Kvm(clock) => {
                let sites = recorded_time_stamp_sites(recording, clock)?;
                let make = |_: &HandOver, ram| assembly::kvm_engine(ram, clock, &sites);
                Ran::of(drive.run(beginning, make)?).0
            }
            EngineKind::Pmu => match recorded_trap(hardware, recording)? {
                PmuTrap::On(kernel) => {
                    let make = |_: &HandOver, ram| trapping_engine(hardware, ram, &kernel);
                    Ran::of(drive.run(beginning, make)?).0
                }
                PmuTrap::Off(_) => {
                    let counter = time_stamp_counter_of(header);
                    let make = |_: &HandOver, ram| hardware.engine(ram, counter);
                    Ran::of(drive.run(beginning, make)?).0
                }
            },
        })
    }
}

/// What a replay came to, and what its engine tells of it.
struct Ran {
    outcome: Result<Outcome, MachineError>,
    wall: Duration,
    /// How often it went back to a checkpoint, because the engine stopped late.
    times_back: u32,
    /// How often it began anew because the guest had gone another way.
    times_parted: u32,
    /// Instructions, where the engine counts them whatever the recording does.
    executed: Option<u64>,
    /// Instructions whose results makers may have otherwise, where the engine notes them.
    sites: Option<Vec<Sites>>,
    profile: Option<ProfileReport>,
}

impl Ran {
    fn of<E>(driven: Driven<E>) -> (Self, E) {
        let Driven { outcome, wall, engine, times_back, times_parted } = driven;
        let (executed, sites, profile) = (None, None, None);
        (Self { outcome, wall, times_back, times_parted, executed, sites, profile }, engine)
    }
}

/// Whether the host has what this engine needs, as far as can be told in no time.
pub(super) fn is_there(hardware: &impl BranchHardware, kind: EngineKind) -> bool {
    match kind {
        EngineKind::Soft => true,
        EngineKind::Kvm(_) => reprise_kvm::opens(),
        EngineKind::Pmu => hardware.is_there(),
    }
}

/// Where the recorded kernel reads the time-stamp counter, if it has to be trapped there.
fn recorded_time_stamp_sites(recording: &Recording, clock: KvmClock) -> Result<TimeStampSites> {
    if clock == KvmClock::Step {
        return Ok(TimeStampSites::Unknown("each is stepped".to_owned()));
    }
    if !recording.header().logs_time_stamps() {
        return Ok(TimeStampSites::Unknown("its recording has no time stamps".to_owned()));
    }
    let kernel = recorded_kernel(recording)?.unwrap_or_default();
    match TimeStampSites::trapped_here(&kernel)? {
        TimeStampSites::Unknown(reason) => Err(not_trapped_here(&reason).into()),
        known => Ok(known),
    }
}

/// What becomes of RDTSC in a replay with the clock `pmu`.
fn recorded_trap(hardware: &impl BranchHardware, recording: &Recording) -> Result<PmuTrap> {
    let kernel = recorded_kernel(recording)?.unwrap_or_default();
    Ok(PmuTrap::of_recording(&hardware.time_stamp_trap(), recording.header(), &kernel)?)
}

/// The recorded guest's kernel.
fn recorded_kernel(recording: &Recording) -> Result<Option<Vec<u8>>> {
    let images = &recording.header().guest.images;
    let index = images.iter().position(|image| image.role == ImageRole::Kernel);
    Ok(index.map(|index| recording.read_image(index)).transpose()?)
}

/// The last usable beginning at or before the place asked for. A damaged checkpoint is no reason not to
/// replay: the one before it serves as well, only later. `follow` says what would execute a replay that
/// begins with so many records behind it.
fn begin(
    replayable: &Replayable,
    from: Option<At>,
    follow: impl Fn(u64) -> Result<Followed, ChoiceError>,
    notes: &mut Vec<String>,
) -> Result<Beginning> {
    let Some(from) = from else { return Ok(replayable.begin(Start::Run)?) };
    if let Some(trouble) = replayable.trouble() {
        bail!("--from: {trouble}");
    }
    notes.extend(replayable.notes());
    let before = replayable.checkpoints().partition_point(|info| match from {
        At::Tick(tick) => info.moment.tick <= tick,
        At::Time(ns) => info.virtual_ns <= ns,
    });
    for index in (0..before).rev() {
        let first = follow(replayable.checkpoints()[index].records)?.first();
        if first == EngineKind::Soft && !replayable.replays_on_soft(index) {
            continue;
        }
        match replayable.begin(Start::Checkpoint(index)) {
            Err(ReplayError::Checkpoint(error)) => {
                notes.push(format!("{error}; the one before it is used"));
            }
            result => return Ok(result?),
        }
    }
    notes.push("there is no checkpoint before that moment: replayed from the start".to_owned());
    Ok(replayable.begin(Start::Run)?)
}

/// A report with the recording's file, and with what the comparison with it came to.
fn judged(
    report: SessionReport,
    recording: &Recording,
    verification: Verification,
    outcome: &Outcome,
) -> SessionReport {
    let summary = recording.summary();
    let mut report = report.with_file(summary.log_bytes, summary.image_bytes, summary.file_bytes);
    let nothing_recorded = summary.record_count == 0;
    let agrees = match &outcome.conclusion {
        Conclusion::Ended(_) | Conclusion::TargetReached | Conclusion::HandedOver(_) => true,
        Conclusion::CutShort { .. } => !nothing_recorded,
        Conclusion::Diverged(_) => false,
    };
    let damage = match &outcome.conclusion {
        Conclusion::CutShort { damage: Some(damage) } => Some(damage_of(damage)),
        _ => summary.damage.as_ref().map(ToString::to_string),
    };
    if !matches!(outcome.conclusion, Conclusion::Ended(_) | Conclusion::CutShort { .. }) {
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
        Verification { other_engine: true, .. } => ACROSS_ENGINES,
        Verification { other_cpu: true, .. } => "across-cpus",
        _ => "exact",
    });
    report.complete = Some(summary.complete);
    report
}

/// What ticks are, as a clock is called.
fn tick_name(kind: TickKind) -> &'static str {
    match kind {
        TickKind::Instruction => "instructions",
        TickKind::ConditionalBranch => "pmu",
        TickKind::Exit => "sync",
    }
}

/// What the comparison with a recording left out: `at_records`, and what is in no final digest of it.
pub(super) fn set_aside(
    course: &Course,
    at_records: &[SetAside],
    outcome: Option<&Outcome>,
) -> Vec<SetAsideReport> {
    let mut all: Vec<_> = at_records.iter().map(SetAsideReport::from).collect();
    let compared = |outcome: &&Outcome| {
        matches!(outcome.conclusion, Conclusion::Ended(_)) && outcome.state.is_some()
    };
    if let Some(end) = outcome.filter(compared)
        && accessed_bits(course, u64::MAX) != AccessedBits::Exact
    {
        all.push(SetAsideReport::of_accessed_bits(end.moment));
    }
    all
}

fn notes(header: &Header, report: &SessionReport, sites: Option<&[Sites]>) -> Vec<String> {
    let mut notes = Vec::new();
    if report.verification == Some(ACROSS_ENGINES) {
        notes.push(match (&report.recorded_stretches[..], &report.stretches[..]) {
            ([recorded], [ran]) => format!(
                "recorded on engine {} (clock {}), replayed on {}",
                recorded.engine, recorded.clock, ran.engine
            ),
            (recorded, ran) => format!(
                "recorded on several engines ({}), replayed otherwise ({})",
                StretchReport::to_text(recorded),
                StretchReport::to_text(ran)
            ),
        });
    }
    notes.extend(makers::note(header, sites));
    notes
}
