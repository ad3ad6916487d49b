//! Page walks: linear to guest-physical addresses, with rights, accessed and dirty bits.

use reprise_devices::cpu_model::PHYSICAL_ADDRESS_BITS;
use reprise_machine::paging::{ACCESSED, DIRTY, LARGE, PRESENT, USER, WRITABLE};
use reprise_trace::instructions::{MAX_WALK_ENTRIES, PageWalk, SystemAccessKind, WalkCause};

use super::physical::Physical;
use crate::cpu::{
    CR0_PG, CR0_WP, CR4_PAE, CR4_PGE, CR4_PSE, CR4_SMAP, CR4_SMEP, EFER_LMA, EFER_NXE,
};
use crate::fault::{Fault, vector};

/// What an access wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Fetch,
}

/// What paging depends on.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Paging {
    pub(crate) cr0: u64,
    pub(crate) cr3: u64,
    pub(crate) cr4: u64,
    pub(crate) efer: u64,
}

/// Who accesses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Accessor {
    pub(crate) user: bool,
    /// A supervisor data access to a user page faults (SMAP applies).
    pub(crate) user_pages_forbidden: bool,
}

const GLOBAL: u64 = 1 << 8;
const NO_EXECUTE: u64 = 1 << 63;

/// The shape of one paging mode.
struct Shape {
    /// Levels from the root down; for each, the lowest linear-address bit of its index.
    shifts: &'static [u32],
    /// Bits of an index.
    index_bits: u32,
    /// Bytes of an entry.
    entry_bytes: u64,
}

const FOUR_LEVEL: Shape = Shape { shifts: &[39, 30, 21, 12], index_bits: 9, entry_bytes: 8 };
const PAE: Shape = Shape { shifts: &[30, 21, 12], index_bits: 9, entry_bytes: 8 };
const TWO_LEVEL: Shape = Shape { shifts: &[22, 12], index_bits: 10, entry_bytes: 4 };

/// A page's translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Translation {
    /// The guest-physical page.
    pub(crate) page: u64,
    /// It is part of a 2 MiB or 4 MiB page, which INVLPG forgets as a whole.
    pub(crate) large: bool,
    /// It is the same in all address spaces (the G bit, where CR4.PGE heeds it).
    pub(crate) global: bool,
}

/// Where a walk ended.
struct Leaf {
    physical_page: u64,
    /// All rights bits ANDed (WRITABLE, USER), and NO_EXECUTE ORed.
    rights: u64,
}

/// What a walk read on its way.
#[derive(Debug, Default)]
pub(crate) struct Path {
    /// Entries, with their physical addresses, root first.
    entries: [(u64, u64); MAX_WALK_ENTRIES],
    /// How many.
    count: usize,
    /// In which of them it set a bit.
    marked: u8,
}

impl Path {
    /// What a trace has of it; `None` if nothing was read.
    pub(crate) fn walk(
        &self,
        paging: &Paging,
        (linear, kind): (u64, Kind),
        page: Option<u64>,
    ) -> Option<PageWalk> {
        (self.count > 0).then(|| PageWalk {
            cause: match kind {
                Kind::Read => WalkCause::Read,
                Kind::Write => WalkCause::Write,
                Kind::Fetch => WalkCause::Fetch,
            },
            linear,
            root_level: paging.shape().shifts.len() as u8,
            entry_count: self.count as u8,
            entries: self.entries.map(|(address, _)| address),
            marked: self.marked,
            page,
        })
    }
}

impl Paging {
    fn shape(&self) -> &'static Shape {
        if self.efer & EFER_LMA != 0 {
            &FOUR_LEVEL
        } else if self.cr4 & CR4_PAE != 0 {
            &PAE
        } else {
            &TWO_LEVEL
        }
    }

    /// Bits that must be zero in an entry of a 64-bit-entry mode, whatever its level.
    fn reserved(&self) -> u64 {
        let above_physical = (1 << 52) - (1u64 << PHYSICAL_ADDRESS_BITS);
        let no_execute = if self.efer & EFER_NXE == 0 { NO_EXECUTE } else { 0 };
        let outside_long = if self.efer & EFER_LMA == 0 { 0x7ff << 52 } else { 0 };
        above_physical | no_execute | outside_long
    }

    /// Translates the page of `linear`, setting accessed and dirty bits. `path`, empty at first, gets what
    /// was read.
    pub(crate) fn translate(
        &self,
        memory: &mut Physical,
        linear: u64,
        kind: Kind,
        accessor: Accessor,
        path: &mut Path,
    ) -> Result<Translation, Fault> {
        if self.cr0 & CR0_PG == 0 {
            return Ok(Translation { page: linear & 0xffff_f000, large: false, global: false });
        }
        // An access that starts below the canonical boundary may end beyond it.
        if self.efer & EFER_LMA != 0 && !canonical(linear) {
            return Err(Fault::GP0);
        }
        let leaf = self
            .walk(memory, linear, path)
            .map_err(|code| self.fault(linear, code, kind, accessor))?;
        if !self.allowed(leaf.rights, kind, accessor) {
            return Err(self.fault(linear, PRESENT as u32, kind, accessor));
        }
        self.mark(memory, path, kind);
        let large = path.count < self.shape().shifts.len();
        let (_, last_entry) = path.entries[path.count - 1];
        let global = last_entry & GLOBAL != 0 && self.cr4 & CR4_PGE != 0;
        Ok(Translation { page: leaf.physical_page, large, global })
    }

    /// The guest-physical page of `linear` as the tables have it now, whatever the rights, without a trace
    /// in them.
    pub(crate) fn look(&self, memory: &Physical, linear: u64) -> Option<u64> {
        if self.cr0 & CR0_PG == 0 {
            return Some(linear & 0xffff_f000);
        }
        if self.efer & EFER_LMA != 0 && !canonical(linear) {
            return None;
        }
        self.walk(memory, linear, &mut Path::default()).ok().map(|leaf| leaf.physical_page)
    }

    fn walk(&self, memory: &Physical, linear: u64, path: &mut Path) -> Result<Leaf, u32> {
        const RESERVED_CODE: u32 = 1 << 3 | PRESENT as u32;
        let shape = self.shape();
        let legacy = shape.entry_bytes == 4;
        let mut table = match shape.shifts.len() {
            4 => self.cr3 & 0x000f_ffff_ffff_f000,
            3 => self.cr3 & 0xffff_ffe0,
            _ => self.cr3 & 0xffff_f000,
        };
        let mut rights = WRITABLE | USER;
        let last = shape.shifts.len() - 1;
        for (level, &shift) in shape.shifts.iter().enumerate() {
            let index = linear >> shift & ((1 << shape.index_bits) - 1);
            // The PAE root has four entries only: the linear address has 32 bits.
            let index = if shift == 30 && last == 2 { index & 3 } else { index };
            let address = table + index * shape.entry_bytes;
            let mut bytes = [0xff; 8];
            let there = memory.read(address, &mut bytes[..shape.entry_bytes as usize]);
            let mut entry = u64::from_le_bytes(bytes);
            if legacy {
                entry &= 0xffff_ffff;
            }
            (path.entries[level], path.count) = ((address, entry), level + 1);
            if !there {
                return Err(RESERVED_CODE);
            }
            if entry & PRESENT == 0 {
                return Err(0);
            }
            // The PAE root's entries carry no rights, and their rights bits are reserved.
            let pae_root = last == 2 && level == 0;
            if pae_root {
                if entry & (self.reserved() | NO_EXECUTE | 0x1e6) != 0 {
                    return Err(RESERVED_CODE);
                }
            } else {
                if !legacy && entry & self.reserved() != 0 {
                    return Err(RESERVED_CODE);
                }
                rights = rights & entry | (rights | entry) & NO_EXECUTE;
            }
            let large_allowed = !legacy || self.cr4 & CR4_PSE != 0;
            let large = entry & LARGE != 0 && level != last && large_allowed && !pae_root;
            if large && (shift == 39 || shift == 30) {
                return Err(RESERVED_CODE); // No 1 GiB pages in the CPU model.
            }
            if level == last || large {
                // The CPU model has no PSE-36, so the address bits below a large page's own are
                // reserved in every mode; bit 12 is PAT.
                let in_page = (1u64 << shift) - 1;
                if large && entry & in_page & !0x1fff != 0 {
                    return Err(RESERVED_CODE);
                }
                let frame = entry & 0x000f_ffff_ffff_f000 & !in_page;
                let physical_page = frame | linear & in_page & !0xfff;
                return Ok(Leaf { physical_page, rights });
            }
            table = entry & 0x000f_ffff_ffff_f000;
        }
        unreachable!("the last level is a leaf")
    }

    fn allowed(&self, rights: u64, kind: Kind, accessor: Accessor) -> bool {
        let user_page = rights & USER != 0;
        if accessor.user && !user_page {
            return false;
        }
        match kind {
            Kind::Fetch => {
                let smep = self.cr4 & CR4_SMEP != 0 && !accessor.user && user_page;
                rights & NO_EXECUTE == 0 && !smep
            }
            Kind::Read => !(accessor.user_pages_forbidden && user_page && !accessor.user),
            Kind::Write => {
                let protected = accessor.user || self.cr0 & CR0_WP != 0;
                let forbidden = accessor.user_pages_forbidden && user_page && !accessor.user;
                !forbidden && (rights & WRITABLE != 0 || !protected)
            }
        }
    }

    fn fault(&self, linear: u64, cause: u32, kind: Kind, accessor: Accessor) -> Fault {
        let mut code = cause;
        if kind == Kind::Write {
            code |= WRITABLE as u32;
        }
        if accessor.user {
            code |= USER as u32;
        }
        // No-execute exists in the formats with 64-bit entries only.
        let no_execute = self.efer & EFER_NXE != 0 && self.cr4 & CR4_PAE != 0;
        let execute_faults = no_execute || self.cr4 & CR4_SMEP != 0;
        if kind == Kind::Fetch && execute_faults {
            code |= 1 << 4;
        }
        Fault { vector: vector::PF, error_code: Some(code), page_fault_address: Some(linear) }
    }

    /// Sets accessed bits along the path and, for a write, the leaf's dirty bit.
    fn mark(&self, memory: &mut Physical, path: &mut Path, kind: Kind) {
        let shape = self.shape();
        for (level, &(address, entry)) in path.entries[..path.count].iter().enumerate() {
            if shape.shifts.len() == 3 && level == 0 {
                continue; // The PAE root has no accessed bits.
            }
            let mut wanted = entry | ACCESSED;
            if level + 1 == path.count && kind == Kind::Write {
                wanted |= DIRTY;
            }
            if wanted != entry {
                let bytes = &wanted.to_le_bytes()[..shape.entry_bytes as usize];
                memory.write_for(SystemAccessKind::WalkWrite, None, address, bytes);
                path.marked |= 1 << level;
            }
        }
    }

    /// Whether SMAP is on.
    pub(crate) fn smap(&self) -> bool {
        self.cr4 & CR4_SMAP != 0
    }
}

/// Whether a linear address is canonical under 48-bit addressing.
#[inline(always)]
pub(crate) fn canonical(linear: u64) -> bool {
    (linear as i64) << 16 >> 16 == linear as i64
}
