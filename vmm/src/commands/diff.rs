//! `reprise diff`: the first place where two recordings part: the first record, and the first
//! instruction.

use std::sync::Arc;

use anyhow::{Context, Result};
use reprise_bisect::input::{
    InputDifference, Numbered, first_input_difference, first_typed_difference,
};
use reprise_bisect::{
    Compared, Finding, Kind, Question, Side, common_start, compare, machine_differences,
};
use reprise_cpu::translate::Translation;
use reprise_replay::Replayable;
use reprise_trace::diff::{Difference, first_difference, header_differences};
use reprise_trace::event::Record;
use serde::Serialize;

use super::trace::symbols;
use crate::cli::DiffArgs;
use crate::output::{Output, grouped};
use crate::session::bisection::Watched;
use crate::session::replay::open_replayable;
use crate::session::report::{MomentReport, damage_text};

/// Fields of devices shown where a difference comes from.
const SHOWN_ROWS: usize = 6;

/// How two recordings differ.
#[derive(Debug, Serialize)]
struct DiffReport {
    /// The logs are the same to their ends.
    same_log: bool,
    /// Header and log are the same.
    same: bool,
    /// Both machines are given the same, so far as both logs go: what differs, if anything, are marks.
    same_input: bool,
    header: Vec<HeaderReport>,
    /// The first record that differs.
    first_difference: Option<RecordReport>,
    /// The first record that differs and is no mark.
    first_input_difference: Option<InputReport>,
    /// The first byte that was not typed alike, whenever it was.
    first_typed_difference: Option<String>,
    /// What replaying both found.
    bisection: Option<Compared>,
    /// Why neither was replayed.
    not_bisected: Option<String>,
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

/// A record in each log, or a log's end.
#[derive(Debug, Serialize)]
struct InputReport {
    record_a: Option<u64>,
    record_b: Option<u64>,
    tick: u64,
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

impl From<&InputDifference> for InputReport {
    fn from(difference: &InputDifference) -> Self {
        let number = |found: &Option<Numbered>| found.as_ref().map(|found| found.number);
        Self {
            record_a: number(&difference.a),
            record_b: number(&difference.b),
            tick: difference.tick(),
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
    let names = Arc::new(symbols(&arguments.symbols.files)?);
    let (first, second) = (open_replayable(&arguments.a)?, open_replayable(&arguments.b)?);
    let sides = [
        Side::soft("first", &first, Translation::default()),
        Side::soft("second", &second, Translation::default()),
    ];
    let (a, b) = (first.recording(), second.recording());
    let both = || format!("{} and {}", arguments.a.display(), arguments.b.display());
    let header: Vec<HeaderReport> = header_differences(a.header(), b.header())
        .into_iter()
        .map(|found| HeaderReport { field: found.field, a: found.a, b: found.b })
        .collect();
    let difference = first_difference(&mut a.log(), &mut b.log()).with_context(both)?;
    let input = first_input_difference(&mut a.log(), &mut b.log()).with_context(both)?;
    let typed = first_typed_difference(&mut a.log(), &mut b.log()).with_context(both)?;
    let reason = match (arguments.records_only, &difference) {
        (true, _) | (_, None) => None,
        (false, Some(difference)) => not_worth_replaying(&sides, difference, input.as_ref()),
    };
    let replays = difference.is_some() && !arguments.records_only && reason.is_none();
    let bisection = match replays {
        false => None,
        true => {
            let question = Question {
                starts: common_start(&sides, hint(difference.as_ref(), input.as_ref())),
                until: last_tick(&first).max(last_tick(&second)).saturating_add(1),
                input: input.as_ref(),
                typed: typed.as_ref(),
                symbols: names,
            };
            let mut watch = Watched::start(output, ["first", "second"])?;
            Some(compare(&sides, &question, &mut watch)?)
        }
    };
    let report = DiffReport {
        same_log: difference.is_none(),
        same: difference.is_none() && header.is_empty(),
        same_input: input.is_none(),
        header,
        first_difference: difference.as_ref().map(RecordReport::from),
        first_input_difference: input.as_ref().map(InputReport::from),
        first_typed_difference: typed.map(|typed| typed.to_string()),
        bisection,
        not_bisected: reason,
    };
    output.result(&report, text(&report))?;
    Ok(tell_damage(arguments, [&first, &second], output))
}

/// Where the machines cannot have parted yet.
fn hint(difference: Option<&Difference>, input: Option<&InputDifference>) -> u64 {
    let record = difference.into_iter().flat_map(|found| [&found.a, &found.b]).flatten();
    let ticks = record.map(|record| record.moment.tick).chain(input.map(InputDifference::tick));
    ticks.min().unwrap_or(0)
}

fn last_tick(replayable: &Replayable) -> u64 {
    replayable.recording().summary().last_moment.map_or(0, |moment| moment.tick)
}

/// Why replaying both would tell nothing that the logs do not; `None` where it would.
fn not_worth_replaying(
    sides: &[Side<'_>; 2],
    difference: &Difference,
    input: Option<&InputDifference>,
) -> Option<String> {
    let machines = machine_differences(sides);
    if !machines.is_empty() {
        return Some(format!(
            "not the same machine or guest ({}): they part before the first instruction",
            machines.join(", ")
        ));
    }
    // What was recorded at one and the same tick is not the same: the machines were not either.
    let same_tick = match (&difference.a, &difference.b) {
        (Some(a), Some(b)) => a.moment.tick == b.moment.tick,
        _ => false,
    };
    match input {
        Some(InputDifference { a: Some(_), b: Some(_) }) => None,
        _ if same_tick => None,
        Some(_) => Some("one log ends where the other goes on, with the same input before".to_owned()),
        None => Some(
            "the input is the same: the logs differ in marks alone, which tell how far a recorder had \
             come when its host's clock said so"
                .to_owned(),
        ),
    }
}

/// Says what is wrong with the files; the exit status.
fn tell_damage(arguments: &DiffArgs, both: [&Replayable; 2], output: Output) -> u8 {
    let mut damage = Vec::new();
    for (path, replayable) in [&arguments.a, &arguments.b].into_iter().zip(both) {
        let (summary, shown) = (replayable.recording().summary(), path.display());
        if let Some(found) = &summary.damage {
            let text = damage_text(&found.to_string(), summary.record_count);
            damage.push(format!("{shown}: {text}"));
        } else if !summary.complete {
            output.note(format_args!("{shown} is cut short; compared as far as it goes"));
        }
        if let Some(note) = summary.end_note() {
            output.note(format_args!("{shown}: {note}"));
        }
    }
    if !damage.is_empty() {
        output.note(damage.join("; "));
    }
    u8::from(!damage.is_empty())
}

/// The headline first; then what the files hold; then, if both were replayed, where the machines part.
fn text(report: &DiffReport) -> String {
    let mut lines = Vec::new();
    if let Some(compared) = &report.bisection {
        lines.push(bisection_text(compared));
        lines.push(String::new());
        lines.push("in the files:".to_owned());
    }
    lines.push(match (&report.first_difference, report.same) {
        (Some(difference), _) => difference.text.clone(),
        (None, true) => "identical: the headers and the logs are the same".to_owned(),
        (None, false) => "the logs are the same".to_owned(),
    });
    let other_record = report.first_difference.as_ref().map(|found| Some(found.record));
    if let Some(input) = &report.first_input_difference
        && other_record != Some(input.record_a)
    {
        lines.push(format!("the first input that differs: {}", input.text));
    }
    if let Some(typed) = &report.first_typed_difference {
        lines.push(format!("typed: {typed}"));
    }
    lines.extend(
        report.header.iter().map(|found| {
            format!("header {}: first: {}; second: {}", found.field, found.a, found.b)
        }),
    );
    lines.extend(report.not_bisected.clone());
    lines.join("\n")
}

/// What replaying both found, for a person.
fn bisection_text(compared: &Compared) -> String {
    let comparison = &compared.comparison;
    let until = comparison.equal_until;
    let how = format!(
        "replayed both from instruction {} on, and compared them {} times",
        comparison.from,
        grouped(comparison.times)
    );
    let Some(finding) = &compared.finding else {
        let ended = comparison.endings.iter().all(Option::is_some);
        let mut text = match (comparison.other_clocks, comparison.diverged) {
            (true, [false, false]) if ended => format!(
                "CPU and RAM are the same from the first to the last instruction: one run under two clocks, \
                 {until} instructions"
            ),
            _ => format!(
                "both replays are the same machine up to instruction {until}, so at least one recording is \
                 not what its machine did\nnext: `reprise replay --bisect` with each of them"
            ),
        };
        for (name, ending) in ["first", "second"].iter().zip(&comparison.endings) {
            if let Some(ending) = ending {
                text += &format!("\nthe {name} replay ends: {ending}");
            }
        }
        return format!("{text}\n{how}");
    };
    let alike = match &compared.origin {
        _ if finding.kind == Kind::Start => "they are not alike where they begin".to_owned(),
        None if comparison.other_clocks => {
            format!("CPU and RAM are alike up to instruction {until}")
        }
        None => format!("they are alike up to instruction {until}"),
        Some(origin) if origin.kind == Kind::Start => {
            format!("CPU and RAM are alike up to instruction {until}")
        }
        Some(origin) => format!(
            "they are alike up to instruction {}, and CPU and RAM up to instruction {until}",
            origin.instructions
        ),
    };
    let mut text = format!("{finding}\n\n{how}: {alike}");
    if let Some(origin) = &compared.origin {
        text += &origin_text(origin);
    }
    text
}

/// Where devices or time differ, before CPU and RAM do.
fn origin_text(origin: &Finding) -> String {
    let shown = origin.other.iter().take(SHOWN_ROWS);
    let rows: Vec<String> =
        shown.map(|row| format!("{} {} and {}", row.name, row.a, row.b)).collect();
    let more = match origin.other.len().saturating_sub(SHOWN_ROWS) {
        0 => String::new(),
        more => format!("; and {more} more: see --json"),
    };
    let mut text =
        format!("\nwhere it comes from: {}\n  {}{more}", origin.headline(), rows.join("; "));
    if let Some(cause) = origin.causes.first() {
        text += &format!("\n  {} ({})", cause.text, cause.name);
    }
    text
}
