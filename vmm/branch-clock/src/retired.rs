//! The state behind an instruction that somebody else did, and before a fault whose handler never ran.

use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::{CS, CpuState, RAX, RDX, RSP, SS, Segment};

use crate::guest_code::segment_of;
use reprise_machine::paging::Paging;
use reprise_trace::register_bits::RFLAGS_RF;

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

/// What a selector of the GDT or LDT loads.
fn segment(ram: &GuestRam, state: &CpuState, selector: u16) -> Option<Segment> {
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
