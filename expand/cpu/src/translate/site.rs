//! Where translated code meets Rust: operations that it has run for it, and exits that it leaves by.
#![allow(unsafe_code)]

use std::ptr::NonNull;

use crate::counting::is_conditional_branch;
use crate::cpu::{BLOCK_RIP, BRANCHES, BUDGET, Cpu, LEFT_AT, SHADOWED};
use crate::decode::block_cache::Block;
use crate::decode::op::Op;
use crate::fault::Flow;
use crate::mode::Mode;
use crate::tracing::{Ahead, Planned};

/// Why translated code was left, beside the values of [`Flow`] but [`Flow::NEXT`]: by an exit.
pub(crate) const LEFT_BY_EXIT: u32 = 8;
/// Before a block that the budget is too small for.
pub(crate) const LEFT_WITHOUT_BUDGET: u32 = 9;
/// The block's last operation was run in Rust; RIP is set.
pub(crate) const LEFT_AFTER_BLOCK: u32 = 10;

/// An operation of a translated block.
#[derive(Debug)]
pub(crate) struct Site {
    pub(super) op: NonNull<Op>,
    pub(super) block: NonNull<Block>,
    /// The block's RIP.
    pub(super) block_rip: u64,
    /// Instructions of the translated unit before the block.
    pub(super) before_block: u64,
    /// Conditional branches of the translated unit before the operation.
    pub(super) branches: u64,
    /// The operation before it in the unit is STI.
    pub(super) behind_sti: bool,
    /// What a trace has of the unit before the operation, its block's number included.
    pub(super) traced: Ahead,
}

impl Site {
    fn parts(&self) -> (&Block, &Op) {
        // SAFETY: a block is translated, and its code entered, only while it is in the cache, which drops
        // none meanwhile.
        unsafe { (self.block.as_ref(), self.op.as_ref()) }
    }

    /// What the operation accesses; the block has a number in the trace.
    pub(super) fn accesses(&self) -> &[Planned] {
        let (block, op) = self.parts();
        &block.trace_of(op).list
    }

    /// Conditional branches of the unit up to the operation, which is counted if it is one.
    pub(super) fn branches_past(&self) -> u64 {
        let (_, op) = self.parts();
        self.branches + u64::from(is_conditional_branch(&op.instruction))
    }

    /// What a trace has of the unit behind the operation.
    pub(super) fn traced_past(&self) -> Ahead {
        let (block, op) = self.parts();
        self.traced.past(block, op)
    }
}

/// A way from a translated block to a known address. Generated code jumps through `target`.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Exit {
    /// The next block's code, or [`Exit::stub`].
    pub(super) target: *const u8,
    /// Code that leaves for Rust.
    pub(super) stub: *const u8,
    /// Where it leads.
    pub(super) linear: u64,
    pub(super) mode: Mode,
    /// The guest-physical page of its block.
    pub(super) physical_page: u64,
    /// It leads into its block's linear page.
    pub(super) within_page: bool,
}

impl Exit {
    /// Makes the exit leave for Rust.
    pub(crate) fn unlink(&mut self) {
        self.target = self.stub;
    }
}

/// Runs an operation; the registers are stored.
fn run(cpu: &mut Cpu, site: &Site) -> Flow {
    cpu.registers.gpr[usize::from(BLOCK_RIP)] = site.block_rip;
    cpu.tick = cpu.tick_at_budget().wrapping_add(site.before_block);
    let (block, op) = site.parts();
    cpu.count(|profile| profile.note_operation(op.instruction.mnemonic()));
    let mut flow = if cpu.tracer.is_some() {
        cpu.take_trace_back(site.traced);
        cpu.run_traced(block, op)
    } else {
        // SAFETY: the handler is a function of this crate or a native sequence, made for this operation.
        unsafe { (op.handler)(cpu, op) }
    };
    // A CALL pushed onto code, or a walk set an accessed bit in it. The block loop looks after each
    // block; here the next one may be in this very unit.
    if flow == Flow::NEXT && cpu.memory.physical.code_was_written() {
        flow = Flow::END_BLOCK;
    }
    if flow == Flow::EXIT && site.behind_sti && cpu.registers.gpr[usize::from(SHADOWED)] != 0 {
        // It starts again, in the shadow still.
        cpu.interrupt_shadow = true;
    }
    if flow != Flow::NEXT {
        cpu.registers.gpr[usize::from(LEFT_AT)] = std::ptr::from_ref(site) as u64;
        cpu.count_branches_before(site);
    }
    flow
}

/// Runs an operation, after which the unit goes on.
pub(super) extern "sysv64" fn run_operation(cpu: &mut Cpu, site: &Site) -> u32 {
    let flow = run(cpu, site);
    if flow == Flow::NEXT && cpu.tracer.is_some() {
        cpu.lend_trace(site.traced_past());
    }
    flow.0
}

/// Runs a block's last operation, after which translated code is left.
pub(super) extern "sysv64" fn run_last_operation(cpu: &mut Cpu, site: &Site) -> u32 {
    let flow = run(cpu, site);
    if flow != Flow::NEXT {
        return flow.0;
    }
    cpu.count_branches_before(site);
    let (block, op) = site.parts();
    cpu.tick += u64::from(op.number) + 1;
    let branched = block.ends_in_branch && usize::from(op.number) + 1 == block.ops.len();
    if !branched {
        cpu.rip = op.next_rip(cpu);
    }
    LEFT_AFTER_BLOCK
}

impl Cpu {
    /// Translated code is left at an operation, which counts itself.
    fn count_branches_before(&mut self, site: &Site) {
        if self.counts_branches {
            self.registers.gpr[usize::from(BRANCHES)] += site.branches;
        }
    }

    /// Lets translated code run until so many instructions have retired.
    pub(super) fn set_budget(&mut self, end: u64) {
        self.budget_end = end;
        self.registers.gpr[usize::from(BUDGET)] = !(end - self.tick);
    }

    /// The instruction count that the budget left stands for: before the running unit.
    #[inline(always)]
    pub(super) fn tick_at_budget(&self) -> u64 {
        self.budget_end.wrapping_sub(!self.registers.gpr[usize::from(BUDGET)])
    }
}
