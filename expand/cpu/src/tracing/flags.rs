//! Which flags are undefined where the guest stands: what ran last says so, and a trace has it.
//!
//! A CPU that must know them traces for nobody: that is cheaper than to look at every instruction, and
//! nobody pays for it who replays on the CPU that recorded.

use reprise_trace::instructions::{Batch, BlockDefinition, CUT, Contents, EVENT, is_cut};

use super::{BatchSink, Tracer};
use crate::cpu::Cpu;
use crate::flags::ARITHMETIC;
use crate::latitude;
use crate::other_maker::Counts;

/// Takes a trace and forgets it.
struct Forgotten;

impl BatchSink for Forgotten {
    fn exchange(&mut self, mut batch: Batch, _tick: u64) -> Option<Batch> {
        batch.clear();
        Some(batch)
    }
}

/// Flags as they are found, from the last instruction back.
struct Search<'a> {
    /// Of the instructions that have their count in CL.
    counts: std::iter::Rev<std::collections::vec_deque::Iter<'a, u8>>,
    undefined: u64,
    /// Of which it is not known yet.
    open: u64,
}

impl Search<'_> {
    fn look_at(&mut self, block: &BlockDefinition, ran: usize) {
        for instruction in block.instructions[..ran.min(block.instructions.len())].iter().rev() {
            if self.open == 0 {
                return;
            }
            let instruction = latitude::decoded(&instruction.bytes, block.mode.width);
            let counts = latitude::counts_in_cl(&instruction);
            let known = if counts { self.counts.next().copied() } else { Some(0) };
            let [undefined, defined] = match known {
                Some(cl) => [
                    latitude::undefined_flags_for(&instruction, cl),
                    latitude::defined_flags_for(&instruction, cl),
                ],
                None => [latitude::undefined_flags(&instruction), 0],
            };
            self.undefined |= undefined & self.open;
            self.open &= !(undefined | defined);
        }
    }
}

impl Tracer {
    /// Flags that the instructions up to here left undefined, of which those with their count in CL had
    /// `counts` last.
    pub(super) fn undefined_flags(&self, counts: &Counts) -> u64 {
        let mut search = Search { counts: counts.last_first(), undefined: 0, open: ARITHMETIC };
        let words = &self.batch.words;
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

    /// Bits of RFLAGS that are undefined here; none if nobody has traced.
    pub(crate) fn undefined_flags(&self) -> u64 {
        let counts = &self.other_maker.counts;
        self.tracer.as_ref().map_or(self.undefined_before, |tracer| tracer.undefined_flags(counts))
    }
}
