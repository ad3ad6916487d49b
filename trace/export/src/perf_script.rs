//! Text as `perf script` prints it, a sample for each instruction, for whatever reads that: a quick
//! look, or the scripts that make flame graphs. It has no symbols.

use std::io::Write;

use reprise_trace::instructions::{Event, Observer, Position, Run, TraceError};

/// Writes the text.
#[derive(Debug)]
pub struct PerfScript<W> {
    out: W,
    cpu: u32,
    position: Position,
}

impl<W: Write> PerfScript<W> {
    /// Writes to `out`, line by line: a buffer around it helps. The samples are shown as taken on the
    /// CPU of this number.
    pub fn new(out: W, cpu: u32) -> Self {
        Self { out, cpu, position: Position::default() }
    }

    /// Where it was written.
    pub fn into_inner(self) -> W {
        self.out
    }
}

impl<W: Write> Observer for PerfScript<W> {
    fn begin(&mut self, position: &Position) -> Result<(), TraceError> {
        self.position = *position;
        Ok(())
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        let object = if run.block().mode().cpl == 3 { "[guest.user]" } else { "[guest.kernel]" };
        // Address spaces stand for processes, whose numbers the trace does not know.
        let process = self.position.cr3 >> 12 & 0x7fff_ffff;
        let cpu = self.cpu;
        // A moment of its own for each instruction: markers tell only some of them.
        for (time_ns, step) in
            (self.position.virtual_ns()..).zip(run.steps().filter(|step| step.retired))
        {
            let linear = step.instruction.linear();
            let (seconds, rest) = (time_ns / 1_000_000_000, time_ns % 1_000_000_000);
            writeln!(
                self.out,
                "guest {process} [{cpu:03}] {seconds}.{rest:09}: 1 instructions: {linear:16x} [unknown] ({object})"
            )
            .map_err(TraceError::Write)?;
        }
        self.position.pass_run(run);
        Ok(())
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        self.position.pass_event(event);
        Ok(())
    }

    fn end(&mut self) -> Result<(), TraceError> {
        self.out.flush().map_err(TraceError::Write)
    }
}
