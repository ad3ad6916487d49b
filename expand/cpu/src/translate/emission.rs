//! A block's code in the making: what every kind of instruction uses.

use std::mem::offset_of;

use iced_x86::InstructionInfoFactory;

use super::assembler::{Assembler, Forward, Place, at, indexed};
use super::jump_cache::JumpCache;
use super::registers::{
    ADDEND, ADDRESS, Home, PAGE_SHIFT, SCRATCH, SHIFT, field, general_slot, home,
};
use super::site::{Exit, Site};
use super::thunks::Thunks;
use crate::cpu::{BLOCK_RIP, BUDGET, NO_SEGMENT, Registers, ZERO};
use crate::decode::op::Op;
use crate::memory::tlb::Entry;

/// What blocks of one mode know about the CPU.
pub(super) struct Surroundings<'a> {
    pub(super) thunks: Thunks,
    pub(super) jumps: &'a JumpCache,
    pub(super) read_table: i32,
    pub(super) write_table: i32,
}

/// Ways out of a block to known addresses: where a condition holds, and where not.
pub(super) const MAX_EXITS: usize = 2;

/// What code out of the way does.
enum Cold {
    /// Runs a site's operation in Rust and goes on behind it.
    Operation { resume: u64 },
    /// Runs a site's operation in Rust and leaves.
    LastOperation,
    /// Leaves before the block.
    WithoutBudget,
}

/// A block being translated.
pub(super) struct Emission<'a> {
    pub(super) code: Assembler,
    pub(super) info: &'a mut InstructionInfoFactory,
    pub(super) surroundings: &'a Surroundings<'a>,
    /// The linear address of the block, which in 64-bit mode is its RIP.
    pub(super) linear: u64,
    /// The sites of the block's operations, in order: they have their place already.
    pub(super) sites: &'a [Site],
    /// Exits to known addresses, with where they lead.
    exits: Vec<(u64, *mut Exit)>,
    /// Where to put further exits, the next one last, in places that generated code can name.
    free_exits: Vec<*mut Exit>,
    cold: Vec<(Vec<Forward>, usize, Cold)>,
    /// Jumps of the instruction in hand to its slow way.
    slow: Vec<Forward>,
}

/// An exit, to be filled in.
pub(super) struct PlannedExit {
    pub(super) linear: u64,
    pub(super) exit: *mut Exit,
    /// The address of the code that leaves by it.
    pub(super) stub: u64,
}

/// A memory operand that cannot be addressed inline.
pub(super) struct NotInline;

impl<'a> Emission<'a> {
    pub(super) fn new(
        code: Assembler,
        info: &'a mut InstructionInfoFactory,
        surroundings: &'a Surroundings<'a>,
        linear: u64,
        sites: &'a [Site],
        free_exits: [*mut Exit; MAX_EXITS],
    ) -> Self {
        Self {
            code,
            info,
            surroundings,
            linear,
            sites,
            exits: Vec::new(),
            free_exits: free_exits.into_iter().rev().collect(),
            cold: Vec::new(),
            slow: Vec::new(),
        }
    }

    /// Takes the block's instructions from the budget, or leaves.
    pub(super) fn take_budget(&mut self) {
        const SIGN_SHIFT: u64 = 63;
        let budget = general_slot(BUDGET);
        self.code.load(ADDEND, budget);
        self.code.lea(ADDEND, at(ADDEND, -(self.sites.len() as i32)));
        self.code.store(budget, ADDEND);
        self.code.immediate(SCRATCH, SIGN_SHIFT);
        self.code.shift_right(SCRATCH, ADDEND, SCRATCH);
        let enough = self.code.jump_near_if_rcx_zero();
        let short = self.code.jump_forward();
        self.code.land(enough);
        self.cold.push((vec![short], 0, Cold::WithoutBudget));
    }

    /// Runs an operation in Rust, in line.
    pub(super) fn run_operation(&mut self, number: usize) {
        self.code.immediate(ADDEND, std::ptr::from_ref(&self.sites[number]) as u64);
        self.code.call_to(self.surroundings.thunks.operation);
    }

    /// Runs the block's last operation in Rust and leaves.
    pub(super) fn run_last_operation(&mut self, number: usize) {
        self.code.immediate(ADDEND, std::ptr::from_ref(&self.sites[number]) as u64);
        self.code.jump_to(self.surroundings.thunks.last_operation);
    }

    /// The instruction in hand takes its slow way if `jump` is taken.
    pub(super) fn slow_if(&mut self, jump: Forward) {
        self.slow.push(jump);
    }

    /// The instruction in hand is done; the slow way comes back here.
    pub(super) fn end_instruction(&mut self, number: usize) {
        let resume = self.code.here();
        self.end_slow(number, Cold::Operation { resume });
    }

    /// The same for one that ends the block: the slow way leaves.
    pub(super) fn end_last_instruction(&mut self, number: usize) {
        self.end_slow(number, Cold::LastOperation);
    }

    fn end_slow(&mut self, number: usize, cold: Cold) {
        if !self.slow.is_empty() {
            self.cold.push((std::mem::take(&mut self.slow), number, cold));
        }
    }

    /// Drops what was emitted of the instruction in hand since `length`.
    pub(super) fn take_back(&mut self, length: usize) {
        self.slow.clear();
        self.code.take_back(length);
    }

    /// [`ADDRESS`] = the linear address of the operation's memory operand.
    pub(super) fn linear_address(&mut self, op: &Op) -> Result<(), NotInline> {
        self.effective_address(op)?;
        if op.segment != NO_SEGMENT {
            let bases = offset_of!(Registers, segment_base);
            let segment = usize::from(op.segment);
            // ES, CS, SS and DS have no base in 64-bit mode.
            if segment >= reprise_trace::cpu_state::FS {
                self.code.load(ADDEND, field(bases + segment * 8));
                self.code.lea(ADDRESS, indexed(ADDRESS, ADDEND, 0, 0));
            }
        }
        Ok(())
    }

    /// [`ADDRESS`] = the memory operand's offset in its segment. Uses [`ADDEND`].
    pub(super) fn effective_address(&mut self, op: &Op) -> Result<(), NotInline> {
        if op.address_mask != u64::MAX {
            return Err(NotInline);
        }
        if op.base == BLOCK_RIP || op.base == ZERO && op.index == ZERO {
            let base = if op.base == BLOCK_RIP { self.linear } else { 0 };
            if op.index != ZERO {
                return Err(NotInline);
            }
            self.code.immediate(ADDRESS, base.wrapping_add(op.displacement));
            return Ok(());
        }
        let displacement = i32::try_from(op.displacement as i64).map_err(|_| NotInline)?;
        let base = (op.base != ZERO).then(|| self.in_register(op.base, ADDRESS));
        let index = (op.index != ZERO).then(|| (self.in_register(op.index, ADDEND), op.scale));
        match (base, index) {
            (Some(base), None) if displacement == 0 => self.code.copy(ADDRESS, base),
            _ => self.code.lea(ADDRESS, Place { base, index, displacement }),
        }
        Ok(())
    }

    /// A guest register's value in a host register, `spare` if it has none of its own.
    pub(super) fn in_register(
        &mut self,
        guest: u8,
        spare: super::assembler::Host,
    ) -> super::assembler::Host {
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
    pub(super) fn translate(&mut self, write: bool, size: u64) {
        const { assert!(size_of::<Entry>() == 16) };
        let surroundings = self.surroundings;
        let table = if write { surroundings.write_table } else { surroundings.read_table };
        let entry = |offset: usize| Place {
            base: None,
            index: Some((ADDEND, 3)),
            displacement: table + offset as i32,
        };
        self.code.rotate_right(ADDEND, ADDRESS, PAGE_SHIFT as u8);
        self.code.zero_extend_16(ADDEND, ADDEND);
        self.code.lea(ADDEND, indexed(ADDEND, ADDEND, 0, 0));
        self.code.load(SCRATCH, entry(offset_of!(Entry, negated_tag)));
        self.code.lea(SCRATCH, indexed(SCRATCH, ADDRESS, 0, size as i32 - 1));
        self.code.shift_right(SCRATCH, SCRATCH, SHIFT);
        let hit = self.code.jump_near_if_rcx_zero();
        let miss = self.code.jump_forward();
        self.slow_if(miss);
        self.code.land(hit);
        self.code.load(ADDEND, entry(offset_of!(Entry, addend)));
    }

    /// Takes the slow way unless [`ADDRESS`] is a multiple of 16.
    pub(super) fn require_alignment(&mut self) {
        const LOW_BITS_SHIFT: u64 = 60;
        self.code.immediate(SCRATCH, LOW_BITS_SHIFT);
        self.code.shift_left(SCRATCH, ADDRESS, SCRATCH);
        let aligned = self.code.jump_near_if_rcx_zero();
        let misaligned = self.code.jump_forward();
        self.slow_if(misaligned);
        self.code.land(aligned);
    }

    /// Leaves the block for a known address.
    ///
    /// # Panics
    /// If the block has more exits than [`MAX_EXITS`].
    pub(super) fn exit_to(&mut self, linear: u64) {
        let exit = self.free_exits.pop().expect("a block has two ways out at most");
        self.code.jump_through(exit as u64);
        self.exits.push((linear, exit));
    }

    /// Emits what is out of the way, and gives each exit the code that leaves by it.
    pub(super) fn finish(mut self) -> (Vec<u8>, Vec<PlannedExit>) {
        for (jumps, number, cold) in std::mem::take(&mut self.cold) {
            for jump in jumps {
                self.code.land(jump);
            }
            let thunks = &self.surroundings.thunks;
            self.code.immediate(ADDEND, std::ptr::from_ref(&self.sites[number]) as u64);
            match cold {
                Cold::Operation { resume } => {
                    self.code.call_to(thunks.operation);
                    self.code.jump_to(resume);
                }
                Cold::LastOperation => self.code.jump_to(thunks.last_operation),
                Cold::WithoutBudget => self.code.jump_to(thunks.without_budget),
            }
        }
        let mut exits = Vec::new();
        for (linear, exit) in std::mem::take(&mut self.exits) {
            exits.push(PlannedExit { linear, exit, stub: self.code.here() });
            self.code.immediate(ADDEND, exit as u64);
            self.code.jump_to(self.surroundings.thunks.exit);
        }
        (self.code.finish(), exits)
    }
}
