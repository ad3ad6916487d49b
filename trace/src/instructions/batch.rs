//! The contract between a CPU that produces a trace and everything that consumes one.
//!
//! A producer appends to the plain vectors of a [`Batch`], which generated code can do with a few
//! stores a block, and hands the batch over when it is full. Encoding happens elsewhere.
//!
//! **Blocks.** A block is defined once, in [`Batch::definitions`], with the next number from 0, at
//! the latest in the batch in which it first runs. One number stands for one piece of code at one
//! linear address in one [`super::Mode`]: the same code elsewhere is another block, and code that
//! was written over is another block. A producer that empties its code cache may start again at 0
//! with [`Batch::restart`]. CR3 is no part of a definition, because the kernel's blocks are the same
//! in every address space: [`super::Event::AddressSpace`] says when it changes.
//!
//! **Runs.** [`Batch::words`] says what happened, in order. A word below [`MAX_BLOCKS`] is the number
//! of a block that ran: all of its instructions retired. If only the first `n` did, because of a
//! fault, an interrupt, a stop, or a write to the block itself, the word `CUT | n` stands right behind
//! it, and behind that a word that says how many accesses the instruction that did not retire had
//! made: a REP that an interrupt suspends. The rest of a REP is a new run of a block that begins with
//! it, and there it retires, once. [`Batch::cut_last_run`] does this after the fact.
//!
//! **Accesses.** [`Batch::addresses`] has the linear address of each access of each retired
//! instruction, in the order of the definitions, then those of the one that did not retire. For a
//! repeated instruction that retired, [`Batch::counts`] says how often its whole list of accesses was
//! made. At most [`MAX_RUN_ACCESSES`] belong to one run: a longer REP is cut in pieces. If
//! [`super::Contents`] says so, [`Batch::physical`] runs in parallel with the addresses (same place
//! in the page; [`super::NOWHERE_PAGE`] for what leads nowhere), [`Batch::values`] has each access's value in little-endian eight-byte words
//! ([`super::StaticAccess::value_words`]), and [`Batch::registers`] has the values that each retired
//! instruction wrote to registers. Otherwise they are empty.
//!
//! **Events.** The word [`EVENT`] stands for the next of [`Batch::events`]. What happens within a block
//! (port I/O, page walks) stands behind the block's word; a delivery stands behind the run that it
//! ended, whose cut it follows.

use super::block::BlockDefinition;
use super::event::Event;

/// Block numbers are below this.
pub const MAX_BLOCKS: u32 = 1 << 31;
/// The top bit of a word: only so many instructions of the run before it retired.
pub const CUT: u32 = 1 << 31;
/// A word that stands for the next event.
pub const EVENT: u32 = u32::MAX;
/// The most accesses of one run.
pub const MAX_RUN_ACCESSES: usize = 1 << 16;

/// A block's definition and the number by which runs name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Definition {
    /// The next number.
    pub id: u32,
    /// The block.
    pub block: BlockDefinition,
}

/// A piece of a trace as a producer makes it: see the module's first lines.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Block numbers start again at 0 with this batch: all blocks defined before it are forgotten.
    pub restart: bool,
    /// Blocks that are new in this batch. They are known from its first word on.
    pub definitions: Vec<Definition>,
    /// Runs, cuts and events in order.
    pub words: Vec<u32>,
    /// Linear addresses of accesses.
    pub addresses: Vec<u64>,
    /// How often repeated instructions made their accesses.
    pub counts: Vec<u32>,
    /// Guest-physical addresses of the accesses, or nothing.
    pub physical: Vec<u64>,
    /// Values read and written, or nothing.
    pub values: Vec<u64>,
    /// Values of registers written, or nothing.
    pub registers: Vec<u64>,
    /// What happened between and within runs.
    pub events: Vec<Event>,
}

impl Batch {
    /// An empty batch with room for this many words and addresses.
    pub fn with_capacity(words: usize, addresses: usize) -> Self {
        Self {
            words: Vec::with_capacity(words),
            addresses: Vec::with_capacity(addresses),
            ..Self::default()
        }
    }

    /// Empties it and keeps its memory.
    pub fn clear(&mut self) {
        self.restart = false;
        self.definitions.clear();
        self.words.clear();
        self.addresses.clear();
        self.counts.clear();
        self.physical.clear();
        self.values.clear();
        self.registers.clear();
        self.events.clear();
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.words.is_empty() && self.definitions.is_empty() && !self.restart
    }

    /// Appends an event.
    pub fn push_event(&mut self, event: Event) {
        self.words.push(EVENT);
        self.events.push(event);
    }

    /// Cuts the last run: only `retired` of its instructions retired, and the one behind them made
    /// `unretired_accesses` accesses. Addresses, counts and values must already be as the cut run
    /// has them. Gives false if the batch has no run, or the last one is already cut.
    pub fn cut_last_run(&mut self, retired: u32, unretired_accesses: u32) -> bool {
        // Behind the last run stand at most the few events that happened within it.
        let run = self.words.iter().rposition(|word| *word != EVENT);
        let Some(run) = run else { return false };
        let is_cut = run > 0 && is_cut(self.words[run - 1]);
        if self.words[run] >= MAX_BLOCKS || is_cut {
            return false;
        }
        let cut = [CUT | retired, unretired_accesses];
        self.words.splice(run + 1..run + 1, cut);
        true
    }
}

/// Whether a word says that the run before it was cut.
#[inline(always)]
pub fn is_cut(word: u32) -> bool {
    word.wrapping_sub(CUT) < EVENT - CUT
}
