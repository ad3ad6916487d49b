//! `reprise replay`: runs a recording again and verifies it.

use std::io::{self, Write};

use anyhow::Result;
use reprise_trace::recording::Recording;

use crate::cli::ReplayArgs;
use crate::output::{Output, counted, grouped, progress_shows};
use crate::session::replay::{self, ReplayOptions, TickObserver};
use crate::session::report::{SessionReport, damage_text};

/// Replays a recording.
///
/// # Errors
/// The recording cannot be used at all.
pub fn run(arguments: &ReplayArgs, output: Output) -> Result<u8> {
    let recording = replay::open(&arguments.file)?;
    let console: Option<Box<dyn Write>> = match (arguments.show_console, output.json) {
        (false, _) => None,
        (true, false) => Some(Box::new(io::stdout())),
        (true, true) => Some(Box::new(io::stderr())),
    };
    let options = ReplayOptions {
        engine: arguments.engine,
        soft: arguments.soft.options(),
        until_tick: arguments.until,
        progress: (progress_shows() && console.is_none()).then(|| bar(&recording, output)),
        console,
    };
    let replayed = replay::replay(&recording, options)?;
    for note in &replayed.notes {
        output.note(note);
    }
    if let Some(note) = arguments.soft.without_effect_on(replayed.kind) {
        output.note(note);
    }
    let report = replayed.report;
    output.result(&report, format_args!("{}{}", report.to_table(), verdict(&report)));
    if report.verified == Some(false) {
        output.note(failure(&report));
    } else if let Some(until) = arguments.until.filter(|until| report.ticks < *until) {
        let (end, asked) = (grouped(report.ticks), grouped(until));
        output.note(format_args!("the recording ends at tick {end}, before tick {asked}"));
    }
    Ok(report.exit_code)
}

/// A bar over the recording's ticks.
pub(super) fn bar(recording: &Recording, output: Output) -> TickObserver {
    let last_tick = recording.summary().last_moment.map(|moment| moment.tick);
    let bar = output.bar("replaying", last_tick);
    Box::new(move |tick| bar.set_position(tick))
}

/// One line that says whether it is the recorded run.
pub(super) fn verdict(report: &SessionReport) -> String {
    let until = match report.verified_until {
        Some(moment) => format!("tick {}", grouped(moment.tick)),
        None => "the start".to_owned(),
    };
    let events = counted(report.events, "event");
    match (report.verified, report.complete, report.ending) {
        (Some(false), ..) if report.events == 0 => "NOT VERIFIED: no event agrees".to_owned(),
        (Some(false), ..) => format!("NOT VERIFIED: {events} agree, up to {until}"),
        (_, _, "target-reached") if report.events == 0 => {
            "at the moment asked for, which lies before the first event: nothing to compare yet"
                .to_owned()
        }
        (_, _, "target-reached") => {
            format!("at the moment asked for; verified up to {until}, {events}")
        }
        (_, Some(false), _) => format!(
            "verified up to {until}, {events}; the recording was cut short there, \
             so its end is not known"
        ),
        _ => format!("verified to the end, every event ({})", grouped(report.events)),
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
