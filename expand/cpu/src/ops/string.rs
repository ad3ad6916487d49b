//! MOVS, STOS, LODS, SCAS and CMPS, with and without REP.
//!
//! A repeated instruction is one instruction however many elements it moves; a fault leaves it
//! with the elements before done and RCX, RSI and RDI saying so. Elements that lie whole in pages
//! the software TLB knows go at the host's speed.
#![allow(unsafe_code)]

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use reprise_trace::cpu_state::{ES, RAX, RCX, RDI, RSI};

use super::{BlockEnd, handler};
use crate::cpu::Cpu;
use crate::decode::op::{Handler, Op, segment_index};
use crate::fault::Stop;
use crate::flags::{self, Arithmetic};
use crate::memory::physical::PAGE_BYTES;
use crate::mode::Mode;

pub(super) fn select(op: &mut Op, _mode: Mode) -> Option<BlockEnd> {
    let instruction = &*op.instruction;
    // MOVSD and CMPSD are SSE instructions too.
    if (0..instruction.op_count()).any(|operand| instruction.op_kind(operand) == OpKind::Memory)
        || instruction.op_count() > 0 && instruction.op0_register().is_xmm()
    {
        return None;
    }
    let (handler, size): (Handler, u8) = match instruction.mnemonic() {
        Mnemonic::Movsb => (movs, 1),
        Mnemonic::Movsw => (movs, 2),
        Mnemonic::Movsd => (movs, 4),
        Mnemonic::Movsq => (movs, 8),
        Mnemonic::Stosb => (stos, 1),
        Mnemonic::Stosw => (stos, 2),
        Mnemonic::Stosd => (stos, 4),
        Mnemonic::Stosq => (stos, 8),
        Mnemonic::Lodsb => (lods, 1),
        Mnemonic::Lodsw => (lods, 2),
        Mnemonic::Lodsd => (lods, 4),
        Mnemonic::Lodsq => (lods, 8),
        Mnemonic::Scasb => (scas, 1),
        Mnemonic::Scasw => (scas, 2),
        Mnemonic::Scasd => (scas, 4),
        Mnemonic::Scasq => (scas, 8),
        Mnemonic::Cmpsb => (cmps, 1),
        Mnemonic::Cmpsw => (cmps, 2),
        Mnemonic::Cmpsd => (cmps, 4),
        Mnemonic::Cmpsq => (cmps, 8),
        _ => return None,
    };
    op.size = size;
    // In `b`, so that nobody takes it for a memory operand's: each element is checked by itself.
    op.b = string_segment(instruction);
    op.address_mask = index_mask(instruction);
    op.handler = handler;
    Some(BlockEnd::Continue)
}

/// The segment that RSI goes through (RDI's is always ES).
pub(super) fn string_segment(instruction: &Instruction) -> u8 {
    match instruction.memory_segment() {
        Register::None => reprise_trace::cpu_state::DS as u8,
        segment => segment_index(segment),
    }
}

/// What RSI, RDI and RCX are cut to: the address size.
pub(super) fn index_mask(instruction: &Instruction) -> u64 {
    let kinds = (0..instruction.op_count()).map(|operand| instruction.op_kind(operand));
    for kind in kinds {
        match kind {
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => return 0xffff,
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => {
                return 0xffff_ffff;
            }
            _ => {}
        }
    }
    u64::MAX
}

/// RCX, as wide as the address size.
pub(super) fn counter(cpu: &Cpu, op: &Op) -> u64 {
    cpu.registers.gpr[RCX] & op.address_mask
}

/// Sets RCX, as wide as the address size.
pub(super) fn set_counter(cpu: &mut Cpu, op: &Op, count: u64) {
    set_index(cpu, op, RCX, count);
}

fn set_index(cpu: &mut Cpu, op: &Op, register: usize, value: u64) {
    let mask = op.address_mask;
    let register = &mut cpu.registers.gpr[register];
    *register = if mask == 0xffff { *register & !mask | value & mask } else { value & mask };
}

/// Moves an index register past one element.
pub(super) fn advance(cpu: &mut Cpu, op: &Op, register: usize) {
    advance_by(cpu, op, register, 1);
}

fn advance_by(cpu: &mut Cpu, op: &Op, register: usize, elements: u64) {
    let bytes = elements.wrapping_mul(u64::from(op.size));
    let value = cpu.registers.gpr[register];
    let moved = if backwards(cpu) { value.wrapping_sub(bytes) } else { value.wrapping_add(bytes) };
    set_index(cpu, op, register, moved);
}

fn backwards(cpu: &Cpu) -> bool {
    cpu.rflags_rest & flags::DF != 0
}

fn load_element(cpu: &mut Cpu, op: &Op, segment: u8, register: usize) -> Result<u64, Stop> {
    let offset = cpu.registers.gpr[register] & op.address_mask;
    let linear = cpu.segment_address(segment, offset, u64::from(op.size), false)?;
    Ok(match op.size {
        1 => u64::from(cpu.load::<u8>(linear, segment)?),
        2 => u64::from(cpu.load::<u16>(linear, segment)?),
        4 => u64::from(cpu.load::<u32>(linear, segment)?),
        _ => cpu.load::<u64>(linear, segment)?,
    })
}

fn store_element(cpu: &mut Cpu, op: &Op, value: u64) -> Result<(), Stop> {
    let offset = cpu.registers.gpr[RDI] & op.address_mask;
    let linear = cpu.segment_address(ES as u8, offset, u64::from(op.size), true)?;
    match op.size {
        1 => cpu.store(linear, ES as u8, value as u8),
        2 => cpu.store(linear, ES as u8, value as u16),
        4 => cpu.store(linear, ES as u8, value as u32),
        _ => cpu.store(linear, ES as u8, value),
    }
}

fn repeated(op: &Op) -> bool {
    op.instruction.has_rep_prefix() || op.instruction.has_repne_prefix()
}

/// How many whole elements, going up, lie in the page of `linear`, before the index register wraps.
fn elements_in_run(cpu: &Cpu, op: &Op, register: usize, linear: u64) -> u64 {
    let size = u64::from(op.size);
    let offset = cpu.registers.gpr[register] & op.address_mask;
    let until_wrap = ((op.address_mask - offset) / size).saturating_add(1);
    until_wrap.min((PAGE_BYTES - linear % PAGE_BYTES) / size)
}

/// Whether elements may go in runs: upwards, with segments that need no checks, and without a trap
/// after each.
fn runs_allowed(cpu: &Cpu, op: &Op) -> bool {
    let checks = cpu.mode.checks(op.b) || cpu.mode.checks(ES as u8);
    let whole = cpu.rflags_rest & (flags::DF | flags::TF) == 0;
    whole && !checks && !cpu.stops_between_elements
}

/// Ends one element of a repeated instruction that the counter no longer counts.
#[inline(always)]
fn next_element(cpu: &mut Cpu, op: &Op) -> Result<(), Stop> {
    cpu.forget_answers();
    cpu.between_elements(counter(cpu, op))
}

handler!(movs(cpu, op) {
    if !repeated(op) {
        move_element(cpu, op)?;
        return cpu.stored();
    }
    while counter(cpu, op) != 0 {
        let moved = move_run(cpu, op);
        if moved == 0 {
            move_element(cpu, op)?;
            set_counter(cpu, op, counter(cpu, op) - 1);
            next_element(cpu, op)?;
        }
    }
    cpu.stored()
});

fn move_element(cpu: &mut Cpu, op: &Op) -> Result<(), Stop> {
    let value = load_element(cpu, op, op.b, RSI)?;
    store_element(cpu, op, value)?;
    advance(cpu, op, RSI);
    advance(cpu, op, RDI);
    Ok(())
}

/// Moves as many elements as lie in one page on both sides; how many, zero if it takes the slow way.
fn move_run(cpu: &mut Cpu, op: &Op) -> u64 {
    if !runs_allowed(cpu, op) {
        return 0;
    }
    let size = u64::from(op.size);
    let source = linear_of(cpu, op, op.b, RSI);
    let target = linear_of(cpu, op, ES as u8, RDI);
    let elements = counter(cpu, op)
        .min(elements_in_run(cpu, op, RSI, source))
        .min(elements_in_run(cpu, op, RDI, target));
    if elements == 0 {
        return 0;
    }
    let bytes = elements * size;
    let (Some(from), Some(to)) =
        (cpu.memory.hit_read(source, bytes), cpu.memory.hit_write(target, bytes))
    else {
        return 0;
    };
    // An overlap in which the source is overwritten before it is read repeats a pattern: that is
    // element by element.
    let distance = (to as u64).wrapping_sub(from as u64);
    if distance < bytes && distance != 0 {
        if !distance.is_multiple_of(size) {
            return 0;
        }
        // SAFETY: both ranges are mapped guest RAM (TLB hits over `bytes`); each step copies
        // `distance` bytes or fewer, which do not overlap.
        unsafe {
            let mut done = 0;
            while done < bytes {
                let piece = distance.min(bytes - done) as usize;
                std::ptr::copy_nonoverlapping(
                    from.add(done as usize),
                    to.add(done as usize),
                    piece,
                );
                done += piece as u64;
            }
        }
    } else {
        // SAFETY: both ranges are mapped guest RAM (TLB hits over `bytes`); `copy` allows overlap.
        unsafe { std::ptr::copy(from, to, bytes as usize) };
    }
    advance_by(cpu, op, RSI, elements);
    advance_by(cpu, op, RDI, elements);
    set_counter(cpu, op, counter(cpu, op) - elements);
    elements
}

fn linear_of(cpu: &Cpu, op: &Op, segment: u8, register: usize) -> u64 {
    let offset = cpu.registers.gpr[register] & op.address_mask;
    cpu.wrap(cpu.registers.segment_base[usize::from(segment & 7)].wrapping_add(offset))
}

handler!(stos(cpu, op) {
    let value = cpu.registers.gpr[RAX];
    if !repeated(op) {
        store_element(cpu, op, value)?;
        advance(cpu, op, RDI);
        return cpu.stored();
    }
    while counter(cpu, op) != 0 {
        if fill_run(cpu, op, value) == 0 {
            store_element(cpu, op, value)?;
            advance(cpu, op, RDI);
            set_counter(cpu, op, counter(cpu, op) - 1);
            next_element(cpu, op)?;
        }
    }
    cpu.stored()
});

/// Fills as many elements as lie in one page; how many, zero if it takes the slow way.
fn fill_run(cpu: &mut Cpu, op: &Op, value: u64) -> u64 {
    if !runs_allowed(cpu, op) {
        return 0;
    }
    let size = u64::from(op.size);
    let target = linear_of(cpu, op, ES as u8, RDI);
    let elements = counter(cpu, op).min(elements_in_run(cpu, op, RDI, target));
    if elements == 0 {
        return 0;
    }
    let Some(to) = cpu.memory.hit_write(target, elements * size) else { return 0 };
    // SAFETY: the range is mapped guest RAM (a TLB hit over all of it).
    unsafe {
        for element in 0..elements as usize {
            match size {
                1 => to.add(element).write(value as u8),
                2 => to.cast::<u16>().add(element).write_unaligned(value as u16),
                4 => to.cast::<u32>().add(element).write_unaligned(value as u32),
                _ => to.cast::<u64>().add(element).write_unaligned(value),
            }
        }
    }
    advance_by(cpu, op, RDI, elements);
    set_counter(cpu, op, counter(cpu, op) - elements);
    elements
}

handler!(lods(cpu, op) {
    let once = !repeated(op);
    while once || counter(cpu, op) != 0 {
        let value = load_element(cpu, op, op.b, RSI)?;
        if op.size == 1 {
            let rax = &mut cpu.registers.gpr[RAX];
            *rax = *rax & !0xff | value;
        } else {
            cpu.set_general(RAX, value, u64::from(op.size));
        }
        advance(cpu, op, RSI);
        if once {
            break;
        }
        set_counter(cpu, op, counter(cpu, op) - 1);
        next_element(cpu, op)?;
    }
    Ok(())
});

handler!(scas(cpu, op) {
    compare(cpu, op, |cpu, op| {
        let right = load_element(cpu, op, ES as u8, RDI)?;
        advance(cpu, op, RDI);
        Ok((cpu.registers.gpr[RAX], right))
    })
});
handler!(cmps(cpu, op) {
    compare(cpu, op, |cpu, op| {
        let left = load_element(cpu, op, op.b, RSI)?;
        let right = load_element(cpu, op, ES as u8, RDI)?;
        advance(cpu, op, RSI);
        advance(cpu, op, RDI);
        Ok((left, right))
    })
});

/// Compares elements until they differ (REPE) or are equal (REPNE), or RCX is used up.
#[inline(always)]
fn compare(
    cpu: &mut Cpu,
    op: &Op,
    element: impl Fn(&mut Cpu, &Op) -> Result<(u64, u64), Stop>,
) -> Result<(), Stop> {
    let repeat_equal = op.instruction.has_rep_prefix();
    let repeat_unequal = op.instruction.has_repne_prefix();
    if !repeat_equal && !repeat_unequal {
        let (left, right) = element(cpu, op)?;
        cpu.registers.arithmetic = comparison(left, right, op.size);
        return Ok(());
    }
    while counter(cpu, op) != 0 {
        let (left, right) = element(cpu, op)?;
        set_counter(cpu, op, counter(cpu, op) - 1);
        let result = comparison(left, right, op.size);
        cpu.registers.arithmetic = result;
        if result.condition::<4>() != repeat_equal {
            break;
        }
        next_element(cpu, op)?;
    }
    Ok(())
}

/// The flags of `left - right`.
fn comparison(left: u64, right: u64, size: u8) -> Arithmetic {
    let bits = u32::from(size) * 8;
    let mask = u64::MAX >> (64 - bits);
    let sign = 1u64 << (bits - 1);
    let (left, right) = (left & mask, right & mask);
    let result = left.wrapping_sub(right) & mask;
    let mut rflags = 0;
    let mut set = |flag, condition| {
        if condition {
            rflags |= flag;
        }
    };
    set(flags::CF, left < right);
    set(flags::PF, (result as u8).count_ones().is_multiple_of(2));
    set(flags::AF, (left ^ right ^ result) & 0x10 != 0);
    set(flags::ZF, result == 0);
    set(flags::SF, result & sign != 0);
    set(flags::OF, (left ^ right) & (left ^ result) & sign != 0);
    Arithmetic::from_rflags(rflags)
}
