//! SYSCALL and SYSRET in KVM's place, for the clock `step`: 64-bit code only.
//!
//! AMD64 APM volume 3, "SYSCALL" and "SYSRET"; where a CPU of Intel differs, as the CPU model has it.

use reprise_trace::cpu_state::{CS, CpuState, RCX, SS, Segment};

use reprise_trace::register_bits::{EFER_SCE, RFLAGS_RF, RFLAGS_TF, RFLAGS_VM};

use crate::transfer::is_canonical;

/// Index of R11.
const R11: usize = 11;

/// Attributes of a flat 64-bit code segment that is read and has been accessed, at CPL0.
const CODE: u16 = 0xa09b;
/// Attributes of a flat data segment that is written and has been accessed, at CPL0.
const DATA: u16 = 0xc093;

/// RFLAGS bits that SYSRET takes: all that there are but RF and VM.
const FLAGS: u64 = 0x003c_7fd5;

fn flat(selector: u64, attributes: u16, level: u16) -> Segment {
    Segment {
        selector: selector as u16 & !3 | level,
        attributes: attributes | level << 5,
        limit: u32::MAX,
        base: 0,
    }
}

/// `state` after the SYSCALL that it is about to execute, which ends at `next_rip`.
pub(crate) fn enter(state: &CpuState, next_rip: u64) -> CpuState {
    let selector = state.star >> 32 & 0xfffc;
    let rflags = state.rflags & !RFLAGS_RF;
    let mut after = state.clone();
    after.gpr[RCX] = next_rip;
    after.gpr[R11] = rflags;
    after.segments[CS] = flat(selector, CODE, 0);
    after.segments[SS] = flat(selector + 8, DATA, 0);
    after.rip = state.lstar;
    after.rflags = rflags & !state.sfmask | 2;
    after.interrupt_shadow = false;
    after
}

/// `state` after SYSRETQ at CPL0; `None` where that faults, or makes the guest step itself.
pub(crate) fn leave(state: &CpuState) -> Option<CpuState> {
    let (rip, rflags) = (state.gpr[RCX], state.gpr[R11] & FLAGS | 2);
    let plain = state.segments[CS].long() && state.cpl() == 0 && state.efer & EFER_SCE != 0;
    if !plain || !is_canonical(rip) || rflags & (RFLAGS_TF | RFLAGS_VM) != 0 {
        return None;
    }
    let selector = state.star >> 48;
    let mut after = state.clone();
    after.segments[CS] = flat(selector + 16, CODE, 3);
    after.segments[SS] = flat(selector + 8, DATA, 3);
    after.rip = rip;
    after.rflags = rflags;
    after.interrupt_shadow = false;
    Some(after)
}
