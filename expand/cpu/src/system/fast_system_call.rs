//! SYSCALL, SYSRET, SYSENTER, SYSEXIT and SWAPGS, as Intel CPUs have them: SYSCALL and SYSRET exist
//! in 64-bit mode only.

use iced_x86::{Code, Mnemonic};
use reprise_machine::engine::Exit;
use reprise_trace::cpu_state::{GS, RCX, RDX, RSP, Segment};

use super::debug::SINGLE_STEP;
use super::segment::is_null;
use crate::cpu::{Cpu, EFER_SCE};
use crate::decode::op::{Handler, Op};
use crate::execute::TripleFault;
use crate::fault::{Fault, Stop, vector};
use crate::flags;
use crate::memory::walk::canonical;
use crate::mode::Mode;
use crate::ops::{BlockEnd, handler};

/// Index of R11.
const R11: usize = 11;

pub(super) fn select(op: &mut Op, _mode: Mode) -> Option<BlockEnd> {
    let (handler, end): (Handler, BlockEnd) = match op.instruction.mnemonic() {
        Mnemonic::Syscall => (system_call, BlockEnd::Branch),
        Mnemonic::Sysret | Mnemonic::Sysretq => (system_return, BlockEnd::Branch),
        Mnemonic::Sysenter => (system_enter, BlockEnd::Branch),
        Mnemonic::Sysexit | Mnemonic::Sysexitq => (system_exit, BlockEnd::Branch),
        // Bases are looked up at each access, so the block goes on.
        Mnemonic::Swapgs => (swap_gs, BlockEnd::Continue),
        _ => return None,
    };
    op.size = match op.instruction.code() {
        Code::Sysretq | Code::Sysexitq => 8,
        _ => 4,
    };
    op.handler = handler;
    Some(end)
}

/// A flat code segment, as these instructions make it up.
fn flat_code(selector: u64, cpl: u8, long: bool) -> Segment {
    const READABLE_CODE: u16 = 0x809b;
    const LONG: u16 = 1 << 13;
    const DEFAULT_32: u16 = 1 << 14;
    let width = if long { LONG } else { DEFAULT_32 };
    Segment {
        selector: selector as u16 & !3 | u16::from(cpl),
        attributes: READABLE_CODE | width | u16::from(cpl) << 5,
        limit: u32::MAX,
        base: 0,
    }
}

/// A flat stack segment, as these instructions make it up.
fn flat_stack(selector: u64, cpl: u8) -> Segment {
    const WRITABLE_DATA_32: u16 = 0xc093;
    Segment {
        selector: selector as u16 & !3 | u16::from(cpl),
        attributes: WRITABLE_DATA_32 | u16::from(cpl) << 5,
        limit: u32::MAX,
        base: 0,
    }
}

fn require_system_calls(cpu: &mut Cpu) -> Result<(), Stop> {
    if cpu.mode_64() && cpu.system.efer & EFER_SCE != 0 { Ok(()) } else { cpu.fault(Fault::UD) }
}

handler!(system_call(cpu, op) {
    require_system_calls(cpu)?;
    let next = op.next_rip(cpu);
    let rflags = cpu.rflags() & !flags::RF;
    let selector = cpu.system.star >> 32;
    let code = flat_code(selector, 0, true);
    let stack = flat_stack((selector & !3) + 8, 0);
    cpu.registers.gpr[RCX] = next;
    cpu.registers.gpr[R11] = rflags;
    cpu.enter_code(code, cpu.system.lstar, 0, Some(stack));
    cpu.set_rflags(rflags & !cpu.system.sfmask);
    trap_at_once(cpu, op)
});

handler!(system_return(cpu, op) {
    require_system_calls(cpu)?;
    cpu.require_level_0()?;
    let selector = cpu.system.star >> 48;
    let long = op.size == 8;
    let rcx = cpu.registers.gpr[RCX];
    if long && !canonical(rcx) {
        return cpu.fault(Fault::GP0);
    }
    let rip = if long { rcx } else { u64::from(rcx as u32) };
    let code = flat_code(selector + if long { 16 } else { 0 }, 3, long);
    let stack = flat_stack(selector + 8, 3);
    let rflags = cpu.registers.gpr[R11] & !(flags::RF | flags::VM);
    cpu.enter_code(code, rip, 3, Some(stack));
    cpu.set_rflags(rflags);
    trap_at_once(cpu, op)
});

/// Unlike other instructions, SYSCALL and SYSRET trap if TF is set after them, whatever it was
/// before: a system keeps single-stepping out of its entry by masking TF.
fn trap_at_once(cpu: &mut Cpu, op: &Op) -> Result<(), Stop> {
    cpu.debug.note_trap_flag_changed(cpu.tick + u64::from(op.number) + 1);
    if cpu.rflags_rest & flags::TF != 0 {
        cpu.report(SINGLE_STEP);
        if let Err(TripleFault) = cpu.deliver_exception(Fault::plain(vector::DB)) {
            cpu.pending_exit = Some(Exit::TripleFault);
            return Err(Stop::RetiredExit);
        }
    }
    Ok(())
}

handler!(system_enter(cpu, _op) {
    let selector = cpu.system.sysenter_cs;
    if !cpu.protected() || is_null(selector as u16) {
        return cpu.fault(Fault::GP0);
    }
    let long = cpu.long_mode();
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    let code = flat_code(selector, 0, long);
    let stack = flat_stack((selector & !3) + 8, 0);
    cpu.enter_code(code, cpu.system.sysenter_eip & mask, 0, Some(stack));
    cpu.registers.gpr[RSP] = cpu.system.sysenter_esp & mask;
    cpu.set_rflags(cpu.rflags() & !(flags::VM | flags::IF | flags::RF));
    Ok(())
});

handler!(system_exit(cpu, op) {
    let selector = cpu.system.sysenter_cs & !3;
    if !cpu.protected() || is_null(selector as u16) {
        return cpu.fault(Fault::GP0);
    }
    cpu.require_level_0()?;
    let long = op.size == 8;
    let (rip, rsp) = (cpu.registers.gpr[RDX], cpu.registers.gpr[RCX]);
    if long && !(canonical(rip) && canonical(rsp)) {
        return cpu.fault(Fault::GP0);
    }
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    let (code, stack) = if long { (32, 40) } else { (16, 24) };
    let code = flat_code(selector + code, 3, long);
    let stack = flat_stack(selector + stack, 3);
    cpu.enter_code(code, rip & mask, 3, Some(stack));
    cpu.registers.gpr[RSP] = rsp & mask;
    Ok(())
});

handler!(swap_gs(cpu, _op) {
    if !cpu.mode_64() {
        return cpu.fault(Fault::UD);
    }
    cpu.require_level_0()?;
    let base = &mut cpu.system.segments[GS].base;
    std::mem::swap(base, &mut cpu.system.kernel_gs_base);
    cpu.registers.segment_base[GS] = *base;
    Ok(())
});
