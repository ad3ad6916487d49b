//! Which pages of this process's private memory were ever touched. What was not is zero, and need
//! not be looked at: looking would make the host find a page for it first.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// The size of the host's pages; the digest's as well.
pub(crate) const PAGE_BYTES: usize = 4096;
/// Bytes that `/proc/self/pagemap` has for each page.
const ENTRY_BYTES: usize = 8;
/// The page is in memory, or swapped out (bits 63 and 62; Linux's Documentation/admin-guide/mm/pagemap.rst).
const TOUCHED: u64 = 0b11 << 62;
/// Pages asked about at once.
const ENTRIES_AT_ONCE: usize = 4096;

/// The kernel's answers, a stretch of them at a time.
pub(crate) struct TouchedPages {
    /// `None` where the kernel does not say: then every page counts as touched.
    pagemap: Option<File>,
    entries: Vec<u8>,
    /// The page number of the first entry, and how many there are.
    first: usize,
    count: usize,
}

impl TouchedPages {
    /// Asks the kernel whether it answers, and answers right.
    pub(crate) fn new() -> Self {
        let pagemap = File::open("/proc/self/pagemap").ok();
        // Filled, so that it is touched itself.
        let entries = vec![0xff; ENTRIES_AT_ONCE * ENTRY_BYTES];
        let mut pages = Self { pagemap, entries, first: 0, count: 0 };
        // A system that only plays Linux may have the file and nothing in it.
        if !pages.is_touched(pages.entries.as_ptr() as usize) {
            pages.pagemap = None;
        }
        pages
    }

    /// Whether the page at this address of this process, which is private and not a file's, may
    /// hold anything but zeros.
    pub(crate) fn is_touched(&mut self, address: usize) -> bool {
        let page = address / PAGE_BYTES;
        if !(self.first..self.first + self.count).contains(&page) {
            self.read_from(page);
        }
        let at = page.wrapping_sub(self.first).wrapping_mul(ENTRY_BYTES);
        match self.entries.get(at..).and_then(<[u8]>::first_chunk) {
            Some(entry) if self.pagemap.is_some() => u64::from_le_bytes(*entry) & TOUCHED != 0,
            _ => true,
        }
    }

    fn read_from(&mut self, page: usize) {
        let Some(pagemap) = &self.pagemap else { return };
        let offset = (page * ENTRY_BYTES) as u64;
        match pagemap.read_at(&mut self.entries, offset) {
            Ok(bytes) if bytes >= ENTRY_BYTES => {
                (self.first, self.count) = (page, bytes / ENTRY_BYTES);
            }
            _ => self.pagemap = None,
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

    use super::*;

    #[test]
    fn a_page_is_touched_when_it_has_been_written() {
        let mut pages = TouchedPages::new();
        if pages.pagemap.is_none() {
            eprintln!("skipped: this host has no /proc/self/pagemap");
            return;
        }
        let bytes = 3 * ENTRIES_AT_ONCE * PAGE_BYTES;
        let memory: GuestMemoryMmap =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)]).expect("memory");
        let start = memory.iter().next().expect("a region").as_ptr() as usize;
        let written = [1, 4095, 4096, 3 * ENTRIES_AT_ONCE - 1];
        for page in written {
            memory.write_obj(1_u8, GuestAddress((page * PAGE_BYTES) as u64)).expect("in memory");
        }
        for page in 0..3 * ENTRIES_AT_ONCE {
            let touched = pages.is_touched(start + page * PAGE_BYTES);
            assert!(touched || !written.contains(&page), "page {page}");
        }
        let touched = (0..3 * ENTRIES_AT_ONCE)
            .filter(|page| pages.is_touched(start + page * PAGE_BYTES))
            .count();
        // A host that gives huge pages unasked touches their neighbours, but not all of 48 MiB.
        assert!(touched < 2 * ENTRIES_AT_ONCE, "{touched} pages");
    }

    #[test]
    fn without_answers_every_page_counts_as_touched() {
        let mut pages = TouchedPages { pagemap: None, ..TouchedPages::new() };
        assert!(pages.is_touched(0) && pages.is_touched(usize::MAX));
    }
}
