//! What a run, a recording or a replay came to, as people and checks read it.

use std::time::Duration;

use reprise_machine::divergence::Divergence;
use reprise_machine::lawful::{Lawful, SetAside};
use reprise_machine::outcome::{Conclusion, Outcome};
use reprise_trace::event::{Assists, Ending};
use reprise_trace::header::Precaution;
use reprise_trace::log::LogError;
use reprise_trace::moment::{Moment, TickKind};
use serde::Serialize;

use super::checkpoints::CheckpointReport;
use super::choice::EngineKind;
use super::makers::MakerDependentReport;
use super::profile_report::ProfileReport;
use super::stretches::StretchReport;
use crate::output::{byte_size, counted, grouped, hex, seconds, table};

/// A point in guest execution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MomentReport {
    /// Ticks since the machine started.
    pub tick: u64,
    /// The next instruction's address.
    pub rip: u64,
    /// What remains of a REP.
    pub rcx: u64,
}

impl From<Moment> for MomentReport {
    fn from(Moment { tick, rip, rcx }: Moment) -> Self {
        Self { tick, rip, rcx }
    }
}

/// What a comparison left out, because hardware may lawfully differ there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SetAsideReport {
    /// What.
    pub what: String,
    /// Records at which it was.
    pub records: u64,
    /// The first of them.
    pub first: MomentReport,
}

impl From<&SetAside> for SetAsideReport {
    fn from(left_out: &SetAside) -> Self {
        let SetAside { what, records, first } = left_out;
        Self { what: what.to_string(), records: *records, first: (*first).into() }
    }
}

impl SetAsideReport {
    /// Accessed bits, in the final digest of a recording that hardware made.
    pub fn of_accessed_bits(end: Moment) -> Self {
        Self { what: Lawful::AccessedBits.to_string(), records: 1, first: end.into() }
    }

    /// For a person.
    pub fn to_text(&self) -> String {
        let at = grouped(self.first.tick);
        match self.records {
            1 => format!("{}, at tick {at}", self.what),
            records => format!("{}, at {} from tick {at} on", self.what, counted(records, "event")),
        }
    }
}

/// Where a replay is not what was recorded, and how.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DivergenceReport {
    /// Where.
    pub moment: MomentReport,
    /// What differs.
    pub what: String,
    /// What the recording has.
    pub recorded: String,
    /// What the replay has.
    pub replayed: String,
}

impl From<&Divergence> for DivergenceReport {
    fn from(divergence: &Divergence) -> Self {
        Self {
            moment: divergence.moment.into(),
            what: divergence.difference.to_string(),
            recorded: divergence.expected.clone(),
            replayed: divergence.found.clone(),
        }
    }
}

/// What a session came to. Fields that a session does not have are null.
#[derive(Clone, Debug, Serialize)]
pub struct SessionReport {
    /// `run`, `record` or `replay`.
    pub command: &'static str,
    /// The guest's name.
    pub guest: String,
    /// `kvm` or `soft`.
    pub engine: &'static str,
    /// What ticks count: `instructions`, `step`, `sync` or `pmu`.
    pub clock: &'static str,
    /// Why this engine, where the program chose it.
    pub engine_reason: Option<String>,
    /// Instructions executed; null where neither clock nor engine counts them.
    pub instructions: Option<u64>,
    /// Ticks of the clock since the machine started.
    pub ticks: u64,
    /// Replay: the tick of the checkpoint that it began at, if it did.
    pub from_tick: Option<u64>,
    /// Time on the host's clock from the guest's first instruction to the known end of its run: the
    /// final digest over CPU, devices and RAM is in it, and so is every wait for the log's writer.
    /// Loading the guest before, and giving back memory and closing the file after, are not.
    pub wall_seconds: f64,
    /// Time on the guest's clock.
    pub virtual_seconds: f64,
    /// Million instructions a second.
    pub mips: Option<f64>,
    /// Records written or replayed.
    pub events: u64,
    /// The event log in its file, with its framing.
    pub log_bytes: Option<u64>,
    /// The embedded images in the file, with their framing.
    pub image_bytes: Option<u64>,
    /// The whole file.
    pub file_bytes: Option<u64>,
    /// The log for each thousand instructions.
    pub bytes_per_kiloinstruction: Option<f64>,
    /// How it ended; a replay may also be `cut-short`, `target-reached` or `diverged`.
    pub ending: &'static str,
    /// More about the ending, where there is more.
    pub ending_detail: Option<String>,
    /// The process's exit status.
    pub exit_code: u8,
    /// Bytes that the guest wrote to its console.
    pub console_bytes: u64,
    /// BLAKE3 of them.
    pub console_digest: String,
    /// BLAKE3 over CPU, devices and RAM; null where the machine stands at no exact moment.
    pub final_digest: Option<String>,
    /// What a recording may lack, though it was made as asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
    /// Why console output was lost on its way out of the guest, if it was.
    pub console_failure: Option<String>,
    /// Replay: everything that was recorded, up to where the replay ended, happened again, and the
    /// recording's file is not damaged.
    pub verified: Option<bool>,
    /// Replay: the last record that agreed; null where the replay ended before the first one, and nothing was
    /// there to compare.
    pub verified_until: Option<MomentReport>,
    /// Replay: `exact`, or `across-engines` where another engine recorded, or `across-cpus` where another
    /// CPU did: what hardware may lawfully keep otherwise is then in `set_aside`.
    pub verification: Option<&'static str>,
    /// Replay on the software CPU: instructions in the code that ran whose results CPUs of other makers
    /// may have otherwise.
    pub maker_dependent: Vec<MakerDependentReport>,
    /// Replay: what the comparison left out.
    pub set_aside: Vec<SetAsideReport>,
    /// Replay on hardware: how often the guest went another way than recorded, and the replay began anew.
    pub times_parted: u32,
    /// Replay: the recording has its end.
    pub complete: Option<bool>,
    /// Replay: the first difference.
    pub divergence: Option<DivergenceReport>,
    /// Replay: where the recording's file is damaged.
    pub damage: Option<String>,
    /// Record: what taking checkpoints came to, if any were wanted.
    pub checkpoints: Option<CheckpointReport>,
    /// Accesses to the board.
    pub accesses: u64,
    /// Interrupts delivered.
    pub interrupts: u64,
    /// Instructions that KVM refused and the software CPU executed in its place.
    pub assists: u64,
    /// How often, by mnemonic.
    pub assisted: Assists,
    /// Which engine executed what part of the run.
    pub stretches: Vec<StretchReport>,
    /// Replay: which engine executed it when it was recorded.
    pub recorded_stretches: Vec<StretchReport>,
    /// Where the software CPU's time went, with `--profile`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub profile: Option<ProfileReport>,
}

impl SessionReport {
    /// What every session reports.
    pub fn new(
        command: &'static str,
        guest: &str,
        kind: EngineKind,
        outcome: &Outcome,
        wall: Duration,
    ) -> Self {
        let kinds = outcome.hand_overs.iter().map(|(_, to)| to.tick_kind);
        let counts_instructions =
            kinds.chain([kind.tick_kind()]).all(|kind| kind == TickKind::Instruction);
        let instructions = counts_instructions.then_some(outcome.ticks);
        let (ending, ending_detail, exit_code) = conclusion(&outcome.conclusion);
        Self {
            command,
            guest: guest.to_owned(),
            engine: kind.engine_name(),
            clock: kind.clock_name(),
            engine_reason: None,
            instructions,
            ticks: outcome.ticks,
            from_tick: None,
            wall_seconds: wall.as_secs_f64(),
            virtual_seconds: seconds(outcome.virtual_ns),
            mips: instructions.map(|count| count as f64 / 1e6 / wall.as_secs_f64().max(1e-9)),
            events: outcome.events,
            log_bytes: None,
            image_bytes: None,
            file_bytes: None,
            bytes_per_kiloinstruction: None,
            ending,
            ending_detail,
            exit_code,
            console_bytes: outcome.effects.console_bytes,
            console_digest: hex(&outcome.effects.console_digest),
            final_digest: outcome.final_digest().map(|digest| hex(&digest)),
            warning: left_open_text(outcome),
            console_failure: None,
            verified: None,
            verified_until: None,
            verification: None,
            maker_dependent: Vec::new(),
            set_aside: Vec::new(),
            times_parted: 0,
            complete: None,
            divergence: outcome.divergence().map(DivergenceReport::from),
            damage: None,
            checkpoints: None,
            accesses: outcome.accesses,
            interrupts: outcome.interrupts,
            assists: outcome.assists.values().sum(),
            assisted: outcome.assists.clone(),
            stretches: StretchReport::of_log(0, kind.engine_name(), kind.clock_name(), outcome),
            recorded_stretches: Vec::new(),
            profile: None,
        }
    }

    /// The run began at a checkpoint at this tick, and nothing before it was executed.
    pub fn beginning_at(mut self, tick: u64) -> Self {
        self.from_tick = Some(tick);
        self.instructions = self.instructions.map(|count| count.saturating_sub(tick));
        let count = self.instructions;
        self.mips = count.map(|count| count as f64 / 1e6 / self.wall_seconds.max(1e-9));
        self
    }

    /// A replay on the software CPU, which knows how many instructions it has executed whatever the
    /// recording's `clock` counts.
    pub fn having_executed(mut self, instructions: u64, clock: &'static str) -> Self {
        self.clock = clock;
        self.instructions = Some(instructions);
        self.mips = Some(instructions as f64 / 1e6 / self.wall_seconds.max(1e-9));
        self
    }

    /// A replay of these stretches, each by another engine than recorded it or by the same.
    pub fn of_stretches(mut self, recorded: Vec<StretchReport>, by: &[EngineKind]) -> Self {
        self.stretches = StretchReport::executed(&recorded, by);
        self.recorded_stretches = recorded;
        self
    }

    /// Adds what the recording's file holds.
    pub fn with_file(mut self, log_bytes: u64, image_bytes: u64, file_bytes: u64) -> Self {
        self.log_bytes = Some(log_bytes);
        self.image_bytes = Some(image_bytes);
        self.file_bytes = Some(file_bytes);
        // The log is of the whole run.
        let whole = self.instructions.filter(|_| self.from_tick.is_none());
        self.bytes_per_kiloinstruction =
            whole.and_then(|count| bytes_per_kiloinstruction(log_bytes, count));
        self
    }

    /// The report as a small table.
    pub fn to_table(&self) -> String {
        let mut rows = vec![
            ("guest", self.guest.clone()),
            ("engine", self.engine_text()),
            ("ending", self.ending_text()),
        ];
        match (self.instructions, self.mips) {
            (Some(count), Some(mips)) => {
                rows.push(("instructions", format!("{} ({mips:.1} MIPS)", grouped(count))));
            }
            _ => rows.push(("ticks", grouped(self.ticks))),
        }
        if self.clock != "instructions" && self.instructions.is_some() {
            rows.push(("ticks", grouped(self.ticks)));
        }
        let times =
            format!("{:.2} s, guest clock {:.2} s", self.wall_seconds, self.virtual_seconds);
        rows.push(("time", times));
        rows.push(("events", grouped(self.events)));
        if self.assists > 0 {
            rows.push(("assists", assists_text(&self.assisted)));
        }
        if let Some(log_bytes) = self.log_bytes {
            rows.push(("log", log_text(log_bytes, self.bytes_per_kiloinstruction)));
        }
        if let (Some(file), Some(images)) = (self.file_bytes, self.image_bytes) {
            let text = format!("{}, embedded images {} of it", byte_size(file), byte_size(images));
            rows.push(("file", text));
        }
        if let Some(checkpoints) = &self.checkpoints {
            rows.push(("checkpoints", checkpoints.to_text()));
        }
        let console =
            format!("{} bytes, BLAKE3 {}", grouped(self.console_bytes), self.console_digest);
        rows.push(("console", console));
        let digest = self.final_digest.as_deref().unwrap_or("none: not at an exact moment");
        rows.push(("final digest", digest.to_owned()));
        rows.extend(self.set_aside.iter().map(|left_out| ("not compared", left_out.to_text())));
        if self.times_parted > 0 {
            rows.push(("began anew", counted(u64::from(self.times_parted), "time")));
        }
        let profile = self.profile.as_ref();
        let profile = profile.map(|profile| profile.to_table(self.ticks)).unwrap_or_default();
        table(&rows) + &profile
    }

    fn engine_text(&self) -> String {
        match &self.stretches[..] {
            [] | [_] => format!("{}, clock {}", self.engine, self.clock),
            stretches => StretchReport::to_text(stretches),
        }
    }

    fn ending_text(&self) -> String {
        match &self.ending_detail {
            Some(detail) => format!("{} ({detail})", self.ending),
            None => self.ending.to_owned(),
        }
    }
}

/// What a run that came to its end left open, if anything.
fn left_open_text(outcome: &Outcome) -> Option<String> {
    if outcome.left_open.is_empty() || !matches!(outcome.conclusion, Conclusion::Ended(_)) {
        return None;
    }
    let each =
        outcome.left_open.iter().map(|Precaution { what, how, .. }| format!("{what}: {how}"));
    let all = each.collect::<Vec<_>>().join("; ");
    Some(format!("what the guest read there is in no log, and a replay may differ: {all}"))
}

/// What was assisted, the most frequent first.
pub fn assists_text(assists: &Assists) -> String {
    let mut by_count: Vec<_> = assists.iter().collect();
    by_count.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    let each = by_count.iter().map(|(name, count)| format!("{name} {}", grouped(**count)));
    let all = grouped(assists.values().sum());
    format!("{all} instructions that KVM refused ({})", each.collect::<Vec<_>>().join(", "))
}

/// Bytes of log for each thousand instructions; `None` for no instructions.
pub fn bytes_per_kiloinstruction(log_bytes: u64, instructions: u64) -> Option<f64> {
    (instructions > 0).then(|| log_bytes as f64 * 1000.0 / instructions as f64)
}

/// The log's size for a person.
pub fn log_text(log_bytes: u64, per_kiloinstruction: Option<f64>) -> String {
    let size = byte_size(log_bytes);
    match per_kiloinstruction {
        Some(rate) => format!("{size}, {rate:.4} bytes per thousand instructions"),
        None => size,
    }
}

/// Where a recording is damaged; what to do about it depends on what replays before.
pub fn damage_of(error: &LogError) -> String {
    match error {
        LogError::Damaged(damage) => damage.to_string(),
        other => other.to_string(),
    }
}

/// A recording's damage, and what to do about it.
pub fn damage_text(damage: &str, events_before: u64) -> String {
    let advice = match events_before {
        0 => "take another copy of the recording",
        _ => "use what replays before it, or take another copy of the recording",
    };
    format!("{damage}; {advice}")
}

/// Name, detail and exit status of a conclusion.
fn conclusion(conclusion: &Conclusion) -> (&'static str, Option<String>, u8) {
    match conclusion {
        Conclusion::Ended(ending) => {
            let (name, detail) = describe_ending(ending);
            (name, detail, exit_code(ending))
        }
        Conclusion::CutShort { damage: None } => ("cut-short", None, 0),
        Conclusion::CutShort { damage: Some(damage) } => ("cut-short", Some(damage_of(damage)), 1),
        Conclusion::TargetReached => ("target-reached", None, 0),
        Conclusion::HandedOver(to) => {
            let detail = format!("the recording goes on on {}, clock {}", to.engine, to.clock);
            ("handed-over", Some(detail), 0)
        }
        Conclusion::Diverged(divergence) => ("diverged", Some(divergence.to_string()), 1),
    }
}

/// An ending's name, and more about it.
pub fn describe_ending(ending: &Ending) -> (&'static str, Option<String>) {
    match ending {
        Ending::Reset => ("reset", None),
        Ending::TripleFault => ("triple-fault", None),
        Ending::PowerOff => ("power-off", None),
        Ending::IdleForever => {
            ("idle-forever", Some("nothing could ever have woken the guest".to_owned()))
        }
        Ending::DebugExit(value) => ("debug-exit", Some(format!("value {value}"))),
        Ending::Stopped => ("stopped", Some("as asked".to_owned())),
        Ending::EngineFailed(reason) => ("engine-failed", Some(reason.clone())),
    }
}

/// The exit status of a run that ended so: QEMU's for its debug-exit device.
fn exit_code(ending: &Ending) -> u8 {
    match ending {
        Ending::DebugExit(value) => value << 1 | 1,
        Ending::EngineFailed(_) => 1,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_debug_exit_gives_the_status_that_qemu_gives() {
        for (value, status) in [(0, 1), (16, 33), (0x7f, 0xff), (0x80, 1)] {
            assert_eq!(exit_code(&Ending::DebugExit(value)), status);
        }
        assert_eq!(exit_code(&Ending::TripleFault), 0);
    }

    #[test]
    fn the_log_rate_is_bytes_for_a_thousand_instructions() {
        assert_eq!(bytes_per_kiloinstruction(20, 1_000_000), Some(0.02));
        assert_eq!(bytes_per_kiloinstruction(20, 0), None);
    }
}
