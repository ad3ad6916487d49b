//! Which pages and cache lines a trace touches, in all and in each interval.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasherDefault, Hasher};

use reprise_trace::instructions::filter::page_table_root;

/// Pages, in bytes.
pub(super) const PAGE_BYTES: u64 = 4096;
/// Cache lines, in bytes: 64 of them are a page.
pub(super) const LINE_BYTES: u64 = 64;
/// Bits of a line's number within all linear addresses, at most 57 bits wide.
const LINE_BITS: u32 = 51;
/// All bits of such an address.
const LINEAR_MASK: u64 = (LINE_BYTES << LINE_BITS) - 1;
/// Lines that a small table remembers, so that most accesses need no search.
const RECENT_LINES: usize = 1 << 12;

/// A count of distinct pages and lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Distinct {
    pub(super) pages: u64,
    pub(super) lines: u64,
}

/// A page's lines, a bit each.
#[derive(Clone, Copy, Debug)]
struct PageUse {
    /// The interval that `now` belongs to.
    interval: u32,
    now: u64,
    ever: u64,
}

/// Mixes numbers that are no attacker's to choose in a way that matters: they are counted only.
#[derive(Default)]
pub(super) struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u64(&mut self, number: u64) {
        let mixed = (self.0 ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ mixed >> 32;
    }
}

/// A map by numbers.
pub(super) type NumberMap<V> = HashMap<u64, V, BuildHasherDefault<NumberHasher>>;

/// Pages and lines touched.
#[derive(Debug)]
pub(super) struct Footprint {
    pages: NumberMap<PageUse>,
    /// Lines touched in this interval, each plus one, at the place that its low bits say.
    recent: Vec<u64>,
    interval: u32,
    /// In this interval.
    pub(super) now: Distinct,
    /// From the beginning.
    pub(super) ever: Distinct,
}

impl Default for Footprint {
    fn default() -> Self {
        Self {
            pages: NumberMap::default(),
            recent: vec![0; RECENT_LINES],
            interval: 0,
            now: Distinct::default(),
            ever: Distinct::default(),
        }
    }
}

impl Footprint {
    /// Counts an access of `size_bytes` at a place: see [`Spaces::place`].
    #[inline]
    pub(super) fn touch(&mut self, place: u64, size_bytes: u64) {
        let first = place / LINE_BYTES;
        let last = place.saturating_add(size_bytes.saturating_sub(1)) / LINE_BYTES;
        for line in first..=last {
            let recent = &mut self.recent[line as usize % RECENT_LINES];
            if *recent != line + 1 {
                *recent = line + 1;
                self.touch_line(line);
            }
        }
    }

    fn touch_line(&mut self, line: u64) {
        let interval = self.interval;
        let (page, bit) = (line / 64, 1 << (line % 64));
        let used = match self.pages.entry(page) {
            Entry::Occupied(used) => used.into_mut(),
            Entry::Vacant(place) => {
                self.ever.pages += 1;
                self.now.pages += 1;
                place.insert(PageUse { interval, now: 0, ever: 0 })
            }
        };
        if used.interval != interval {
            *used = PageUse { interval, now: 0, ever: used.ever };
            self.now.pages += 1;
        }
        self.now.lines += u64::from(used.now & bit == 0);
        self.ever.lines += u64::from(used.ever & bit == 0);
        used.now |= bit;
        used.ever |= bit;
    }

    /// The next interval begins.
    pub(super) fn next_interval(&mut self) {
        self.interval += 1;
        self.now = Distinct::default();
        self.recent.fill(0);
    }
}

/// Tells the user halves of address spaces apart: processes use the same linear addresses.
#[derive(Debug, Default)]
pub(super) struct Spaces {
    numbers: NumberMap<u64>,
    current: u64,
}

impl Spaces {
    /// CR3 has this value from here on.
    pub(super) fn enter(&mut self, cr3: u64) {
        let next = self.numbers.len() as u64;
        self.current = *self.numbers.entry(page_table_root(cr3)).or_insert(next);
    }

    /// Address spaces so far.
    pub(super) fn count(&self) -> u64 {
        self.numbers.len() as u64
    }

    /// Where an access at a linear address counts: by its physical address where that is known, else
    /// by address space and linear address, the kernel's half being the same in all.
    #[inline]
    pub(super) fn place(&self, linear: u64, physical: Option<u64>) -> u64 {
        match physical {
            Some(physical) => physical,
            None if linear >> 63 == 1 => linear & LINEAR_MASK,
            None => {
                // Seven bits: what is beyond 128 address spaces shares numbers with those before.
                let space = self.current % 128;
                (linear & LINEAR_MASK) ^ (space << (LINE_BITS + 6))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_pages_count_once_an_interval_and_once_in_all() {
        let mut footprint = Footprint::default();
        footprint.touch(0x1000, 8);
        footprint.touch(0x1008, 8);
        footprint.touch(0x103c, 8);
        footprint.touch(0x1ffc, 8);
        assert_eq!(footprint.now, Distinct { pages: 2, lines: 4 });
        footprint.next_interval();
        footprint.touch(0x1000, 1);
        footprint.touch(0x9000, 1);
        // Another line at the same place of the small table, and the first again.
        footprint.touch(0x1000 + LINE_BYTES * RECENT_LINES as u64, 1);
        footprint.touch(0x1000, 1);
        assert_eq!(footprint.now, Distinct { pages: 3, lines: 3 });
        assert_eq!(footprint.ever, Distinct { pages: 4, lines: 6 });
    }

    #[test]
    fn processes_share_the_kernel_and_nothing_else() {
        let mut spaces = Spaces::default();
        let (user, kernel) = (0x40_1234, 0xffff_ffff_8100_0040);
        let mut places = Vec::new();
        for cr3 in [0x1000, 0x2000, 0x8000_0000_0000_1fff] {
            spaces.enter(cr3);
            places.push((spaces.place(user, None), spaces.place(kernel, None)));
        }
        assert!(places[0].0 != places[1].0 && places[0].1 == places[1].1);
        assert_eq!(places[0], places[2], "PCID and the no-flush bit are no part of it");
        assert_eq!(spaces.count(), 2);
        assert_eq!(spaces.place(user, Some(0x5678)), 0x5678);
    }
}
