//! `reprise diff`: the first place where two recordings part.

use anyhow::{Context, Result};
use reprise_trace::diff::{Difference, first_difference, header_differences};
use reprise_trace::event::Record;
use serde::Serialize;

use crate::cli::DiffArgs;
use crate::output::Output;
use crate::session::replay::open;
use crate::session::report::{MomentReport, damage_text};

/// How two recordings differ.
#[derive(Debug, Serialize)]
struct DiffReport {
    /// The logs are the same to their ends.
    same_log: bool,
    /// Header and log are the same.
    same: bool,
    header: Vec<HeaderReport>,
    /// The first record that differs.
    first_difference: Option<RecordReport>,
}

#[derive(Debug, Serialize)]
struct HeaderReport {
    field: &'static str,
    a: String,
    b: String,
}

#[derive(Debug, Serialize)]
struct RecordReport {
    record: u64,
    parts: Vec<&'static str>,
    moment_a: Option<MomentReport>,
    moment_b: Option<MomentReport>,
    a: Option<String>,
    b: Option<String>,
    text: String,
}

impl From<&Difference> for RecordReport {
    fn from(difference: &Difference) -> Self {
        let moment = |record: &Option<Record>| record.as_ref().map(|record| record.moment.into());
        Self {
            record: difference.record,
            parts: difference.parts(),
            moment_a: moment(&difference.a),
            moment_b: moment(&difference.b),
            a: difference.a.as_ref().map(ToString::to_string),
            b: difference.b.as_ref().map(ToString::to_string),
            text: difference.to_string(),
        }
    }
}

/// Compares two recordings. The exit status says whether it could be done to the end, not what it
/// found: with a damaged file it is 1 also where the logs part before the damage.
///
/// # Errors
/// A recording cannot be used, or is damaged before a difference is found.
pub fn run(arguments: &DiffArgs, output: Output) -> Result<u8> {
    let (a, b) = (open(&arguments.a)?, open(&arguments.b)?);
    let header: Vec<HeaderReport> = header_differences(a.header(), b.header())
        .into_iter()
        .map(|found| HeaderReport { field: found.field, a: found.a, b: found.b })
        .collect();
    let first = first_difference(&mut a.log(), &mut b.log())
        .with_context(|| format!("{} and {}", arguments.a.display(), arguments.b.display()))?;
    let report = DiffReport {
        same_log: first.is_none(),
        same: first.is_none() && header.is_empty(),
        header,
        first_difference: first.as_ref().map(RecordReport::from),
    };
    output.result(&report, text(&report));
    let mut damage = Vec::new();
    for (path, recording) in [(&arguments.a, &a), (&arguments.b, &b)] {
        let (summary, shown) = (recording.summary(), path.display());
        if let Some(found) = &summary.damage {
            let text = damage_text(&found.to_string(), summary.record_count);
            damage.push(format!("{shown}: {text}"));
        } else if !summary.complete {
            output.note(format_args!("{shown} is cut short; compared as far as it goes"));
        }
    }
    if !damage.is_empty() {
        output.note(damage.join("; "));
    }
    Ok(u8::from(!damage.is_empty()))
}

fn text(report: &DiffReport) -> String {
    let mut lines: Vec<String> = report
        .header
        .iter()
        .map(|found| format!("header {}: first: {}; second: {}", found.field, found.a, found.b))
        .collect();
    lines.push(match &report.first_difference {
        Some(difference) => difference.text.clone(),
        None => "the logs are the same".to_owned(),
    });
    lines.join("\n")
}
