//! Where decoded blocks are found again: by guest-physical address, and quickly by linear address.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ptr::NonNull;

use super::op::Op;
use crate::memory::physical::{PAGE_BYTES, chunk_mask};
use crate::mode::Mode;

/// Entries of the address cache; a power of two.
const ADDRESS_ENTRIES: usize = 1 << 14;
/// Blocks kept before the cache is emptied.
const MAX_BLOCKS: usize = 1 << 18;

/// A run of instructions within one page, entered only at its start.
#[derive(Debug)]
pub(crate) struct Block {
    pub(crate) ops: Box<[Op]>,
    /// Bytes from the first instruction to past the last.
    pub(crate) size_bytes: u16,
    /// The last operation sets RIP itself.
    pub(crate) ends_in_branch: bool,
    /// The bytes straddle two pages: valid for this run only, never cached.
    pub(crate) transient: bool,
}

#[derive(Clone)]
struct AddressEntry {
    linear: u64,
    mode: Mode,
    generation: u32,
    block: Option<NonNull<Block>>,
}

#[derive(Default)]
struct PageBlocks {
    blocks: HashMap<(u16, Mode), Box<Block>>,
}

/// All decoded blocks.
pub(crate) struct BlockCache {
    pages: HashMap<u64, PageBlocks>,
    addresses: Box<[AddressEntry]>,
    generation: u32,
    block_count: usize,
    /// The last block that straddled two pages.
    transient: Option<Box<Block>>,
}

impl std::fmt::Debug for BlockCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlockCache").field("block_count", &self.block_count).finish_non_exhaustive()
    }
}

// SAFETY: the pointers in `addresses` lead to boxes that `pages` owns; an entry is only followed while
// its generation is current, and every removal of a block starts a new generation. All of it moves
// between threads together.
unsafe impl Send for BlockCache {}

fn slot(linear: u64) -> usize {
    (linear ^ linear >> 12) as usize % ADDRESS_ENTRIES
}

impl BlockCache {
    pub(crate) fn new() -> Self {
        let empty = AddressEntry { linear: 0, mode: Mode(0), generation: 0, block: None };
        Self {
            pages: HashMap::new(),
            addresses: vec![empty; ADDRESS_ENTRIES].into_boxed_slice(),
            generation: 1,
            block_count: 0,
            transient: None,
        }
    }

    /// The block at a linear address, if it was found there since translations last changed.
    #[inline(always)]
    pub(crate) fn by_address(&self, linear: u64, mode: Mode) -> Option<NonNull<Block>> {
        let entry = &self.addresses[slot(linear)];
        if entry.linear == linear && entry.mode == mode && entry.generation == self.generation {
            entry.block
        } else {
            None
        }
    }

    /// Remembers that `linear` leads to `block`.
    pub(crate) fn remember_address(&mut self, linear: u64, mode: Mode, block: NonNull<Block>) {
        self.addresses[slot(linear)] =
            AddressEntry { linear, mode, generation: self.generation, block: Some(block.clone()) };
    }

    /// The block at a guest-physical address.
    pub(crate) fn by_physical(&self, address: u64, mode: Mode) -> Option<NonNull<Block>> {
        let offset = (address % PAGE_BYTES) as u16;
        let block = self.pages.get(&(address / PAGE_BYTES))?.blocks.get(&(offset, mode))?;
        Some(NonNull::from(&**block))
    }

    /// Keeps a block; where it lives.
    pub(crate) fn insert(&mut self, address: u64, mode: Mode, block: Box<Block>) -> NonNull<Block> {
        let place = NonNull::from(&*block);
        let offset = (address % PAGE_BYTES) as u16;
        let page = self.pages.entry(address / PAGE_BYTES).or_default();
        page.blocks.insert((offset, mode), block);
        self.block_count += 1;
        place
    }

    /// Keeps a block that runs once; where it lives until the next of its kind.
    pub(crate) fn keep_transient(&mut self, block: Box<Block>) -> NonNull<Block> {
        NonNull::from(&**self.transient.insert(block))
    }

    /// Whether so many blocks are kept that it is time to start afresh.
    pub(crate) fn is_full(&self) -> bool {
        self.block_count >= MAX_BLOCKS
    }

    /// Drops every block; the pages that held one.
    pub(crate) fn clear(&mut self) -> Vec<u64> {
        self.forget_addresses();
        self.block_count = 0;
        self.pages.drain().map(|(page, _)| page * PAGE_BYTES).collect()
    }

    /// Drops the blocks of a page that overlap `chunks`; the chunks that still hold code.
    pub(crate) fn invalidate(&mut self, page: u64, chunks: u64) -> u64 {
        let Some(held) = self.pages.get_mut(&(page / PAGE_BYTES)) else { return 0 };
        let before = held.blocks.len();
        let mut left = 0;
        held.blocks.retain(|&(offset, _), block| {
            let covers = chunk_mask(u64::from(offset), u64::from(block.size_bytes));
            let keep = covers & chunks == 0;
            if keep {
                left |= covers;
            }
            keep
        });
        self.block_count -= before - held.blocks.len();
        if held.blocks.is_empty() {
            self.pages.remove(&(page / PAGE_BYTES));
        }
        self.forget_addresses();
        left
    }

    /// Forgets what lies at which linear address: a translation changed.
    pub(crate) fn forget_addresses(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        if self.generation == 0 {
            for entry in &mut self.addresses {
                entry.block = None;
            }
            self.generation = 1;
        }
    }
}
