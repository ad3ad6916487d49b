//! `reprise info`: what a recording or a trace holds.

use anyhow::Result;
use reprise_replay::{Replayable, recorded_here};
use reprise_trace::checkpoint::CheckpointInfo;
use reprise_trace::event::{Assists, EffectDigest, Event};
use reprise_trace::header::{Header, HostInfo, ImageInfo, Precaution, Treatment};
use reprise_trace::moment::TickKind;
use reprise_trace::recording::{Recording, SeekIndexState, Summary};
use reprise_trace::stretches::{Course, Stretch};
use serde::Serialize;

use crate::cli::InfoArgs;
use crate::output::{Output, byte_size, counted, grouped, hex, table};
use crate::session::replay::open_replayable;
use crate::session::report::{
    MomentReport, assists_text, bytes_per_kiloinstruction, damage_text, describe_ending, log_text,
};
use crate::session::stretches::StretchReport;
use crate::session::trace_file::is_trace;

/// Everything about a recording.
#[derive(Debug, Serialize)]
struct InfoReport {
    kind: &'static str,
    format_version: u32,
    reprise_version: String,
    created_unix_s: u64,
    guest: String,
    command_line: String,
    images: Vec<ImageReport>,
    memory_mib: u64,
    rtc_start_s: u64,
    cpu_model: String,
    cpu_model_version: u32,
    engine: String,
    clock: String,
    tick_kind: &'static str,
    ns_per_tick: u64,
    replays_on: Vec<ReplaysOn>,
    host: HostInfo,
    /// This host's CPU is of the same maker, family and model.
    recorded_here: bool,
    /// How instructions were dealt with whose answers only a CPU knows; empty if it does not say.
    precautions: Vec<Precaution>,
    complete: bool,
    damage: Option<String>,
    truncated_bytes: u64,
    ending: Option<&'static str>,
    ending_detail: Option<String>,
    ticks: Option<u64>,
    instructions: Option<u64>,
    events: u64,
    first_moment: Option<MomentReport>,
    last_moment: Option<MomentReport>,
    console_bytes: Option<u64>,
    console_digest: Option<String>,
    final_digest: Option<String>,
    log_bytes: u64,
    log_frames: u64,
    bytes_per_kiloinstruction: Option<f64>,
    image_bytes: u64,
    file_bytes: u64,
    seek_index: &'static str,
    chain: String,
    stretches: Vec<StretchReport>,
    assists: u64,
    assisted: Assists,
    checkpoints: Vec<CheckpointReport>,
    checkpoint_file_bytes: u64,
    checkpoint_trouble: Option<String>,
}

/// An engine that can replay a recording.
#[derive(Debug, Serialize)]
struct ReplaysOn {
    engine: &'static str,
    /// What it takes, and how much of the recording it reaches.
    condition: String,
}

impl ReplaysOn {
    /// By what the ticks of each stretch are and who counted them.
    fn of(header: &Header, course: &Course) -> Vec<Self> {
        let of_soft = course.stretches.iter().all(|stretch| stretch.on.engine == "soft");
        let anywhere = match of_soft {
            true => "anywhere",
            false => "anywhere; every moment gets its instruction count",
        };
        let soft = Self { engine: "soft", condition: anywhere.to_owned() };
        let on_kvm = |condition| Self { engine: "kvm", condition };
        let mut list = vec![soft];
        match &course.stretches[..] {
            [only] if only.on.engine == "soft" => {
                let stepped = "on a host whose KVM can step kernel code (CPL0), and user code if the guest has any";
                let rewritten = "with --clock pmu, for which it is rewritten first, on a host with KVM and a PMU";
                list.extend([stepped, rewritten].map(|text| on_kvm(text.to_owned())));
            }
            _ if of_soft => {
                list.push(on_kvm("on a host whose KVM can step (clock step)".to_owned()));
            }
            stretches => {
                let kinds = stretches.iter().filter(|stretch| stretch.on.engine != "soft");
                let needs = Self::needs(kinds.map(|stretch| stretch.on.tick_kind), header);
                let in_turn =
                    if kinds_differ(stretches) { ", each stretch as recorded" } else { "" };
                list.push(on_kvm(format!("on a host with {needs}{in_turn}")));
            }
        }
        list
    }

    /// What KVM has to have for stretches that count this.
    fn needs(kinds: impl Iterator<Item = TickKind>, header: &Header) -> String {
        let (mut counts, mut steps, mut exits) = (false, false, false);
        for kind in kinds {
            match kind {
                TickKind::Exit => exits = true,
                TickKind::ConditionalBranch => counts = true,
                TickKind::Instruction => steps = true,
            }
        }
        let traps = header.logs_time_stamps() && !header.marks_time_stamps();
        let parts = [
            (true, "KVM"),
            (counts, "a PMU"),
            (steps, "single-step (clock step)"),
            (traps && counts, "RDTSC trapped (see `reprise doctor`)"),
            (traps && exits, "breakpoints for RDTSC of kernel code, if there is any"),
        ];
        let needed: Vec<_> = parts.iter().filter(|(is, _)| *is).map(|(_, what)| *what).collect();
        match &needed[..] {
            [all @ .., last] if !all.is_empty() => format!("{} and {last}", all.join(", ")),
            all => all.concat(),
        }
    }
}

fn kinds_differ(stretches: &[Stretch]) -> bool {
    stretches.iter().any(|stretch| stretch.on.clock != stretches[0].on.clock)
}

/// One checkpoint that can be started from.
#[derive(Debug, Serialize)]
struct CheckpointReport {
    #[serde(flatten)]
    moment: MomentReport,
    virtual_ns: u64,
    events_before: u64,
    ram_pages: u64,
    digest: String,
}

impl From<&CheckpointInfo> for CheckpointReport {
    fn from(info: &CheckpointInfo) -> Self {
        Self {
            moment: info.moment.into(),
            virtual_ns: info.virtual_ns,
            events_before: info.records,
            ram_pages: info.pages,
            digest: hex(&info.digest.whole()),
        }
    }
}

/// One embedded image.
#[derive(Debug, Serialize)]
struct ImageReport {
    role: String,
    name: String,
    bytes: u64,
    blake3: String,
}

impl From<&ImageInfo> for ImageReport {
    fn from(image: &ImageInfo) -> Self {
        Self {
            role: format!("{:?}", image.role).to_lowercase(),
            name: image.name.clone(),
            bytes: image.bytes,
            blake3: hex(&image.blake3),
        }
    }
}

/// Shows a recording or a trace.
///
/// # Errors
/// The file cannot be used at all.
pub fn run(arguments: &InfoArgs, output: Output) -> Result<u8> {
    if is_trace(&arguments.file) {
        return super::trace::show_info(&arguments.file, output);
    }
    let replayable = open_replayable(&arguments.file)?;
    let report = InfoReport::of(&replayable);
    output.result(&report, report.to_table())?;
    replayable.recording().summary().end_note().into_iter().for_each(|note| output.note(note));
    replayable.notes().iter().for_each(|note| output.note(note));
    if let Some(damage) = &report.damage {
        let text = damage_text(damage, report.events);
        output.note(format_args!("{}: {text}", arguments.file.display()));
        return Ok(1);
    }
    Ok(0)
}

impl InfoReport {
    fn of(replayable: &Replayable) -> Self {
        let recording: &Recording = replayable.recording();
        let (header, summary) = (recording.header(), recording.summary());
        let end = End::of(summary);
        let ticks = summary.last_moment.map(|moment| moment.tick);
        let course = replayable.course();
        let counts_instructions =
            course.stretches.iter().all(|stretch| stretch.on.tick_kind == TickKind::Instruction);
        let instructions = ticks.filter(|_| counts_instructions);
        Self {
            kind: "recording",
            format_version: summary.format_version,
            reprise_version: header.reprise_version.clone(),
            created_unix_s: header.created_unix_s,
            guest: header.guest.name.clone(),
            command_line: header.guest.command_line.clone(),
            images: header.guest.images.iter().map(ImageReport::from).collect(),
            memory_mib: header.machine.ram_mib,
            rtc_start_s: header.machine.rtc_start_s,
            cpu_model: header.cpu_model.name.clone(),
            cpu_model_version: header.cpu_model.version,
            engine: header.engine.clone(),
            clock: header.clock.clone(),
            tick_kind: tick_kind_name(header),
            ns_per_tick: header.ns_per_tick,
            replays_on: ReplaysOn::of(header, course),
            host: header.host.clone(),
            recorded_here: recorded_here(header),
            precautions: course.precautions(header),
            complete: summary.complete,
            damage: summary.damage.as_ref().map(ToString::to_string),
            truncated_bytes: summary.truncated_bytes,
            ending: end.as_ref().map(|end| end.name),
            ending_detail: end.as_ref().and_then(|end| end.detail.clone()),
            ticks,
            instructions,
            events: summary.record_count,
            first_moment: summary.first_moment.map(Into::into),
            last_moment: summary.last_moment.map(Into::into),
            console_bytes: end.as_ref().map(|end| end.effects.console_bytes),
            console_digest: end.as_ref().map(|end| hex(&end.effects.console_digest)),
            final_digest: end.and_then(|end| end.final_digest).map(|digest| hex(&digest)),
            log_bytes: summary.log_bytes,
            log_frames: summary.log_frames,
            bytes_per_kiloinstruction: instructions
                .and_then(|count| bytes_per_kiloinstruction(summary.log_bytes, count)),
            image_bytes: summary.image_bytes,
            file_bytes: summary.file_bytes,
            seek_index: match summary.seek_index {
                SeekIndexState::Absent => "absent",
                SeekIndexState::Intact => "intact",
                SeekIndexState::Damaged => "damaged",
            },
            chain: summary.chain.clone(),
            stretches: StretchReport::of_course(course),
            assists: course.assists.values().sum(),
            assisted: course.assists.clone(),
            checkpoints: replayable.checkpoints().iter().map(CheckpointReport::from).collect(),
            checkpoint_file_bytes: replayable.checkpoint_file().map_or(0, |file| file.file_bytes()),
            checkpoint_trouble: replayable.trouble().map(ToString::to_string),
        }
    }

    fn to_table(&self) -> String {
        let host = &self.host;
        let cpu = format!(
            "{} {} family {} model {} stepping {}{}, Linux {}",
            host.cpu_vendor,
            host.cpu_brand,
            host.cpu_family,
            host.cpu_model,
            host.cpu_stepping,
            if self.recorded_here { "" } else { " (not this host's)" },
            host.kernel_release
        );
        let mut rows = vec![("guest", format!("{}, {} MiB", self.guest, self.memory_mib))];
        if !self.command_line.is_empty() {
            rows.push(("command line", self.command_line.clone()));
        }
        for image in &self.images {
            let size = byte_size(image.bytes);
            let text = format!("{} {}, {size}, BLAKE3 {}", image.role, image.name, image.blake3);
            rows.push(("image", text));
        }
        rows.push(("CPU model", format!("{} version {}", self.cpu_model, self.cpu_model_version)));
        match &self.stretches[..] {
            [] | [_] => rows.push(("engine", format!("{}, clock {}", self.engine, self.clock))),
            stretches => {
                rows.extend(stretches.iter().map(|stretch| ("stretch", stretch.to_string())));
            }
        }
        if self.assists > 0 {
            rows.push(("assists", assists_text(&self.assisted)));
        }
        for ReplaysOn { engine, condition } in &self.replays_on {
            rows.push(("replays on", format!("{engine}: {condition}")));
        }
        rows.push(("recorded on", cpu));
        rows.push(("recorded by", format!("Reprise {}", self.reprise_version)));
        for Precaution { what, treatment, how } in &self.precautions {
            let word = match treatment {
                Treatment::Closed => "closed",
                Treatment::Open => "OPEN",
            };
            rows.push(("time stamps, entropy", format!("{word}: {what}: {how}")));
        }
        rows.push(("state", self.state_text()));
        if let Some(ticks) = self.ticks {
            let kind = match self.stretches.len() {
                1 => format!("{}s", self.tick_kind),
                _ => "counted by each stretch's clock".to_owned(),
            };
            rows.push(("ticks", format!("{} ({kind})", grouped(ticks))));
        }
        rows.push((
            "events",
            format!("{} in {}", grouped(self.events), counted(self.log_frames, "frame")),
        ));
        rows.push(("log", log_text(self.log_bytes, self.bytes_per_kiloinstruction)));
        rows.push(("images", format!("{} in the file", byte_size(self.image_bytes))));
        rows.push((
            "file",
            format!("{}, seek index {}", byte_size(self.file_bytes), self.seek_index),
        ));
        if let (Some(bytes), Some(digest)) = (self.console_bytes, &self.console_digest) {
            rows.push(("console", format!("{} bytes, BLAKE3 {digest}", grouped(bytes))));
        }
        if let Some(digest) = &self.final_digest {
            rows.push(("final digest", digest.clone()));
        }
        rows.push(("chain", self.chain.clone()));
        rows.push(("checkpoints", self.checkpoints_text()));
        table(&rows)
    }

    fn checkpoints_text(&self) -> String {
        if let Some(trouble) = &self.checkpoint_trouble {
            return trouble.clone();
        }
        let ticks = |checkpoint: &CheckpointReport| grouped(checkpoint.moment.tick);
        match &self.checkpoints[..] {
            [] => "none; `reprise checkpoint` adds them".to_owned(),
            [only] => format!("1 at tick {}", ticks(only)),
            [first, .., last] => format!(
                "{} from tick {} to {}, {}",
                self.checkpoints.len(),
                ticks(first),
                ticks(last),
                byte_size(self.checkpoint_file_bytes)
            ),
        }
    }

    fn state_text(&self) -> String {
        if let Some(damage) = &self.damage {
            return format!("DAMAGED: {damage}");
        }
        match (self.complete, self.ending, &self.ending_detail) {
            (true, Some(ending), None) => format!("complete; ended by {ending}"),
            (true, Some(ending), Some(detail)) => format!("complete; ended by {ending} ({detail})"),
            (true, None, _) => "closed without the run's end, because its engine failed".to_owned(),
            (false, ..) if self.events == 0 => {
                "cut short before its first event: nothing of it replays; record again".to_owned()
            }
            (false, Some(ending), _) => {
                format!("cut off behind the run's end, which replays; ended by {ending}")
            }
            (false, None, _) => format!(
                "cut short; it replays up to its last event ({} bytes behind it are of no use)",
                self.truncated_bytes
            ),
        }
    }
}

/// How the recorded run ended.
struct End {
    name: &'static str,
    detail: Option<String>,
    effects: EffectDigest,
    final_digest: Option<[u8; 32]>,
}

impl End {
    fn of(summary: &Summary) -> Option<Self> {
        match &summary.last_record.as_ref()?.event {
            Event::End { ending, effects, final_digest } => {
                let (name, detail) = describe_ending(ending);
                Some(Self { name, detail, effects: *effects, final_digest: *final_digest })
            }
            _ => None,
        }
    }
}

fn tick_kind_name(header: &Header) -> &'static str {
    match header.tick_kind {
        TickKind::Instruction => "instruction",
        TickKind::ConditionalBranch => "conditional-branch",
        TickKind::Exit => "exit",
    }
}
