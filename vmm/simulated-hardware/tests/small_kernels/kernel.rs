//! What a small kernel in 64-bit mode runs on: its tables in 4 MiB of RAM, all of them mapped one to one and
//! at [`HIGH`], for user code as well.

use reprise_machine::paging::write_ram;
use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::{CS, CpuState, DescriptorTable, RSP, Segment};

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PAGE_DIRECTORY: u64 = 0x3000;
const GDT: u64 = 0x4000;
const IDT: u64 = 0x5000;
const TSS: u64 = 0x6000;
/// Where it begins, guest-physical.
pub(crate) const CODE: u64 = 0x1_0000;
pub(crate) const STACK_TOP: u64 = 0x2_0000;
pub(crate) const USER_CODE: u64 = 0x4_0000;
pub(crate) const HIGH: u64 = 0xffff_ffff_8000_0000;

/// Descriptors of user code: selector 0x23.
pub(crate) const USER_CODE_64_BIT: u64 = 0x00af_fb00_0000_ffff;
pub(crate) const USER_CODE_32_BIT: u64 = 0x00cf_fb00_0000_ffff;
/// Attributes of gates: for the kernel alone, and for user code's INT.
pub(crate) const KERNEL_GATE: u64 = 0x8e00;
pub(crate) const USER_GATE: u64 = 0xee00;

pub(crate) const HLT: u8 = 0xf4;
pub(crate) const NOP: u8 = 0x90;
pub(crate) const IRETQ: [u8; 2] = [0x48, 0xcf];

/// Its RAM, and the state in which it begins at [`CODE`].
pub(crate) fn kernel(user_code: u64) -> (GuestRam, CpuState) {
    let ram = GuestRam::new(4).expect("4 MiB");
    put_words(&ram, PML4, &[PDPT | 7]);
    put_words(&ram, PML4 + 8 * 511, &[PDPT | 7]);
    put_words(&ram, PDPT, &[PAGE_DIRECTORY | 7]);
    put_words(&ram, PDPT + 8 * 510, &[PAGE_DIRECTORY | 7]);
    put_words(&ram, PAGE_DIRECTORY, &[0x87, 0x20_0087]);
    // Null, kernel code and data, user data and code, and the TSS in two entries.
    let entries: [u64; 7] = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_f300_0000_ffff,
        user_code,
        0x0000_8b00_6000_0067,
        0,
    ];
    put_words(&ram, GDT, &entries);
    put_words(&ram, TSS + 4, &[STACK_TOP]);
    let segment = |selector, attributes| Segment { selector, attributes, limit: u32::MAX, base: 0 };
    let mut state = CpuState {
        rip: CODE,
        segments: [segment(0x10, 0xc093); 6],
        tr: Segment { selector: 0x28, attributes: 0x8b, limit: 0x67, base: TSS },
        ldtr: Segment { selector: 0, attributes: 0x82, limit: 0, base: 0 },
        gdtr: DescriptorTable { base: GDT, limit: 8 * entries.len() as u16 - 1 },
        idtr: DescriptorTable { base: IDT, limit: 0xfff },
        cr0: 0x8001_0033,
        cr3: PML4,
        cr4: 0x620,
        efer: 0xd01,
        ..CpuState::default()
    };
    state.segments[CS] = segment(8, 0xa09b);
    state.gpr[RSP] = STACK_TOP;
    (ram, state)
}

pub(crate) fn put_words(ram: &GuestRam, address: u64, words: &[u64]) {
    for (at, word) in (address..).step_by(8).zip(words) {
        write_ram(ram, at, &word.to_le_bytes());
    }
}

/// The handler of a vector, at a linear address.
pub(crate) fn put_gate(ram: &GuestRam, vector: u64, handler: u64, attributes: u64) {
    let low = handler & 0xffff | 8 << 16 | attributes << 32 | (handler >> 16 & 0xffff) << 48;
    put_words(ram, IDT + 16 * vector, &[low, handler >> 32]);
}
