//! Accessed bits of the guest's page tables, set aside where hardware ran the guest.
//!
//! A CPU may set an accessed bit for a translation that the program never uses (Intel 64 and IA-32
//! Architectures Software Developer's Manual, volume 3A, 4.8: speculation), so two runs of one guest on
//! hardware lawfully differ in them, and in nothing else of RAM. Dirty bits are not among them: only a
//! write that retires sets one. What is set aside is bit 5 of the present entries in the tables that
//! CR3 leads to, and no other bit; every one of them counts as set.

use std::collections::{BTreeMap, BTreeSet};

use reprise_trace::cpu_state::CpuState;
use reprise_trace::register_bits::{CR0_PG, CR4_PAE, EFER_LMA};

use crate::engine::{Engine, EngineError};
use crate::paging::{ACCESSED, ADDRESS, LARGE, PRESENT};
use crate::touched::PAGE_BYTES;

/// The tables of the paging mode in force.
#[derive(Clone, Copy)]
struct Format {
    levels: u32,
    entry_bytes: usize,
}

/// Where page tables lie, and how they read.
pub(crate) struct PageTables {
    pages: BTreeSet<u64>,
    entry_bytes: usize,
}

impl PageTables {
    /// None: nothing is set aside.
    pub(crate) fn none() -> Self {
        Self { pages: BTreeSet::new(), entry_bytes: 8 }
    }

    /// Those that CR3 leads to. Costs a pass over the guest RAM that was ever touched.
    pub(crate) fn of<E: Engine>(engine: &mut E) -> Result<Self, EngineError> {
        let state = engine.cpu_state()?;
        let Some((format, root)) = format_of(&state) else { return Ok(Self::none()) };
        let mut there = BTreeSet::new();
        engine.visit_ram(&mut |start, piece| {
            there.extend((start..start + piece.len() as u64).step_by(PAGE_BYTES));
        });
        // By page, the levels at which it is a table: one page may serve at several.
        let mut found: BTreeMap<u64, u32> = BTreeMap::new();
        let mut open = vec![(root, format.levels - 1)];
        while let Some((page, level)) = open.pop() {
            let levels = found.entry(page).or_default();
            if !there.contains(&page) || *levels & 1 << level != 0 {
                continue;
            }
            *levels |= 1 << level;
            if level > 0 {
                let mut bytes = [0; PAGE_BYTES];
                engine.read_ram(page, &mut bytes);
                let tables = entries(&bytes, format.entry_bytes).filter(|entry| {
                    let leaf = entry & LARGE != 0 && level <= 2;
                    entry & PRESENT != 0 && !leaf
                });
                open.extend(tables.map(|entry| (entry & ADDRESS, level - 1)));
            }
        }
        let pages = found.into_iter().filter(|(_, levels)| *levels != 0).map(|(page, _)| page);
        Ok(Self { pages: pages.collect(), entry_bytes: format.entry_bytes })
    }

    /// The page at `address` as it counts: itself unless it is a table.
    pub(crate) fn as_counted<'a>(
        &self,
        address: u64,
        page: &'a [u8],
        room: &'a mut [u8; PAGE_BYTES],
    ) -> &'a [u8] {
        if !self.pages.contains(&address) || page.len() != PAGE_BYTES {
            return page;
        }
        room.copy_from_slice(page);
        for entry in room.chunks_exact_mut(self.entry_bytes) {
            if u64::from(entry[0]) & PRESENT != 0 {
                entry[0] |= ACCESSED as u8;
            }
        }
        room
    }
}

fn format_of(state: &CpuState) -> Option<(Format, u64)> {
    if state.cr0 & CR0_PG == 0 {
        return None;
    }
    let page_of = |cr3: u64, mask: u64| cr3 & mask & !(PAGE_BYTES as u64 - 1);
    Some(if state.efer & EFER_LMA != 0 {
        (Format { levels: 4, entry_bytes: 8 }, page_of(state.cr3, ADDRESS))
    } else if state.cr4 & CR4_PAE != 0 {
        (Format { levels: 3, entry_bytes: 8 }, page_of(state.cr3, 0xffff_ffff))
    } else {
        (Format { levels: 2, entry_bytes: 4 }, page_of(state.cr3, 0xffff_ffff))
    })
}

fn entries(page: &[u8], entry_bytes: usize) -> impl Iterator<Item = u64> + '_ {
    page.chunks_exact(entry_bytes).map(|bytes| {
        let mut entry = [0; 8];
        entry[..bytes.len()].copy_from_slice(bytes);
        u64::from_le_bytes(entry)
    })
}
