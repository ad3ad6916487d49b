//! The software TLB: translations that have been walked, checked for rights, and found to be RAM.
//!
//! Data tables are read by generated code, which finds an entry by the low 16 bits of the page number
//! and compares without touching the flags: the last byte of an access plus the negated tag is below
//! a page's size just when that byte lies in the tag's page.
#![allow(unsafe_code)]

use std::collections::HashSet;
use std::io;

use super::low_memory::{AnyBytes, LowMemory};
use super::physical::PAGE_BYTES;
use super::walk::Translation;

/// Entries of one data table: as many as a 16-bit index tells apart.
pub(crate) const ENTRIES: usize = 1 << 16;
/// Entries of one fetch table; a power of two.
const FETCH_ENTRIES: usize = 1024;
/// A tag that no page address equals.
const INVALID_FETCH: u64 = 1;
/// So many fills, and forgetting them one by one is no longer quicker than forgetting everything.
const MAX_FILLS: usize = 1 << 15;

/// Under which rights a table's entries were checked.
pub(crate) mod rights {
    /// Supervisor, user pages allowed (SMAP off, or overridden by RFLAGS.AC).
    pub(crate) const SUPERVISOR: usize = 0;
    /// User.
    pub(crate) const USER: usize = 1;
    /// Supervisor, user pages forbidden (SMAP).
    pub(crate) const SUPERVISOR_ONLY: usize = 2;
    /// A table that is never filled: every access takes the slow path, which checks more.
    pub(crate) const NONE: usize = 3;
}

/// A data translation.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Entry {
    /// Minus the linear page's address, or [`invalid`].
    pub(crate) negated_tag: u64,
    /// Host address of the page minus its linear address.
    pub(crate) addend: u64,
}

// SAFETY: two integers.
unsafe impl AnyBytes for Entry {}

/// What [`Entry::negated_tag`] is in an entry that no access hits: the tag belongs elsewhere, and so
/// far from here that no access reaches from a page of this index into it.
fn invalid(index: usize) -> u64 {
    ((index ^ (ENTRIES / 2)) as u64 * PAGE_BYTES).wrapping_neg()
}

/// A fetch translation.
#[derive(Clone, Copy, Debug)]
struct FetchEntry {
    /// Linear page address, or [`INVALID_FETCH`].
    tag: u64,
    /// The guest-physical page.
    page: u64,
}

const NO_FETCH: FetchEntry = FetchEntry { tag: INVALID_FETCH, page: 0 };

/// Data tables: a read and a write one for each of three rights, and one that is never filled.
const DATA_TABLES: usize = 7;
const NEVER_FILLED: usize = 6;

/// Read, write and fetch translations, apart by rights.
#[derive(Debug)]
pub(crate) struct Tlb {
    data: LowMemory<Entry>,
    fetch: Box<[[FetchEntry; FETCH_ENTRIES]; 3]>,
    /// Translations since the last flush of those that are not global, and of those that are.
    seen: [Seen; 2],
    /// What was filled since it was last forgotten, some of it twice: pages of one address space.
    local_fills: Vec<Fill>,
    /// The same for pages that are in all address spaces.
    global_fills: Vec<Fill>,
}

/// An entry that was filled.
#[derive(Clone, Copy, Debug)]
struct Fill {
    kind: FillKind,
    rights: u8,
    index: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FillKind {
    Read,
    Write,
    Fetch,
}

/// Which linear addresses translations came from, so that forgetting one page can be cheap.
#[derive(Debug, Default)]
struct Seen {
    /// Numbers of pages that code was fetched through, even if their entries are gone.
    code_pages: HashSet<u64>,
    /// Numbers of the regions that have a part of a large page in a table.
    large_regions: HashSet<u64>,
}

/// No page but those of 1 GiB, which the CPU model has not, is larger.
const LARGE_REGION_BYTES: u64 = 4 << 20;

#[inline(always)]
fn index(linear: u64) -> usize {
    (linear / PAGE_BYTES) as usize % ENTRIES
}

fn fetch_index(linear: u64) -> usize {
    (linear / PAGE_BYTES) as usize % FETCH_ENTRIES
}

/// The data table of accesses with `rights`.
#[inline(always)]
fn data_table(rights: usize, write: bool) -> usize {
    if rights == rights::NONE { NEVER_FILLED } else { rights * 2 + usize::from(write) }
}

impl Tlb {
    /// # Errors
    /// If the host refuses the memory.
    pub(crate) fn new() -> io::Result<Self> {
        let mut data: LowMemory<Entry> = LowMemory::new(DATA_TABLES * ENTRIES)?;
        for (number, entry) in data.iter_mut().enumerate() {
            entry.negated_tag = invalid(number % ENTRIES);
        }
        Ok(Self {
            data,
            fetch: Box::new([[NO_FETCH; FETCH_ENTRIES]; 3]),
            seen: Default::default(),
            local_fills: Vec::new(),
            global_fills: Vec::new(),
        })
    }

    /// Where the entries for accesses with `rights` begin, for generated code: less than 2^31.
    pub(crate) fn table_address(&self, rights: usize, write: bool) -> i32 {
        self.data.address() + (data_table(rights, write) * ENTRIES * size_of::<Entry>()) as i32
    }

    /// The host address for `size` bytes at `linear`, all in its page. One compare does it: if the
    /// last byte lies in the next page, that page has another index, so the entry of the first one's
    /// index has not its tag.
    #[inline(always)]
    fn hit(&self, table: usize, linear: u64, size: u64) -> Option<*mut u8> {
        let entry = &self.data[table * ENTRIES + index(linear)];
        let beyond_tag = linear.wrapping_add(size - 1).wrapping_add(entry.negated_tag);
        let hit = beyond_tag < PAGE_BYTES;
        if hit { Some(linear.wrapping_add(entry.addend) as *mut u8) } else { None }
    }

    #[inline(always)]
    pub(crate) fn hit_read(&self, rights: usize, linear: u64, size: u64) -> Option<*mut u8> {
        self.hit(data_table(rights, false), linear, size)
    }

    #[inline(always)]
    pub(crate) fn hit_write(&self, rights: usize, linear: u64, size: u64) -> Option<*mut u8> {
        self.hit(data_table(rights, true), linear, size)
    }

    /// The guest-physical address of a byte to fetch.
    #[inline]
    pub(crate) fn hit_fetch(&self, rights: usize, linear: u64) -> Option<u64> {
        let entry = &self.fetch[rights][fetch_index(linear)];
        let hit = entry.tag == linear & !(PAGE_BYTES - 1);
        if hit { Some(entry.page + linear % PAGE_BYTES) } else { None }
    }

    /// Remembers that the page of `linear` lies at `host_page` for accesses with `rights`.
    pub(crate) fn fill_data(
        &mut self,
        rights: usize,
        write: bool,
        linear: u64,
        host_page: *mut u8,
        global: bool,
    ) {
        let page = linear & !(PAGE_BYTES - 1);
        let addend = (host_page as u64).wrapping_sub(page);
        let place = data_table(rights, write) * ENTRIES + index(page);
        self.data[place] = Entry { negated_tag: page.wrapping_neg(), addend };
        let kind = if write { FillKind::Write } else { FillKind::Read };
        self.note_fill(Fill { kind, rights: rights as u8, index: index(page) as u16 }, global);
    }

    /// Remembers that the page of `linear` is `physical_page` for fetches with `rights`.
    pub(crate) fn fill_fetch(
        &mut self,
        rights: usize,
        linear: u64,
        physical_page: u64,
        global: bool,
    ) {
        let tag = linear & !(PAGE_BYTES - 1);
        self.fetch[rights][fetch_index(tag)] = FetchEntry { tag, page: physical_page };
        let index = fetch_index(tag) as u16;
        self.note_fill(Fill { kind: FillKind::Fetch, rights: rights as u8, index }, global);
    }

    fn note_fill(&mut self, fill: Fill, global: bool) {
        let fills = if global { &mut self.global_fills } else { &mut self.local_fills };
        fills.push(fill);
        if fills.len() > MAX_FILLS {
            // The entry just made may stay: it is not on a list twice over, but this once.
            self.flush_but(fill);
        }
    }

    /// Forgets everything but one entry.
    fn flush_but(&mut self, kept: Fill) {
        let place = self.data_place(kept);
        let data = place.map(|place| self.data[place]);
        let fetch = self.fetch[usize::from(kept.rights)][usize::from(kept.index) % FETCH_ENTRIES];
        self.flush();
        match place.zip(data) {
            Some((place, entry)) => self.data[place] = entry,
            None => self.fetch[usize::from(kept.rights)][usize::from(kept.index)] = fetch,
        }
        self.local_fills.push(kept);
    }

    fn data_place(&self, fill: Fill) -> Option<usize> {
        let write = fill.kind == FillKind::Write;
        let table = data_table(usize::from(fill.rights), write);
        (fill.kind != FillKind::Fetch).then_some(table * ENTRIES + usize::from(fill.index))
    }

    fn forget(&mut self, fill: Fill) {
        match self.data_place(fill) {
            Some(place) => self.data[place].negated_tag = invalid(usize::from(fill.index)),
            None => self.fetch[usize::from(fill.rights)][usize::from(fill.index)] = NO_FETCH,
        }
    }

    /// Forgets everything.
    pub(crate) fn flush(&mut self) {
        self.flush_local();
        let mut fills = std::mem::take(&mut self.global_fills);
        fills.drain(..).for_each(|fill| self.forget(fill));
        self.global_fills = fills;
        self.seen[1].large_regions.clear();
    }

    /// Forgets where code was fetched: whoever remembers it has forgotten it too.
    pub(crate) fn forget_code_pages(&mut self) {
        self.seen.iter_mut().for_each(|seen| seen.code_pages.clear());
    }

    /// The same for code that is not global.
    pub(crate) fn forget_local_code_pages(&mut self) {
        self.seen[0].code_pages.clear();
    }

    /// Forgets what is not global.
    pub(crate) fn flush_local(&mut self) {
        self.seen[0].large_regions.clear();
        let mut fills = std::mem::take(&mut self.local_fills);
        fills.drain(..).for_each(|fill| self.forget(fill));
        self.local_fills = fills;
    }

    /// Notes where a translation came from.
    pub(crate) fn note(&mut self, linear: u64, found: Translation, fetch: bool) {
        let seen = &mut self.seen[usize::from(found.global)];
        if fetch {
            seen.code_pages.insert(linear / PAGE_BYTES);
        }
        if found.large {
            seen.large_regions.insert(linear / LARGE_REGION_BYTES);
        }
    }

    /// Forgets one page, which may be a large one: then everything goes, since the tables hold any
    /// number of pieces of it. Gives whether code may have been fetched through it.
    pub(crate) fn flush_page(&mut self, linear: u64) -> bool {
        let region = linear / LARGE_REGION_BYTES;
        if self.seen.iter().any(|seen| seen.large_regions.contains(&region)) {
            self.flush();
            return true;
        }
        let index = index(linear);
        for table in 0..NEVER_FILLED {
            self.data[table * ENTRIES + index].negated_tag = invalid(index);
        }
        for table in self.fetch.iter_mut() {
            table[fetch_index(linear)] = NO_FETCH;
        }
        self.seen.iter().any(|seen| seen.code_pages.contains(&(linear / PAGE_BYTES)))
    }

    /// Forgets every permission to write to `host_page` without asking: it has just become code.
    pub(crate) fn forbid_writes(&mut self, host_page: *mut u8) {
        for fills in [&self.local_fills, &self.global_fills] {
            for &fill in fills.iter().filter(|fill| fill.kind == FillKind::Write) {
                let index = usize::from(fill.index);
                let entry =
                    &mut self.data[data_table(usize::from(fill.rights), true) * ENTRIES + index];
                let tag = entry.negated_tag.wrapping_neg();
                if tag.wrapping_add(entry.addend) == host_page as u64 {
                    entry.negated_tag = invalid(index);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(linear: u64, global: bool) -> Tlb {
        let mut tlb = Tlb::new().expect("the host has low memory");
        tlb.fill_data(rights::USER, true, linear, 0x7000_0000 as *mut u8, global);
        tlb
    }

    fn hits(tlb: &Tlb, linear: u64, size: u64) -> bool {
        tlb.hit_write(rights::USER, linear, size).is_some()
    }

    #[test]
    fn an_access_hits_only_whole_in_its_page() {
        let tlb = filled(0xffff_8000_0001_2000, false);
        assert_eq!(
            tlb.hit_write(rights::USER, 0xffff_8000_0001_2ff8, 8),
            Some(0x7000_0ff8 as *mut u8)
        );
        assert!(!hits(&tlb, 0xffff_8000_0001_2ff9, 8), "it reaches into the next page");
        assert!(!hits(&tlb, 0xffff_8000_0001_1fff, 2), "it begins in the page before");
        assert!(!hits(&tlb, 0xffff_8000_1001_2000, 1), "another page of the same index");
        assert!(tlb.hit_read(rights::USER, 0xffff_8000_0001_2000, 1).is_none());
        assert!(tlb.hit_write(rights::SUPERVISOR, 0xffff_8000_0001_2000, 1).is_none());
    }

    #[test]
    fn nothing_hits_an_empty_table() {
        let tlb = Tlb::new().expect("the host has low memory");
        for linear in [0, 0xfff, 0x7ff_f000, 0x800_0000, 0x8000_0000_0000_0000, u64::MAX] {
            for size in [1, 2, 16, 512] {
                assert!(!hits(&tlb, linear, size), "{linear:#x}, {size} bytes");
            }
        }
    }

    #[test]
    fn global_entries_outlive_local_ones() {
        let mut tlb = filled(0x5000, false);
        tlb.fill_data(rights::USER, true, 0x6000, 0x7000_1000 as *mut u8, true);
        tlb.flush_local();
        assert!(!hits(&tlb, 0x5000, 1) && hits(&tlb, 0x6000, 1));
        tlb.flush();
        assert!(!hits(&tlb, 0x6000, 1));
    }

    #[test]
    fn a_page_that_becomes_code_is_no_longer_written_without_asking() {
        let mut tlb = filled(0x5000, false);
        tlb.fill_data(rights::USER, true, 0x6000, 0x7000_1000 as *mut u8, true);
        tlb.forbid_writes(0x7000_0000 as *mut u8);
        assert!(!hits(&tlb, 0x5000, 1) && hits(&tlb, 0x6000, 1));
    }

    #[test]
    fn any_number_of_fills_leaves_the_last_one() {
        let mut tlb = Tlb::new().expect("the host has low memory");
        for number in 0..=MAX_FILLS as u64 {
            let linear = number * PAGE_BYTES;
            tlb.fill_data(rights::USER, true, linear, 0x7000_0000 as *mut u8, number % 2 == 0);
            assert!(hits(&tlb, linear, 1));
            tlb.fill_fetch(rights::USER, linear, linear, true);
            assert_eq!(tlb.hit_fetch(rights::USER, linear + 5), Some(linear + 5));
        }
    }
}
