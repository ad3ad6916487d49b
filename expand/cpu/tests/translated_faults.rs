//! Page faults at every instruction of a translated block that loads, stores, pushes, pops, calls and
//! moves SSE registers, with flags set in between: RIP, flags, registers and the instruction count at
//! the fault are as without translation, and the instruction starts again as if nothing had been.

mod guest;
mod lockstep;

use std::collections::BTreeSet;

use guest::{ABSENT, Guest, HANDLERS, PRESENT, USER, USER_CODE, USER_DATA, USER_STACK, WRITABLE};
use lockstep::{Code, lockstep};
use reprise_machine::engine::Exit;
use reprise_trace::cpu_state::{RBP, RBX, RCX, RDI, RSI, RSP};

const PAGE_FAULT: u64 = 14;
const DONE: u8 = 0x81;
/// Where the body begins, behind what sets the bad pointer.
const BODY_START: u64 = USER_CODE + 31;
/// In the page before the absent one.
const NEAR: u32 = ABSENT as u32 - 0x800;
/// Rounds of the loop, which count down; in round `FAULT_AT` a register points elsewhere.
const ROUNDS: u64 = 40;
const FAULT_AT: u8 = 4;
/// Where the page table entry of [`ABSENT`] is.
const ABSENT_ENTRY: u32 = 0x4000 + (ABSENT as u32 >> 12) * 8;

/// The base of an instruction without a memory operand.
const NONE: usize = usize::MAX;

/// (base register of the memory operand, instruction): no two share what they fault by, and between
/// them flags are set and read.
#[rustfmt::skip]
const BODY: &[(usize, &[u8])] = &[
    (RBX, &[0x48, 0x03, 0x03]),                   // add rax, [rbx]
    (RSI, &[0x48, 0x89, 0x06]),                   // mov [rsi], rax
    (RDI, &[0x48, 0x13, 0x17]),                   // adc rdx, [rdi]
    (RSP, &[0x50]),                               // push rax
    (8, &[0x49, 0xff, 0x00]),                     // inc qword [r8]
    (RSP, &[0x5d]),                               // pop rbp
    (9, &[0x41, 0x0f, 0x10, 0x01]),               // movups xmm0, [r9]
    (NONE, &[0x66, 0x0f, 0xd4, 0xc8]),            // paddq xmm1, xmm0
    (10, &[0xf3, 0x41, 0x0f, 0x7f, 0x0a]),        // movdqu [r10], xmm1
    (11, &[0x49, 0x33, 0x2b]),                    // xor rbp, [r11]
    (NONE, &[0xf9]),                              // stc
    (12, &[0x49, 0x19, 0x14, 0x24]),              // sbb [r12], rdx
    (13, &[0x41, 0x0f, 0x92, 0x45, 0x00]),        // setb [r13]
    (14, &[0x49, 0x3b, 0x06]),                    // cmp rax, [r14]
    (14, &[0x49, 0x0f, 0x47, 0x56, 0x08]),        // cmova rdx, [r14+8]
    (RBX, &[0xff, 0x73, 0x10]),                   // push qword [rbx+16]
    (RSI, &[0x8f, 0x46, 0x18]),                   // pop qword [rsi+24]
    (9, &[0x41, 0x0f, 0x28, 0x51, 0x10]),         // movaps xmm2, [r9+16]
    (10, &[0x41, 0x0f, 0x29, 0x52, 0x20]),        // movaps [r10+32], xmm2
    (8, &[0x49, 0xd1, 0x10]),                     // rcl qword [r8], 1
    (13, &[0x41, 0x0f, 0xb6, 0x45, 0x01]),        // movzx eax, byte [r13+1]
    (9, &[0xf2, 0x41, 0x0f, 0x10, 0x19]),         // movsd xmm3, [r9]
    (11, &[0x66, 0x41, 0x89, 0x43, 0x06]),        // mov [r11+6], ax
    (RSP, &[0x9c]),                               // pushfq
    (RSP, &[0x41, 0x5f]),                         // pop r15
    (RSP, &[0xe8, 0x00, 0x00, 0x00, 0x00]),       // call the next instruction
    (NONE, &[0x48, 0x8d, 0x64, 0x24, 0x08]),      // lea rsp, [rsp+8]
    (RSI, &[0x48, 0x87, 0x06]),                   // xchg [rsi], rax
    (RDI, &[0x48, 0xf7, 0x1f]),                   // neg qword [rdi]
    (RSP, &[0x55]),                               // push rbp
    (NONE, &[0x48, 0x89, 0xe5]),                  // mov rbp, rsp
    (RSP, &[0x6a, 0x7f]),                         // push 127
    (RBP, &[0xc9]),                               // leave
];

/// The body in a loop, begun at its instruction `first`, whose base is `bad` in one round.
fn faulting(first: usize, bad: u64) -> Guest {
    let base = BODY[first].0 as u8;
    let start = Code::at(USER_CODE);
    let top = start.here();
    let mut code = start
        // The TLB shall know the page before the absent one.
        // mov r15, [near]; mov [near], r15
        .put(&[0x4c, 0x8b, 0x3c, 0x25])
        .put(&NEAR.to_le_bytes())
        .put(&[0x4c, 0x89, 0x3c, 0x25])
        .put(&NEAR.to_le_bytes())
        // mov r15, bad; cmp rcx, FAULT_AT; cmove base, r15
        .put(&[0x49, 0xc7, 0xc7])
        .put(&(bad as u32).to_le_bytes())
        .put(&[0x48, 0x83, 0xf9, FAULT_AT])
        .put(&[0x49 | base >> 3 << 2, 0x0f, 0x44, 0xc7 | (base & 7) << 3]);
    assert_eq!(code.here(), BODY_START);
    for index in 0..BODY.len() {
        code = code.put(BODY[(index + first) % BODY.len()].1);
    }
    // dec rcx; jnz the top; int 0x81
    let code = code.put(&[0x48, 0xff, 0xc9]).to(&[0x0f, 0x85], top).put(&[0xcd, DONE]);
    Guest::long().user().code(&code.bytes).with(|guest| {
        // The page before the absent one, for accesses across both.
        guest.page(ABSENT - 0x1000, PRESENT | WRITABLE | USER);
        for register in [RBX, RSI, RDI].into_iter().chain(8..15) {
            guest.state.gpr[register] = USER_DATA + 0x80 * register as u64;
        }
        guest.state.gpr[RBP] = USER_STACK - 0x100;
        guest.state.gpr[RCX] = ROUNDS;
        let data: Vec<u8> = (0..0x1000u32).map(|n| (n.wrapping_mul(0x9e37) >> 7) as u8).collect();
        guest.write(USER_DATA, &data);
    })
}

/// Every instruction of [`BODY`] that accesses memory, with bad pointers: one across the absent page's
/// start, one on it.
fn cases() -> impl Iterator<Item = (usize, u64)> {
    let accessing = (0..BODY.len()).filter(|&first| BODY[first].0 != NONE);
    accessing.flat_map(|first| {
        // What is pushed lies below the pointer.
        let place = if BODY[first].0 == RSP { ABSENT + 8 } else { ABSENT };
        [(first, place - 3), (first, place)]
    })
}

/// Lets page faults map the page and start again.
fn mapping(mut guest: Guest) -> Guest {
    let entry = (ABSENT | PRESENT | WRITABLE | USER) as u32;
    let handler = Code::at(HANDLERS + 16 * PAGE_FAULT)
        // mov qword [the entry], its value; add rsp, 8; iretq
        .put(&[0x48, 0xc7, 0x04, 0x25])
        .put(&ABSENT_ENTRY.to_le_bytes())
        .put(&entry.to_le_bytes())
        .put(&[0x48, 0x83, 0xc4, 0x08, 0x48, 0xcf]);
    guest.write(HANDLERS + 16 * PAGE_FAULT, &handler.bytes);
    guest
}

#[test]
fn each_instruction_of_a_hot_block_faults_exactly() {
    let mut faulted = BTreeSet::new();
    for (first, bad) in cases() {
        let what = format!("instruction {first}, {bad:#x}");
        let ended = lockstep(&what, || faulting(first, bad));
        assert_eq!(ended.exit, Exit::Halt, "{what}");
        assert!(ended.profile.units_translated > 0, "{what}");
        if ended.state.rip == HANDLERS + 16 * PAGE_FAULT + 1 {
            // Where it stood before the handler's HLT: the delivery counts no tick.
            let before = &ended.states[ended.ticks as usize - 1];
            if before.rip == BODY_START {
                faulted.insert(first);
                assert_eq!(before.gpr[RCX], u64::from(FAULT_AT), "{what}");
                assert!((ABSENT..ABSENT + 0x40).contains(&ended.state.cr2), "{what}");
            }
        }
    }
    let expected: BTreeSet<usize> = cases().map(|(first, _)| first).collect();
    assert_eq!(faulted, expected);
}

#[test]
fn a_faulting_instruction_starts_again_as_if_nothing_had_been() {
    let mut finished = 0;
    for (first, bad) in cases() {
        let what = format!("instruction {first}, {bad:#x}");
        let ended = lockstep(&what, || mapping(faulting(first, bad)));
        assert_eq!(ended.exit, Exit::Halt, "{what}");
        let done = ended.state.rip == HANDLERS + 16 * u64::from(DONE) + 1;
        assert!(!done || ended.state.gpr[RCX] == 0, "{what}");
        finished += usize::from(done);
    }
    // MOVAPS does not take a pointer that is not aligned.
    assert!(finished > BODY.len(), "only {finished} came to their end");
}
