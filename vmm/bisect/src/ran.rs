//! What a replay executed in an interval: its first and last instructions, and those whose results may
//! differ from one machine to the next.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic};
use reprise_cpu::engine::SoftEngine;
use reprise_expand::{Control, ExpandError, Threads, Window, expand};
use reprise_export::symbols::Symbols;
use reprise_replay::{Replayable, Start, verification};
use reprise_trace::instructions::{Contents, Event, Observer, Position, Run, TraceError};
use serde::Serialize;

use crate::cause::APPROXIMATE;
use crate::listing::{Disassembler, Line};
use crate::search::BisectError;

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
}

/// Instructions of a kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Interest {
    /// What they have in common.
    pub kind: &'static str,
    /// How many ran.
    pub count: u64,
    /// The first one's tick.
    pub tick: u64,
    /// Its linear address.
    pub address: u64,
}

impl Ran {
    /// The instructions of a kind, if there are any.
    pub fn of_interest(&self, kind: &str) -> Option<&Interest> {
        self.interest.iter().find(|interest| interest.kind == kind)
    }
}

/// Shows what a replay from `start` executes behind one tick up to another.
///
/// # Errors
/// The recording cannot be used, or an engine fails.
pub(crate) fn between(
    replayable: &Replayable,
    start: Start,
    (from, to): (u64, u64),
    symbols: &Arc<Symbols>,
) -> Result<Ran, BisectError> {
    let verification = verification(replayable.recording().header(), replayable.course(), "soft");
    let beginning = replayable.begin(start)?;
    let mut machine =
        beginning.into_machine(SoftEngine::new, |inputs| inputs.verifying(verification))?;
    let window = Window { from, to };
    let contents = Contents::default();
    let watching = Watching::default();
    let control = Control::default();
    let expanded = expand(&mut machine, window, watching, contents, Threads::One, &control);
    let watching = match expanded {
        Ok(expanded) => expanded.observer,
        Err(ExpandError::Machine(error)) => return Err(error.into()),
        Err(ExpandError::Replay(error)) => return Err(error.into()),
        // It is shown to nobody who could fail.
        Err(_) => Watching::default(),
    };
    let mut disassembler = Disassembler::new(symbols.clone());
    let mut lines = |seen: Vec<Seen>| -> Vec<Line> {
        let shown = seen.iter().map(|seen| {
            disassembler.decoded(seen.tick, seen.cpl, seen.address, &seen.bytes, seen.bits)
        });
        shown.collect()
    };
    Ok(Ran {
        instructions: watching.instructions,
        first: lines(watching.first),
        last: lines(watching.last.into()),
        interest: watching.interest.into_values().collect(),
    })
}

#[derive(Clone, Debug)]
struct Seen {
    tick: u64,
    cpl: u8,
    address: u64,
    bytes: Vec<u8>,
    bits: u32,
}

/// Sees instructions go by.
#[derive(Debug, Default)]
struct Watching {
    tick: u64,
    instructions: u64,
    first: Vec<Seen>,
    last: VecDeque<Seen>,
    interest: BTreeMap<&'static str, Interest>,
    /// What decoding an instruction's bytes found, kept because loops come back to them.
    known: BTreeMap<(u32, Vec<u8>), Option<&'static str>>,
}

impl Watching {
    fn see(&mut self, seen: Seen) {
        let key = (seen.bits, seen.bytes.clone());
        let kind = *self.known.entry(key).or_insert_with(|| {
            let options = DecoderOptions::NONE;
            kind_of(&Decoder::with_ip(seen.bits, &seen.bytes, seen.address, options).decode())
        });
        if let Some(kind) = kind {
            let (tick, address) = (seen.tick, seen.address);
            let interest = Interest { kind, count: 0, tick, address };
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

impl Observer for Watching {
    fn begin(&mut self, position: &Position) -> Result<(), TraceError> {
        self.tick = position.instruction;
        Ok(())
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        let mode = run.block().mode();
        for step in run.steps().filter(|step| step.retired) {
            self.see(Seen {
                tick: self.tick,
                cpl: mode.cpl,
                address: step.instruction.linear(),
                bytes: step.instruction.bytes().to_vec(),
                bits: mode.width.bits(),
            });
            self.tick += 1;
            self.instructions += 1;
        }
        Ok(())
    }

    fn event(&mut self, _event: &Event) -> Result<(), TraceError> {
        Ok(())
    }
}

/// What makes an instruction worth naming; `None` for nearly all.
fn kind_of(instruction: &Instruction) -> Option<&'static str> {
    Some(match instruction.mnemonic() {
        Mnemonic::Rdtsc | Mnemonic::Rdtscp => "time-stamp counter read",
        Mnemonic::In | Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => "port read",
        Mnemonic::Cpuid | Mnemonic::Rdpmc | Mnemonic::Rdrand | Mnemonic::Rdseed => {
            "processor asked"
        }
        Mnemonic::Rdmsr => "model-specific register read",
        mnemonic if APPROXIMATE.contains(&mnemonic) => "approximate result",
        _ if instruction.rflags_undefined() != 0 => "flags left undefined",
        _ => return None,
    })
}
