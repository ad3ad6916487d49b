//! BT, BTS, BTR and BTC on memory with the bit's number in a register: the only computational
//! instructions whose address depends on another operand's value. Also XLAT. Both keep the operand's
//! segment in [`Op::b`]: where segments are checked, it is at the address that they compute.

use iced_x86::{Mnemonic, OpKind};
use reprise_trace::cpu_state::{RAX, RBX};

use super::{BlockEnd, handler};
use crate::cpu::{Cpu, NO_SEGMENT};
use crate::decode::op::{Op, segment_index};
use crate::fault::Stop;
use crate::mode::Mode;

pub(super) fn select(op: &mut Op, mode: Mode) -> Option<BlockEnd> {
    let instruction = &*op.instruction;
    match instruction.mnemonic() {
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
            if instruction.op0_kind() == OpKind::Memory
                && instruction.op1_kind() == OpKind::Register =>
        {
            op.size = instruction.op1_register().size() as u8;
            op.a = instruction.op1_register().full_register().number() as u8;
            op.operand_bytes = u16::from(op.size);
            (op.b, op.segment) = (op.segment, NO_SEGMENT);
            op.handler = bit_in_memory;
        }
        Mnemonic::Xlatb => {
            op.b = segment_index(instruction.memory_segment());
            op.segment = NO_SEGMENT;
            op.address_mask = match instruction.op0_kind() {
                _ if instruction.memory_base().size() == 2 => 0xffff,
                _ if instruction.memory_base().size() == 4 => 0xffff_ffff,
                _ => mode.rip_mask(),
            };
            op.operand_bytes = 1;
            op.handler = translate_byte;
        }
        _ => return None,
    }
    Some(BlockEnd::Continue)
}

handler!(bit_in_memory(cpu, op) {
    let bits = u32::from(op.size) * 8;
    let number = cpu.registers.gpr[usize::from(op.a)];
    let number = (number << (64 - bits)) as i64 >> (64 - bits);
    let bytes_away = (number >> bits.trailing_zeros()).wrapping_mul(i64::from(op.size));
    let offset = op.effective_address(cpu).wrapping_add(bytes_away as u64) & op.address_mask;
    let write = op.instruction.mnemonic() != Mnemonic::Bt;
    let linear = cpu.segment_address(op.b, offset, u64::from(op.size), write)?;
    let mask = 1u64 << (number as u64 & u64::from(bits - 1));
    if write {
        // Its page fault is a write's, though the bit is read first.
        cpu.check_store(linear, op.b, u64::from(op.size))?;
    }
    let value = load(cpu, op, linear)?;
    let changed = match op.instruction.mnemonic() {
        Mnemonic::Bts => value | mask,
        Mnemonic::Btr => value & !mask,
        Mnemonic::Btc => value ^ mask,
        _ => value,
    };
    if write {
        match op.size {
            2 => cpu.store(linear, op.b, changed as u16)?,
            4 => cpu.store(linear, op.b, changed as u32)?,
            _ => cpu.store(linear, op.b, changed)?,
        }
    }
    let carry = u16::from(value & mask != 0) << 8;
    cpu.registers.arithmetic.0 = cpu.registers.arithmetic.0 & !0x100 | carry;
    cpu.stored()
});

fn load(cpu: &mut Cpu, op: &Op, linear: u64) -> Result<u64, Stop> {
    Ok(match op.size {
        2 => u64::from(cpu.load::<u16>(linear, op.b)?),
        4 => u64::from(cpu.load::<u32>(linear, op.b)?),
        _ => cpu.load::<u64>(linear, op.b)?,
    })
}

handler!(translate_byte(cpu, op) {
    let gpr = &cpu.registers.gpr;
    let offset = gpr[RBX].wrapping_add(gpr[RAX] & 0xff) & op.address_mask;
    let linear = cpu.segment_address(op.b, offset, 1, false)?;
    let value = cpu.load::<u8>(linear, op.b)?;
    let rax = &mut cpu.registers.gpr[RAX];
    *rax = *rax & !0xff | u64::from(value);
    Ok(())
});
