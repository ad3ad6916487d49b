//! A trace with values and registers says all that an instruction does: here every form runs once, and what
//! the trace says, carried out on the state before, must be the state after.

use reprise_random::Random;
use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::channel;

use iced_x86::Code;
use reprise_trace::cpu_state::CpuState;
use reprise_trace::instructions::register::{self, take_changes};
use reprise_trace::instructions::{
    CodeWidth, Contents, Event, Feed, Observer, Run, SystemAccessKind, TraceError,
};

use super::tests::{Collect, HALT, operand, state};
use crate::native::forms::{build, integer};
use crate::native::host_fpu::with_guest_fpu;
use crate::ops::testing::{DATA, Machine};

const FULL: Contents =
    Contents { physical: true, values: true, registers: true, page_walks: false };
/// Memory that is compared: page tables and the stack below them, and where operands lie.
const LOW: u64 = 0x1000;
const LOW_BYTES: usize = 0x8000;
const OPERAND_BYTES: usize = 0x1_0000;
/// The entry of the large page in which operands lie.
const OPERAND_ENTRY: u64 = 0x3008;

/// Where that page ends.
const OPERAND_PAGE_END: u64 = 0x40_0000;

/// The compared parts of memory.
#[derive(Clone, PartialEq, Eq)]
struct Parts {
    low: Vec<u8>,
    operands: Vec<u8>,
}

impl Parts {
    fn of(machine: &Machine) -> Self {
        let part = |start: u64, size: usize| {
            let mut bytes = vec![0; size];
            machine.cpu.memory.physical.ram().read(start, &mut bytes);
            bytes
        };
        Self { low: part(LOW, LOW_BYTES), operands: part(DATA, OPERAND_BYTES) }
    }

    fn byte(&mut self, address: u64) -> Option<&mut u8> {
        match address.checked_sub(DATA) {
            Some(offset) => self.operands.get_mut(offset as usize),
            None => self.low.get_mut(address.checked_sub(LOW)? as usize),
        }
    }
}

/// Carries out what a trace says.
struct Carried {
    cpu: CpuState,
    memory: Parts,
    /// Bytes of loads that are not what memory has.
    wrong_loads: BTreeMap<u64, (u8, u8)>,
    walks: usize,
}

impl Carried {
    fn load(&mut self, address: u64, bytes: &[u8]) {
        for (address, traced) in (address..).zip(bytes) {
            if let Some(byte) = self.memory.byte(address)
                && byte != traced
            {
                self.wrong_loads.insert(address, (*byte, *traced));
            }
        }
    }

    fn store(&mut self, address: u64, bytes: &[u8]) {
        for (address, traced) in (address..).zip(bytes) {
            if let Some(byte) = self.memory.byte(address) {
                *byte = *traced;
            }
        }
    }
}

impl Observer for Carried {
    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        let mask = match run.block().mode().width {
            CodeWidth::Bits64 => u64::MAX,
            _ => 0xffff_ffff,
        };
        for step in run.steps() {
            for access in step.accesses() {
                let size = usize::from(access.size_bytes);
                let words = access.values.chunks(size.div_ceil(8));
                let mut sides = words.map(|words| {
                    let bytes = words.iter().flat_map(|word| word.to_le_bytes());
                    bytes.take(size).collect::<Vec<u8>>()
                });
                // Memory is mapped to itself.
                if access.kind.reads() {
                    self.load(access.address, &sides.next().expect("a value"));
                }
                if access.kind.writes() {
                    self.store(access.address, &sides.next().expect("a value"));
                }
            }
            if !step.retired {
                continue;
            }
            self.cpu.rip += step.instruction.bytes().len() as u64;
            self.cpu.rip &= mask;
            let mut words = step.registers;
            for write in step.instruction.register_writes() {
                let (value, rest) = words.split_at(usize::from(write.words));
                words = rest;
                let value = [value[0], value.get(1).copied().unwrap_or(0)];
                register::replace(&mut self.cpu, write.register, value).expect("a register");
            }
        }
        Ok(())
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        match *event {
            Event::MemoryWrite { kind, physical, size_bytes, value, .. } => {
                self.store(physical, &value.to_le_bytes()[..usize::from(size_bytes)]);
                self.walks += usize::from(kind == SystemAccessKind::WalkWrite);
            }
            Event::Register { register, value } => {
                register::replace(&mut self.cpu, register, value).expect("a register");
            }
            _ => {}
        }
        Ok(())
    }
}

/// A state with all of the FPU in it.
fn random_state(random: &mut Random, base: &CpuState) -> CpuState {
    let mut state = state(random, base);
    for register in &mut state.fpu.xmm {
        *register = u128::from(integer(random)) << 64 | u128::from(integer(random));
    }
    for register in &mut state.fpu.st {
        register[..8].copy_from_slice(&(integer(random) | 1 << 63).to_le_bytes());
        register[8..].copy_from_slice(&(0x3ff0 + random.below(0x20) as u16).to_le_bytes());
    }
    state.fpu.ftw = if random.below(2) == 0 { 0 } else { random.next() as u8 };
    state.fpu.fsw = (random.below(8) << 11) as u16;
    state
}

/// Runs so many instructions under a trace and carries out what that says; what came out otherwise, and how many
/// page walks wrote.
fn difference(machine: &mut Machine, instructions: u64) -> (Vec<String>, usize) {
    let before = Parts::of(machine);
    let cpu = &mut machine.cpu;
    let mut carried =
        Carried { cpu: cpu.state(), memory: before, wrong_loads: BTreeMap::new(), walks: 0 };
    cpu.answered.clear();
    (cpu.answered_used, cpu.pending_exit) = (0, None);
    cpu.tick = 0;
    let (send, batches) = channel();
    cpu.start_trace(Box::new(Collect(send)), FULL);
    let kick = AtomicBool::new(false);
    with_guest_fpu(cpu, |cpu| cpu.execute(instructions, &kick, false));
    cpu.stop_trace();
    let mut feed = Feed::new(FULL);
    for batch in batches {
        feed.push(&batch, &mut carried).expect("the batch keeps the contract");
    }
    let mut wrong = Vec::new();
    take_changes(&mut carried.cpu, &mut machine.cpu.state(), register::all(), |number, value| {
        wrong.push(format!("{} is {value:x?}", register::name(number).unwrap_or("none")));
    });
    if carried.memory != Parts::of(machine) {
        wrong.push("memory is another".to_owned());
    }
    if !carried.wrong_loads.is_empty() {
        wrong.push(format!("loads (memory, trace) {:x?}", carried.wrong_loads));
    }
    (wrong, carried.walks)
}

fn check_forms(machine: &mut Machine, bits: u32, seed: u64) -> usize {
    let mut random = Random::new(seed);
    let base = machine.cpu.state();
    let (mut walks, mut wrong) = (0, Vec::new());
    for code in Code::values() {
        let known = code.op_code();
        let fits = if bits == 64 { known.mode64() } else { known.mode32() };
        if !known.is_instruction() || !fits {
            continue;
        }
        for number in 0..8 {
            let operand = (number % 4 != 0).then(|| operand(&mut random, bits));
            let built = build(code, bits, operand.as_ref(), &mut random);
            let Some((instruction, mut bytes)) = built else { continue };
            if number % 4 == 1 && instruction.is_string_instruction() {
                bytes.insert(0, [0xf3, 0xf2][random.below(2) as usize]);
            }
            bytes.push(HALT);
            machine.replace_code(&bytes);
            machine.write(OPERAND_ENTRY, &(1u64 << 21 | 0x87).to_le_bytes());
            for at in (0..0x1000).step_by(8) {
                machine.write(DATA + 0x8000 + at, &integer(&mut random).to_le_bytes());
            }
            machine.cpu.set_state(&random_state(&mut random, &base));
            let (differences, walked) = difference(machine, 1);
            walks += walked;
            if !differences.is_empty() {
                wrong.push(format!("seed {seed:#x}, {code:?} {bytes:02x?}: {differences:?}"));
            }
        }
    }
    let some = wrong[..wrong.len().min(30)].join("\n");
    assert!(wrong.is_empty(), "{} are wrong, such as\n{some}", wrong.len());
    walks
}

/// Of repetitions that take several pieces.
const PIECE: u64 = super::MAX_PIECE as u64;

#[test]
fn a_long_repetition_says_all_that_it_does() {
    // REP STOSB, MOVSB over each other, and REPE CMPSB that finds a difference at a piece's very end.
    let cases = [
        ([0xf3, 0xaa], 3 * PIECE + 5, None, 3 * PIECE + 5),
        ([0xf3, 0xa4], 2 * PIECE + 5, None, 2 * PIECE + 5),
        ([0xf3, 0xa6], 2 * PIECE, Some(PIECE / 2 - 1), PIECE / 2),
        ([0xf3, 0xa6], 2 * PIECE, Some(PIECE / 2), PIECE / 2 + 1),
    ];
    for (code, count, differs, done) in cases {
        // At the block's beginning, and behind INC EBX.
        for before in [&[][..], &[0xff, 0xc3]] {
            let mut machine = Machine::long_64(&[before, &code, &[HALT]].concat());
            if let Some(at) = differs {
                machine.write(DATA + at, &[1]);
            }
            let mut state = machine.cpu.state();
            (state.gpr[0], state.gpr[1]) = (0x5a, count);
            let target = if differs.is_some() { 0x4_0000 } else { 7 };
            (state.gpr[6], state.gpr[7]) = (DATA, DATA + target);
            machine.cpu.set_state(&state);
            let instructions = 1 + before.len() as u64 / 2;
            let (wrong, _) = difference(&mut machine, instructions);
            assert!(wrong.is_empty(), "{before:02x?} {code:02x?}: {wrong:?}");
            assert_eq!(machine.cpu.state().gpr[1], count - done, "{before:02x?} {code:02x?}");
            assert_eq!(machine.cpu.tick, instructions, "{before:02x?} {code:02x?}");
        }
    }
}

#[test]
fn a_long_repetition_that_faults_leaves_what_it_leaves_untraced() {
    // REP STOSB by EDI and ECX: at once, and in the second piece.
    for mapped in [0, PIECE + 5] {
        let run = |traced: bool| {
            let mut machine = Machine::long_64(&[0x67, 0xf3, 0xaa, HALT]);
            // The large page behind that of operands is not there.
            machine.write(OPERAND_ENTRY + 8, &[0; 8]);
            let mut state = machine.cpu.state();
            (state.gpr[1], state.gpr[7]) = ((1 << 32) | (3 * PIECE), OPERAND_PAGE_END - mapped);
            machine.cpu.set_state(&state);
            if traced {
                let (wrong, _) = difference(&mut machine, 1);
                assert!(wrong.is_empty(), "{mapped}: {wrong:?}");
            } else {
                let kick = AtomicBool::new(false);
                with_guest_fpu(&mut machine.cpu, |cpu| cpu.execute(1, &kick, false));
            }
            machine.cpu.state()
        };
        let untraced = run(false);
        let whole = if mapped == 0 { (1 << 32) | (3 * PIECE) } else { 3 * PIECE - mapped };
        assert_eq!(untraced.gpr[1], whole);
        assert!(run(true) == untraced, "{mapped}");
    }
}

#[test]
fn the_trace_of_every_form_says_all_that_it_does() {
    let walks = check_forms(&mut Machine::long_64(&[]), 64, 0x5eed_0301);
    assert!(walks > 1000, "only {walks} walks wrote");
    check_forms(&mut Machine::flat_32(&[]), 32, 0x5eed_0302);
}
