//! `reprise run`: the machine without recording. What it shares with `record` is here too.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::path::Path;

use anyhow::{Result, anyhow, bail};
use reprise_host::{ConsoleSink, HostOptions, InputSource, ProgressObserver, terminal_can_be_used};

use crate::cli::{GuestArgs, MachineArgs, RunArgs};
use crate::output::{Output, grouped, progress_shows};
use crate::session::choice::{self, Running};
use crate::session::guest::Guest;
use crate::session::record::{self, RunPlan};
use crate::session::report::SessionReport;
use crate::session::stretches;
use crate::session::trace_file::holds_work;

/// Runs a guest.
///
/// # Errors
/// Whatever kept it from running.
pub fn run(arguments: &RunArgs, output: Output) -> Result<u8> {
    let guest = obtain(&arguments.guest, output)?;
    let plan = plan(&guest, &arguments.machine, output)?;
    let report = record::run(plan)?;
    conclude(&report, output)
}

/// Reads or builds the guest; what takes time is told.
pub(super) fn obtain(arguments: &GuestArgs, output: Output) -> Result<Guest> {
    let cmdline = arguments.cmdline.as_deref();
    Ok(Guest::obtain(&arguments.choice(), cmdline, &mut |step| output.note(step))?)
}

/// Plans a run as the command line asks.
pub(super) fn plan<'a>(
    guest: &'a Guest,
    machine: &MachineArgs,
    output: Output,
) -> Result<RunPlan<'a>> {
    let running =
        if machine.then.is_empty() { Running::Guest(guest) } else { Running::OnSeveralEngines };
    let choice = choice::for_new_run(machine.engine, machine.clock, running)?;
    // Nothing is touched before it is known that there will be a run.
    let plan = stretches::plan(choice.kind, &machine.until, &machine.then)?;
    let planned = machine.then.iter().map(|then| then.0);
    let choice = choice.going_on_with(planned.clone())?;
    if let Some(reason) = &choice.reason {
        let (engine, clock) = (choice.kind.engine_name(), choice.kind.clock_name());
        output.note(format_args!("engine {engine}, clock {clock}: {reason}"));
    }
    let engines: Vec<_> = [choice.kind].into_iter().chain(planned).collect();
    if let Some(note) = machine.soft.without_effect_on(&engines, engines.len() > 1) {
        output.note(note);
    }
    let host = host_options(machine, output)?;
    if host.input == InputSource::Terminal {
        output.note("the console is live: every key goes to the guest; Ctrl-] stops the run");
    }
    let memory_mib = machine.memory.unwrap_or(guest.default_memory_mib);
    Ok(RunPlan { guest, choice, plan, memory_mib, soft: machine.soft.options(), host })
}

fn host_options(machine: &MachineArgs, output: Output) -> Result<HostOptions> {
    let console = match &machine.console {
        Some(path) if holds_work(path) => {
            bail!("{} is a recording or a trace: give another --console file", path.display());
        }
        Some(path) => ConsoleSink::File(File::create(path).map_err(|error| {
            let shown = path.display();
            anyhow!("cannot write the console to {shown}: {error}; give another --console file")
        })?),
        None if output.json => ConsoleSink::Discard,
        None => ConsoleSink::Stdout,
    };
    let on_stdout = matches!(console, ConsoleSink::Stdout);
    let input = match &machine.input {
        Some(path) if path == Path::new("-") => InputSource::Stdin,
        Some(path) => InputSource::File(path.clone()),
        None if on_stdout && terminal_can_be_used() => InputSource::Terminal,
        None => InputSource::None,
    };
    input.check()?;
    // A progress line amid console output would spoil both.
    let console_shows = on_stdout && io::stdout().is_terminal();
    let progress = (progress_shows() && !console_shows).then(|| progress_line(output));
    Ok(HostOptions { input, console, handle_signals: true, time_limit: None, progress })
}

/// A line that tells how far the machine is.
fn progress_line(output: Output) -> ProgressObserver {
    let bar = output.bar("running", None);
    Box::new(move |progress| {
        let guest_s = progress.virtual_ns as f64 / 1e9;
        bar.set_message(format!("{} ticks, guest clock {guest_s:.1} s", grouped(progress.tick)));
        bar.tick();
    })
}

/// Reports, and gives the exit status.
///
/// # Errors
/// The report cannot be written.
pub(super) fn conclude(report: &SessionReport, output: Output) -> Result<u8> {
    // The guest may have left the cursor in the middle of a line.
    let line_end = if io::stdout().is_terminal() { "\n" } else { "" };
    output.result_beside_console(report, format_args!("{line_end}{}", report.to_table()))?;
    if report.ending == "engine-failed" {
        output.note(report.ending_detail.as_deref().unwrap_or("the engine failed"));
    }
    if let Some(warning) = &report.warning {
        output.note(warning);
    }
    if let Some(failure) = &report.console_failure {
        output.note(format_args!("console output was lost: {failure}"));
    }
    Ok(report.exit_code)
}
