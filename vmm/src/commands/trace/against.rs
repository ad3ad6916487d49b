//! `reprise trace check --against`: a trace's writes carried out, and compared with its recording.

use std::path::Path;

use anyhow::{Context, Result, bail};
use reprise_expand::resimulate::{Against, check_against};
use reprise_trace::instructions::Contents;
use serde::Serialize;

use crate::output::{Output, counted, grouped};
use crate::session::replay::open_replayable;
use crate::session::trace_file::TraceFile;

/// What re-simulating came to.
#[derive(Debug, Serialize)]
pub(super) struct AgainstReport {
    /// All came out.
    pub(super) verified: bool,
    /// Loads whose values were compared with RAM.
    loads: u64,
    /// Writes to RAM that were carried out.
    writes: u64,
    /// Values written to registers.
    registers: u64,
    /// Checkpoints whose RAM and CPU came out.
    checkpoints_verified: u64,
    /// RAM and CPU came out where the trace ends.
    end_verified: bool,
    /// The first thing that is wrong.
    mismatch: Option<MismatchReport>,
    /// How many things are.
    mismatches: u64,
}

#[derive(Debug, Serialize)]
struct MismatchReport {
    instruction: u64,
    address: u64,
    what: String,
}

/// Re-simulates a trace.
///
/// # Errors
/// The recording or the trace cannot be used, or they do not belong together.
pub(super) fn check(trace: &Path, recording: &Path, output: Output) -> Result<AgainstReport> {
    let replayable = open_replayable(recording)?;
    let mut trace = TraceFile::open(trace)?;
    let header = trace.reader.header();
    let shown = trace.path.display();
    let Contents { physical, values, registers, page_walks: _ } = header.contents;
    if !(physical && values && registers) {
        bail!(
            "{shown} lacks values, registers or physical addresses: make it with `reprise expand --full`"
        );
    }
    if header.recording != replayable.recording().summary().chain {
        bail!("{shown} was not made of {}: give its own recording", recording.display());
    }
    if !header.filters.is_empty() {
        bail!(
            "{shown} leaves out what {} left out: make it without filters",
            header.filters.join(" ")
        );
    }
    let first = trace.outline.index.first_instruction();
    let bar = output.bar("re-simulating", Some(trace.file_bytes));
    let against = check_against(&mut trace.reader, first, &replayable, |offset| {
        bar.set_position(offset);
        true
    });
    bar.finish_and_clear();
    Ok(AgainstReport::new(against.with_context(|| trace.path.display().to_string())?))
}

impl AgainstReport {
    fn new(against: Against) -> Self {
        let Against { counts, checkpoints, end_verified, mismatch, mismatches } = against;
        Self {
            verified: mismatch.is_none() && end_verified,
            loads: counts.loads,
            writes: counts.writes,
            registers: counts.registers,
            checkpoints_verified: checkpoints,
            end_verified,
            mismatch: mismatch.map(|first| MismatchReport {
                instruction: first.instruction,
                address: first.address,
                what: first.what,
            }),
            mismatches,
        }
    }

    /// For a person.
    pub(super) fn text(&self) -> String {
        let made = format!(
            "{} compared, {} to RAM and {} to registers carried out, {} met",
            counted(self.loads, "load"),
            counted(self.writes, "write"),
            counted(self.registers, "write"),
            counted(self.checkpoints_verified, "checkpoint"),
        );
        let verdict = if self.verified { "re-simulated" } else { "NOT WHAT THE MACHINE DID" };
        format!("{verdict}: {made}")
    }

    /// What is wrong, in a line.
    pub(super) fn problem(&self) -> Option<String> {
        let first = self.mismatch.as_ref()?;
        let place = format!("instruction {} at {:#x}", grouped(first.instruction), first.address);
        Some(match self.mismatches {
            1 => format!("{place}: {}", first.what),
            count => format!("{place}, first of {}: {}", grouped(count), first.what),
        })
    }
}
