//! Accessed bits of the guest's page tables, set aside where hardware ran the guest.
//!
//! A CPU may set an accessed bit for a translation that the program never uses (Intel 64 and IA-32
//! Architectures Software Developer's Manual, volume 3A, 4.8: speculation), so two runs of one guest on
//! hardware lawfully differ in them, and, as long as it looks at none, in nothing else of RAM. Dirty bits are
//! not among them: only a write that retires sets one. What is set aside is bit 5 of the present entries in page
//! tables, and no other bit; every one of them counts as set.
//!
//! Those are the tables that CR3 leads to, and those of other processes, in which CR3 may have led to early
//! bits before: kernels map themselves in the upper half of each address space, so a page that has every
//! entry of the current root's upper half where that has it, and none that no root can have, is another
//! root. With page table isolation an address space has two roots, side by side, which share their user half
//! and a part of the kernel's (`companion`); then the roots like either are. Accessed bits decide nothing
//! of this, so that two runs which differ in them alone find the same tables.

use std::collections::{BTreeMap, BTreeSet};

use reprise_trace::cpu_state::CpuState;
use reprise_trace::register_bits::{CR0_PG, CR4_PAE, EFER_LMA};

use crate::engine::{Engine, EngineError};
use crate::paging::{ACCESSED, ADDRESS, LARGE, NO_EXECUTE, PRESENT};
use crate::touched::PAGE_BYTES;

/// The tables of the paging mode in force.
#[derive(Clone, Copy)]
struct Format {
    levels: u32,
    entry_bytes: usize,
}

/// Where page tables lie, and how they read.
#[derive(Debug)]
pub struct PageTables {
    pages: BTreeSet<u64>,
    entry_bytes: usize,
}

impl PageTables {
    /// None: nothing is set aside.
    pub(crate) fn none() -> Self {
        Self { pages: BTreeSet::new(), entry_bytes: 8 }
    }

    /// Those that CR3 leads to and, unless `current_alone`, those of address spaces with the same kernel. Costs
    /// two passes over the guest RAM that was ever touched, the second with a look at few entries of each page.
    ///
    /// # Errors
    /// If the engine cannot tell its CPU's state.
    pub fn of<E: Engine>(engine: &mut E, current_alone: bool) -> Result<Self, EngineError> {
        let state = engine.cpu_state()?;
        let Some((format, root)) = format_of(&state) else { return Ok(Self::none()) };
        let mut there = BTreeSet::new();
        engine.visit_ram(&mut |start, piece| {
            // Which pages of zeros are shown besides is the engine's affair.
            let pages = (start..).step_by(PAGE_BYTES).zip(piece.chunks(PAGE_BYTES));
            let with_content = pages.filter(|(_, page)| page.iter().any(|byte| *byte != 0));
            there.extend(with_content.map(|(address, _)| address));
        });
        // By page, the levels at which it is a table: one page may serve at several.
        let mut found: BTreeMap<u64, u32> = BTreeMap::new();
        let others = match current_alone {
            true => BTreeSet::new(),
            false => others_like(engine, &there, format, root),
        };
        let roots = others.into_iter().chain([root]);
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

    /// Whether an entry of one of these tables begins at a guest-physical address.
    pub fn is_entry(&self, address: u64) -> bool {
        let page = address & !(PAGE_BYTES as u64 - 1);
        self.pages.contains(&page) && address.is_multiple_of(self.entry_bytes as u64)
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

/// The roots of address spaces with the kernel of this one.
fn others_like<E: Engine>(
    engine: &E,
    there: &BTreeSet<u64>,
    format: Format,
    root: u64,
) -> BTreeSet<u64> {
    // With PAE the root is four entries, which lie anywhere.
    if format.levels == 3 || !there.contains(&root) {
        return BTreeSet::new();
    }
    let last = there.last().copied().unwrap_or_default();
    let read = |page: u64| {
        let mut bytes = [0; PAGE_BYTES];
        engine.read_ram(page, &mut bytes);
        bytes
    };
    let bytes = read(root);
    let companion = Some(root ^ PAGE_BYTES as u64)
        .filter(|page| there.contains(page))
        .map(read)
        .filter(|other| format.are_companions(&bytes, other, last));
    // What a page has to have for each kind of root.
    let kernels: Vec<_> = [Some(bytes), companion]
        .into_iter()
        .flatten()
        .map(|root| format.kernel_entries(&root))
        .filter(|kernel| !kernel.is_empty())
        .collect();
    let mut others = BTreeSet::new();
    engine.visit_ram(&mut |start, piece| {
        for (address, page) in (start..).step_by(PAGE_BYTES).zip(piece.chunks_exact(PAGE_BYTES)) {
            let has = |(index, entry): &(usize, u64)| {
                entry_at(page, *index, format.entry_bytes) | ACCESSED == *entry
            };
            let is_like = kernels.iter().any(|kernel| kernel.iter().all(has));
            if is_like && format.may_be_root(page, last) {
                others.insert(address);
            }
        }
    });
    others
}

impl Format {
    /// The first entry of the kernel's part: the upper half, of four levels; the last quarter of 32-bit
    /// addresses, since kernels leave the third one to processes.
    fn kernel_starts_at(self) -> usize {
        let entries = PAGE_BYTES / self.entry_bytes;
        if self.levels == 4 { entries / 2 } else { entries / 4 * 3 }
    }

    /// The present entries of a root's kernel part, accessed.
    fn kernel_entries(self, root: &[u8]) -> Vec<(usize, u64)> {
        present(root, self.entry_bytes)
            .filter(|(index, _)| *index >= self.kernel_starts_at())
            .map(|(index, entry)| (index, entry | ACCESSED))
            .collect()
    }

    /// Whether all entries of a page are ones that a root can have: present ones lead to tables, none of
    /// which lies behind the `last` page with content, or, where it maps pages of 4 MiB, anywhere.
    fn may_be_root(self, page: &[u8], last: u64) -> bool {
        present(page, self.entry_bytes).all(|(_, entry)| match entry & LARGE != 0 {
            // Reserved in a root of four levels.
            true => self.levels == 2,
            false => entry & ADDRESS <= last,
        })
    }

    /// Whether two roots side by side are one address space's: they share the user half, which the kernel's
    /// root may forbid to execute, and the kernel's part of one is in places a part of the other's, with an
    /// entry at least in common (Linux: `arch/x86/mm/pti.c`).
    fn are_companions(self, root: &[u8], other: &[u8], last: u64) -> bool {
        let user = |page: &[u8]| -> Vec<(usize, u64)> {
            present(page, self.entry_bytes)
                .filter(|(index, _)| *index < self.kernel_starts_at())
                .map(|(index, entry)| (index, entry & !NO_EXECUTE | ACCESSED))
                .collect()
        };
        let (one, two) = (self.kernel_entries(root), self.kernel_entries(other));
        let has_place = |of: &[(usize, u64)], index| of.iter().any(|(there, _)| *there == index);
        let within = |small: &[(usize, u64)], large: &[(usize, u64)]| {
            small.iter().all(|(index, _)| has_place(large, *index))
        };
        let common = one.iter().any(|entry| two.contains(entry));
        let in_places = within(&one, &two) || within(&two, &one);
        common && in_places && user(root) == user(other) && self.may_be_root(other, last)
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
    (0..page.len() / entry_bytes).map(move |index| entry_at(page, index, entry_bytes))
}

/// The present ones, with their numbers.
fn present(page: &[u8], entry_bytes: usize) -> impl Iterator<Item = (usize, u64)> + '_ {
    entries(page, entry_bytes).enumerate().filter(|(_, entry)| entry & PRESENT != 0)
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
    const LAST: u64 = 0x3f_f000;

    /// The kernel's entries: one here, one there.
    const KERNEL_ENTRIES: [u64; 2] = [256 * 8, 511 * 8];

    /// RAM of these entries as it counts, CR3 leading to the first root; `more` is added to the entry there.
    fn counted_of(entries: &[(u64, u64)], more: &[(u64, u64)]) -> Vec<Vec<u8>> {
        counted_from(ROOT, entries, more)
    }

    /// The same, CR3 leading elsewhere.
    fn counted_from(root: u64, entries: &[(u64, u64)], more: &[(u64, u64)]) -> Vec<Vec<u8>> {
        let ram = GuestRam::new(MIN_RAM_MIB).expect("the host has memory");
        for (address, entry) in entries {
            let of = |(at, bits): &(u64, u64)| if at == address { *bits } else { 0 };
            let bits = more.iter().map(of).fold(0, |all, bits| all | bits);
            write_ram(&ram, *address, &(entry | bits).to_le_bytes());
        }
        let (cr0, cr4, efer) = (CR0_PG, CR4_PAE, EFER_LMA);
        let state = CpuState { cr0, cr3: root, cr4, efer, ..CpuState::default() };
        let mut memory = Standing { tick: 0, state, ram };
        let tables = PageTables::of(&mut memory, false).expect("it does not fail");
        let mut pages = Vec::new();
        memory.visit_ram(&mut |start, piece| {
            for (address, page) in (start..).step_by(PAGE_BYTES).zip(piece.chunks(PAGE_BYTES)) {
                pages.push(tables.as_counted(address, page, &mut [0; PAGE_BYTES]).to_vec());
            }
        });
        pages
    }

    /// A root with these kernel entries.
    fn kernel_of(root: u64, places: &[u64]) -> Vec<(u64, u64)> {
        places
            .iter()
            .map(|place| (root + place, (KERNEL + (place << 1 & ADDRESS)) | PRESENT))
            .collect()
    }

    /// Two address spaces with one kernel.
    fn two_processes() -> Vec<(u64, u64)> {
        let [directory_pointers, directory, table] = OTHERS;
        let mut entries = kernel_of(ROOT, &KERNEL_ENTRIES);
        entries.extend(kernel_of(OTHER_ROOT, &KERNEL_ENTRIES));
        entries.extend([
            (OTHER_ROOT, directory_pointers | PRESENT),
            (directory_pointers + 8, directory | PRESENT),
            (directory + 16, table | PRESENT),
            (table + 24, DATA | PRESENT),
            (DATA, PRESENT),
            // The last page with content.
            (LAST, 2),
        ]);
        entries
    }

    fn counts_accessed_bit_of(entries: &[(u64, u64)], at: u64) -> bool {
        counted_of(entries, &[(at, ACCESSED)]) != counted_of(entries, &[])
    }

    #[test]
    fn tables_of_other_processes_have_their_accessed_bits_set_aside() {
        let all = two_processes();
        for (entry, _) in all.iter().filter(|(address, _)| *address < DATA) {
            assert!(!counts_accessed_bit_of(&all, *entry), "the one at {entry:#x}");
            let dirty = counted_of(&all, &[(*entry, DIRTY)]);
            assert!(dirty != counted_of(&all, &[]), "the one at {entry:#x}");
        }
        assert!(counts_accessed_bit_of(&all, DATA), "data is no table");
    }

    #[test]
    fn data_that_shares_a_word_with_the_root_is_no_root() {
        let mut all = two_processes();
        all.extend(kernel_of(DATA, &KERNEL_ENTRIES[1..]));
        assert!(counts_accessed_bit_of(&all, DATA));
        assert!(counts_accessed_bit_of(&all, DATA + KERNEL_ENTRIES[1]));
    }

    #[test]
    fn what_was_a_root_and_has_words_that_none_can_have_is_none() {
        let mut all = two_processes();
        all.extend(kernel_of(DATA, &KERNEL_ENTRIES));
        for impossible in
            [(LAST + PAGE_BYTES as u64) | PRESENT, KERNEL | LARGE | PRESENT, 0x4141_4141_4141]
        {
            let mut all = all.clone();
            assert!(!counts_accessed_bit_of(&all, DATA), "so far it is like one");
            all.push((DATA + 40, impossible));
            assert!(counts_accessed_bit_of(&all, DATA), "{impossible:#x}");
        }
    }

    #[test]
    fn roots_of_user_mode_alone_are_those_like_the_current_ones_companion() {
        const USER: u64 = PAGE_BYTES as u64;
        let (root, other) = (0x8000, 0xa000);
        let user = OTHERS[0] | PRESENT;
        let mut all = Vec::new();
        for root in [root, other] {
            all.extend(kernel_of(root, &KERNEL_ENTRIES));
            all.extend(kernel_of(root + USER, &KERNEL_ENTRIES[1..]));
            all.extend([(root, user | NO_EXECUTE), (root + USER, user)]);
        }
        all.push((OTHERS[0], OTHERS[1] | PRESENT));
        all.push((LAST, 2));
        let counted = |more: &[(u64, u64)]| counted_from(root, &all, more);
        for entry in [root, root + USER, other, other + USER, other + USER + KERNEL_ENTRIES[1]] {
            assert!(counted(&[(entry, ACCESSED)]) == counted(&[]), "the one at {entry:#x}");
        }
    }
}
