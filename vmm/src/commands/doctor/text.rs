//! The report as a person reads it: what can be used first, what would give more, and the details last.

use super::{DoctorReport, EngineReport};
use crate::output::{counted, table};

/// Lines are no longer than this, where words allow.
const WIDTH: usize = 96;
/// Where the text beside an engine's yes or no begins.
const INDENT: usize = 5;

pub(super) fn of(report: &DoctorReport) -> String {
    let mut text = "To record and replay with\n".to_owned();
    for engine in &report.engines {
        text.push_str(&of_engine(engine));
    }
    let auto = match &report.engine_reason {
        Some(reason) => format!("`--engine auto` takes {}: {reason}", report.engine),
        None => format!("`--engine auto` takes {}", report.engine),
    };
    text.push_str(&format!("\n{}", wrapped(&auto, 0)));
    if !report.advice.is_empty() {
        text.push_str("\nFor more\n");
    }
    for advice in &report.advice {
        text.push_str(&format!("  {}\n", advice.gives));
        text.push_str(&paragraph(&advice.what));
    }
    text.push_str(&format!("\nThis host\n{}\nEach finding\n", table(&of_host(report))));
    for finding in &report.findings {
        let word = if finding.available { "yes" } else { "no " };
        text.push_str(&format!("{word}  {:33}  {}\n", finding.topic, finding.reason));
    }
    text
}

fn of_engine(engine: &EngineReport) -> String {
    let word = if engine.available { "yes" } else { "no " };
    let mut text = format!("{word}  {}\n", engine.options);
    text.push_str(&paragraph(&engine.gives));
    let more = match &engine.trial {
        Some(trial) if trial.equal => format!(
            "tried: a guest with {} recorded and replayed equal, {:.2} s",
            counted(trial.interrupts, "interrupt"),
            trial.wall_seconds
        ),
        Some(_) => format!("tried, and it failed: {}", engine.reason),
        None => format!("not here: {}", engine.reason),
    };
    text.push_str(&paragraph(&more));
    text
}

fn of_host(report: &DoctorReport) -> Vec<(&'static str, String)> {
    let host = &report.host;
    let virtual_machine = if report.virtual_machine { ", in a virtual machine" } else { "" };
    let cpu = format!(
        "{} {}, family {} model {} stepping {}{virtual_machine}",
        host.cpu_vendor, host.cpu_brand, host.cpu_family, host.cpu_model, host.cpu_stepping
    );
    let counter = report.branch_counter.as_ref().map_or_else(
        || "no event of this CPU is known".to_owned(),
        |counter| {
            format!(
                "{} ({}) on {}, interrupts up to {} branches late",
                counter.event_name, counter.event, counter.microarchitecture, counter.skid_branches
            )
        },
    );
    let mut rows = vec![
        ("CPU", cpu),
        ("kernel", host.kernel_release.clone()),
        ("KVM", report.kvm_kind.to_owned()),
        ("KVM capabilities", of_capabilities(report)),
        ("counts branches by", counter),
    ];
    if let Some(counter) = &report.branch_counter {
        rows.push(("", format!("(event and lateness from {})", counter.source)));
    }
    let caveats = report.branch_counter.iter().flat_map(|counter| &counter.caveats);
    for line in caveats.flat_map(|caveat| lines_of(caveat)) {
        rows.push(("", line));
    }
    rows.push(("guest CPU model", report.guest_cpu_model.clone()));
    rows
}

fn of_capabilities(report: &DoctorReport) -> String {
    let absent = report.kvm_capabilities.iter().filter(|capability| !capability.present);
    let missing: Vec<&str> = absent.map(|capability| capability.name).collect();
    match (report.kvm_capabilities.len(), &missing[..]) {
        (0, _) => "unknown: there is no KVM to ask".to_owned(),
        (_, []) => "all that Reprise uses".to_owned(),
        (_, missing) => format!("missing {}", missing.join(", ")),
    }
}

/// Indented, and of lines that fit.
fn paragraph(text: &str) -> String {
    wrapped(text, INDENT)
}

/// Lines of a value beside a name.
fn lines_of(text: &str) -> Vec<String> {
    wrapped(text, 20).lines().map(|line| line.trim_start().to_owned()).collect()
}

fn wrapped(text: &str, indent: usize) -> String {
    let margin = " ".repeat(indent);
    let mut lines = vec![margin.clone()];
    for word in text.split_whitespace() {
        let line = lines.last().expect("there is a line").len();
        if line > indent && line + 1 + word.len() > WIDTH {
            lines.push(margin.clone());
        }
        let line = lines.last_mut().expect("there is a line");
        if line.len() > indent {
            line.push(' ');
        }
        line.push_str(word);
    }
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_wrapped_at_words_and_indented() {
        let long = "word ".repeat(40);
        for line in wrapped(&long, 5).lines() {
            assert!(line.starts_with("     word") && line.len() <= WIDTH, "{line:?}");
        }
        assert_eq!(wrapped("one two", 2), "  one two\n");
        assert_eq!(wrapped(&"x".repeat(200), 0).lines().count(), 1);
    }
}
