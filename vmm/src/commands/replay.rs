//! `reprise replay`: runs a recording again and verifies it.

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;

use anyhow::Result;
use reprise_bisect::interval::{self, Interval};
use reprise_export::symbols::Symbols;
use reprise_host::WithoutQueries;
use reprise_replay::Replayable;
use reprise_trace::recording::Recording;
use serde::Serialize;

use super::trace::symbols;
use crate::cli::ReplayArgs;
use crate::output::{Output, counted, grouped, progress_shows, seconds};
use crate::session::bisection::Watched;
use crate::session::choice::EngineKind;
use crate::session::replay::{self, At, ReplayOptions, TickObserver};
use crate::session::report::{SessionReport, damage_text};
use crate::session::rewriting;

/// Replays a recording.
///
/// # Errors
/// The recording cannot be used at all.
pub fn run(arguments: &ReplayArgs, output: Output) -> Result<u8> {
    let names = Arc::new(symbols(&arguments.symbols.files)?);
    let replayable = replay::open_replayable(&arguments.file)?;
    let console: Option<Box<dyn Write>> = match (arguments.show_console, output.json) {
        (false, _) => None,
        (true, false) if io::stdout().is_terminal() => {
            Some(Box::new(WithoutQueries::new(io::stdout())))
        }
        (true, false) => Some(Box::new(io::stdout())),
        (true, true) => Some(Box::new(io::stderr())),
    };
    let (header, stretches) =
        (replayable.recording().header(), replayable.course().stretches.len());
    let rewrites = rewriting::is_asked_for(arguments.engine, arguments.clock, (header, stretches))?;
    let options = ReplayOptions {
        engine: arguments.engine,
        clock: arguments.clock,
        rewritten: arguments.rewritten.clone(),
        rewriting: (progress_shows() && rewrites)
            .then(|| bar("rewriting", replayable.recording(), output)),
        soft: arguments.soft.options(),
        from: arguments.from,
        until: arguments.until,
        checkpointer: None,
        progress: (progress_shows() && console.is_none()).then(|| match rewrites {
            // How many ticks of the other clock there are, nobody knows yet.
            true => {
                let bar = output.bar("replaying", None);
                Box::new(move |tick| bar.set_position(tick)) as TickObserver
            }
            false => bar("replaying", replayable.recording(), output),
        }),
        console,
    };
    let replayed = replay::replay(&replayable, options)?;
    // What is narrowed is a replay of this very file on the software CPU.
    let is_narrowed =
        !rewrites && replayed.followed.kinds.iter().all(|kind| *kind == EngineKind::Soft);
    for note in &replayed.notes {
        output.note(note);
    }
    let (engines, in_turn) = (&replayed.followed.kinds, replayed.followed.by_relay);
    if let Some(note) = arguments.soft.without_effect_on(engines, in_turn) {
        output.note(note);
    }
    let report = replayed.report;
    let bisection = match arguments.bisect && is_narrowed {
        true => Some(bisect(&replayable, &names, output)?),
        false => None,
    };
    let narrowed = bisection.as_ref().map(|found| format!("\n\n{found}")).unwrap_or_default();
    // The guest may have left the cursor in the middle of a line.
    let line_end = if arguments.show_console && io::stdout().is_terminal() { "\n" } else { "" };
    let text = format!("{line_end}{}{}{narrowed}", report.to_table(), verdict(&report));
    let report = BisectedReport { report, bisection };
    output.result(&report, text)?;
    let BisectedReport { report, bisection } = report;
    if report.verified == Some(false) {
        let file = arguments.file.display().to_string();
        let offer = report.divergence.as_ref().filter(|_| bisection.is_none());
        let offer = offer.map(|_| what_narrows(&file, is_narrowed)).unwrap_or_default();
        output.note(failure(&report) + &offer);
    } else if arguments.bisect && !is_narrowed {
        output.note("--bisect: only replays on engine soft are compared with checkpoints, and this was none");
    } else if let Some(beyond) = [arguments.from, arguments.until]
        .into_iter()
        .flatten()
        .find(|at| !at.is_reached(report.ticks, (report.virtual_seconds * 1e9).ceil() as u64))
    {
        let (end, end_s) = (grouped(report.ticks), report.virtual_seconds);
        output.note(match beyond {
            At::Tick(tick) => {
                format!("the recording ends at tick {end}, before tick {}", grouped(tick))
            }
            At::Time(ns) => format!(
                "the recording ends at {end_s:.3} s of guest time, before {:.3} s",
                seconds(ns)
            ),
        });
    }
    Ok(report.exit_code)
}

/// A replay's report, and where it parts from the recording, if that was asked for.
#[derive(Debug, Serialize)]
struct BisectedReport {
    #[serde(flatten)]
    report: SessionReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    bisection: Option<Interval>,
}

/// What to do about a divergence: what the software CPU has replayed it narrows, and what is hardware's own
/// nobody can.
fn what_narrows(file: &str, is_narrowed: bool) -> String {
    match is_narrowed {
        true => format!("; `reprise replay {file} --engine soft --bisect` narrows it down"),
        false => format!(
            "; this is not narrowed, since the software CPU did not run it: `reprise replay {file} --engine soft` \
             tells whether that differs as well, and then --bisect narrows that"
        ),
    }
}

/// Narrows a divergence down.
fn bisect(replayable: &Replayable, names: &Arc<Symbols>, output: Output) -> Result<Interval> {
    let mut watch = Watched::start(output, ["replaying", "again"])?;
    Ok(interval::narrow(replayable, names, &mut watch)?)
}

/// A bar over the recording's ticks.
pub(super) fn bar(what: &str, recording: &Recording, output: Output) -> TickObserver {
    let last_tick = recording.summary().last_moment.map(|moment| moment.tick);
    let bar = output.bar(what, last_tick);
    Box::new(move |tick| bar.set_position(tick))
}

/// One line that says whether it is the recorded run.
pub(super) fn verdict(report: &SessionReport) -> String {
    let until = match report.verified_until {
        Some(moment) => format!("tick {}", grouped(moment.tick)),
        None => "the start".to_owned(),
    };
    let events = counted(report.events, "event");
    let since = match report.from_tick {
        Some(tick) => format!(" since the checkpoint at tick {}", grouped(tick)),
        None => String::new(),
    };
    match (report.verified, report.complete, report.ending) {
        (Some(false), ..) if report.events == 0 && report.divergence.is_none() => {
            "NOT VERIFIED: nothing could be compared".to_owned()
        }
        (Some(false), ..) if report.events == 0 => "NOT VERIFIED: no event agrees".to_owned(),
        (Some(false), ..) => {
            let agree = if report.events == 1 { "agrees" } else { "agree" };
            format!("NOT VERIFIED: {events} {agree}, up to {until}")
        }
        (_, _, "target-reached") if report.events == 0 => {
            "at the moment asked for, which lies before the first event: nothing to compare yet"
                .to_owned()
        }
        (_, _, "target-reached") => {
            format!("at the moment asked for; verified up to {until}, {events}{since}")
        }
        (_, Some(false), ending) if ending != "cut-short" => format!(
            "verified to the end, every event{since} ({}); the file is cut off behind it",
            grouped(report.events)
        ),
        (_, Some(false), _) => format!(
            "verified up to {until}, {events}{since}; the recording was cut short there, \
             so its end is not known"
        ),
        _ => format!("verified to the end, every event{since} ({})", grouped(report.events)),
    }
}

/// Why a replay is not verified.
pub(super) fn failure(report: &SessionReport) -> String {
    if let Some(divergence) = &report.divergence {
        return format!(
            "the replay differs from the recording at tick {} (rip {:#x}, rcx {:#x}) in {}: \
             recorded {}, replayed {}",
            divergence.moment.tick,
            divergence.moment.rip,
            divergence.moment.rcx,
            divergence.what,
            divergence.recorded,
            divergence.replayed
        );
    }
    let Some(damage) = &report.damage else {
        return "the recording was cut short before its first event: record again".to_owned();
    };
    let damage = damage_text(damage, report.events);
    match report.verified_until {
        Some(moment) => format!(
            "the replay agrees with the recording up to tick {}, but the file is damaged: {damage}",
            moment.tick
        ),
        None => format!("the file is damaged: {damage}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_offered_that_would_narrow_another_replay() {
        let on_soft = what_narrows("a.rr", true);
        assert!(on_soft.contains("`reprise replay a.rr --engine soft --bisect`"), "{on_soft}");
        let elsewhere = what_narrows("a.rr", false);
        assert!(elsewhere.contains("is not narrowed"), "{elsewhere}");
        assert!(!elsewhere.contains("--bisect`"), "{elsewhere}");
    }
}
