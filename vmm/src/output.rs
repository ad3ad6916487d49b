//! What a command tells: results on standard output, notes on standard error, progress bars on a
//! terminal.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use anyhow::{Result, anyhow};
use indicatif::{
    HumanDuration, ProgressBar, ProgressDrawTarget, ProgressFinish, ProgressState, ProgressStyle,
};
use serde::Serialize;

/// How long a bar watches before it says how long the rest will take.
const TOLD_AFTER: Duration = Duration::from_secs(3);

/// How a command reports.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    /// One JSON object on standard output, and nothing else there.
    pub json: bool,
}

impl Output {
    /// Tells a person something that is no result.
    pub fn note(&self, text: impl Display) {
        // There is nowhere else to say that this cannot be said.
        let _ = written(&mut io::stderr(), &format!("reprise: {text}\n"));
    }

    /// The command's result: `report` as JSON where that was asked for, else `text`.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn result(&self, report: &impl Serialize, text: impl Display) -> Result<()> {
        let printed = if self.json { to_json(report) } else { text.to_string() };
        written(&mut io::stdout(), &with_line_end(printed))
    }

    /// The result of a command whose standard output belongs to the guest's console: JSON there
    /// where that was asked for, else `text` beside the notes.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn result_beside_console(&self, report: &impl Serialize, text: impl Display) -> Result<()> {
        if self.json {
            self.result(report, "")
        } else {
            written(&mut io::stderr(), &with_line_end(text.to_string()))
        }
    }

    /// A command that failed: one line, which says what to do.
    pub fn failure(&self, reason: &str) {
        let line = one_line(reason);
        self.note(&line);
        if self.json {
            // The line above has said what is wrong.
            let _ = self.result(&serde_json::json!({ "error": line }), "");
        }
    }

    /// Shows progress on a terminal; elsewhere the bar draws nothing.
    pub fn bar(&self, what: &str, total: Option<u64>) -> ProgressBar {
        let template = match total {
            Some(_) => "{msg} [{wide_bar}] {percent}% {elapsed}",
            None => "{msg} {spinner} {elapsed}",
        };
        self.bar_of(what, total, template)
    }

    /// A bar without a name that draws nothing before it has its place among others.
    pub fn hidden_bar(&self) -> ProgressBar {
        let style = ProgressStyle::with_template("{msg} [{bar:32}] {percent}% {elapsed}")
            .unwrap_or_else(|_| ProgressStyle::default_spinner())
            .progress_chars("=> ");
        ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::hidden())
            .with_style(style)
            .with_finish(ProgressFinish::AndClear)
    }

    /// The same over instructions: how many million go by in a second, and how long it will take.
    pub fn instruction_bar(&self, what: &str, total: Option<u64>) -> ProgressBar {
        let template = match total {
            Some(_) => "{msg} [{wide_bar}] {percent}% {mips}{left}",
            None => "{msg} {spinner} {mips}, {elapsed}",
        };
        self.bar_of(what, total, template)
    }

    fn bar_of(&self, what: &str, total: Option<u64>, template: &str) -> ProgressBar {
        let mips = |state: &ProgressState, text: &mut dyn std::fmt::Write| {
            // Writing to a bar's text does not fail.
            let _ = write!(text, "{:.0} MIPS", state.per_sec() / 1e6);
        };
        let left = |state: &ProgressState, text: &mut dyn std::fmt::Write| {
            // What the first moments promise is worth nothing.
            if state.elapsed() >= TOLD_AFTER && state.pos() > 0 {
                let _ = write!(text, ", {:#} left", HumanDuration(state.eta()));
            }
        };
        let style = ProgressStyle::with_template(template)
            .unwrap_or_else(|_| ProgressStyle::default_spinner())
            .with_key("mips", mips)
            .with_key("left", left)
            .progress_chars("=> ");
        let target = ProgressDrawTarget::stderr_with_hz(5);
        // What it showed last is in the report that follows.
        let bar = ProgressBar::with_draw_target(total, target)
            .with_style(style)
            .with_finish(ProgressFinish::AndClear);
        bar.set_message(what.to_owned());
        bar
    }
}

/// Whether progress shows.
pub fn progress_shows() -> bool {
    io::stderr().is_terminal()
}

/// Nanoseconds as seconds.
pub fn seconds(ns: u64) -> f64 {
    Duration::from_nanos(ns).as_secs_f64()
}

/// A digest in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A count with its digits in groups of three.
pub fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut grouped = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// A count of things, of which one is a `thing`.
pub fn counted(count: u64, thing: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{} {thing}{plural}", grouped(count))
}

/// Bytes in the unit that suits.
pub fn byte_size(bytes: u64) -> String {
    const UNITS: [(&str, u64); 3] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    match UNITS.iter().find(|(_, unit)| bytes >= *unit) {
        Some((name, unit)) => format!("{:.1} {name}", bytes as f64 / *unit as f64),
        None => format!("{bytes} bytes"),
    }
}

/// Rows of a name and a value, the values aligned.
pub fn table(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    rows.iter().map(|(name, value)| format!("{name:width$}  {value}\n")).collect()
}

/// Text in which nothing breaks the line or drives the terminal.
pub fn one_line(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.join("; ").chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn to_json(report: &impl Serialize) -> String {
    // Reports hold nothing that JSON cannot: string keys, no map of other keys.
    serde_json::to_string_pretty(report)
        .unwrap_or_else(|error| format!("{{\"error\": \"{error}\"}}"))
}

fn with_line_end(mut text: String) -> String {
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    text
}

/// A reader that has gone away (`| head`) is no failure.
fn written(stream: &mut impl Write, text: &str) -> Result<()> {
    match stream.write_all(text.as_bytes()).and_then(|()| stream.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(anyhow!("the report cannot be written: {error}; make room, or send it elsewhere"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_sizes_read_well() {
        assert_eq!((grouped(7), grouped(1000)), ("7".to_owned(), "1,000".to_owned()));
        assert_eq!(grouped(6_123_456_789), "6,123,456,789");
        assert_eq!((byte_size(512), byte_size(3 << 19)), ("512 bytes".into(), "1.5 MiB".into()));
    }

    #[test]
    fn one_thing_is_not_many() {
        let both = (counted(1, "event"), counted(1000, "event"));
        assert_eq!(both, ("1 event".to_owned(), "1,000 events".to_owned()));
    }

    #[test]
    fn a_reason_is_one_line_whatever_it_holds() {
        assert_eq!(one_line("first\n  second\x1b[2J\n\n"), "first; second [2J");
    }
}
