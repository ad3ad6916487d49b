//! What the guest writes to its kernel's text.

use std::ops::Range;

use reprise_machine::engine::EngineError;
use reprise_time_stamp_sites::Instruction;

use super::TimeStampTrap;
use crate::candidates::{Candidate, is_trapped};
use crate::guest_code::MAX_BYTES;
use crate::placed_kernel::{PAGE_BYTES, PlacedText};
use crate::vcpu::Vcpu;

/// After so many writes to a page of text that the kernel gives up once it has started, it is looked whether
/// it has.
const WRITES_BETWEEN_LOOKS: u32 = 32;
/// No single patch of text is larger.
const MAX_PATCH_BYTES: u64 = 64;

impl<V: Vcpu> TimeStampTrap<V> {
    /// The guest wrote to its text.
    pub(super) fn written(&mut self, ranges: &[Range<u64>]) -> Result<(), EngineError> {
        for range in ranges {
            self.counts.writes += 1;
            let overlapped: Vec<u64> = self.planted.overlapping(range).collect();
            for address in overlapped {
                if !self.planted.is_whole(&self.vcpu, address) {
                    self.planted.remove(&mut self.vcpu, address, ranges);
                }
            }
            if self.is_given_up(range, ranges)? {
                continue;
            }
            let Some(placed) = &self.placed else { continue };
            if self.applied {
                self.plant_written(range);
            } else if placed.applies_alternatives(self.vcpu.ram(), range) {
                self.after_alternatives();
            }
        }
        Ok(())
    }

    /// Sees whether a page of text that the kernel gives up is text still; from then on it is not watched any
    /// more.
    fn is_given_up(
        &mut self,
        range: &Range<u64>,
        ranges: &[Range<u64>],
    ) -> Result<bool, EngineError> {
        let Some(placed) = &self.placed else { return Ok(false) };
        if !placed.text_at(range.start).is_some_and(PlacedText::is_initial) {
            return Ok(false);
        }
        let page = range.start & !(PAGE_BYTES - 1);
        let writes = self.page_writes.entry(page).or_default();
        *writes += 1;
        let due = range.end - range.start > MAX_PATCH_BYTES
            || writes.is_multiple_of(WRITES_BETWEEN_LOOKS);
        if !due || !placed.is_given_up(self.vcpu.ram(), range.start) {
            return Ok(false);
        }
        self.vcpu.watch_writes(page..page + 1, false)?;
        let left: Vec<u64> = self.planted.overlapping(&(page..page + PAGE_BYTES)).collect();
        for address in left.into_iter().filter(|address| *address >= page) {
            self.planted.remove(&mut self.vcpu, address, ranges);
        }
        Ok(true)
    }

    /// Sets breakpoints at what a write to text has brought.
    fn plant_written(&mut self, range: &Range<u64>) {
        let from = range.start.saturating_sub(MAX_BYTES as u64);
        let Some(placed) = &self.placed else { return };
        let unforeseeable = placed.text_at(range.start).is_some_and(PlacedText::is_initial);
        let candidates = &placed.candidates;
        let first = candidates.partition_point(|candidate| candidate.physical < from);
        let near: Vec<Candidate> = candidates[first..]
            .iter()
            .take_while(|candidate| candidate.physical < range.end)
            .copied()
            .collect();
        for candidate in near {
            self.counts.patched += u64::from(self.plant(candidate));
        }
        if unforeseeable {
            return;
        }
        // A patch begins with an instruction.
        let length = (range.end - range.start).min(MAX_PATCH_BYTES) as usize;
        let mut bytes = vec![0; length];
        self.vcpu.ram().read(range.start, &mut bytes);
        for (offset, bytes, instruction) in Instruction::all_in(&bytes) {
            let physical = range.start + offset as u64;
            let candidate = Candidate { physical, bytes, instruction, patched: true, read: false };
            if is_trapped(instruction) && self.plant(candidate) {
                self.counts.unforeseen += 1;
            }
        }
    }

    /// The guest has applied its alternatives: sets the breakpoints that had to wait for that.
    fn after_alternatives(&mut self) {
        self.applied = true;
        self.counts.open = 0;
        let candidates = self.placed.iter().flat_map(|placed| &placed.candidates);
        let waited: Vec<Candidate> =
            candidates.filter(|candidate| candidate.read).copied().collect();
        for candidate in waited {
            if self.plant(candidate) {
                self.counts.patched += u64::from(candidate.patched);
            }
        }
    }
}
