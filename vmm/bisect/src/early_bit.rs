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

use reprise_export::symbols::Symbols;
use reprise_machine::accessed_bits::PageTables;
use reprise_machine::engine::Engine;
use reprise_machine::inputs::Replaying;
use reprise_machine::machine::Machine;
use reprise_machine::outcome::Conclusion;
use reprise_machine::paging::{ACCESSED, PRESENT};
use reprise_machine::ram::GuestRam;
use reprise_machine::stepping::Standing;
use reprise_replay::{OnSoftware, RecordedClock, Replayable, Start};
use reprise_trace::checkpoint::PAGE_BYTES;
use reprise_trace::instructions::{Access, Contents, Mode, Step};
use serde::Serialize;

use crate::image::Image;
use crate::interval::advance;
use crate::listing::{Disassembler, Line};
use crate::ran::{Seen, Watcher, show};
use crate::search::{BisectError, Watch};

/// Suspects that are tried, the last read first: each costs a copy of RAM and a replay of the interval.
const MAX_TRIES: usize = 1_024;

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
    reader: Seen,
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

/// A machine where the interval begins, kept to go on from again and again.
struct Base<'a> {
    replayable: &'a Replayable,
    start: Start,
    from: u64,
    /// All of it; `None` where it cannot be kept, as in a sleep.
    kept: Option<(Standing, Image)>,
}

impl<'a> Base<'a> {
    fn of(
        replayable: &'a Replayable,
        parting: &Parting,
        watch: &mut dyn Watch,
    ) -> Result<Option<Self>, BisectError> {
        let Parting { start, between: (from, _), record_tick, .. } = *parting;
        let mut machine = replayable.soft_machine(start)?;
        if advance(&mut machine, from, record_tick, watch)?.is_some() {
            return Ok(None);
        }
        let kept = machine.standing()?.map(|standing| (standing, image_of(&mut machine)));
        Ok(Some(Self { replayable, start, from, kept }))
    }

    /// Another such machine, and how many records of the log lie before it; `observe` completes its inputs.
    fn machine(
        &self,
        observe: impl FnOnce(Replaying) -> Replaying,
        watch: &mut dyn Watch,
    ) -> Result<(Machine<RecordedClock, Replaying>, u64), BisectError> {
        let beginning = match &self.kept {
            Some((standing, image)) => {
                let fill = &mut |ram: &mut GuestRam| image.fill(ram);
                self.replayable.begin_from(standing.state.clone(), fill)?
            }
            None => self.replayable.begin(self.start)?,
        };
        let records = beginning.records();
        let mut machine = self.replayable.soft_machine_from(beginning, observe)?;
        match &self.kept {
            Some((standing, _)) if standing.amid_stretch => machine.go_on_amid_stretch(),
            Some(_) => {}
            None => {
                advance(&mut machine, self.from, self.from, watch)?;
            }
        }
        Ok((machine, records))
    }
}

fn image_of(machine: &mut Machine<RecordedClock, Replaying>) -> Image {
    let mut image = Image::default();
    machine.engine().visit_ram(&mut |start, piece| {
        for (address, page) in (start..).step_by(PAGE_BYTES).zip(piece.as_chunks().0) {
            image.set(address, Box::new(*page));
        }
    });
    image
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
    let Some(base) = Base::of(replayable, parting, watch)? else { return Ok(None) };
    for suspect in suspects(&base, parting, watch)?.into_iter().rev() {
        if explains(&base, parting, &suspect, watch)? {
            let line = suspect.reader.line(&mut Disassembler::new(symbols.clone()));
            return Ok(Some(EarlyBit { entry: suspect.entry, line }));
        }
    }
    Ok(None)
}

/// The last reads of entries in the interval.
fn suspects(
    base: &Base<'_>,
    parting: &Parting,
    watch: &mut dyn Watch,
) -> Result<VecDeque<Suspect>, BisectError> {
    let (from, to) = parting.between;
    let (mut machine, _) = base.machine(|inputs| inputs, watch)?;
    let mut tables = vec![PageTables::of(machine.engine(), false)?];
    advance(&mut machine, to, to, watch)?;
    tables.push(PageTables::of(machine.engine(), false)?);
    let (mut machine, _) = base.machine(|inputs| inputs, watch)?;
    let looking = Looking { tables, suspects: VecDeque::new() };
    let contents = Contents { physical: true, values: true, ..Contents::default() };
    let looking = show(&mut machine, (from, to), contents, looking)?;
    Ok(looking.map(|looking| looking.suspects).unwrap_or_default())
}

/// Whether the replay comes past the record if the bit is set before the read.
fn explains(
    base: &Base<'_>,
    parting: &Parting,
    suspect: &Suspect,
    watch: &mut dyn Watch,
) -> Result<bool, BisectError> {
    let seen = Rc::new(Cell::new(0));
    let into = seen.clone();
    let observe = |inputs: Replaying| inputs.on_record(move |_| into.set(into.get() + 1));
    let (mut machine, records) = base.machine(observe, watch)?;
    let over = machine.advance_to_instruction(suspect.reader.number)?;
    if over.is_some() || !set_accessed(&mut machine, suspect.entry) {
        return Ok(false);
    }
    let behind = parting.record_tick.max(parting.between.1).saturating_add(1);
    let over = advance(&mut machine, behind, behind, watch)?;
    let ended = over.is_some_and(|outcome| matches!(outcome.conclusion, Conclusion::Ended(_)));
    Ok(ended || records + seen.get() > parting.agreed)
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
    suspects: VecDeque<Suspect>,
}

impl Looking {
    /// The entries whose low bytes this reads, and whose bits are clear.
    fn entries_of(&self, access: Access<'_>) -> Vec<u64> {
        let Some(physical) = access.physical.filter(|_| access.kind.reads()) else {
            return Vec::new();
        };
        let words = usize::from(access.size_bytes).div_ceil(8);
        let read = (physical..).step_by(8).zip(access.values).take(words);
        let clear = read.filter(|(entry, value)| {
            let is_entry = || self.tables.iter().any(|tables| tables.is_entry(*entry));
            **value & (PRESENT | ACCESSED) == PRESENT && is_entry()
        });
        clear.map(|(entry, _)| entry).collect()
    }

    /// An entry that one instruction reads again and again, in a loop that waits say, is one suspect: its last read.
    fn suspect(&mut self, suspect: Suspect) {
        let place = |it: &Suspect| (it.entry, it.reader.address);
        self.suspects.retain(|it| place(it) != place(&suspect));
        if self.suspects.len() == MAX_TRIES {
            self.suspects.pop_front();
        }
        self.suspects.push_back(suspect);
    }
}

impl Watcher for Looking {
    fn see(&mut self, number: u64, mode: Mode, step: &Step<'_>) {
        let entries: Vec<u64> =
            step.accesses().flat_map(|access| self.entries_of(access)).collect();
        for entry in entries {
            self.suspect(Suspect { entry, reader: Seen::of(number, mode, step) });
        }
    }
}
