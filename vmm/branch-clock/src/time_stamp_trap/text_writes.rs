//! What the guest writes to its kernel's text.

use std::collections::BTreeMap;
use std::ops::Range;

use iced_x86::{Decoder, DecoderOptions};
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
/// Decoding that begins at any byte has come to an instruction's boundary after so many, nearly always...
const BYTES_TO_BOUNDARY: u64 = 64;
/// ...and it is begun at so many, of which at least half must come to the same.
const BEGINNINGS: u64 = 16;

impl<V: Vcpu> TimeStampTrap<V> {
    /// The guest wrote to its text.
    pub(super) fn written(&mut self, ranges: &[Range<u64>]) -> Result<(), EngineError> {
        for range in ranges {
            self.counts.writes += 1;
            let overlapped: Vec<u64> = self.planted.overlapping(range).collect();
            for address in overlapped {
                if !self.planted.is_whole(&self.vcpu, address) {
                    self.planted.remove(&mut self.vcpu, address, ranges);
                    self.unforeseen.remove(&address);
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
        if !unforeseeable {
            self.plant_unforeseen(range);
        }
    }

    /// Sets breakpoints at what the text, as it now stands, has around a write and nobody foresaw. A patch
    /// may come in any number of writes, so what the last one made of the bytes before and behind it counts,
    /// and what seemed to be an instruction amid a patch may be none at its end.
    fn plant_unforeseen(&mut self, range: &Range<u64>) {
        let most = MAX_BYTES as u64 - 1;
        let near = range.start.saturating_sub(most)..range.end.saturating_add(most);
        let found = self.instructions_near(&near);
        let before: Vec<u64> = self.unforeseen.range(near).copied().collect();
        for address in before {
            if !found.iter().any(|candidate| candidate.physical == address) {
                self.unforeseen.remove(&address);
                self.planted.remove(&mut self.vcpu, address, &[]);
            }
        }
        for candidate in found {
            let Candidate { physical, bytes, .. } = candidate;
            let place = physical..physical + u64::from(bytes);
            if self.planted.overlapping(&place).next().is_none() && self.plant(candidate) {
                self.unforeseen.insert(physical);
                self.counts.unforeseen += 1;
            }
        }
    }

    /// What has to be trapped among the instructions that begin within `near`, by the guest's own bytes.
    /// The text has no boundaries that are known here but its start, so decoding begins well before, at
    /// several places.
    fn instructions_near(&self, near: &Range<u64>) -> Vec<Candidate> {
        let text = self.placed.as_ref().and_then(|placed| {
            let touches = |text: &&PlacedText| {
                text.range.start < near.end && near.start < text.range.end && !text.is_initial()
            };
            placed.text.iter().find(touches)
        });
        let Some(text) = text else { return Vec::new() };
        let start = near.start.saturating_sub(BYTES_TO_BOUNDARY).max(text.range.start);
        let end = near.end.saturating_add(MAX_BYTES as u64).min(text.range.end);
        let mut code = vec![0; (end - start) as usize];
        self.vcpu.ram().read(start, &mut code);
        self.hide(start, &mut code);
        let looks_like_one = |bytes: &[u8]| matches!(bytes, [0x0f, 0x31 | 0x20 | 0x22]);
        if !code.windows(2).any(looks_like_one) {
            return Vec::new();
        }
        let beginnings = if start == text.range.start { 1 } else { BEGINNINGS };
        let mut votes: BTreeMap<u64, (Candidate, u64)> = BTreeMap::new();
        for beginning in 0..beginnings as usize {
            let mut decoder = Decoder::new(64, &code, DecoderOptions::NONE);
            if decoder.set_position(beginning).is_err() {
                break;
            }
            while decoder.can_decode() {
                let offset = decoder.position();
                let decoded = decoder.decode();
                if decoded.is_invalid() && decoder.set_position(offset + 1).is_err() {
                    break;
                }
                let physical = start + offset as u64;
                let Some(instruction) = Instruction::of(&decoded) else { continue };
                if is_trapped(instruction) && near.contains(&physical) {
                    let bytes = decoded.len() as u8;
                    let candidate =
                        Candidate { physical, bytes, instruction, patched: true, read: false };
                    votes.entry(physical).or_insert((candidate, 0)).1 += 1;
                }
            }
        }
        let enough = |(_, votes): &&(Candidate, u64)| 2 * votes >= beginnings;
        votes.values().filter(enough).map(|(candidate, _)| *candidate).collect()
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
