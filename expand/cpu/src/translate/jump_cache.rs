//! Where indirect jumps find their target's code: by linear address, for one mode.
#![allow(unsafe_code)]

use super::assembler::{Assembler, at, indexed};
use super::registers::{ADDEND, ADDRESS, SCRATCH};
use crate::memory::low_memory::{AnyBytes, LowMemory};

/// As many entries as a 16-bit index tells apart.
const ENTRIES: usize = 1 << 16;
/// Entries noted as in use, and all are forgotten: addresses of the two halves may take turns at one.
const MAX_USED: usize = 2 * ENTRIES;
/// Bits of the target that the index leaves out: few branch targets differ only in them.
const INDEX_SHIFT: u8 = 1;

#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Entry {
    /// Minus the target's linear address, or [`invalid`].
    negated_linear: u64,
    code: u64,
}

// SAFETY: two integers.
unsafe impl AnyBytes for Entry {}

/// What no target with this index matches: minus an address of another index.
fn invalid(index: usize) -> u64 {
    (((index ^ 1) as u64) << INDEX_SHIFT).wrapping_neg()
}

#[inline(always)]
fn index(linear: u64) -> usize {
    (linear >> INDEX_SHIFT) as usize % ENTRIES
}

/// Targets of indirect jumps.
#[derive(Debug)]
pub(super) struct JumpCache {
    entries: LowMemory<Entry>,
    /// Entries in use, for the lower and the upper half of the address space; some twice.
    used: [Vec<u16>; 2],
}

impl JumpCache {
    pub(super) fn new() -> std::io::Result<Self> {
        let mut entries: LowMemory<Entry> = LowMemory::new(ENTRIES)?;
        for (index, entry) in entries.iter_mut().enumerate() {
            entry.negated_linear = invalid(index);
        }
        Ok(Self { entries, used: [Vec::new(), Vec::new()] })
    }

    /// Remembers the code at a linear address.
    pub(super) fn insert(&mut self, linear: u64, code: *const u8) {
        let (index, half) = (index(linear), (linear >> 63) as usize);
        let before = self.entries[index].negated_linear;
        // What is there already is noted; a half that is never forgotten must not be noted for ever.
        if before == invalid(index) || (before.wrapping_neg() >> 63) as usize != half {
            if self.used[half].len() >= MAX_USED {
                self.forget_half(half);
            }
            self.used[half].push(index as u16);
        }
        let negated_linear = linear.wrapping_neg();
        self.entries[index] = Entry { negated_linear, code: code as u64 };
    }

    /// Forgets one half of the address space, and perhaps some of the other.
    pub(super) fn forget_half(&mut self, half: usize) {
        for index in self.used[half].drain(..).map(usize::from) {
            self.entries[index].negated_linear = invalid(index);
        }
    }

    /// Emits the search for the target in [`ADDRESS`]; afterwards [`ADDEND`] points at its entry, and
    /// [`SCRATCH`] is `found` if it is the target's.
    pub(super) fn emit_search(&self, code: &mut Assembler, found: i32) {
        code.rotate_right(ADDEND, ADDRESS, INDEX_SHIFT);
        code.zero_extend_16(ADDEND, ADDEND);
        code.lea(ADDEND, indexed(ADDEND, ADDEND, 0, 0));
        code.immediate(SCRATCH, self.entries.address() as u64);
        code.lea(ADDEND, indexed(SCRATCH, ADDEND, 3, 0));
        code.load(SCRATCH, at(ADDEND, 0));
        code.lea(SCRATCH, indexed(SCRATCH, ADDRESS, 0, found));
    }
}

/// Where an entry holds the code's address.
pub(super) const CODE_OFFSET: i32 = std::mem::offset_of!(Entry, code) as i32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_noted_has_bounds() {
        let mut jumps = JumpCache::new().expect("the host has low memory");
        let code = std::ptr::dangling();
        for _ in 0..10 {
            jumps.insert(0xffff_8000_0000_1000, code);
        }
        assert_eq!(jumps.used, [vec![], vec![0x800]]);
        for _ in 0..2 * MAX_USED {
            jumps.insert(0x1000, code);
            jumps.insert(0xffff_8000_0000_1000, code);
        }
        assert!(jumps.used.iter().all(|used| used.len() <= MAX_USED));
        assert_eq!(jumps.entries[0x800].negated_linear, 0xffff_8000_0000_1000u64.wrapping_neg());
        jumps.forget_half(1);
        assert_eq!(jumps.entries[0x800].negated_linear, invalid(0x800));
    }
}
