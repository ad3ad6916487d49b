//! `reprise trace`: what can be done with a trace.

mod against;
mod check;
mod concat;
mod convert;
mod dump;
mod info;
mod stats;

use std::path::Path;

use anyhow::Result;
use reprise_export::symbols::Symbols;
use serde::Serialize;

use crate::cli::{SymbolFile, TraceAction, TraceArgs};
use crate::output::Output;

pub(super) use info::show as show_info;

/// Does it.
///
/// # Errors
/// As the action says.
pub fn run(arguments: &TraceArgs, output: Output) -> Result<u8> {
    match &arguments.action {
        TraceAction::Dump(arguments) => dump::run(arguments, output),
        TraceAction::Stats(arguments) => stats::run(arguments, output),
        TraceAction::Check(arguments) => check::run(arguments, output),
        TraceAction::Concat(arguments) => concat::run(arguments, output),
        TraceAction::Convert(arguments) => convert::run(arguments, output),
    }
}

/// Reads all files of `--symbols`.
pub(super) fn symbols(files: &[SymbolFile]) -> Result<Symbols> {
    let mut symbols = Symbols::new();
    for SymbolFile { path, offset } in files {
        symbols.add_file(path, *offset)?;
    }
    Ok(symbols)
}

/// A report of a command whose standard output may be taken by the trace itself: then it stands beside
/// the notes.
fn report(to: &Path, output: Output, report: &impl Serialize, text: &str) -> Result<()> {
    if to == Path::new("-") {
        output.note(text);
        return Ok(());
    }
    output.result(report, text)
}
