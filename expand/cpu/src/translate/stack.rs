//! PUSH, POP and LEAVE of 64 bits.

use iced_x86::{Code, OpKind};

use super::assembler::{Host, Place, at, indexed};
use super::emission::{Emission, addressable};
use super::registers::{ADDEND, ADDRESS, GUEST_RBP, GUEST_RSP, Home, SCRATCH, general_slot, home};
use crate::cpu::TEMPORARY;
use crate::decode::op::Op;
use reprise_trace::cpu_state::RSP;

/// Bytes of what is pushed and popped.
pub(super) const SLOT_BYTES: i32 = 8;

/// The operand that [`Emission::translate`] found.
pub(super) const OPERAND: Place =
    Place { base: Some(ADDRESS), index: Some((ADDEND, 0)), displacement: 0 };

/// Emits a stack instruction; `None`, with nothing emitted, if it is not one of these.
pub(super) fn emit(emission: &mut Emission<'_>, op: &Op) -> Option<()> {
    let instruction = &*op.instruction;
    let register = instruction.op_count() > 0 && instruction.op0_kind() == OpKind::Register;
    match instruction.code() {
        Code::Push_r64 | Code::Push_rm64 if register => {
            make_room(emission);
            let value = emission.in_register(op.a, SCRATCH);
            finish_push(emission, value);
        }
        Code::Push_rm64 if addressable(op) => {
            emission.linear_address(op);
            emission.translate(false, SLOT_BYTES as u64);
            emission.settle(24);
            emission.code.load(SCRATCH, OPERAND);
            emission.code.store(general_slot(TEMPORARY), SCRATCH);
            make_room(emission);
            emission.settle(16);
            emission.code.load(SCRATCH, general_slot(TEMPORARY));
            finish_push(emission, SCRATCH);
        }
        Code::Pushq_imm32 | Code::Pushq_imm8 => {
            let value = i32::try_from(op.immediate as i64).ok()?;
            push_immediate(emission, value);
        }
        Code::Pop_r64 | Code::Pop_rm64 if register && usize::from(op.a) != RSP => {
            emission.code.copy(ADDRESS, GUEST_RSP);
            emission.translate(false, SLOT_BYTES as u64);
            emission.settle(32);
            match home(op.a) {
                Home::Host(host) => emission.code.load(host, OPERAND),
                Home::Memory(place) => {
                    emission.code.load(SCRATCH, OPERAND);
                    emission.code.store(place, SCRATCH);
                }
            }
            emission.code.lea(GUEST_RSP, at(GUEST_RSP, SLOT_BYTES));
        }
        Code::Leaveq => {
            emission.code.copy(ADDRESS, GUEST_RBP);
            emission.translate(false, SLOT_BYTES as u64);
            emission.settle(32);
            emission.code.lea(GUEST_RSP, at(GUEST_RBP, SLOT_BYTES));
            emission.code.load(GUEST_RBP, OPERAND);
        }
        _ => return None,
    }
    Some(())
}

/// Finds the slot below the stack's top.
pub(super) fn make_room(emission: &mut Emission<'_>) {
    emission.code.lea(ADDRESS, at(GUEST_RSP, -SLOT_BYTES));
    emission.translate(true, SLOT_BYTES as u64);
}

/// Pushes a value that an instruction can hold.
pub(super) fn push_immediate(emission: &mut Emission<'_>, value: i32) {
    make_room(emission);
    emission.settle(32);
    emission.code.store_immediate(OPERAND, value);
    emission.code.lea(GUEST_RSP, at(GUEST_RSP, -SLOT_BYTES));
}

/// Stores a value there, and moves the top. PUSH RSP pushes RSP as it was.
pub(super) fn finish_push(emission: &mut Emission<'_>, value: Host) {
    emission.settle(32);
    emission.code.store(indexed(ADDRESS, ADDEND, 0, 0), value);
    emission.code.lea(GUEST_RSP, at(GUEST_RSP, -SLOT_BYTES));
}
