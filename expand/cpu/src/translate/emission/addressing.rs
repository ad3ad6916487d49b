//! Where an instruction's memory operand lies: its linear address, and the host's.

use std::mem::offset_of;

use super::Emission;
use crate::cpu::{BLOCK_RIP, NO_SEGMENT, Registers, ZERO};
use crate::decode::op::Op;
use crate::memory::physical::PAGE_BYTES;
use crate::memory::tlb::Entry;
use crate::translate::assembler::{Host, Place, at, indexed};
use crate::translate::registers::{ADDEND, ADDRESS, Home, PAGE_SHIFT, SCRATCH, SHIFT, field, home};

/// Whether an operation's memory operand lies at an address known when it is translated.
fn is_absolute(op: &Op) -> bool {
    op.index == ZERO && matches!(op.base, BLOCK_RIP | ZERO)
}

/// Whether [`Emission::linear_address`] can address an operation's memory operand: all but cut
/// addresses and a RIP-relative one with an index, which no encoding has.
pub(in crate::translate) fn addressable(op: &Op) -> bool {
    let fits = i32::try_from(op.displacement as i64).is_ok();
    op.address_mask == u64::MAX && (is_absolute(op) || op.base != BLOCK_RIP && fits)
}

impl Emission<'_> {
    /// [`ADDRESS`] = the linear address of the operation's memory operand, which is
    /// [`addressable`].
    pub(in crate::translate) fn linear_address(&mut self, op: &Op) {
        self.effective_address(op);
        // ES, CS, SS and DS have no base in 64-bit mode.
        if op.segment != NO_SEGMENT && usize::from(op.segment) >= reprise_trace::cpu_state::FS {
            let base = offset_of!(Registers, segment_base) + usize::from(op.segment) * 8;
            self.code.load(ADDEND, field(base));
            self.code.lea(ADDRESS, indexed(ADDRESS, ADDEND, 0, 0));
        }
    }

    /// [`ADDRESS`] = the memory operand's offset in its segment. Uses [`ADDEND`].
    pub(in crate::translate) fn effective_address(&mut self, op: &Op) {
        self.settle(32);
        if is_absolute(op) {
            let base = if op.base == BLOCK_RIP { self.linear } else { 0 };
            return self.code.immediate(ADDRESS, base.wrapping_add(op.displacement));
        }
        let base = (op.base != ZERO).then(|| self.in_register(op.base, ADDRESS));
        let index = (op.index != ZERO).then(|| (self.in_register(op.index, ADDEND), op.scale));
        let displacement = op.displacement as i32;
        match (base, index) {
            (Some(base), None) if displacement == 0 => self.code.copy(ADDRESS, base),
            _ => self.code.lea(ADDRESS, Place { base, index, displacement }),
        }
    }

    /// A guest register's value in a host register, `spare` if it has none of its own.
    pub(in crate::translate) fn in_register(&mut self, guest: u8, spare: Host) -> Host {
        match home(guest) {
            Home::Host(host) => host,
            Home::Memory(place) => {
                self.code.load(spare, place);
                spare
            }
        }
    }

    /// Translates the `size` bytes at [`ADDRESS`] through the software TLB: afterwards the operand lies
    /// at [`ADDRESS`] + [`ADDEND`]. Takes the slow way if they cannot be accessed without asking.
    pub(in crate::translate) fn translate(&mut self, write: bool, size: u64) {
        self.settle(if self.traced { 112 } else { 64 });
        self.trace_access(write, size);
        self.find_entry(ADDRESS, write);
        // The last byte's distance from the tag's page, in pages, is what is found.
        let distance = size as i32 - 1 + self.found() * PAGE_BYTES as i32;
        self.code.lea(SCRATCH, indexed(SCRATCH, ADDRESS, 0, distance));
        self.code.shift_right(SCRATCH, SCRATCH, SHIFT);
        self.slow_unless_found();
        self.code.load(ADDEND, self.entry(write, offset_of!(Entry, addend)));
        self.trace_place();
    }

    /// Translates what a repeated string instruction accesses from `pointer` on, `count` elements of
    /// `size` bytes (a power of two up to 8): afterwards [`ADDEND`] leads from `pointer` to the host's
    /// address. Takes the slow way unless all of them lie in one known page.
    pub(in crate::translate) fn translate_run(
        &mut self,
        pointer: Host,
        count: Host,
        write: bool,
        size: u64,
    ) {
        self.settle(64);
        let found = self.found();
        let scale = size.trailing_zeros() as u8;
        self.find_entry(pointer, write);
        // The last byte's distance from the tag's page, as in `translate`. A count of a page and more
        // might wrap around to where it began; with a count of zero nothing is accessed anyway.
        self.code.lea(SCRATCH, indexed(SCRATCH, pointer, 0, 0));
        self.code.lea(SCRATCH, indexed(SCRATCH, count, scale, -1));
        self.code.shift_right(SCRATCH, SCRATCH, SHIFT);
        self.code.shift_right(ADDRESS, count, SHIFT);
        self.code.lea(SCRATCH, indexed(SCRATCH, ADDRESS, 0, found));
        self.slow_unless_found();
        self.settle(16);
        self.code.load(ADDEND, self.entry(write, offset_of!(Entry, addend)));
    }

    /// [`ADDEND`] = the index, in units of half an entry, of the data TLB's entry for `address`;
    /// [`SCRATCH`] = its negated tag.
    fn find_entry(&mut self, address: Host, write: bool) {
        self.code.rotate_right(ADDEND, address, PAGE_SHIFT as u8);
        self.code.zero_extend_16(ADDEND, ADDEND);
        self.code.lea(ADDEND, indexed(ADDEND, ADDEND, 0, 0));
        self.code.load(SCRATCH, self.entry(write, offset_of!(Entry, negated_tag)));
    }

    /// A field of the entry that [`Emission::find_entry`] found.
    fn entry(&self, write: bool, offset: usize) -> Place {
        const { assert!(size_of::<Entry>() == 16) };
        let surroundings = self.surroundings;
        let table = if write { surroundings.write_table } else { surroundings.read_table };
        Place { base: None, index: Some((ADDEND, 3)), displacement: table + offset as i32 }
    }

    /// Takes the slow way unless [`ADDRESS`] is a multiple of 16.
    pub(in crate::translate) fn require_alignment(&mut self) {
        const LOW_BITS_SHIFT: u64 = 60;
        self.settle(32);
        self.code.immediate(SCRATCH, LOW_BITS_SHIFT);
        self.code.shift_left(SCRATCH, ADDRESS, SCRATCH);
        let found = self.found();
        if found != 0 {
            self.code.lea(SCRATCH, at(SCRATCH, found));
        }
        self.slow_unless_found();
    }

    /// Looks for the code at [`ADDRESS`]: afterwards [`ADDEND`] points at its entry in the jump cache.
    /// Takes the slow way, which does all of the instruction, if there is none.
    pub(in crate::translate) fn search(&mut self) {
        self.settle(64);
        let found = self.found();
        self.surroundings.jumps.emit_search(&mut self.code, found);
        self.slow_unless_found();
    }
}
