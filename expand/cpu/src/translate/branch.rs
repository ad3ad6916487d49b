//! Near jumps, calls and returns, which end a block.

use iced_x86::{Mnemonic, OpKind};

use super::assembler::at;
use super::emission::{Emission, addressable};
use super::jump_cache::CODE_OFFSET;
use super::registers::{ADDEND, ADDRESS, GUEST_RSP, SCRATCH, general_slot};
use super::stack::{OPERAND, SLOT_BYTES, finish_push, make_room, push_immediate};
use crate::cpu::TEMPORARY;
use crate::decode::block_cache::Block;
use crate::decode::op::Op;
use crate::memory::walk::canonical;
use crate::ops::{self, condition_code};

/// Where a unit goes on after a branch.
pub(super) enum Next {
    /// Nowhere: every way leads out of it.
    Out,
    /// Where a jump leads, or a conditional one does not: at this address. Out of it, if the unit ends
    /// here.
    At(u64),
}

/// The address behind an operation of the block at `linear`.
pub(super) fn following(op: &Op, linear: u64) -> u64 {
    linear.wrapping_add(u64::from(op.offset) + u64::from(op.length))
}

/// Whether an operation that is no branch may be emitted in line; else it ends its unit where it ends
/// its block.
fn may_be_inline(op: &Op) -> bool {
    use Mnemonic::{Clac, Cld, Popfq, Stac, Sti};
    let ending = matches!(op.instruction.mnemonic(), Clac | Cld | Popfq | Stac | Sti);
    op.instruction.inline
        || ops::does_nothing(op)
        || ending
        || op.instruction.is_stack_instruction()
}

/// Where a unit may go on behind a block at `linear`, as [`emit`] will say.
pub(super) fn goes_on(block: &Block, linear: u64) -> Option<u64> {
    let op = block.ops.last()?;
    let instruction = &*op.instruction;
    let direct = instruction.op_count() > 0 && instruction.op0_kind() == OpKind::NearBranch64;
    match instruction.mnemonic() {
        _ if !block.ends_in_branch => may_be_inline(op).then(|| following(op, linear)),
        _ if instruction.is_jcc_short_or_near() => Some(following(op, linear)),
        Mnemonic::Jmp | Mnemonic::Call if direct => Some(linear.wrapping_add(op.immediate)),
        _ => None,
    }
}

/// Emits a branch; `None`, with nothing emitted, if it is not one of these.
pub(super) fn emit(emission: &mut Emission<'_>, op: &Op) -> Option<Next> {
    const BYTES_64: u8 = 8;
    let instruction = &*op.instruction;
    if op.size != BYTES_64 {
        return None;
    }
    let next = following(op, emission.linear);
    let direct = instruction.op_count() > 0 && instruction.op0_kind() == OpKind::NearBranch64;
    let target = emission.linear.wrapping_add(op.immediate);
    if !canonical(next) || direct && !canonical(target) {
        return None;
    }
    Some(match instruction.mnemonic() {
        _ if instruction.is_jcc_short_or_near() => {
            emission.exit_if(condition_code(instruction) as u8, target);
            Next::At(next)
        }
        Mnemonic::Jmp if direct => Next::At(target),
        Mnemonic::Call if direct => {
            push_return_address(emission, next);
            Next::At(target)
        }
        Mnemonic::Jmp if instruction.is_jmp_near_indirect() => jump_indirect(emission, op)?,
        Mnemonic::Call if instruction.is_call_near_indirect() => call_indirect(emission, op, next)?,
        Mnemonic::Ret => return_near(emission, op),
        _ => return None,
    })
}

fn push_return_address(emission: &mut Emission<'_>, next: u64) {
    if let Ok(next) = i32::try_from(next as i64) {
        return push_immediate(emission, next);
    }
    make_room(emission);
    emission.settle(40);
    emission.code.immediate(SCRATCH, next);
    finish_push(emission, SCRATCH);
}

/// [`ADDRESS`] = where an indirect jump or call leads.
fn target(emission: &mut Emission<'_>, op: &Op) -> Option<()> {
    if op.instruction.op0_kind() == OpKind::Register {
        let target = emission.in_register(op.a, ADDRESS);
        emission.code.copy(ADDRESS, target);
        return Some(());
    }
    if !addressable(op) {
        return None;
    }
    emission.linear_address(op);
    emission.translate(false, SLOT_BYTES as u64);
    emission.settle(16);
    emission.code.load(ADDRESS, OPERAND);
    Some(())
}

fn jump_indirect(emission: &mut Emission<'_>, op: &Op) -> Option<Next> {
    target(emission, op)?;
    emission.search();
    emission.leave_through(at(ADDEND, CODE_OFFSET));
    Some(Next::Out)
}

fn call_indirect(emission: &mut Emission<'_>, op: &Op, next: u64) -> Option<Next> {
    target(emission, op)?;
    emission.search();
    emission.settle(24);
    emission.code.load(SCRATCH, at(ADDEND, CODE_OFFSET));
    emission.code.store(general_slot(TEMPORARY), SCRATCH);
    push_return_address(emission, next);
    emission.leave_through(general_slot(TEMPORARY));
    Some(Next::Out)
}

fn return_near(emission: &mut Emission<'_>, op: &Op) -> Next {
    let released = op.immediate as i32;
    emission.code.copy(ADDRESS, GUEST_RSP);
    emission.translate(false, SLOT_BYTES as u64);
    emission.settle(16);
    emission.code.load(ADDRESS, OPERAND);
    emission.search();
    emission.code.lea(GUEST_RSP, at(GUEST_RSP, SLOT_BYTES + released));
    emission.leave_through(at(ADDEND, CODE_OFFSET));
    Next::Out
}
