//! `reprise trace dump`: a listing of a trace.

use std::io::{self, BufWriter, ErrorKind, StdoutLock, Write};

use anyhow::{Context, Result};
use reprise_export::dump::{Dump, Shown};
use reprise_trace::instructions::TraceError;
use reprise_trace::instructions::filter::Filter;

use crate::cli::DumpArgs;
use crate::output::Output;
use crate::session::trace_file::TraceFile;

/// Bytes gathered before they go out.
const BUFFER_BYTES: usize = 1 << 16;

/// Lists a trace. A reader that goes away (`| head`) ends it quietly.
///
/// # Errors
/// The trace or the symbols cannot be used, or the window lies outside the trace.
pub(super) fn run(arguments: &DumpArgs, output: Output) -> Result<u8> {
    let symbols = super::symbols(&arguments.symbols.files)?;
    let mut trace = TraceFile::open(&arguments.file)?;
    let mut notes = Vec::new();
    let (selection, _) = trace.select(arguments.window.selection(), output, &mut notes)?;
    notes.iter().for_each(|note| output.note(note));
    let mut listing = Listing::new(output);
    let reached = listing.begin().and_then(|()| {
        let dump = Dump::new(symbols, arguments.limit, |entry: &Shown| listing.put(entry));
        let mut filter = Filter::new(selection, dump);
        trace.drive(&mut filter, (output, "listing"), |filter| {
            filter.observer().is_full() || filter.is_past_window()
        })
    });
    let reached = reached.and_then(|reached| listing.end().map(|()| reached));
    match reached {
        Ok(reached) => Ok(trace.tell(&reached, output)),
        Err(TraceError::Write(error)) if error.kind() == ErrorKind::BrokenPipe => Ok(0),
        Err(TraceError::Write(error)) => Err(error).context("the listing cannot be written"),
        Err(error) => Err(error).with_context(|| arguments.file.display().to_string()),
    }
}

/// Standard output, as lines or as one object.
struct Listing {
    out: BufWriter<StdoutLock<'static>>,
    json: bool,
    entries: u64,
}

impl Listing {
    fn new(output: Output) -> Self {
        let out = BufWriter::with_capacity(BUFFER_BYTES, io::stdout().lock());
        Self { out, json: output.json, entries: 0 }
    }

    fn begin(&mut self) -> Result<(), TraceError> {
        if self.json {
            self.out.write_all(b"{\"entries\": [").map_err(TraceError::Write)?;
        }
        Ok(())
    }

    fn put(&mut self, entry: &Shown) -> io::Result<()> {
        if !self.json {
            return writeln!(self.out, "{entry}");
        }
        let separator: &[u8] = if self.entries > 0 { b",\n" } else { b"\n" };
        self.entries += 1;
        self.out.write_all(separator)?;
        serde_json::to_writer(&mut self.out, entry).map_err(io::Error::from)
    }

    fn end(&mut self) -> Result<(), TraceError> {
        if self.json {
            self.out.write_all(b"\n]}\n").map_err(TraceError::Write)?;
        }
        self.out.flush().map_err(TraceError::Write)
    }
}
