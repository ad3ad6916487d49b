//! Traces against an independent account of the same run: a guest recorded on KVM's single-step, whose
//! registers are looked at before every instruction.

mod watching;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use iced_x86::{Decoder, DecoderOptions, InstructionInfoFactory, OpAccess, Register};
use reprise_expand::pieces;
use reprise_expand::{Control, Threads, Window, expand};
use reprise_kvm::{KvmClock, KvmEngine};
use reprise_machine::engine::Engine;
use reprise_replay::{Replayable, Start};
use reprise_trace::cpu_state::{CpuState, Segment};
use reprise_trace::instructions::{
    CodeWidth, Contents, Event, Observer, Run, TraceError, register,
};
use tempfile::TempDir;
use watching::Watching;

/// Instructions looked at, at most: KVM steps through a tenth of a million in a second.
const TICKS: u64 = 150_000;

/// An instruction of a trace: where it lies, and what it accesses.
#[derive(Clone, Debug)]
struct Traced {
    linear: u64,
    bytes: Vec<u8>,
    bits: u32,
    accesses: Vec<Access>,
    /// The registers before it, as the trace's writes have made them.
    before: Core,
}

/// The registers that are compared.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Core {
    general: [u64; 16],
    rip: u64,
    rflags: u64,
    control: [u64; 5],
    /// Selectors, attributes, limits and bases.
    segments: [Segment; 6],
}

impl Core {
    fn of(state: &CpuState) -> Self {
        Self {
            general: state.gpr,
            rip: state.rip,
            rflags: state.rflags,
            control: [state.cr0, state.cr2, state.cr3, state.cr4, state.efer],
            segments: state.segments,
        }
    }
}

/// Address, bytes, and whether memory is read and written.
type Access = (u64, u64, bool, bool);

/// The trace, and the registers as far as it has come: its writes are all that changes them.
#[derive(Debug)]
struct Listing {
    traced: Vec<Traced>,
    cpu: CpuState,
}

impl Observer for Listing {
    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        let mask = match run.block().mode().width {
            CodeWidth::Bits64 => u64::MAX,
            _ => 0xffff_ffff,
        };
        for step in run.steps().filter(|step| step.retired) {
            let before = Core::of(&self.cpu);
            self.cpu.rip += step.instruction.bytes().len() as u64;
            self.cpu.rip &= mask;
            let mut words = step.registers;
            for write in step.instruction.register_writes() {
                let (value, rest) = words.split_at(usize::from(write.words));
                words = rest;
                let value = [value[0], value.get(1).copied().unwrap_or(0)];
                register::replace(&mut self.cpu, write.register, value).expect("a register");
            }
            let accesses = step.accesses().map(|access| {
                let (reads, writes) = (access.kind.reads(), access.kind.writes());
                (access.address, u64::from(access.size_bytes), reads, writes)
            });
            self.traced.push(Traced {
                linear: step.instruction.linear(),
                bytes: step.instruction.bytes().to_vec(),
                bits: run.block().mode().width.bits(),
                accesses: accesses.collect(),
                before,
            });
        }
        Ok(())
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        if let Event::Register { register, value } = *event {
            register::replace(&mut self.cpu, register, value).expect("a register");
        }
        Ok(())
    }
}

/// What an instruction accesses, from its bytes and the registers that KVM has before it; `None` where
/// registers alone do not tell.
fn accesses_by_registers(traced: &Traced, state: &CpuState) -> Option<Vec<Access>> {
    let mut decoder =
        Decoder::with_ip(traced.bits, &traced.bytes, traced.linear, DecoderOptions::NONE);
    let instruction = decoder.decode();
    let mnemonic = format!("{:?}", instruction.mnemonic());
    // IRET's frame is not in the decoder's tables, and only RCX afterwards tells how often a REP went.
    if mnemonic.starts_with("Iret")
        || instruction.has_rep_prefix()
        || instruction.has_repne_prefix()
    {
        return None;
    }
    let mut info = InstructionInfoFactory::new();
    let used = info.info(&instruction).used_memory().to_vec();
    let value = |register: Register, _, _| -> Option<u64> {
        if register.is_segment_register() {
            return Some(state.segments[register.number()].base);
        }
        let whole = state.gpr.get(register.full_register().number()).copied()?;
        Some(match register.size() {
            8 => whole,
            bytes => whole & ((1 << (bytes * 8)) - 1),
        })
    };
    let mut accesses = Vec::new();
    for memory in used {
        let (reads, writes) = match memory.access() {
            OpAccess::Read | OpAccess::CondRead => (true, false),
            OpAccess::Write | OpAccess::CondWrite => (false, true),
            OpAccess::ReadWrite | OpAccess::ReadCondWrite => (true, true),
            OpAccess::None | OpAccess::NoMemAccess => continue,
        };
        let address = memory.virtual_address(0, value)?;
        accesses.push((address, memory.memory_size().size() as u64, reads, writes));
    }
    accesses.sort_unstable();
    Some(accesses)
}

/// Records a guest on KVM's single-step; `None`, with the reason said, where that cannot be.
fn record(directory: &TempDir, guest: &[&str]) -> Option<PathBuf> {
    let file = directory.path().join("guest.rr");
    let mut command = Command::new(env!("CARGO_BIN_EXE_reprise-under-test"));
    command.args(["--json", "record", "--engine", "kvm", "--clock", "step", "-o"]).arg(&file);
    let recorded = command.args(guest).output().expect("the program starts");
    if !recorded.status.success() {
        reprise_tests::skipped::skipped(String::from_utf8_lossy(&recorded.stderr).trim_end());
        return None;
    }
    Some(file)
}

/// The state that KVM shows before each instruction, by its number.
fn states_on_kvm(replayable: &Replayable) -> BTreeMap<u64, CpuState> {
    let beginning = replayable.begin(Start::Run).expect("a guest");
    let make = |ram| KvmEngine::new(ram, KvmClock::Step).map(Watching::new);
    let mut machine = beginning.into_machine(make, |inputs| inputs).expect("a machine");
    machine.run_until(TICKS).expect("it replays");
    let (engine, ..) = machine.into_parts();
    engine.seen
}

fn compare(guest: &[&str], at_least: usize) {
    let directory = TempDir::new().expect("a directory");
    let Some(file) = record(&directory, guest) else { return };
    let replayable = Replayable::open(&file).expect("a recording");
    let states = states_on_kvm(&replayable);
    let mut machine = pieces::start(&replayable, Start::Run, &|_| {}).expect("a machine");
    let window = Window { from: 0, to: TICKS };
    let contents = Contents { registers: true, ..Contents::default() };
    let cpu = machine.engine().cpu_state().expect("a state");
    let listing = Listing { traced: Vec::new(), cpu };
    let control = Control::default();
    let expanded = expand(&mut machine, window, listing, contents, Threads::One, &control);
    let listing = expanded.expect("it expands").observer.traced;
    let (mut instructions, mut with_accesses) = (0, 0);
    for (tick, state) in states {
        let Some(traced) = listing.get(tick as usize) else { continue };
        let linear = state.segments[1].base.wrapping_add(state.rip);
        assert_eq!(traced.linear, linear, "{guest:?}: instruction {tick}");
        assert_eq!(
            traced.before,
            Core::of(&state),
            "{guest:?}: registers before instruction {tick}"
        );
        instructions += 1;
        if let Some(expected) = accesses_by_registers(traced, &state) {
            let mut accesses = traced.accesses.clone();
            accesses.sort_unstable();
            assert_eq!(
                accesses, expected,
                "{guest:?}: instruction {tick}, {traced:x?}, {state:x?}"
            );
            with_accesses += usize::from(!expected.is_empty());
        }
    }
    assert!(instructions >= at_least, "{guest:?}: only {instructions} instructions were compared");
    assert!(with_accesses >= at_least / 10, "{guest:?}: only {with_accesses} accessed memory");
    println!("{guest:?}: {instructions} instructions, {with_accesses} of them with accesses");
}

#[test]
fn hello_is_what_kvm_steps_through() {
    compare(&["--image", "hello"], 500);
}

#[test]
fn a_guest_in_32_bit_code_is_what_kvm_steps_through() {
    compare(&["--image", "hello32"], 300);
}

#[test]
fn interrupts_come_where_kvm_has_them() {
    compare(&["--image", "ticks", "--cmdline", "count=2"], 10_000);
}
