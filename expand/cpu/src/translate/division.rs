//! DIV of 32 and 64 bits, where the quotient fits for sure.

use iced_x86::{Mnemonic, OpKind};

use super::assembler::{RDX, at, indexed};
use super::emission::{Emission, addressable};
use super::registers::{ADDEND, ADDRESS, SCRATCH};
use super::stack::OPERAND;
use crate::decode::op::Op;

/// Emits a division; `None`, with nothing emitted, if it is not one of these.
pub(super) fn emit(emission: &mut Emission<'_>, op: &Op) -> Option<()> {
    let register = op.instruction.op_count() == 1 && op.instruction.op0_kind() == OpKind::Register;
    let wide = op.size == 8;
    if op.instruction.mnemonic() != Mnemonic::Div
        || !matches!(op.size, 4 | 8)
        || !register && !addressable(op)
    {
        return None;
    }
    if register {
        emission.settle(24);
        let guest = op.instruction.op0_register().number() as u8;
        let divisor = emission.in_register(guest, ADDRESS);
        if wide {
            emission.code.copy(ADDRESS, divisor);
        } else {
            emission.code.zero_extend_32(ADDRESS, divisor);
        }
    } else {
        emission.linear_address(op);
        emission.translate(false, u64::from(op.size));
        emission.settle(16);
        if wide {
            emission.code.load(ADDRESS, OPERAND);
        } else {
            emission.code.load_32(ADDRESS, OPERAND);
        }
    }
    if wide {
        check_wide(emission);
    } else {
        check(emission);
    }
    emission.settle(16);
    // DIV by ADDRESS.
    emission.code.bytes(&[if wide { 0x49 } else { 0x41 }, 0xf7, 0xf7]);
    Some(())
}

/// The quotient fits if the dividend's upper half is less than the divisor.
fn check(emission: &mut Emission<'_>) {
    const SIGN_SHIFT: u64 = 63;
    emission.settle(48);
    let found = emission.found();
    let code = &mut emission.code;
    code.copy(ADDEND, ADDRESS);
    code.complement(ADDEND);
    code.zero_extend_32(SCRATCH, RDX);
    code.lea(SCRATCH, indexed(SCRATCH, ADDEND, 0, 1));
    code.immediate(ADDEND, SIGN_SHIFT);
    code.shift_right(SCRATCH, SCRATCH, ADDEND);
    if found != 1 {
        code.lea(SCRATCH, at(SCRATCH, found - 1));
    }
    emission.slow_unless_found();
}

/// The same for a dividend without upper half, which most are: there is a divisor.
fn check_wide(emission: &mut Emission<'_>) {
    emission.settle(48);
    let found = emission.found();
    emission.code.lea(SCRATCH, at(RDX, found));
    emission.slow_unless_found();
    emission.settle(16);
    emission.code.copy(SCRATCH, ADDRESS);
    emission.slow_if_nothing();
}
