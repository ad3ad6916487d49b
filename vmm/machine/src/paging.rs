//! The guest's page tables, walked from outside: for messages that show the bytes at RIP, and for
//! what the step clock does in KVM's place.
//!
//! Formats: AMD64 APM volume 2, chapter 5. Linear addresses of 32-bit modes wrap at 4 GiB.

use reprise_trace::cpu_state::CpuState;
use reprise_trace::register_bits::{CR0_PG, CR0_WP, CR4_PAE, CR4_PSE, EFER_LMA};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::ram::GuestRam;

/// The entry leads somewhere.
pub const PRESENT: u64 = 1;
/// Writes are allowed.
pub const WRITABLE: u64 = 1 << 1;
/// User code may go through.
pub const USER: u64 = 1 << 2;
/// A translation went through.
pub const ACCESSED: u64 = 1 << 5;
/// The page was written.
pub const DIRTY: u64 = 1 << 6;
/// A large page, where the level has those.
pub const LARGE: u64 = 1 << 7;
/// Code there may not be executed.
pub const NO_EXECUTE: u64 = 1 << 63;
/// Where the entry leads, but for a large page's lowest bits.
pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Which paging is on, and where its tables start.
#[derive(Clone, Copy, Debug)]
pub struct Paging {
    /// Control register 0.
    pub cr0: u64,
    /// Control register 3.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// Extended feature enable register.
    pub efer: u64,
}

impl From<&CpuState> for Paging {
    fn from(state: &CpuState) -> Self {
        Self { cr0: state.cr0, cr3: state.cr3, cr4: state.cr4, efer: state.efer }
    }
}

/// One mapping, as far as the page of one linear address goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mapping {
    /// Guest-physical address of the byte asked for.
    pub physical: u64,
    /// Every level allows writing.
    pub writable: bool,
    /// Every level allows CPL3.
    pub user: bool,
    /// Some level forbids executing.
    pub no_execute: bool,
    /// Guest-physical addresses of the entries that were used, the last one of the page itself;
    /// zero where there is none.
    entries: [u64; 4],
}

/// A paging mode: levels from the top, bits of index a level, bytes an entry.
struct Format {
    levels: u32,
    index_bits: u32,
    entry_bytes: u32,
    root: u64,
    large_at: fn(u32, u64) -> bool,
}

impl Paging {
    fn format(&self) -> Format {
        if self.cr4 & CR4_PAE == 0 {
            return Format {
                levels: 2,
                index_bits: 10,
                entry_bytes: 4,
                root: self.cr3 & 0xffff_f000,
                large_at: |level, cr4| level == 1 && cr4 & CR4_PSE != 0,
            };
        }
        let large_at = |level: u32, _| level == 1 || level == 2;
        if self.efer & EFER_LMA == 0 {
            return Format {
                levels: 3,
                index_bits: 9,
                entry_bytes: 8,
                root: self.cr3 & 0xffff_ffe0,
                large_at,
            };
        }
        Format { levels: 4, index_bits: 9, entry_bytes: 8, root: self.cr3 & ADDRESS, large_at }
    }

    /// Where `linear` lies, if it is mapped and the tables lie in RAM.
    pub fn walk(&self, ram: &GuestRam, linear: u64) -> Option<Mapping> {
        if self.cr0 & CR0_PG == 0 {
            let physical = linear & 0xffff_ffff;
            return Some(Mapping { physical, writable: true, user: true, ..Mapping::default() });
        }
        let format = self.format();
        let mut mapping = Mapping { writable: true, user: true, ..Mapping::default() };
        let mut table = format.root;
        for level in (0..format.levels).rev() {
            let shift = 12 + level * format.index_bits;
            let index = linear >> shift & ((1 << format.index_bits) - 1);
            let address = table + index * u64::from(format.entry_bytes);
            let entry = read_entry(ram, address, format.entry_bytes)?;
            if entry & PRESENT == 0 {
                return None;
            }
            mapping.entries[level as usize] = address;
            mapping.no_execute |= entry & NO_EXECUTE != 0;
            // The top entries of 32-bit PAE carry no rights.
            if format.levels != 3 || level != 2 {
                mapping.writable &= entry & WRITABLE != 0;
                mapping.user &= entry & USER != 0;
            }
            let large = (format.large_at)(level, self.cr4) && entry & LARGE != 0;
            if level == 0 || large {
                let offset_mask = (1u64 << shift) - 1;
                mapping.physical = entry & ADDRESS & !offset_mask | linear & offset_mask;
                return Some(mapping);
            }
            table = entry & ADDRESS;
        }
        None
    }

    /// Whether supervisor code may write through `mapping`.
    pub fn supervisor_may_write(&self, mapping: &Mapping) -> bool {
        mapping.writable || self.cr0 & CR0_WP == 0
    }

    /// Sets the accessed bits of a mapping that is used, and the dirty bit if it is written, as the
    /// CPU does.
    pub fn mark_used(&self, ram: &GuestRam, mapping: &Mapping, written: bool) {
        let mut leaf = true;
        for address in mapping.entries.into_iter().filter(|address| *address != 0) {
            let dirty = if leaf && written { DIRTY } else { 0 };
            leaf = false;
            let Some(low) = read_entry(ram, address, 4) else { continue };
            let used = low | ACCESSED | dirty;
            if used != low {
                write_ram(ram, address, &(used as u32).to_le_bytes());
            }
        }
    }

    /// Reads guest memory at a linear address; false if any of it is not mapped to RAM.
    pub fn read(&self, ram: &GuestRam, linear: u64, bytes: &mut [u8]) -> bool {
        self.read_prefix(ram, linear, bytes) == bytes.len()
    }

    /// Reads as much of `bytes` as is mapped to RAM without a gap; gives how much.
    pub fn read_prefix(&self, ram: &GuestRam, linear: u64, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        while done < bytes.len() {
            let at = linear.wrapping_add(done as u64);
            let to_page_end = 0x1000 - (at & 0xfff) as usize;
            let end = bytes.len().min(done + to_page_end);
            let piece = &mut bytes[done..end];
            let Some(mapping) = self.walk(ram, at) else { break };
            if !is_ram(ram, mapping.physical, piece.len()) {
                break;
            }
            ram.read(mapping.physical, piece);
            done = end;
        }
        done
    }
}

/// Whether a whole range is RAM.
pub fn is_ram(ram: &GuestRam, physical: u64, length: usize) -> bool {
    ram.memory().check_range(GuestAddress(physical), length)
}

/// Writes guest RAM; the caller has checked the range.
pub fn write_ram(ram: &GuestRam, physical: u64, bytes: &[u8]) {
    ram.memory().write_slice(bytes, GuestAddress(physical)).expect("range lies in guest RAM");
}

fn read_entry(ram: &GuestRam, address: u64, entry_bytes: u32) -> Option<u64> {
    let mut entry = [0; 8];
    let bytes = &mut entry[..entry_bytes as usize];
    if !is_ram(ram, address, bytes.len()) {
        return None;
    }
    ram.read(address, bytes);
    Some(u64::from_le_bytes(entry))
}
