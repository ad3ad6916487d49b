//! Writes to watched RAM, on this host's KVM: what comes back, that each is done, and that what the guest
//! comes to is what it comes to where nobody watches.

#![allow(clippy::single_range_in_vec_init)] // One range is what is meant.

use std::ops::Range;

use reprise_branch_clock::vcpu::Vcpu;
use reprise_trace::cpu_state::{CpuState, RAX, RBX, RCX, RDI, RSI, RSP};

use super::*;
use crate::testing::{CODE, STACK_TOP, long_mode, put, ram_with, require_kvm};

/// Two pages that lie side by side.
const FIRST: u64 = 0x30_0000;
const SECOND: u64 = 0x30_1000;
const END: u64 = 0x30_2000;
/// Where the tests' writes begin unless they say otherwise: 4 bytes before the second page.
const ACROSS: u64 = SECOND - 4;
const HLT: u8 = 0xf4;

/// Registers in which a write to `target` makes a difference.
fn registers(target: u64) -> CpuState {
    let mut state = long_mode();
    state.gpr = std::array::from_fn(|index| 0x1111_2222_3333_0000 + index as u64);
    state.gpr[RBX] = target;
    state.gpr[RDI] = target;
    state.gpr[RSI] = CODE;
    state.gpr[RSP] = target + 8;
    state.gpr[RCX] = 3;
    state
}

fn vcpu(code: &[u8], state: &CpuState, watched: &[Range<u64>]) -> PmuVcpu {
    let ram = ram_with(&[code, &[HLT]].concat());
    // What a compare and exchange finds.
    put(&ram, ACROSS, &state.gpr[RAX].to_le_bytes());
    let mut vcpu = PmuVcpu::without_counter(ram).expect("KVM");
    vcpu.set_state(state).expect("a state that KVM takes");
    for range in watched {
        vcpu.watch_writes(range.clone(), true).expect("KVM has read-only slots");
    }
    vcpu
}

/// Runs to HLT; gives what came back on the way.
fn run(vcpu: &mut PmuVcpu) -> Vec<Vec<Range<u64>>> {
    let mut writes = Vec::new();
    loop {
        match vcpu.enter().expect("KVM runs") {
            VcpuExit::WatchedWrite(ranges) => writes.push(ranges),
            VcpuExit::Access(_) => {
                vcpu.finish_access(0x5a).expect("it is answered");
            }
            VcpuExit::Halt => return writes,
            exit => panic!("{exit:?} at {:#x}", vcpu.state().expect("a state").rip),
        }
        assert!(writes.len() < 5_000, "the guest does not come to its end");
    }
}

/// The state at HLT, and both pages.
fn outcome(vcpu: &mut PmuVcpu) -> (CpuState, Vec<u8>) {
    let mut bytes = vec![0; (END - FIRST) as usize];
    vcpu.ram().read(FIRST, &mut bytes);
    (vcpu.state().expect("a state"), bytes)
}

/// Runs `code` with these pages watched and with none, and compares.
#[track_caller]
fn check(code: &[u8], state: &CpuState, watched: &[Range<u64>]) -> Vec<Vec<Range<u64>>> {
    let mut unwatched = vcpu(code, state, &[]);
    assert!(run(&mut unwatched).is_empty());
    let mut vcpu = vcpu(code, state, watched);
    let writes = run(&mut vcpu);
    assert_eq!(outcome(&mut vcpu), outcome(&mut unwatched), "{code:02x?}");
    writes
}

/// One instruction that writes 8 bytes, or 16, at RBX.
const STORES: [(&str, &[u8], u64); 10] = [
    ("mov [rbx], rax", &[0x48, 0x89, 0x03], 8),
    ("push rax", &[0x50], 8),
    ("lock add [rbx], rax", &[0xf0, 0x48, 0x01, 0x03], 8),
    ("lock cmpxchg [rbx], rcx, equal", &[0xf0, 0x48, 0x0f, 0xb1, 0x0b], 8),
    ("xchg [rbx], rax", &[0x48, 0x87, 0x03], 8),
    ("lock cmpxchg8b [rbx], different", &[0xf0, 0x0f, 0xc7, 0x0b], 8),
    ("movnti [rbx], rax", &[0x48, 0x0f, 0xc3, 0x03], 8),
    ("movups [rbx], xmm0", &[0x0f, 0x11, 0x03], 16),
    ("stosq", &[0x48, 0xab], 8),
    ("movsq", &[0x48, 0xa5], 8),
];

#[test]
fn a_write_across_two_pages_comes_back_for_what_is_watched_of_it() {
    require_kvm!();
    for (name, code, bytes) in STORES {
        let end = ACROSS + bytes;
        let state = registers(ACROSS);
        let first = check(code, &state, &[FIRST..FIRST + 1]);
        assert_eq!(first, [[ACROSS..SECOND]], "{name}");
        let second = check(code, &state, &[SECOND..SECOND + 1]);
        assert_eq!(second, [[SECOND..end]], "{name}");
        let both = check(code, &state, &[FIRST..END]);
        assert_eq!(both, [[ACROSS..end]], "{name}");
    }
}

#[test]
fn a_compare_and_exchange_that_fails_writes_what_was_there() {
    require_kvm!();
    let mut state = registers(ACROSS);
    let code = [0xf0, 0x48, 0x0f, 0xb1, 0x0b];
    let mut vcpu = vcpu(&code, &state, &[FIRST..END]);
    state.gpr[RAX] ^= 1;
    vcpu.set_state(&state).expect("a state that KVM takes");
    let before = outcome(&mut vcpu).1;
    assert_eq!(run(&mut vcpu), [[ACROSS..ACROSS + 8]]);
    let (after, bytes) = outcome(&mut vcpu);
    assert_eq!((after.gpr[RAX], bytes), (state.gpr[RAX] ^ 1, before));
}

/// From a page that is not watched over one that is into another that is not.
#[test]
fn a_repetition_comes_back_for_each_element_in_a_watched_page() {
    require_kvm!();
    const ELEMENTS: u64 = 520;
    for (name, code) in [("rep stosq", [0xf3, 0x48, 0xab]), ("rep movsq", [0xf3, 0x48, 0xa5])] {
        let mut state = registers(FIRST - 32);
        state.gpr[RCX] = ELEMENTS;
        let writes = check(&code, &state, &[FIRST..SECOND]);
        let expected: Vec<_> = (FIRST..SECOND).step_by(8).map(|at| vec![at..at + 8]).collect();
        assert_eq!(writes, expected, "{name}");
    }
}

#[test]
fn an_input_to_watched_ram_is_done_and_told() {
    require_kvm!();
    let mut state = registers(ACROSS);
    state.gpr[2] = 0xe9;
    // rep insb
    let mut vcpu = vcpu(&[0xf3, 0x6c], &state, &[FIRST..SECOND]);
    let told: Vec<_> = run(&mut vcpu).concat();
    assert!(told.iter().all(|range| (ACROSS..ACROSS + 3).contains(&range.start)), "{told:x?}");
    assert_eq!(told.iter().map(|range| range.end - range.start).sum::<u64>(), 3, "{told:x?}");
    let at = (ACROSS - FIRST) as usize;
    assert_eq!(outcome(&mut vcpu).1[at..at + 3], [0x5a; 3]);
}

/// What a guest writes into its watched code it executes.
#[test]
fn code_that_changes_itself_executes_what_it_wrote() {
    require_kvm!();
    // mov byte [rip+1], 0x77; mov al, 0x11
    let code = [0xc6, 0x05, 1, 0, 0, 0, 0x77, 0xb0, 0x11];
    for _ in 0..3 {
        let mut vcpu = vcpu(&code, &long_mode(), &[CODE..CODE + 1]);
        assert_eq!(run(&mut vcpu), [[CODE + 8..CODE + 9]]);
        assert_eq!(outcome(&mut vcpu).0.gpr[RAX], 0x77);
    }
}

/// A write comes back behind its instruction, and before another one executes.
#[test]
fn it_comes_back_at_the_next_instruction() {
    require_kvm!();
    // mov [rbx], rax; inc rax
    let code = [0x48, 0x89, 0x03, 0x48, 0xff, 0xc0];
    let state = registers(FIRST);
    let mut vcpu = vcpu(&code, &state, &[FIRST..FIRST + 1]);
    assert_eq!(vcpu.enter().expect("KVM runs"), VcpuExit::WatchedWrite(vec![FIRST..FIRST + 8]));
    let found = vcpu.state().expect("a state");
    assert_eq!((found.rip, found.gpr), (CODE + 3, state.gpr));
    // Watched no longer, while it runs.
    vcpu.watch_writes(FIRST..FIRST + 1, false).expect("KVM takes it");
    let again = CpuState { rip: CODE, ..state };
    vcpu.set_state(&again).expect("a state that KVM takes");
    assert!(run(&mut vcpu).is_empty());
}

#[test]
fn a_stack_that_is_not_watched_is_nobodys_business() {
    require_kvm!();
    // call +0; pop rax
    let mut state = registers(FIRST);
    state.gpr[RSP] = STACK_TOP;
    assert!(check(&[0xe8, 0, 0, 0, 0, 0x58], &state, &[FIRST..END]).is_empty());
}
