//! Where decoded blocks are found again: by guest-physical address, by linear address while
//! translations stay, and from the block that ran before.
#![allow(unsafe_code)]

use std::cell::{Cell, OnceCell};
use std::collections::HashMap;
use std::ptr::NonNull;

use super::op::Op;
use crate::integer_hash::IntegerHash;
use crate::memory::physical::{PAGE_BYTES, chunk_mask};
use crate::mode::Mode;
use crate::tracing::{BlockTrace, TraceId};
use crate::translate::site::Exit;

/// Entries of the address cache; a power of two.
const ADDRESS_ENTRIES: usize = 1 << 14;
/// Blocks kept before the cache is emptied.
const MAX_BLOCKS: usize = 1 << 18;

/// A run of instructions within one page, or one instruction that straddles two, entered only at its
/// start.
#[derive(Debug)]
pub(crate) struct Block {
    pub(crate) ops: Box<[Op]>,
    /// Bytes from the first instruction to past the last.
    pub(crate) size_bytes: u16,
    /// The last operation sets RIP itself.
    pub(crate) ends_in_branch: bool,
    /// The guest-physical page of the bytes behind the first page's end.
    pub(crate) second_page: Option<u64>,
    /// The guest-physical address of its first byte; `None` if it is decoded anew each time.
    pub(crate) physical: Option<u64>,
    /// Where it led last: to the next address, and elsewhere.
    links: [Cell<Link>; 2],
    /// In which halves of the address space it has been found.
    found_in: [Cell<bool>; 2],
    /// How often it has run without being translated.
    pub(crate) runs: Cell<u32>,
    /// Its translations, the newest first.
    translations: [Cell<Translated>; 2],
    /// What a trace knows of it, once it has run in one, and the numbers it has there.
    pub(crate) trace: OnceCell<Box<BlockTrace>>,
    pub(crate) trace_ids: [Cell<TraceId>; 2],
}

/// A block's code for one linear address and mode.
#[derive(Clone, Copy, Debug)]
struct Translated {
    linear: u64,
    mode: Mode,
    /// The cache's [`BlockCache::code_epoch`] that it belongs to.
    epoch: u32,
    code: *const u8,
}

const NO_TRANSLATION: Translated =
    Translated { linear: 0, mode: Mode(0), epoch: 0, code: std::ptr::null() };

/// A block at a linear address, as long as the cache's key stays.
#[derive(Clone, Copy, Debug)]
struct Link {
    linear: u64,
    key: u64,
    block: Option<NonNull<Block>>,
}

const NO_LINK: Link = Link { linear: 0, key: 0, block: None };

impl Block {
    pub(crate) fn new(ops: Vec<Op>, size_bytes: u16, ends_in_branch: bool) -> Self {
        Self {
            ops: ops.into_boxed_slice(),
            size_bytes,
            ends_in_branch,
            second_page: None,
            physical: None,
            links: [const { Cell::new(NO_LINK) }; 2],
            found_in: Default::default(),
            runs: Cell::new(0),
            translations: [const { Cell::new(NO_TRANSLATION) }; 2],
            trace: OnceCell::new(),
            trace_ids: Default::default(),
        }
    }

    /// The block's code at `linear` in `mode`, if it has been translated.
    #[inline(always)]
    pub(crate) fn translation(&self, linear: u64, mode: Mode, epoch: u32) -> Option<*const u8> {
        let fits =
            |held: Translated| held.linear == linear && held.mode == mode && held.epoch == epoch;
        self.translations.iter().map(Cell::get).find(|held| fits(*held)).map(|held| held.code)
    }

    /// Remembers the block's code; the older translation goes. Another address or mode must become
    /// worth its code by itself, lest three that take turns fill the code buffer.
    pub(crate) fn set_translation(&self, linear: u64, mode: Mode, epoch: u32, code: *const u8) {
        self.runs.set(0);
        self.translations[1].set(self.translations[0].get());
        self.translations[0].set(Translated { linear, mode, epoch, code });
    }

    /// Adds the halves of the address space in which it has been found.
    fn add_halves(&self, halves: &mut [bool; 2]) {
        for (found, half) in self.found_in.iter().zip(halves) {
            *half |= found.get();
        }
    }

    fn forget_translations(&self) {
        self.runs.set(0);
        self.translations.iter().for_each(|held| held.set(NO_TRANSLATION));
    }

    /// The block at `linear` that ran after this one before, if `key` is still the same.
    #[inline(always)]
    pub(crate) fn linked(&self, linear: u64, key: u64) -> Option<NonNull<Block>> {
        for link in &self.links {
            let link = link.get();
            if link.linear == linear && link.key == key {
                return link.block;
            }
        }
        None
    }

    /// Remembers that `block`, at `linear`, ran after this one; the older link goes.
    pub(crate) fn link(&self, linear: u64, key: u64, block: NonNull<Block>) {
        self.links[1].set(self.links[0].get());
        self.links[0].set(Link { linear, key, block: Some(block) });
    }
}

/// A block's place: its offset in the page, and the mode it was decoded in.
type Place = (u16, Mode);

#[derive(Default)]
struct PageBlocks {
    blocks: HashMap<Place, Box<Block>, IntegerHash>,
    /// Blocks of other pages whose last bytes lie at this page's start.
    reaching_in: Vec<(u64, Mode)>,
    /// Exits of this page's translated blocks, and the [`BlockCache::code_epoch`] that they belong to: in
    /// a later one they are no more.
    exits: Vec<NonNull<Exit>>,
    exits_epoch: u32,
}

impl PageBlocks {
    /// Forgets exits that are no more.
    fn drop_stale_exits(&mut self, epoch: u32) {
        if self.exits_epoch != epoch {
            self.exits.clear();
            self.exits_epoch = epoch;
        }
    }

    /// Sees that no translation of this page's code is entered again.
    fn forget_translations(&mut self, epoch: u32) {
        self.drop_stale_exits(epoch);
        for mut exit in self.exits.drain(..) {
            // SAFETY: exits live until the translator is cleared, before which
            // `BlockCache::forget_translations` begins another epoch, and nobody else holds a reference.
            unsafe { exit.as_mut() }.unlink();
        }
        self.blocks.values().for_each(|block| block.forget_translations());
    }
}

/// All decoded blocks.
pub(crate) struct BlockCache {
    pages: HashMap<u64, PageBlocks, IntegerHash>,
    addresses: Box<[Link]>,
    /// Counts what made linear addresses lead elsewhere, for the lower and the upper half apart: a
    /// kernel's global pages stay where they are when address spaces change.
    generations: [u64; 2],
    /// Counts removals of blocks.
    epoch: u64,
    /// Counts how often all translations were forgotten, from 1 on.
    code_epoch: u32,
    block_count: usize,
    /// The last block decoded from where there is no RAM.
    transient: Option<Box<Block>>,
}

impl std::fmt::Debug for BlockCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlockCache").field("block_count", &self.block_count).finish_non_exhaustive()
    }
}

// SAFETY: the pointers in `addresses` and in links lead to boxes that `pages` owns; one is only followed
// while its key's generation is current, and every removal of a block starts new generations. All of it
// moves between threads together.
unsafe impl Send for BlockCache {}

fn slot(linear: u64) -> usize {
    (linear ^ linear >> 14) as usize % ADDRESS_ENTRIES
}

/// Which half of the address space an address lies in: 1 for the upper one.
#[inline(always)]
fn half(linear: u64) -> usize {
    (linear >> 63) as usize
}

impl BlockCache {
    pub(crate) fn new() -> Self {
        Self {
            pages: HashMap::default(),
            addresses: vec![NO_LINK; ADDRESS_ENTRIES].into_boxed_slice(),
            generations: [1; 2],
            epoch: 0,
            code_epoch: 1,
            block_count: 0,
            transient: None,
        }
    }

    /// What must be the same for a linear address to lead to the same block.
    #[inline(always)]
    pub(crate) fn key(&self, linear: u64, mode: Mode) -> u64 {
        self.generations[half(linear)] << Mode::BITS | u64::from(mode.0)
    }

    /// A pointer to a block is valid while this stays the same.
    #[inline(always)]
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The block at a linear address, if it was found there since translations last changed.
    #[inline(always)]
    pub(crate) fn by_address(&self, linear: u64, mode: Mode) -> Option<NonNull<Block>> {
        let link = &self.addresses[slot(linear)];
        let current = link.linear == linear && link.key == self.key(linear, mode);
        if current { link.block } else { None }
    }

    /// Remembers that `linear` leads to `block`.
    pub(crate) fn remember_address(&mut self, linear: u64, mode: Mode, block: NonNull<Block>) {
        let key = self.key(linear, mode);
        self.addresses[slot(linear)] = Link { linear, key, block: Some(block) };
        // SAFETY: the caller has just found the block in the cache.
        unsafe { block.as_ref() }.found_in[half(linear)].set(true);
    }

    fn at(&self, address: u64, mode: Mode) -> Option<&Block> {
        let offset = (address % PAGE_BYTES) as u16;
        Some(self.pages.get(&(address / PAGE_BYTES))?.blocks.get(&(offset, mode))?)
    }

    /// The block at a guest-physical address.
    pub(crate) fn by_physical(&self, address: u64, mode: Mode) -> Option<NonNull<Block>> {
        self.at(address, mode).map(NonNull::from)
    }

    /// The second page of the block at a guest-physical address.
    pub(crate) fn second_page(&self, address: u64, mode: Mode) -> Option<u64> {
        self.at(address, mode)?.second_page
    }

    /// Keeps a block; where it lives.
    pub(crate) fn insert(
        &mut self,
        address: u64,
        mode: Mode,
        mut block: Box<Block>,
    ) -> NonNull<Block> {
        block.physical = Some(address);
        let offset = (address % PAGE_BYTES) as u16;
        let pointer = NonNull::from(&*block);
        if let Some(second) = block.second_page {
            let page = self.pages.entry(second / PAGE_BYTES).or_default();
            page.reaching_in.push((address, mode));
        }
        let page = self.pages.entry(address / PAGE_BYTES).or_default();
        if page.blocks.insert((offset, mode), block).is_some() {
            self.note_removal();
        } else {
            self.block_count += 1;
        }
        pointer
    }

    /// Keeps a block that is decoded anew each time; where it lives until the next of its kind.
    pub(crate) fn keep_transient(&mut self, block: Box<Block>) -> NonNull<Block> {
        self.note_removal();
        NonNull::from(&**self.transient.insert(block))
    }

    /// Whether so many blocks are kept that it is time to start afresh.
    pub(crate) fn is_full(&self) -> bool {
        self.block_count >= MAX_BLOCKS
    }

    /// Drops every block; the pages that held one.
    pub(crate) fn clear(&mut self) -> Vec<u64> {
        self.note_removal();
        self.block_count = 0;
        self.pages.drain().map(|(page, _)| page * PAGE_BYTES).collect()
    }

    /// Drops the blocks that overlap `chunks` of a page; the chunks that still hold code.
    pub(crate) fn invalidate(&mut self, page: u64, chunks: u64) -> u64 {
        let mut found_in = [false; 2];
        let number = page / PAGE_BYTES;
        let mut left = 0;
        let mut reaching_in = Vec::new();
        let mut dropped = 0;
        if let Some(held) = self.pages.get_mut(&number) {
            // A unit may hold any of the page's blocks.
            held.forget_translations(self.code_epoch);
            held.blocks.values().for_each(|block| block.add_halves(&mut found_in));
            let before = held.blocks.len();
            held.blocks.retain(|&(offset, _), block| {
                let in_page = PAGE_BYTES - u64::from(offset);
                let covers =
                    chunk_mask(u64::from(offset), u64::from(block.size_bytes).min(in_page));
                let keep = covers & chunks == 0;
                left |= if keep { covers } else { 0 };
                keep
            });
            dropped += before - held.blocks.len();
            reaching_in = std::mem::take(&mut held.reaching_in);
        }
        // Where exactly such a block ends does not matter: an instruction's bytes lie in one chunk.
        let first_chunk = chunk_mask(0, 1);
        if chunks & first_chunk != 0 {
            for (address, mode) in reaching_in {
                let place = ((address % PAGE_BYTES) as u16, mode);
                let first = self.pages.get_mut(&(address / PAGE_BYTES));
                if let Some(block) = first.and_then(|first| first.blocks.remove(&place)) {
                    block.add_halves(&mut found_in);
                    dropped += 1;
                }
            }
        } else if !reaching_in.is_empty() {
            left |= first_chunk;
            self.pages.entry(number).or_default().reaching_in = reaching_in;
        }
        self.block_count -= dropped;
        self.epoch += 1;
        // Code in the other half, the kernel's mostly, stays where it is known to be.
        for half in [0, 1].into_iter().filter(|&half| found_in[half]) {
            self.start_generation(half);
        }
        left
    }

    /// Remembers the exits of a block's translation; `address` is the block's.
    pub(crate) fn note_exits(&mut self, address: u64, exits: impl Iterator<Item = NonNull<Exit>>) {
        let page = self.pages.entry(address / PAGE_BYTES).or_default();
        page.drop_stale_exits(self.code_epoch);
        page.exits.extend(exits);
    }

    /// Forgets every translation, at once: the memory of their code and exits is used again.
    pub(crate) fn forget_translations(&mut self) {
        self.code_epoch = self.code_epoch.checked_add(1).expect("2^32 times all code forgotten");
    }

    /// What a block's translation must have been made in to be valid.
    #[inline(always)]
    pub(crate) fn code_epoch(&self) -> u32 {
        self.code_epoch
    }

    /// Counts what made the linear addresses of the lower and of the upper half lead elsewhere.
    #[inline(always)]
    pub(crate) fn generations(&self) -> [u64; 2] {
        self.generations
    }

    fn note_removal(&mut self) {
        self.epoch += 1;
        self.forget_addresses();
    }

    /// Forgets what lies at which linear address: translations changed.
    pub(crate) fn forget_addresses(&mut self) {
        self.forget_half(0);
        self.forget_half(u64::MAX);
    }

    /// Forgets what lies at the linear addresses of the half that `linear` is in.
    pub(crate) fn forget_half(&mut self, linear: u64) {
        self.start_generation(half(linear));
    }

    fn start_generation(&mut self, half: usize) {
        let generation = &mut self.generations[half];
        *generation += 1;
        assert!(*generation >> (64 - Mode::BITS) == 0, "2^45 translation changes");
    }
}
