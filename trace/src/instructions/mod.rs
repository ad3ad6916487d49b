//! The instruction trace: every instruction of an execution, with what it accessed.
//!
//! `batch.rs` is the contract for whoever produces a trace; [`Feed`] shows batches to an [`Observer`],
//! and so does [`TraceReader`] with what a file holds. [`TraceWriter`] is an observer that writes the
//! native format. [`filter`] has observers that leave something out and hand on the rest.
//!
//! A trace file is a header and then segments of some millions of instructions that decode by
//! themselves. In a segment each kind of thing is a column of its own; a column holds only what its
//! writer and reader did not both expect. `FORMAT.md` beside this crate describes the bytes.

mod ahead;
mod batch;
mod block;
mod columns;
mod concat;
mod decode;
mod dictionary;
mod encode;
mod event;
mod feed;
pub mod filter;
mod frames;
mod head;
mod idle;
mod page_walk;
mod predict;
mod reader;
pub mod register;
mod run;
mod segment_writer;
mod streams;
mod time;
mod writer;

use std::io;

use serde::{Deserialize, Serialize};

pub use batch::{Batch, CUT, Definition, EVENT, MAX_BLOCKS, MAX_RUN_ACCESSES, is_cut};
pub use block::{
    AccessKind, BlockDefinition, BlockEnd, BlockRef, Blocks, CodeWidth, InstructionDefinition,
    InstructionRef, MAX_ACCESS_BYTES, MAX_BLOCK_ACCESSES, MAX_BLOCK_INSTRUCTIONS,
    MAX_INSTRUCTION_BYTES, MAX_REGISTER_WRITES, MAX_STATIC_ACCESSES, Mode, NO_BASE, NOWHERE_PAGE,
    RegisterWrite, StaticAccess,
};
pub use concat::{Concat, joined_header};
pub use event::{Delivery, Direction, Event, Marker, SystemAccessKind};
pub use feed::Feed;
pub use frames::{FORMAT_VERSION, Share, Totals, TraceHeader};
pub use head::{SegmentHead, SegmentOptions};
pub use page_walk::{MAX_WALK_ENTRIES, PageWalk, WalkCause, WalkEntry};
pub use reader::{Ending, Outline, TraceIndex, TraceReader};
pub use run::{Access, Observer, PlainRuns, Position, Run, Step, Steps};
pub use segment_writer::{EncodedSegment, SegmentWriter};
pub use time::{TimePlace, TimeSearch};
pub use writer::TraceWriter;

/// What a trace has beside instructions and the linear addresses of their accesses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contents {
    /// Guest-physical addresses of accesses.
    pub physical: bool,
    /// Values of accesses.
    pub values: bool,
    /// Values written to registers.
    pub registers: bool,
    /// Page walks, as events.
    pub page_walks: bool,
}

impl Contents {
    /// Whether there are addresses alone.
    pub(crate) fn is_plain(self) -> bool {
        !self.values && !self.registers
    }
}

/// Why a trace cannot be written, read or shown.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// Reading failed.
    #[error("the trace cannot be read: {0}")]
    Read(io::Error),
    /// Writing failed.
    #[error("the trace cannot be written: {0}")]
    Write(io::Error),
    /// A block that no CPU could run.
    #[error("the trace's producer defined a block that cannot be: {0}; report this")]
    Definition(&'static str),
    /// A batch that does not keep the contract.
    #[error("the trace's producer broke its contract: {0}; report this")]
    Contract(&'static str),
    /// More blocks, or larger ones, than numbers reach.
    #[error("the trace has too many blocks at once; report this")]
    TooManyBlocks,
    /// Nothing in it.
    #[error("the file is empty: expand the recording again")]
    Empty,
    /// Some other file.
    #[error("the file is no Reprise trace: give one that `reprise expand` wrote")]
    Foreign,
    /// Another version of the format.
    #[error(
        "the trace has format version {found}, and this Reprise reads {} to {}: use the Reprise that wrote it",
        frames::OLDEST_VERSION,
        frames::FORMAT_VERSION
    )]
    Version {
        /// The version in the file.
        found: u32,
    },
    /// The header is not whole, or not one.
    #[error("the trace's header is damaged or cut off: expand the recording again")]
    Header,
    /// More than a header or an end may hold.
    #[error("the trace's header or its notes are larger than a trace may have: shorten them")]
    TooLarge,
    /// Damage behind the header. What was read before is sound.
    #[error("the trace is damaged at byte {offset}: {what}; take another copy, or expand again")]
    Damaged {
        /// The file offset of the frame that is damaged.
        offset: u64,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A moment that is not in it.
    #[error(
        "the trace holds the instructions {first} to {end} and not {asked}: ask for one of those"
    )]
    NoSuchInstruction {
        /// What was asked for.
        asked: u64,
        /// The first that it holds.
        first: u64,
        /// The one behind the last.
        end: u64,
    },
    /// Segments that do not go together.
    #[error("these traces do not go together: {0}")]
    Mismatch(String),
}
