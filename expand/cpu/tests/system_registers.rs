//! Control and model-specific registers, the time-stamp counter, CPUID.

mod guest;

use guest::{CR0, CR4, EFER, ENTRY, Guest, KERNEL_CODE, KERNEL_DATA};
use reprise_devices::cpu_model;
use reprise_machine::clock::TimeBase;
use reprise_machine::engine::{Engine, Exit};
use reprise_trace::cpu_state::{FS, GS, RAX, RBX, RCX, RDX};

/// What RDMSR gives, or the vector and error code that it raises.
type Read = Result<u64, (u8, Option<u32>)>;

const GP: (u8, Option<u32>) = (13, Some(0));
const NOT_CANONICAL: u64 = 0x8000_0000_0000;

/// Writes an MSR and reads it back: `wrmsr; rdmsr; hlt`.
fn write_and_read(index: u32, value: u64) -> Result<u64, (u8, Option<u32>)> {
    let ended = Guest::long()
        .code(&[0x0f, 0x30, 0x0f, 0x32, 0xf4])
        .with(|guest| {
            guest.state.gpr[RCX] = 0xffff_ffff_0000_0000 | u64::from(index);
            guest.state.gpr[RAX] = 0xffff_ffff_0000_0000 | value & 0xffff_ffff;
            guest.state.gpr[RDX] = 0xffff_ffff_0000_0000 | value >> 32;
        })
        .run();
    match ended.delivered() {
        Some(_) => Err(ended.fault()),
        None => Ok(ended.state.gpr[RDX] << 32 | ended.state.gpr[RAX]),
    }
}

#[test]
fn registers_with_state_keep_what_is_written() {
    let address = 0xffff_8000_1234_5678;
    #[rustfmt::skip]
    let cases: &[(u32, u64, Read)] = &[
        (0x174, 8, Ok(8)),
        (0x174, 1 << 32, Err(GP)),
        (0x175, address, Ok(address)),
        (0x176, address, Ok(address)),
        (0x176, NOT_CANONICAL, Err(GP)),
        (0x277, 0x0007_0105_0407_0106, Ok(0x0007_0105_0407_0106)),
        (0x277, 2, Err(GP)),
        (0x277, 8 << 56, Err(GP)),
        (0xc000_0081, u64::MAX, Ok(u64::MAX)),
        (0xc000_0082, address, Ok(address)),
        (0xc000_0082, NOT_CANONICAL, Err(GP)),
        (0xc000_0083, address, Ok(address)),
        (0xc000_0084, 0x4_7700, Ok(0x4_7700)),
        (0xc000_0084, 1 << 32, Err(GP)),
        (0xc000_0100, address, Ok(address)),
        (0xc000_0101, address, Ok(address)),
        (0xc000_0102, address, Ok(address)),
        (0xc000_0102, NOT_CANONICAL, Err(GP)),
        // EFER: LMA is the CPU's own, LME does not change under paging, the rest is reserved.
        (0xc000_0080, 0x901, Ok(0xd01)),
        (0xc000_0080, 0x500, Ok(0x500)),
        (0xc000_0080, 0x001, Err(GP)),
        (0xc000_0080, 0x1d01, Err(GP)),
        // Not in the model: TSC_AUX, APIC base writes, MTRRs, and what never was.
        (0xc000_0103, 0, Err(GP)),
        (0x1b, 0, Err(GP)),
        (0x2ff, 0, Err(GP)),
        (0x1234_5678, 0, Err(GP)),
    ];
    for &(index, value, result) in cases {
        assert_eq!(write_and_read(index, value), result, "MSR {index:#x}, {value:#x}");
    }
}

#[test]
fn constant_registers_are_those_of_the_model() {
    for register in cpu_model::MSRS {
        let expected = match register.write {
            cpu_model::MsrWrite::Ignored => Ok(register.value),
            cpu_model::MsrWrite::Faults => Err(GP),
        };
        assert_eq!(write_and_read(register.index, 0x55), expected, "MSR {:#x}", register.index);
        let read = Guest::long()
            .code(&[0x0f, 0x32, 0xf4])
            .with(|guest| guest.state.gpr[RCX] = register.index.into())
            .run()
            .state;
        assert_eq!(read.gpr[RDX] << 32 | read.gpr[RAX], register.value);
    }
}

#[test]
fn bases_take_effect_at_once() {
    // wrmsr to FS_BASE; mov eax, fs:[0]; hlt
    let code = &[0x0f, 0x30, 0x64, 0x8b, 0x04, 0x25, 0, 0, 0, 0, 0xf4];
    let state = Guest::long()
        .code(code)
        .with(|guest| {
            guest.write(ENTRY, &0x1234_5678u32.to_le_bytes());
            guest.state.gpr[RCX] = 0xc000_0100;
            guest.state.gpr[RAX] = ENTRY;
        })
        .run()
        .state;
    assert_eq!(state.gpr[RAX], 0x1234_5678);
    assert_eq!((state.segments[FS].base, state.segments[GS].base), (ENTRY, 0));
}

#[test]
fn the_counter_follows_virtual_time() {
    // nop; nop; rdtsc; mov ebx, eax; wrmsr (TSC = RAX); rdtsc; hlt
    let mut engine = Guest::long()
        .code(&[0x90, 0x90, 0x0f, 0x31, 0x89, 0xc3, 0x0f, 0x30, 0x0f, 0x31, 0xf4])
        .with(|guest| {
            guest.state.tsc_offset = 5;
            guest.state.gpr[RCX] = 0x10;
        })
        .engine();
    engine.set_time_base(TimeBase { tick: 0, ns: 1000, ns_per_tick: 10 });
    assert_eq!(engine.run(100).expect("runs"), Exit::Halt);
    let state = engine.cpu_state().expect("state");
    assert_eq!(state.gpr[RBX], 1000 + 2 * 10 + 5);
    assert_eq!(state.gpr[RAX], 1000 + 2 * 10 + 5 + 10, "written at tick 4, read at tick 5");
    assert_eq!(state.gpr[RDX], 0);
}

#[test]
fn a_stepped_guest_reads_the_same_counter() {
    let guest = || Guest::long().code(&[0x90, 0x0f, 0x31, 0x89, 0xc3, 0x0f, 0x31, 0xf4]);
    let whole = guest().run().state;
    let mut stepped = guest().engine();
    for until in 1..=5 {
        stepped.run(until).expect("runs");
    }
    assert_eq!(stepped.cpu_state().expect("state"), whole);
    assert_eq!((whole.gpr[RBX], whole.gpr[RAX]), (1, 3));
}

#[test]
fn users_read_the_counter_unless_it_is_disabled() {
    let run = |cr4: u64| {
        Guest::long()
            .user()
            .code(&[0x0f, 0x31, 0xcd, 0x80])
            .with(|guest| guest.state.cr4 |= cr4)
            .run()
            .fault()
    };
    assert_eq!(run(0), (0x80, None));
    assert_eq!(run(4), GP);
}

#[test]
fn cpuid_answers_from_the_model() {
    for (leaf, subleaf) in [(0, 0), (1, 0), (4, 2), (7, 0), (7, 1), (0x8000_0008, 0), (0xdead, 9)] {
        let state = Guest::long()
            .code(&[0x0f, 0xa2, 0xf4])
            .with(|guest| {
                guest.state.gpr[RAX] = u64::MAX << 32 | u64::from(leaf);
                guest.state.gpr[RCX] = u64::from(subleaf);
            })
            .run()
            .state;
        let answer = [RAX, RBX, RCX, RDX].map(|register| state.gpr[register]);
        assert_eq!(answer, cpu_model::cpuid(leaf, subleaf).map(u64::from), "leaf {leaf:#x}");
    }
}

#[test]
fn the_selectors_of_the_x87_pointers_are_zeros_as_cpuid_says() {
    const FCS_AND_FDS_ARE_ZEROS: u32 = 1 << 13;
    assert_ne!(cpu_model::cpuid(7, 0)[1] & FCS_AND_FDS_ARE_ZEROS, 0);
    // fxrstor [ebx]; fxsave [ebx+0x200]; fadd dword [ebx]; fnstenv [ebx]; fxsave [ebx+0x400]; hlt
    let image = |offset: u64| KERNEL_DATA + offset;
    let ended = Guest::protected()
        .code(&[0x0f, 0xae, 0x0b, 0x0f, 0xae, 0x83, 0, 2, 0, 0, 0xd8, 0x03])
        .code(&[0xd9, 0x33, 0x0f, 0xae, 0x83, 0, 4, 0, 0, 0xf4])
        .with(|guest| {
            guest.state.gpr[RBX] = KERNEL_DATA;
            // All masked; a selector in each of the pointers' upper halves.
            guest.write(image(0), &[0x7f, 0x03]);
            guest.write(image(12), &[0x08, 0, 0, 0]);
            guest.write(image(20), &[0x10, 0, 0, 0]);
            guest.write(image(24), &0x1f80_u32.to_le_bytes());
        })
        .run();
    assert_eq!(ended.exit, Exit::Halt);
    let selector = |address| ended.u64(address) & 0xffff;
    for offset in [0x200, 0x400] {
        assert_eq!((selector(image(offset + 12)), selector(image(offset + 20))), (0, 0));
    }
    assert_eq!((selector(image(16)), selector(image(24))), (0, 0), "FNSTENV");
    assert_ne!(ended.u64(image(12)) as u32, 0, "the offsets are kept");
}

#[test]
fn control_registers_read_back() {
    // mov cr0, rax; mov rbx, cr0; mov cr4, rcx; mov rcx, cr4; mov cr8, rdx; mov rdx, cr8; hlt
    let state = Guest::long()
        .code(&[0x0f, 0x22, 0xc0, 0x0f, 0x20, 0xc3, 0x0f, 0x22, 0xe1, 0x0f, 0x20, 0xe1])
        .code(&[0x44, 0x0f, 0x22, 0xc2, 0x44, 0x0f, 0x20, 0xc2, 0xf4])
        .with(|guest| {
            guest.state.gpr[RAX] = CR0 & !0x10 | 0x1000_0000;
            guest.state.gpr[RCX] = CR4 | 0x30_0198;
            guest.state.gpr[RDX] = 7;
        })
        .run()
        .state;
    assert_eq!(state.gpr[RBX], CR0, "ET stays, unknown bits do not");
    assert_eq!((state.gpr[RCX], state.gpr[RDX]), (CR4 | 0x30_0198, 7));
    assert_eq!(state.efer, EFER);
}

#[test]
fn the_machine_status_word() {
    // lmsw ax; smsw ebx; clts; smsw rdx; hlt: LMSW sets PE, MP, EM and TS, and cannot clear PE.
    let ended = Guest::long()
        .code(&[0x0f, 0x01, 0xf0, 0x0f, 0x01, 0xe3, 0x0f, 0x06, 0x48, 0x0f, 0x01, 0xe2, 0xf4])
        .with(|guest| guest.state.gpr[RAX] = 0xfff8)
        .run();
    assert_eq!(ended.exit, Exit::Halt);
    let with_switched = CR0 & !0xf | 9;
    assert_eq!(ended.state.gpr[RBX], with_switched);
    assert_eq!(ended.state.gpr[RDX], with_switched & !8);
    assert_eq!(ended.state.rip, KERNEL_CODE + 13);
}
