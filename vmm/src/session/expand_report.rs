//! What an expansion came to, as people and checks read it.

use std::time::Duration;

use reprise_machine::outcome::{Conclusion, Outcome};
use reprise_trace::recording::Recording;
use serde::Serialize;

use super::makers::MakerDependentReport;
use super::report::SetAsideReport;

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
    /// Every record on the way agreed, and at a recording's end CPU, devices and RAM did; null where
    /// the expansion was stopped.
    pub verified: Option<bool>,
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
        let verified = outcome.map(|outcome| {
            matches!(outcome.conclusion, Conclusion::Ended(_) | Conclusion::TargetReached)
        });
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
        let verified = match (self.verified, self.end_tick) {
            (Some(true), Some(tick)) => {
                let checkpoints = counted(self.checkpoints_verified, "checkpoint");
                format!("to tick {}, {checkpoints} on the way", grouped(tick))
            }
            (Some(_), _) => "the recording was cut short".to_owned(),
            (None, _) => "no: stopped before the end".to_owned(),
        };
        rows.push(("verified", verified));
        rows.extend(self.set_aside.iter().map(|left_out| ("not compared", left_out.to_text())));
        for note in &self.notes {
            rows.push(("note", note.clone()));
        }
        table(&rows)
    }
}
