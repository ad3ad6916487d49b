//! Near jumps, calls and returns, which end a block.

use iced_x86::{Mnemonic, OpKind};

use super::assembler::at;
use super::emission::Emission;
use super::jump_cache::CODE_OFFSET;
use super::registers::{ADDEND, ADDRESS, GUEST_RSP, SCRATCH, general_slot};
use super::stack::{OPERAND, SLOT_BYTES, finish_push, make_room};
use crate::cpu::TEMPORARY;
use crate::decode::op::Op;
use crate::memory::walk::canonical;
use crate::ops::condition_code;

/// Emits a branch; `None`, with nothing emitted, if it is not one of these.
pub(super) fn emit(emission: &mut Emission<'_>, op: &Op) -> Option<()> {
    const BYTES_64: u8 = 8;
    let instruction = &*op.instruction;
    if op.size != BYTES_64 {
        return None;
    }
    let start = emission.code.length();
    let next = emission.linear.wrapping_add(u64::from(op.offset) + u64::from(op.length));
    let direct = instruction.op_count() > 0 && instruction.op0_kind() == OpKind::NearBranch64;
    let target = emission.linear.wrapping_add(op.immediate);
    if !canonical(next) || direct && !canonical(target) {
        return None;
    }
    let emitted = match instruction.mnemonic() {
        _ if instruction.is_jcc_short_or_near() => {
            conditional(emission, op, target, next);
            Some(())
        }
        Mnemonic::Jmp if direct => {
            emission.exit_to(target);
            Some(())
        }
        Mnemonic::Call if direct => {
            push_return_address(emission, next);
            emission.exit_to(target);
            Some(())
        }
        Mnemonic::Jmp if instruction.is_jmp_near_indirect() => jump_indirect(emission, op),
        Mnemonic::Call if instruction.is_call_near_indirect() => call_indirect(emission, op, next),
        Mnemonic::Ret => return_near(emission, op),
        _ => None,
    };
    if emitted.is_none() {
        emission.take_back(start);
    }
    emitted
}

fn conditional(emission: &mut Emission<'_>, op: &Op, target: u64, next: u64) {
    let taken = emission.code.jump_forward_if(condition_code(&op.instruction) as u8);
    emission.exit_to(next);
    emission.code.land(taken);
    emission.exit_to(target);
}

fn push_return_address(emission: &mut Emission<'_>, next: u64) {
    make_room(emission);
    match i32::try_from(next as i64) {
        Ok(next) => {
            emission.code.store_immediate(OPERAND, next);
            emission.code.lea(GUEST_RSP, at(GUEST_RSP, -SLOT_BYTES));
        }
        Err(_) => {
            emission.code.immediate(SCRATCH, next);
            finish_push(emission, SCRATCH);
        }
    }
}

/// [`ADDRESS`] = where an indirect jump or call leads.
fn target(emission: &mut Emission<'_>, op: &Op) -> Option<()> {
    if op.instruction.op0_kind() == OpKind::Register {
        let target = emission.in_register(op.a, ADDRESS);
        emission.code.copy(ADDRESS, target);
        return Some(());
    }
    emission.linear_address(op).ok()?;
    emission.translate(false, SLOT_BYTES as u64);
    emission.code.load(ADDRESS, OPERAND);
    Some(())
}

/// Finds the code at [`ADDRESS`], or takes the slow way, which does all of the instruction.
fn search(emission: &mut Emission<'_>) {
    let miss = emission.surroundings.jumps.emit_search(&mut emission.code);
    emission.slow_if(miss);
}

fn jump_indirect(emission: &mut Emission<'_>, op: &Op) -> Option<()> {
    target(emission, op)?;
    search(emission);
    emission.code.jump_indirect(at(ADDEND, CODE_OFFSET));
    Some(())
}

fn call_indirect(emission: &mut Emission<'_>, op: &Op, next: u64) -> Option<()> {
    target(emission, op)?;
    search(emission);
    emission.code.load(SCRATCH, at(ADDEND, CODE_OFFSET));
    emission.code.store(general_slot(TEMPORARY), SCRATCH);
    push_return_address(emission, next);
    emission.code.jump_indirect(general_slot(TEMPORARY));
    Some(())
}

fn return_near(emission: &mut Emission<'_>, op: &Op) -> Option<()> {
    let released = i32::try_from(op.immediate).ok()?;
    emission.code.copy(ADDRESS, GUEST_RSP);
    emission.translate(false, SLOT_BYTES as u64);
    emission.code.load(ADDRESS, OPERAND);
    search(emission);
    emission.code.lea(GUEST_RSP, at(GUEST_RSP, SLOT_BYTES + released));
    emission.code.jump_indirect(at(ADDEND, CODE_OFFSET));
    Some(())
}
