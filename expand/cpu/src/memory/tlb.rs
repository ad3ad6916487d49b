//! The software TLB, in two parts.
//!
//! What has been walked, and checked for rights, is *known* until the guest flushes it or another page
//! takes its place. That is the machine's TLB: it decides when page tables are walked again and their
//! accessed and dirty bits set, so it may depend on nothing but the guest's own accesses, not on how
//! code was cut into blocks.
//!
//! Of what is known, what is RAM that can be accessed without asking has a host address as well, in data
//! tables that generated code reads. It finds an entry by the low 16 bits of the page number and compares
//! without touching the flags: the last byte of an access plus the negated tag is below a page's size
//! just when that byte lies in the tag's page.
#![allow(unsafe_code)]

mod state;

use std::collections::{HashMap, HashSet};
use std::io;

use super::low_memory::{AnyBytes, LowMemory};
use super::physical::PAGE_BYTES;
use super::walk::Translation;
use crate::integer_hash::IntegerHash;
pub(crate) use state::TlbState;

/// Entries of one data table: as many as a 16-bit index tells apart.
pub(crate) const ENTRIES: usize = 1 << 16;
/// So many pages of one kind known, and everything is forgotten.
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

/// A page that has been walked.
#[derive(Clone, Copy, Debug, Default)]
struct Known {
    /// The linear page's address plus one; zero for none.
    tag: u64,
    /// The guest-physical page.
    page: u64,
}

/// Data tables: a read and a write one for each of three rights, and one that is never filled.
const DATA_TABLES: usize = 7;
const NEVER_FILLED: usize = 6;

/// Read, write and fetch translations, apart by rights.
#[derive(Debug)]
pub(crate) struct Tlb {
    /// Host addresses of known pages.
    data: LowMemory<Entry>,
    /// What is known for data, at the same places.
    known: Box<[Known]>,
    /// What is known for fetches, for each of two rights: pages of one address space, and of all.
    fetch: [[HashMap<u64, u64, IntegerHash>; 2]; 2],
    /// Translations since the last flush of those that are not global, and of those that are.
    seen: [Seen; 2],
    /// Places of data entries that became known since they were last forgotten, some of them twice:
    /// pages of one address space, and of all.
    fills: [Vec<u32>; 2],
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
            known: vec![Known::default(); DATA_TABLES * ENTRIES].into_boxed_slice(),
            data,
            fetch: Default::default(),
            seen: Default::default(),
            fills: Default::default(),
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

    /// The guest-physical page of a linear one, if it is known for fetches.
    #[inline]
    pub(crate) fn known_fetch(&self, rights: usize, linear_page: u64) -> Option<u64> {
        let [local, global] = &self.fetch[usize::from(rights == rights::USER)];
        global.get(&linear_page).or_else(|| local.get(&linear_page)).copied()
    }

    /// Remembers a page that was walked for a fetch.
    pub(crate) fn learn_fetch(&mut self, rights: usize, linear_page: u64, found: Translation) {
        let tables = &mut self.fetch[usize::from(rights == rights::USER)];
        tables[usize::from(found.global)].insert(linear_page, found.page);
    }

    /// The guest-physical page of `linear`, if it is known for accesses with `rights`.
    pub(crate) fn known_data(&self, rights: usize, write: bool, linear: u64) -> Option<u64> {
        let page = linear & !(PAGE_BYTES - 1);
        let known = self.known[data_table(rights, write) * ENTRIES + index(page)];
        (known.tag == page + 1).then_some(known.page)
    }

    /// Remembers a page that was walked for an access. What was known in its place is not any more.
    pub(crate) fn learn_data(
        &mut self,
        rights: usize,
        write: bool,
        linear: u64,
        found: Translation,
    ) {
        let page = linear & !(PAGE_BYTES - 1);
        let place = data_table(rights, write) * ENTRIES + index(page);
        if self.fills.iter().any(|fills| fills.len() >= MAX_FILLS) {
            self.flush_data();
        }
        self.fills[usize::from(found.global)].push(place as u32);
        self.known[place] = Known { tag: page + 1, page: found.page };
        self.data[place].negated_tag = invalid(index(page));
    }

    /// Lets the page of `linear`, known for accesses with `rights`, be accessed at `host_page` without
    /// asking.
    pub(crate) fn permit(&mut self, rights: usize, write: bool, linear: u64, host_page: *mut u8) {
        let page = linear & !(PAGE_BYTES - 1);
        let addend = (host_page as u64).wrapping_sub(page);
        let place = data_table(rights, write) * ENTRIES + index(page);
        debug_assert_eq!(self.known[place].tag, page + 1);
        self.data[place] = Entry { negated_tag: page.wrapping_neg(), addend };
    }

    fn forget(&mut self, place: usize) {
        self.known[place].tag = 0;
        self.data[place].negated_tag = invalid(place % ENTRIES);
    }

    fn forget_fills(&mut self, global: usize) {
        let mut fills = std::mem::take(&mut self.fills[global]);
        fills.drain(..).for_each(|place| self.forget(place as usize));
        self.fills[global] = fills;
    }

    fn flush_data(&mut self) {
        self.forget_fills(0);
        self.forget_fills(1);
    }

    /// Forgets everything.
    pub(crate) fn flush(&mut self) {
        self.flush_data();
        self.fetch.iter_mut().flatten().for_each(HashMap::clear);
        self.seen.iter_mut().for_each(|seen| seen.large_regions.clear());
    }

    /// Forgets where code was fetched: whoever remembers it has forgotten it too.
    pub(crate) fn forget_code_pages(&mut self) {
        self.seen.iter_mut().for_each(|seen| seen.code_pages.clear());
    }

    /// Forgets what is not global, and where such code was fetched: whoever remembers it forgets it too.
    pub(crate) fn flush_local(&mut self) {
        self.forget_fills(0);
        self.fetch.iter_mut().for_each(|[local, _]| local.clear());
        self.seen[0].code_pages.clear();
        self.seen[0].large_regions.clear();
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
        for table in 0..NEVER_FILLED {
            self.forget(table * ENTRIES + index(linear));
        }
        let page = linear & !(PAGE_BYTES - 1);
        for table in self.fetch.iter_mut().flatten() {
            table.remove(&page);
        }
        self.seen.iter().any(|seen| seen.code_pages.contains(&(linear / PAGE_BYTES)))
    }

    /// Takes back every permission to write to `host_page` without asking: it has just become code.
    pub(crate) fn forbid_writes(&mut self, host_page: *mut u8) {
        for &place in self.fills.iter().flatten() {
            let place = place as usize;
            let write = place / ENTRIES % 2 == 1;
            let Entry { negated_tag, addend } = self.data[place];
            if write && negated_tag.wrapping_neg().wrapping_add(addend) == host_page as u64 {
                self.data[place].negated_tag = invalid(place % ENTRIES);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walked(page: u64, global: bool) -> Translation {
        Translation { page, large: false, global }
    }

    fn fill(tlb: &mut Tlb, linear: u64, host_page: u64, global: bool) {
        tlb.learn_data(rights::USER, true, linear, walked(0x9000, global));
        tlb.permit(rights::USER, true, linear, host_page as *mut u8);
    }

    fn filled(linear: u64, global: bool) -> Tlb {
        let mut tlb = Tlb::new().expect("the host has low memory");
        fill(&mut tlb, linear, 0x7000_0000, global);
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
        fill(&mut tlb, 0x6000, 0x7000_1000, true);
        tlb.flush_local();
        assert!(!hits(&tlb, 0x5000, 1) && hits(&tlb, 0x6000, 1));
        tlb.flush();
        assert!(!hits(&tlb, 0x6000, 1));
    }

    #[test]
    fn a_page_that_becomes_code_is_no_longer_written_without_asking() {
        let mut tlb = filled(0x5000, false);
        fill(&mut tlb, 0x6000, 0x7000_1000, true);
        tlb.forbid_writes(0x7000_0000 as *mut u8);
        assert!(!hits(&tlb, 0x5000, 1) && hits(&tlb, 0x6000, 1));
        assert_eq!(tlb.known_data(rights::USER, true, 0x5fff), Some(0x9000), "no new walk");
    }

    #[test]
    fn another_page_of_the_same_index_takes_the_place() {
        let mut tlb = filled(0x5000, false);
        tlb.learn_data(rights::USER, true, 0x1000_5000, walked(0xa000, false));
        assert!(!hits(&tlb, 0x5000, 1), "what is not known must not be hit");
        assert_eq!(tlb.known_data(rights::USER, true, 0x5000), None);
        assert_eq!(tlb.known_data(rights::USER, true, 0x1000_5000), Some(0xa000));
    }

    #[test]
    fn fetches_are_known_until_they_are_flushed() {
        let mut tlb = Tlb::new().expect("the host has low memory");
        for page in 0..5000 {
            tlb.learn_fetch(rights::SUPERVISOR, page << 12, walked(page << 13, page % 2 == 0));
        }
        let known = |tlb: &Tlb, page: u64| tlb.known_fetch(rights::SUPERVISOR, page << 12);
        assert!((0..5000).all(|page| known(&tlb, page) == Some(page << 13)));
        assert_eq!(tlb.known_fetch(rights::USER, 0), None);
        tlb.flush_local();
        assert!((0..5000).all(|page| known(&tlb, page).is_some() == (page % 2 == 0)));
        tlb.flush_page(2 << 12);
        assert_eq!((known(&tlb, 2), known(&tlb, 4)), (None, Some(4 << 13)));
        tlb.flush();
        assert_eq!(known(&tlb, 4), None);
    }

    #[test]
    fn any_number_of_fills_leaves_the_last_one() {
        let mut tlb = Tlb::new().expect("the host has low memory");
        for number in 0..3 * MAX_FILLS as u64 {
            let linear = number * PAGE_BYTES;
            fill(&mut tlb, linear, 0x7000_0000, number % 2 == 0);
            assert!(hits(&tlb, linear, 1));
        }
    }

    #[test]
    fn what_is_left_of_a_large_page_goes_with_it() {
        let mut tlb = Tlb::new().expect("the host has low memory");
        let large = Translation { page: 0, large: true, global: false };
        for _ in 0..=MAX_FILLS {
            tlb.note(0x4000_0000, large, false);
            tlb.learn_data(rights::USER, true, 0x4000_0000, large);
            tlb.permit(rights::USER, true, 0x4000_0000, 0x7000_0000 as *mut u8);
        }
        tlb.flush_page(0x4000_0000 + PAGE_BYTES);
        assert!(!hits(&tlb, 0x4000_0000, 1));
    }
}
