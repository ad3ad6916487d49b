//! What a replay executed in an interval: its first and last instructions, and those whose results may
//! differ from one machine to the next.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic};
use reprise_cpu::latitude::{approximates, rflags_of, undefined_flags};
use reprise_expand::{Control, ExpandError, Threads, Window, expand};
use reprise_export::symbols::Symbols;
use reprise_machine::inputs::Replaying;
use reprise_machine::machine::Machine;
use reprise_replay::{RecordedClock, Replayable, Start};
use reprise_trace::instructions::{
    Contents, Event, Mode, Observer, Position, Run, Step, TraceError,
};
use serde::Serialize;

use crate::interval::advance;
use crate::listing::{Disassembler, Line};
use crate::place::ARITHMETIC_FLAGS;
use crate::search::{BisectError, Watch};

/// Kinds that causes ask for.
pub(crate) const TIME_STAMP_READ: &str = "time-stamp counter read";
pub(crate) const APPROXIMATE_RESULT: &str = "approximate result";
pub(crate) const PROCESSOR_ASKED: &str = "processor asked";
/// Instructions shown of each end of an interval.
const SHOWN: usize = 8;

/// What ran.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Ran {
    /// Instructions that retired.
    pub instructions: u64,
    /// The first of them.
    pub first: Vec<Line>,
    /// The last of them, as far as they are not among the first.
    pub last: Vec<Line>,
    /// Instructions whose results may differ, by kind.
    pub interest: Vec<Interest>,
    /// Who set each of the arithmetic flags last, from CF to OF.
    pub flags: Vec<FlagWriter>,
}

/// The last instruction that changed a flag.
#[derive(Clone, Debug, Serialize)]
pub struct FlagWriter {
    /// The flag's bit in RFLAGS.
    pub bit: u32,
    /// The instruction.
    pub line: Line,
    /// It leaves the flag undefined.
    pub undefined: bool,
}

/// Instructions of a kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Interest {
    /// What they have in common.
    pub kind: &'static str,
    /// How many ran.
    pub count: u64,
    /// Instructions before the first one.
    pub instruction: u64,
    /// Its linear address.
    pub address: u64,
}

impl Ran {
    /// The instructions of a kind, if there are any.
    pub fn of_interest(&self, kind: &str) -> Option<&Interest> {
        self.interest.iter().find(|interest| interest.kind == kind)
    }
}

/// Shows what a replay from `start` executes from one tick to another.
///
/// # Errors
/// The recording cannot be used, or an engine fails.
pub(crate) fn between(
    replayable: &Replayable,
    start: Start,
    (from, to): (u64, u64),
    symbols: &Arc<Symbols>,
    watch: &mut dyn Watch,
) -> Result<Ran, BisectError> {
    let mut machine = replayable.soft_machine(start)?;
    if advance(&mut machine, from, to, watch)?.is_some() {
        return Ok(Ran::default());
    }
    let watching = Watching::default();
    let watching = show(&mut machine, (from, to), Contents::default(), watching)?;
    let watching = watching.unwrap_or_default();
    let mut disassembler = Disassembler::new(symbols.clone());
    let mut lines = |seen: Vec<Seen>| -> Vec<Line> {
        seen.iter().map(|seen| seen.line(&mut disassembler)).collect()
    };
    let mut flags = Vec::new();
    for (bit, writer) in ARITHMETIC_FLAGS.into_iter().zip(watching.flags) {
        if let Some((seen, undefined)) = writer
            && let Some(line) = lines(vec![seen]).pop()
        {
            flags.push(FlagWriter { bit, line, undefined });
        }
    }
    Ok(Ran {
        instructions: watching.instructions,
        first: lines(watching.first),
        last: lines(watching.last.into()),
        flags,
        interest: watching.interest.into_values().collect(),
    })
}

/// Sees each instruction that retires.
pub(crate) trait Watcher: Send + 'static {
    /// So many instructions lie before it.
    fn see(&mut self, number: u64, mode: Mode, step: &Step<'_>);
}

/// Shows a watcher what a machine executes from where it stands, between two ticks; `None` if that failed, which
/// it does not where nothing is written.
pub(crate) fn show<W: Watcher>(
    machine: &mut Machine<RecordedClock, Replaying>,
    (from, to): (u64, u64),
    contents: Contents,
    watcher: W,
) -> Result<Option<W>, BisectError> {
    let (window, control) = (Window { from, to }, Control::default());
    let shown = Shown { number: 0, watcher };
    match expand(machine, window, shown, contents, Threads::One, &control) {
        Ok(expanded) => Ok(Some(expanded.observer.watcher)),
        Err(ExpandError::Machine(error)) => Err(error.into()),
        Err(ExpandError::Replay(error)) => Err(error.into()),
        Err(_) => Ok(None),
    }
}

/// Counts the instructions that a watcher sees.
struct Shown<W> {
    number: u64,
    watcher: W,
}

impl<W: Watcher> Observer for Shown<W> {
    fn begin(&mut self, position: &Position) -> Result<(), TraceError> {
        self.number = position.instruction;
        Ok(())
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        let mode = run.block().mode();
        for step in run.steps().filter(|step| step.retired) {
            self.watcher.see(self.number, mode, &step);
            self.number += 1;
        }
        Ok(())
    }

    fn event(&mut self, _event: &Event) -> Result<(), TraceError> {
        Ok(())
    }
}

/// An instruction that went by.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    /// Instructions before it.
    pub(crate) number: u64,
    cpl: u8,
    /// Linear.
    pub(crate) address: u64,
    bytes: Vec<u8>,
    bits: u32,
}

impl Seen {
    pub(crate) fn of(number: u64, mode: Mode, step: &Step<'_>) -> Self {
        Self {
            number,
            cpl: mode.cpl,
            address: step.instruction.linear(),
            bytes: step.instruction.bytes().to_vec(),
            bits: mode.width.bits(),
        }
    }

    pub(crate) fn line(&self, disassembler: &mut Disassembler) -> Line {
        let Self { number, cpl, address, bytes, bits } = self;
        disassembler.decoded(*number, *cpl, *address, bytes, *bits)
    }
}

/// Sees instructions go by.
#[derive(Debug, Default)]
struct Watching {
    instructions: u64,
    first: Vec<Seen>,
    last: VecDeque<Seen>,
    interest: BTreeMap<&'static str, Interest>,
    /// What decoding an instruction's bytes found, kept because loops come back to them.
    known: BTreeMap<(u32, Vec<u8>), Known>,
    /// By arithmetic flag: who changed it last, and whether it is undefined since.
    flags: [Option<(Seen, bool)>; ARITHMETIC_FLAGS.len()],
}

/// What an instruction is to whoever watches.
#[derive(Clone, Copy, Debug)]
struct Known {
    kind: Option<&'static str>,
    /// Bits of RFLAGS that it changes.
    modified: u64,
    /// Those of them that it leaves undefined.
    undefined: u64,
}

impl Known {
    fn of(instruction: &Instruction) -> Self {
        let undefined = undefined_flags(instruction);
        let modified = rflags_of(instruction.rflags_modified()) | undefined;
        Self { kind: kind_of(instruction), modified, undefined }
    }
}

impl Watching {
    fn note(&mut self, seen: Seen) {
        let key = (seen.bits, seen.bytes.clone());
        let Known { kind, modified, undefined } = *self.known.entry(key).or_insert_with(|| {
            let options = DecoderOptions::NONE;
            Known::of(&Decoder::with_ip(seen.bits, &seen.bytes, seen.address, options).decode())
        });
        for (bit, writer) in ARITHMETIC_FLAGS.into_iter().zip(&mut self.flags) {
            if modified >> bit & 1 != 0 {
                *writer = Some((seen.clone(), undefined >> bit & 1 != 0));
            }
        }
        if let Some(kind) = kind {
            let (instruction, address) = (seen.number, seen.address);
            let interest = Interest { kind, count: 0, instruction, address };
            self.interest.entry(kind).or_insert(interest).count += 1;
        }
        if self.first.len() < SHOWN {
            self.first.push(seen);
            return;
        }
        if self.last.len() == SHOWN {
            self.last.pop_front();
        }
        self.last.push_back(seen);
    }
}

impl Watcher for Watching {
    fn see(&mut self, number: u64, mode: Mode, step: &Step<'_>) {
        self.note(Seen::of(number, mode, step));
        self.instructions += 1;
    }
}

/// What makes an instruction worth naming; `None` for nearly all.
fn kind_of(instruction: &Instruction) -> Option<&'static str> {
    Some(match instruction.mnemonic() {
        Mnemonic::Rdtsc | Mnemonic::Rdtscp => TIME_STAMP_READ,
        Mnemonic::In | Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => "port read",
        Mnemonic::Cpuid | Mnemonic::Rdpmc | Mnemonic::Rdrand | Mnemonic::Rdseed => PROCESSOR_ASKED,
        Mnemonic::Rdmsr => "model-specific register read",
        mnemonic if approximates(mnemonic) => APPROXIMATE_RESULT,
        _ => return None,
    })
}
