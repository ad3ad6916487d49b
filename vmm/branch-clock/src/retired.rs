//! The state behind an instruction that somebody else did, and before a fault whose handler never ran.

use iced_x86::{Code, Instruction};
use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::{CS, CpuState, RAX, RDX, RSP, SS, Segment};

use crate::guest_code::{bitness, segment_of, stack_word};
use reprise_machine::paging::Paging;
use reprise_trace::register_bits::{CR0_PE, RFLAGS_NT, RFLAGS_RF, RFLAGS_VM};

/// `state` once an instruction of so many bytes, which changes nothing else, has retired.
pub(crate) fn retired(state: &CpuState, bytes: usize) -> CpuState {
    CpuState {
        rip: state.rip.wrapping_add(bytes as u64),
        rflags: state.rflags & !RFLAGS_RF,
        interrupt_shadow: false,
        ..state.clone()
    }
}

/// `state` once the RDTSC at its RIP has retired, virtual time being `ns`.
pub fn time_stamp_retired(state: &CpuState, ns: u64) -> CpuState {
    const BYTES: usize = 2;
    let value = ns.wrapping_add(state.tsc_offset);
    let mut after = retired(state, BYTES);
    after.gpr[RAX] = value & 0xffff_ffff;
    after.gpr[RDX] = value >> 32;
    after
}

/// The user code's state before the fault whose handler the guest has just entered in 64-bit mode; `None` if
/// it was no user code, or has an error code other than zero.
pub(crate) fn before_fault(ram: &GuestRam, state: &CpuState) -> Option<CpuState> {
    let mut frame = [0; 48];
    if !Paging::from(state).read(ram, state.gpr[RSP], &mut frame) {
        return None;
    }
    let word = |index: usize| {
        let bytes = frame[8 * index..8 * index + 8].try_into().expect("eight bytes");
        u64::from_le_bytes(bytes)
    };
    let (error_code, code, stack) = (word(0), word(2) as u16, word(5) as u16);
    if error_code != 0 || code & 3 != 3 {
        return None;
    }
    let mut before = state.clone();
    before.rip = word(1);
    before.rflags = word(3) & !RFLAGS_RF;
    before.gpr[RSP] = word(4);
    before.segments[CS] = segment(ram, state, code)?;
    before.segments[SS] = segment(ram, state, stack)?;
    Some(before)
}

/// `state` once the IRET at its RIP has retired, as far as what executes next depends on it; `None` if that is
/// not known.
pub(crate) fn interrupt_returned(
    ram: &GuestRam,
    state: &CpuState,
    instruction: &Instruction,
) -> Option<CpuState> {
    let bytes = match instruction.code() {
        Code::Iretw => 2,
        Code::Iretd => 4,
        Code::Iretq => 8,
        _ => return None,
    };
    let word = |index: u64| stack_word(ram, state, index * bytes, bytes as usize);
    let (rip, code, rflags) = (word(0)?, word(1)? as u16, word(2)?);
    let mut after = CpuState { rip, rflags, interrupt_shadow: false, ..state.clone() };
    after.gpr[RSP] = state.gpr[RSP].wrapping_add(3 * bytes);
    if state.cr0 & CR0_PE == 0 {
        after.segments[CS].selector = code;
        after.segments[CS].base = u64::from(code) << 4;
        return Some(after);
    }
    if (state.rflags | rflags) & RFLAGS_VM != 0 || state.rflags & RFLAGS_NT != 0 {
        return None;
    }
    let now = state.segments[CS].selector;
    if code != now {
        after.segments[CS] = segment(ram, state, code)?;
    }
    if bitness(state) == 64 || code & 3 != now & 3 {
        after.gpr[RSP] = word(3)?;
        after.segments[SS] = segment(ram, state, word(4)? as u16)?;
    }
    Some(after)
}

/// What a selector of the GDT or LDT loads.
pub(crate) fn segment(ram: &GuestRam, state: &CpuState, selector: u16) -> Option<Segment> {
    const TABLE: u16 = 4;
    let offset = u64::from(selector & !7);
    let (start, limit) = match selector & TABLE {
        0 => (state.gdtr.base, u32::from(state.gdtr.limit)),
        _ if !state.ldtr.present() => return None,
        _ => (state.ldtr.base, state.ldtr.limit),
    };
    if offset + 7 > u64::from(limit) {
        return None;
    }
    let mut bytes = [0; 8];
    if !Paging::from(state).read(ram, start.wrapping_add(offset), &mut bytes) {
        return None;
    }
    Some(segment_of(selector, u64::from_le_bytes(bytes)))
}
