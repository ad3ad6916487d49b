//! The software TLB: translations that have been walked, checked for rights, and found to be RAM.

use super::physical::PAGE_BYTES;
use super::walk::Translation;

/// Entries of one table; a power of two.
const ENTRIES: usize = 1024;
/// A tag that no page address equals.
const INVALID: u64 = 1;

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

#[derive(Clone, Copy, Debug)]
struct Entry {
    /// Linear page address, or [`INVALID`].
    tag: u64,
    /// Host address of the page minus its linear address.
    addend: u64,
}

type Table = [Entry; ENTRIES];

const EMPTY: Table = [Entry { tag: INVALID, addend: 0 }; ENTRIES];

/// Read, write and fetch translations, apart by rights.
#[derive(Debug)]
pub(crate) struct Tlb {
    read: [Table; 4],
    write: [Table; 4],
    /// Fetches: the addend is the guest-physical page instead.
    fetch: [Table; 4],
    /// Which linear addresses translations since the last flush came from.
    seen: Seen,
    /// Pages whose entries a change of address space forgets, some of them twice.
    local_pages: Vec<u64>,
}

/// So many local pages, and forgetting everything is quicker.
const MAX_LOCAL_PAGES: usize = 2048;

/// A coarse memory of translated addresses, so that forgetting one page can be cheap: a set bit may
/// stand for others too, a clear one is sure.
#[derive(Debug, Default)]
struct Seen {
    /// Pages that code was fetched through, even if their entries are gone.
    code_pages: [u64; 16],
    /// 4 MiB regions that have a part of a large page in a table.
    large_regions: [u64; 16],
}

/// The word and bit of a page or region number.
fn seen_bit(number: u64) -> (usize, u64) {
    let hash = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54;
    (hash as usize / 64, 1 << (hash % 64))
}

const LARGE_REGION_BYTES: u64 = 4 << 20;

#[inline(always)]
fn index(linear: u64) -> usize {
    (linear / PAGE_BYTES) as usize % ENTRIES
}

/// The entry's host address for `size` bytes at `linear`, all in its page. One compare does it: if
/// the last byte lies in the next page, that page's number is another modulo ENTRIES, so its address
/// is not the tag of the first one's entry.
#[inline(always)]
fn hit(table: &Table, linear: u64, size: u64) -> Option<u64> {
    let entry = &table[index(linear)];
    let last_page = linear.wrapping_add(size - 1) & !(PAGE_BYTES - 1);
    if entry.tag == last_page { Some(linear.wrapping_add(entry.addend)) } else { None }
}

impl Tlb {
    pub(crate) fn new() -> Box<Self> {
        Box::new(Self {
            read: [EMPTY; 4],
            write: [EMPTY; 4],
            fetch: [EMPTY; 4],
            seen: Seen::default(),
            local_pages: Vec::new(),
        })
    }

    #[inline(always)]
    pub(crate) fn hit_read(&self, rights: usize, linear: u64, size: u64) -> Option<*mut u8> {
        hit(&self.read[rights & 3], linear, size).map(|address| address as *mut u8)
    }

    #[inline(always)]
    pub(crate) fn hit_write(&self, rights: usize, linear: u64, size: u64) -> Option<*mut u8> {
        hit(&self.write[rights & 3], linear, size).map(|address| address as *mut u8)
    }

    /// The guest-physical address of a byte to fetch.
    #[inline]
    pub(crate) fn hit_fetch(&self, rights: usize, linear: u64) -> Option<u64> {
        hit(&self.fetch[rights & 3], linear, 1)
    }

    pub(crate) fn fill_read(&mut self, rights: usize, linear_page: u64, host_page: *mut u8) {
        let addend = (host_page as u64).wrapping_sub(linear_page);
        self.read[rights][index(linear_page)] = Entry { tag: linear_page, addend };
    }

    pub(crate) fn fill_write(&mut self, rights: usize, linear_page: u64, host_page: *mut u8) {
        let addend = (host_page as u64).wrapping_sub(linear_page);
        self.write[rights][index(linear_page)] = Entry { tag: linear_page, addend };
    }

    pub(crate) fn fill_fetch(&mut self, rights: usize, linear_page: u64, physical_page: u64) {
        let addend = physical_page.wrapping_sub(linear_page);
        self.fetch[rights][index(linear_page)] = Entry { tag: linear_page, addend };
    }

    /// Forgets everything.
    pub(crate) fn flush(&mut self) {
        for tables in [&mut self.read, &mut self.write, &mut self.fetch] {
            tables[..rights::NONE].fill(EMPTY);
        }
        self.seen.large_regions = [0; 16];
        self.local_pages.clear();
    }

    /// Forgets where code was fetched: whoever remembers it has forgotten it too.
    pub(crate) fn forget_code_pages(&mut self) {
        self.seen.code_pages = [0; 16];
    }

    /// Forgets what is not global.
    pub(crate) fn flush_local(&mut self) {
        if self.local_pages.len() > MAX_LOCAL_PAGES {
            return self.flush();
        }
        for &page in &self.local_pages {
            for tables in [&mut self.read, &mut self.write, &mut self.fetch] {
                for table in &mut tables[..rights::NONE] {
                    let entry = &mut table[index(page)];
                    if entry.tag == page {
                        entry.tag = INVALID;
                    }
                }
            }
        }
        self.local_pages.clear();
    }

    /// Notes where a translation came from.
    pub(crate) fn note(&mut self, linear: u64, found: Translation, fetch: bool) {
        if !found.global && self.local_pages.len() <= MAX_LOCAL_PAGES {
            self.local_pages.push(linear & !(PAGE_BYTES - 1));
        }
        if fetch {
            let (word, bit) = seen_bit(linear / PAGE_BYTES);
            self.seen.code_pages[word] |= bit;
        }
        if found.large {
            let (word, bit) = seen_bit(linear / LARGE_REGION_BYTES);
            self.seen.large_regions[word] |= bit;
        }
    }

    /// Forgets one page, which may be a large one: then everything goes, since the tables hold any
    /// number of pieces of it. Gives whether code may have been fetched through it.
    pub(crate) fn flush_page(&mut self, linear: u64) -> bool {
        let (word, bit) = seen_bit(linear / LARGE_REGION_BYTES);
        if self.seen.large_regions[word] & bit != 0 {
            self.flush();
            return true;
        }
        for tables in [&mut self.read, &mut self.write, &mut self.fetch] {
            for table in tables {
                table[index(linear)].tag = INVALID;
            }
        }
        let (word, bit) = seen_bit(linear / PAGE_BYTES);
        self.seen.code_pages[word] & bit != 0
    }

    /// Forgets every permission to write without asking: a page has just become code.
    pub(crate) fn flush_writes(&mut self) {
        self.write[..rights::NONE].fill(EMPTY);
    }
}
