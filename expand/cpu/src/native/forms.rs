//! An instruction of any form, for tests that go through all of them.

use iced_x86::{
    Code, Decoder, Encoder, Instruction, MemoryOperand, OpCodeOperandKind, OpKind, Register,
};
use reprise_random::Random;

use crate::decode::OPTIONS;

/// An integer that is often an edge.
pub(crate) fn integer(random: &mut Random) -> u64 {
    match random.below(8) {
        0 => 0,
        1 => u64::MAX,
        2 => random.below(256),
        3 => 1 << random.below(64),
        4 => (1 << random.below(64)) - 1,
        _ => random.next(),
    }
}

/// The instruction of `code` in a 64-bit (or else 32-bit) code segment, with registers and immediates
/// chosen at random, and its bytes; `None` if there is none with (or without) a memory operand.
pub(crate) fn build(
    code: Code,
    bits: u32,
    memory: Option<&MemoryOperand>,
    random: &mut Random,
) -> Option<(Instruction, Vec<u8>)> {
    // Not every choice of registers can be encoded: a high byte beside R8, say.
    (0..32).find_map(|_| build_once(code, bits, memory, random))
}

fn build_once(
    code: Code,
    bits: u32,
    memory: Option<&MemoryOperand>,
    random: &mut Random,
) -> Option<(Instruction, Vec<u8>)> {
    let mut instruction = Instruction::new();
    instruction.set_code(code);
    let mut used_memory = false;
    let mut immediates = 0;
    for (operand, kind) in code.op_code().op_kinds().iter().enumerate() {
        let operand = operand as u32;
        if let Some(register) = register(*kind, bits, memory.is_some(), random) {
            instruction.set_op_kind(operand, OpKind::Register);
            instruction.set_op_register(operand, register);
        } else if let Some(kind) = string_operand(*kind, bits) {
            instruction.set_op_kind(operand, kind);
            used_memory = true;
        } else if let Some(kind) = immediate(*kind, &mut immediates) {
            instruction.set_op_kind(operand, kind);
            set_immediate(&mut instruction, kind, random);
        } else if is_memory(*kind) {
            set_memory(&mut instruction, operand, *kind, memory?);
            used_memory = true;
        } else {
            return None;
        }
    }
    if used_memory != memory.is_some() {
        return None;
    }
    let mut encoder = Encoder::new(bits);
    encoder.encode(&instruction, 0).ok()?;
    let bytes = encoder.take_buffer();
    let decoded = Decoder::with_ip(bits, &bytes, 0, OPTIONS).decode();
    (decoded.code() == code).then_some((decoded, bytes))
}

fn register(
    kind: OpCodeOperandKind,
    bits: u32,
    memory: bool,
    random: &mut Random,
) -> Option<Register> {
    use OpCodeOperandKind as Kind;
    let any = |first: Register, random: &mut Random| {
        first + random.below(if bits == 64 { 16 } else { 8 }) as u32
    };
    let fits = |kind: Kind| {
        use Kind::*;
        !memory
            || !matches!(kind, r8_or_mem | r16_or_mem | r32_or_mem | r64_or_mem)
                && !matches!(kind, mm_or_mem | xmm_or_mem)
    };
    if !fits(kind) {
        return None;
    }
    Some(match kind {
        // Four more than the low bytes: AH, CH, DH, BH come between.
        Kind::r8_or_mem | Kind::r8_reg | Kind::r8_opcode => {
            Register::AL + random.below(if bits == 64 { 20 } else { 8 }) as u32
        }
        Kind::r16_or_mem | Kind::r16_reg | Kind::r16_rm | Kind::r16_opcode => {
            any(Register::AX, random)
        }
        Kind::r32_or_mem | Kind::r32_reg | Kind::r32_rm | Kind::r32_opcode => {
            any(Register::EAX, random)
        }
        Kind::r64_or_mem | Kind::r64_reg | Kind::r64_rm | Kind::r64_opcode => {
            any(Register::RAX, random)
        }
        Kind::mm_or_mem | Kind::mm_reg | Kind::mm_rm => Register::MM0 + random.below(8) as u32,
        Kind::xmm_or_mem | Kind::xmm_reg | Kind::xmm_rm => any(Register::XMM0, random),
        Kind::seg_reg => Register::ES + random.below(6) as u32,
        Kind::cr_reg => [Register::CR0, Register::CR2, Register::CR3][random.below(3) as usize],
        Kind::dr_reg => Register::DR0 + random.below(4) as u32,
        Kind::es => Register::ES,
        Kind::cs => Register::CS,
        Kind::ss => Register::SS,
        Kind::ds => Register::DS,
        Kind::fs => Register::FS,
        Kind::gs => Register::GS,
        Kind::al => Register::AL,
        Kind::cl => Register::CL,
        Kind::ax => Register::AX,
        Kind::dx => Register::DX,
        Kind::eax => Register::EAX,
        Kind::rax => Register::RAX,
        Kind::st0 => Register::ST0,
        Kind::sti_opcode => Register::ST0 + random.below(8) as u32,
        _ => return None,
    })
}

fn string_operand(kind: OpCodeOperandKind, bits: u32) -> Option<OpKind> {
    let wide = bits == 64;
    Some(match kind {
        OpCodeOperandKind::es_rDI if wide => OpKind::MemoryESRDI,
        OpCodeOperandKind::es_rDI => OpKind::MemoryESEDI,
        OpCodeOperandKind::seg_rDI if wide => OpKind::MemorySegRDI,
        OpCodeOperandKind::seg_rDI => OpKind::MemorySegEDI,
        OpCodeOperandKind::seg_rSI if wide => OpKind::MemorySegRSI,
        OpCodeOperandKind::seg_rSI => OpKind::MemorySegESI,
        _ => return None,
    })
}

fn immediate(kind: OpCodeOperandKind, number: &mut u32) -> Option<OpKind> {
    use OpCodeOperandKind as Kind;
    let kind = match kind {
        Kind::imm8 | Kind::imm8_const_1 if *number > 0 => OpKind::Immediate8_2nd,
        Kind::imm8 | Kind::imm8_const_1 => OpKind::Immediate8,
        Kind::imm8sex16 => OpKind::Immediate8to16,
        Kind::imm8sex32 => OpKind::Immediate8to32,
        Kind::imm8sex64 => OpKind::Immediate8to64,
        Kind::imm16 => OpKind::Immediate16,
        Kind::imm32 => OpKind::Immediate32,
        Kind::imm32sex64 => OpKind::Immediate32to64,
        Kind::imm64 => OpKind::Immediate64,
        Kind::br16_1 | Kind::br16_2 => OpKind::NearBranch16,
        Kind::br32_1 | Kind::br32_4 => OpKind::NearBranch32,
        Kind::br64_1 | Kind::br64_4 => OpKind::NearBranch64,
        Kind::farbr2_2 => OpKind::FarBranch16,
        Kind::farbr4_2 => OpKind::FarBranch32,
        _ => return None,
    };
    *number += 1;
    Some(kind)
}

fn set_immediate(instruction: &mut Instruction, kind: OpKind, random: &mut Random) {
    let value = integer(random);
    let constant_1 =
        instruction.code().op_code().op_kinds().contains(&OpCodeOperandKind::imm8_const_1);
    match kind {
        OpKind::Immediate8 if constant_1 => instruction.set_immediate8(1),
        OpKind::Immediate8 => instruction.set_immediate8(value as u8),
        OpKind::Immediate8_2nd => instruction.set_immediate8_2nd(value as u8),
        OpKind::Immediate8to16 => instruction.set_immediate8to16((value as i8).into()),
        OpKind::Immediate8to32 => instruction.set_immediate8to32((value as i8).into()),
        OpKind::Immediate8to64 => instruction.set_immediate8to64((value as i8).into()),
        OpKind::Immediate16 => instruction.set_immediate16(value as u16),
        OpKind::Immediate32 => instruction.set_immediate32(value as u32),
        OpKind::Immediate32to64 => instruction.set_immediate32to64((value as i32).into()),
        OpKind::Immediate64 => instruction.set_immediate64(value),
        OpKind::NearBranch16 => instruction.set_near_branch16(0x40),
        OpKind::NearBranch32 => instruction.set_near_branch32(0x40),
        OpKind::NearBranch64 => instruction.set_near_branch64(0x40),
        OpKind::FarBranch16 => instruction.set_far_branch16(0x40),
        _ => instruction.set_far_branch32(0x40),
    }
}

fn is_memory(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind::*;
    matches!(kind, mem | mem_offs | mem_mib | mem_mpx | seg_rBX_al | mm_or_mem | xmm_or_mem)
        || matches!(kind, r8_or_mem | r16_or_mem | r32_or_mem | r64_or_mem)
}

fn set_memory(
    instruction: &mut Instruction,
    operand: u32,
    kind: OpCodeOperandKind,
    memory: &MemoryOperand,
) {
    instruction.set_op_kind(operand, OpKind::Memory);
    instruction.set_memory_displacement64(memory.displacement as u64);
    instruction.set_memory_displ_size(memory.displ_size);
    if kind == OpCodeOperandKind::mem_offs {
        let wide = memory.base.size() == 8;
        instruction.set_memory_displ_size(if wide { 8 } else { 4 });
        return;
    }
    instruction.set_memory_base(memory.base);
    instruction.set_memory_index(memory.index);
    instruction.set_memory_index_scale(memory.scale);
    if kind == OpCodeOperandKind::seg_rBX_al {
        let wide = memory.base.size() == 8;
        instruction.set_memory_base(if wide { Register::RBX } else { Register::EBX });
        instruction.set_memory_index(Register::AL);
        instruction.set_memory_index_scale(1);
        instruction.set_memory_displacement64(0);
        instruction.set_memory_displ_size(0);
    }
}
