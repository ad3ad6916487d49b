//! Linear addresses that come to lead elsewhere while the code there is hot: by INVLPG and by CR3, in
//! the lower and in the upper half of the address space, called from elsewhere or by the running code
//! itself.

mod guest;
mod lockstep;

use guest::{ACCESSED, CR4, DIRTY, Guest, KERNEL_CODE, PRESENT, USER, WRITABLE};
use lockstep::{Code, Lockstep, lockstep};
use reprise_machine::engine::Exit;
use reprise_trace::cpu_state::{RAX, RBX, RCX, RDX, RSI};

const ROUNDS: u64 = 60;
/// A linear address whose page changes, and the pages that it leads to.
const WINDOW: u64 = 0x10_0000;
const FIRST: u64 = 0x10_1000;
const SECOND: u64 = 0x10_2000;
/// The window's entry in the page table that every guest has.
const WINDOW_ENTRY: u64 = 0x4000 + (WINDOW >> 12) * 8;
const RIGHTS: u64 = PRESENT | WRITABLE | ACCESSED | DIRTY;
const ROOT: u64 = 0x1000;
/// Page tables of another address space, one page each.
const OTHER_TABLES: u64 = 0x11_0000;
/// What leads to the same place in the upper half.
const UPPER: u64 = 0xffff_ff80_0000_0000;
const CR4_PGE: u64 = 0x80;
const GLOBAL: u64 = 0x100;

const DEC_RCX: &[u8] = &[0x48, 0xff, 0xc9];
const JNZ: &[u8] = &[0x0f, 0x85];
const RET: u8 = 0xc3;
const HLT: &[u8] = &[0xf4];
/// xchg rbx, rdx; mov [rsi], rbx: the window's other page.
const OTHER_PAGE: &[u8] = &[0x48, 0x87, 0xd3, 0x48, 0x89, 0x1e];
const INVLPG_R8: &[u8] = &[0x41, 0x0f, 0x01, 0x38];
const CALL_R8: &[u8] = &[0x41, 0xff, 0xd0];
/// What the functions in the two pages add to EAX.
const ADD_1: &[u8] = &[0x05, 0x01, 0, 0, 0];
const ADD_256: &[u8] = &[0x05, 0, 0x01, 0, 0];

/// Runs code with the two pages' contents; the window leads to the first.
fn run(what: &str, high: bool, code: &Code, pages: [&[u8]; 2]) -> Lockstep {
    let ended = lockstep(what, || {
        Guest::long().code(&code.bytes).with(|guest| {
            guest.write(FIRST, pages[0]);
            guest.write(SECOND, pages[1]);
            guest.write(WINDOW_ENTRY, &(FIRST | RIGHTS).to_le_bytes());
            guest.write(ROOT + 8 * 511, &((ROOT + 0x1000) | PRESENT | WRITABLE).to_le_bytes());
            another_address_space(guest);
            let state = &mut guest.state;
            state.gpr[RAX] = 0;
            state.gpr[RBX] = FIRST | RIGHTS;
            state.gpr[RCX] = ROUNDS;
            state.gpr[RDX] = SECOND | RIGHTS;
            state.gpr[RSI] = WINDOW_ENTRY;
            state.gpr[8] = WINDOW + if high { UPPER } else { 0 };
            state.gpr[9] = ROOT;
            state.gpr[10] = OTHER_TABLES;
        })
    });
    assert_eq!(ended.exit, Exit::Halt, "{what}");
    assert!(ended.profile.units_translated > 0, "{what}");
    ended
}

/// Page tables like the first ones, but for the window, which leads to the second page.
fn another_address_space(guest: &mut Guest) {
    for level in 0..3 {
        let (table, next) = (OTHER_TABLES + level * 0x1000, OTHER_TABLES + (level + 1) * 0x1000);
        guest.write(table, &(next | PRESENT | WRITABLE | USER).to_le_bytes());
    }
    guest.write(OTHER_TABLES + 8 * 511, &((OTHER_TABLES + 0x1000) | 3).to_le_bytes());
    for page in (0..0x20_0000u64).step_by(0x1000) {
        let target = if page == WINDOW { SECOND } else { page };
        let entry = OTHER_TABLES + 0x3000 + page / 0x1000 * 8;
        guest.write(entry, &(target | RIGHTS).to_le_bytes());
    }
}

fn halves() -> [(bool, &'static str); 2] {
    [(false, "lower half"), (true, "upper half")]
}

/// How often the window is called between two changes.
const CALLS: [usize; 3] = [1, 2, 5];

#[test]
fn code_is_remapped_by_invlpg() {
    let pages = [[ADD_1, &[RET]].concat(), [ADD_256, &[RET]].concat()];
    for (high, half) in halves() {
        for calls in CALLS {
            let what = format!("{half}, {calls} calls");
            let code = Code::at(KERNEL_CODE).put(OTHER_PAGE).put(INVLPG_R8);
            let code = code.put(&CALL_R8.repeat(calls)).put(DEC_RCX).to(JNZ, KERNEL_CODE).put(HLT);
            let ended = run(&what, high, &code, [&pages[0], &pages[1]]);
            assert_eq!(ended.state.gpr[RAX], calls as u64 * ROUNDS / 2 * 0x101, "{what}");
        }
    }
}

#[test]
fn code_is_remapped_by_cr3() {
    let pages = [[ADD_1, &[RET]].concat(), [ADD_256, &[RET]].concat()];
    for (high, half) in halves() {
        for calls in CALLS {
            let what = format!("{half}, {calls} calls");
            let code = Code::at(KERNEL_CODE)
                // xchg r9, r10; mov cr3, r9
                .put(&[0x4d, 0x87, 0xd1, 0x41, 0x0f, 0x22, 0xd9])
                .put(&CALL_R8.repeat(calls))
                .put(DEC_RCX)
                .to(JNZ, KERNEL_CODE)
                .put(HLT);
            let ended = run(&what, high, &code, [&pages[0], &pages[1]]);
            assert_eq!(ended.state.gpr[RAX], calls as u64 * ROUNDS / 2 * 0x101, "{what}");
        }
    }
}

/// A jump to a known address, which is linked, not one through a register.
#[test]
fn code_that_is_jumped_to_directly_is_remapped() {
    let call = |code: Code| code.to(&[0xe8], WINDOW);
    let pages = [[ADD_1, &[RET]].concat(), [ADD_256, &[RET]].concat()];
    let invlpg = Code::at(KERNEL_CODE).put(OTHER_PAGE).put(INVLPG_R8);
    let cr3 = Code::at(KERNEL_CODE).put(&[0x4d, 0x87, 0xd1, 0x41, 0x0f, 0x22, 0xd9]);
    for (what, code) in [("invlpg", invlpg), ("cr3", cr3)] {
        let code = call(call(call(code))).put(DEC_RCX).to(JNZ, KERNEL_CODE).put(HLT);
        let ended = run(what, false, &code, [&pages[0], &pages[1]]);
        assert_eq!(ended.state.gpr[RAX], 3 * ROUNDS / 2 * 0x101, "{what}");
    }
}

/// The code in the window remaps itself: it goes on in the other page.
#[test]
fn running_code_remaps_itself() {
    for (high, half) in halves() {
        let prelude = [OTHER_PAGE, INVLPG_R8].concat();
        let first = [&prelude[..], ADD_1, &[RET]].concat();
        let second = [&prelude[..], ADD_256, &[RET]].concat();
        let code = Code::at(KERNEL_CODE).put(CALL_R8).put(DEC_RCX).to(JNZ, KERNEL_CODE).put(HLT);
        let ended = run(half, high, &code, [&first, &second]);
        assert_eq!(ended.state.gpr[RAX], ROUNDS / 2 * 0x101, "{half}");
    }
}

/// Loads and stores through the window follow it.
#[test]
fn data_is_remapped() {
    for (high, half) in halves() {
        let code = Code::at(KERNEL_CODE)
            .put(OTHER_PAGE)
            .put(INVLPG_R8)
            // add eax, [r8]; inc dword [r8 + 8]; push [r8 + 8]; pop rdi
            .put(&[0x41, 0x03, 0x00, 0x41, 0xff, 0x40, 0x08, 0x41, 0xff, 0x70, 0x08, 0x5f])
            .put(DEC_RCX)
            .to(JNZ, KERNEL_CODE)
            .put(HLT);
        let ended = run(half, high, &code, [&[1], &[0, 1]]);
        assert_eq!(ended.state.gpr[RAX], ROUNDS / 2 * 0x101, "{half}");
        assert_eq!(ended.state.gpr[7], ROUNDS / 2, "{half}");
    }
}

/// A page that is taken away while its code is hot: the call faults, exactly there.
#[test]
fn code_that_is_hot_is_unmapped() {
    for (high, half) in halves() {
        let code = Code::at(KERNEL_CODE)
            // cmp ecx, 5; cmove rbx, rdi (zero); mov [rsi], rbx
            .put(&[0x83, 0xf9, 5, 0x48, 0x0f, 0x44, 0xdf, 0x48, 0x89, 0x1e])
            .put(INVLPG_R8)
            .put(CALL_R8)
            .put(DEC_RCX)
            .to(JNZ, KERNEL_CODE)
            .put(HLT);
        let page = [ADD_1, &[RET]].concat();
        let ended = run(half, high, &code, [&page, &page]);
        assert_eq!(ended.state.gpr[RAX], ROUNDS - 5, "{half}");
        assert_eq!(ended.state.cr2, WINDOW + if high { UPPER } else { 0 }, "{half}");
        assert_eq!(ended.state.gpr[RCX], 5, "{half}");
    }
}

/// Global pages stay when CR3 changes; what is not global does not.
#[test]
fn global_code_stays_when_cr3_changes() {
    let page = [ADD_1, &[RET]].concat();
    let other = [ADD_256, &[RET]].concat();
    let code = Code::at(KERNEL_CODE)
        .put(&[0x4d, 0x87, 0xd1, 0x41, 0x0f, 0x22, 0xd9])
        .put(CALL_R8)
        .put(DEC_RCX)
        .to(JNZ, KERNEL_CODE)
        .put(HLT);
    let ended = lockstep("global pages", || {
        Guest::long().code(&code.bytes).with(|guest| {
            guest.write(FIRST, &page);
            guest.write(SECOND, &other);
            another_address_space(guest);
            // The window is the same page in both, and global in both.
            for entry in [WINDOW_ENTRY, OTHER_TABLES + 0x3000 + WINDOW / 0x1000 * 8] {
                guest.write(entry, &(FIRST | RIGHTS | GLOBAL).to_le_bytes());
            }
            guest.state.cr4 = CR4 | CR4_PGE;
            guest.state.gpr[RCX] = ROUNDS;
            guest.state.gpr[8] = WINDOW;
            guest.state.gpr[9] = ROOT;
            guest.state.gpr[10] = OTHER_TABLES;
        })
    });
    assert_eq!(ended.state.gpr[RAX], ROUNDS);
}
