//! What is done to memory, for a trace with values: each load and store by instructions with its bytes and
//! where they lie, and each write by the CPU itself, in order. Kept from instruction to instruction.

use reprise_trace::instructions::SystemAccessKind;

use super::physical::PAGE_BYTES;

/// Who accesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    /// An instruction reads.
    Load,
    /// An instruction writes.
    Store,
    /// The CPU writes by itself.
    System(SystemAccessKind),
}

/// An access.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub(crate) by: By,
    /// A page walk's has none.
    pub(crate) linear: Option<u64>,
    /// Guest-physical addresses of its first byte and of its first byte in a second page.
    places: [u64; 2],
    first_byte: u32,
    pub(crate) size_bytes: u16,
}

/// Accesses in order.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    entries: Vec<Entry>,
    bytes: Vec<u8>,
}

impl Entry {
    /// How far from its first byte the byte at `linear` lies; `None` if outside.
    fn offset_of(&self, linear: u64) -> Option<usize> {
        let offset = linear.wrapping_sub(self.linear?);
        (offset < u64::from(self.size_bytes)).then_some(offset as usize)
    }

    /// The guest-physical address of the byte at `linear`; `None` if that lies outside.
    pub(crate) fn physical_of(&self, linear: u64) -> Option<u64> {
        let offset = self.offset_of(linear)? as u64;
        let in_first = PAGE_BYTES - self.places[0] % PAGE_BYTES;
        Some(match offset.checked_sub(in_first) {
            None => self.places[0] + offset,
            Some(behind) => self.places[1] + behind,
        })
    }

    /// Its guest-physical address.
    pub(crate) fn physical(&self) -> u64 {
        self.places[0]
    }

    /// Its pieces that lie in one page each and have at most eight bytes: offset, guest-physical address,
    /// bytes.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = (usize, u64, usize)> + use<> {
        let (size, places) = (usize::from(self.size_bytes), self.places);
        let in_first = size.min((PAGE_BYTES - places[0] % PAGE_BYTES) as usize);
        let parts = [(0, in_first, places[0]), (in_first, size, places[1])];
        parts.into_iter().flat_map(|(from, to, place)| {
            let starts = (from..to).step_by(8);
            starts.map(move |at| (at, place + (at - from) as u64, (to - at).min(8)))
        })
    }
}

impl Journal {
    /// Notes an access. It has at most 65535 bytes.
    pub(crate) fn note(&mut self, by: By, linear: Option<u64>, places: [u64; 2], bytes: &[u8]) {
        let first_byte = self.bytes.len() as u32;
        self.bytes.extend_from_slice(bytes);
        let size_bytes = bytes.len() as u16;
        self.entries.push(Entry { by, linear, places, first_byte, size_bytes });
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Forgets all and keeps the memory.
    pub(crate) fn clear(&mut self) {
        self.entries.clear();
        self.bytes.clear();
    }

    pub(crate) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    pub(crate) fn bytes_of(&self, entry: &Entry) -> &[u8] {
        let first = entry.first_byte as usize;
        &self.bytes[first..first + usize::from(entry.size_bytes)]
    }

    /// The entry of this kind that has exactly this place, if there is one: its number and bytes.
    pub(crate) fn exactly(&self, by: By, linear: u64, size_bytes: u16) -> Option<(usize, &[u8])> {
        let fits = |entry: &Entry| {
            entry.by == by && entry.linear == Some(linear) && entry.size_bytes == size_bytes
        };
        let number = self.entries.iter().rposition(fits)?;
        Some((number, self.bytes_of(&self.entries[number])))
    }

    /// The byte that was loaded from, or last stored to, a place.
    pub(crate) fn byte(&self, by: By, linear: u64) -> Option<u8> {
        let at = |entry: &Entry| Some(self.bytes_of(entry)[entry.offset_of(linear)?]);
        self.entries.iter().rev().filter(|entry| entry.by == by).find_map(at)
    }
}
