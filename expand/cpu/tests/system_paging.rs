//! Paging: which rights a page gives to whom, the error codes of page faults, accessed and dirty
//! bits, what forgets a translation, and the ways into each paging mode.

mod guest;

use guest::{
    ABSENT, AC, ACCESSED, CR0_WP, CR4_SMAP, CR4_SMEP, DIRTY, Guest, KERNEL_CODE, NO_EXECUTE,
    PRESENT, SPARE, USER, USER_DATA, WRITABLE,
};
use reprise_machine::engine::Exit;
use reprise_trace::cpu_state::{CS, RAX, RBX, RCX, RDI, RDX, RSI};

/// The page whose rights the cases vary; it holds `int 0x81`.
const TARGET: u64 = USER_DATA;
const PAGE_FAULT: u8 = 14;
const DONE: u8 = 0x81;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Fetch,
}
use Kind::{Fetch, Read, Write};

impl Kind {
    /// Code that accesses what RBX points to and then calls [`DONE`].
    fn code(self) -> &'static [u8] {
        match self {
            Read => &[0x48, 0x8b, 0x03, 0xcd, DONE],
            Write => &[0x48, 0x89, 0x03, 0xcd, DONE],
            Fetch => &[0xff, 0xe3],
        }
    }
}

/// What is switched on besides what every guest has (no-execute, no write protection).
const NOTHING: u32 = 0;
const PROTECT: u32 = 1;
const SMEP: u32 = 2;
const SMAP: u32 = 4;
const OVERRIDE: u32 = 8;
const NO_NX: u32 = 16;

/// Shorthands for page flags.
const P: u64 = PRESENT;
const W: u64 = WRITABLE;
const U: u64 = USER;
const NX: u64 = NO_EXECUTE;
const BEYOND_PHYSICAL: u64 = 1 << 45;

/// (level, access, page flags, switches, the page fault's error code)
type Case = (u8, Kind, u64, u32, Option<u32>);

#[rustfmt::skip]
const CASES: &[Case] = &[
    // Not present: nothing else counts.
    (0, Read,  0,              NOTHING, Some(0)),
    (0, Write, W | U,          NOTHING, Some(2)),
    (3, Read,  0,              NOTHING, Some(4)),
    (3, Write, W | U | NX,     NOTHING, Some(6)),
    (0, Fetch, W,              NOTHING, Some(0x10)),
    (3, Fetch, U,              NOTHING, Some(0x14)),
    // User accesses need user pages, and writable ones to write.
    (3, Read,  P | U,          NOTHING, None),
    (3, Read,  P | W,          NOTHING, Some(5)),
    (3, Write, P | U,          NOTHING, Some(7)),
    (3, Write, P | U | W,      PROTECT, None),
    (3, Write, P | W,          NOTHING, Some(7)),
    (3, Fetch, P | W,          NOTHING, Some(0x15)),
    (3, Fetch, P | U,          NOTHING, None),
    // The supervisor writes read-only pages unless CR0.WP is set.
    (0, Read,  P,              PROTECT, None),
    (0, Write, P,              NOTHING, None),
    (0, Write, P,              PROTECT, Some(3)),
    (0, Write, P | U,          NOTHING, None),
    (0, Write, P | U,          PROTECT, Some(3)),
    (0, Write, P | U | W,      PROTECT, None),
    // No-execute.
    (0, Fetch, P | NX,         NOTHING, Some(0x11)),
    (3, Fetch, P | U | NX,     NOTHING, Some(0x15)),
    (3, Read,  P | U | NX,     NOTHING, None),
    // With EFER.NXE clear its bit is reserved, and fetches are not told apart.
    (0, Read,  P | NX,         NO_NX,   Some(9)),
    (3, Fetch, P | U | NX,     NO_NX,   Some(0xd)),
    (3, Fetch, P | W,          NO_NX,   Some(5)),
    (3, Fetch, P | W,          NO_NX | SMEP, Some(0x15)),
    // Reserved bits.
    (0, Read,  P | BEYOND_PHYSICAL,     NOTHING, Some(9)),
    (0, Write, P | W | BEYOND_PHYSICAL, NOTHING, Some(0xb)),
    (3, Write, P | W | BEYOND_PHYSICAL, NOTHING, Some(0xf)),
    (3, Fetch, P | U | BEYOND_PHYSICAL, NOTHING, Some(0x1d)),
    // SMEP: the supervisor does not execute user pages.
    (0, Fetch, P | U,          NOTHING, None),
    (0, Fetch, P | U,          SMEP,    Some(0x11)),
    (0, Fetch, P,              SMEP,    None),
    (3, Fetch, P | U,          SMEP,    None),
    (0, Read,  P | U,          SMEP,    None),
    // SMAP: nor does it read or write them, unless RFLAGS.AC is set; it may execute them.
    (0, Read,  P | U,          SMAP,            Some(1)),
    (0, Write, P | U | W,      SMAP,            Some(3)),
    (0, Read,  P | U,          SMAP | OVERRIDE, None),
    (0, Write, P | U | W,      SMAP | OVERRIDE, None),
    (0, Write, P | U,          SMAP | OVERRIDE | PROTECT, Some(3)),
    (0, Fetch, P | U,          SMAP,            None),
    (0, Read,  P,              SMAP,            None),
    (3, Read,  P | U,          SMAP,            None),
];

fn switched(guest: &mut Guest, switches: u32) {
    let state = &mut guest.state;
    state.cr0 &= !CR0_WP;
    if switches & PROTECT != 0 {
        state.cr0 |= CR0_WP;
    }
    if switches & SMEP != 0 {
        state.cr4 |= CR4_SMEP;
    }
    if switches & SMAP != 0 {
        state.cr4 |= CR4_SMAP;
    }
    if switches & OVERRIDE != 0 {
        state.rflags |= AC;
    }
    if switches & NO_NX != 0 {
        state.efer &= !(1 << 11);
    }
}

#[test]
fn rights_and_error_codes() {
    for &(level, kind, flags, switches, error_code) in CASES {
        let guest = if level == 0 { Guest::long() } else { Guest::long().user() };
        let ended = guest
            .code(kind.code())
            .with(|guest| {
                guest.write(TARGET, &[0xcd, DONE]);
                guest.page(TARGET, flags);
                guest.state.gpr[RBX] = TARGET;
                switched(guest, switches);
            })
            .run();
        let expected = match error_code {
            Some(code) => (PAGE_FAULT, Some(code)),
            None => (DONE, None),
        };
        let name = format!("level {level}, {kind:?}, page {flags:#x}, switches {switches:#x}");
        assert_eq!(ended.fault(), expected, "{name}");
        if error_code.is_some() {
            assert_eq!(ended.state.cr2, TARGET, "{name}");
        }
    }
}

/// The entry of the page table that maps `address`.
fn entry_address(address: u64) -> u64 {
    0x4000 + address / 0x1000 * 8
}

#[test]
fn accessed_and_dirty_bits_say_what_happened() {
    let cases = [
        (Read, P | W | U, ACCESSED),
        (Write, P | W | U, ACCESSED | DIRTY),
        (Fetch, P | U, ACCESSED),
        // A fault marks nothing.
        (Write, P | U, 0),
    ];
    for (kind, flags, marks) in cases {
        let ended = Guest::long()
            .user()
            .code(kind.code())
            .with(|guest| {
                guest.write(TARGET, &[0xcd, DONE]);
                guest.page(TARGET, flags);
                guest.state.gpr[RBX] = TARGET;
            })
            .run();
        assert_eq!(ended.u64(entry_address(TARGET)), TARGET | flags | marks, "{kind:?} {flags:#x}");
        assert_eq!(ended.u64(0x1000) & (ACCESSED | DIRTY), ACCESSED, "the root entry");
    }
}

#[test]
fn a_read_then_a_write_sets_the_dirty_bit() {
    // mov rax, [rbx]; mov [rbx], rax; int 0x81
    let ended = Guest::long()
        .user()
        .code(&[0x48, 0x8b, 0x03, 0x48, 0x89, 0x03, 0xcd, DONE])
        .with(|guest| {
            guest.page(TARGET, P | W | U);
            guest.state.gpr[RBX] = TARGET;
        })
        .run();
    assert_eq!(ended.u64(entry_address(TARGET)), TARGET | P | W | U | ACCESSED | DIRTY);
}

#[test]
fn a_store_across_pages_faults_before_it_writes() {
    let ended = Guest::long()
        .code(Write.code())
        .with(|guest| {
            guest.state.gpr[RBX] = ABSENT - 4;
            guest.state.gpr[RAX] = u64::MAX;
        })
        .run();
    assert_eq!(ended.fault(), (PAGE_FAULT, Some(2)));
    assert_eq!(ended.state.cr2, ABSENT);
    let mut before = [0xff; 4];
    ended.engine_read(ABSENT - 4, &mut before);
    assert_eq!(before, [0; 4]);
}

#[test]
fn invlpg_forgets_a_page_and_loading_cr3_all() {
    let invlpg: &[u8] = &[
        0x48, 0x8b, 0x03, // mov rax, [rbx]
        0x48, 0x89, 0x32, // mov [rdx], rsi
        0x0f, 0x01, 0x3b, // invlpg [rbx]
        0x48, 0x8b, 0x03, // mov rax, [rbx]
        0xf4,
    ];
    let cr3: &[u8] = &[
        0x48, 0x8b, 0x03, // mov rax, [rbx]
        0x48, 0x89, 0x32, // mov [rdx], rsi
        0x0f, 0x22, 0xdf, // mov cr3, rdi
        0x48, 0x8b, 0x03, // mov rax, [rbx]
        0xf4,
    ];
    for (name, code) in [("invlpg", invlpg), ("mov cr3", cr3)] {
        let ended = Guest::long()
            .code(code)
            .with(|guest| {
                guest.write(TARGET, &1u64.to_le_bytes());
                guest.write(TARGET + 0x1000, &2u64.to_le_bytes());
                guest.state.gpr[RBX] = TARGET;
                guest.state.gpr[RDX] = entry_address(TARGET);
                guest.state.gpr[RSI] = (TARGET + 0x1000) | P | W;
                guest.state.gpr[RDI] = guest.state.cr3;
            })
            .run();
        assert_eq!(ended.exit, Exit::Halt, "{name}");
        assert_eq!(ended.state.gpr[RAX], 2, "{name}");
    }
}

#[test]
fn invlpg_forgets_all_of_a_large_page() {
    const LARGE: u64 = 0x20_0000;
    let code: &[u8] = &[
        0x48, 0x8b, 0x03, // mov rax, [rbx]
        0x48, 0x8b, 0x01, // mov rax, [rcx]
        0x48, 0x89, 0x32, // mov [rdx], rsi: the large page elsewhere
        0x0f, 0x01, 0x39, // invlpg [rcx]
        0x48, 0x8b, 0x03, // mov rax, [rbx]
        0xf4,
    ];
    let ended = Guest::long()
        .code(code)
        .with(|guest| {
            // Linear 2 MiB is a large page at physical 2 MiB, and then at physical 0.
            guest.write(0x3008, &(LARGE | 0xe7).to_le_bytes());
            guest.write(LARGE + TARGET, &1u64.to_le_bytes());
            guest.write(TARGET, &2u64.to_le_bytes());
            guest.state.gpr[RBX] = LARGE + TARGET;
            guest.state.gpr[RCX] = LARGE + 0x10_0000;
            guest.state.gpr[RDX] = 0x3008;
            guest.state.gpr[RSI] = 0xe7;
        })
        .run();
    assert_eq!(ended.exit, Exit::Halt);
    assert_eq!(ended.state.gpr[RAX], 2);
}

#[test]
fn code_follows_its_translation() {
    // The same linear page is first one subroutine, then another: call rbx; mov [rdx], rsi;
    // invlpg [rbx]; call rbx; hlt.
    let code: &[u8] = &[0xff, 0xd3, 0x48, 0x89, 0x32, 0x0f, 0x01, 0x3b, 0xff, 0xd3, 0xf4];
    let ended = Guest::long()
        .code(code)
        .with(|guest| {
            guest.write(TARGET, &[0xff, 0xc0, 0xc3]); // inc eax; ret
            guest.write(TARGET + 0x1000, &[0x83, 0xc0, 0x10, 0xc3]); // add eax, 16; ret
            guest.state.gpr[RBX] = TARGET;
            guest.state.gpr[RDX] = entry_address(TARGET);
            guest.state.gpr[RSI] = (TARGET + 0x1000) | P | W;
        })
        .run();
    assert_eq!(ended.state.gpr[RAX], 17);
}

/// The page-table format's global bit, and CR4's bit that heeds it.
const GLOBAL: u64 = 1 << 8;
const CR4_PGE: u64 = 1 << 7;
/// The upper half of the address space begins with the low 512 GiB again.
const UPPER: u64 = 0xffff_8000_0000_0000;

/// Uses the page at [`TARGET`] (or its twin in the upper half), maps it elsewhere, executes
/// `forget`, uses it again; whether the second use went through the old translation.
fn outlives(forget: &[u8], base: u64, kind: Kind, flags: u64, cr4: u64) -> bool {
    let touch: &[u8] = match kind {
        Fetch => &[0xff, 0xd3],   // call rbx
        _ => &[0x48, 0x8b, 0x03], // mov rax, [rbx]
    };
    let ended = Guest::long()
        .code(touch)
        .code(&[0x48, 0x89, 0x32]) // mov [rdx], rsi
        .code(forget)
        .code(touch)
        .code(&[0xf4])
        .with(|guest| {
            guest.write(0x1800, &(0x2000 | P | W).to_le_bytes());
            match kind {
                Fetch => {
                    // mov al, 1; ret, and mov al, 2; ret
                    guest.write(TARGET, &[0xb0, 1, 0xc3]);
                    guest.write(TARGET + 0x1000, &[0xb0, 2, 0xc3]);
                }
                _ => {
                    guest.write(TARGET, &1u64.to_le_bytes());
                    guest.write(TARGET + 0x1000, &2u64.to_le_bytes());
                }
            }
            guest.page(TARGET, P | W | flags);
            guest.state.cr4 |= cr4;
            guest.state.gpr[RBX] = base + TARGET;
            guest.state.gpr[RDX] = entry_address(TARGET);
            guest.state.gpr[RSI] = (TARGET + 0x1000) | P | W | flags;
            guest.state.gpr[RDI] = guest.state.cr3;
            guest.state.gpr[RCX] = guest.state.cr4 ^ CR4_PGE;
        })
        .run();
    assert_eq!(ended.exit, Exit::Halt);
    match ended.state.gpr[RAX] {
        1 => true,
        2 => false,
        value => panic!("RAX is {value:#x}"),
    }
}

#[test]
fn global_translations_outlive_cr3_and_local_ones_do_not() {
    const MOV_CR3: &[u8] = &[0x0f, 0x22, 0xdf];
    for base in [0, UPPER] {
        for kind in [Read, Fetch] {
            let name = format!("{kind:?} at {base:#x}");
            assert!(outlives(MOV_CR3, base, kind, GLOBAL, CR4_PGE), "global: {name}");
            assert!(!outlives(MOV_CR3, base, kind, 0, CR4_PGE), "local: {name}");
            assert!(!outlives(MOV_CR3, base, kind, GLOBAL, 0), "global, not heeded: {name}");
        }
    }
}

#[test]
fn invlpg_and_cr4_forget_global_translations() {
    const INVLPG: &[u8] = &[0x0f, 0x01, 0x3b];
    const MOV_CR4: &[u8] = &[0x0f, 0x22, 0xe1];
    for base in [0, UPPER] {
        for kind in [Read, Fetch] {
            for flags in [0, GLOBAL] {
                let name = format!("{kind:?} at {base:#x}, {flags:#x}");
                assert!(!outlives(INVLPG, base, kind, flags, CR4_PGE), "invlpg: {name}");
                assert!(!outlives(MOV_CR4, base, kind, flags, CR4_PGE), "mov cr4: {name}");
                // invlpg [rsp]: another page.
                let other = outlives(&[0x0f, 0x01, 0x3c, 0x24], base, kind, flags, CR4_PGE);
                assert!(other, "invlpg of another page: {name}");
            }
        }
    }
}

#[test]
fn an_instruction_across_the_canonical_boundary_faults() {
    const LAST: u64 = 0x7fff_ffff_ffff;
    let ended = Guest::long()
        .code(&[0xff, 0xe3])
        .with(|guest| {
            let tables = [(0x1000 + 255 * 8, 0x10_0000u64), (0x10_0ff8, 0x10_1000)];
            for (entry, table) in tables.into_iter().chain([(0x10_1ff8, 0x10_2000)]) {
                guest.write(entry, &(table | P | W).to_le_bytes());
            }
            guest.write(0x10_2ff8, &(TARGET | P | W).to_le_bytes());
            guest.write(TARGET + 0xfff, &[0x48]);
            guest.state.gpr[RBX] = LAST;
        })
        .run();
    assert_eq!(ended.fault(), (13, Some(0)));
    assert_eq!(ended.delivered().expect("the handler ran").rip, LAST);
}

#[test]
fn clac_and_stac_take_effect_at_once() {
    // stac; mov rax, [rbx]; clac; mov rax, [rbx]
    let code = &[0x0f, 0x01, 0xcb, 0x48, 0x8b, 0x03, 0x0f, 0x01, 0xca, 0x48, 0x8b, 0x03];
    let ended = Guest::long()
        .code(code)
        .with(|guest| {
            guest.state.cr4 |= CR4_SMAP;
            guest.state.gpr[RBX] = TARGET;
        })
        .run();
    assert_eq!(ended.fault(), (PAGE_FAULT, Some(1)));
    let delivered = ended.delivered().expect("the handler ran");
    assert_eq!(delivered.rip, KERNEL_CODE + 9);
}

#[test]
fn protected_mode_leads_to_long_mode() {
    let code: &[u8] = &[
        0x0f, 0x20, 0xe0, 0x83, 0xc8, 0x20, 0x0f, 0x22, 0xe0, // CR4.PAE
        0xb8, 0x00, 0x10, 0x00, 0x00, 0x0f, 0x22, 0xd8, // CR3
        0xb9, 0x80, 0x00, 0x00, 0xc0, 0x0f, 0x32, 0x0d, 0x00, 0x01, 0x00, 0x00, 0x0f,
        0x30, // EFER.LME
        0x0f, 0x20, 0xc0, 0x0d, 0x00, 0x00, 0x00, 0x80, 0x0f, 0x22, 0xc0, // CR0.PG
        0xea, 0x00, 0x01, 0x01, 0x00, 0x50, 0x00, // jmp 0x50:0x10100
    ];
    let ended = Guest::protected()
        .code(code)
        .with(|guest| {
            guest.descriptor(SPARE, guest::CODE_64);
            // mov rax, -1; inc rax would be dec eax; inc eax in 32-bit code.
            guest.write(KERNEL_CODE + 0x100, &[0x48, 0xc7, 0xc0, 0xff, 0xff, 0xff, 0xff, 0xf4]);
        })
        .run();
    assert_eq!(ended.exit, Exit::Halt);
    assert_eq!(ended.state.rip, KERNEL_CODE + 0x108);
    assert_eq!(ended.state.gpr[RAX], u64::MAX);
    assert_eq!(ended.state.efer, 0x500);
    assert_eq!(ended.state.segments[CS].selector, SPARE);
}

/// `mov eax, 0x100000; mov cr3, eax; mov eax, cr4; or eax, CR4; mov cr4, eax; mov eax, cr0; or eax,
/// PG; mov cr0, eax; mov eax, [ebx]; mov ecx, [edx]; hlt`
fn enable_paging(cr4: u8) -> Vec<u8> {
    let mut code = vec![0xb8, 0x00, 0x00, 0x10, 0x00, 0x0f, 0x22, 0xd8, 0x0f, 0x20, 0xe0];
    code.extend([0x83, 0xc8, cr4, 0x0f, 0x22, 0xe0, 0x0f, 0x20, 0xc0]);
    code.extend([0x0d, 0x00, 0x00, 0x00, 0x80, 0x0f, 0x22, 0xc0]);
    code.extend([0x8b, 0x03, 0x8b, 0x0a, 0xf4]);
    code
}

const LEGACY_ROOT: u64 = 0x10_0000;

fn write_words(guest: &mut Guest, address: u64, words: &[u32]) {
    for (index, word) in words.iter().enumerate() {
        guest.write(address + 4 * index as u64, &word.to_le_bytes());
    }
}

#[test]
fn two_level_paging_with_large_pages() {
    let ended = Guest::protected()
        .code(&enable_paging(0x10))
        .with(|guest| {
            // The first 4 MiB by a table; 4 to 8 MiB is a large page at physical 0; 8 to 12 too, but
            // not present.
            write_words(guest, LEGACY_ROOT, &[0x10_1003, 0x83, 0x82]);
            for page in 0..1024 {
                let entry = (page as u32) << 12 | 3;
                write_words(guest, 0x10_1000 + 4 * page, &[entry]);
            }
            guest.write(TARGET, &0x1234_5678u32.to_le_bytes());
            guest.state.gpr[RBX] = 0x40_0000 + TARGET;
            guest.state.gpr[RDX] = 0x80_0000 + TARGET;
        })
        .run();
    assert_eq!(ended.fault(), (PAGE_FAULT, Some(0)));
    assert_eq!(ended.state.cr2, 0x80_0000 + TARGET);
    assert_eq!(ended.state.gpr[RAX], 0x1234_5678);
    assert_eq!(ended.u64(LEGACY_ROOT) as u32, 0x10_1003 | ACCESSED as u32);
    assert_eq!(ended.u64(LEGACY_ROOT + 4) as u32, 0x83 | ACCESSED as u32);
}

#[test]
fn two_level_paging_knows_no_execution_right_and_no_high_addresses() {
    // A fetch from a page that is absent: bit 4 of the error code belongs to the formats that have
    // a no-execute bit.
    let ended = Guest::protected()
        .code(&enable_paging(0x10)[..28])
        .code(&[0xff, 0xe2])
        .with(|guest| {
            write_words(guest, LEGACY_ROOT, &[0x83]);
            guest.state.efer = 1 << 11;
            guest.state.gpr[RDX] = 0x40_0000;
        })
        .run();
    assert_eq!(ended.fault(), (PAGE_FAULT, Some(0)));
    // A large page's address bits 32 and up are those of PSE-36, which the CPU model has not.
    for bit in 13..22 {
        let ended = Guest::protected()
            .code(&enable_paging(0x10))
            .with(|guest| {
                write_words(guest, LEGACY_ROOT, &[0x83, 0x83 | 1 << bit]);
                guest.state.gpr[RBX] = 0x40_0000;
            })
            .run();
        assert_eq!(ended.fault(), (PAGE_FAULT, Some(9)), "bit {bit}");
    }
}

#[test]
fn pae_paging_has_four_pointers() {
    let ended = Guest::protected()
        .code(&enable_paging(0x20))
        .with(|guest| {
            guest.write(LEGACY_ROOT, &0x10_1001u64.to_le_bytes());
            guest.write(LEGACY_ROOT + 24, &0x10_1001u64.to_le_bytes());
            guest.write(0x10_1000, &0x83u64.to_le_bytes());
            guest.write(TARGET, &0x1234_5678u32.to_le_bytes());
            guest.state.gpr[RBX] = 0xc000_0000 + TARGET;
            guest.state.gpr[RDX] = 0x4000_0000 + TARGET;
        })
        .run();
    assert_eq!(ended.fault(), (PAGE_FAULT, Some(0)));
    assert_eq!(ended.state.cr2, 0x4000_0000 + TARGET);
    assert_eq!(ended.state.gpr[RAX], 0x1234_5678);
}

#[test]
fn pae_pointers_with_reserved_bits_are_refused() {
    let ended = Guest::protected()
        .code(&enable_paging(0x20))
        .with(|guest| guest.write(LEGACY_ROOT, &0x10_1003u64.to_le_bytes()))
        .run();
    assert_eq!(ended.fault(), (13, Some(0)));
    assert_eq!(ended.state.cr0 >> 31, 0);
}

/// The same code at the same privilege level, before SMAP is switched on, with it overridden, and
/// without: what it may access is not settled when it runs first.
#[test]
fn smap_holds_for_code_that_ran_before_it_was_on() {
    /// MOV RAX, [RBX]; RET. It lies in another page, so that no caller holds a translation of it.
    const F: u64 = KERNEL_CODE + 0x1000;
    let call = |from: u64| {
        let [low, high, ..] = (F - from - 5).to_le_bytes();
        [0xe8, low, high, 0, 0]
    };
    let ended = Guest::long()
        .with(|guest| {
            guest.write(KERNEL_CODE, &call(KERNEL_CODE));
            // MOV RAX, CR4; OR EAX, SMAP; MOV CR4, RAX; STAC; later CLAC.
            guest.write(KERNEL_CODE + 5, &[0x0f, 0x20, 0xe0, 0x0d, 0, 0, 0x20, 0]);
            guest.write(KERNEL_CODE + 13, &[0x0f, 0x22, 0xe0, 0x0f, 0x01, 0xcb]);
            guest.write(KERNEL_CODE + 19, &call(KERNEL_CODE + 19));
            guest.write(KERNEL_CODE + 24, &[0x0f, 0x01, 0xca]);
            guest.write(KERNEL_CODE + 27, &call(KERNEL_CODE + 27));
            guest.write(F, &[0x48, 0x8b, 0x03, 0xc3]);
            guest.state.gpr[RBX] = USER_DATA;
        })
        .run();
    assert_eq!(ended.fault(), (PAGE_FAULT, Some(1)));
    assert_eq!(ended.delivered().map(|delivered| delivered.rip), Some(F));
}
