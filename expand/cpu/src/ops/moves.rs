//! MOV, MOVZX, MOVSX and LEA in their common forms. They compute nothing, are a third of all that a
//! guest executes, and skip the native call.

use iced_x86::{Code, OpKind, Register};

use super::{BlockEnd, handler};
use crate::decode::op::{Handler, Op};
use crate::memory::access::Scalar;
use crate::mode::Mode;

pub(super) fn select(op: &mut Op, _mode: Mode) -> Option<BlockEnd> {
    let instruction = &*op.instruction;
    let kind = |operand| instruction.op_kind(operand);
    let handler: Handler = match (instruction.code(), kind(0), kind(1)) {
        (code, OpKind::Register, OpKind::Register) => register_to_register(code)?,
        (code, OpKind::Register, OpKind::Memory) => load(code)?,
        (code, OpKind::Memory, OpKind::Register) => store_register(code)?,
        (code, OpKind::Memory, _) => store_immediate(code)?,
        (code, OpKind::Register, _) => immediate_to_register(code)?,
        _ => return None,
    };
    let number = |operand| match kind(operand) {
        OpKind::Register => general_number(instruction.op_register(operand)),
        _ => Some(0),
    };
    let (a, b) = (number(0)?, number(1)?);
    if !matches!(kind(1), OpKind::Register | OpKind::Memory) {
        op.immediate = instruction.immediate(1);
    }
    op.size = instruction.op0_register().size() as u8;
    op.operand_bytes = instruction.memory_size().size() as u16;
    op.writes = kind(0) == OpKind::Memory;
    op.reads = kind(1) == OpKind::Memory;
    (op.a, op.b) = (a, b);
    op.handler = handler;
    op.instruction.inline = true;
    Some(BlockEnd::Continue)
}

/// A general register's index; `None` for AH, CH, DH, BH and for other registers.
fn general_number(register: Register) -> Option<u8> {
    let high = matches!(register, Register::AH | Register::CH | Register::DH | Register::BH);
    if !register.is_gpr() || high { None } else { Some(register.full_register().number() as u8) }
}

fn register_to_register(code: Code) -> Option<Handler> {
    Some(match code {
        Code::Mov_r64_rm64 | Code::Mov_rm64_r64 => copy_64,
        Code::Mov_r32_rm32 | Code::Mov_rm32_r32 => copy_32,
        Code::Movzx_r32_rm8 | Code::Movzx_r64_rm8 => zero_extend_8,
        Code::Movzx_r32_rm16 | Code::Movzx_r64_rm16 => zero_extend_16,
        Code::Movsxd_r64_rm32 => sign_extend_32,
        _ => return None,
    })
}

fn load(code: Code) -> Option<Handler> {
    Some(match code {
        Code::Mov_r64_rm64 | Code::Mov_RAX_moffs64 => load_whole::<8>,
        Code::Mov_r32_rm32 | Code::Mov_EAX_moffs32 => load_whole::<4>,
        Code::Movzx_r32_rm8 | Code::Movzx_r64_rm8 => load_whole::<1>,
        Code::Movzx_r32_rm16 | Code::Movzx_r64_rm16 => load_whole::<2>,
        Code::Mov_r16_rm16 => load_part::<2>,
        Code::Mov_r8_rm8 => load_part::<1>,
        Code::Movsxd_r64_rm32 => load_signed::<4, 8>,
        Code::Movsx_r64_rm16 => load_signed::<2, 8>,
        Code::Movsx_r64_rm8 => load_signed::<1, 8>,
        Code::Movsx_r32_rm16 => load_signed::<2, 4>,
        Code::Movsx_r32_rm8 => load_signed::<1, 4>,
        Code::Lea_r64_m => lea::<8>,
        Code::Lea_r32_m => lea::<4>,
        Code::Lea_r16_m => lea::<2>,
        _ => return None,
    })
}

fn store_register(code: Code) -> Option<Handler> {
    Some(match code {
        Code::Mov_rm64_r64 | Code::Mov_moffs64_RAX => store_register_of::<8>,
        Code::Mov_rm32_r32 | Code::Mov_moffs32_EAX => store_register_of::<4>,
        Code::Mov_rm16_r16 | Code::Mov_moffs16_AX => store_register_of::<2>,
        Code::Mov_rm8_r8 | Code::Mov_moffs8_AL => store_register_of::<1>,
        _ => return None,
    })
}

fn store_immediate(code: Code) -> Option<Handler> {
    Some(match code {
        Code::Mov_rm64_imm32 => store_immediate_of::<8>,
        Code::Mov_rm32_imm32 => store_immediate_of::<4>,
        Code::Mov_rm16_imm16 => store_immediate_of::<2>,
        Code::Mov_rm8_imm8 => store_immediate_of::<1>,
        _ => return None,
    })
}

fn immediate_to_register(code: Code) -> Option<Handler> {
    Some(match code {
        Code::Mov_r64_imm64 | Code::Mov_rm64_imm32 => immediate_64,
        Code::Mov_r32_imm32 | Code::Mov_rm32_imm32 => immediate_32,
        _ => return None,
    })
}

handler!(copy_64(cpu, op) {
    *cpu.registers.general_mut(op.a) = cpu.registers.general(op.b);
    Ok(())
});
handler!(copy_32(cpu, op) {
    *cpu.registers.general_mut(op.a) = u64::from(cpu.registers.general(op.b) as u32);
    Ok(())
});
handler!(zero_extend_8(cpu, op) {
    *cpu.registers.general_mut(op.a) = u64::from(cpu.registers.general(op.b) as u8);
    Ok(())
});
handler!(zero_extend_16(cpu, op) {
    *cpu.registers.general_mut(op.a) = u64::from(cpu.registers.general(op.b) as u16);
    Ok(())
});
handler!(sign_extend_32(cpu, op) {
    *cpu.registers.general_mut(op.a) = i64::from(cpu.registers.general(op.b) as i32) as u64;
    Ok(())
});
handler!(immediate_64(cpu, op) {
    *cpu.registers.general_mut(op.a) = op.immediate;
    Ok(())
});
handler!(immediate_32(cpu, op) {
    *cpu.registers.general_mut(op.a) = u64::from(op.immediate as u32);
    Ok(())
});

/// Loads `BYTES` bytes, zero-extended.
macro_rules! load_sized {
    ($cpu:ident, $op:ident, $bytes:expr) => {{
        let linear = $op.linear_address($cpu);
        match $bytes {
            1 => $cpu.load::<u8>(linear, $op.segment)?.to_u64(),
            2 => $cpu.load::<u16>(linear, $op.segment)?.to_u64(),
            4 => $cpu.load::<u32>(linear, $op.segment)?.to_u64(),
            _ => $cpu.load::<u64>(linear, $op.segment)?,
        }
    }};
}

handler!(load_whole<const BYTES: u8>(cpu, op) {
    *cpu.registers.general_mut(op.a) = load_sized!(cpu, op, BYTES);
    Ok(())
});
handler!(load_part<const BYTES: u8>(cpu, op) {
    let value = load_sized!(cpu, op, BYTES);
    let mask = if BYTES == 1 { 0xff } else { 0xffff };
    let register = cpu.registers.general_mut(op.a);
    *register = *register & !mask | value;
    Ok(())
});
handler!(load_signed<const BYTES: u8, const TO: u8>(cpu, op) {
    let shift = 64 - 8 * u32::from(BYTES);
    let value = ((load_sized!(cpu, op, BYTES) << shift) as i64 >> shift) as u64;
    *cpu.registers.general_mut(op.a) = if TO == 4 { u64::from(value as u32) } else { value };
    Ok(())
});
handler!(lea<const BYTES: u8>(cpu, op) {
    let address = op.effective_address(cpu);
    let register = cpu.registers.general_mut(op.a);
    *register = match BYTES {
        8 => address,
        4 => u64::from(address as u32),
        _ => *register & !0xffff | address & 0xffff,
    };
    Ok(())
});

/// Stores the low `BYTES` bytes of a value.
macro_rules! store_sized {
    ($cpu:ident, $op:ident, $bytes:expr, $value:expr) => {{
        let linear = $op.linear_address($cpu);
        let value = $value;
        match $bytes {
            1 => $cpu.store(linear, $op.segment, value as u8)?,
            2 => $cpu.store(linear, $op.segment, value as u16)?,
            4 => $cpu.store(linear, $op.segment, value as u32)?,
            _ => $cpu.store(linear, $op.segment, value)?,
        }
        $cpu.stored()
    }};
}

handler!(store_register_of<const BYTES: u8>(cpu, op) {
    store_sized!(cpu, op, BYTES, cpu.registers.general(op.b))
});
handler!(store_immediate_of<const BYTES: u8>(cpu, op) {
    store_sized!(cpu, op, BYTES, op.immediate)
});
