//! A trace says of every instruction what memory it accesses: here it is held against what it did.

use reprise_random::Random;
use std::collections::BTreeSet;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Sender, channel};

use iced_x86::{Code, MemoryOperand, Mnemonic, Register};
use reprise_trace::cpu_state::{CS, CpuState, RBX, RCX, RDI, RSI, RSP};
use reprise_trace::instructions::{
    AccessKind, Batch, Contents, Event, Feed, Observer, Run, TraceError,
};

use super::{BatchSink, FULL_ADDRESSES, MAX_PIECE};
use crate::cpu::Cpu;
use crate::native::forms::{build, integer};
use crate::native::host_fpu::with_guest_fpu;
use crate::ops::testing::{CODE, DATA, Machine};
use crate::translate::Translation;

/// What is traced.
const CONTENTS: Contents =
    Contents { physical: true, values: false, registers: false, page_walks: false };
/// Where most operands lie.
const MIDDLE: u64 = DATA + 0x8000;
pub(super) const HALT: u8 = 0xf4;

/// Keeps the batches.
pub(super) struct Collect(pub(super) Sender<Batch>);

impl BatchSink for Collect {
    fn exchange(&mut self, batch: Batch, _tick: u64) -> Option<Batch> {
        self.0.send(batch).ok().map(|()| Batch::default())
    }
}

/// Bytes read and written by instructions that retired.
#[derive(Default, PartialEq, Eq)]
struct Bytes {
    read: BTreeSet<u64>,
    written: BTreeSet<u64>,
    retired: usize,
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "reads {:x?}, writes {:x?}", ranges(&self.read), ranges(&self.written))
    }
}

impl Bytes {
    fn add(&mut self, linear: u64, bytes: u64, kind: AccessKind) {
        let all = (0..bytes).map(|byte| linear.wrapping_add(byte));
        if kind.reads() {
            self.read.extend(all.clone());
        }
        if kind.writes() {
            self.written.extend(all);
        }
    }
}

impl Observer for Bytes {
    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        for step in run.steps() {
            self.retired += usize::from(step.retired);
            for access in step.accesses() {
                // Memory is mapped to itself.
                if access.kind.touches_memory() {
                    assert_eq!(access.physical, Some(access.address));
                }
                self.add(access.address, u64::from(access.size_bytes), access.kind);
            }
        }
        Ok(())
    }

    fn event(&mut self, _event: &Event) -> Result<(), TraceError> {
        Ok(())
    }
}

/// Runs one instruction under a trace; what the trace says that it accessed, and what it did access.
fn trace_one(machine: &mut Machine) -> (Bytes, Bytes) {
    let cpu = &mut machine.cpu;
    cpu.translator.as_mut().expect("BMI2").set_translation(Translation::Never);
    cpu.answered.clear();
    (cpu.answered_used, cpu.pending_exit) = (0, None);
    cpu.tick = 0;
    let (send, batches) = channel();
    cpu.start_trace(Box::new(Collect(send)), CONTENTS);
    cpu.memory.spy.start();
    let kick = AtomicBool::new(false);
    with_guest_fpu(cpu, |cpu| cpu.execute(1, &kick, false));
    let mut did = Bytes { retired: cpu.tick as usize, ..Bytes::default() };
    for touched in cpu.memory.spy.stop() {
        let kind = if touched.writes { AccessKind::Write } else { AccessKind::Read };
        did.add(touched.linear, touched.bytes, kind);
    }
    cpu.stop_trace();
    let mut said = Bytes::default();
    let mut feed = Feed::new(CONTENTS);
    for batch in batches {
        feed.push(&batch, &mut said).expect("the batch keeps the contract");
    }
    (said, did)
}

pub(super) fn operand(random: &mut Random, bits: u32) -> MemoryOperand {
    let pick = |random: &mut Random, of: &[Register]| of[random.below(of.len() as u64) as usize];
    let (bases, indices): (&[Register], &[Register]) = if bits == 64 {
        (
            &[Register::RBX, Register::RBP, Register::RSP, Register::R12, Register::R13],
            &[Register::RAX, Register::RDX, Register::R9, Register::R15],
        )
    } else {
        (&[Register::EBX, Register::EBP, Register::ESP], &[Register::EAX, Register::EDX])
    };
    let displacement = random.below(0x80) as i64 & !15;
    let base = pick(random, bases);
    if random.below(2) == 0 {
        return MemoryOperand::with_base_displ(base, displacement);
    }
    let (index, scale) = (pick(random, indices), 1 << random.below(4));
    MemoryOperand::with_base_index_scale_displ_size(base, index, scale, displacement, 1)
}

pub(super) fn state(random: &mut Random, base: &CpuState) -> CpuState {
    let mut state = base.clone();
    state.gpr = std::array::from_fn(|_| random.below(64) * 16);
    for register in [3, 5, RSP, 6, 7, 12, 13] {
        state.gpr[register] = MIDDLE + random.below(64) * 16;
    }
    state.gpr[RCX] = random.below(20);
    if random.below(8) == 0 {
        state.gpr[0] = integer(random);
    }
    state.rflags |= random.next() & (crate::flags::ARITHMETIC | crate::flags::DF);
    state
}

/// Instructions that write less than their description says: bytes under a mask or a condition, or a
/// state image whose reserved bytes stay.
fn may_write_less(mnemonic: Mnemonic) -> bool {
    use Mnemonic::{Arpl, Fxsave, Fxsave64, Maskmovdqu, Maskmovq};
    matches!(mnemonic, Arpl | Maskmovq | Maskmovdqu | Fxsave | Fxsave64)
}

/// POPA passes over the slot of ESP; here it is read and forgotten.
fn may_read_more(mnemonic: Mnemonic) -> bool {
    matches!(mnemonic, Mnemonic::Popa | Mnemonic::Popad)
}

/// First and last of each run of addresses.
fn ranges(bytes: &BTreeSet<u64>) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for &byte in bytes {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == byte => *last = byte,
            _ => ranges.push((byte, byte)),
        }
    }
    ranges
}

fn check_forms(machine: &mut Machine, bits: u32, seed: u64) -> usize {
    let mut random = Random::new(seed);
    let base = machine.cpu.state();
    let (mut retired, mut wrong) = (0, Vec::new());
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
            machine.cpu.set_state(&state(&mut random, &base));
            let (said, did) = trace_one(machine);
            let what = format!("seed {seed:#x}, {code:?} {bytes:02x?}");
            assert_eq!(said.retired, did.retired, "{what}");
            if did.retired == 0 {
                continue;
            }
            retired += 1;
            // What is changed in place is one access, which writes.
            let in_place = said.read.intersection(&said.written).copied();
            let read: BTreeSet<u64> = did.read.iter().copied().chain(in_place).collect();
            let writes_as_said = said.written == did.written
                || may_write_less(code.mnemonic()) && said.written.is_superset(&did.written);
            let reads_as_said =
                said.read == read || may_read_more(code.mnemonic()) && said.read.is_subset(&read);
            if !(writes_as_said && reads_as_said) {
                wrong.push(format!("{what}: it {did:?}; the trace {said:?}"));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "{} are wrong, such as\n{}",
        wrong.len(),
        wrong[..wrong.len().min(30)].join("\n")
    );
    retired
}

#[test]
fn every_form_accesses_what_its_description_says() {
    let retired = check_forms(&mut Machine::long_64(&[]), 64, 0x5eed_0201);
    assert!(retired > 5000, "only {retired} in 64-bit code");
    let retired = check_forms(&mut Machine::flat_32(&[]), 32, 0x5eed_0202);
    assert!(retired > 5000, "only {retired} in 32-bit code");
}

/// Where runs began, how many instructions of them retired, and all addresses.
#[derive(Debug, Default, PartialEq, Eq)]
struct Runs {
    runs: Vec<(u64, usize)>,
    addresses: Vec<u64>,
}

impl Observer for Runs {
    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        self.runs.push((run.linear(), run.retired()));
        self.addresses.extend(run.addresses());
        Ok(())
    }

    fn event(&mut self, _event: &Event) -> Result<(), TraceError> {
        Ok(())
    }
}

/// Runs until the guest halts; the trace, and the most addresses of a batch.
fn trace_all(machine: &mut Machine, translation: Translation) -> (Runs, usize) {
    let cpu = &mut machine.cpu;
    cpu.translator.as_mut().expect("BMI2").set_translation(translation);
    let (send, batches) = channel();
    cpu.start_trace(Box::new(Collect(send)), CONTENTS);
    let kick = AtomicBool::new(false);
    with_guest_fpu(cpu, |cpu| cpu.execute(u64::MAX >> 1, &kick, false));
    cpu.stop_trace();
    let (mut runs, mut most, mut feed) = (Runs::default(), 0, Feed::new(CONTENTS));
    for batch in batches {
        most = most.max(batch.addresses.len());
        feed.push(&batch, &mut runs).expect("the batch keeps the contract");
    }
    (runs, most)
}

#[test]
fn a_long_repetition_is_handed_over_as_it_is_noted() {
    const COUNT: u64 = 1_000_000;
    for translation in [Translation::Never, Translation::AtOnce] {
        let mut machine = Machine::long_64(&[0x90, 0xf3, 0xaa, HALT]);
        let mut state = machine.cpu.state();
        (state.gpr[RCX], state.gpr[RDI]) = (COUNT, DATA);
        machine.cpu.set_state(&state);
        let (runs, most) = trace_all(&mut machine, translation);
        assert_eq!(runs.runs.iter().map(|(_, retired)| retired).sum::<usize>(), 3);
        assert!(runs.addresses.iter().copied().eq(DATA..DATA + COUNT), "{translation:?}");
        assert!(most <= FULL_ADDRESSES + MAX_PIECE, "{translation:?}: {most} in one batch");
    }
}

#[test]
fn code_of_16_bits_accesses_a_stack_of_32_bits_where_its_description_says() {
    let mut machine = Machine::flat_32(&[]);
    let mut state = machine.cpu.state();
    state.segments[CS].attributes = 0x809b;
    (state.segments[CS].base, state.rip) = (CODE, 0);
    state.gpr = [MIDDLE; 16];
    // PUSH and POP AX, PUSH of a number, CALL, PUSHA, PUSHF, ENTER and PUSHAD.
    let codes: [&[u8]; 8] = [
        &[0x50],
        &[0x58],
        &[0x68, 1, 2],
        &[0xe8, 0, 0],
        &[0x60],
        &[0x9c],
        &[0xc8, 8, 0, 0],
        &[0x66, 0x60],
    ];
    for code in codes {
        machine.replace_code(&[code, &[HALT]].concat());
        machine.cpu.set_state(&state);
        let (said, did) = trace_one(&mut machine);
        assert_eq!(did.retired, 1, "{code:02x?}");
        assert_eq!(said, did, "{code:02x?}");
    }
}

#[test]
fn a_repetition_wraps_where_its_addresses_end() {
    // REP STOSB by DI, upwards over the end of 64 KiB.
    let mut machine = Machine::flat_32(&[0x67, 0xf3, 0xaa, HALT]);
    let mut state = machine.cpu.state();
    (state.gpr[RCX], state.gpr[RDI]) = (0x20, 0xfff0);
    machine.cpu.set_state(&state);
    let (said, did) = trace_one(&mut machine);
    assert_eq!(ranges(&did.written), [(0, 0xf), (0xfff0, 0xffff)]);
    assert_eq!(said, did);
}

#[test]
fn a_walk_that_marks_a_page_in_code_ends_the_run_in_every_way_of_execution() {
    // Small pages' entries are at 0x4000: the code has the places of those for pages 1 to 3, and reads
    // page 5, whose entry lies in the same chunk.
    const ENTRIES: u64 = 0x4000;
    const FIRST: u64 = ENTRIES + 8;
    let run = |translation| {
        let mut machine = Machine::long_64(&[]);
        machine.write(FIRST, &[0x8a, 0x04, 0x25, 0, 0x50, 0, 0, 0x90, 0x90, HALT]);
        let mut state = machine.cpu.state();
        state.rip = FIRST;
        machine.cpu.set_state(&state);
        trace_all(&mut machine, translation).0
    };
    let interpreted = run(Translation::Never);
    assert_eq!(interpreted.addresses, [0x5000]);
    assert_eq!(run(Translation::AtOnce), interpreted);
}

#[test]
fn what_accesses_nothing_has_its_address_in_a_trace() {
    use AccessKind::{Invalidate, Prefetch};
    let run = |translation| {
        let code: [&[u8]; 6] = [
            &[0x0f, 0x18, 0x4f, 0x40], // prefetcht0 [rdi+0x40]
            &[0x0f, 0x0d, 0x0e],       // prefetchw [rsi], where nothing is mapped
            &[0x0f, 0x0d, 0x0b],       // prefetchw [rbx], which is no address
            &[0x8a, 0x07],             // mov al, [rdi]
            &[0x0f, 0x01, 0x3f],       // invlpg [rdi]
            &[HALT],
        ];
        let mut machine = Machine::long_64(&code.concat());
        let mut state = machine.cpu.state();
        (state.gpr[RDI], state.gpr[RSI], state.gpr[RBX]) = (DATA, UNMAPPED, NO_ADDRESS);
        machine.cpu.set_state(&state);
        let cpu = &mut machine.cpu;
        cpu.translator.as_mut().expect("BMI2").set_translation(translation);
        let (send, batches) = channel();
        cpu.start_trace(Box::new(Collect(send)), CONTENTS);
        let kick = AtomicBool::new(false);
        with_guest_fpu(cpu, |cpu| cpu.execute(u64::MAX >> 1, &kick, false));
        cpu.stop_trace();
        let (mut named, mut feed) = (Named::default(), Feed::new(CONTENTS));
        for batch in batches {
            feed.push(&batch, &mut named).expect("the batch keeps the contract");
        }
        named.0
    };
    let expected = [
        (Prefetch, DATA + 0x40, Some(DATA + 0x40)),
        (Prefetch, UNMAPPED, None),
        (Prefetch, NO_ADDRESS, None),
        (AccessKind::Read, DATA, Some(DATA)),
        (Invalidate, DATA, Some(DATA)),
    ];
    for translation in [Translation::Never, Translation::AtOnce] {
        assert_eq!(run(translation), expected, "{translation:?}");
    }
}

/// What [`Machine`] does not map, and what is not canonical.
const UNMAPPED: u64 = 1 << 40;
const NO_ADDRESS: u64 = 1 << 60;

/// Accesses with their places.
#[derive(Debug, Default)]
struct Named(Vec<(AccessKind, u64, Option<u64>)>);

impl Observer for Named {
    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        let accesses = run.steps().flat_map(|step| step.accesses());
        self.0.extend(accesses.map(|access| (access.kind, access.address, access.physical)));
        Ok(())
    }

    fn event(&mut self, _event: &Event) -> Result<(), TraceError> {
        Ok(())
    }
}

/// RBX times through four blocks, with a store in one of them.
const LOOP: &[u8] = &[
    0x48, 0x89, 0x1f, // mov [rdi], rbx
    0xeb, 0x00, // jmp to the next instruction
    0xf6, 0xc3, 0x01, // test bl, 1
    0x75, 0x02, // jnz over the next instruction
    0xff, 0xc0, // inc eax
    0x48, 0xff, 0xcb, // dec rbx
    0x75, 0xef, // jnz to the start
    HALT,
];

/// Runs [`LOOP`] on a CPU that `prepare` has had a look at: the trace, and how often block numbers began.
fn trace_loop(times: u64, max_numbers: usize, prepare: impl FnOnce(&mut Cpu)) -> (Runs, usize) {
    let mut machine = Machine::long_64(LOOP);
    let mut state = machine.cpu.state();
    (state.gpr[RBX], state.gpr[RDI]) = (times, DATA);
    machine.cpu.set_state(&state);
    let cpu = &mut machine.cpu;
    prepare(cpu);
    let (send, batches) = channel();
    cpu.start_trace(Box::new(Collect(send)), CONTENTS);
    cpu.tracer.as_mut().expect("somebody traces").max_numbers = max_numbers;
    let kick = AtomicBool::new(false);
    with_guest_fpu(cpu, |cpu| cpu.execute(u64::MAX >> 1, &kick, false));
    cpu.stop_trace();
    let (mut runs, mut begins, mut feed) = (Runs::default(), 0, Feed::new(CONTENTS));
    for batch in batches {
        begins += usize::from(batch.restart);
        feed.push(&batch, &mut runs).expect("the batch keeps the contract");
    }
    (runs, begins)
}

fn translating(translation: Translation) -> impl FnOnce(&mut Cpu) {
    move |cpu| cpu.translator.as_mut().expect("BMI2").set_translation(translation)
}

#[test]
fn numbers_that_begin_again_leave_the_same_trace() {
    const TIMES: u64 = 100_000;
    for translation in [Translation::Never, Translation::AtOnce] {
        let (plain, begins) = trace_loop(TIMES, usize::MAX, translating(translation));
        assert_eq!(begins, 1, "{translation:?}");
        assert_eq!(plain.addresses.len() as u64, TIMES, "{translation:?}");
        let (again, begins) = trace_loop(TIMES, 2, translating(translation));
        assert!(begins > 3, "{translation:?}: they began {begins} times");
        assert!(again == plain, "{translation:?}");
    }
}

#[test]
fn a_host_without_bmi2_leaves_the_same_trace() {
    // There is no translator there.
    let (without, _) = trace_loop(1000, usize::MAX, |cpu| cpu.translator = None);
    let (with, _) = trace_loop(1000, usize::MAX, translating(Translation::AtOnce));
    assert_eq!(with.addresses.len(), 1000);
    assert!(without == with);
}
