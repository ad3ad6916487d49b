//! Counts what goes by: for an expansion whose trace nobody wants to keep.

use reprise_trace::instructions::{Event, Observer, Run, TraceError};

/// An observer that counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counting {
    /// Instructions that retired.
    pub instructions: u64,
    /// Runs of blocks.
    pub runs: u64,
    /// Accesses of instructions to memory.
    pub accesses: u64,
    /// Events.
    pub events: u64,
}

impl Observer for Counting {
    #[inline]
    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        self.instructions += run.retired() as u64;
        self.runs += 1;
        self.accesses += run.addresses().len() as u64;
        Ok(())
    }

    fn event(&mut self, _event: &Event) -> Result<(), TraceError> {
        self.events += 1;
        Ok(())
    }
}
