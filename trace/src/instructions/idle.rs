//! Leaves out what a guest executes while it has nothing to do.
//!
//! An idle guest sleeps in HLT, in which nothing runs; what a trace has of it is the timer's handler that
//! wakes it and the way back to HLT. A *stretch* is what runs from behind a HLT up to and with the next
//! one. It is idle if all of it ran at CPL 0 to 2, in at most [`MAX_IDLE_INSTRUCTIONS`], and nothing but
//! the interrupt controllers and timers was accessed: whoever looks at a console or a disk has work to
//! do, in whatever privilege. Whether a stretch is idle shows at its end, so it is held back until then.

use std::collections::HashMap;

use super::TraceError;
use super::block::Blocks;
use super::event::Event;
use super::filter::LeftOut;
use super::run::{Observer, PlainRuns, Position, Run};

/// The most instructions of an idle stretch. Linux takes some thousands to serve a timer interrupt and
/// go back to sleep, and some ten thousands if a kernel thread then has its turn.
pub const MAX_IDLE_INSTRUCTIONS: u64 = 100_000;
/// The most entries and accesses that are held back together: a stretch with more is taken for work.
const MAX_HELD: usize = 1 << 20;

/// Whether a PC has an interrupt controller, a timer or the real-time clock at a port, or, at 80,
/// nothing, which kernels write to for the time that it takes.
fn is_timekeeping(port: u16) -> bool {
    matches!(
        port,
        0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 | 0x40..=0x43 | 0x61 | 0x70 | 0x71 | 0x80
    )
}

/// Whether an instruction is HLT, with whatever prefixes.
fn is_halt(bytes: &[u8]) -> bool {
    let is_prefix = |byte: &u8| matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf2 | 0xf3);
    bytes.split_last().is_some_and(|(last, before)| *last == 0xf4 && before.iter().all(is_prefix))
}

fn ends_in_halt(run: &Run<'_>) -> bool {
    let last = run.retired().checked_sub(1).map(|last| run.first() + last);
    last.and_then(|last| run.block().instruction(last)).is_some_and(|last| is_halt(last.bytes()))
}

/// Hands on all but idle stretches.
#[derive(Debug)]
pub(super) struct SkipIdle<O> {
    is_on: bool,
    observer: O,
    /// The last run ended in HLT: what follows is a stretch, and held back.
    in_stretch: bool,
    /// The stretch has come to its HLT. What its last run did beside may still be told.
    is_complete: bool,
    held: Held,
    left_out: LeftOut,
    /// Instructions left out since the observer was last told, and where they began.
    skipped: u64,
    skipped_from: Option<u64>,
}

impl<O: Observer> SkipIdle<O> {
    /// Before `observer`; unless it is on, everything goes on at once.
    pub(super) fn new(is_on: bool, observer: O) -> Self {
        Self {
            is_on,
            observer,
            in_stretch: false,
            is_complete: false,
            held: Held::default(),
            left_out: LeftOut::default(),
            skipped: 0,
            skipped_from: None,
        }
    }

    pub(super) fn left_out(&self) -> &LeftOut {
        &self.left_out
    }

    pub(super) fn observer(&self) -> &O {
        &self.observer
    }

    pub(super) fn into_observer(self) -> O {
        self.observer
    }

    /// Tells the observer what was left out.
    fn tell_skipped(&mut self) -> Result<(), TraceError> {
        if self.skipped > 0 {
            let instructions = std::mem::take(&mut self.skipped);
            let address = self.skipped_from.take();
            self.observer.event(&Event::Skipped { instructions, address })?;
        }
        Ok(())
    }

    /// The stretch is idle: only what a reader's clocks and address spaces need goes on.
    fn leave_out(&mut self) -> Result<(), TraceError> {
        self.is_complete = false;
        let entries = std::mem::take(&mut self.held.entries);
        for entry in &entries {
            match entry {
                Entry::NewBlocks => self.observer.new_blocks(),
                Entry::Run(run) => {
                    self.skipped += run.retired();
                    self.left_out.idle += run.retired();
                    self.skipped_from.get_or_insert(run.linear);
                }
                Entry::Event(event @ (Event::Marker(_) | Event::AddressSpace { .. })) => {
                    self.tell_skipped()?;
                    self.observer.event(event)?;
                }
                Entry::Event(event) => {
                    self.left_out.events += 1;
                    if let Event::Delivery { address, .. } = event {
                        self.skipped_from.get_or_insert(*address);
                    }
                }
            }
        }
        self.held.clear(entries);
        Ok(())
    }

    /// The stretch, as far as it goes, is not idle.
    fn hand_on(&mut self) -> Result<(), TraceError> {
        self.is_complete = false;
        self.tell_skipped()?;
        let entries = std::mem::take(&mut self.held.entries);
        self.held.show(&entries, &mut self.observer)?;
        self.held.clear(entries);
        Ok(())
    }

    /// What comes next is no longer of a stretch that has come to its HLT.
    fn decide(&mut self) -> Result<(), TraceError> {
        if self.is_complete { self.leave_out() } else { Ok(()) }
    }

    /// Hands on the stretch and all that follows up to the next HLT.
    fn wake(&mut self) -> Result<(), TraceError> {
        self.in_stretch = false;
        self.hand_on()
    }
}

impl<O: Observer> Observer for SkipIdle<O> {
    fn begin(&mut self, position: &Position) -> Result<(), TraceError> {
        self.observer.begin(position)
    }

    fn new_blocks(&mut self) {
        if !self.held.new_blocks() {
            self.observer.new_blocks();
        }
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        if self.in_stretch {
            self.decide()?;
            let is_user = run.block().mode().cpl == 3;
            let is_work = is_user || !self.held.has_room_for(run);
            if !is_work {
                self.is_complete = ends_in_halt(run);
                return self.held.push(run);
            }
            self.wake()?;
        }
        self.in_stretch = self.is_on && ends_in_halt(run);
        self.observer.run(run)
    }

    fn runs(&mut self, runs: &mut PlainRuns<'_>) -> Result<(), TraceError> {
        if self.is_on { runs.try_for_each(|run| self.run(&run)) } else { self.observer.runs(runs) }
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        if !self.in_stretch {
            return self.observer.event(event);
        }
        if event.is_of_run() && self.held.entries.is_empty() {
            // Of the run that ended in HLT and was handed on.
            return self.observer.event(event);
        }
        match event {
            Event::Port { port, .. } if is_timekeeping(*port) => {}
            // The run before, which may be the one that ends in HLT, did this.
            Event::Port { .. } | Event::Mmio { .. } => {
                let is_asleep = self.is_complete;
                self.wake()?;
                self.in_stretch = is_asleep;
                return self.observer.event(event);
            }
            // Nobody knows what ran there; and a device that moves data does it for somebody.
            Event::Skipped { .. } | Event::Dma { .. } => {
                self.decide()?;
                self.wake()?;
                return self.observer.event(event);
            }
            Event::Delivery { .. } => self.decide()?,
            _ => {}
        }
        self.held.entries.push(Entry::Event(*event));
        if self.held.size() > MAX_HELD { self.wake() } else { Ok(()) }
    }

    fn end(&mut self) -> Result<(), TraceError> {
        self.decide()?;
        self.wake()?;
        self.observer.end()
    }
}

/// What is held back.
#[derive(Debug, Default)]
struct Held {
    entries: Vec<Entry>,
    instructions: u64,
    addresses: Vec<u64>,
    physical: Vec<u64>,
    counts: Vec<u32>,
    values: Vec<u64>,
    registers: Vec<u64>,
    /// Copies of blocks: whoever shows a run keeps the block no longer than that takes.
    blocks: Blocks,
    /// Their numbers, by those that the runs name.
    known: HashMap<u32, u32>,
    /// Blocks of runs that are held have lost their numbers.
    has_outdated: bool,
}

#[derive(Debug)]
enum Entry {
    NewBlocks,
    Run(HeldRun),
    Event(Event),
}

/// A run: places in its block, and lengths of its parts of the columns.
#[derive(Debug)]
struct HeldRun {
    id: u32,
    block: u32,
    linear: u64,
    first: usize,
    end: usize,
    unretired_accesses: usize,
    addresses: usize,
    physical: usize,
    counts: usize,
    values: usize,
    registers: usize,
}

impl HeldRun {
    fn retired(&self) -> u64 {
        (self.end - self.first) as u64
    }
}

impl Held {
    /// Whether a run leaves the stretch within its bounds.
    fn has_room_for(&self, run: &Run<'_>) -> bool {
        self.instructions + run.retired() as u64 <= MAX_IDLE_INSTRUCTIONS
            && self.size() + 1 + run.addresses().len() <= MAX_HELD
    }

    fn size(&self) -> usize {
        self.entries.len() + self.addresses.len()
    }

    /// Notes that numbers mean other blocks from here on; false if nothing is held.
    fn new_blocks(&mut self) -> bool {
        self.known.clear();
        self.has_outdated = !self.entries.is_empty();
        if self.has_outdated {
            self.entries.push(Entry::NewBlocks);
        } else {
            self.blocks.clear();
        }
        self.has_outdated
    }

    fn push(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        let block = match self.known.get(&run.id) {
            Some(block) => *block,
            None => {
                let block = self.blocks.define(&run.block.to_definition())?;
                self.known.insert(run.id, block);
                block
            }
        };
        self.entries.push(Entry::Run(HeldRun {
            id: run.id,
            block,
            linear: run.linear(),
            first: run.first,
            end: run.end,
            unretired_accesses: run.unretired_accesses,
            addresses: run.addresses.len(),
            physical: run.physical.len(),
            counts: run.counts.len(),
            values: run.values.len(),
            registers: run.registers.len(),
        }));
        self.instructions += run.retired() as u64;
        self.addresses.extend_from_slice(run.addresses);
        self.physical.extend_from_slice(run.physical);
        self.counts.extend_from_slice(run.counts);
        self.values.extend_from_slice(run.values);
        self.registers.extend_from_slice(run.registers);
        Ok(())
    }

    /// Shows `observer` all of it, as it came.
    fn show(&self, entries: &[Entry], observer: &mut impl Observer) -> Result<(), TraceError> {
        let (mut addresses, mut physical) = (&self.addresses[..], &self.physical[..]);
        let (mut counts, mut values) = (&self.counts[..], &self.values[..]);
        let mut registers = &self.registers[..];
        for entry in entries {
            let held = match entry {
                Entry::NewBlocks => {
                    observer.new_blocks();
                    continue;
                }
                Entry::Event(event) => {
                    observer.event(event)?;
                    continue;
                }
                Entry::Run(held) => held,
            };
            let block = self.blocks.get(held.block).expect("it was copied");
            observer.run(&Run {
                id: held.id,
                block,
                first: held.first,
                end: held.end,
                unretired_accesses: held.unretired_accesses,
                addresses: take(&mut addresses, held.addresses),
                counts: take(&mut counts, held.counts),
                physical: take(&mut physical, held.physical),
                values: take(&mut values, held.values),
                registers: take(&mut registers, held.registers),
            })?;
        }
        Ok(())
    }

    /// Forgets all of it, and keeps the memory, which comes with `entries`.
    fn clear(&mut self, mut entries: Vec<Entry>) {
        entries.clear();
        self.entries = entries;
        self.instructions = 0;
        self.addresses.clear();
        self.physical.clear();
        self.counts.clear();
        self.values.clear();
        self.registers.clear();
        if std::mem::take(&mut self.has_outdated) {
            self.blocks.clear();
            self.known.clear();
        }
    }
}

/// The next `count` of a column.
fn take<'a, T>(column: &mut &'a [T], count: usize) -> &'a [T] {
    let (taken, rest) = column.split_at(count);
    *column = rest;
    taken
}
