//! The software TLB as a checkpoint stores it: what is known, and nothing that follows from it.
//!
//! A machine that goes on from a checkpoint must meet the translations, stale ones too, that the machine
//! met from which it was taken: a walk that one makes and the other does not may find another page, and
//! sets accessed and dirty bits. Host addresses and where blocks were found are made anew as they are
//! needed, from what is known, which no guest can tell.

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};

use super::{ENTRIES, Known, MAX_FILLS, NEVER_FILLED, PAGE_BYTES, Tlb, index};
use crate::integer_hash::IntegerHash;

/// No guest-physical page lies higher.
const PHYSICAL_END: u64 = 1 << 52;

/// What is known of translations, in one order for one content.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TlbState {
    /// Places of data entries that became known since they were last forgotten: how many there are of
    /// them, some twice, decides when everything is forgotten.
    fills: [Vec<u32>; 2],
    /// Place, linear page and guest-physical page of what is known for data.
    data: Vec<(u32, u64, u64)>,
    /// Linear and guest-physical pages that are known for fetches.
    fetch: [[Vec<(u64, u64)>; 2]; 2],
    large_regions: [Vec<u64>; 2],
}

fn sorted<T: Ord>(items: impl IntoIterator<Item = T>) -> Vec<T> {
    let mut items: Vec<_> = items.into_iter().collect();
    items.sort_unstable();
    items
}

fn is_page(address: u64) -> bool {
    address.is_multiple_of(PAGE_BYTES)
}

impl TlbState {
    /// Whether the software TLB could have put all of it there, as far as its code relies on that.
    fn is_possible(&self) -> bool {
        let places = NEVER_FILLED * ENTRIES;
        let fetched = self.fetch.iter().flatten().flatten();
        let place_fits = |place: u32| (place as usize) < places;
        self.fills.iter().all(|fills| fills.len() <= MAX_FILLS)
            && self.fills.iter().flatten().all(|place| place_fits(*place))
            && self.data.len() <= 2 * MAX_FILLS
            && self.data.iter().all(|&(place, linear, _)| {
                place_fits(place)
                    && index(linear) == place as usize % ENTRIES
                    && self.fills.iter().any(|fills| fills.binary_search(&place).is_ok())
            })
            && self
                .data
                .iter()
                .map(|&(_, linear, page)| (linear, page))
                .chain(fetched.copied())
                .all(|(linear, page)| is_page(linear) && is_page(page) && page < PHYSICAL_END)
    }
}

impl Tlb {
    /// What is known.
    pub(crate) fn save(&self) -> TlbState {
        let fills = self.fills.each_ref().map(|fills| sorted(fills.iter().copied()));
        let mut places = fills.concat();
        places.sort_unstable();
        places.dedup();
        let known = |place: u32| {
            let Known { tag, page } = self.known[place as usize];
            (tag != 0).then(|| (place, tag - 1, page))
        };
        let pages = |table: &HashMap<u64, u64, IntegerHash>| {
            sorted(table.iter().map(|(linear, page)| (*linear, *page)))
        };
        TlbState {
            data: places.into_iter().filter_map(known).collect(),
            fills,
            fetch: self.fetch.each_ref().map(|tables| tables.each_ref().map(pages)),
            large_regions: self
                .seen
                .each_ref()
                .map(|seen| sorted(seen.large_regions.iter().copied())),
        }
    }

    /// Knows what was saved and nothing else; false, and nothing done, if no TLB ever knows that.
    pub(crate) fn load(&mut self, state: &TlbState) -> bool {
        if !state.is_possible() {
            return false;
        }
        self.flush();
        self.fills = state.fills.clone();
        for &(place, linear, page) in &state.data {
            self.known[place as usize] = Known { tag: linear + 1, page };
        }
        for (tables, saved) in self.fetch.iter_mut().zip(&state.fetch) {
            for (table, saved) in tables.iter_mut().zip(saved) {
                *table = saved.iter().copied().collect();
            }
        }
        for (global, seen) in self.seen.iter_mut().enumerate() {
            seen.large_regions = state.large_regions[global].iter().copied().collect();
            // Blocks will be found through what is known, and have to be forgotten with it.
            let fetched = state.fetch.iter().flat_map(|tables| &tables[global]);
            let pages: HashSet<u64> = fetched.map(|(linear, _)| linear / PAGE_BYTES).collect();
            seen.code_pages.extend(pages);
        }
        true
    }

    /// Whether code in the upper half of the address space is known through pages that are not global.
    pub(crate) fn knows_local_upper_code(&self) -> bool {
        self.fetch.iter().any(|[local, _]| local.keys().any(|linear| linear >> 63 != 0))
    }

    /// Takes back every permission to write without asking.
    pub(crate) fn forbid_all_writes(&mut self) {
        for place in self.fills.iter().flatten().map(|place| *place as usize) {
            if place / ENTRIES % 2 == 1 {
                self.data[place].negated_tag = super::invalid(place % ENTRIES);
            }
        }
    }
}
