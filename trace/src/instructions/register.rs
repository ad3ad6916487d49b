//! The registers whose values a trace holds: their numbers, and their places in the CPU's state.

use crate::cpu_state::{CpuState, DescriptorTable, Segment};

/// RAX; RCX to R15 follow in the order of the instruction encoding.
pub const RAX: u8 = 0;
/// The next instruction's offset in CS.
pub const RIP: u8 = 16;
/// All of RFLAGS.
pub const RFLAGS: u8 = 17;
/// ES; CS, SS, DS, FS and GS follow.
pub const ES: u8 = 18;
/// MSR and control registers lie from here on, up to [`LAST_SYSTEM`].
const CR0: u8 = 28;
/// The last number below those of the x87.
pub const LAST_SYSTEM: u8 = 50;
/// The first number of x87 and SSE state, up to [`MXCSR`].
pub const X87_STATE: u8 = 51;
/// ST(0); the others follow.
const ST0: u8 = 54;
/// SSE control and status.
pub const MXCSR: u8 = 62;
/// One where the instruction before keeps interrupts away from the next.
pub const INTERRUPT_SHADOW: u8 = 63;
/// One while the CPU is in HLT.
pub const HALTED: u8 = 64;
/// XMM0; the others follow.
pub const XMM0: u8 = 80;
/// The number behind the last.
pub const END: u8 = 96;

const GENERAL: [&str; 18] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15", "rip", "rflags",
];
const SYSTEM: [&str; 47] = [
    "es",
    "cs",
    "ss",
    "ds",
    "fs",
    "gs",
    "ldtr",
    "tr",
    "gdtr",
    "idtr",
    "cr0",
    "cr2",
    "cr3",
    "cr4",
    "cr8",
    "dr0",
    "dr1",
    "dr2",
    "dr3",
    "dr6",
    "dr7",
    "efer",
    "star",
    "lstar",
    "cstar",
    "sfmask",
    "kernel_gs_base",
    "sysenter_cs",
    "sysenter_esp",
    "sysenter_eip",
    "pat",
    "tsc_offset",
    "tsc_aux",
    "x87",
    "fip",
    "fdp",
    "st0",
    "st1",
    "st2",
    "st3",
    "st4",
    "st5",
    "st6",
    "st7",
    "mxcsr",
    "interrupt_shadow",
    "halted",
];
const XMM: [&str; 16] = [
    "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
    "xmm11", "xmm12", "xmm13", "xmm14", "xmm15",
];

/// A register's name; `None` if the number is no register's.
pub fn name(register: u8) -> Option<&'static str> {
    let index = usize::from(register);
    match register {
        0..ES => Some(GENERAL[index]),
        ES..=HALTED => Some(SYSTEM[index - usize::from(ES)]),
        XMM0..END => Some(XMM[index - usize::from(XMM0)]),
        _ => None,
    }
}

/// Eight-byte words of its value: 1 or 2.
pub fn words(register: u8) -> u8 {
    match register {
        ES..CR0 | ST0..MXCSR | XMM0..END => 2,
        _ => 1,
    }
}

/// All numbers that are a register's.
pub fn all() -> impl Iterator<Item = u8> {
    (0..=HALTED).chain(XMM0..END)
}

fn from_segment(segment: &Segment) -> [u64; 2] {
    let Segment { selector, attributes, limit, base } = *segment;
    [base, u64::from(selector) | u64::from(attributes) << 16 | u64::from(limit) << 32]
}

fn to_segment([base, rest]: [u64; 2]) -> Segment {
    let (selector, attributes) = (rest as u16, (rest >> 16) as u16);
    Segment { selector, attributes, limit: (rest >> 32) as u32, base }
}

fn from_table(table: DescriptorTable) -> [u64; 2] {
    [table.base, u64::from(table.limit)]
}

fn to_table([base, limit]: [u64; 2]) -> DescriptorTable {
    DescriptorTable { base, limit: limit as u16 }
}

fn st_words(register: [u8; 10]) -> [u64; 2] {
    let mut bytes = [0; 16];
    bytes[..10].copy_from_slice(&register);
    xmm_words(u128::from_le_bytes(bytes))
}

fn xmm_words(register: u128) -> [u64; 2] {
    [register as u64, (register >> 64) as u64]
}

/// Control, status, tag byte and opcode of the x87.
fn from_x87(state: &CpuState) -> u64 {
    let fpu = &state.fpu;
    let low = u64::from(fpu.fcw) | u64::from(fpu.fsw) << 16;
    low | u64::from(fpu.ftw) << 32 | u64::from(fpu.fop) << 48
}

fn set_x87(state: &mut CpuState, value: u64) {
    let fpu = &mut state.fpu;
    (fpu.fcw, fpu.fsw) = (value as u16, (value >> 16) as u16);
    (fpu.ftw, fpu.fop) = ((value >> 32) as u8, (value >> 48) as u16);
}

/// The field of a register that is one word of the state.
fn word(state: &mut CpuState, register: u8) -> Option<&mut u64> {
    let index = usize::from(register);
    Some(match register {
        0..RIP => &mut state.gpr[index],
        RIP => &mut state.rip,
        RFLAGS => &mut state.rflags,
        CR0 => &mut state.cr0,
        29 => &mut state.cr2,
        30 => &mut state.cr3,
        31 => &mut state.cr4,
        32 => &mut state.cr8,
        33..=36 => &mut state.dr[index - 33],
        37 => &mut state.dr6,
        38 => &mut state.dr7,
        39 => &mut state.efer,
        40 => &mut state.star,
        41 => &mut state.lstar,
        42 => &mut state.cstar,
        43 => &mut state.sfmask,
        44 => &mut state.kernel_gs_base,
        45 => &mut state.sysenter_cs,
        46 => &mut state.sysenter_esp,
        47 => &mut state.sysenter_eip,
        48 => &mut state.pat,
        49 => &mut state.tsc_offset,
        LAST_SYSTEM => &mut state.tsc_aux,
        52 => &mut state.fpu.fip,
        53 => &mut state.fpu.fdp,
        _ => return None,
    })
}

/// Exchanges a register's value in the state for another; `None` if the number is no register's.
pub fn replace(state: &mut CpuState, register: u8, value: [u64; 2]) -> Option<[u64; 2]> {
    use std::mem::replace;
    let index = usize::from(register);
    let segment = match register {
        ES..24 => Some(&mut state.segments[index - usize::from(ES)]),
        24 => Some(&mut state.ldtr),
        25 => Some(&mut state.tr),
        _ => None,
    };
    if let Some(segment) = segment {
        return Some(from_segment(&replace(segment, to_segment(value))));
    }
    if let Some(word) = word(state, register) {
        return Some([replace(word, value[0]), 0]);
    }
    let flag = |flag: &mut bool| [u64::from(replace(flag, value[0] != 0)), 0];
    Some(match register {
        26 => from_table(replace(&mut state.gdtr, to_table(value))),
        27 => from_table(replace(&mut state.idtr, to_table(value))),
        X87_STATE => {
            let before = from_x87(state);
            set_x87(state, value[0]);
            [before, 0]
        }
        ST0..MXCSR => {
            let bytes = u128::from(value[0]) | u128::from(value[1]) << 64;
            let mut register = [0; 10];
            register.copy_from_slice(&bytes.to_le_bytes()[..10]);
            st_words(replace(&mut state.fpu.st[index - usize::from(ST0)], register))
        }
        MXCSR => [u64::from(replace(&mut state.fpu.mxcsr, value[0] as u32)), 0],
        INTERRUPT_SHADOW => flag(&mut state.interrupt_shadow),
        HALTED => flag(&mut state.halted),
        XMM0..END => {
            let value = u128::from(value[0]) | u128::from(value[1]) << 64;
            xmm_words(replace(&mut state.fpu.xmm[index - usize::from(XMM0)], value))
        }
        _ => return None,
    })
}

/// The registers in a range of numbers that differ between two states, with their values in `now`; `then`
/// becomes as `now` is in them.
pub fn take_changes(
    then: &mut CpuState,
    now: &mut CpuState,
    registers: impl Iterator<Item = u8>,
    mut each: impl FnMut(u8, [u64; 2]),
) {
    for register in registers {
        let Some(before) = replace(then, register, [0; 2]) else { continue };
        let Some(value) = replace(now, register, before) else { continue };
        replace(now, register, value);
        replace(then, register, value);
        if value != before {
            each(register, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_register_has_a_name_a_width_and_a_place_of_its_own() {
        let mut state = CpuState::default();
        // Bits that every register of its kind has.
        let value = |register: u8| match register {
            INTERRUPT_SHADOW | HALTED => [1, 0],
            26 | 27 | ST0..MXCSR => [u64::MAX - u64::from(register), u64::from(register)],
            MXCSR => [77, 0],
            X87_STATE => [0x07ff_00ff_1234_5678, 0],
            _ if words(register) == 2 => [u64::from(register) << 40, 3 + u64::from(register)],
            _ => [u64::from(register) << 40 | 5, 0],
        };
        for register in all() {
            assert!(name(register).is_some(), "{register}");
            assert!(replace(&mut state, register, value(register)).is_some(), "{register}");
        }
        for register in all() {
            let found = replace(&mut state, register, [0; 2]);
            assert_eq!(found, Some(value(register)), "{register}");
            assert!(words(register) == 2 || value(register)[1] == 0, "{register}");
        }
        for none in [65, 79, END, 255] {
            assert_eq!((name(none), replace(&mut state, none, [0; 2])), (None, None), "{none}");
        }
        // Nothing of the state is left out: RFLAGS and its like are zero now.
        let mut zero =
            CpuState { rflags: 0, cr0: 0, dr6: 0, dr7: 0, pat: 0, ..CpuState::default() };
        (zero.fpu.fcw, zero.fpu.mxcsr) = (0, 0);
        assert_eq!(state, zero);
    }

    #[test]
    fn changes_are_found_and_taken_over() {
        let (mut then, mut now) = (CpuState::default(), CpuState::default());
        (now.gpr[3], now.fpu.xmm[15], now.segments[4].limit) = (9, 1 << 70, 5);
        let mut changes = Vec::new();
        take_changes(&mut then, &mut now, all(), |register, value| changes.push((register, value)));
        assert_eq!(changes, [(3, [9, 0]), (22, [0, 5 << 32]), (95, [0, 1 << 6])]);
        assert_eq!(then, now);
    }
}
