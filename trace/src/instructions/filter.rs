//! Leaves parts of a trace out and hands on the rest, with an [`Event::Skipped`] wherever something
//! is missing and counts of what was left out and why.

mod stretch;

use std::ops::Range;

use super::TraceError;
use super::event::Event;
use super::idle::SkipIdle;
use super::page_walk::{PageWalk, WalkCause};
use super::run::{Observer, PlainRuns, Position, Run};

pub use super::idle::MAX_IDLE_INSTRUCTIONS;

/// Code of which privilege to keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privilege {
    /// CPL 3.
    User,
    /// CPL 0 to 2.
    Kernel,
}

/// Keep the first `length` of every `period` instructions, counted from the machine's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Instructions from one sample's beginning to the next one's.
    pub period: u64,
    /// Instructions of a sample.
    pub length: u64,
}

/// What to keep: what fits all that is given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Instructions by number since the machine started. Where a tick is an instruction these are
    /// ticks.
    pub instructions: Option<Range<u64>>,
    /// Only user or only kernel code.
    pub privilege: Option<Privilege>,
    /// Only the address space with this page-table root: CR3 without its low 12 bits and bit 63.
    pub cr3: Option<u64>,
    /// Instructions whose linear address is in this range.
    pub linear: Option<Range<u64>>,
    /// Only samples.
    pub sample: Option<Sample>,
    /// Not what an idle guest does from one HLT to the next: see [`MAX_IDLE_INSTRUCTIONS`].
    pub skip_idle: bool,
}

/// The page-table root in a value of CR3: without PCID, cache control, and the no-flush bit.
pub fn page_table_root(cr3: u64) -> u64 {
    cr3 & 0x000f_ffff_ffff_f000
}

/// How a note on what was left out starts.
const NOTE_START: &str = "left out: ";

/// Instructions left out, by the first reason that applies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// Of an idle guest.
    pub idle: u64,
    /// Outside the window.
    pub outside_window: u64,
    /// Of another privilege.
    pub other_privilege: u64,
    /// In another address space.
    pub other_address_space: u64,
    /// Outside the range of addresses.
    pub outside_range: u64,
    /// Between samples.
    pub between_samples: u64,
    /// Events that belonged to code that was left out.
    pub events: u64,
}

impl LeftOut {
    /// All instructions that were left out.
    pub fn instructions(&self) -> u64 {
        self.idle
            + self.outside_window
            + self.other_privilege
            + self.other_address_space
            + self.outside_range
            + self.between_samples
    }

    /// A line for each reason that applied.
    pub fn notes(&self) -> Vec<String> {
        let mut all = *self;
        let reasons = all.reasons();
        let applied = reasons.iter().filter(|(count, _)| **count > 0);
        applied.map(|(count, what)| format!("{NOTE_START}{count} {what}")).collect()
    }

    /// Adds what was left out elsewhere.
    pub fn add(&mut self, mut other: Self) {
        for ((count, _), (more, _)) in self.reasons().into_iter().zip(other.reasons()) {
            *count = count.saturating_add(*more);
        }
    }

    /// Adds what a line of [`LeftOut::notes`] says; false if it is none.
    pub fn add_note(&mut self, note: &str) -> bool {
        let parts = note.strip_prefix(NOTE_START).and_then(|rest| rest.split_once(' '));
        let Some((Ok(more), what)) = parts.map(|(count, what)| (count.parse::<u64>(), what)) else {
            return false;
        };
        match self.reasons().into_iter().find(|(_, reason)| *reason == what) {
            Some((count, _)) => *count = count.saturating_add(more),
            None => return false,
        }
        true
    }

    fn reasons(&mut self) -> [(&mut u64, &'static str); 7] {
        [
            (&mut self.idle, "instructions of an idle guest"),
            (&mut self.outside_window, "instructions outside the window"),
            (&mut self.other_privilege, "instructions of the other privilege"),
            (&mut self.other_address_space, "instructions in other address spaces"),
            (&mut self.outside_range, "instructions outside the address range"),
            (&mut self.between_samples, "instructions between samples"),
            (&mut self.events, "events of code that was left out"),
        ]
    }
}

/// Hands on what a [`Selection`] keeps.
#[derive(Debug)]
pub struct Filter<O> {
    selecting: SkipIdle<Parts<O>>,
}

impl<O: Observer> Filter<O> {
    /// Before `observer`.
    pub fn new(selection: Selection, observer: O) -> Self {
        let skip_idle = selection.skip_idle;
        Self { selecting: SkipIdle::new(skip_idle, Parts::new(selection, observer)) }
    }

    /// What was left out so far.
    pub fn left_out(&self) -> LeftOut {
        let mut all = *self.selecting.left_out();
        all.add(self.selecting.observer().left_out);
        all
    }

    /// Whether nothing that may follow is kept: reading on only counts.
    pub fn is_past_window(&self) -> bool {
        self.selecting.observer().is_past_window()
    }

    /// The observer behind it.
    pub fn observer(&self) -> &O {
        &self.selecting.observer().observer
    }

    /// The observer behind it.
    pub fn into_observer(self) -> O {
        self.selecting.into_observer().observer
    }
}

impl<O: Observer> Observer for Filter<O> {
    fn begin(&mut self, position: &Position) -> Result<(), TraceError> {
        self.selecting.begin(position)
    }

    fn new_blocks(&mut self) {
        self.selecting.new_blocks();
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        self.selecting.run(run)
    }

    fn runs(&mut self, runs: &mut PlainRuns<'_>) -> Result<(), TraceError> {
        self.selecting.runs(runs)
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        self.selecting.event(event)
    }

    fn end(&mut self) -> Result<(), TraceError> {
        self.selecting.end()
    }
}

/// Hands on what a [`Selection`] keeps, but for idle guests.
#[derive(Debug)]
struct Parts<O> {
    selection: Selection,
    /// The selection leaves nothing out.
    keeps_all: bool,
    left_out: LeftOut,
    position: Position,
    observer: O,
    /// Instructions left out since the observer was last told, and where they began.
    skipped: u64,
    skipped_from: Option<u64>,
    /// Deliveries, returns and walks for fetches since the last run: they go with the run behind them.
    held: Vec<Event>,
    /// The end of the last run was handed on.
    kept_last: bool,
    /// What the blocks are to it, by number.
    verdicts: Vec<stretch::Verdict>,
}

impl<O: Observer> Parts<O> {
    fn new(selection: Selection, observer: O) -> Self {
        Self {
            keeps_all: Selection { skip_idle: false, ..selection.clone() } == Selection::default(),
            selection,
            left_out: LeftOut::default(),
            position: Position::default(),
            observer,
            skipped: 0,
            skipped_from: None,
            held: Vec::new(),
            kept_last: true,
            verdicts: Vec::new(),
        }
    }

    fn is_past_window(&self) -> bool {
        let window = self.selection.instructions.as_ref();
        window.is_some_and(|window| self.position.instruction >= window.end)
    }

    /// Whether a whole run is left out, and the reason's counter.
    fn reason_for_run(&mut self, run: &Run<'_>) -> Option<&mut u64> {
        let Selection { privilege, cr3, .. } = &self.selection;
        let is_user = run.block().mode().cpl == 3;
        let root = page_table_root(self.position.cr3);
        if privilege.is_some_and(|wanted| (wanted == Privilege::User) != is_user) {
            Some(&mut self.left_out.other_privilege)
        } else if cr3.is_some_and(|wanted| page_table_root(wanted) != root) {
            Some(&mut self.left_out.other_address_space)
        } else {
            None
        }
    }

    /// Notes that so many instructions are left out, from one at a linear address on.
    fn skip(&mut self, instructions: u64, linear: impl FnOnce() -> Option<u64>) {
        if self.skipped_from.is_none() {
            let delivered_at = self.held.iter().find_map(|event| match event {
                Event::Delivery { address, .. } => Some(*address),
                _ => None,
            });
            self.skipped_from = delivered_at.or_else(linear);
        }
        self.skipped += instructions;
        self.left_out.events += self.held.len() as u64;
        self.held.clear();
        self.kept_last = false;
    }

    /// Tells the observer what was left out; false if that is nothing.
    fn tell_skipped(&mut self) -> Result<bool, TraceError> {
        let address = self.skipped_from.take();
        if address.is_some() {
            let instructions = std::mem::take(&mut self.skipped);
            self.observer.event(&Event::Skipped { instructions, address })?;
        }
        Ok(address.is_some())
    }

    /// Tells what was left out, and then the events that go with the run behind them.
    fn catch_up(&mut self) -> Result<(), TraceError> {
        let left = self.tell_skipped()?;
        for event in std::mem::take(&mut self.held) {
            // A return from code that was left out leads from nowhere.
            if left && matches!(event, Event::Return { .. }) {
                self.left_out.events += 1;
            } else {
                self.observer.event(&event)?;
            }
        }
        Ok(())
    }

    fn keep(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        self.catch_up()?;
        self.kept_last = true;
        self.observer.run(run)
    }

    /// Hands on the parts of a run that the window, the range and the samples keep.
    fn divide(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        let (mut index, end) = (run.first(), run.first() + run.retired());
        while index < end {
            let (until, counter) = self.stretch(run, index, end);
            if let Some(counter) = counter {
                *counter += (until - index) as u64;
                self.skip((until - index) as u64, || linear_of(run, index));
            } else if (index, until) == (run.first(), end) {
                return self.keep(run);
            } else {
                self.keep(&run.part(index, until))?;
            }
            index = until;
        }
        Ok(())
    }

    /// From instruction `index` of the block on: up to where the same holds, and the counter of the
    /// reason to leave that out.
    fn stretch(&mut self, run: &Run<'_>, index: usize, end: usize) -> (usize, Option<&mut u64>) {
        let number = self.position.instruction + (index - run.first()) as u64;
        let mut until = end;
        let mut limit = |distance: u64| until = until.min(index.saturating_add(distance as usize));
        if let Some(window) = &self.selection.instructions {
            if number < window.start || number >= window.end {
                if number < window.start {
                    limit(window.start - number);
                }
                return (until, Some(&mut self.left_out.outside_window));
            }
            limit(window.end - number);
        }
        if let Some(range) = &self.selection.linear {
            let inside = |index| {
                let linear = run.block().instruction(index).map(|one| one.linear());
                linear.is_some_and(|linear| range.contains(&linear))
            };
            let here = inside(index);
            let same = (index..until).take_while(|index| inside(*index) == here).count();
            until = index + same;
            if !here {
                return (until, Some(&mut self.left_out.outside_range));
            }
        }
        if let Some(Sample { period, length }) = self.selection.sample {
            let period = period.max(1);
            let phase = number % period;
            let here = phase < length;
            let distance = if here { length.min(period) } else { period } - phase;
            until = until.min(index.saturating_add(distance as usize));
            if !here {
                return (until, Some(&mut self.left_out.between_samples));
            }
        }
        (until, None)
    }
}

/// Linear address of an instruction of a run's block.
fn linear_of(run: &Run<'_>, index: usize) -> Option<u64> {
    run.block().instruction(index).map(|one| one.linear())
}

impl<O: Observer> Observer for Parts<O> {
    fn begin(&mut self, position: &Position) -> Result<(), TraceError> {
        self.position = *position;
        self.observer.begin(position)
    }

    fn new_blocks(&mut self) {
        self.verdicts.clear();
        self.observer.new_blocks();
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        if self.keeps_all {
            return self.observer.run(run);
        }
        let retired = run.retired() as u64;
        if let Some(counter) = self.reason_for_run(run) {
            *counter += retired;
            self.skip(retired, || linear_of(run, run.first()));
        } else if retired == 0 {
            // Only accesses of an instruction that did not retire: it goes with what is before it.
            if self.kept_last {
                self.keep(run)?;
            }
        } else {
            self.divide(run)?;
        }
        self.position.pass_run(run);
        Ok(())
    }

    fn runs(&mut self, runs: &mut PlainRuns<'_>) -> Result<(), TraceError> {
        if self.keeps_all {
            return self.observer.runs(runs);
        }
        self.stretches(runs)
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        if self.keeps_all {
            return self.observer.event(event);
        }
        self.position.pass_event(event);
        match event {
            // A gap within what is left out here is part of that.
            Event::Skipped { instructions, .. } if self.skipped_from.is_some() => {
                self.skipped = self.skipped.saturating_add(*instructions);
                Ok(())
            }
            Event::Delivery { .. }
            | Event::Return { .. }
            | Event::PageWalk(PageWalk { cause: WalkCause::Fetch, .. }) => {
                self.held.push(*event);
                Ok(())
            }
            // What a delivery writes goes with it.
            Event::MemoryWrite { .. } | Event::Register { .. } if !self.held.is_empty() => {
                self.held.push(*event);
                Ok(())
            }
            of_run if of_run.is_of_run() && !self.kept_last => {
                self.left_out.events += 1;
                Ok(())
            }
            _ => self.observer.event(event),
        }
    }

    fn end(&mut self) -> Result<(), TraceError> {
        self.catch_up()?;
        self.observer.end()
    }
}
