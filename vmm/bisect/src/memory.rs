//! Pages of guest RAM that differ, and which of them are page tables.

use std::collections::BTreeMap;

use reprise_machine::paging::{ACCESSED, ADDRESS, DIRTY, LARGE, PRESENT};
use reprise_machine::ram::GuestRam;
use reprise_trace::checkpoint::PAGE_BYTES;
use reprise_trace::cpu_state::CpuState;
use reprise_trace::register_bits::{CR0_PG, CR4_PAE, EFER_LMA};
use serde::Serialize;

use crate::image::Page;

/// Bytes shown of each side.
const SHOWN_BYTES: usize = 16;

/// A page of guest RAM that differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PageDifference {
    /// Guest-physical address of the first byte that differs.
    pub address: u64,
    /// How many bytes of the page differ.
    pub bytes: usize,
    /// What stands there on the first side, in hexadecimal, up to sixteen bytes.
    pub a: String,
    /// What stands there on the second side.
    pub b: String,
    /// The page is a page table of the address space in force.
    pub table: Option<TableEntry>,
}

/// The entry of a page table in which the first difference lies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TableEntry {
    /// 1 for the tables that name pages, rising to the root.
    pub level: u32,
    /// The first linear address that the entry maps.
    pub linear: u64,
    /// The entry on the first side.
    pub a: u64,
    /// The entry on the second side.
    pub b: u64,
    /// Nothing in the page differs but accessed and dirty bits.
    pub only_accessed_or_dirty: bool,
}

impl TableEntry {
    /// Which of the bits that a page walk sets differ here, for a person.
    pub fn bits(&self) -> &'static str {
        match ((self.a ^ self.b) & ACCESSED != 0, (self.a ^ self.b) & DIRTY != 0) {
            (true, true) => "the accessed and the dirty bit",
            (true, false) => "the accessed bit",
            (false, true) => "the dirty bit",
            (false, false) => "neither",
        }
    }
}

/// Says how a page differs; `tables` are those of both sides' address spaces.
pub(crate) fn page_difference(
    address: u64,
    [a, b]: [&Page; 2],
    tables: &PageTables,
) -> Option<PageDifference> {
    let differing: Vec<usize> = (0..PAGE_BYTES).filter(|at| a[*at] != b[*at]).collect();
    let first = *differing.first()?;
    let shown = |page: &Page| {
        let end = PAGE_BYTES.min(first + SHOWN_BYTES);
        page[first..end].iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")
    };
    Some(PageDifference {
        address: address + first as u64,
        bytes: differing.len(),
        a: shown(a),
        b: shown(b),
        table: tables.entry(address, first, [a, b]),
    })
}

/// The page tables that CR3 leads to.
#[derive(Debug, Default)]
pub(crate) struct PageTables {
    /// By page: level from 0, and the first linear address that it maps.
    pages: BTreeMap<u64, (u32, u64)>,
    entry_bytes: usize,
    /// Bits of linear address below an entry's reach, by level.
    index_bits: u32,
}

impl PageTables {
    pub(crate) fn of(ram: &GuestRam, cpu: &CpuState) -> Self {
        if cpu.cr0 & CR0_PG == 0 {
            return Self::default();
        }
        let (levels, entry_bytes, index_bits, mask) =
            match (cpu.efer & EFER_LMA != 0, cpu.cr4 & CR4_PAE != 0) {
                (true, _) => (4, 8, 9, ADDRESS),
                (false, true) => (3, 8, 9, 0xffff_f000),
                (false, false) => (2, 4, 10, 0xffff_f000),
            };
        let mut tables = Self { pages: BTreeMap::new(), entry_bytes, index_bits };
        let mut open = vec![(cpu.cr3 & mask, levels - 1, 0)];
        while let Some((page, level, linear)) = open.pop() {
            if tables.pages.contains_key(&page)
                || !reprise_machine::paging::is_ram(ram, page, PAGE_BYTES)
            {
                continue;
            }
            tables.pages.insert(page, (level, linear));
            if level == 0 {
                continue;
            }
            let mut bytes = [0; PAGE_BYTES];
            ram.read(page, &mut bytes);
            for (index, entry) in bytes.chunks_exact(entry_bytes).map(word).enumerate() {
                let leaf = entry & LARGE != 0 && level <= 2;
                if entry & PRESENT != 0 && !leaf {
                    let reach = tables.linear(level, linear, index);
                    open.push((entry & ADDRESS, level - 1, reach));
                }
            }
        }
        tables
    }

    /// The first linear address that the entry `index` of a table maps.
    fn linear(&self, level: u32, table: u64, index: usize) -> u64 {
        let linear = table | (index as u64) << (12 + level * self.index_bits);
        // The upper half of 48 bits goes on to the top.
        if linear >> 47 & 1 != 0 { linear | 0xffff << 48 } else { linear }
    }

    fn entry(&self, page: u64, at: usize, [a, b]: [&Page; 2]) -> Option<TableEntry> {
        let &(level, linear) = self.pages.get(&page)?;
        let size = self.entry_bytes;
        let words = |page: &Page| page.chunks_exact(size).map(word).collect::<Vec<_>>();
        let (one, other) = (words(a), words(b));
        let walked = |(one, other): (&u64, &u64)| (one ^ other) & !(ACCESSED | DIRTY) == 0;
        let index = at / size;
        Some(TableEntry {
            level: level + 1,
            linear: self.linear(level, linear, index),
            a: one[index],
            b: other[index],
            only_accessed_or_dirty: one.iter().zip(&other).all(walked),
        })
    }
}

fn word(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CR3: u64 = 0x1000;

    /// Four levels of tables, a page each from 0x1000, that map linear 0xffff_8000_0000_3000.
    fn ram() -> GuestRam {
        let mut ram = GuestRam::new(4).expect("4 MiB");
        for (page, index, entry) in [
            (0x1000, 256, 0x2003_u64),
            (0x2000, 0, 0x3003),
            (0x3000, 0, 0x4003),
            (0x4000, 3, 0x9003),
        ] {
            let mut bytes = [0; PAGE_BYTES];
            bytes[index * 8..index * 8 + 8].copy_from_slice(&entry.to_le_bytes());
            assert!(ram.place(page, &bytes));
        }
        ram
    }

    fn cpu() -> CpuState {
        CpuState { cr0: CR0_PG | 1, cr3: CR3, efer: EFER_LMA, cr4: CR4_PAE, ..CpuState::default() }
    }

    fn page(ram: &GuestRam, address: u64) -> Page {
        let mut page = Box::new([0; PAGE_BYTES]);
        ram.read(address, &mut page[..]);
        page
    }

    #[test]
    fn a_bit_in_a_page_table_is_told_with_the_address_that_it_maps() {
        let ram = ram();
        let tables = PageTables::of(&ram, &cpu());
        let one = page(&ram, 0x4000);
        let mut other = one.clone();
        other[3 * 8] |= ACCESSED as u8;
        let found = page_difference(0x4000, [&one, &other], &tables).expect("they differ");
        assert_eq!((found.address, found.bytes), (0x4018, 1));
        let entry = found.table.expect("a table");
        assert_eq!((entry.level, entry.linear), (1, 0xffff_8000_0000_3000));
        assert!(entry.only_accessed_or_dirty);
        assert_eq!(entry.bits(), "the accessed bit");
        // Another bit beside makes it another matter.
        other[0x800] = 1;
        let found = page_difference(0x4000, [&one, &other], &tables).expect("they differ");
        assert!(!found.table.expect("a table").only_accessed_or_dirty);
        // A page that is no table is only bytes.
        let found = page_difference(0x9000, [&one, &other], &tables).expect("they differ");
        assert_eq!(found.table, None);
        assert_eq!(page_difference(0x4000, [&one, &one], &tables), None);
    }
}
