//! What stands before the columns of a segment, and how a writer is told to make them.

use super::event::Marker;
use super::run::Position;
use crate::varint::{TakeError, Taker, put};

/// The most instructions, runs and accesses of one segment: what a reader is ready to decode.
pub(super) const MAX_SEGMENT_ITEMS: u64 = 1 << 28;
/// The most blocks of one segment.
pub(super) const MAX_SEGMENT_BLOCKS: usize = 1 << 18;
/// The most instructions, and accesses with register writes, in a segment's definitions.
pub(super) const MAX_SEGMENT_DEFINITIONS: usize = 1 << 22;
/// The most words of values that a run brings.
pub(super) const MAX_RUN_VALUES: usize = 1 << 20;
/// Marks: the byte of a cut. The others are events.
pub(super) const CUT_TAG: u8 = 0;

/// How a segment is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentOptions {
    /// Instructions after which a segment ends; from 1 to 2^27. Longer segments are shorter on disk
    /// and take longer to read from the middle.
    pub instructions: u64,
    /// zstd's level, from 1 to 19.
    pub level: i32,
}

impl Default for SegmentOptions {
    /// 32 Mi instructions, zstd level 1.
    fn default() -> Self {
        Self { instructions: 1 << 25, level: 1 }
    }
}

/// What stands before a segment's columns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SegmentHead {
    /// Where it begins.
    pub start: Position,
    /// Instructions that retire in it.
    pub instructions: u64,
    /// Instructions left out in it.
    pub skipped: u64,
    /// Runs in it.
    pub runs: u64,
    /// Accesses of those runs.
    pub accesses: u64,
    /// Different blocks that run in it.
    pub blocks: u64,
}

impl SegmentHead {
    pub(crate) fn put(&self, out: &mut Vec<u8>) {
        let Position { instruction, cr3, marker, marker_instruction } = self.start;
        let numbers = [
            [instruction, cr3, marker.tick, marker.virtual_ns, marker_instruction],
            [self.instructions, self.skipped, self.runs, self.accesses, self.blocks],
        ];
        numbers.as_flattened().iter().for_each(|number| put(out, *number));
    }

    pub(crate) fn take(taker: &mut Taker<'_>) -> Result<Self, Fault> {
        let mut numbers = [0; 10];
        for number in &mut numbers {
            *number = taker.varint()?;
        }
        let [instruction, cr3, tick, virtual_ns, marker_instruction, rest @ ..] = numbers;
        let [instructions, skipped, runs, accesses, blocks] = rest;
        let marker = Marker { tick, virtual_ns };
        let start = Position { instruction, cr3, marker, marker_instruction };
        let most = instructions.max(runs).max(accesses);
        let ends = instruction.checked_add(instructions).and_then(|end| end.checked_add(skipped));
        if most > MAX_SEGMENT_ITEMS || blocks > MAX_SEGMENT_BLOCKS as u64 || ends.is_none() {
            return Err(Fault("its head has numbers that no segment has"));
        }
        Ok(Self { start, instructions, skipped, runs, accesses, blocks })
    }

    /// The instruction number behind it.
    pub fn end(&self) -> u64 {
        self.start.instruction.saturating_add(self.instructions).saturating_add(self.skipped)
    }
}

/// What is wrong with a segment whose checksum is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault(pub(crate) &'static str);

impl From<TakeError> for Fault {
    fn from(_: TakeError) -> Self {
        Self("a column ends too early, or holds no number where one is due")
    }
}
