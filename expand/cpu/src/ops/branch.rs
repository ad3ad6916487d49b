//! Near jumps, calls, returns and loops.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};
use reprise_trace::cpu_state::{CS, RCX};

use super::{BlockEnd, handler};
use crate::cpu::Cpu;
use crate::decode::op::{Handler, Op};
use crate::fault::{Fault, Stop};
use crate::memory::walk::canonical;
use crate::mode::Mode;

/// The sixteen handlers of a condition, by its code.
macro_rules! by_condition {
    ($handler:ident) => {
        [
            $handler::<0>,
            $handler::<1>,
            $handler::<2>,
            $handler::<3>,
            $handler::<4>,
            $handler::<5>,
            $handler::<6>,
            $handler::<7>,
            $handler::<8>,
            $handler::<9>,
            $handler::<10>,
            $handler::<11>,
            $handler::<12>,
            $handler::<13>,
            $handler::<14>,
            $handler::<15>,
        ]
    };
}
const CONDITIONAL: [Handler; 16] = by_condition!(conditional);

pub(super) fn select(op: &mut Op, mode: Mode) -> Option<BlockEnd> {
    let instruction = &*op.instruction;
    let handler: Handler = match instruction.mnemonic() {
        _ if instruction.is_jcc_short_or_near() => CONDITIONAL[condition_code(instruction)],
        Mnemonic::Jmp if is_relative(instruction) => jump,
        Mnemonic::Jmp if is_near_indirect(instruction) => jump_indirect,
        Mnemonic::Call if is_relative(instruction) => call,
        Mnemonic::Call if is_near_indirect(instruction) => call_indirect,
        Mnemonic::Ret => return_near,
        Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne => loop_,
        Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz => jump_if_rcx_zero,
        _ => return None,
    };
    if instruction.op_count() > 0 {
        match instruction.op0_kind() {
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                op.immediate = instruction.near_branch_target();
            }
            OpKind::Register => op.a = instruction.op0_register().number() as u8,
            OpKind::Immediate16 => op.immediate = u64::from(instruction.immediate16()),
            _ => {}
        }
    }
    op.size = branch_size(instruction, mode);
    op.operand_bytes = u16::from(op.size);
    op.reads = true;
    op.b = counter_bytes(instruction.code());
    op.handler = handler;
    Some(BlockEnd::Branch)
}

/// The condition's number in the instruction encoding.
pub(crate) fn condition_code(instruction: &Instruction) -> usize {
    use iced_x86::ConditionCode as Condition;
    match instruction.condition_code() {
        Condition::None | Condition::o => 0,
        Condition::no => 1,
        Condition::b => 2,
        Condition::ae => 3,
        Condition::e => 4,
        Condition::ne => 5,
        Condition::be => 6,
        Condition::a => 7,
        Condition::s => 8,
        Condition::ns => 9,
        Condition::p => 10,
        Condition::np => 11,
        Condition::l => 12,
        Condition::ge => 13,
        Condition::le => 14,
        Condition::g => 15,
    }
}

fn is_relative(instruction: &Instruction) -> bool {
    matches!(
        instruction.op0_kind(),
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
    )
}

fn is_near_indirect(instruction: &Instruction) -> bool {
    instruction.is_jmp_near_indirect() || instruction.is_call_near_indirect()
}

/// Bytes of what a branch pushes or pops, and of its target: the operand size.
fn branch_size(instruction: &Instruction, mode: Mode) -> u8 {
    match instruction.code() {
        Code::Jmp_rm16 | Code::Call_rm16 | Code::Retnw | Code::Retnw_imm16 => 2,
        Code::Call_rel16 | Code::Jmp_rel16 | Code::Jmp_rel8_16 => 2,
        code if instruction.is_jcc_short_or_near() => match code.op_code().operand_size() {
            16 => 2,
            _ if mode.has(Mode::CODE_64) => 8,
            _ => 4,
        },
        _ if mode.has(Mode::CODE_64) => 8,
        Code::Loop_rel8_16_CX | Code::Loop_rel8_16_ECX | Code::Loope_rel8_16_CX => 2,
        Code::Loope_rel8_16_ECX | Code::Loopne_rel8_16_CX | Code::Loopne_rel8_16_ECX => 2,
        Code::Jcxz_rel8_16 | Code::Jecxz_rel8_16 => 2,
        _ => 4,
    }
}

/// Bytes of the counter that LOOP and JCXZ look at: the address size.
fn counter_bytes(code: Code) -> u8 {
    match code {
        Code::Loop_rel8_16_CX | Code::Loop_rel8_32_CX => 2,
        Code::Loope_rel8_16_CX | Code::Loope_rel8_32_CX => 2,
        Code::Loopne_rel8_16_CX | Code::Loopne_rel8_32_CX => 2,
        Code::Jcxz_rel8_16 | Code::Jcxz_rel8_32 => 2,
        Code::Loop_rel8_64_RCX | Code::Loope_rel8_64_RCX => 8,
        Code::Loopne_rel8_64_RCX | Code::Jrcxz_rel8_64 | Code::Jrcxz_rel8_16 => 8,
        Code::Loop_rel8_16_RCX | Code::Loope_rel8_16_RCX | Code::Loopne_rel8_16_RCX => 8,
        _ => 4,
    }
}

impl Cpu {
    /// Checks that RIP may become `target`: canonical, or within CS outside 64-bit mode.
    #[inline(always)]
    pub(crate) fn check_target(&mut self, target: u64) -> Result<(), Stop> {
        let fits = if self.mode_64() {
            canonical(target)
        } else {
            target <= u64::from(self.system.segments[CS].limit)
        };
        if fits { Ok(()) } else { self.fault(Fault::GP0) }
    }

    #[inline(always)]
    fn go(&mut self, op: &Op, target: u64) -> Result<(), Stop> {
        let target = if op.size == 2 { target & 0xffff } else { target };
        self.check_target(target)?;
        self.rip = target;
        Ok(())
    }
}

handler!(conditional<const CODE: u8>(cpu, op) {
    if cpu.registers.arithmetic.condition::<CODE>() {
        let target = op.branch_target(cpu);
        cpu.go(op, target)
    } else {
        cpu.rip = op.next_rip(cpu);
        Ok(())
    }
});
handler!(jump(cpu, op) {
    let target = op.branch_target(cpu);
    cpu.go(op, target)
});
handler!(call(cpu, op) {
    let target = op.branch_target(cpu);
    let target = if op.size == 2 { target & 0xffff } else { target };
    let next = op.next_rip(cpu);
    cpu.check_target(target)?;
    cpu.push(next, u64::from(op.size))?;
    cpu.rip = target;
    Ok(())
});
handler!(jump_indirect(cpu, op) {
    let target = indirect_target(cpu, op)?;
    cpu.go(op, target)
});
handler!(call_indirect(cpu, op) {
    let target = indirect_target(cpu, op)?;
    let next = op.next_rip(cpu);
    cpu.check_target(target)?;
    cpu.push(next, u64::from(op.size))?;
    cpu.rip = target;
    Ok(())
});

#[inline(always)]
fn indirect_target(cpu: &mut Cpu, op: &Op) -> Result<u64, Stop> {
    if op.instruction.op0_kind() == OpKind::Register {
        let value = cpu.registers.general(op.a);
        return Ok(match op.size {
            8 => value,
            4 => u64::from(value as u32),
            _ => u64::from(value as u16),
        });
    }
    let linear = op.linear_address(cpu);
    Ok(match op.size {
        8 => cpu.load::<u64>(linear, op.segment)?,
        4 => u64::from(cpu.load::<u32>(linear, op.segment)?),
        _ => u64::from(cpu.load::<u16>(linear, op.segment)?),
    })
}

handler!(return_near(cpu, op) {
    let size = u64::from(op.size);
    let target = cpu.peek(0, size)?;
    cpu.check_target(target)?;
    cpu.drop_stack(size + op.immediate);
    cpu.rip = target;
    Ok(())
});

handler!(loop_(cpu, op) {
    let mask = counter_mask(op);
    let count = cpu.registers.gpr[RCX].wrapping_sub(1) & mask;
    let zero = cpu.registers.arithmetic.condition::<4>();
    let taken = count != 0
        && match op.instruction.mnemonic() {
            Mnemonic::Loope => zero,
            Mnemonic::Loopne => !zero,
            _ => true,
        };
    if taken {
        let target = op.branch_target(cpu);
        cpu.go(op, target)?;
    } else {
        cpu.rip = op.next_rip(cpu);
    }
    let rcx = &mut cpu.registers.gpr[RCX];
    *rcx = if mask == 0xffff { *rcx & !mask | count } else { count };
    Ok(())
});
handler!(jump_if_rcx_zero(cpu, op) {
    if cpu.registers.gpr[RCX] & counter_mask(op) == 0 {
        let target = op.branch_target(cpu);
        cpu.go(op, target)
    } else {
        cpu.rip = op.next_rip(cpu);
        Ok(())
    }
});

fn counter_mask(op: &Op) -> u64 {
    match op.b {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}
