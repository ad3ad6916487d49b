//! Accessed bits of the guest's page tables, set aside where hardware ran the guest.
//!
//! A CPU may set an accessed bit for a translation that the program never uses (Intel 64 and IA-32
//! Architectures Software Developer's Manual, volume 3A, 4.8: speculation), so two runs of one guest on
//! hardware lawfully differ in them, and in nothing else of RAM. Dirty bits are not among them: only a
//! write that retires sets one. What is set aside is bit 5 of the present entries in page tables, and no
//! other bit; every one of them counts as set.
//!
//! Those are the tables that CR3 leads to, and those of other processes, in which CR3 may have led to early
//! bits before: kernels map themselves in the upper half of each address space, so a page that has an
//! entry of the current root's upper half where that has it is another root. Accessed bits decide
//! nothing of this, so that two runs which differ in them alone find the same tables.

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

    /// Those that CR3 leads to, and those of address spaces with the same kernel. Costs two passes over the
    /// guest RAM that was ever touched, the second with a look at few entries of each page.
    pub(crate) fn of<E: Engine>(engine: &mut E) -> Result<Self, EngineError> {
        let state = engine.cpu_state()?;
        let Some((format, root)) = format_of(&state) else { return Ok(Self::none()) };
        let mut there = BTreeSet::new();
        engine.visit_ram(&mut |start, piece| {
            there.extend((start..start + piece.len() as u64).step_by(PAGE_BYTES));
        });
        // By page, the levels at which it is a table: one page may serve at several.
        let mut found: BTreeMap<u64, u32> = BTreeMap::new();
        let roots = others_like(engine, &there, format, root).into_iter().chain([root]);
        let mut open: Vec<(u64, u32)> = roots.map(|root| (root, format.levels - 1)).collect();
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

/// The roots of address spaces that share an entry of the upper half with this one.
fn others_like<E: Engine>(
    engine: &E,
    there: &BTreeSet<u64>,
    format: Format,
    root: u64,
) -> BTreeSet<u64> {
    let mut others = BTreeSet::new();
    // With PAE the root is four entries, which lie anywhere.
    if format.levels == 3 || !there.contains(&root) {
        return others;
    }
    let mut bytes = [0; PAGE_BYTES];
    engine.read_ram(root, &mut bytes);
    let upper_half = PAGE_BYTES / format.entry_bytes / 2;
    let kernel: Vec<(usize, u64)> = entries(&bytes, format.entry_bytes)
        .enumerate()
        .skip(upper_half)
        .filter(|(_, entry)| entry & PRESENT != 0)
        .map(|(index, entry)| (index, entry | ACCESSED))
        .collect();
    engine.visit_ram(&mut |start, piece| {
        for (address, page) in (start..).step_by(PAGE_BYTES).zip(piece.chunks_exact(PAGE_BYTES)) {
            let shares = |(index, entry): &(usize, u64)| {
                entry_at(page, *index, format.entry_bytes) | ACCESSED == *entry
            };
            if kernel.iter().any(shares) {
                others.insert(address);
            }
        }
    });
    others
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
    (0..page.len() / entry_bytes).map(move |index| entry_at(page, index, entry_bytes))
}

fn entry_at(page: &[u8], index: usize, entry_bytes: usize) -> u64 {
    let mut entry = [0; 8];
    entry[..entry_bytes].copy_from_slice(&page[index * entry_bytes..][..entry_bytes]);
    u64::from_le_bytes(entry)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paging::{DIRTY, write_ram};
    use crate::ram::{GuestRam, MIN_RAM_MIB};
    use crate::standing::Standing;

    const ROOT: u64 = 0x1000;
    const OTHER_ROOT: u64 = 0x2000;
    const KERNEL: u64 = 0x3000;
    /// The other address space's own tables, from the top, and no table.
    const OTHERS: [u64; 3] = [0x4000, 0x5000, 0x6000];
    const DATA: u64 = 0x7000;

    /// Two address spaces with one kernel, CR3 leading to the first; bits are added to entries.
    fn counted(more: &[(u64, u64)]) -> Vec<Vec<u8>> {
        let ram = GuestRam::new(MIN_RAM_MIB).expect("the host has memory");
        let [directory_pointers, directory, table] = OTHERS;
        let entries = [
            (ROOT + 511 * 8, KERNEL | PRESENT),
            (OTHER_ROOT + 511 * 8, KERNEL | PRESENT),
            (OTHER_ROOT, directory_pointers | PRESENT),
            (directory_pointers + 8, directory | PRESENT),
            (directory + 16, table | PRESENT),
            (table + 24, DATA | PRESENT),
            (DATA, PRESENT),
        ];
        for (address, entry) in entries {
            let of = |(at, bits): &(u64, u64)| if *at == address { *bits } else { 0 };
            let bits = more.iter().map(of).fold(0, |all, bits| all | bits);
            write_ram(&ram, address, &(entry | bits).to_le_bytes());
        }
        let (cr0, cr4, efer) = (CR0_PG, CR4_PAE, EFER_LMA);
        let state = CpuState { cr0, cr3: ROOT, cr4, efer, ..CpuState::default() };
        let mut memory = Standing { tick: 0, state, ram };
        let tables = PageTables::of(&mut memory).expect("it does not fail");
        let mut pages = Vec::new();
        memory.visit_ram(&mut |start, piece| {
            for (address, page) in (start..).step_by(PAGE_BYTES).zip(piece.chunks(PAGE_BYTES)) {
                pages.push(tables.as_counted(address, page, &mut [0; PAGE_BYTES]).to_vec());
            }
        });
        pages
    }

    #[test]
    fn tables_of_other_processes_have_their_accessed_bits_set_aside() {
        let plain = counted(&[]);
        let [directory_pointers, directory, table] = OTHERS;
        let entries = [
            ROOT + 511 * 8,
            OTHER_ROOT + 511 * 8,
            OTHER_ROOT,
            directory_pointers + 8,
            directory + 16,
            table + 24,
        ];
        for entry in entries {
            assert!(counted(&[(entry, ACCESSED)]) == plain, "the one at {entry:#x}");
            assert!(counted(&[(entry, DIRTY)]) != plain, "the one at {entry:#x}");
        }
        assert!(counted(&[(DATA, ACCESSED)]) != plain, "data is no table");
    }
}
