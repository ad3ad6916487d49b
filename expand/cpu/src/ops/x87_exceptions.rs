//! What x87 and MMX instructions do beyond computing: noting the instruction and operand pointers,
//! waiting for a pending exception, and raising unmasked ones.
//!
//! While the guest masks every exception, only the pointers are noted. Once it unmasks one, each x87
//! instruction runs with the guest's own masks in the host's control word: the host then does exactly
//! what is asked (operands kept for invalid operations, biased results for overflow), and the exception
//! stays pending, since an x87 unit raises it only at the next waiting instruction, which is one of ours.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::x87_control::is_x87_state;
use crate::cpu::Cpu;
use crate::decode::op::{Handler, Op};
use crate::fault::{Flow, Stop};
use crate::memory::physical::PAGE_BYTES;
use crate::mode::Mode;
use crate::native::host_fpu::{Area, EXCEPTIONS, host};
use crate::native::{self, Form};

/// Status word: the result is rounded. Unlike the other exceptions it lets the instruction finish.
const PRECISION: u16 = 1 << 5;
/// The largest x87 memory operand of an arithmetic instruction, in bytes.
const MAX_OPERAND_BYTES: usize = 10;

/// Replaces the handler that native selection gave an x87 or MMX instruction.
pub(super) fn wrap_native(op: &mut Op, mode: Mode) {
    let form = native::form(op);
    let unmasked = mode.has(Mode::X87_UNMASKED);
    let handler: Handler = match (kind(&op.instruction), unmasked, form) {
        (Kind::Neither, ..) | (Kind::Mmx, false, _) => return,
        (Kind::X87, false, Form::Register) => tracked_register,
        (Kind::X87, false, Form::Write) => tracked_write,
        (Kind::X87, false, _) => tracked_read,
        (Kind::X87, true, Form::Write) => checked_write,
        (Kind::X87, true, _) => checked,
        (Kind::Mmx, true, _) => waiting,
    };
    op.handler = handler;
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    X87,
    Mmx,
    Neither,
}

fn kind(instruction: &Instruction) -> Kind {
    if is_x87_state(instruction) {
        Kind::X87
    } else if uses_mmx(instruction) {
        Kind::Mmx
    } else {
        Kind::Neither
    }
}

/// Whether the instruction waits for x87 exceptions as MMX instructions do.
pub(super) fn uses_mmx(instruction: &Instruction) -> bool {
    let has_register = (0..instruction.op_count()).any(|operand| {
        instruction.op_kind(operand) == OpKind::Register && instruction.op_register(operand).is_mm()
    });
    has_register || instruction.mnemonic() == Mnemonic::Emms
}

/// Notes an x87 instruction that retired.
#[inline(always)]
fn track(cpu: &mut Cpu, op: &Op, has_memory: bool, flow: Flow) {
    if flow == Flow::FAULT || flow == Flow::EXIT {
        return;
    }
    cpu.fpu.fip = op.rip(cpu);
    if has_memory {
        cpu.fpu.fdp = op.effective_address(cpu);
    }
}

extern "sysv64" fn tracked_register(cpu: &mut Cpu, op: &Op) -> Flow {
    let flow = native::run_register(cpu, op);
    track(cpu, op, false, flow);
    flow
}

extern "sysv64" fn tracked_read(cpu: &mut Cpu, op: &Op) -> Flow {
    let flow = native::read(cpu, op);
    track(cpu, op, true, flow);
    flow
}

extern "sysv64" fn tracked_write(cpu: &mut Cpu, op: &Op) -> Flow {
    let linear = op.linear_address(cpu);
    let flow = match cpu.memory.hit_write(linear, u64::from(op.operand_bytes)) {
        Some(_) => native::write(cpu, op),
        None => write_or_rewind(cpu, op),
    };
    track(cpu, op, true, flow);
    flow
}

/// A store that may leave for the board after it has popped the stack, and that then starts again.
#[cold]
fn write_or_rewind(cpu: &mut Cpu, op: &Op) -> Flow {
    let before = snapshot();
    let flow = native::write(cpu, op);
    if flow == Flow::FAULT || flow == Flow::EXIT {
        host::fxrstor(&before);
    }
    flow
}

fn snapshot() -> Area {
    let mut area = Area::zeroed();
    host::fxsave(&mut area);
    area
}

/// An instruction under unmasked exceptions.
extern "sysv64" fn checked(cpu: &mut Cpu, op: &Op) -> Flow {
    if let Err(stop) = cpu.wait_for_x87() {
        return Flow::from(Err(stop));
    }
    let before = cpu.fpu.lend_masks();
    let flow = native::run_selected(cpu, op);
    let raised = cpu.fpu.take_back_masks(before);
    finish(cpu, op, op.native.is_some(), raised, flow);
    flow
}

extern "sysv64" fn checked_write(cpu: &mut Cpu, op: &Op) -> Flow {
    Flow::from(write_checked(cpu, op))
}

/// A store under unmasked exceptions: all of them but a rounded result keep it from happening.
fn write_checked(cpu: &mut Cpu, op: &Op) -> Result<(), Stop> {
    cpu.wait_for_x87()?;
    let linear = op.linear_address(cpu);
    let size_bytes = usize::from(op.operand_bytes);
    cpu.check_store(linear, op.segment, size_bytes as u64)?;
    let mut operand = [0; MAX_OPERAND_BYTES];
    let snapshot = snapshot();
    let before = cpu.fpu.lend_masks();
    let flow = native::run_on(cpu, op, &mut operand[..size_bytes]);
    let raised = cpu.fpu.take_back_masks(before);
    if raised & !cpu.fpu.control() & EXCEPTIONS & !PRECISION == 0 {
        let stored = cpu.store_slow(linear, op.segment, &operand[..size_bytes]);
        if stored.is_err() {
            host::fxrstor(&snapshot);
            return stored;
        }
    }
    finish(cpu, op, true, raised, flow);
    cpu.stored()
}

/// Notes an instruction that ran under unmasked exceptions, and its opcode if it raised one.
fn finish(cpu: &mut Cpu, op: &Op, has_memory: bool, raised: u16, flow: Flow) {
    track(cpu, op, has_memory, flow);
    if raised & !cpu.fpu.control() & EXCEPTIONS != 0 {
        cpu.fpu.fop = opcode(cpu, op);
    }
}

/// The instruction's opcode as FOP has it: the low three bits of its first byte, and the second.
fn opcode(cpu: &mut Cpu, op: &Op) -> u16 {
    let start = cpu.registers.segment_base[reprise_trace::cpu_state::CS].wrapping_add(op.rip(cpu));
    let mut first = None;
    for offset in 0..u64::from(op.length) {
        let linear = cpu.wrap(start.wrapping_add(offset));
        let mut byte = [0];
        if let Ok(address) = cpu.memory.fetch_address(linear) {
            debug_assert_eq!(address % PAGE_BYTES, linear % PAGE_BYTES);
            cpu.memory.physical.read(address, &mut byte);
        }
        match first {
            Some(first) => return u16::from(first & 7) << 8 | u16::from(byte[0]),
            None if byte[0] & 0xf8 == 0xd8 => first = Some(byte[0]),
            None => {} // A prefix.
        }
    }
    0
}

/// An MMX instruction: it raises no exception of its own.
extern "sysv64" fn waiting(cpu: &mut Cpu, op: &Op) -> Flow {
    match cpu.wait_for_x87() {
        Ok(()) => native::run_selected(cpu, op),
        Err(stop) => Flow::from(Err(stop)),
    }
}
