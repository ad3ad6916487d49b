//! `reprise trace concat`: the shares of an expansion become the trace that one process would write.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, anyhow, bail};
use reprise_export::ExportOptions;
use reprise_host::StopRequests;
use reprise_trace::instructions::{Concat, joined_header};
use serde::Serialize;

use crate::cli::ConcatArgs;
use crate::output::{Output, byte_size, counted};
use crate::session::trace_file::{is_no_input, open_reader, place};
use crate::session::trace_target::format_of;

/// What came of it.
#[derive(Debug, Serialize)]
struct ConcatReport {
    shares: u64,
    segments: u64,
    instructions: u64,
    left_out: u64,
    trace_bytes: u64,
}

/// Joins shares.
///
/// # Errors
/// A share cannot be used, is missing, or is no share of the same expansion; or the trace cannot be
/// written. Then there is none under the final name.
pub(super) fn run(arguments: &ConcatArgs, output: Output) -> Result<u8> {
    format_of(Some("reprise"), &arguments.output, &ExportOptions::default(), output.json)?;
    let shown = |index: usize| arguments.shares[index].display().to_string();
    let mut headers = Vec::new();
    for path in &arguments.shares {
        headers.push(open_reader(path)?.header().clone());
    }
    // All of them fit before any of them is copied.
    let header =
        joined_header(&headers).map_err(|(index, error)| anyhow!(error).context(shown(index)))?;
    let shares: Vec<_> = arguments.shares.iter().map(PathBuf::as_path).collect();
    is_no_input(&arguments.output, &shares)?;
    let to = place(&arguments.output, arguments.force)?;
    let stop = Arc::new(AtomicBool::new(false));
    let _stop = StopRequests::watch(stop.clone())?;
    let out_name = arguments.output.display();
    let mut joined = Concat::create(to.open()?, header)?;
    let bar = output.bar("joining", Some(headers.len() as u64));
    for (index, path) in arguments.shares.iter().enumerate() {
        if stop.load(Ordering::SeqCst) {
            bail!("stopped: there is no trace {out_name}");
        }
        joined.append(&mut open_reader(path)?).with_context(|| shown(index))?;
        bar.set_position(index as u64 + 1);
    }
    bar.finish_and_clear();
    let totals = joined.writer().totals();
    let out = joined.finish()?;
    let trace_bytes = out.finish().with_context(|| format!("cannot write {out_name}"))?;
    let report = ConcatReport {
        shares: headers.len() as u64,
        segments: totals.segments,
        instructions: totals.instructions,
        left_out: totals.skipped,
        trace_bytes,
    };
    let text = format!(
        "{} joined: {} in {}, {}",
        counted(report.shares, "share"),
        counted(report.instructions, "instruction"),
        counted(report.segments, "segment"),
        byte_size(trace_bytes)
    );
    super::report(&arguments.output, output, &report, &text)?;
    Ok(0)
}
