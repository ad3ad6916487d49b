//! System instructions in hot code: flags, SMAP's override, GS, control words, the clock and strings,
//! in random company, with faults and interrupts in between. Translated, they do at every instruction
//! what they do alone, and an interrupt comes at the same one.

mod guest;
mod lockstep;

use guest::{AC, CR4_SMAP, Guest, HANDLERS, IF, KERNEL_DATA, TF, USER_CODE, USER_DATA, USER_STACK};
use lockstep::{Code, lockstep};
use reprise_cpu::engine::SoftEngine;
use reprise_cpu::profile::Profile;
use reprise_cpu::translate::Translation;
use reprise_machine::engine::{Engine, Exit};
use reprise_random::Random;
use reprise_trace::cpu_state::{CpuState, RAX, RBP, RBX, RDI, RSI, RSP};

const R15: usize = 15;
const PAGE_FAULT: u64 = 14;
const DEBUG: u64 = 1;
/// The vector of external interrupts, and where its handler counts them.
const INTERRUPT: u8 = 0x40;
const COUNTER: u32 = KERNEL_DATA as u32 + 0x800;
/// Where strings go, and an absent page behind it.
const AREA: u64 = 0x10_0000;
const HOLE: u64 = AREA + 0x3000;
const HOLE_ENTRY: u32 = 0x4000 + (HOLE as u32 >> 12) * 8;
/// Rounds of a program's loop.
const ROUNDS: u64 = 40;
const DF: u64 = 1 << 10;
const IOPL: u64 = 3 << 12;
const ID: u64 = 1 << 21;
const ARITHMETIC: u64 = 0x8d5;
const POPFQ: u8 = 0x9d;
/// JNC to what follows: it ends a block.
const JNC: &[u8] = &[0x73, 0];
const HLT: u8 = 0xf4;

/// What programs are made of. RBX points at kernel data, RBP at user data, RSI and RDI anywhere in
/// either; the rest is free, and R15 counts rounds.
#[rustfmt::skip]
const PIECES: &[&[u8]] = &[
    &[0xfa],                                     // cli
    &[0xfb],                                     // sti
    &[0xfb, 0x90],                               // sti; nop
    &[0xfb, 0x48, 0x8b, 0x03],                   // sti; mov rax, [rbx]
    &[0x9c, 0x58],                               // pushfq; pop rax
    &[0x9c, 0xfa, 0x9d],                         // pushfq; cli; popfq
    &[0x9c, 0x9d],                               // pushfq; popfq
    &[0x0f, 0x01, 0xcb],                         // stac
    &[0x0f, 0x01, 0xca],                         // clac
    &[0x0f, 0x01, 0xcb, 0x48, 0x8b, 0x45, 0x00, 0x0f, 0x01, 0xca], // stac; mov rax, [rbp]; clac
    &[0x0f, 0x01, 0xf8],                         // swapgs
    &[0x65, 0x48, 0x8b, 0x04, 0x25, 8, 0, 0, 0], // mov rax, gs:[8]
    &[0x0f, 0x31],                               // rdtsc
    &[0xd9, 0x3b],                               // fnstcw [rbx]
    &[0xd9, 0x7d, 0x00],                         // fnstcw [rbp]
    &[0x0f, 0xae, 0x5b, 0x08],                   // stmxcsr [rbx+8]
    &[0x8c, 0xd8],                               // mov eax, ds
    &[0x41, 0x8c, 0xd5],                         // mov r13d, ss
    &[0x66, 0x8c, 0xe0],                         // mov ax, fs
    &[0x8c, 0x4b, 0x10],                         // mov [rbx+16], cs
    &[0xfc],                                     // cld
    &[0xfc],                                     // cld
    &[0xfd, 0xfc],                               // std; cld
    &[0x48, 0x8b, 0x45, 0x08],                   // mov rax, [rbp+8]
    &[0x48, 0x89, 0x45, 0x10],                   // mov [rbp+16], rax
    &[0x48, 0x01, 0xd8],                         // add rax, rbx
    &[0x4d, 0x19, 0xed],                         // sbb r13, r13
    &[0x85, 0xc0],                               // test eax, eax
    JNC,
];

/// Strings, divisions and bits: R8 has the pointers' start, R9 and R10 lie across pages.
#[rustfmt::skip]
const DATA_PIECES: &[&[u8]] = &[
    &[0xa4],                                     // movsb
    &[0x66, 0xa5],                               // movsw
    &[0xa5],                                     // movsd
    &[0x48, 0xa5],                               // movsq
    &[0xaa],                                     // stosb
    &[0x66, 0xab],                               // stosw
    &[0x48, 0xab],                               // stosq
    &[0xac],                                     // lodsb
    &[0x66, 0xad],                               // lodsw
    &[0xad],                                     // lodsd
    &[0x48, 0xad],                               // lodsq
    &[0x65, 0xa4],                               // movsb from gs
    &[0xb9, 0, 0, 0, 0, 0xf3, 0xa4],             // mov ecx, 0; rep movsb
    &[0xb9, 40, 0, 0, 0, 0xf3, 0xa4],            // mov ecx, 40; rep movsb
    &[0xb9, 30, 0, 0, 0, 0xf3, 0x48, 0xa5],      // mov ecx, 30; rep movsq
    &[0xb9, 100, 0, 0, 0, 0xf3, 0xaa],           // mov ecx, 100; rep stosb
    &[0xb9, 7, 0, 0, 0, 0xf3, 0xaa],             // mov ecx, 7; rep stosb
    &[0xb9, 8, 0, 0, 0, 0xf3, 0xaa],             // mov ecx, 8; rep stosb
    &[0x0f, 0xb6, 0xc8, 0xf3, 0xaa],             // movzx ecx, al; rep stosb
    &[0xb9, 0, 0, 0, 0, 0xf3, 0xaa],             // mov ecx, 0; rep stosb
    &[0xb9, 9, 0, 0, 0, 0xf3, 0xab],             // mov ecx, 9; rep stosd
    &[0xb9, 70, 0, 0, 0, 0xf3, 0x48, 0xab],      // mov ecx, 70; rep stosq
    &[0xb9, 5, 0, 0, 0, 0xf2, 0x48, 0xab],       // mov ecx, 5; repne stosq
    &[0xb9, 5, 0, 0, 0, 0xf3, 0xac],             // mov ecx, 5; rep lodsb
    &[0xb9, 0, 16, 0, 0, 0xf3, 0xaa],            // mov ecx, 4096; rep stosb
    &[0x48, 0x8d, 0x7e, 1, 0xb9, 33, 0, 0, 0, 0xf3, 0xa4], // lea rdi, [rsi+1]; mov ecx, 33; rep movsb
    &[0x48, 0x8d, 0x7e, 0xfd, 0xb9, 33, 0, 0, 0, 0xf3, 0xa5], // lea rdi, [rsi-3]; mov ecx, 33; rep movsd
    &[0x67, 0xa4],                               // movsb by esi and edi
    &[0x4c, 0x89, 0xc6],                         // mov rsi, r8
    &[0x4c, 0x89, 0xc7],                         // mov rdi, r8
    &[0x4c, 0x89, 0xcf],                         // mov rdi, r9
    &[0x4c, 0x89, 0xd6],                         // mov rsi, r10
    &[0xfd],                                     // std
    &[0xfc],                                     // cld
    &[0xfc],                                     // cld
    &[0x31, 0xd2, 0xf7, 0xf3],                   // xor edx, edx; div ebx
    &[0x31, 0xd2, 0x48, 0xf7, 0xf3],             // xor edx, edx; div rbx
    &[0xba, 1, 0, 0, 0, 0x49, 0xf7, 0xf0],       // mov edx, 1; div r8
    &[0x31, 0xd2, 0x49, 0xf7, 0x30],             // xor edx, edx; div qword [r8]
    &[0x31, 0xd2, 0x41, 0xf7, 0x70, 0x04],       // xor edx, edx; div dword [r8+4]
    &[0x83, 0xe0, 0x7f, 0x48, 0x0f, 0xa3, 0x03],                   // and eax, 127; bt [rbx], rax
    &[0x83, 0xe0, 0x7f, 0x48, 0x0f, 0xab, 0x03],                   // and eax, 127; bts [rbx], rax
    &[0x83, 0xe0, 0x7f, 0x0f, 0xb3, 0x03],                         // and eax, 127; btr [rbx], eax
    &[0x48, 0xc7, 0xc0, 0xf0, 0xff, 0xff, 0xff, 0x0f, 0xbb, 0x43, 0x40], // mov rax, -16; btc [rbx+64], eax
    &[0x4d, 0x0f, 0xbb, 0x6b, 0x08],             // btc [r11+8], r13
    &[0x41, 0xff, 0x30, 0x58],                   // push qword [r8]; pop rax
    &[0xff, 0x74, 0x24, 0xf8, 0x41, 0x5d],       // push qword [rsp-8]; pop r13
    &[0x9c, 0x58],                               // pushfq; pop rax
    JNC,
];

/// PUSH of flags; POPFQ.
fn set_flags(random: &mut Random) -> Vec<u8> {
    let mut flags = random.next() & ARITHMETIC;
    for (flag, chances) in [(IF, 2), (AC, 6), (ID, 8), (DF, 10), (IOPL, 12), (TF, 30)] {
        flags |= if random.below(chances) == 0 { flag } else { 0 };
    }
    let mut bytes = vec![0x68];
    bytes.extend((flags as u32).to_le_bytes());
    bytes.push(POPFQ);
    bytes
}

/// A loop over random pieces.
fn program(random: &mut Random, first: &[u8], pieces: &[&[u8]]) -> Code {
    let start = Code::at(guest::KERNEL_CODE);
    let top = start.here();
    let mut code = start.put(first);
    for _ in 0..8 + random.below(24) {
        code = match random.below(12) {
            0 => code.put(&set_flags(random)),
            1 => code.put(JNC),
            _ => code.put(random.pick(pieces)),
        };
    }
    // dec r15; jnz the top; hlt
    code.put(&[0x49, 0xff, 0xcf]).to(&[0x0f, 0x85], top).put(&[HLT])
}

/// Handlers that let the program go on: a page fault sets AC where it came from, a debug trap clears
/// TF, and interrupts are counted.
fn with_handlers(guest: &mut Guest) {
    // add rsp, 8; or dword [rsp+16], AC; iretq
    let fault = [0x48, 0x83, 0xc4, 8, 0x81, 0x4c, 0x24, 0x10, 0, 0, 4, 0, 0x48, 0xcf];
    guest.write(HANDLERS + 16 * PAGE_FAULT, &fault);
    // and dword [rsp+16], ~TF; iretq
    let trap = [0x81, 0x64, 0x24, 0x10, 0xff, 0xfe, 0xff, 0xff, 0x48, 0xcf];
    guest.write(HANDLERS + 16 * DEBUG, &trap);
    let mut count = vec![0x48, 0xff, 0x04, 0x25];
    count.extend(COUNTER.to_le_bytes());
    count.extend([0x48, 0xcf]);
    guest.write(HANDLERS + 16 * u64::from(INTERRUPT), &count);
}

/// A guest of supervisor code with `code` at its start; `smap` says whether SMAP is on.
fn supervisor(code: &Code, smap: bool, flags: u64) -> Guest {
    Guest::long().code(&code.bytes).with(|guest| {
        with_handlers(guest);
        let state = &mut guest.state;
        state.cr4 |= if smap { CR4_SMAP } else { 0 };
        state.rflags |= flags;
        state.kernel_gs_base = KERNEL_DATA + 0x100;
        state.segments[reprise_trace::cpu_state::GS].base = KERNEL_DATA + 0x200;
        state.gpr[RBX] = KERNEL_DATA;
        state.gpr[RBP] = USER_DATA;
        state.gpr[RSI] = KERNEL_DATA + 0x300;
        state.gpr[RDI] = KERNEL_DATA + 0x400;
        state.gpr[R15] = ROUNDS;
    })
}

/// A guest whose pointers lie in and across pages; a page fault maps the hole.
fn strings(code: &Code, random: &mut Random) -> Guest {
    let seed = random.next();
    supervisor(code, false, seed & ARITHMETIC).with(|guest| {
        let mut random = Random::new(seed);
        // mov qword [the hole's entry], its value; add rsp, 8; iretq
        let map = Code::at(HANDLERS + 16 * PAGE_FAULT)
            .put(&[0x48, 0xc7, 0x04, 0x25])
            .put(&HOLE_ENTRY.to_le_bytes())
            .put(&(HOLE as u32 | 3).to_le_bytes())
            .put(&[0x48, 0x83, 0xc4, 8, 0x48, 0xcf]);
        guest.write(HANDLERS + 16 * PAGE_FAULT, &map.bytes);
        let bytes: Vec<u8> = (0..0x3000 / 8).flat_map(|_| random.next().to_le_bytes()).collect();
        guest.write(AREA, &bytes);
        let state = &mut guest.state;
        state.gpr[RAX] = random.next();
        state.gpr[RBX] = AREA + 0x1400;
        state.gpr[8] = AREA + 0x800 + random.below(64);
        state.gpr[9] = AREA + 0x1000 - random.below(200);
        state.gpr[10] = HOLE - random.below(0x1000);
        state.gpr[11] = AREA + 0x1800;
        state.gpr[13] = random.next() % 0x8000;
        state.gpr[RSI] = state.gpr[8];
        state.gpr[RDI] = state.gpr[9];
    })
}

#[test]
fn random_strings_divisions_and_bits_are_the_same_at_every_instruction() {
    const SEED: u64 = 0x5eed_0203;
    let mut random = Random::new(SEED);
    // mov qword [the hole's entry], 0; invlpg [the hole]; mov rsi, r8; mov rdi, r9
    let first = [
        &[0x48, 0xc7, 0x04, 0x25][..],
        &HOLE_ENTRY.to_le_bytes(),
        &[0, 0, 0, 0, 0x0f, 0x01, 0x3c, 0x25],
        &(HOLE as u32).to_le_bytes(),
        &[0x4c, 0x89, 0xc6, 0x4c, 0x89, 0xcf],
    ]
    .concat();
    let mut halted = 0;
    for number in 0..30 {
        let code = program(&mut random, &first, DATA_PIECES);
        let seed = random.next();
        let what = format!("seed {SEED:#x}, program {number}");
        let ended = lockstep(&what, || strings(&code, &mut Random::new(seed)));
        halted += u64::from(ended.state.gpr[R15] == 0);
    }
    assert!(halted > 20, "only {halted} programs came to their end");
}

#[test]
fn random_system_code_is_the_same_at_every_instruction() {
    const SEED: u64 = 0x5eed_0201;
    let mut random = Random::new(SEED);
    let mut halted = 0;
    for number in 0..30 {
        let code = program(&mut random, &[], PIECES);
        let (smap, flags) = (number % 4 != 0, random.next() & (IF | ARITHMETIC));
        let what = format!("seed {SEED:#x}, program {number}");
        let ended = lockstep(&what, || supervisor(&code, smap, flags));
        assert!(ended.profile.units_translated > 0, "{what}");
        halted += u64::from(ended.state.gpr[R15] == 0);
    }
    assert!(halted > 25, "only {halted} programs came to their end");
}

/// What a run with interrupts came to: where each was taken, and how it ended.
#[derive(Debug, PartialEq)]
struct Interrupted {
    windows: Vec<(u64, CpuState)>,
    exit: Exit,
    ticks: u64,
    state: CpuState,
}

/// Runs the guest; an interrupt is asked for now and then, as `seed` has it.
fn interrupted(guest: Guest, translation: Translation, seed: u64) -> (Interrupted, SoftEngine) {
    let mut random = Random::new(seed);
    let mut engine = guest.engine();
    engine.set_translation(translation);
    engine.start_profile();
    let mut windows = Vec::new();
    loop {
        let quiet = engine.tick() + 1 + random.below(60);
        let mut exit = engine.run(quiet).expect("runs");
        if exit == Exit::TickReached {
            engine.set_interrupt_request(true);
            exit = engine.run(engine.tick() + 2000).expect("runs");
        }
        let (ticks, state) = (engine.tick(), engine.cpu_state().expect("state"));
        if exit != Exit::InterruptWindow {
            return (Interrupted { windows, exit, ticks, state }, engine);
        }
        windows.push((ticks, state));
        engine.inject(INTERRUPT).expect("it is taken");
        engine.set_interrupt_request(false);
    }
}

#[test]
fn interrupts_come_at_the_same_instruction() {
    const SEED: u64 = 0x5eed_0202;
    let mut random = Random::new(SEED);
    let mut windows = 0;
    for number in 0..30 {
        let code = program(&mut random, &[], PIECES);
        let (smap, flags) = (number % 4 != 0, random.next() & (IF | ARITHMETIC));
        let make = || supervisor(&code, smap, flags);
        let (plain, _) = interrupted(make(), Translation::Never, number);
        for translation in
            [Translation::WhenHot, Translation::AtOnce, Translation::AtOnceWithoutLoop]
        {
            let (translated, engine) = interrupted(make(), translation, number);
            let what = format!("seed {SEED:#x}, program {number}, {translation:?}");
            let places = |run: &Interrupted| {
                run.windows.iter().map(|(tick, state)| (*tick, state.rip)).collect::<Vec<_>>()
            };
            assert_eq!(places(&plain), places(&translated), "{what}");
            assert_eq!(plain, translated, "{what}");
            assert!(engine.profile().is_some_and(|profile| profile.units_translated > 0));
        }
        windows += plain.windows.len();
    }
    assert!(windows > 250, "only {windows} interrupts");
}

/// A loop of what hot kernel code does runs without a call of Rust for it.
#[test]
fn what_is_common_needs_no_call() {
    let start = Code::at(guest::KERNEL_CODE);
    let top = start.here();
    let code = start
        // pushfq; cli; sti; nop; popfq; stac; mov rax, [rbp]; clac; swapgs; swapgs; cld
        .put(&[0x9c, 0xfa, 0xfb, 0x90, 0x9d, 0x0f, 0x01, 0xcb, 0x48, 0x8b, 0x45, 0x00])
        .put(&[0x0f, 0x01, 0xca, 0x0f, 0x01, 0xf8, 0x0f, 0x01, 0xf8, 0xfc])
        // rdtsc; fnstcw [rbx]; stmxcsr [rbx]; mov eax, ds; mov [rbx], es
        .put(&[0x0f, 0x31, 0xd9, 0x3b, 0x0f, 0xae, 0x1b, 0x8c, 0xd8, 0x8c, 0x03])
        .put(&[0x49, 0xff, 0xcf])
        .to(&[0x0f, 0x85], top)
        .put(&[HLT]);
    let make = || supervisor(&code, true, IF).with(|guest| guest.state.gpr[R15] = 500);
    let ended = lockstep("common system code", make);
    assert_eq!(ended.state.gpr[R15], 0);
    calls_nothing(&ended.profile, 500);
}

/// Nor do short strings, divisions and bits.
#[test]
fn what_lies_in_a_page_needs_no_call() {
    let start = Code::at(guest::KERNEL_CODE);
    let top = start.here();
    let code = start
        // mov rsi, r8; mov rdi, r9; mov ecx, 40; rep movsb; mov ecx, 9; rep stosq; movsd; stosb; lodsw
        .put(&[0x4c, 0x89, 0xc6, 0x4c, 0x89, 0xcf, 0xb9, 40, 0, 0, 0, 0xf3, 0xa4])
        .put(&[0xb9, 9, 0, 0, 0, 0xf3, 0x48, 0xab, 0xa5, 0xaa, 0x66, 0xad])
        // xor edx, edx; div ebx; xor edx, edx; div rbx; bts [rbx], rax; push qword [rbx]; pop rax
        .put(&[0x31, 0xd2, 0xf7, 0xf3, 0x31, 0xd2, 0x48, 0xf7, 0xf3])
        .put(&[0x48, 0x0f, 0xab, 0x03, 0xff, 0x33, 0x58])
        .put(&[0x49, 0xff, 0xcf])
        .to(&[0x0f, 0x85], top)
        .put(&[HLT]);
    let ended = lockstep("short strings", || {
        supervisor(&code, true, IF).with(|guest| {
            guest.state.gpr[R15] = 500;
            guest.state.gpr[8] = AREA;
            guest.state.gpr[9] = AREA + 0x1000;
            guest.state.gpr[RBX] = AREA + 0x2000;
        })
    });
    assert_eq!(ended.state.gpr[R15], 0);
    calls_nothing(&ended.profile, 500);
}

/// Whether each instruction of a loop was run by Rust far less than once a round.
fn calls_nothing(profile: &Profile, rounds: u64) {
    let often: Vec<_> = profile.operations().into_iter().filter(|(_, n)| *n > rounds / 4).collect();
    assert!(often.is_empty(), "{often:?}");
}

/// An access that the board must answer comes in the shadow of an STI that translated code has run: the
/// guest stands there in the shadow.
#[test]
fn an_access_behind_sti_waits_in_its_shadow() {
    /// A page that leads past the end of RAM.
    const DEVICE: u64 = 0x1f_f000;
    const PAGES: u64 = 0x4000;
    for flags in [0, IF] {
        let start = Code::at(guest::KERNEL_CODE);
        let top = start.here();
        // sti; mov rax, [rsi]; (cli, unless flags are set); dec r15; cmove rsi, rdi; jns the top; hlt
        let mut code = start.put(&[0xfb, 0x48, 0x8b, 0x06]);
        if flags == 0 {
            code = code.put(&[0xfa]);
        }
        let code = code
            .put(&[0x49, 0xff, 0xcf, 0x48, 0x0f, 0x44, 0xf7])
            .to(&[0x0f, 0x89], top)
            .put(&[HLT]);
        let ended = lockstep("an access behind STI", || {
            supervisor(&code, false, flags).with(|guest| {
                guest.state.gpr[RDI] = DEVICE;
                guest.write(PAGES + DEVICE / 0x1000 * 8, &(0x100_0000u64 | 3).to_le_bytes());
            })
        });
        assert!(matches!(ended.exit, Exit::Access(_)), "{:?}", ended.exit);
        assert_eq!(ended.state.interrupt_shadow, flags == 0);
        assert!(ended.profile.units_translated > 0);
    }
}

/// User code may look at flags, control words and the clock; the rest faults.
#[test]
fn user_code_does_what_it_may() {
    const LOOKING: &[u8] = &[
        0x9c, 0x58, // pushfq; pop rax
        0x0f, 0x31, // rdtsc
        0xd9, 0x3b, // fnstcw [rbx]
        0x0f, 0xae, 0x1b, // stmxcsr [rbx]
        0x8c, 0xd8, // mov eax, ds
        0xfc, // cld
    ];
    for last in [&[0x90][..], &[0xfa], &[0xfb], &[0x0f, 0x01, 0xf8], &[0x0f, 0x01, 0xcb]] {
        for time_stamp_disabled in [false, true] {
            let start = Code::at(USER_CODE);
            let top = start.here();
            let code = start
                .put(LOOKING)
                .put(&[0x49, 0xff, 0xcf])
                .to(&[0x0f, 0x85], top)
                .put(last)
                .put(&[0xcd, 0x81]);
            let ended = lockstep(&format!("{last:x?} by user code"), || {
                Guest::long().user().code(&code.bytes).with(|guest| {
                    guest.state.cr4 |= if time_stamp_disabled { 1 << 2 } else { 0 };
                    guest.state.gpr[RBX] = USER_DATA;
                    guest.state.gpr[RSP] = USER_STACK;
                    guest.state.gpr[R15] = ROUNDS;
                })
            });
            assert_eq!(ended.exit, Exit::Halt);
            assert_eq!(ended.state.gpr[R15], if time_stamp_disabled { ROUNDS } else { 0 });
        }
    }
}
