//! `reprise trace check`: whether a trace is whole, and can be what a CPU did.

use anyhow::{Context, Result};
use reprise_export::check::Check;
use serde::Serialize;

use super::against::{self, AgainstReport};
use crate::cli::CheckArgs;
use crate::output::{Output, counted, grouped};
use crate::session::trace_file::{Reached, TraceFile};

/// What was found.
#[derive(Debug, Serialize)]
struct CheckReport {
    /// The file is whole and nothing was found.
    sound: bool,
    /// Instructions read.
    instructions: u64,
    /// Segments read.
    segments: u64,
    /// Why the file is not whole.
    file: Option<String>,
    findings: Vec<FindingReport>,
    /// What carrying out its writes came to, if that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    against: Option<AgainstReport>,
}

/// A kind of finding.
#[derive(Debug, Serialize)]
struct FindingReport {
    what: &'static str,
    /// The instruction at which it was found first.
    instruction: u64,
    address: u64,
    /// How often it was found.
    count: u64,
}

/// Reads the whole file and checks what it says. The exit status is 1 if anything is wrong.
///
/// # Errors
/// The file cannot be read, or is no trace.
pub(super) fn run(arguments: &CheckArgs, output: Output) -> Result<u8> {
    let mut trace = TraceFile::open(&arguments.file)?;
    let mut check = Check::default();
    let reached = trace
        .drive(&mut check, (output, "checking"), |_| false)
        .with_context(|| arguments.file.display().to_string())?;
    let file = match &reached {
        Reached::End | Reached::Enough => trace.reader.footer_fault().map(|what| {
            format!(
                "{what}: all that it holds is sound, but the file is not the one that was written"
            )
        }),
        Reached::CutShort { unused_bytes } => Some(format!(
            "the trace is cut short: {unused_bytes} bytes behind its last whole segment are of no \
             use; expand again for the rest"
        )),
        Reached::Damaged(damage) => Some(damage.to_string()),
    };
    let findings = check.findings().iter().map(|found| FindingReport {
        what: found.what,
        instruction: found.instruction,
        address: found.address,
        count: found.count,
    });
    let findings: Vec<_> = findings.collect();
    let is_sound = file.is_none() && findings.is_empty();
    let recording = arguments.against.as_deref().filter(|_| is_sound);
    let against = recording.map(|recording| against::check(&arguments.file, recording, output));
    let against = against.transpose()?;
    let report = CheckReport {
        sound: is_sound && against.as_ref().is_none_or(|against| against.verified),
        instructions: check.instructions(),
        segments: trace.reader.segments_read(),
        file,
        findings,
        against,
    };
    output.result(&report, text(&report))?;
    let shown = arguments.file.display();
    for line in problems(&report) {
        output.note(format_args!("{shown}: {line}"));
    }
    Ok(u8::from(!report.sound))
}

fn text(report: &CheckReport) -> String {
    let read = format!(
        "{} in {}",
        counted(report.instructions, "instruction"),
        counted(report.segments, "segment")
    );
    if let Some(against) = &report.against {
        return format!("sound: {read}; {}", against.text());
    }
    match (report.sound, report.findings.len()) {
        (true, _) => format!("sound: {read}"),
        (false, 0) => format!("NOT WHOLE: {read} are sound"),
        (false, kinds) => {
            format!("NOT SOUND: {} in {read}", counted(kinds as u64, "kind of violation"))
        }
    }
}

/// A line for each thing that is wrong.
fn problems(report: &CheckReport) -> Vec<String> {
    let findings = report.findings.iter().map(|found| {
        let place = format!("instruction {} at {:#x}", grouped(found.instruction), found.address);
        match found.count {
            1 => format!("{place}: {}", found.what),
            count => format!("{place}, first of {}: {}", grouped(count), found.what),
        }
    });
    let against = report.against.as_ref().and_then(AgainstReport::problem);
    findings.chain(report.file.clone()).chain(against).collect()
}
