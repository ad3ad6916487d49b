//! What the CPU knows of results that the architecture leaves open: which flags are undefined where it
//! stands, and where the code has instructions whose results are left to makers.

mod guest;

use guest::{ABSENT, Guest, KERNEL_CODE};
use iced_x86::{Decoder, DecoderOptions};
use reprise_cpu::engine::SoftEngine;
use reprise_cpu::latitude;
use reprise_cpu::tracing::BatchSink;
use reprise_cpu::translate::Translation;
use reprise_machine::engine::{Engine, Exit};
use reprise_trace::cpu_state::{CpuState, RBX, RCX, RSI};
use reprise_trace::instructions::{Batch, Contents};

/// Every kind of writer of flags, some thousand times.
const LOOP: &[u8] = &[
    0x89, 0xf0, // again: mov eax, esi
    0xf7, 0xe3, // mul ebx
    0xff, 0xc1, // inc ecx
    0x89, 0x04, 0x24, // mov [rsp], eax
    0xc1, 0xe2, 0x03, // shl edx, 3
    0x0f, 0xa3, 0xd0, // bt eax, edx
    0xd3, 0xc0, // rol eax, cl
    0x9c, 0x9d, // pushfq; popfq
    0x85, 0xc8, // test eax, ecx
    0x74, 0x00, // jz to the next
    0x44, 0x0f, 0xbc, 0xc0, // bsf r8d, eax
    0x48, 0x8d, 0x14, 0x00, // lea rdx, [rax + rax]
    0xff, 0xce, // dec esi
    0x75, 0xdd, // jnz again
    0xf4, // hlt
];
const ROUNDS: u64 = 3000;
const INSTRUCTIONS: u64 = 15;

fn engine(code: &[u8], translation: Translation) -> SoftEngine {
    let mut engine = Guest::long()
        .code(code)
        .with(|guest| {
            guest.state.gpr[RSI] = ROUNDS;
            guest.state.gpr[RBX] = 0x9e37_79b9;
            guest.state.gpr[RCX] = 5;
        })
        .engine();
    engine.set_translation(translation);
    engine.know_undefined_flags();
    engine
}

/// The flags that are undefined behind each of the first instructions, found one after the other.
fn stepped(count: u64) -> Vec<u64> {
    let mut engine = engine(LOOP, Translation::Never);
    let mut undefined = 0;
    let flags = (1..=count).map(|tick| {
        let offset = (engine.code_address() - KERNEL_CODE) as usize;
        let instruction = Decoder::new(64, &LOOP[offset..], DecoderOptions::NONE).decode();
        let cl = engine.cpu_state().expect("a state").gpr[RCX] as u8;
        assert_eq!(engine.run(tick).expect("it runs"), Exit::TickReached);
        undefined &= !latitude::defined_flags_for(&instruction, cl);
        undefined |= latitude::undefined_flags_for(&instruction, cl);
        assert_eq!(engine.undefined_flags(), undefined, "behind {instruction}");
        undefined
    });
    flags.collect()
}

#[test]
fn undefined_flags_are_known_wherever_the_guest_stops() {
    const STRIDES: [u64; 4] = [1, 7, 61, 6007];
    let flags = stepped(ROUNDS * INSTRUCTIONS / 2);
    assert!(flags.contains(&0) && flags.iter().any(|it| it.count_ones() == 5));
    for translation in [Translation::Never, Translation::default()] {
        for stride in STRIDES {
            let mut engine = engine(LOOP, translation);
            for tick in (stride..flags.len() as u64).step_by(stride as usize) {
                assert_eq!(engine.run(tick).expect("it runs"), Exit::TickReached);
                let expected = flags[tick as usize - 1];
                assert_eq!(engine.undefined_flags(), expected, "{translation:?}, tick {tick}");
            }
        }
    }
}

/// CF, PF, AF, ZF, SF and OF.
const ALL_FLAGS: u64 = 0x8d5;

#[test]
fn another_maker_differs_in_undefined_flags_translated_or_not() {
    let states = |translation, inverted| -> Vec<_> {
        let mut engine = engine(LOOP, translation);
        engine.invert_undefined_flags(inverted);
        let state = |tick| {
            assert_eq!(engine.run(tick).expect("it runs"), Exit::TickReached);
            (engine.cpu_state().expect("a state"), engine.undefined_flags())
        };
        (1..ROUNDS * 4).step_by(7).map(state).collect()
    };
    let own = states(Translation::Never, 0);
    let other = states(Translation::Never, u64::MAX);
    assert_eq!(other, states(Translation::default(), u64::MAX));
    let mut differing = 0;
    for ((own, undefined), (other, _)) in own.into_iter().zip(other) {
        differing |= own.rflags ^ other.rflags;
        // Behind POPF all flags are defined, also those that were not when they were saved.
        let lawful = if undefined == 0 { ALL_FLAGS } else { undefined };
        let rflags = own.rflags & !lawful | other.rflags & lawful;
        assert_eq!(CpuState { rflags, ..own }, other, "{undefined:#x}");
    }
    assert_eq!(differing, ALL_FLAGS);
}

#[test]
fn an_instruction_that_faults_defines_no_flags() {
    const SF_ZF_AF_PF: u64 = 0xd4;
    // mul ebx; add [ABSENT], eax; whose handler halts
    let mut code = vec![0xf7, 0xe3, 0x01, 0x04, 0x25];
    code.extend((ABSENT as u32).to_le_bytes());
    let mut engine = engine(&code, Translation::Never);
    assert_eq!(engine.run(u64::MAX).expect("it runs"), Exit::Halt);
    assert_eq!(engine.undefined_flags(), SF_ZF_AF_PF);
    let mut state = engine.cpu_state().expect("a state");
    let flags = state.rflags ^ SF_ZF_AF_PF;
    engine.set_undefined_flags(flags).expect("they are set");
    state.rflags = flags;
    assert_eq!(engine.cpu_state().expect("a state"), state, "nothing else is");
}

#[test]
fn sites_are_where_the_code_has_them() {
    let code = [
        0x0f, 0x52, 0xc1, // again: rsqrtps xmm0, xmm1
        0x44, 0x0f, 0xbc, 0xc0, // bsf r8d, eax
        0xf3, 0x0f, 0x53, 0xc1, // rcpss xmm0, xmm1
        0x0f, 0x52, 0xd3, // rsqrtps xmm2, xmm3
        0xff, 0xce, // dec esi
        0x75, 0xee, // jnz again
        0xf4, // hlt
        0xd9, 0xfe, // fsin, which never runs
    ];
    let mut engine = engine(&code, Translation::default());
    assert_eq!(engine.run(u64::MAX).expect("it runs"), Exit::Halt);
    let found: Vec<_> = engine
        .latitude_sites()
        .into_iter()
        .map(|it| {
            let addresses = it.addresses.into_iter().map(|at| at - KERNEL_CODE);
            (it.mnemonic, it.latitude.name(), addresses.collect::<Vec<_>>(), it.first.1)
        })
        .collect();
    let row = |name: &str, what, addresses: &[u64]| (name.to_owned(), what, addresses.to_vec(), 0);
    let expected = [
        row("rcpss", "approximation", &[7]),
        row("rsqrtps", "approximation", &[0, 11]),
        row("bsf", "undefined destination", &[3]),
    ];
    assert_eq!(found, expected);
}

#[test]
fn a_count_in_cl_says_which_flags_are_undefined() {
    const AF: u64 = 0x10;
    const OF: u64 = 0x800;
    // add eax, ebx; shl eax, cl
    const CODE: &[u8] = &[0x01, 0xd8, 0xd3, 0xe0, 0xf4];
    for (count, undefined) in [(0, 0), (1, AF), (5, OF | AF), (32, 0), (33, AF)] {
        let mut engine = engine(CODE, Translation::Never);
        let mut state = engine.cpu_state().expect("a state");
        state.gpr[RCX] = count;
        engine.set_cpu_state(&state).expect("a state");
        assert_eq!(engine.run(2).expect("it runs"), Exit::TickReached);
        assert_eq!(engine.undefined_flags(), undefined, "by {count}");
    }
}

/// Takes a trace and forgets it.
struct Forgotten;

impl BatchSink for Forgotten {
    fn exchange(&mut self, mut batch: Batch, _tick: u64) -> Option<Batch> {
        batch.clear();
        Some(batch)
    }
}

#[test]
fn undefined_flags_stay_so_where_a_trace_begins_and_ends() {
    const SF_ZF_AF_PF: u64 = 0xd4;
    // mul ebx; mov eax, ebx; mov eax, ebx
    let mut engine = engine(&[0xf7, 0xe3, 0x89, 0xd8, 0x89, 0xd8, 0xf4], Translation::Never);
    assert_eq!(engine.run(1).expect("it runs"), Exit::TickReached);
    assert_eq!(engine.undefined_flags(), SF_ZF_AF_PF);
    engine.start_trace(Box::new(Forgotten), Contents::default());
    assert_eq!(engine.undefined_flags(), SF_ZF_AF_PF, "where a trace begins");
    assert_eq!(engine.run(2).expect("it runs"), Exit::TickReached);
    assert_eq!(engine.undefined_flags(), SF_ZF_AF_PF);
    engine.stop_trace();
    assert_eq!(engine.undefined_flags(), SF_ZF_AF_PF, "where it ended");
    assert_eq!(engine.run(3).expect("it runs"), Exit::TickReached);
    assert_eq!(engine.undefined_flags(), SF_ZF_AF_PF);
}
