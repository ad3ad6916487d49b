//! `reprise info` of a trace: what it holds, without reading all of it.

use std::path::Path;

use anyhow::Result;
use reprise_trace::instructions::{Ending, FORMAT_VERSION, Share};
use reprise_trace::moment::TickKind;
use serde::Serialize;

use crate::output::{Output, byte_size, counted, grouped, table};
use crate::session::trace_file::TraceFile;

/// Everything about a trace.
#[derive(Debug, Serialize)]
struct TraceReport {
    kind: &'static str,
    format_version: u32,
    /// The chain value of the recording that was expanded.
    recording: String,
    share: Option<Share>,
    cpu_model: String,
    cpu_model_version: u32,
    tick_kind: &'static str,
    /// What it has beside instructions and addresses.
    contents: Vec<&'static str>,
    filters: Vec<String>,
    /// What it is without.
    notes: Vec<String>,
    complete: bool,
    damage: Option<String>,
    /// What is wrong with the file's last bytes, though all that it holds is sound.
    #[serde(skip_serializing_if = "Option::is_none")]
    footer_damage: Option<&'static str>,
    unused_bytes: u64,
    first_instruction: u64,
    end_instruction: u64,
    instructions: u64,
    left_out: u64,
    accesses: u64,
    runs: u64,
    segments: u64,
    trace_bytes: u64,
    bits_per_instruction: Option<f64>,
}

/// Shows a trace.
///
/// # Errors
/// The trace cannot be used at all.
pub(in crate::commands) fn show(path: &Path, output: Output) -> Result<u8> {
    let trace = TraceFile::open(path)?;
    let report = TraceReport::of(&trace);
    output.result(&report, report.to_table())?;
    match &report.damage {
        Some(damage) => {
            output.note(format_args!("{}: {damage}", path.display()));
            Ok(1)
        }
        None => Ok(0),
    }
}

impl TraceReport {
    fn of(trace: &TraceFile) -> Self {
        let (header, outline) = (trace.reader.header(), &trace.outline);
        let totals = outline.totals;
        let (complete, notes, unused_bytes, damage) = match &outline.ending {
            Ok(Ending::Complete { notes }) => (true, notes.clone(), 0, None),
            Ok(Ending::CutShort { unused_bytes }) => (false, Vec::new(), *unused_bytes, None),
            Err(damage) => (false, Vec::new(), 0, Some(damage.to_string())),
        };
        let has = header.contents;
        let contents = [
            (has.physical, "physical addresses"),
            (has.values, "values of accesses"),
            (has.registers, "register writes"),
            (has.page_walks, "page walks"),
        ];
        let bits = trace.file_bytes as f64 * 8.0;
        Self {
            kind: "trace",
            format_version: FORMAT_VERSION,
            recording: header.recording.clone(),
            share: header.share,
            cpu_model: header.cpu_model.name.clone(),
            cpu_model_version: header.cpu_model.version,
            tick_kind: match header.tick {
                TickKind::Instruction => "instruction",
                TickKind::ConditionalBranch => "conditional-branch",
                TickKind::Exit => "exit",
            },
            contents: contents.into_iter().filter(|(has, _)| *has).map(|(_, what)| what).collect(),
            filters: header.filters.clone(),
            notes,
            complete,
            damage,
            footer_damage: outline.footer_fault,
            unused_bytes,
            first_instruction: outline.index.first_instruction(),
            end_instruction: outline.index.end_instruction(),
            instructions: totals.instructions,
            left_out: totals.skipped,
            accesses: totals.accesses,
            runs: totals.runs,
            segments: totals.segments,
            trace_bytes: trace.file_bytes,
            bits_per_instruction: (totals.instructions > 0)
                .then(|| bits / totals.instructions as f64),
        }
    }

    fn to_table(&self) -> String {
        let mut rows = Vec::new();
        let recording = if self.recording.is_empty() { "none" } else { &self.recording };
        rows.push(("recording", recording.to_owned()));
        if let Some(Share { number, count, first_tick, end_tick, .. }) = self.share {
            let (first, end) = (grouped(first_tick), grouped(end_tick));
            rows.push(("share", format!("{number} of {count}, ticks {first} to {end}")));
        }
        rows.push(("CPU model", format!("{} version {}", self.cpu_model, self.cpu_model_version)));
        rows.push(("state", self.state()));
        let contents = [&["instructions", "addresses of accesses"][..], &self.contents].concat();
        rows.push(("contents", contents.join(", ")));
        if !self.filters.is_empty() {
            rows.push(("filters", self.filters.join(" ")));
        }
        let (first, end) = (grouped(self.first_instruction), grouped(self.end_instruction));
        rows.push(("instructions", format!("{} of {first} to {end}", grouped(self.instructions))));
        rows.push(("left out", counted(self.left_out, "instruction")));
        rows.push(("accesses", grouped(self.accesses)));
        let segments = counted(self.segments, "segment");
        rows.push(("block runs", format!("{} in {segments}", grouped(self.runs))));
        let size = byte_size(self.trace_bytes);
        rows.push(match self.bits_per_instruction {
            Some(bits) => ("file", format!("{size}, {bits:.3} bits an instruction")),
            None => ("file", size),
        });
        rows.extend(self.notes.iter().map(|note| ("note", note.clone())));
        table(&rows)
    }

    fn state(&self) -> String {
        match (&self.damage, self.complete) {
            (Some(damage), _) => format!("DAMAGED: {damage}"),
            (None, true) => match self.footer_damage {
                None => "it was finished; whether every byte is right `reprise trace check` tells"
                    .to_owned(),
                Some(what) => format!("it was finished, but {what}"),
            },
            (None, false) => format!(
                "cut short; its whole segments are of use ({} bytes behind them are not)",
                self.unused_bytes
            ),
        }
    }
}
