//! Instructions that the host's KVM may refuse in kernel code, executed on it with assistance: each must
//! end as on the software CPU.

use std::time::Instant;

use iced_x86::{Decoder, DecoderOptions};
use reprise_assist::Assisted;
use reprise_cpu::engine::SoftEngine;
use reprise_cpu::latitude::undefined_flags;
use reprise_kvm::{KvmClock, KvmEngine};
use reprise_machine::engine::{Access, Engine, Exit};
use reprise_trace::cpu_state::{CpuState, RAX, RBX, RCX, RDX};

use crate::bare::{self, DATA, NO_RAM, UNMAPPED};

/// Instructions, by name; RBX and RSI point at data.
const INSTRUCTIONS: &[(&str, &[u8])] = &[
    ("cmpxchg16b [rbx]", &[0x48, 0x0f, 0xc7, 0x0b]),
    ("lock cmpxchg16b [rbx]", &[0xf0, 0x48, 0x0f, 0xc7, 0x0b]),
    ("cmpxchg16b [rbx+1]", &[0x48, 0x0f, 0xc7, 0x4b, 0x01]),
    ("cmpxchg8b [rbx]", &[0x0f, 0xc7, 0x0b]),
    ("xadd [rbx], eax", &[0x0f, 0xc1, 0x03]),
    ("popcnt rax, [rbx]", &[0xf3, 0x48, 0x0f, 0xb8, 0x03]),
    ("crc32 eax, byte [rbx]", &[0xf2, 0x0f, 0x38, 0xf0, 0x03]),
    ("pshufb xmm1, [rbx]", &[0x66, 0x0f, 0x38, 0x00, 0x0b]),
    ("paddd xmm1, xmm2", &[0x66, 0x0f, 0xfe, 0xca]),
    ("mulpd xmm1, xmm2", &[0x66, 0x0f, 0x59, 0xca]),
    ("cvtsi2sd xmm3, rax", &[0xf2, 0x48, 0x0f, 0x2a, 0xd8]),
    ("movdqu xmm4, [rbx+3]", &[0xf3, 0x0f, 0x6f, 0x63, 0x03]),
    ("movntdq [rbx], xmm4", &[0x66, 0x0f, 0xe7, 0x23]),
    ("movnti [rbx], rax", &[0x48, 0x0f, 0xc3, 0x03]),
    ("ldmxcsr [rsp]", &[0x68, 0x80, 0x1f, 0, 0, 0x0f, 0xae, 0x14, 0x24]),
    ("fld qword [rbx]; fsin; fstp qword [rbx]", &[0xdd, 0x03, 0xd9, 0xfe, 0xdd, 0x1b]),
    ("xgetbv", &[0x31, 0xc9, 0x0f, 0x01, 0xd0]),
    ("xsave [rbx]", &[0x0f, 0xae, 0x23]),
    ("xrstor [rbx]", &[0x0f, 0xae, 0x2b]),
    ("bextr by VEX", &[0xc4, 0xe2, 0x70, 0xf7, 0xc0]),
    ("movbe rax, [rbx]", &[0x48, 0x0f, 0x38, 0xf0, 0x03]),
    ("enter 16, 2", &[0xc8, 0x10, 0, 2]),
    (
        "pause; lfence; mfence; clflush [rbx]",
        &[0xf3, 0x90, 0x0f, 0xae, 0xe8, 0x0f, 0xae, 0xf0, 0x0f, 0xae, 0x3b],
    ),
    ("prefetchnta [rbx]", &[0x0f, 0x18, 0x03]),
    (
        "verr ax; verw ax; lar ecx, edx; lsl ecx, edx",
        &[
            0xb8, 0x10, 0, 0, 0, 0x0f, 0x00, 0xe0, 0x0f, 0x00, 0xe8, 0xba, 0x10, 0, 0, 0, 0x0f,
            0x02, 0xca, 0x0f, 0x03, 0xca,
        ],
    ),
    ("wbinvd; invlpg [rbx]", &[0x0f, 0x09, 0x0f, 0x01, 0x3b]),
    (
        "str ax; sldt cx; smsw dx",
        &[0x66, 0x0f, 0x00, 0xc8, 0x66, 0x0f, 0x00, 0xc1, 0x66, 0x0f, 0x01, 0xe2],
    ),
    ("rep movsb", &[0xb9, 0x80, 0, 0, 0, 0xf3, 0xa4]),
    ("ud2", &[0x0f, 0x0b]),
];

pub(crate) fn kvm_is_missing() -> bool {
    let made = KvmEngine::new(bare::ram(&[]), KvmClock::Sync);
    if let Err(error) = &made {
        eprintln!("skipped: {error}");
    }
    made.is_err()
}

/// Runs to the HLT, answering reads from the board with a pattern. The state there, and what was
/// accessed.
fn run<E: Engine>(engine: &mut E) -> (CpuState, Vec<Access>) {
    let mut accesses = Vec::new();
    loop {
        match engine.run(u64::MAX).expect("it runs") {
            Exit::Halt => break,
            Exit::Access(access) => {
                accesses.push(access);
                engine.finish_access(0x1122_3344_5566_7788).expect("it takes the answer");
            }
            exit => panic!("{exit:?}"),
        }
    }
    (engine.cpu_state().expect("it has one"), accesses)
}

fn assisted(state: &CpuState, code: &[u8]) -> Assisted<KvmEngine> {
    let engine = KvmEngine::new(bare::ram(code), KvmClock::Sync).expect("it was there");
    let mut engine = Assisted::new(engine);
    engine.set_cpu_state(state).expect("KVM takes it");
    engine
}

/// Both engines end in the same state, with the same memory and the same accesses. How often KVM was
/// assisted.
#[track_caller]
fn agree(name: &str, state: &CpuState, code: &[u8]) -> u64 {
    let mut soft = SoftEngine::new(bare::ram(code)).expect("the host has memory");
    soft.set_cpu_state(state).expect("it takes any");
    let (expected, expected_accesses) = run(&mut soft);
    let mut kvm = assisted(state, code);
    let (found, accesses) = run(&mut kvm);
    let undefined = Decoder::new(64, code, DecoderOptions::NONE)
        .iter()
        .fold(0, |flags, instruction| flags | undefined_flags(&instruction));
    let defined = |state: &CpuState| CpuState {
        // When the CPU notes where x87 instructions and operands lie is not what this test is about.
        rflags: state.rflags & !undefined,
        fpu: reprise_trace::cpu_state::FpuState { fip: 0, fdp: 0, fop: 0, ..state.fpu.clone() },
        ..state.clone()
    };
    assert_eq!(defined(&found), defined(&expected), "{name}");
    assert_eq!(accesses, expected_accesses, "{name}");
    let data = |engine: &dyn Engine| {
        let mut bytes = [0; 0x300];
        engine.read_ram(DATA, &mut bytes);
        bytes
    };
    assert_eq!(data(&kvm), data(&soft), "{name}");
    kvm.assists().values().sum()
}

#[test]
fn what_this_host_refuses_ends_as_on_the_software_cpu() {
    if kvm_is_missing() {
        return;
    }
    let refused: Vec<_> = INSTRUCTIONS
        .iter()
        .filter(|(name, code)| agree(name, &bare::state(), code) > 0)
        .map(|(name, _)| *name)
        .collect();
    eprintln!("refused by this host's KVM: {refused:?}");
}

#[test]
fn a_compare_that_succeeds_writes_and_one_that_fails_reads() {
    if kvm_is_missing() {
        return;
    }
    let code = INSTRUCTIONS[0].1;
    let mut state = bare::state();
    let mut bytes = [0; 16];
    bare::ram(&[]).read(DATA, &mut bytes);
    agree("cmpxchg16b that fails", &state, code);
    state.gpr[RAX] = u64::from_le_bytes(bytes[..8].try_into().expect("eight"));
    state.gpr[RDX] = u64::from_le_bytes(bytes[8..].try_into().expect("eight"));
    agree("cmpxchg16b that succeeds", &state, code);
}

#[test]
fn faults_of_a_refused_instruction_are_delivered() {
    if kvm_is_missing() {
        return;
    }
    for (name, at) in
        [("not aligned", DATA + 8), ("not mapped", UNMAPPED), ("not canonical", 1 << 62)]
    {
        let mut state = bare::state();
        state.gpr[RBX] = at;
        agree(name, &state, INSTRUCTIONS[0].1);
    }
}

#[test]
fn a_refused_instruction_reaches_the_same_board() {
    if kvm_is_missing() {
        return;
    }
    let mut state = bare::state();
    state.gpr[RBX] = NO_RAM;
    for (name, code) in &INSTRUCTIONS[..2] {
        let mut soft = SoftEngine::new(bare::ram(code)).expect("the host has memory");
        soft.set_cpu_state(&state).expect("it takes any");
        let (expected, accesses) = run(&mut soft);
        assert!(!accesses.is_empty(), "{name}");
        let mut kvm = assisted(&state, code);
        let (found, found_accesses) = run(&mut kvm);
        // KVM may read before it finds that it does not know the instruction.
        assert!(found_accesses.ends_with(&accesses), "{name}: {found_accesses:x?}");
        assert_eq!(found.gpr, expected.gpr, "{name}");
        // Under this clock each access is a tick, and so is the HLT.
        assert_eq!(kvm.tick(), found_accesses.len() as u64 + 1, "{name}");
    }
}

/// Nothing enters between the accesses of one that the software CPU executes.
#[test]
fn a_refused_instruction_is_amid_its_accesses_until_the_last() {
    if kvm_is_missing() {
        return;
    }
    let mut state = bare::state();
    state.gpr[RBX] = NO_RAM;
    let code = INSTRUCTIONS[0].1;
    let (_, accesses) = run(&mut assisted(&state, code));
    assert!(accesses.len() > 1, "{accesses:x?}");
    let mut kvm = assisted(&state, code);
    for left in (0..accesses.len()).rev() {
        let exit = kvm.run(u64::MAX).expect("it runs");
        assert!(matches!(exit, Exit::Access(_)), "{exit:?}");
        kvm.finish_access(0x1122_3344_5566_7788).expect("it takes the answer");
        assert_eq!(kvm.amid_accesses().expect("it can be asked"), left != 0, "{left} left");
    }
    assert_eq!(kvm.run(u64::MAX).expect("it runs"), Exit::Halt);
}

#[test]
fn a_loop_of_refused_instructions() {
    const ROUNDS: u64 = 2_000;
    if kvm_is_missing() {
        return;
    }
    // again: cmpxchg16b [rbx]; loop again
    let code = [0x48, 0x0f, 0xc7, 0x0b, 0xe2, 0xfa];
    let mut state = bare::state();
    state.gpr[RCX] = ROUNDS;
    let started = Instant::now();
    let mut kvm = assisted(&state, &code);
    let (found, _) = run(&mut kvm);
    let assists = kvm.assists().get("cmpxchg16b").copied().unwrap_or(0);
    let each_us = started.elapsed().as_secs_f64() * 1e6 / ROUNDS as f64;
    eprintln!("{assists} assists in {ROUNDS} rounds, {each_us:.1} us each");
    assert_eq!(found.gpr[RCX], 0);
    assert!(assists == 0 || assists == ROUNDS, "{assists}");
}
