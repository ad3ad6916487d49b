//! DIV and IDIV: the host divides, but only after it is sure that it will not trap.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use reprise_trace::cpu_state::{RAX, RDX};

use super::handler;
use crate::cpu::Cpu;
use crate::decode::op::Op;
use crate::fault::{Fault, Stop};
use crate::native;

/// Puts the check in front of what native selection gave a division.
pub(super) fn wrap_native(op: &mut Op) {
    if matches!(op.instruction.mnemonic(), Mnemonic::Div | Mnemonic::Idiv) {
        op.size = match op.instruction.op0_kind() {
            OpKind::Register => op.instruction.op0_register().size() as u8,
            _ => op.instruction.memory_size().size() as u8,
        };
        op.handler = divide;
    }
}

handler!(divide(cpu, op) {
    let divisor = operand(cpu, op)?;
    let signed = op.instruction.mnemonic() == Mnemonic::Idiv;
    if !has_quotient(cpu, op.size, divisor, signed) {
        return cpu.fault(Fault::DE);
    }
    // A device must not be read twice, so the sequence gets the divisor as loaded.
    if op.native.is_some() {
        native::run_on(cpu, op, &mut divisor.to_le_bytes()[..usize::from(op.size)]);
    } else {
        native::run_register(cpu, op);
    }
    Ok(())
});

fn operand(cpu: &mut Cpu, op: &Op) -> Result<u64, Stop> {
    if op.instruction.op0_kind() == OpKind::Register {
        return Ok(cpu.general_operand(&op.instruction, 0));
    }
    let linear = op.linear_address(cpu);
    Ok(match op.size {
        1 => u64::from(cpu.load::<u8>(linear, op.segment)?),
        2 => u64::from(cpu.load::<u16>(linear, op.segment)?),
        4 => u64::from(cpu.load::<u32>(linear, op.segment)?),
        _ => cpu.load::<u64>(linear, op.segment)?,
    })
}

/// Whether the dividend in AX, or DX:AX and wider, has a quotient that fits.
fn has_quotient(cpu: &Cpu, size: u8, divisor: u64, signed: bool) -> bool {
    let bits = u32::from(size) * 8;
    let mask = u128::from(u64::MAX >> (64 - bits));
    let gpr = &cpu.registers.gpr;
    let dividend = if size == 1 {
        u128::from(gpr[RAX] & 0xffff)
    } else {
        (u128::from(gpr[RDX]) & mask) << bits | u128::from(gpr[RAX]) & mask
    };
    if !signed {
        // The quotient fits if the upper half is less than the divisor; zero divides nothing.
        return dividend >> bits < u128::from(divisor);
    }
    let widen = |value: u128, bits: u32| (value << (128 - bits)) as i128 >> (128 - bits);
    let dividend = widen(dividend, 2 * bits);
    let divisor = widen(u128::from(divisor), bits);
    let limit = 1i128 << (bits - 1);
    let small = dividend.checked_div(divisor);
    small.is_some_and(|quotient| (-limit..limit).contains(&quotient))
}

impl Cpu {
    /// The value of a general-register operand, zero-extended; AH and its like included.
    pub(crate) fn general_operand(&self, instruction: &Instruction, operand: u32) -> u64 {
        let register = instruction.op_register(operand);
        let full = self.registers.gpr[register.full_register().number()];
        match register {
            Register::AH | Register::CH | Register::DH | Register::BH => full >> 8 & 0xff,
            _ => match register.size() {
                1 => full & 0xff,
                2 => full & 0xffff,
                4 => full & 0xffff_ffff,
                _ => full,
            },
        }
    }
}
