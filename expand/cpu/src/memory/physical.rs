//! Guest-physical memory as the CPU sees it: RAM by host pointer, and which of it holds decoded
//! code.
#![allow(unsafe_code)]

use reprise_machine::ram::{GuestRam, HOLE_END, HOLE_START};
use reprise_trace::instructions::SystemAccessKind;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::journal::{By, Journal};

/// Bytes of a page.
pub(crate) const PAGE_BYTES: u64 = 4096;
/// A page's code is tracked in chunks of this many bytes, one bit each.
const CHUNK_BYTES: u64 = PAGE_BYTES / 64;

/// A copy of RAM that is made while the guest runs on: what the guest is about to change is kept first.
#[derive(Debug, Default)]
struct Capture {
    /// For each page, whether it may have been written since the last capture started; `None` before the
    /// first.
    written: Option<Vec<bool>>,
    /// For each page, whether it is still to be shown, and unchanged.
    pending: Vec<bool>,
    /// No page before this one is pending.
    next: usize,
    /// Pages that changed before they were shown, by number, as they were.
    kept: Vec<(u64, Box<[u8; PAGE_BYTES as usize]>)>,
}

/// Set in a place that is a guest-physical address: of 52 bits, while a process has its memory in the
/// lower half of the host's address space.
const GUEST_PLACE: u64 = 1 << 63;

/// RAM, owned, and the map of decoded code in it.
#[derive(Debug)]
pub(crate) struct Physical {
    ram: GuestRam,
    /// Host address of guest-physical 0.
    low: *mut u8,
    /// Host address that guest-physical 0 would have, were the upper region continued down to it.
    high: *mut u8,
    ram_bytes: u64,
    /// For each page, which of its chunks hold decoded code.
    code_chunks: Vec<u64>,
    /// For each page, whether the software TLB may let it be written without asking.
    writes_permitted: Vec<bool>,
    capture: Capture,
    /// What is done to memory, if anybody wants to know.
    pub(crate) journal: Option<Box<Journal>>,
    /// Pages whose decoded code was written since the block cache last looked, with the chunks.
    code_written: Vec<(u64, u64)>,
    /// Pages whose every write is noted for whoever watches them; empty if nobody does.
    watched: Vec<bool>,
    /// Writes to them: address and bytes.
    watched_writes: Vec<(u64, u64)>,
}

// SAFETY: the pointers lead into the mapping that `ram` owns and moves with it; nothing else holds
// them, and every access goes through `&self` or `&mut self`.
unsafe impl Send for Physical {}

impl Physical {
    pub(crate) fn new(ram: GuestRam) -> Self {
        let host = |address: u64| {
            ram.memory()
                .get_host_address(GuestAddress(address))
                .expect("both RAM regions are mapped, as GuestRam::new made them")
        };
        let low = host(0);
        let high = host(HOLE_END).wrapping_sub(HOLE_END as usize);
        let ram_bytes = ram.ram_bytes();
        let pages = (ram_bytes / PAGE_BYTES) as usize;
        Self {
            ram,
            low,
            high,
            ram_bytes,
            code_chunks: vec![0; pages],
            writes_permitted: vec![false; pages],
            capture: Capture::default(),
            journal: None,
            code_written: Vec::new(),
            watched: Vec::new(),
            watched_writes: Vec::new(),
        }
    }

    pub(crate) fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The host address of a guest-physical page in RAM; `None` where there is no RAM.
    #[inline]
    pub(crate) fn host_page(&self, page: u64) -> Option<*mut u8> {
        debug_assert_eq!(page % PAGE_BYTES, 0);
        if page < HOLE_START {
            Some(self.low.wrapping_add(page as usize))
        } else if (HOLE_END..self.ram_bytes).contains(&page) {
            Some(self.high.wrapping_add(page as usize))
        } else {
            None
        }
    }

    /// Makes guest-physical addresses of places: each is a host address in RAM, as translated code has
    /// it, or what [`Physical::guest_place`] gave.
    pub(crate) fn to_guest(&self, places: &mut [u64]) {
        let (low, high) = (self.low as u64, self.high as u64);
        let high_bytes = self.ram_bytes - HOLE_END;
        for place in places {
            let in_high = place.wrapping_sub(high.wrapping_add(HOLE_END)) < high_bytes;
            let base = if in_high { high } else { low };
            let is_guest = *place & GUEST_PLACE != 0;
            *place = if is_guest { *place & !GUEST_PLACE } else { place.wrapping_sub(base) };
        }
    }

    /// A guest-physical address, of RAM or not, as a place that is no host address.
    pub(crate) fn guest_place(address: u64) -> u64 {
        address | GUEST_PLACE
    }

    /// Whether there is RAM at an address.
    pub(crate) fn is_ram(&self, address: u64) -> bool {
        self.host_page(address & !(PAGE_BYTES - 1)).is_some()
    }

    /// Reads bytes that lie within one page of RAM; false where there is no RAM.
    pub(crate) fn read(&self, address: u64, bytes: &mut [u8]) -> bool {
        let offset = address % PAGE_BYTES;
        assert!(offset + bytes.len() as u64 <= PAGE_BYTES, "a physical access stays in its page");
        let Some(page) = self.host_page(address - offset) else { return false };
        // SAFETY: `page` is a mapped page of PAGE_BYTES and the range was checked to lie in it;
        // `bytes` is a distinct Rust allocation.
        unsafe {
            std::ptr::copy_nonoverlapping(
                page.add(offset as usize),
                bytes.as_mut_ptr(),
                bytes.len(),
            );
        }
        true
    }

    /// Writes bytes that lie within one page of RAM, noting code overwritten; false where there is
    /// no RAM.
    pub(crate) fn write(&mut self, address: u64, bytes: &[u8]) -> bool {
        let offset = address % PAGE_BYTES;
        assert!(offset + bytes.len() as u64 <= PAGE_BYTES, "a physical access stays in its page");
        let Some(page) = self.host_page(address - offset) else { return false };
        self.before_write(address / PAGE_BYTES);
        // SAFETY: as in `read`.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), page.add(offset as usize), bytes.len());
        }
        self.note_write(address, bytes.len() as u64);
        true
    }

    /// The same by the CPU itself, which a journal has.
    pub(crate) fn write_for(
        &mut self,
        kind: SystemAccessKind,
        linear: Option<u64>,
        address: u64,
        bytes: &[u8],
    ) -> bool {
        let written = self.write(address, bytes);
        if written && let Some(journal) = &mut self.journal {
            journal.note(By::System(kind), linear, [address, 0], bytes);
        }
        written
    }

    /// Notes that a range within one page of RAM was written behind [`Physical::write`].
    pub(crate) fn note_write(&mut self, address: u64, size_bytes: u64) {
        let page = address / PAGE_BYTES;
        let code = self.code_chunks[page as usize];
        if self.is_watched(page) {
            self.watched_writes.push((address, size_bytes));
            // Ends the block behind the instruction.
            self.code_written.push((page * PAGE_BYTES, 0));
        }
        if code != 0 {
            let hit = code & chunk_mask(address % PAGE_BYTES, size_bytes);
            if hit != 0 {
                self.code_written.push((page * PAGE_BYTES, hit));
            }
        }
    }

    /// Whether writes to `page` need not be noted, since it holds no decoded code; if so, it is
    /// remembered that somebody relies on it.
    pub(crate) fn permit_writes(&mut self, page: u64) -> bool {
        let number = (page / PAGE_BYTES) as usize;
        let permit = self.code_chunks[number] == 0 && !self.is_watched(page / PAGE_BYTES);
        self.writes_permitted[number] |= permit;
        if permit {
            self.before_write(page / PAGE_BYTES);
        }
        permit
    }

    fn is_watched(&self, number: u64) -> bool {
        self.watched.get(number as usize).is_some_and(|watched| *watched)
    }

    /// Notes every write to a page, or no longer. The caller takes back every permission to write without
    /// asking.
    pub(crate) fn watch(&mut self, page: u64, watch: bool) {
        self.watched.resize(self.code_chunks.len(), false);
        let number = (page / PAGE_BYTES) as usize;
        self.watched[number] = watch;
        self.writes_permitted[number] &= !watch;
    }

    /// Whether there are writes that [`Physical::take_watched_writes`] gives.
    #[inline(always)]
    pub(crate) fn has_watched_writes(&self) -> bool {
        !self.watched_writes.is_empty()
    }

    /// Takes the writes to watched pages: address and bytes.
    pub(crate) fn take_watched_writes(&mut self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.watched_writes)
    }

    /// Takes them back.
    pub(crate) fn set_watched_writes(&mut self, writes: Vec<(u64, u64)>) {
        self.watched_writes = writes;
    }

    /// The page of this number is about to be written, or may be from now on.
    fn before_write(&mut self, number: u64) {
        let Some(written) = &mut self.capture.written else { return };
        written[number as usize] = true;
        if self.capture.pending[number as usize] {
            let mut page = Box::new([0; PAGE_BYTES as usize]);
            self.read(number * PAGE_BYTES, &mut page[..]);
            self.capture.pending[number as usize] = false;
            self.capture.kept.push((number, page));
        }
    }

    /// Remembers RAM as it is now, for [`Physical::continue_capture`]: all that was ever touched, or, if
    /// it was captured before, what may have been written since. The caller takes back every permission
    /// to write without asking.
    pub(crate) fn start_capture(&mut self) {
        self.writes_permitted.fill(false);
        let pages = self.code_chunks.len();
        self.capture.pending = match self.capture.written.replace(vec![false; pages]) {
            Some(written) => written,
            None => {
                let mut touched = vec![false; pages];
                self.ram.visit_touched(&mut |page| touched[(page / PAGE_BYTES) as usize] = true);
                touched
            }
        };
        self.capture.next = 0;
    }

    /// Shows at most so many more of the pages, as they were when the capture started. Gives whether
    /// that was all.
    pub(crate) fn continue_capture(
        &mut self,
        max_pages: usize,
        visit: &mut dyn FnMut(u64, &[u8]),
    ) -> bool {
        let mut left = max_pages;
        while left > 0
            && let Some((number, page)) = self.capture.kept.pop()
        {
            visit(number * PAGE_BYTES, &page[..]);
            left -= 1;
        }
        let mut page = [0; PAGE_BYTES as usize];
        while left > 0 && self.capture.next < self.capture.pending.len() {
            let number = self.capture.next;
            self.capture.next += 1;
            if std::mem::take(&mut self.capture.pending[number]) {
                self.read(number as u64 * PAGE_BYTES, &mut page);
                visit(number as u64 * PAGE_BYTES, &page);
                left -= 1;
            }
        }
        self.capture.kept.is_empty() && self.capture.next == self.capture.pending.len()
    }

    /// Keeps each page as it is before it is first written, for [`Physical::take_back_writes`]. Nobody is permitted
    /// yet to write without asking.
    pub(crate) fn keep_all(&mut self) {
        self.writes_permitted.fill(false);
        let pages = self.code_chunks.len();
        let (written, pending) = (Some(vec![false; pages]), vec![true; pages]);
        self.capture = Capture { written, pending, ..Capture::default() };
    }

    /// Undoes every write since [`Physical::keep_all`].
    pub(crate) fn take_back_writes(&mut self) {
        for (number, page) in std::mem::take(&mut self.capture.kept) {
            self.write(number * PAGE_BYTES, &page[..]);
        }
    }

    /// Marks a range within one page as decoded. Gives the page's host address if writes to it were
    /// permitted and no longer are.
    pub(crate) fn mark_code(&mut self, address: u64, size_bytes: u64) -> Option<*mut u8> {
        let page = (address / PAGE_BYTES) as usize;
        self.code_chunks[page] |= chunk_mask(address % PAGE_BYTES, size_bytes);
        let permitted = std::mem::take(&mut self.writes_permitted[page]);
        if permitted { self.host_page(page as u64 * PAGE_BYTES) } else { None }
    }

    /// Sets which chunks of a page hold decoded code, after some were invalidated.
    pub(crate) fn set_code(&mut self, page: u64, chunks: u64) {
        self.code_chunks[(page / PAGE_BYTES) as usize] = chunks;
    }

    /// Whether decoded code was overwritten since [`Physical::take_code_written`].
    #[inline(always)]
    pub(crate) fn code_was_written(&self) -> bool {
        !self.code_written.is_empty()
    }

    /// Takes the pages, with their chunks, whose decoded code was overwritten.
    pub(crate) fn take_code_written(&mut self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.code_written)
    }
}

/// The chunks that a range within one page touches.
pub(crate) fn chunk_mask(offset: u64, size_bytes: u64) -> u64 {
    let first = offset / CHUNK_BYTES;
    let last = (offset + size_bytes.max(1) - 1) / CHUNK_BYTES;
    let upto_last = if last >= 63 { u64::MAX } else { (1 << (last + 1)) - 1 };
    upto_last & !((1 << first) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_physical_address_stays_even_if_it_is_some_host_address() {
        let physical = Physical::new(GuestRam::new(16).expect("16 MiB"));
        let host = physical.host_page(0x5000).expect("RAM") as u64;
        let nowhere = physical.ram_bytes + 0x1234;
        let guest = [0x5008, nowhere, host, host + 0x123, physical.high as u64];
        let mut places: Vec<u64> = guest.into_iter().map(Physical::guest_place).collect();
        places.extend([host, host + 0x123]);
        physical.to_guest(&mut places);
        assert_eq!(places[..guest.len()], guest);
        assert_eq!(places[guest.len()..], [0x5000, 0x5123]);
    }
}
