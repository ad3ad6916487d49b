//! Random code in every mode, on random system state: whatever it is, it ends in a state, not in a
//! panic, and in the same state whether it runs at one go, tick by tick or translated.

mod guest;
mod traced;

use std::sync::atomic::{AtomicU64, Ordering};

use guest::{
    ABSENT, GDT, Guest, HANDLERS, IDT, KERNEL_CODE, KERNEL_DATA, KERNEL_STACK, LDT, SPARE, TSS,
    USER_CODE, USER_DATA, USER_STACK, segment, system_descriptor,
};
use reprise_cpu::engine::SoftEngine;
use reprise_cpu::translate::Translation;
use reprise_machine::engine::{Access, Engine, Exit};
use reprise_machine::ram::GuestRam;
use reprise_random::Random;
use reprise_trace::cpu_state::{CpuState, DS, ES, FS, GS, RCX, RSP, SS, Segment};

const CASES: u64 = 100;
const FIRST_SEED: u64 = 0x5eed_0000;
/// Seeds of cases that once ended differently.
const ONCE_DIFFERENT: &[u64] = &[0x1234_02cb, 0x7777_3fd7];
const TICKS: u64 = 200;

/// The case that runs, for the panic hook: a panic under generated code ends the process.
static SEED: AtomicU64 = AtomicU64::new(0);

/// Values worth having in a register: addresses of everything, and of the edges between.
const PLACES: &[u64] = &[
    0,
    1,
    7,
    0x10,
    0x68,
    0x1000,
    0x4000,
    GDT,
    GDT + 0x50,
    IDT,
    TSS,
    TSS + 0x66,
    LDT,
    HANDLERS,
    KERNEL_CODE,
    KERNEL_DATA,
    KERNEL_DATA + 0xffd,
    KERNEL_STACK,
    USER_CODE,
    USER_DATA,
    USER_STACK,
    ABSENT,
    ABSENT - 3,
    ABSENT - 16,
    0x9_fffc,
    0x9_fff0,
    0xa_0000,
    0xb_fffc,
    0xc_0000,
    0xffff,
    0x40_0000,
    0xffff_fff8,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_fff8,
    0x8000_0000_0000,
    0xffff_8000_0000_0000,
    u64::MAX,
    u64::MAX - 7,
    0xc000_0080,
    0xc000_0082,
    0x174,
    0x175,
    0x277,
    0x8000_0001,
    0x8001_0033,
    0x33,
    0x620,
    0x6a0,
    0xd01,
    0x3f8,
    0x50,
    0x53,
    0x58,
    0x0c,
];

/// Opcodes of the instructions that Rust handles, and of some that run natively.
#[rustfmt::skip]
const OPCODES: &[&[u8]] = &[
    &[0x0f, 0x00], &[0x0f, 0x01], &[0x0f, 0x02], &[0x0f, 0x03], &[0x0f, 0x05], &[0x0f, 0x06],
    &[0x0f, 0x07], &[0x0f, 0x08], &[0x0f, 0x09], &[0x0f, 0x0b], &[0x0f, 0x20], &[0x0f, 0x21],
    &[0x0f, 0x22], &[0x0f, 0x23], &[0x0f, 0x30], &[0x0f, 0x31], &[0x0f, 0x32], &[0x0f, 0x33],
    &[0x0f, 0x34], &[0x0f, 0x35], &[0x0f, 0xa0], &[0x0f, 0xa1], &[0x0f, 0xa2], &[0x0f, 0xa8],
    &[0x0f, 0xa9], &[0x0f, 0xae], &[0x0f, 0xb2], &[0x0f, 0xb4], &[0x0f, 0xb5], &[0x0f, 0xc7],
    &[0x0f, 0xa3], &[0x0f, 0xab], &[0x0f, 0xb1], &[0x0f, 0xe7], &[0x0f, 0xf7], &[0x0f, 0x28],
    &[0x06], &[0x07], &[0x0e], &[0x16], &[0x17], &[0x1e], &[0x1f], &[0x27], &[0x50], &[0x58],
    &[0x5c], &[0x60], &[0x61], &[0x62], &[0x63], &[0x68], &[0x6c], &[0x6d], &[0x6e], &[0x6f],
    &[0x74, 0x02], &[0x87], &[0x8b], &[0x89], &[0x8c], &[0x8e], &[0x8f], &[0x01], &[0x9a], &[0x9c],
    &[0x9d], &[0xa4], &[0xa5], &[0xa6], &[0xa7], &[0xaa], &[0xab], &[0xac], &[0xad], &[0xae],
    &[0xaf], &[0xc2], &[0xc3], &[0xc4], &[0xc5], &[0xc8], &[0xc9], &[0xca], &[0xcb], &[0xcc],
    &[0xcd], &[0xce], &[0xcf], &[0xd7], &[0xd9], &[0xdb], &[0xdd], &[0xdf], &[0xe2, 0xf0],
    &[0xe3, 0x02], &[0xe4], &[0xe6], &[0xe8, 0, 0, 0, 0], &[0xea], &[0xec], &[0xed], &[0xee],
    &[0xef], &[0xf1], &[0xf4], &[0xf6], &[0xf7], &[0xfa], &[0xfb], &[0xfc], &[0xfd], &[0xfe],
    &[0xff],
];
const PREFIXES: &[u8] =
    &[0x66, 0x67, 0xf2, 0xf3, 0xf0, 0x2e, 0x36, 0x3e, 0x26, 0x64, 0x65, 0x48, 0x41, 0x4c];

fn code(random: &mut Random) -> Vec<u8> {
    let mut code = Vec::new();
    for _ in 0..24 {
        while random.one_in(3) {
            code.push(random.pick(PREFIXES));
        }
        if random.one_in(6) {
            code.push(random.next() as u8);
        } else {
            code.extend(random.pick(OPCODES));
        }
        for _ in 0..random.below(4) {
            code.push(if random.one_in(2) { random.next() as u8 } else { 0x03 });
        }
    }
    code
}

fn guest(random: &mut Random) -> Guest {
    let real = |guest: &mut Guest| guest.state.cr0 &= !1;
    let guest = match random.below(7) {
        0 | 1 => Guest::long(),
        2 => Guest::long().user(),
        3 => Guest::long().compatibility(),
        4 => Guest::protected(),
        5 => Guest::protected().user(),
        _ => Guest::protected().with(real),
    };
    let code = code(random);
    guest.code(&code).with(|guest| {
        change_tables(random, guest);
        change_state(random, &mut guest.state);
    })
}

/// Descriptors of every kind, gates with other rights, and code in the handlers.
fn change_tables(random: &mut Random, guest: &mut Guest) {
    for index in 0..8 {
        let rights = random.below(0x100) | random.below(16) << 12;
        let raw = system_descriptor(random.pick(PLACES), random.pick(PLACES), rights & 0xff);
        guest.descriptor(SPARE + 8 * index, raw | rights >> 12 << 52);
        guest.descriptor(4 + 8 * index, raw ^ 1 << 44);
    }
    for _ in 0..8 {
        let (vector, rights) = (random.below(32) as u8, random.next() as u8 | 0x80);
        guest.gate(vector, rights, random.below(8) as u8);
    }
    for vector in 0..32 {
        let handler = if random.one_in(2) { code(random) } else { vec![0x48, 0xcf] };
        guest.write(HANDLERS + 16 * vector, &handler[..handler.len().min(16)]);
    }
    for _ in 0..4 {
        let flags = random.below(0x200) | random.below(2) << 63;
        guest.page(random.pick(&[KERNEL_DATA, USER_DATA, KERNEL_STACK - 8, USER_STACK - 8]), flags);
    }
}

fn change_state(random: &mut Random, state: &mut CpuState) {
    for register in 0..16 {
        if register != RSP || random.one_in(3) {
            state.gpr[register] = random.pick(PLACES).wrapping_add(random.below(3));
        }
    }
    state.gpr[RCX] = random.pick(&[0, 1, 5, 40, 0xc000_0080, 0x10]);
    if random.one_in(2) {
        let flags = [1u64 << 8, 1 << 9, 1 << 10, 3 << 12, 1 << 14, 1 << 16, 1 << 18];
        state.rflags |= random.pick(&flags) | random.pick(&flags);
    }
    if random.one_in(2) {
        state.cr4 |= random.pick(&[1 << 20, 1 << 21, 3 << 20, 1 << 3, 1 << 2, 1 << 7]);
        state.cr0 |= random.pick(&[1 << 18, 1 << 16, 1 << 3, 1 << 2, 0]);
    }
    if random.one_in(3) {
        let index = random.pick(&[ES, SS, DS, FS, GS]);
        let kinds = [0x0040_9304_8000_0fff, 0x0040_9704_8000_0fff, 0x0000_9304_8000_ffff];
        let level = u64::from(state.cpl()) << 45;
        state.segments[index] = match random.below(4) {
            3 if index != SS => Segment::default(),
            kind => segment(0x13, kinds[kind as usize % 3] | level),
        };
    }
    if random.one_in(4) {
        state.dr = std::array::from_fn(|_| random.pick(PLACES));
        state.dr7 = 0x400 | random.below(0x100) | random.below(0x1_0000) << 16;
    }
}

/// What a run came to.
#[derive(Debug, PartialEq)]
struct Outcome {
    exit: Exit,
    tick: u64,
    accesses: Vec<Access>,
    state: CpuState,
    ram: u64,
}

/// Runs `engine` to `ticks`, at most `stride` at once. A halted guest is woken, if it may be.
fn outcome(engine: &mut SoftEngine, stride: u64) -> Outcome {
    outcome_moved(engine, stride, None)
}

/// The same, but at this tick another engine goes on from the saved state, if there is one.
fn outcome_moved(engine: &mut SoftEngine, stride: u64, move_at: Option<u64>) -> Outcome {
    let mut accesses = Vec::new();
    let exit = loop {
        let (tick, until) = (engine.tick(), engine.tick().saturating_add(stride).min(TICKS));
        let until = move_at.filter(|at| *at > tick).map_or(until, |at| at.min(until));
        match engine.run(until).expect("runs") {
            Exit::TickReached if Some(engine.tick()) == move_at && until < TICKS => {
                moved(engine);
            }
            Exit::TickReached if engine.tick() < TICKS => {}
            Exit::Access(access) if accesses.len() < 2000 => {
                accesses.push(access);
                engine.finish_access(0x5a5a_0303_9090).expect("finishes");
            }
            Exit::Halt if engine.interruptible().expect("tells") && engine.tick() < TICKS => {
                engine.inject(0x20).expect("injects");
            }
            exit => break exit,
        }
    };
    let state = engine.cpu_state().expect("state");
    let mut ram = 0u64;
    engine.visit_ram(&mut |_, bytes| {
        for word in bytes.chunks_exact(8) {
            let word = u64::from_le_bytes(word.try_into().expect("eight bytes"));
            ram = (ram ^ word).wrapping_mul(0x100_0000_01b3).rotate_left(7);
        }
    });
    Outcome { exit, tick: engine.tick(), accesses, state, ram }
}

/// Puts another engine in its place, in the same state, with RAM of its own.
fn moved(engine: &mut SoftEngine) {
    let Some(state) = engine.save().expect("saves") else { return };
    let mut ram = GuestRam::new(4).expect("RAM");
    engine.visit_ram(&mut |address, bytes| assert!(ram.place(address, bytes)));
    *engine = SoftEngine::new(ram).expect("an engine");
    engine.set_translation(Translation::AtOnce);
    engine.restore(&state).expect("takes the state");
}

/// How many cases run: more of them with `REPRISE_SYSTEM_CASES`.
fn cases() -> u64 {
    let asked = std::env::var("REPRISE_SYSTEM_CASES").ok();
    asked.map_or(CASES, |count| count.parse().expect("REPRISE_SYSTEM_CASES is a number"))
}

#[test]
fn random_code_ends_alike_at_every_stride() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |information| {
        eprintln!("seed {:#x}", SEED.load(Ordering::Relaxed));
        hook(information);
    }));
    for seed in ONCE_DIFFERENT.iter().copied().chain(FIRST_SEED..FIRST_SEED + cases()) {
        SEED.store(seed, Ordering::Relaxed);
        let run = |translation, stride| {
            let mut engine = guest(&mut Random::new(seed)).engine();
            engine.set_translation(translation);
            outcome(&mut engine, stride)
        };
        let whole = run(Translation::Never, u64::MAX);
        let stepped = run(Translation::Never, 1);
        for (translation, stride) in [
            (Translation::AtOnce, u64::MAX),
            (Translation::AtOnce, 7),
            (Translation::AtOnceWithoutLoop, u64::MAX),
        ] {
            let translated = run(translation, stride);
            assert_eq!(whole, translated, "seed {seed:#x}, {translation:?}, stride {stride}");
        }
        assert_eq!(whole, stepped, "seed {seed:#x}");
        assert_traced_alike(seed, &whole);
        let move_at = 1 + Random::new(!seed).below(TICKS - 1);
        let mut engine = guest(&mut Random::new(seed)).engine();
        let moved = outcome_moved(&mut engine, u64::MAX, Some(move_at));
        assert_eq!(whole, moved, "seed {seed:#x}, moved at {move_at}");
    }
}

/// A trace changes nothing, and is the same however the code runs.
fn assert_traced_alike(seed: u64, whole: &Outcome) {
    let trace = |translation| {
        let mut engine = guest(&mut Random::new(seed)).engine();
        engine.set_translation(translation);
        let pending = traced::start(&mut engine);
        let outcome = outcome(&mut engine, u64::MAX);
        assert_eq!(*whole, outcome, "seed {seed:#x}, {translation:?}, traced");
        let trace = pending.finish(&mut engine);
        assert_eq!(trace.retired, outcome.tick, "seed {seed:#x}, {translation:?}");
        trace
    };
    let plain = trace(Translation::Never);
    for translation in [Translation::AtOnce, Translation::AtOnceWithoutLoop] {
        let translated = trace(translation);
        let differs = plain.items.iter().zip(&translated.items).position(|(a, b)| a != b);
        let at = differs.map(|at| (at, &plain.items[at], &translated.items[at]));
        assert!(plain == translated, "seed {seed:#x}, {translation:?}: {at:x?}");
    }
}
