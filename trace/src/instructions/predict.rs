//! What a segment's writer and reader both expect next, from what both have seen: only surprises are
//! stored. `FORMAT.md` gives the rules; a change to one is a new version of the format.

use super::block::{BlockEnd, BlockRef, NO_BASE, PAGE_BYTES, StaticAccess};

/// Cells of base values: as many as there are bytes, so that finding one takes no check.
const CELLS: usize = 256;
/// The cell that is always zero.
const ZERO_CELL: u8 = 255;
/// No block.
pub(super) const NONE: u32 = u32::MAX;
/// Numbers of blocks have these bits; the rest of a table's entry tells contexts apart.
const NUMBER_MASK: u32 = super::head::MAX_SEGMENT_BLOCKS as u32 - 1;
/// Entries of the successor table.
const SUCCESSORS: usize = 1 << 16;
/// Entries of the table of addresses by the address before.
const FOLLOWERS: usize = 1 << 15;
/// The part of an address that is in it.
const LOW: u64 = u32::MAX as u64;
/// Bits of the page table's index.
const PAGE_BITS: u32 = 12;
/// Calls remembered: those deeper down are forgotten.
const CALLS: usize = 64;
/// 2^64 divided by the golden ratio, the usual multiplier for hashing.
const HASH: u64 = 0x9e37_79b9_7f4a_7c15;

/// The top `bits` bits of a multiplicative hash.
#[inline(always)]
fn hash(value: u64, bits: u32) -> usize {
    (value.wrapping_mul(HASH) >> (64 - bits)) as usize
}

/// A block of a segment: what its runs have, and what is known of its successors.
#[derive(Clone, Copy, Debug)]
pub(super) struct KnownBlock {
    /// The first of its accesses among all sites.
    pub(super) first_site: u32,
    /// Accesses of a whole run, if it does not vary.
    pub(super) access_count: u32,
    /// Its instructions.
    pub(super) instruction_count: u16,
    /// Only a run knows the number of its accesses.
    pub(super) varies: bool,
    end: BlockEnd,
    /// The last two different ones that surprised, the latest first.
    latest: [u32; 2],
    /// What surprised last after a return to the call that ends this block.
    after_return: u32,
}

impl KnownBlock {
    pub(super) fn new(block: BlockRef<'_>, first_site: usize) -> Self {
        Self {
            first_site: first_site as u32,
            access_count: block.raw().access_count,
            instruction_count: block.instruction_count() as u16,
            varies: block.raw().varies,
            end: block.end(),
            latest: [NONE; 2],
            after_return: NONE,
        }
    }

    #[inline(always)]
    pub(super) fn leads(&self) -> Leads {
        Leads { end: self.end, latest: self.latest[0] }
    }
}

/// Where among the blocks an execution is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// The block that comes next if nothing surprises, or [`NONE`].
    pub(super) expected: u32,
    /// The block that came last.
    last: u32,
    history: u64,
    /// Where in the table the next block belongs, and what is left of the hash.
    slot: u16,
    tag: u32,
}

const START: Place = Place { expected: NONE, last: NONE, history: 0, slot: 0, tag: 0 };

/// What of a block decides what comes behind it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Leads {
    end: BlockEnd,
    latest: u32,
}

/// Expects blocks.
#[derive(Debug)]
pub(super) struct BlockPredictor {
    pub(super) blocks: Vec<KnownBlock>,
    pub(super) place: Place,
    /// By the three blocks before: the number of the block that followed, and what is left of the hash.
    table: Box<[u32; SUCCESSORS]>,
    calls: [u32; CALLS],
    depth: usize,
    /// The block whose call the last return belonged to.
    returned_to: u32,
}

impl BlockPredictor {
    pub(super) fn new() -> Self {
        Self {
            blocks: Vec::new(),
            place: START,
            table: Box::new([NONE; SUCCESSORS]),
            calls: [NONE; CALLS],
            depth: 0,
            returned_to: NONE,
        }
    }

    pub(super) fn clear(&mut self) {
        self.blocks.clear();
        self.place = START;
        self.table.fill(NONE);
        self.calls = [NONE; CALLS];
        self.depth = 0;
        self.returned_to = NONE;
    }

    /// What else may come than what is expected, the likeliest first.
    pub(super) fn alternatives(&self, place: Place) -> impl Iterator<Item = u32> + use<> {
        let latest = self.blocks.get(place.last as usize).map_or([NONE; 2], |last| last.latest);
        let followed = self.table[usize::from(place.slot)] & NUMBER_MASK;
        let expected = place.expected;
        [latest[0], latest[1], followed].into_iter().filter(move |one| *one != expected)
    }

    /// Block `id` is about to come, and was not expected. It must have been added, and where it leads
    /// is known only now.
    pub(super) fn settle(&mut self, place: Place, id: u32) {
        let Some(last) = self.blocks.get_mut(place.last as usize) else { return };
        if last.latest[0] != id {
            last.latest = [id, last.latest[0]];
        }
        if last.end == BlockEnd::Return
            && let Some(caller) = self.blocks.get_mut(self.returned_to as usize)
        {
            caller.after_return = id;
        }
    }

    /// Block `id` came, which is `block`: where it leads.
    #[inline(always)]
    pub(super) fn next(&mut self, place: &mut Place, id: u32, block: Leads) {
        self.table[usize::from(place.slot)] = place.tag | id;
        place.history = place.history << 20 ^ u64::from(id);
        let hash = (place.history << 4).wrapping_mul(HASH);
        place.slot = (hash >> 48) as u16;
        place.tag = (hash >> 16) as u32 & !NUMBER_MASK;
        let followed = self.table[usize::from(place.slot)] ^ place.tag;
        place.expected = if followed <= NUMBER_MASK { followed } else { block.latest };
        place.last = id;
        if block.end != BlockEnd::Other {
            self.follow(place, block.end);
        }
    }

    /// Goes down and up with calls and returns.
    #[inline(always)]
    fn follow(&mut self, place: &mut Place, end: BlockEnd) {
        if end == BlockEnd::Call {
            self.calls[self.depth % CALLS] = place.last;
            self.depth = self.depth.wrapping_add(1);
            return;
        }
        self.depth = self.depth.wrapping_sub(1);
        self.returned_to = std::mem::replace(&mut self.calls[self.depth % CALLS], NONE);
        if let Some(caller) = self.blocks.get(self.returned_to as usize)
            && caller.after_return != NONE
        {
            place.expected = caller.after_return;
        }
    }
}

/// One access of one instruction. The address that it expects is its cell + `difference`. What is
/// right most of the time is either a distance from the base register, whose value is the cell, or
/// a stride from the last address; then the cell is zero.
#[derive(Clone, Copy, Debug)]
pub(super) struct Site {
    difference: u64,
    /// Its last address.
    last: u64,
    /// What an address as expected adds to the cell.
    advance: i32,
    /// What an address as expected adds to `difference`.
    stride: i32,
    displacement: i32,
    step: i16,
    cell: u8,
    base: u8,
}

/// What surprises have told of a site.
#[derive(Clone, Copy, Debug, Default)]
struct Surprises {
    /// How far the last one was from the address before.
    stride: u64,
    /// How far the last one was from base + displacement.
    offset: u64,
}

/// Expects addresses.
#[derive(Debug)]
pub(super) struct AddressPredictor {
    pub(super) sites: Vec<Site>,
    surprises: Vec<Surprises>,
    /// What the base registers hold, as far as accesses tell.
    pub(super) cells: [u64; CELLS],
    /// By the site and the surprise before it.
    followers: Box<[u32; FOLLOWERS]>,
    /// The last address that surprised.
    previous: u64,
}

/// How many ways there are to name an address that surprised, differences apart.
pub(super) const CANDIDATES: usize = 5;

/// What an address that surprised may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Surprise {
    /// By what the last surprise would have made of it: a stride, an offset; then base +
    /// displacement, what followed the access before it last time, the last address.
    pub(super) candidates: [u64; CANDIDATES],
    slot: usize,
}

impl Surprise {
    /// The address that differences lead from: the last one, and base + displacement.
    pub(super) fn origins(&self) -> [u64; 2] {
        [self.candidates[4], self.candidates[2]]
    }
}

impl AddressPredictor {
    pub(super) fn new() -> Self {
        Self {
            sites: Vec::new(),
            surprises: Vec::new(),
            cells: [0; CELLS],
            followers: Box::new([0; FOLLOWERS]),
            previous: 0,
        }
    }

    pub(super) fn clear(&mut self) {
        self.sites.clear();
        self.surprises.clear();
        self.cells = [0; CELLS];
        self.followers.fill(0);
        self.previous = 0;
    }

    /// Adds the sites of a block, in order.
    pub(super) fn add(&mut self, block: BlockRef<'_>) {
        let accesses = block.static_accesses();
        self.sites.extend(accesses.iter().map(|access| Site::new(access, block.linear())));
        self.surprises.resize(self.sites.len(), Surprises::default());
    }

    /// What the address at a site may be if it is not the one expected.
    #[inline]
    pub(super) fn surprise(&self, number: usize) -> Surprise {
        let (site, before) = (&self.sites[number], &self.surprises[number]);
        let key = self.previous ^ (number as u64) << 40;
        let slot = (key.wrapping_mul(HASH) >> 49) as usize;
        let origin =
            self.cells[usize::from(site.base)].wrapping_add_signed(i64::from(site.displacement));
        let candidates = [
            site.last.wrapping_add(before.stride),
            origin.wrapping_add(before.offset),
            origin,
            (site.last & !LOW) | u64::from(self.followers[slot]),
            site.last,
        ];
        Surprise { candidates, slot }
    }

    /// The surprise turned out to be `address`. What holds twice in a row is expected from then on.
    #[inline]
    pub(super) fn settle(&mut self, number: usize, surprise: &Surprise, address: u64) {
        self.followers[surprise.slot] = address as u32;
        self.previous = address;
        let (site, before) = (&mut self.sites[number], &mut self.surprises[number]);
        let [_, _, origin, _, last] = surprise.candidates;
        let (stride, offset) = (address.wrapping_sub(last), address.wrapping_sub(origin));
        if site.base != NO_BASE && offset == before.offset {
            site.expect_offset(offset);
        } else if stride == before.stride {
            site.expect_stride(stride);
        }
        (before.stride, before.offset) = (stride, offset);
        let base = address.wrapping_sub(i64::from(site.displacement) as u64);
        self.cells[usize::from(site.base)] = base.wrapping_add_signed(i64::from(site.step));
        if site.cell == ZERO_CELL {
            site.difference = address.wrapping_add_signed(i64::from(site.stride));
        }
        site.last = address;
    }
}

impl Site {
    fn new(access: &StaticAccess, linear: u64) -> Self {
        let mut site = Self {
            difference: linear,
            last: linear,
            advance: 0,
            stride: 0,
            displacement: access.displacement,
            step: access.step,
            cell: ZERO_CELL,
            base: access.base,
        };
        if access.base != NO_BASE {
            site.expect_offset(0);
        }
        site
    }

    fn expect_offset(&mut self, offset: u64) {
        // An offset that no loop makes is none to expect.
        let advance = i32::try_from(offset as i64).ok();
        let Some(advance) = advance.and_then(|one| one.checked_add(i32::from(self.step))) else {
            return;
        };
        self.difference = offset.wrapping_add_signed(i64::from(self.displacement));
        (self.cell, self.advance, self.stride) = (self.base, advance, 0);
    }

    fn expect_stride(&mut self, stride: u64) {
        if let Ok(stride) = i32::try_from(stride as i64) {
            (self.cell, self.advance, self.stride) = (ZERO_CELL, 0, stride);
        }
    }

    /// The address that comes next if nothing surprises.
    #[inline(always)]
    pub(super) fn expected(&self, cells: &[u64; CELLS]) -> u64 {
        cells[usize::from(self.cell)].wrapping_add(self.difference)
    }

    /// The address that was expected came.
    #[inline(always)]
    pub(super) fn pass(&mut self, cells: &mut [u64; CELLS], address: u64) {
        let cell = &mut cells[usize::from(self.cell)];
        *cell = cell.wrapping_add_signed(i64::from(self.advance));
        self.difference = self.difference.wrapping_add_signed(i64::from(self.stride));
        self.last = address;
    }
}

/// Expects guest-physical pages.
#[derive(Debug)]
pub(super) struct PagePredictor {
    /// Linear page and guest-physical page, by the linear one.
    table: Box<[(u64, u64); 1 << PAGE_BITS]>,
    /// What the last surprise added to its linear page.
    distance: u64,
}

impl PagePredictor {
    pub(super) fn new() -> Self {
        Self { table: Box::new([(u64::MAX, 0); 1 << PAGE_BITS]), distance: 0 }
    }

    pub(super) fn clear(&mut self) {
        self.table.fill((u64::MAX, 0));
        self.distance = 0;
    }

    /// The page behind `linear`, an address, if that was met.
    #[inline(always)]
    pub(super) fn known(&self, linear: u64) -> Option<u64> {
        let page = linear / PAGE_BYTES;
        let (known, physical) = self.table[hash(page, PAGE_BITS)];
        (known == page).then_some(physical)
    }

    /// The page that is expected behind `linear`, an address.
    pub(super) fn expected(&self, linear: u64) -> u64 {
        let met = self.known(linear);
        met.unwrap_or_else(|| (linear / PAGE_BYTES).wrapping_add(self.distance))
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
