//! A listing of a trace for people: an instruction a line, with what it accessed, and events between.

use std::fmt::Write as _;
use std::io::Write;

use iced_x86::{Formatter, GasFormatter};
use reprise_trace::instructions::{AccessKind, Event, Observer, Position, Run, Step, TraceError};

use crate::instruction::decode;

/// Writes the listing.
pub struct Dump<W> {
    out: W,
    formatter: GasFormatter,
    position: Position,
    /// Instructions yet to be shown.
    left: u64,
}

impl<W> std::fmt::Debug for Dump<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dump").field("left", &self.left).finish_non_exhaustive()
    }
}

impl<W: Write> Dump<W> {
    /// Lists at most so many instructions.
    pub fn new(out: W, instructions: u64) -> Self {
        let (formatter, position) = (GasFormatter::new(), Position::default());
        Self { out, formatter, position, left: instructions }
    }

    /// Whether all was shown that was asked for: reading on shows nothing.
    pub fn is_full(&self) -> bool {
        self.left == 0
    }

    /// Where it was written.
    pub fn into_inner(self) -> W {
        self.out
    }

    fn line(&mut self, run: &Run<'_>, step: &Step<'_>, number: u64) -> String {
        let mode = run.block().mode();
        let mut text = String::new();
        self.formatter.format(&decode(step.instruction, mode.width), &mut text);
        let bytes: String = step.instruction.bytes().iter().map(|b| format!("{b:02x}")).collect();
        let mut line = format!(
            "{number:>12} {} {:016x}  {bytes:<22} {text}",
            mode.cpl,
            step.instruction.linear()
        );
        if !step.retired {
            line.push_str("  (not retired)");
        }
        for access in step.accesses() {
            let what = match access.kind {
                AccessKind::Read => "r",
                AccessKind::Write => "w",
                AccessKind::ReadWrite => "rw",
            };
            // Writing to a string does not fail.
            let _ = write!(line, "  {what}{} {:#x}", access.size_bytes, access.address);
            if let Some(physical) = access.physical {
                let _ = write!(line, " @{physical:#x}");
            }
            for value in access.values {
                let _ = write!(line, " ={value:#x}");
            }
        }
        line
    }
}

impl<W: Write> Observer for Dump<W> {
    fn begin(&mut self, position: &Position) -> Result<(), TraceError> {
        self.position = *position;
        Ok(())
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        let mut number = self.position.instruction;
        self.position.pass_run(run);
        for step in run.steps() {
            if self.left == 0 {
                break;
            }
            let line = self.line(run, &step, number);
            writeln!(self.out, "{line}").map_err(TraceError::Write)?;
            number += u64::from(step.retired);
            self.left -= u64::from(step.retired);
        }
        Ok(())
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        self.position.pass_event(event);
        if self.left == 0 {
            return Ok(());
        }
        writeln!(self.out, "{:>12} {event:x?}", "").map_err(TraceError::Write)
    }

    fn end(&mut self) -> Result<(), TraceError> {
        self.out.flush().map_err(TraceError::Write)
    }
}
