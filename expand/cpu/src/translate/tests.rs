//! Any instruction, translated in any company, does what it does alone.

use reprise_random::Random;
use std::sync::atomic::AtomicBool;

use iced_x86::{Code, MemoryOperand, Register};
use reprise_machine::engine::Exit;
use reprise_trace::cpu_state::{CpuState, RCX, RSP};

use super::{MAX_UNIT_CODE_BYTES, Translation, Translator};
use crate::native::forms::{build, integer};
use crate::native::host_fpu::with_guest_fpu;
use crate::ops::testing::{CODE, DATA, Machine};

/// Where most addresses lie: in the middle of what is compared.
const MIDDLE: u64 = DATA + 0x8000;
/// Bytes compared around it, and around the stack's top: all that is mapped but code.
const WINDOW_BYTES: usize = 0x2000;
const STACK: u64 = DATA + 0x4_0000;
/// Registers that are bases in generated operands, and those that are indices.
const BASES: [Register; 8] = [
    Register::RBX,
    Register::RBP,
    Register::RSI,
    Register::RDI,
    Register::R10,
    Register::R12,
    Register::R13,
    Register::R14,
];
const INDICES: [Register; 7] = [
    Register::RAX,
    Register::RCX,
    Register::RDX,
    Register::R8,
    Register::R9,
    Register::R11,
    Register::R15,
];
const HALT: u8 = 0xf4;

fn operand(random: &mut Random) -> MemoryOperand {
    let base = BASES[random.below(8) as usize];
    let index = INDICES[random.below(7) as usize];
    let displacement = random.below(0x200) as i64 - 0x100;
    let scale = 1 << random.below(4);
    match random.below(4) {
        0 => MemoryOperand::with_base_displ(base, displacement & !15),
        1 => MemoryOperand::with_base_displ(base, displacement),
        _ => MemoryOperand::with_base_index_scale_displ_size(base, index, scale, displacement, 1),
    }
}

fn state(random: &mut Random, base: &CpuState) -> CpuState {
    let mut state = base.clone();
    state.gpr = std::array::from_fn(|_| integer(random));
    if random.below(2) == 0 {
        for index in INDICES {
            state.gpr[index.number()] = random.below(32) * 2;
        }
    }
    for base in BASES {
        let unaligned = if random.below(4) == 0 { random.below(16) } else { 0 };
        state.gpr[base.number()] = MIDDLE + random.below(16) * 16 + unaligned;
    }
    state.gpr[RSP] = STACK;
    state.rflags |= random.next() & crate::flags::ARITHMETIC;
    for register in &mut state.fpu.xmm {
        *register = u128::from(random.next()) << 64 | u128::from(random.next());
    }
    state
}

/// A machine with nothing mapped but two pages of code, and the windows that are compared.
fn confined() -> Machine {
    const DATA_TABLE: u64 = 0x5000;
    let machine = Machine::long_64(&[]);
    let page = |table: u64, linear: u64, entry: u64| {
        machine.write(table + linear / 0x1000 % 512 * 8, &entry.to_le_bytes());
    };
    for linear in (0..2 << 20).step_by(0x1000) {
        page(0x4000, linear, if (CODE..CODE + 0x2000).contains(&linear) { linear | 7 } else { 0 });
    }
    for middle in [MIDDLE, STACK] {
        for linear in [middle - 0x1000, middle] {
            page(DATA_TABLE, linear, linear | 7);
        }
    }
    for index in 1..512 {
        let entry: u64 = if index == DATA >> 21 { DATA_TABLE | 7 } else { 0 };
        machine.write(0x3000 + index * 8, &entry.to_le_bytes());
    }
    machine
}

/// What a run came to.
#[derive(Debug, PartialEq)]
struct Outcome {
    exit: Exit,
    tick: u64,
    state: CpuState,
    memory: Vec<u8>,
}

fn run(machine: &mut Machine, translation: Translation, before: &CpuState, ticks: u64) -> Outcome {
    let mut random = Random::new(before.gpr[0]);
    let bytes: Vec<u8> = (0..WINDOW_BYTES / 8).flat_map(|_| random.next().to_le_bytes()).collect();
    for middle in [MIDDLE, STACK] {
        machine.write(middle - WINDOW_BYTES as u64 / 2, &bytes);
    }
    let cpu = &mut machine.cpu;
    cpu.answered.clear();
    (cpu.answered_used, cpu.pending_exit) = (0, None);
    cpu.translator.as_mut().expect("BMI2").set_translation(translation);
    cpu.set_state(before);
    cpu.tick = 0;
    let kick = AtomicBool::new(false);
    let exit = with_guest_fpu(cpu, |cpu| cpu.execute(ticks, &kick, false));
    let (tick, state) = (cpu.tick, cpu.state());
    let memory = [MIDDLE, STACK]
        .map(|middle| machine.read::<WINDOW_BYTES>(middle - WINDOW_BYTES as u64 / 2))
        .concat();
    Outcome { exit, tick, state, memory }
}

/// Forgets all translated code, but not the blocks.
fn forget(machine: &mut Machine) {
    machine.cpu.blocks.forget_translations();
    machine.cpu.translator.as_mut().expect("BMI2").clear();
}

/// Runs the code at RIP in every way, all of which must come to the same.
fn compare(machine: &mut Machine, before: &CpuState, ticks: u64, what: &str) {
    let plain = run(machine, Translation::Never, before, ticks);
    for translation in [Translation::AtOnce, Translation::AtOnceWithoutLoop] {
        let translated = run(machine, translation, before, ticks);
        assert_eq!(plain, translated, "{what}, {translation:?}, from {before:x?}");
        forget(machine);
    }
}

/// What no test wants to run: it takes the machine's time or its page tables away.
fn is_wanted(code: Code) -> bool {
    code.op_code().is_instruction() && code.op_code().mode64()
}

/// Every form that there is, a few at a time, each followed by a conditional jump to what follows.
#[test]
fn every_form_does_the_same_translated() {
    let seed = 0x5eed_0101;
    let mut random = Random::new(seed);
    let mut machine = confined();
    let base = machine.cpu.state();
    let mut programs = 0;
    for code in Code::values().filter(|&code| is_wanted(code)) {
        for number in 0..16 {
            let operand = (number % 2 == 1).then(|| operand(&mut random));
            let Some((_, bytes)) = build(code, 64, operand.as_ref(), &mut random) else { continue };
            let mut program = bytes.clone();
            program.extend([0x70 | random.below(16) as u8, 0]);
            program.extend(&bytes);
            program.push(HALT);
            machine.replace_code(&program);
            let before = state(&mut random, &base);
            compare(&mut machine, &before, 20, &format!("seed {seed:#x}, {code:?} {bytes:02x?}"));
            programs += 1;
        }
    }
    assert!(programs > 10_000, "only {programs} programs");
}

/// Whatever a block holds, its jumps reach and its code fits.
#[test]
fn any_block_can_be_translated() {
    let seed = 0x5eed_0102;
    let mut random = Random::new(seed);
    let mut machine = Machine::long_64(&[]);
    let base = machine.cpu.state();
    let codes: Vec<Code> = Code::values().filter(|&code| is_wanted(code)).collect();
    for number in 0..3000 {
        let mut program = Vec::new();
        let repeated = LONGEST.get(number % 64);
        let block_length = [5, 20, u64::MAX][number % 3];
        let pool: Vec<Code> = (0..1 + random.below(4))
            .map(|_| codes[random.below(codes.len() as u64) as usize])
            .collect();
        for _ in 0..64 {
            if random.below(block_length) == 0 {
                // A conditional jump to what follows.
                program.extend([0x70 | random.below(16) as u8, 0]);
            }
            if let Some(bytes) = repeated {
                program.extend_from_slice(bytes);
            } else {
                let code = pool[random.below(pool.len() as u64) as usize];
                let operand = (random.below(3) > 0).then(|| operand(&mut random));
                if operand.is_some() && random.below(2) == 0 {
                    program.push([0x64, 0x65][random.below(2) as usize]);
                }
                let built = build(code, 64, operand.as_ref(), &mut random);
                program.extend(built.map_or(vec![0x90], |(_, bytes)| bytes));
            }
        }
        program.push(HALT);
        machine.replace_code(&program);
        machine.cpu.set_state(&base);
        for _ in 0..8 {
            // Blocks that a unit may hold.
            machine.cpu.rip += machine.block_bytes();
        }
        for translation in [Translation::AtOnce, Translation::AtOnceWithoutLoop] {
            forget(&mut machine);
            machine.cpu.translator.as_mut().expect("BMI2").set_translation(translation);
            machine.cpu.set_state(&base);
            assert!(machine.translate(), "seed {seed:#x}, {number}");
        }
    }
}

/// Instructions whose code is among the longest.
const LONGEST: &[&[u8]] = &[
    // lock cmpxchg16b fs:[r13+r15*8+disp32]
    &[0x64, 0xf0, 0x4b, 0x0f, 0xc7, 0x8c, 0xfd, 0x44, 0x33, 0x22, 0x11],
    // mov qword gs:[r12+r15*8+disp32], imm32
    &[0x65, 0x4b, 0xc7, 0x84, 0xfc, 0x44, 0x33, 0x22, 0x11, 1, 2, 3, 4],
    // movabs r13, imm64
    &[0x49, 0xbd, 1, 2, 3, 4, 5, 6, 7, 8],
    // addps xmm14, fs:[r13+r15*8+disp32]
    &[0x64, 0x47, 0x0f, 0x58, 0xb4, 0xfd, 0x44, 0x33, 0x22, 0x11],
    // shld fs:[r13+r15*8+disp32], r14, cl
    &[0x64, 0x4f, 0x0f, 0xa5, 0xb4, 0xfd, 0x44, 0x33, 0x22, 0x11],
    // xadd r14, r15
    &[0x4d, 0x0f, 0xc1, 0xfe],
    // push r14, pop r15
    &[0x41, 0x56, 0x41, 0x5f],
    &[0x41, 0x56],
    &[0x41, 0x5f],
    &[0xc9],
    // call to what follows
    &[0xe8, 0, 0, 0, 0],
    // blendvpd xmm14, fs:[r13+r15*8+disp32]
    &[0x64, 0x66, 0x47, 0x0f, 0x38, 0x15, 0xb4, 0xfd, 0x44, 0x33, 0x22, 0x11],
    // pcmpestri xmm14, fs:[r13+r15*8+disp32], 1
    &[0x64, 0x66, 0x47, 0x0f, 0x3a, 0x61, 0xb4, 0xfd, 0x44, 0x33, 0x22, 0x11, 1],
];

/// Code and exits that run out are made room for, and nothing goes on in what was there before.
#[test]
fn small_buffers_are_filled_again_and_again() {
    let seed = 0x5eed_0103;
    for (hot, exits) in [(2 * MAX_UNIT_CODE_BYTES, 0x10_0000), (0x10_0000, 0x1000)] {
        let mut random = Random::new(seed);
        let mut machine = confined();
        machine.cpu.translator = Translator::with_room(hot, 0x10_0000, exits).expect("memory");
        machine.cpu.profile = Some(Box::default());
        let base = machine.cpu.state();
        for _ in 0..20 {
            let program = jumps_about(&mut random);
            machine.replace_code(&program);
            let before = state(&mut random, &base);
            let plain = run(&mut machine, Translation::Never, &before, 10_000);
            let translated = run(&mut machine, Translation::AtOnce, &before, 10_000);
            assert_eq!(plain, translated, "seed {seed:#x}, {hot:#x} and {exits:#x} bytes");
        }
        let dropped = machine.cpu.profile.as_ref().expect("counts").code_dropped;
        assert!(dropped > 2, "{hot:#x} and {exits:#x} bytes: {dropped} times");
    }
}

/// Two pages of short blocks that go on here or there.
fn jumps_about(random: &mut Random) -> Vec<u8> {
    const BLOCK_BYTES: u64 = 32;
    const BLOCKS: u64 = 0x2000 / BLOCK_BYTES;
    let mut program = Vec::new();
    for number in 0..BLOCKS {
        let start = program.len();
        // lea rcx, [rcx+rax*2+n]; add eax, ecx; a jump on carry; a jump.
        program.extend([0x48, 0x8d, 0x4c, 0x41, number as u8, 0x01, 0xc8]);
        for opcode in [&[0x0f, 0x82][..], &[0xe9]] {
            program.extend_from_slice(opcode);
            let end = program.len() as i64 + 4;
            let target = (random.below(BLOCKS) * BLOCK_BYTES) as i64;
            program.extend(((target - end) as i32).to_le_bytes());
        }
        program.resize(start + BLOCK_BYTES as usize, HALT);
    }
    program
}

/// A linear page that leads to two pages of RAM by turns, and its page-table entry.
const TURNS: u64 = 0x12_0000;
const TURNS_ENTRY: u64 = 0x4000 + TURNS / 0x1000 * 8;
const OTHER: u64 = 0x13_0000;
/// JMP to 0x10; MOV ECX, 5; HLT.
const JUMP: [u8; 2] = [0xeb, 0x0e];
const SET_RCX: [u8; 6] = [0xb9, 5, 0, 0, 0, HALT];

#[test]
fn a_way_within_a_page_does_not_lead_into_another_at_its_address() {
    let mut machine = Machine::long_64(&[]);
    machine.write(TURNS, &JUMP);
    machine.write(TURNS + 0x10, &[HALT]);
    machine.write(OTHER + 0x10, &SET_RCX);
    let at = |machine: &Machine, rip| CpuState { rip, ..machine.cpu.state() };
    let start = at(&machine, TURNS);
    assert_eq!(run(&mut machine, Translation::AtOnce, &start, 1).exit, Exit::TickReached);
    machine.write(TURNS_ENTRY, &(OTHER | 7).to_le_bytes());
    let inside = at(&machine, TURNS + 0x10);
    assert_eq!(run(&mut machine, Translation::AtOnce, &inside, 9).state.gpr[RCX], 5);
    machine.write(TURNS_ENTRY, &(TURNS | 7).to_le_bytes());
    let ended = run(&mut machine, Translation::AtOnce, &start, 9);
    assert_eq!((ended.exit, ended.state.gpr[RCX]), (Exit::Halt, 0));
}
