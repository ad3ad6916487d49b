//! PUSH, POP, PUSHF, POPF, PUSHA, POPA, ENTER and LEAVE. (PUSH and POP of segment registers are
//! system instructions.)

use iced_x86::{Code, Mnemonic, OpKind};
use reprise_trace::cpu_state::{RBP, RSP, SS};

use super::{BlockEnd, handler};
use crate::cpu::Cpu;
use crate::decode::op::{Handler, Op};
use crate::fault::{Fault, Stop};
use crate::flags;
use crate::mode::Mode;

impl Cpu {
    /// The linear address of `size_bytes` at stack offset `pointer`.
    #[inline(always)]
    pub(crate) fn stack_address(
        &mut self,
        pointer: u64,
        size_bytes: u64,
        write: bool,
    ) -> Result<u64, Stop> {
        let pointer = pointer & self.mode.stack_mask();
        self.segment_address(SS as u8, pointer, size_bytes, write)
    }

    /// Sets the stack pointer, as wide as the stack is.
    #[inline(always)]
    pub(crate) fn set_stack_pointer(&mut self, pointer: u64) {
        let mask = self.mode.stack_mask();
        let rsp = &mut self.registers.gpr[RSP];
        *rsp = if mask == 0xffff { *rsp & !mask | pointer & mask } else { pointer & mask };
    }

    /// Pushes the low `size_bytes` (2, 4 or 8) of a value. Nothing has changed if it fails.
    #[inline(always)]
    pub(crate) fn push(&mut self, value: u64, size_bytes: u64) -> Result<(), Stop> {
        let pointer = self.registers.gpr[RSP].wrapping_sub(size_bytes);
        let linear = self.stack_address(pointer, size_bytes, true)?;
        match size_bytes {
            8 => self.store(linear, SS as u8, value)?,
            4 => self.store(linear, SS as u8, value as u32)?,
            _ => self.store(linear, SS as u8, value as u16)?,
        }
        self.set_stack_pointer(pointer);
        Ok(())
    }

    /// The value of `size_bytes` (2, 4 or 8) at `above` bytes over the stack's top.
    #[inline(always)]
    pub(crate) fn peek(&mut self, above: u64, size_bytes: u64) -> Result<u64, Stop> {
        let pointer = self.registers.gpr[RSP].wrapping_add(above);
        let linear = self.stack_address(pointer, size_bytes, false)?;
        Ok(match size_bytes {
            8 => self.load::<u64>(linear, SS as u8)?,
            4 => u64::from(self.load::<u32>(linear, SS as u8)?),
            _ => u64::from(self.load::<u16>(linear, SS as u8)?),
        })
    }

    /// Where [`Cpu::peek`] reads.
    pub(crate) fn peeked_address(&mut self, above: u64, size_bytes: u64) -> Result<u64, Stop> {
        let pointer = self.registers.gpr[RSP].wrapping_add(above);
        self.stack_address(pointer, size_bytes, false)
    }

    /// Drops `size_bytes` from the stack's top.
    #[inline(always)]
    pub(crate) fn drop_stack(&mut self, size_bytes: u64) {
        self.set_stack_pointer(self.registers.gpr[RSP].wrapping_add(size_bytes));
    }

    /// Writes a general register as an instruction of `size_bytes` (2, 4 or 8) does.
    #[inline(always)]
    pub(crate) fn set_general(&mut self, number: usize, value: u64, size_bytes: u64) {
        let register = &mut self.registers.gpr[number];
        *register = match size_bytes {
            8 => value,
            4 => u64::from(value as u32),
            _ => *register & !0xffff | value & 0xffff,
        };
    }
}

pub(super) fn select(op: &mut Op, _mode: Mode) -> Option<BlockEnd> {
    let instruction = &*op.instruction;
    let (handler, size): (Handler, u8) = match instruction.code() {
        Code::Push_r64 | Code::Push_rm64 if instruction.op0_kind() == OpKind::Register => {
            (push_register::<8>, 8)
        }
        Code::Push_r32 | Code::Push_rm32 if instruction.op0_kind() == OpKind::Register => {
            (push_register::<4>, 4)
        }
        Code::Push_r16 | Code::Push_rm16 if instruction.op0_kind() == OpKind::Register => {
            (push_register::<2>, 2)
        }
        Code::Pop_r64 | Code::Pop_rm64 if instruction.op0_kind() == OpKind::Register => {
            (pop_register::<8>, 8)
        }
        Code::Pop_r32 | Code::Pop_rm32 if instruction.op0_kind() == OpKind::Register => {
            (pop_register::<4>, 4)
        }
        Code::Pop_r16 | Code::Pop_rm16 if instruction.op0_kind() == OpKind::Register => {
            (pop_register::<2>, 2)
        }
        Code::Push_rm64 => (push_memory::<8>, 8),
        Code::Push_rm32 => (push_memory::<4>, 4),
        Code::Push_rm16 => (push_memory::<2>, 2),
        Code::Pop_rm64 => (pop_memory::<8>, 8),
        Code::Pop_rm32 => (pop_memory::<4>, 4),
        Code::Pop_rm16 => (pop_memory::<2>, 2),
        Code::Pushq_imm32 | Code::Pushq_imm8 => (push_immediate::<8>, 8),
        Code::Pushd_imm32 | Code::Pushd_imm8 => (push_immediate::<4>, 4),
        Code::Push_imm16 | Code::Pushw_imm8 => (push_immediate::<2>, 2),
        Code::Pushfq => (push_flags, 8),
        Code::Pushfd => (push_flags, 4),
        Code::Pushfw => (push_flags, 2),
        Code::Popfq => (pop_flags, 8),
        Code::Popfd => (pop_flags, 4),
        Code::Popfw => (pop_flags, 2),
        Code::Pushad => (push_all, 4),
        Code::Pushaw => (push_all, 2),
        Code::Popad => (pop_all, 4),
        Code::Popaw => (pop_all, 2),
        Code::Leaveq => (leave, 8),
        Code::Leaved => (leave, 4),
        Code::Leavew => (leave, 2),
        Code::Enterq_imm16_imm8 => (enter, 8),
        Code::Enterd_imm16_imm8 => (enter, 4),
        Code::Enterw_imm16_imm8 => (enter, 2),
        _ => return None,
    };
    if instruction.op_count() > 0 && instruction.op0_kind() == OpKind::Register {
        op.a = instruction.op0_register().number() as u8;
    } else if instruction.op_count() > 0 && instruction.op0_kind() != OpKind::Memory {
        op.immediate = instruction.immediate(0);
    }
    op.reads = instruction.mnemonic() == Mnemonic::Push;
    op.writes = !op.reads;
    op.operand_bytes = u16::from(size);
    op.size = size;
    op.handler = handler;
    let changes_mode = instruction.mnemonic() == Mnemonic::Popf
        || matches!(instruction.code(), Code::Popfq | Code::Popfd | Code::Popfw);
    Some(if changes_mode { BlockEnd::After } else { BlockEnd::Continue })
}

handler!(push_register<const BYTES: u64>(cpu, op) {
    cpu.push(cpu.registers.general(op.a), BYTES)?;
    cpu.stored()
});
handler!(push_immediate<const BYTES: u64>(cpu, op) {
    cpu.push(op.immediate, BYTES)?;
    cpu.stored()
});
handler!(pop_register<const BYTES: u64>(cpu, op) {
    let value = cpu.peek(0, BYTES)?;
    cpu.drop_stack(BYTES);
    cpu.set_general(usize::from(op.a), value, BYTES);
    Ok(())
});
handler!(push_memory<const BYTES: u64>(cpu, op) {
    let linear = op.linear_address(cpu);
    let value = match BYTES {
        8 => cpu.load::<u64>(linear, op.segment)?,
        4 => u64::from(cpu.load::<u32>(linear, op.segment)?),
        _ => u64::from(cpu.load::<u16>(linear, op.segment)?),
    };
    cpu.push(value, BYTES)?;
    cpu.stored()
});
handler!(pop_memory<const BYTES: u64>(cpu, op) {
    // The address is computed after RSP has moved, and a fault must leave RSP as it was.
    let value = cpu.peek(0, BYTES)?;
    let before = cpu.registers.gpr[RSP];
    cpu.drop_stack(BYTES);
    let linear = op.linear_address(cpu);
    let stored = match BYTES {
        8 => cpu.store(linear, op.segment, value),
        4 => cpu.store(linear, op.segment, value as u32),
        _ => cpu.store(linear, op.segment, value as u16),
    };
    if stored.is_err() {
        cpu.registers.gpr[RSP] = before;
        return stored;
    }
    cpu.stored()
});

handler!(push_flags(cpu, op) {
    let flags = cpu.rflags() & !(flags::VM | flags::RF);
    cpu.push(flags, u64::from(op.size))?;
    cpu.stored()
});
handler!(pop_flags(cpu, op) {
    let value = cpu.peek(0, u64::from(op.size))?;
    cpu.drop_stack(u64::from(op.size));
    let iopl = (cpu.rflags_rest & flags::IOPL) >> 12;
    let mut writable =
        flags::ARITHMETIC | flags::TF | flags::DF | flags::NT | flags::AC | flags::ID;
    if cpu.cpl == 0 {
        writable |= flags::IOPL;
    }
    if u64::from(cpu.cpl) <= iopl {
        writable |= flags::IF;
    }
    if op.size == 2 {
        writable &= 0xffff;
    }
    // RF is cleared whatever the image says.
    let kept = cpu.rflags() & !writable & !flags::RF;
    cpu.set_rflags(kept | value & writable);
    Ok(())
});

handler!(push_all(cpu, op) {
    let size = u64::from(op.size);
    let registers = cpu.registers.gpr;
    // All eight must fit before any is written. Each is looked at by itself: SP may wrap between two.
    for place in 1..=8 {
        let pointer = registers[RSP].wrapping_sub(place * size);
        let linear = cpu.stack_address(pointer, size, true)?;
        cpu.check_store(linear, SS as u8, size)?;
    }
    for &value in &registers[..8] {
        if let Err(stop) = cpu.push(value, size) {
            // The board has to answer first, and the instruction starts again.
            cpu.registers.gpr[RSP] = registers[RSP];
            return Err(stop);
        }
    }
    cpu.stored()
});
handler!(pop_all(cpu, op) {
    let size = u64::from(op.size);
    let mut values = [0; 8];
    for (place, value) in values.iter_mut().enumerate() {
        *value = cpu.peek(place as u64 * size, size)?;
    }
    cpu.drop_stack(8 * size);
    for (place, &value) in values.iter().enumerate() {
        if 7 - place != RSP {
            cpu.set_general(7 - place, value, size);
        }
    }
    Ok(())
});

handler!(leave(cpu, op) {
    let size = u64::from(op.size);
    let frame = cpu.registers.gpr[RBP];
    let linear = cpu.stack_address(frame, size, false)?;
    let value = match size {
        8 => cpu.load::<u64>(linear, SS as u8)?,
        4 => u64::from(cpu.load::<u32>(linear, SS as u8)?),
        _ => u64::from(cpu.load::<u16>(linear, SS as u8)?),
    };
    cpu.set_stack_pointer(frame.wrapping_add(size));
    cpu.set_general(RBP, value, size);
    Ok(())
});
handler!(enter(cpu, op) {
    let size = u64::from(op.size);
    let local_bytes = u64::from(op.instruction.immediate16());
    let level = u64::from(op.instruction.immediate8_2nd() & 31);
    let (rsp, rbp) = (cpu.registers.gpr[RSP], cpu.registers.gpr[RBP]);
    let result = enter_frame(cpu, size, level, local_bytes);
    if result.is_err() {
        cpu.registers.gpr[RSP] = rsp;
        cpu.registers.gpr[RBP] = rbp;
        return result;
    }
    cpu.stored()
});

fn enter_frame(cpu: &mut Cpu, size: u64, level: u64, local_bytes: u64) -> Result<(), Stop> {
    let outer = cpu.registers.gpr[RBP];
    cpu.push(outer, size)?;
    let frame = cpu.registers.gpr[RSP];
    for depth in 1..level {
        let linear = cpu.stack_address(outer.wrapping_sub(depth * size), size, false)?;
        let link = match size {
            8 => cpu.load::<u64>(linear, SS as u8)?,
            4 => u64::from(cpu.load::<u32>(linear, SS as u8)?),
            _ => u64::from(cpu.load::<u16>(linear, SS as u8)?),
        };
        cpu.push(link, size)?;
    }
    if level > 0 {
        cpu.push(frame, size)?;
    }
    let pointer = cpu.registers.gpr[RSP].wrapping_sub(local_bytes);
    // The new top must be writable, though nothing is written there.
    let linear = cpu.stack_address(pointer, size, true)?;
    cpu.check_store(linear, SS as u8, size)?;
    if cpu.mode_64() && !crate::memory::walk::canonical(pointer) {
        return cpu.fault(Fault::SS0);
    }
    cpu.set_stack_pointer(pointer);
    cpu.set_general(RBP, frame, size);
    Ok(())
}
