//! Looks for the accessed bit that a recorded CPU set early, and its guest then saw.
//!
//! The software CPU sets a bit only for an instruction that uses the page. So where the guest of hardware went another
//! way, each entry of a page table that the replay's guest reads in the interval while its bit is clear is a suspect.
//! The replay is made again with the bit set right before the read; where it then comes past the record that it did
//! not agree with, that is the cause.

use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use reprise_expand::{Control, ExpandError, Threads, Window, expand};
use reprise_export::symbols::Symbols;
use reprise_machine::accessed_bits::PageTables;
use reprise_machine::engine::Engine;
use reprise_machine::inputs::Replaying;
use reprise_machine::machine::Machine;
use reprise_machine::outcome::Conclusion;
use reprise_machine::paging::{ACCESSED, PRESENT};
use reprise_replay::{OnSoftware, RecordedClock, Replayable, Start};
use reprise_trace::instructions::{Contents, Event, Observer, Position, Run, TraceError};
use serde::Serialize;

use crate::interval::advance;
use crate::listing::{Disassembler, Line};
use crate::search::{BisectError, Watch};

/// Suspects that are tried, the last read first: each costs a replay.
const MAX_TRIES: usize = 64;

/// An accessed bit that explains a divergence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EarlyBit {
    /// The guest-physical address of the page table's entry.
    pub entry: u64,
    /// The instruction that reads it.
    pub line: Line,
}

/// An instruction that reads an entry whose accessed bit is clear.
#[derive(Clone, Debug)]
struct Suspect {
    entry: u64,
    number: u64,
    cpl: u8,
    address: u64,
    bytes: Vec<u8>,
    bits: u32,
}

/// Where the replay diverges.
pub(crate) struct Parting {
    /// Where the replays begin.
    pub(crate) start: Start,
    /// The ticks between which the machines part.
    pub(crate) between: (u64, u64),
    /// The tick of the record that did not agree.
    pub(crate) record_tick: u64,
    /// Records of the log that agreed before it.
    pub(crate) agreed: u64,
}

/// Tries the suspects, and gives the first that explains the divergence.
///
/// # Errors
/// The recording cannot be used, an engine fails, or somebody asked to stop.
pub(crate) fn find(
    replayable: &Replayable,
    parting: &Parting,
    symbols: &Arc<Symbols>,
    watch: &mut dyn Watch,
) -> Result<Option<EarlyBit>, BisectError> {
    for suspect in suspects(replayable, parting, watch)?.into_iter().rev() {
        if explains(replayable, parting, &suspect, watch)? {
            let Suspect { entry, number, cpl, address, bytes, bits } = suspect;
            let mut disassembler = Disassembler::new(symbols.clone());
            let line = disassembler.decoded(number, cpl, address, &bytes, bits);
            return Ok(Some(EarlyBit { entry, line }));
        }
    }
    Ok(None)
}

/// The last reads of entries in the interval.
fn suspects(
    replayable: &Replayable,
    parting: &Parting,
    watch: &mut dyn Watch,
) -> Result<VecDeque<Suspect>, BisectError> {
    let Parting { start, between: (from, to), .. } = *parting;
    let mut machine = replayable.soft_machine(start)?;
    if advance(&mut machine, from, to, watch)?.is_some() {
        return Ok(VecDeque::new());
    }
    let mut tables = vec![PageTables::of(machine.engine(), false)?];
    advance(&mut machine, to, to, watch)?;
    tables.push(PageTables::of(machine.engine(), false)?);
    let mut machine = replayable.soft_machine(start)?;
    advance(&mut machine, from, to, watch)?;
    let looking = Looking { tables, number: 0, suspects: VecDeque::new() };
    let contents = Contents { physical: true, values: true, ..Contents::default() };
    let (window, control) = (Window { from, to }, Control::default());
    match expand(&mut machine, window, looking, contents, Threads::One, &control) {
        Ok(expanded) => Ok(expanded.observer.suspects),
        Err(ExpandError::Machine(error)) => Err(error.into()),
        Err(ExpandError::Replay(error)) => Err(error.into()),
        // It is shown to nobody who could fail.
        Err(_) => Ok(VecDeque::new()),
    }
}

/// Whether the replay comes past the record if the bit is set before the read.
fn explains(
    replayable: &Replayable,
    parting: &Parting,
    suspect: &Suspect,
    watch: &mut dyn Watch,
) -> Result<bool, BisectError> {
    let agreed = Rc::new(Cell::new(replayable.begin(parting.start)?.records()));
    let into = agreed.clone();
    let observe = |inputs: Replaying| inputs.on_record(move |_| into.set(into.get() + 1));
    let mut machine = replayable.soft_machine_with(parting.start, observe)?;
    let begins_behind = machine.engine().instructions().is_some_and(|here| here > suspect.number);
    if begins_behind || machine.advance_to_instruction(suspect.number)?.is_some() {
        return Ok(false);
    }
    if !set_accessed(&mut machine, suspect.entry) {
        return Ok(false);
    }
    let behind = parting.record_tick.max(parting.between.1).saturating_add(1);
    let over = advance(&mut machine, behind, behind, watch)?;
    let ended = over.is_some_and(|outcome| matches!(outcome.conclusion, Conclusion::Ended(_)));
    Ok(ended || agreed.get() > parting.agreed)
}

/// Sets the bit; false if it is set or there is nothing.
fn set_accessed(machine: &mut Machine<RecordedClock, Replaying>, entry: u64) -> bool {
    let mut low = [0];
    machine.engine().read_ram(entry, &mut low);
    let is_clear = u64::from(low[0]) & (PRESENT | ACCESSED) == PRESENT;
    if is_clear {
        machine.engine().software().write_ram(entry, &[low[0] | ACCESSED as u8]);
    }
    is_clear
}

/// Sees instructions go by.
struct Looking {
    /// As the interval begins and ends.
    tables: Vec<PageTables>,
    number: u64,
    suspects: VecDeque<Suspect>,
}

impl Looking {
    /// The entry whose low byte this reads, if its bit is clear.
    fn entry_of(&self, physical: Option<u64>, values: &[u64]) -> Option<u64> {
        let (entry, value) = (physical?, values.first()?);
        let is_clear = value & (PRESENT | ACCESSED) == PRESENT;
        let is_entry = || self.tables.iter().any(|tables| tables.is_entry(entry));
        (is_clear && is_entry()).then_some(entry)
    }
}

impl Observer for Looking {
    fn begin(&mut self, position: &Position) -> Result<(), TraceError> {
        self.number = position.instruction;
        Ok(())
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        let mode = run.block().mode();
        for step in run.steps().filter(|step| step.retired) {
            for access in step.accesses().filter(|access| access.kind.reads()) {
                let Some(entry) = self.entry_of(access.physical, access.values) else { continue };
                if self.suspects.len() == MAX_TRIES {
                    self.suspects.pop_front();
                }
                self.suspects.push_back(Suspect {
                    entry,
                    number: self.number,
                    cpl: mode.cpl,
                    address: step.instruction.linear(),
                    bytes: step.instruction.bytes().to_vec(),
                    bits: mode.width.bits(),
                });
            }
            self.number += 1;
        }
        Ok(())
    }

    fn event(&mut self, _event: &Event) -> Result<(), TraceError> {
        Ok(())
    }
}
