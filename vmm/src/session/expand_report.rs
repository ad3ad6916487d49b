//! What an expansion came to, as people and checks read it.

use std::time::Duration;

use reprise_machine::outcome::{Conclusion, Outcome};
use reprise_trace::recording::Recording;
use serde::Serialize;

use super::makers::MakerDependentReport;
use super::report::{MomentReport, SetAsideReport, damage_of, damage_text};

use crate::output::{byte_size, counted, grouped, hex, table};

/// An expansion's report. Fields that an expansion does not have are null.
#[derive(Clone, Debug, Serialize)]
pub struct ExpandReport {
    /// `expand`.
    pub command: &'static str,
    /// The guest's name.
    pub guest: String,
    /// The trace's format: `reprise`, an exporter's name, or `none`.
    pub format: &'static str,
    /// Instructions expanded, those that a filter then left out included.
    pub instructions: u64,
    /// Accesses to memory in the trace, where they were counted.
    pub accesses: Option<u64>,
    /// Time on the host's clock, the replay of what is before the window included.
    pub wall_seconds: f64,
    /// Million instructions a second.
    pub mips: Option<f64>,
    /// The trace's size.
    pub trace_bytes: Option<u64>,
    /// Of the trace, for each instruction expanded.
    pub bits_per_instruction: Option<f64>,
    /// Ticks at which the expansion ended.
    pub end_tick: Option<u64>,
    /// Everything recorded that the expansion came by agreed, and the recording's file is not damaged; null
    /// where it came by nothing, or was stopped.
    pub verified: Option<bool>,
    /// The last record, or checkpoint, that agreed.
    pub verified_until: Option<MomentReport>,
    /// The recording has its end.
    pub complete: bool,
    /// Where the recording's file is damaged.
    pub damage: Option<String>,
    /// The expansion came to the recording's end.
    #[serde(skip)]
    is_at_end: bool,
    /// It came to where the recording was cut short.
    #[serde(skip)]
    is_cut_short: bool,
    /// Records that the expansion came by.
    #[serde(skip)]
    events: u64,
    /// Checkpoints on the way at which the whole machine was as they say.
    pub checkpoints_verified: u64,
    /// Instructions in the code that ran whose results CPUs of other makers may have otherwise.
    pub maker_dependent: Vec<MakerDependentReport>,
    /// What the comparison with the recording left out.
    pub set_aside: Vec<SetAsideReport>,
    /// BLAKE3 over CPU, devices and RAM at the end.
    pub final_digest: Option<String>,
    /// The filters that it went through.
    pub filters: Vec<String>,
    /// What is not in the trace, and why.
    pub notes: Vec<String>,
}

impl ExpandReport {
    pub(super) fn new(
        recording: &Recording,
        instructions: u64,
        wall: Duration,
        outcome: Option<&Outcome>,
    ) -> Self {
        let seconds = wall.as_secs_f64();
        let mips = (seconds > 0.0).then(|| instructions as f64 / seconds / 1e6);
        let summary = recording.summary();
        let damage = match outcome.map(|outcome| &outcome.conclusion) {
            Some(Conclusion::CutShort { damage: Some(damage) }) => Some(damage_of(damage)),
            _ => summary.damage.as_ref().map(ToString::to_string),
        };
        let is_at_end =
            outcome.is_some_and(|outcome| matches!(outcome.conclusion, Conclusion::Ended(_)));
        let verified_until = outcome.and_then(|outcome| outcome.verified_until);
        let verified = match outcome {
            None => None,
            Some(_) if damage.is_some() => Some(false),
            Some(Outcome { conclusion: Conclusion::CutShort { .. }, .. }) => {
                Some(summary.record_count > 0)
            }
            Some(_) => (is_at_end || verified_until.is_some()).then_some(true),
        };
        Self {
            command: "expand",
            guest: recording.header().guest.name.clone(),
            format: "none",
            instructions,
            accesses: None,
            wall_seconds: seconds,
            mips,
            trace_bytes: None,
            bits_per_instruction: None,
            end_tick: outcome.map(|outcome| outcome.ticks),
            verified,
            verified_until: verified_until.map(MomentReport::from),
            complete: summary.complete,
            damage,
            is_at_end,
            is_cut_short: outcome
                .is_some_and(|outcome| matches!(outcome.conclusion, Conclusion::CutShort { .. })),
            events: outcome.map_or(0, |outcome| outcome.events),
            checkpoints_verified: 0,
            maker_dependent: Vec::new(),
            set_aside: Vec::new(),
            final_digest: outcome.and_then(Outcome::final_digest).map(|digest| hex(&digest)),
            filters: Vec::new(),
            notes: Vec::new(),
        }
    }

    pub(super) fn set_trace(&mut self, bytes: Option<u64>, accesses: Option<u64>) {
        self.trace_bytes = bytes;
        self.accesses = accesses;
        let instructions = self.instructions;
        self.bits_per_instruction = bytes
            .filter(|_| instructions > 0)
            .map(|bytes| bytes as f64 * 8.0 / instructions as f64);
    }

    /// For a person.
    pub fn to_table(&self) -> String {
        let mut rows = vec![("guest", self.guest.clone()), ("format", self.format.to_owned())];
        rows.push(("instructions", grouped(self.instructions)));
        if let Some(accesses) = self.accesses {
            rows.push(("memory accesses", grouped(accesses)));
        }
        let speed = self.mips.map_or(String::new(), |mips| format!(" ({mips:.0} MIPS)"));
        rows.push(("time", format!("{:.3} s{speed}", self.wall_seconds)));
        if let (Some(bytes), Some(bits)) = (self.trace_bytes, self.bits_per_instruction) {
            rows.push(("trace", format!("{} ({bits:.3} bits/instruction)", byte_size(bytes))));
        }
        rows.push(("verified", self.verdict()));
        rows.extend(self.set_aside.iter().map(|left_out| ("not compared", left_out.to_text())));
        for note in &self.notes {
            rows.push(("note", note.clone()));
        }
        table(&rows)
    }

    /// Up to where it is the recorded run.
    fn verdict(&self) -> String {
        let Some(end_tick) = self.end_tick else { return "no: stopped before the end".to_owned() };
        let checkpoints = counted(self.checkpoints_verified, "checkpoint");
        let until = match &self.verified_until {
            Some(moment) => {
                format!("up to tick {}, {checkpoints} on the way", grouped(moment.tick))
            }
            None => "nothing: no event lies on the way to its end".to_owned(),
        };
        match (self.verified, self.is_at_end) {
            (Some(false), _) if self.verified_until.is_none() => {
                "NOT VERIFIED: nothing could be compared".to_owned()
            }
            (Some(false), _) => format!("NOT VERIFIED: {until}"),
            (_, true) => {
                format!("to the end, tick {}, {checkpoints} on the way", grouped(end_tick))
            }
            (Some(true), false) if self.is_cut_short => {
                format!("{until}; the recording was cut short there, so its end is not known")
            }
            _ => until,
        }
    }

    /// Why it failed though there may be a trace: one line.
    pub fn failure(&self) -> Option<String> {
        if self.verified != Some(false) {
            return None;
        }
        let Some(damage) = &self.damage else {
            return Some("it was cut short before its first event: record again".to_owned());
        };
        let damage = damage_text(damage, self.events);
        Some(match &self.verified_until {
            Some(moment) => format!(
                "the expansion agrees with the recording up to tick {}, but the file is damaged: {damage}",
                grouped(moment.tick)
            ),
            None => format!("the file is damaged: {damage}"),
        })
    }
}
