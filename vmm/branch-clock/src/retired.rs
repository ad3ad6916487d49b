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

/// `state` once the RDTSC at its RIP, of so many bytes with its prefixes, has retired, virtual time being `ns`.
pub fn time_stamp_retired(state: &CpuState, bytes: usize, ns: u64) -> CpuState {
    let value = ns.wrapping_add(state.tsc_offset);
    let mut after = retired(state, bytes);
    after.gpr[RAX] = value & 0xffff_ffff;
    after.gpr[RDX] = value >> 32;
    after
}

/// An RDTSC that waits for its answer.
#[derive(Debug)]
pub(crate) struct Asking {
    /// The state before it.
    pub(crate) before: CpuState,
    /// Its length.
    pub(crate) bytes: usize,
}

impl Asking {
    /// The state once it has retired, virtual time being `ns`.
    pub(crate) fn answered(&self, ns: u64) -> CpuState {
        time_stamp_retired(&self.before, self.bytes, ns)
    }
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

#[cfg(test)]
mod tests {
    use reprise_machine::paging::write_ram;
    use reprise_trace::cpu_state::DescriptorTable;

    use super::*;

    const GDT: u64 = 0x1000;
    const STACK: u64 = 0x2000;
    const ENTRIES: [u64; 5] = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
    ];
    /// Error code, RIP, CS, RFLAGS with RF, RSP and SS of user code.
    const FRAME: [u64; 6] = [0, 0x40_1234, 0x23, 0x1_0202, 0x7f_0000, 0x1b];

    fn before(frame: &[u64; 6]) -> Option<CpuState> {
        let ram = GuestRam::new(4).expect("the host has 4 MiB");
        for (start, words) in [(GDT, &ENTRIES[..]), (STACK, frame)] {
            for (at, word) in (start..).step_by(8).zip(words) {
                write_ram(&ram, at, &word.to_le_bytes());
            }
        }
        let mut state = CpuState { rip: 0xa100, rflags: 2, ..CpuState::default() };
        state.gdtr = DescriptorTable { base: GDT, limit: 39 };
        state.gpr[RSP] = STACK;
        before_fault(&ram, &state)
    }

    #[test]
    fn a_fault_of_user_code_is_undone() {
        let state = before(&FRAME).expect("it was user code");
        assert_eq!((state.rip, state.rflags, state.gpr[RSP]), (0x40_1234, 0x202, 0x7f_0000));
        let code = Segment { selector: 0x23, attributes: 0xa0fb, limit: u32::MAX, base: 0 };
        let stack = Segment { selector: 0x1b, attributes: 0xc0f3, ..code };
        assert_eq!((state.segments[CS], state.segments[SS]), (code, stack));
    }

    #[test]
    fn other_faults_are_left_alone() {
        // With an error code, of kernel code, with a selector of the LDT, and with one behind the GDT.
        for (word, other) in [(0, 8), (2, 8), (2, 0x27), (5, 0x2b)] {
            let mut frame = FRAME;
            frame[word] = other;
            assert_eq!(before(&frame), None, "word {word} is {other:#x}");
        }
    }

    #[test]
    fn what_retires_ends_shadow_and_resume_flag() {
        let state = CpuState {
            rip: 0x100,
            rflags: 2 | RFLAGS_RF,
            interrupt_shadow: true,
            tsc_offset: 0x10_0000_0000,
            ..CpuState::default()
        };
        let mut expected =
            CpuState { rip: 0x102, rflags: 2, interrupt_shadow: false, ..state.clone() };
        assert_eq!(retired(&state, 2), expected);
        (expected.gpr[RAX], expected.gpr[RDX]) = (0x9000_0005, 0x17);
        assert_eq!(time_stamp_retired(&state, 2, 0x7_9000_0005), expected);
        // Behind a prefix.
        expected.rip = 0x103;
        assert_eq!(time_stamp_retired(&state, 3, 0x7_9000_0005), expected);
    }
}
