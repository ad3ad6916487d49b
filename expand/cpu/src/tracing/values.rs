//! Values of accesses, and what the CPU writes by itself: made of the memory's journal, instruction by
//! instruction. What of an instruction no list of accesses holds becomes events behind its run, which then
//! ends with it.

use std::ops::Range;

use iced_x86::Mnemonic;
use reprise_trace::instructions::{Event, StaticAccess, SystemAccessKind};

use super::accesses::{OpAccesses, Repeated};
use super::{MAX_PIECE, Tracer};
use crate::cpu::Cpu;
use crate::decode::block_cache::Block;
use crate::decode::op::Op;
use crate::fault::Flow;
use crate::memory::Memory;
use crate::memory::journal::{By, Entry, Journal};
use crate::memory::physical::{PAGE_BYTES, Physical};

/// What a repeated instruction's accesses came to, in order.
#[derive(Debug, Default)]
pub(super) struct Elements {
    values: Vec<u64>,
    physical: Vec<u64>,
    /// Events, each with how many accesses come before it.
    events: Vec<(usize, Event)>,
}

/// Stands for an access that the journal does not have.
const NOWHERE: u64 = u64::MAX;

impl Cpu {
    /// Runs an operation and notes everything that it does: see [`Cpu::run_traced`].
    pub(super) fn run_in_full(&mut self, block: &Block, op: &Op) -> Flow {
        let events = self.tracer.as_ref().map_or(0, |tracer| tracer.batch.events.len());
        let accesses = block.trace_of(op);
        let has_values = self.memory.physical.journal.is_some();
        let flow = if accesses.repeated || accesses.far || !has_values {
            self.run_noted(block, op)
        } else {
            self.run_with_values(block, op)
        };
        self.trace_registers(block, op, flow);
        self.trace_walks();
        let Some(tracer) = &self.tracer else { return flow };
        let is_last = usize::from(op.number) + 1 == block.ops.len();
        if flow == Flow::NEXT && !is_last && tracer.batch.events.len() != events {
            self.split_run(block, op);
        }
        flow
    }

    /// Ends the run behind an operation, so that events stand there. The rest of the block is another.
    fn split_run(&mut self, block: &Block, op: &Op) {
        let linear = self.linear_rip(op.rip(self)).wrapping_sub(u64::from(op.offset));
        let next = usize::from(op.number) + 1;
        let rest = self.trace_rest(block, linear, next);
        let Some(tracer) = &mut self.tracer else { return };
        let cut = tracer.batch.cut_last_run((next - tracer.run_start) as u32, 0);
        assert!(cut, "a run has begun");
        tracer.batch.words.push(rest);
        tracer.run_start = next;
    }

    /// Before a run, or where no accesses are to be noted: notes what has been written since, by page walks
    /// and deliveries and by an instruction that did not retire.
    pub(super) fn trace_writes_between(&mut self) {
        let Some(journal) = &mut self.memory.physical.journal else { return };
        let Some(tracer) = &mut self.tracer else { return };
        if !journal.is_empty() {
            for entry in journal.entries().iter().filter(|entry| entry.by != By::Load) {
                push_write(tracer, journal, entry, 0);
            }
            journal.clear();
        }
    }

    fn run_with_values(&mut self, block: &Block, op: &Op) -> Flow {
        let accesses = block.trace_of(op);
        let first = self.push_addresses(accesses);
        let rights = self.memory.present_rights();
        let flow = self.run_handler(op);
        if flow.retires() {
            let accesses: Vec<StaticAccess> =
                accesses.list.iter().map(|planned| planned.access).collect();
            self.note_values(&accesses, first, rights);
        } else {
            if let Some(tracer) = &mut self.tracer {
                tracer.batch.addresses.truncate(first);
            }
            self.trace_writes_between();
        }
        self.end_where_code_was_marked(flow)
    }

    /// Notes values and places of the accesses of an instruction that has retired, whose addresses are
    /// noted from `first` on, and what else it wrote. False if values are not traced.
    pub(super) fn note_values(
        &mut self,
        accesses: &[StaticAccess],
        first: usize,
        rights: usize,
    ) -> bool {
        let Some(mut journal) = self.memory.physical.journal.take() else { return false };
        if let Some(tracer) = &mut self.tracer {
            note_accesses(tracer, &self.memory, accesses, first, rights, &journal);
        }
        journal.clear();
        self.memory.physical.journal = Some(journal);
        true
    }

    /// How many of a repeated instruction's elements are to wait, so that the journal of those before has a
    /// bound. Those of ports leave for the board one by one.
    pub(super) fn elements_beyond_piece(&self, op: &Op, accesses: &OpAccesses, all: u64) -> u64 {
        use Mnemonic::{Insb, Insd, Insw, Outsb, Outsd, Outsw};
        let ports = matches!(op.instruction.mnemonic(), Insb | Insw | Insd | Outsb | Outsw | Outsd);
        let whole = ports || self.careful || self.stops_between_elements;
        if whole || self.memory.physical.journal.is_none() {
            return 0;
        }
        all.saturating_sub((MAX_PIECE / accesses.list.len().max(1)) as u64)
    }

    /// Whether a repeated instruction that has come to the end of its piece goes on: comparisons stop by
    /// their result.
    pub(super) fn repeats_on(&self, op: &Op) -> bool {
        use Mnemonic::{Cmpsb, Cmpsd, Cmpsq, Cmpsw, Scasb, Scasd, Scasq, Scasw};
        let compares = matches!(
            op.instruction.mnemonic(),
            Cmpsb | Cmpsw | Cmpsd | Cmpsq | Scasb | Scasw | Scasd | Scasq
        );
        !compares || self.registers.arithmetic.condition::<4>() == op.instruction.has_rep_prefix()
    }

    /// What a repeated instruction has just done, if values are traced.
    pub(super) fn elements(&mut self, starts: &[Repeated], done: usize) -> Option<Elements> {
        let mut journal = self.memory.physical.journal.take()?;
        let mut elements = Elements::default();
        elements.take(starts, done, &journal);
        let rights = self.memory.present_rights();
        for (number, place) in elements.physical.iter_mut().enumerate() {
            if *place == NOWHERE {
                let repeated = &starts[number % starts.len()];
                let linear = repeated.linear(number / starts.len());
                *place = self.memory.seen_guest_address(rights, repeated.writes, linear);
                elements.values[number] = u64::from_le_bytes(std::array::from_fn(|byte| {
                    let inside = byte < usize::from(repeated.size_bytes);
                    if inside { byte_at(&self.memory, *place + byte as u64) } else { 0 }
                }));
            }
        }
        journal.clear();
        self.memory.physical.journal = Some(journal);
        Some(elements)
    }
}

impl Elements {
    fn take(&mut self, starts: &[Repeated], done: usize, journal: &Journal) {
        let total = done * starts.len();
        self.values = vec![0; total];
        self.physical = vec![NOWHERE; total];
        let mut made = 0;
        for entry in journal.entries() {
            let is_store = entry.by == By::Store;
            if let By::System(kind) = entry.by {
                self.push_writes(made.min(total), kind, entry, journal);
            } else if made >= total {
                // Of an element that has not come to its end.
                if is_store {
                    self.push_writes(total, SystemAccessKind::OtherWrite, entry, journal);
                }
            } else {
                let element = made / starts.len();
                let fits = |one: &Repeated| {
                    one.writes == is_store && Some(one.linear(element)) == entry.linear
                };
                let within = starts.iter().position(fits).unwrap_or(made % starts.len());
                self.set(element * starts.len() + within, entry, journal);
                made += 1;
            }
        }
    }

    fn set(&mut self, number: usize, entry: &Entry, journal: &Journal) {
        let mut value = [0; 8];
        let bytes = journal.bytes_of(entry);
        let length = bytes.len().min(8);
        value[..length].copy_from_slice(&bytes[..length]);
        self.values[number] = u64::from_le_bytes(value);
        self.physical[number] = entry.physical();
        if let Some((_, physical, _)) =
            entry.pieces().find(|(at, place, _)| *at > 0 && place.is_multiple_of(PAGE_BYTES))
        {
            let event = Event::SecondPage { physical, accesses_behind: 0 };
            self.events.push((number, event));
        }
    }

    fn push_writes(
        &mut self,
        before: usize,
        kind: SystemAccessKind,
        entry: &Entry,
        journal: &Journal,
    ) {
        let events = writes(kind, entry, journal, 0).map(|event| (before, event));
        self.events.extend(events);
    }

    /// Appends those of a part of the accesses. The last part has the events behind all of them, too.
    pub(super) fn append(&self, accesses: Range<usize>, tracer: &mut Tracer) {
        let batch = &mut tracer.batch;
        batch.values.extend_from_slice(&self.values[accesses.clone()]);
        if tracer.contents.physical {
            let places = self.physical[accesses.clone()].iter();
            batch.physical.extend(places.map(|place| Physical::guest_place(*place)));
        }
        let is_last = accesses.end == self.values.len();
        let is_here =
            |before: usize| before >= accesses.start && (before < accesses.end || is_last);
        for (before, event) in self.events.iter().filter(|(before, _)| is_here(*before)) {
            let behind = (accesses.end - before) as u32;
            batch.push_event(match *event {
                Event::SecondPage { physical, .. } => {
                    Event::SecondPage { physical, accesses_behind: behind - 1 }
                }
                event => with_accesses_behind(event, behind),
            });
        }
    }
}

fn with_accesses_behind(event: Event, behind: u32) -> Event {
    match event {
        Event::MemoryWrite { kind, linear, physical, size_bytes, value, .. } => {
            let accesses_behind = behind;
            Event::MemoryWrite { kind, linear, physical, size_bytes, value, accesses_behind }
        }
        other => other,
    }
}

/// The events that a write is.
fn writes<'a>(
    kind: SystemAccessKind,
    entry: &'a Entry,
    journal: &'a Journal,
    accesses_behind: u32,
) -> impl Iterator<Item = Event> + 'a {
    let bytes = journal.bytes_of(entry);
    entry.pieces().map(move |(at, physical, size)| {
        let mut value = [0; 8];
        value[..size].copy_from_slice(&bytes[at..at + size]);
        let linear = entry.linear.map(|linear| linear.wrapping_add(at as u64));
        let (size_bytes, value) = (size as u8, u64::from_le_bytes(value));
        Event::MemoryWrite { kind, linear, physical, size_bytes, value, accesses_behind }
    })
}

fn push_write(tracer: &mut Tracer, journal: &Journal, entry: &Entry, behind: u32) {
    let kind = match entry.by {
        By::System(kind) => kind,
        By::Load | By::Store => SystemAccessKind::OtherWrite,
    };
    writes(kind, entry, journal, behind).for_each(|event| tracer.batch.push_event(event));
}

/// The byte of RAM at a guest-physical address, and ones where there is none.
fn byte_at(memory: &Memory, physical: u64) -> u8 {
    let mut byte = [0xff];
    memory.physical.read(physical, &mut byte);
    byte[0]
}

/// See [`Cpu::note_values`].
fn note_accesses(
    tracer: &mut Tracer,
    memory: &Memory,
    accesses: &[StaticAccess],
    first: usize,
    rights: usize,
    journal: &Journal,
) {
    let count = accesses.len();
    // For each access the number of the journal's first entry that belongs to it.
    let mut made_at = [usize::MAX; 8];
    let second_pages = accesses.iter().enumerate().filter_map(|(number, access)| {
        let linear = tracer.batch.addresses[first + number];
        let (reads, writes) = (access.kind.reads(), access.kind.writes());
        let is_own = |entry: &Entry| {
            entry.physical_of(linear).is_some() && matches!(entry.by, By::Load | By::Store)
        };
        let own = journal.entries().iter().position(is_own);
        if let (Some(slot), Some(own)) = (made_at.get_mut(number), own) {
            *slot = own;
        }
        let place = |linear: u64| {
            let own = journal.entries().iter().filter(|entry| !matches!(entry.by, By::System(_)));
            let physical = own.filter_map(|entry| entry.physical_of(linear)).next();
            physical.unwrap_or_else(|| memory.seen_guest_address(rights, writes, linear))
        };
        for (_, by) in [(reads, By::Load), (writes, By::Store)].into_iter().filter(|side| side.0) {
            let size_bytes = usize::from(access.size_bytes);
            match journal.exactly(by, linear, access.size_bytes) {
                Some((_, bytes)) => push_words(&mut tracer.batch.values, bytes),
                None => {
                    let byte = |offset: usize| {
                        let linear = linear.wrapping_add(offset as u64);
                        let known = journal.byte(by, linear);
                        known.unwrap_or_else(|| byte_at(memory, place(linear)))
                    };
                    let bytes: Vec<u8> = (0..size_bytes).map(byte).collect();
                    push_words(&mut tracer.batch.values, &bytes);
                }
            }
        }
        if tracer.contents.physical {
            tracer.batch.physical.push(Physical::guest_place(place(linear)));
        }
        let in_first = PAGE_BYTES - linear % PAGE_BYTES;
        (in_first < u64::from(access.size_bytes)).then(|| Event::SecondPage {
            physical: place(linear.wrapping_add(in_first)),
            accesses_behind: (count - 1 - number) as u32,
        })
    });
    let second_pages: Vec<Event> = second_pages.collect();
    second_pages.into_iter().for_each(|event| tracer.batch.push_event(event));
    for (number, entry) in journal.entries().iter().enumerate() {
        match entry.by {
            By::System(_) => {
                let behind = made_at[..count.min(8)].iter().filter(|made| **made > number).count();
                push_write(tracer, journal, entry, behind as u32);
            }
            By::Store if !is_listed(tracer, accesses, first, entry) => {
                push_write(tracer, journal, entry, 0);
            }
            By::Load | By::Store => {}
        }
    }
}

/// Whether the accesses of an instruction say that it writes all of `entry`.
fn is_listed(tracer: &Tracer, accesses: &[StaticAccess], first: usize, entry: &Entry) -> bool {
    let linears = &tracer.batch.addresses[first..];
    accesses.iter().zip(linears).any(|(access, linear)| {
        let before = entry.linear.map_or(u64::MAX, |start| start.wrapping_sub(*linear));
        let end = before.saturating_add(u64::from(entry.size_bytes));
        access.kind.writes() && end <= u64::from(access.size_bytes)
    })
}

fn push_words(out: &mut Vec<u64>, bytes: &[u8]) {
    out.extend(bytes.chunks(8).map(|chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_le_bytes(word)
    }));
}
