//! A few bytes of machine code in 64-bit mode at CPL0, with a handler for every exception.

use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::*;
use vm_memory::{Bytes, GuestAddress};

/// Where a test's code starts.
pub(crate) const CODE: u64 = 0x1_0000;
/// Memory that a test may use.
pub(crate) const DATA: u64 = 0x3_0000;
/// The exception handlers, 16 bytes each: a HLT.
pub(crate) const HANDLERS: u64 = 0x8000;
/// Where there is no RAM, and the board answers.
pub(crate) const NO_RAM: u64 = 0xb_8000;
/// Behind the last mapped page.
pub(crate) const UNMAPPED: u64 = 0x4000_0000;
const STACK_TOP: u64 = 0x2_0000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PAGE_DIRECTORY: u64 = 0x3000;
const IDT: u64 = 0x4000;
const GDT: u64 = 0x5000;
const TSS: u64 = 0x6000;
const HLT: u8 = 0xf4;
const GDT_ENTRIES: [u64; 5] =
    [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_6000_0067, 0];

fn put(ram: &GuestRam, address: u64, bytes: &[u8]) {
    ram.memory().write_slice(bytes, GuestAddress(address)).expect("it is RAM");
}

/// RAM with tables, handlers, a pattern at [`DATA`], and `code` at [`CODE`], behind which is a HLT.
pub(crate) fn ram(code: &[u8]) -> GuestRam {
    let ram = GuestRam::new(4).expect("the host has 4 MiB");
    put(&ram, PML4, &(PDPT | 7).to_le_bytes());
    put(&ram, PDPT, &(PAGE_DIRECTORY | 7).to_le_bytes());
    for index in 0..512_u64 {
        put(&ram, PAGE_DIRECTORY + 8 * index, &(index << 21 | 0x87).to_le_bytes());
    }
    for (index, entry) in (0..).zip(GDT_ENTRIES) {
        put(&ram, GDT + 8 * index, &entry.to_le_bytes());
    }
    for vector in 0..32 {
        let handler = HANDLERS + 16 * vector;
        put(&ram, IDT + 16 * vector, &(handler | 8 << 16 | 0x8e00 << 32).to_le_bytes());
        put(&ram, handler, &[HLT]);
    }
    let pattern: Vec<u8> = (0..512_u32).map(|index| (index * 37 + 11) as u8).collect();
    put(&ram, DATA, &pattern);
    put(&ram, CODE, code);
    put(&ram, CODE + code.len() as u64, &[HLT]);
    ram
}

/// About to execute at [`CODE`], interrupts off; RBX and RSI are [`DATA`], RDI is behind it, and all else has a
/// pattern.
pub(crate) fn state() -> CpuState {
    let data = Segment { selector: 0x10, attributes: 0xc093, limit: 0xffff_ffff, base: 0 };
    let mut state = CpuState {
        rip: CODE,
        segments: [data; 6],
        tr: Segment { selector: 0x18, attributes: 0x8b, limit: 0x67, base: TSS },
        gdtr: DescriptorTable { base: GDT, limit: 8 * GDT_ENTRIES.len() as u16 - 1 },
        idtr: DescriptorTable { base: IDT, limit: 0xfff },
        cr0: 0x8001_0033,
        cr3: PML4,
        cr4: 0x620,
        efer: 0xd01,
        ..CpuState::default()
    };
    state.segments[CS] = Segment { selector: 8, attributes: 0xa09b, limit: 0xffff_ffff, base: 0 };
    for (index, register) in state.gpr.iter_mut().enumerate() {
        *register = 0x0123_4567_89ab_cdef_u64.rotate_left(index as u32 * 5);
    }
    for (index, register) in state.fpu.xmm.iter_mut().enumerate() {
        *register = u128::from(index as u64 + 1) * 0x3f80_0000_3f80_0000_4000_0000_4040_0001;
    }
    state.gpr[RBX] = DATA;
    state.gpr[RSI] = DATA;
    state.gpr[RDI] = DATA + 0x100;
    state.gpr[RSP] = STACK_TOP;
    state
}
