//! Which flags are undefined where the guest stands: what ran last says so, and a trace has it.
//!
//! A CPU that must know them traces for nobody: that is cheaper than to look at every instruction, and
//! nobody pays for it who replays on the CPU that recorded.

use reprise_trace::instructions::{Batch, BlockDefinition, CUT, Contents, EVENT};

use super::{BatchSink, Tracer};
use crate::cpu::Cpu;
use crate::flags::ARITHMETIC;
use crate::latitude;

/// Takes a trace and forgets it.
struct Forgotten;

impl BatchSink for Forgotten {
    fn exchange(&mut self, mut batch: Batch, _tick: u64) -> Option<Batch> {
        batch.clear();
        Some(batch)
    }
}

/// Flags as they are found, from the last instruction back.
struct Search {
    undefined: u64,
    /// Of which it is not known yet.
    open: u64,
}

impl Search {
    fn look_at(&mut self, block: &BlockDefinition, ran: usize) {
        for instruction in block.instructions[..ran.min(block.instructions.len())].iter().rev() {
            if self.open == 0 {
                return;
            }
            let instruction = latitude::decoded(&instruction.bytes, block.mode.width);
            self.undefined |= latitude::undefined_flags(&instruction) & self.open;
            let decided =
                latitude::undefined_flags(&instruction) | latitude::defined_flags(&instruction);
            self.open &= !decided;
        }
    }
}

impl Tracer {
    /// Flags that the instructions up to here left undefined. Of instructions before the trace nothing
    /// is known, so they left none.
    pub(super) fn undefined_flags(&self) -> u64 {
        let mut search = Search { undefined: 0, open: ARITHMETIC };
        let words = &self.batch.words;
        let is_cut = |word: u32| word >= CUT && word != EVENT;
        let mut ran = usize::MAX;
        let mut at = words.len();
        while at > 0 && search.open != 0 {
            at -= 1;
            if words[at] == EVENT {
                continue;
            }
            if at > 0 && is_cut(words[at - 1]) {
                // How many accesses the instruction made that did not retire.
                at -= 1;
                ran = (words[at] - CUT) as usize;
                continue;
            }
            let ran = std::mem::replace(&mut ran, usize::MAX);
            if let Some(block) = self.numbers.definition(words[at]) {
                search.look_at(block, ran);
            }
        }
        search.undefined | self.undefined_before & search.open
    }
}

impl Cpu {
    /// Has what runs from here on traced, if nobody does: for nobody.
    pub(crate) fn trace_for_flags(&mut self) {
        if self.tracer.is_none() {
            self.start_trace(Box::new(Forgotten), Contents::default());
        }
    }

    /// Bits of RFLAGS that are undefined here; none if nobody traces.
    pub(crate) fn undefined_flags(&self) -> u64 {
        self.tracer.as_ref().map_or(0, |tracer| tracer.undefined_flags())
    }
}
