//! Dinero IV's extended input (`-informat D`): a line for each fetch, read and write, with address
//! and size.

use std::io::Write;

use reprise_trace::instructions::{Event, Observer, Run, TraceError};

/// Writes Dinero's extended input.
#[derive(Debug)]
pub struct Dinero<W> {
    out: W,
}

impl<W: Write> Dinero<W> {
    /// Writes to `out`, line by line: a buffer around it helps.
    pub fn new(out: W) -> Self {
        Self { out }
    }

    /// Where it was written.
    pub fn into_inner(self) -> W {
        self.out
    }
}

impl<W: Write> Observer for Dinero<W> {
    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        for step in run.steps() {
            if step.retired {
                let (linear, bytes) = (step.instruction.linear(), step.instruction.bytes().len());
                writeln!(self.out, "i {linear:x} {bytes}").map_err(TraceError::Write)?;
            }
            for access in step.accesses() {
                let (address, size) = (access.address, access.size_bytes);
                if access.kind.reads() {
                    writeln!(self.out, "r {address:x} {size}").map_err(TraceError::Write)?;
                }
                if access.kind.writes() {
                    writeln!(self.out, "w {address:x} {size}").map_err(TraceError::Write)?;
                }
            }
        }
        Ok(())
    }

    fn event(&mut self, _: &Event) -> Result<(), TraceError> {
        Ok(())
    }

    fn end(&mut self) -> Result<(), TraceError> {
        self.out.flush().map_err(TraceError::Write)
    }
}
