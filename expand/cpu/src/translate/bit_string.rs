//! BT, BTS, BTR and BTC on memory with the bit's number in a register of 32 or 64 bits: the operand that
//! holds the bit is loaded, and the instruction executed on that.

use iced_x86::{Mnemonic, OpKind};
use reprise_trace::cpu_state::{FS, GS};

use super::assembler::{Host, at, indexed};
use super::emission::{Emission, addressable};
use super::registers::{ADDEND, ADDRESS, SCRATCH};
use crate::decode::op::Op;

/// Emits such an instruction; `None`, with nothing emitted, if it is not one of these.
pub(super) fn emit(emission: &mut Emission<'_>, op: &Op) -> Option<()> {
    let instruction = &*op.instruction;
    let opcode = match instruction.mnemonic() {
        Mnemonic::Bt => 0xa3,
        Mnemonic::Bts => 0xab,
        Mnemonic::Btr => 0xb3,
        Mnemonic::Btc => 0xbb,
        _ => return None,
    };
    let memory = instruction.op0_kind() == OpKind::Memory;
    let by_register = instruction.op1_kind() == OpKind::Register;
    let plain = addressable(op) && !matches!(usize::from(op.b), FS | GS);
    if !memory || !by_register || !plain || !matches!(op.size, 4 | 8) {
        return None;
    }
    let wide = op.size == 8;
    emission.effective_address(op);
    emission.settle(48);
    let (bits_shift, bytes_shift) = if wide { (6, 3) } else { (5, 2) };
    let number = emission.in_register(op.a, SCRATCH);
    let code = &mut emission.code;
    if wide {
        code.copy(SCRATCH, number);
    } else {
        code.sign_extend_32(SCRATCH, number);
    }
    code.immediate(ADDEND, bits_shift);
    code.shift_right_signed(SCRATCH, SCRATCH, ADDEND);
    code.lea(ADDRESS, indexed(ADDRESS, SCRATCH, bytes_shift, 0));
    let writes = instruction.mnemonic() != Mnemonic::Bt;
    emission.translate(writes, u64::from(op.size));
    emission.settle(48);
    emission.code.lea(ADDRESS, indexed(ADDRESS, ADDEND, 0, 0));
    let number = emission.in_register(op.a, SCRATCH);
    let code = &mut emission.code;
    if wide {
        code.load(ADDEND, at(ADDRESS, 0));
    } else {
        code.load_32(ADDEND, at(ADDRESS, 0));
    }
    code.bytes(&on_registers(opcode, ADDEND, number, wide));
    match (writes, wide) {
        (true, true) => code.store(at(ADDRESS, 0), ADDEND),
        (true, false) => code.store_32(at(ADDRESS, 0), ADDEND),
        (false, _) => {}
    }
    Some(())
}

/// The instruction on two registers.
fn on_registers(opcode: u8, value: Host, number: Host, wide: bool) -> [u8; 4] {
    let rex = 0x40 | u8::from(wide) << 3 | (number.0 >> 3) << 2 | value.0 >> 3;
    [rex, 0x0f, opcode, 0xc0 | (number.0 & 7) << 3 | value.0 & 7]
}
