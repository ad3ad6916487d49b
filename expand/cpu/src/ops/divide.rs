//! DIV and IDIV: the host divides, but only after it is sure that it will not trap.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use reprise_trace::cpu_state::{RAX, RDX};

use super::{BlockEnd, handler};
use crate::cpu::Cpu;
use crate::decode::op::Op;
use crate::fault::{Fault, Stop};
use crate::mode::Mode;

pub(super) fn select(op: &mut Op, _mode: Mode) -> Option<BlockEnd> {
    if !matches!(op.instruction.mnemonic(), Mnemonic::Div | Mnemonic::Idiv) {
        return None;
    }
    let instruction = &*op.instruction;
    op.size = match instruction.op0_kind() {
        OpKind::Register => instruction.op0_register().size() as u8,
        _ => instruction.memory_size().size() as u8,
    };
    op.operand_bytes = u16::from(op.size);
    op.reads = true;
    op.handler = divide;
    Some(BlockEnd::Continue)
}

handler!(divide(cpu, op) {
    let divisor = operand(cpu, op)?;
    let signed = op.instruction.mnemonic() == Mnemonic::Idiv;
    let Some((quotient, remainder)) = quotient(cpu, op.size, divisor, signed) else {
        return cpu.fault(Fault::DE);
    };
    match op.size {
        1 => {
            let ax = quotient & 0xff | (remainder & 0xff) << 8;
            cpu.set_general(RAX, ax, 2);
        }
        size => {
            cpu.set_general(RAX, quotient, u64::from(size));
            cpu.set_general(RDX, remainder, u64::from(size));
        }
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

/// Quotient and remainder of the dividend in AX, or DX:AX and wider; `None` if there is none or it
/// does not fit.
fn quotient(cpu: &Cpu, size: u8, divisor: u64, signed: bool) -> Option<(u64, u64)> {
    let bits = u32::from(size) * 8;
    let mask = u128::from(u64::MAX >> (64 - bits));
    let gpr = &cpu.registers.gpr;
    let dividend = if size == 1 {
        u128::from(gpr[RAX] & 0xffff)
    } else {
        (u128::from(gpr[RDX]) & mask) << bits | u128::from(gpr[RAX]) & mask
    };
    if divisor == 0 {
        return None;
    }
    if !signed {
        let (quotient, remainder) =
            (dividend / u128::from(divisor), dividend % u128::from(divisor));
        return (quotient <= mask).then_some((quotient as u64, remainder as u64));
    }
    let widen = |value: u128, bits: u32| (value << (128 - bits)) as i128 >> (128 - bits);
    let dividend = widen(dividend, 2 * bits);
    let divisor = widen(u128::from(divisor), bits);
    let quotient = dividend.checked_div(divisor)?;
    let remainder = dividend.wrapping_rem(divisor);
    let limit = 1i128 << (bits - 1);
    (-limit..limit).contains(&quotient).then_some((quotient as u64, remainder as u64))
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
