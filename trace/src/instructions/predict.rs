//! What a segment's writer and reader both expect next, from what both have seen: only surprises are
//! stored. `FORMAT.md` gives the rules; a change to one is a new version of the format.

use super::block::{BlockEnd, PAGE_BYTES, StaticAccess};

/// Places for base values: more than there are base numbers, so that finding one takes no division.
const BASES: usize = 32;
/// No block.
pub(super) const NONE: u32 = u32::MAX;
/// Bits of the successor table's index.
const SUCCESSOR_BITS: u32 = 16;
/// Bits of the address table's index.
const ADDRESS_BITS: u32 = 16;
/// Bits of the page table's index.
const PAGE_BITS: u32 = 12;
/// Calls remembered: those deeper down are forgotten.
const CALLS: usize = 64;
/// 2^64 divided by the golden ratio, the usual multiplier for hashing.
const HASH: u64 = 0x9e37_79b9_7f4a_7c15;

/// The top `bits` bits of a multiplicative hash.
fn hash(value: u64, bits: u32) -> usize {
    (value.wrapping_mul(HASH) >> (64 - bits)) as usize
}

/// What is known of a block's successors.
#[derive(Clone, Copy, Debug)]
struct Successors {
    /// The last two different ones, the latest first.
    latest: [u32; 2],
    /// What ran last after a return to the call that ends this block.
    after_return: u32,
    end: BlockEnd,
}

/// Expects blocks.
#[derive(Debug)]
pub(super) struct BlockPredictor {
    blocks: Vec<Successors>,
    /// By the three blocks before.
    table: Vec<u32>,
    history: u64,
    last: u32,
    calls: [u32; CALLS],
    depth: usize,
    /// The block whose call the last block returned to.
    returned_to: u32,
    index: usize,
}

impl BlockPredictor {
    pub(super) fn new() -> Self {
        Self {
            blocks: Vec::new(),
            table: vec![NONE; 1 << SUCCESSOR_BITS],
            history: 0,
            last: NONE,
            calls: [NONE; CALLS],
            depth: 0,
            returned_to: NONE,
            index: 0,
        }
    }

    pub(super) fn clear(&mut self) {
        self.blocks.clear();
        self.table.fill(NONE);
        self.history = 0;
        self.last = NONE;
        self.calls = [NONE; CALLS];
        self.depth = 0;
        self.returned_to = NONE;
        self.index = 0;
    }

    /// A block gets the next number.
    pub(super) fn add(&mut self, end: BlockEnd) {
        self.blocks.push(Successors { latest: [NONE; 2], after_return: NONE, end });
    }

    /// The block that comes next if nothing surprises.
    #[inline]
    pub(super) fn expected(&self) -> u32 {
        match self.blocks.get(self.returned_to as usize) {
            Some(caller) if caller.after_return != NONE => caller.after_return,
            _ => self.table[self.index],
        }
    }

    /// What else may come, the likeliest first.
    pub(super) fn alternatives(&self) -> [u32; 3] {
        let latest = self.blocks.get(self.last as usize).map_or([NONE; 2], |last| last.latest);
        [self.table[self.index], latest[0], latest[1]]
    }

    /// Block `id` came. It must have been added.
    #[inline]
    pub(super) fn take(&mut self, id: u32) {
        if let Some(caller) = self.blocks.get_mut(self.returned_to as usize) {
            caller.after_return = id;
        }
        if let Some(last) = self.blocks.get_mut(self.last as usize)
            && last.latest[0] != id
        {
            last.latest = [id, last.latest[0]];
        }
        self.table[self.index] = id;
        self.history = self.history << 20 ^ u64::from(id);
        self.index = hash(self.history << 4, SUCCESSOR_BITS);
        self.last = id;
        self.returned_to = NONE;
        match self.blocks[id as usize].end {
            BlockEnd::Other => {}
            BlockEnd::Call => {
                self.calls[self.depth % CALLS] = id;
                self.depth = self.depth.wrapping_add(1);
            }
            BlockEnd::Return => {
                self.depth = self.depth.wrapping_sub(1);
                self.returned_to = std::mem::replace(&mut self.calls[self.depth % CALLS], NONE);
            }
        }
    }
}

/// What is known of one access of one instruction.
#[derive(Clone, Copy, Debug)]
pub(super) struct Site {
    /// Its last address.
    last: u64,
    /// The step that it repeats.
    stride: u64,
    /// How far from `base + displacement` it is.
    offset: u64,
    displacement: i32,
    step: i16,
    base: u8,
    /// Bits 0-1: trust in the stride. Bits 2-3: trust in the offset. Bits 4-5: 2 and more mean that
    /// the offset did better than the stride of late.
    trust: u8,
}

/// Expects addresses.
#[derive(Debug)]
pub(super) struct AddressPredictor {
    pub(super) sites: Vec<Site>,
    /// What the base registers hold, as far as accesses tell.
    pub(super) bases: [u64; BASES],
    /// By the site and the access before it.
    table: Vec<u64>,
    pub(super) previous: u64,
}

/// Which way an address that surprised is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Surprise {
    /// What the site's other rule gives.
    pub(super) other: u64,
    /// What followed the access before it last time.
    pub(super) followed: u64,
    /// Its last address.
    pub(super) last: u64,
    slot: usize,
}

impl AddressPredictor {
    pub(super) fn new() -> Self {
        Self {
            sites: Vec::new(),
            bases: [0; BASES],
            table: vec![0; 1 << ADDRESS_BITS],
            previous: 0,
        }
    }

    pub(super) fn clear(&mut self) {
        self.sites.clear();
        self.bases = [0; BASES];
        self.table.fill(0);
        self.previous = 0;
    }

    /// Adds the sites of a block, in order.
    pub(super) fn add(&mut self, accesses: &[StaticAccess]) {
        self.sites.extend(accesses.iter().map(|access| Site {
            last: 0,
            stride: 0,
            offset: 0,
            displacement: access.displacement,
            step: access.step,
            base: access.base,
            trust: 2 << 4,
        }));
    }

    /// What else the address at a site may be.
    pub(super) fn surprise(&self, number: usize) -> Surprise {
        let site = &self.sites[number];
        let slot = hash(self.previous ^ (number as u64) << 40, ADDRESS_BITS);
        Surprise {
            other: site.expected(&self.bases).1,
            followed: self.table[slot],
            last: site.last,
            slot,
        }
    }

    /// A surprise turned out to be `address`.
    pub(super) fn settle(&mut self, surprise: Surprise, address: u64) {
        self.table[surprise.slot] = address;
    }
}

/// What becomes of [`Site::trust`]: by the trust before, plus 64 if the stride was right, plus 128 if
/// the offset was.
const NEXT_TRUST: [u8; 256] = {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let (stride_right, offset_right) = (index & 64 != 0, index & 128 != 0);
        let stride = next_trust((index & 3) as u8, stride_right);
        let offset = next_trust((index >> 2 & 3) as u8, offset_right);
        let mut choice = (index >> 4 & 3) as u8;
        if offset_right && !stride_right && choice < 3 {
            choice += 1;
        } else if stride_right && !offset_right && choice > 0 {
            choice -= 1;
        }
        table[index] = stride | offset << 2 | choice << 4;
        index += 1;
    }
    table
};

/// Trust grows to 2 and shrinks to 0 by steps of one.
const fn next_trust(trust: u8, right: bool) -> u8 {
    if !right {
        trust.saturating_sub(1)
    } else if trust < 2 {
        trust + 1
    } else {
        2
    }
}

impl Site {
    /// The address that comes next if nothing surprises, and what the other rule gives.
    #[inline(always)]
    pub(super) fn expected(&self, bases: &[u64; BASES]) -> (u64, u64) {
        let by_offset = bases[usize::from(self.base) % BASES]
            .wrapping_add_signed(i64::from(self.displacement))
            .wrapping_add(self.offset);
        let by_stride = self.last.wrapping_add(self.stride);
        if self.trust >= 2 << 4 { (by_offset, by_stride) } else { (by_stride, by_offset) }
    }

    /// `address` came.
    #[inline(always)]
    pub(super) fn take(&mut self, bases: &mut [u64; BASES], address: u64) {
        let base = &mut bases[usize::from(self.base) % BASES];
        let origin = address.wrapping_sub(i64::from(self.displacement) as u64);
        let offset = origin.wrapping_sub(*base);
        *base = origin.wrapping_add_signed(i64::from(self.step));
        let stride = address.wrapping_sub(self.last);
        let (stride_right, offset_right) = (stride == self.stride, offset == self.offset);
        // What was right stays the same when it is replaced.
        self.stride = if self.trust & 3 == 0 { stride } else { self.stride };
        self.offset = if self.trust & 12 == 0 { offset } else { self.offset };
        let index = self.trust & 63 | u8::from(stride_right) << 6 | u8::from(offset_right) << 7;
        self.trust = NEXT_TRUST[usize::from(index)];
        self.last = address;
    }
}

/// Expects guest-physical pages.
#[derive(Debug)]
pub(super) struct PagePredictor {
    /// Linear page and guest-physical page, by the linear one.
    table: Vec<(u64, u64)>,
    /// What the last surprise added to its linear page.
    distance: u64,
}

impl PagePredictor {
    pub(super) fn new() -> Self {
        Self { table: vec![(u64::MAX, 0); 1 << PAGE_BITS], distance: 0 }
    }

    pub(super) fn clear(&mut self) {
        self.table.fill((u64::MAX, 0));
        self.distance = 0;
    }

    /// The page behind `linear`, an address.
    pub(super) fn expected(&self, linear: u64) -> u64 {
        let page = linear / PAGE_BYTES;
        let (known, physical) = self.table[hash(page, PAGE_BITS)];
        if known == page { physical } else { page.wrapping_add(self.distance) }
    }

    /// `physical` is the page behind `linear`, an address.
    pub(super) fn take(&mut self, linear: u64, physical: u64) {
        let page = linear / PAGE_BYTES;
        let entry = &mut self.table[hash(page, PAGE_BITS)];
        if *entry != (page, physical) {
            *entry = (page, physical);
            self.distance = physical.wrapping_sub(page);
        }
    }
}
