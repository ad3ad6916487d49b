//! What the CPU executes, as a stream of blocks and addresses (`reprise_trace::instructions::Batch`).
//!
//! A block gets its number when it first runs, or is translated. The block loop appends the number and
//! then, operation by operation, the addresses that `accesses.rs` computes before each runs; what a
//! fault or an exit leaves undone is taken back and the run cut. Translated code appends both in line
//! (`translate/emission/`), through the two cursors lent to it; for an operation that it has run in
//! Rust, the vectors are taken back for a moment. Nothing of it exists while nobody asked for a trace.
#![allow(unsafe_code)]

mod accesses;
mod blocks;
mod far;
mod flags;
mod registers;
mod repetition;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod value_tests;
mod values;

use iced_x86::InstructionInfoFactory;
use reprise_machine::clock::TimeBase;
use reprise_machine::engine::Access;
use reprise_trace::cpu_state::CS;
use reprise_trace::instructions::{
    AccessKind, Batch, CUT, Contents, Delivery, Direction, Event, Marker, Position,
};

use crate::cpu::{AnsweredAccess, Cpu, TRACE_ADDRESSES, TRACE_PHYSICAL, TRACE_WORDS};
use crate::decode::block_cache::Block;
use crate::decode::op::Op;
use crate::fault::Flow;
use crate::memory::physical::Physical;
use crate::other_maker::Counts;
use crate::translate::Translator;
use accesses::OpAccesses;
pub(crate) use accesses::Planned;
use blocks::Numbers;
pub(crate) use blocks::{BlockTrace, TraceId};
use registers::Told;

/// Takes the pieces of a trace as the CPU makes them.
pub trait BatchSink: Send {
    /// Takes a full batch, behind which the guest stands at `tick`, and gives an empty one. `None` ends
    /// the run at once, with an error.
    fn exchange(&mut self, batch: Batch, tick: u64) -> Option<Batch>;
}

/// A batch is handed over when it has so many words or addresses.
const FULL_WORDS: usize = 1 << 16;
const FULL_ADDRESSES: usize = 1 << 17;
/// Instructions that translated code runs between two looks at how full the batch is.
pub(crate) const SLICE: u64 = 50_000;
/// Accesses of one instruction in translated code, at most.
pub(crate) const MAX_INLINE_ACCESSES: usize = 2;
/// Room that translated code needs, at least: a word and all its accesses for each instruction.
const SLICE_WORDS: usize = SLICE as usize;
const SLICE_ADDRESSES: usize = SLICE as usize * MAX_INLINE_ACCESSES;
/// A repeated instruction that made more accesses ends its run, and takes several if need be: a run may
/// have so many accesses only (`reprise_trace::instructions::MAX_RUN_ACCESSES`).
const LONG_REPETITION: usize = 900;
const MAX_PIECE: usize = 60_000;
/// Block numbers in use before they begin again.
const MAX_NUMBERS: usize = 1 << 21;
/// Instructions between two markers, at least.
const MARKER_INTERVAL: u64 = 1 << 20;

/// A trace in the making.
pub(crate) struct Tracer {
    /// Its physical addresses are host addresses where they lie in RAM, until it is handed over.
    batch: Batch,
    contents: Contents,
    /// What is known of the registers, if they are traced.
    told: Option<Box<Told>>,
    /// Set aside: with values or registers, instructions run one by one.
    translator: Option<Translator>,
    sink: Box<dyn BatchSink>,
    /// The sink wants no more.
    refused: bool,
    numbers: Numbers,
    /// Block numbers in use before they begin again: [`MAX_NUMBERS`], or fewer in a test.
    max_numbers: usize,
    info: InstructionInfoFactory,
    /// Accesses that the instruction which stopped the block had made without retiring.
    unretired: u32,
    /// The operation of the block with which the last run begins.
    run_start: usize,
    /// When the clocks were last told.
    marker_tick: u64,
    /// What the far transfer in hand has done.
    far: Option<Vec<far::Made>>,
    /// Flags that were undefined where the batch begins.
    undefined_before: u64,
}

impl std::fmt::Debug for Tracer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tracer").field("batch", &self.batch).finish_non_exhaustive()
    }
}

impl Tracer {
    fn new(sink: Box<dyn BatchSink>, contents: Contents, tick: u64) -> Self {
        Self {
            batch: Batch { restart: true, ..Batch::default() },
            contents,
            told: None,
            translator: None,
            sink,
            refused: false,
            numbers: Numbers::default(),
            max_numbers: MAX_NUMBERS,
            info: InstructionInfoFactory::new(),
            unretired: 0,
            run_start: 0,
            marker_tick: tick,
            far: None,
            undefined_before: 0,
        }
    }

    /// Whether it has more than addresses.
    fn is_full(&self) -> bool {
        self.contents.values || self.contents.registers
    }

    fn is_due(&self) -> bool {
        self.batch.words.len() >= FULL_WORDS || self.batch.addresses.len() >= FULL_ADDRESSES
    }

    fn hand_over(&mut self, memory: &Physical, counts: &Counts, tick: u64) {
        self.undefined_before = self.undefined_flags(counts);
        memory.to_guest(&mut self.batch.physical);
        let full = std::mem::take(&mut self.batch);
        if !self.refused {
            let empty = self.sink.exchange(full, tick);
            self.refused = empty.is_none();
            self.batch = empty.unwrap_or_default();
        }
        assert!(self.batch.is_empty(), "a sink gives an empty batch");
    }

    /// Where the vectors end, less what translated code counts beyond its cursors.
    fn cursors(&mut self, ahead: Ahead) -> [u64; 3] {
        let batch = &mut self.batch;
        batch.words.reserve(SLICE_WORDS);
        batch.addresses.reserve(SLICE_ADDRESSES);
        let words = batch.words.as_mut_ptr().wrapping_add(batch.words.len());
        let addresses = batch.addresses.as_mut_ptr().wrapping_add(batch.addresses.len());
        let words = words.wrapping_sub(ahead.words as usize) as u64;
        if self.contents.physical {
            batch.physical.reserve(SLICE_ADDRESSES);
        }
        let physical = batch.physical.as_mut_ptr().wrapping_add(batch.physical.len());
        let before = |end: *mut u64| end.wrapping_sub(ahead.addresses as usize) as u64;
        [words, before(addresses), before(physical)]
    }

    /// Takes over what translated code has appended.
    fn take_back(&mut self, [words, addresses, physical]: [u64; 3], ahead: Ahead) {
        let batch = &mut self.batch;
        let length = |end: u64, start: u64, bytes: usize| (end - start) as usize / bytes;
        let words = length(words, batch.words.as_ptr() as u64, 4) + ahead.words as usize;
        let addresses =
            length(addresses, batch.addresses.as_ptr() as u64, 8) + ahead.addresses as usize;
        assert!(words <= batch.words.capacity() && addresses <= batch.addresses.capacity());
        let physical = if self.contents.physical {
            length(physical, batch.physical.as_ptr() as u64, 8) + ahead.addresses as usize
        } else {
            0
        };
        assert!(physical <= batch.physical.capacity());
        // SAFETY: translated code has written everything up to its cursors and what it counts beyond
        // them, in order, into the room reserved for a slice of instructions (`cursors`).
        unsafe {
            batch.words.set_len(words);
            batch.addresses.set_len(addresses);
            batch.physical.set_len(physical);
        }
    }

    /// Ends the last run where only a part of its block retired. A run without anything goes.
    fn end_run(&mut self, instructions: usize, retired: usize) {
        let start = std::mem::take(&mut self.run_start);
        let unretired = std::mem::take(&mut self.unretired);
        let retired = retired - start;
        if retired == 0 && unretired == 0 {
            let run = self.batch.words.iter().rposition(|word| *word < CUT);
            self.batch.words.remove(run.expect("a run that ends has begun"));
        } else if retired < instructions - start {
            let cut = self.batch.cut_last_run(retired as u32, unretired);
            assert!(cut, "a run that ends has begun");
        }
    }
}

/// Words and addresses that translated code has written beyond its cursors: it moves them when it
/// leaves a unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ahead {
    pub(crate) words: u32,
    pub(crate) addresses: u32,
}

impl Ahead {
    /// The same behind an operation.
    pub(crate) fn past(self, block: &Block, op: &Op) -> Self {
        let accesses = block.trace_of(op);
        let count = if accesses.repeated { 0 } else { accesses.list.len() as u32 };
        Self { addresses: self.addresses + count, ..self }
    }
}

impl Cpu {
    /// Whether translated code appends host addresses, beside linear ones.
    pub(crate) fn traces_physical(&self) -> bool {
        self.tracer.as_ref().is_some_and(|tracer| tracer.contents.physical)
    }

    /// What the clocks say.
    fn trace_marker(&self) -> Marker {
        Marker { tick: self.tick, virtual_ns: self.time_base.at(self.tick).ns }
    }

    /// Where a trace that starts here begins.
    pub(crate) fn trace_position(&self) -> Position {
        Position {
            instruction: self.tick,
            cr3: self.system.cr3,
            marker: self.trace_marker(),
            marker_instruction: self.tick,
        }
    }

    /// Begins to trace: everything from here on goes to `sink`.
    pub(crate) fn start_trace(&mut self, sink: Box<dyn BatchSink>, contents: Contents) {
        // A store to a place that is known to hold code ends its block, and so its run. What is known
        // must not depend on what ran before.
        self.forget_code();
        // Numbers that blocks have from an earlier trace mean nothing in this one.
        self.trace_generation += 1;
        self.memory.walks = contents.page_walks.then(Vec::new);
        // The flags are what they were.
        let undefined_before = self.undefined_flags();
        let mut tracer = Tracer { undefined_before, ..Tracer::new(sink, contents, self.tick) };
        if tracer.is_full() {
            tracer.translator = self.translator.take();
            tracer.told = contents.registers.then(|| Box::new(Told::new(self)));
            self.memory.keep_journal(contents.values);
        }
        self.tracer = Some(Box::new(tracer));
    }

    /// Ends the trace: the sink gets what is left, and goes.
    pub(crate) fn stop_trace(&mut self) {
        self.trace_between();
        self.trace_walks();
        self.memory.walks = None;
        let marker = self.trace_marker();
        if let Some(mut tracer) = self.tracer.take() {
            // Its last instructions have times as well.
            if tracer.marker_tick < self.tick {
                tracer.batch.push_event(Event::Marker(marker));
            }
            if tracer.is_full() {
                self.translator = tracer.translator.take();
                self.memory.keep_journal(false);
            }
            tracer.hand_over(&self.memory.physical, &self.other_maker.counts, self.tick);
            self.undefined_before = tracer.undefined_before;
            self.forget_translated_code();
        }
    }

    fn forget_translated_code(&mut self) {
        self.blocks.forget_translations();
        if let Some(translator) = &mut self.translator {
            translator.clear();
        }
    }

    /// Hands over the batch if it is full. Between two blocks. False if nobody wants more.
    #[inline(always)]
    pub(crate) fn keep_trace_moving(&mut self) -> bool {
        !self.tracer.as_ref().is_some_and(|tracer| tracer.is_due()) || self.hand_over_trace()
    }

    /// The sink has ended the run.
    pub(crate) fn trace_is_refused(&self) -> bool {
        self.tracer.as_ref().is_some_and(|tracer| tracer.refused)
    }

    #[cold]
    fn hand_over_trace(&mut self) -> bool {
        let Some(tracer) = &mut self.tracer else { return true };
        tracer.hand_over(&self.memory.physical, &self.other_maker.counts, self.tick);
        let goes_on = !tracer.refused;
        if tracer.numbers.count() >= tracer.max_numbers {
            tracer.numbers.restart();
            self.trace_generation += 1;
            tracer.batch.restart = true;
            self.forget_translated_code();
        }
        goes_on
    }

    /// Says what the clocks say, if they have not for some time.
    pub(crate) fn mark_trace(&mut self) {
        let marker = self.trace_marker();
        let Some(tracer) = &mut self.tracer else { return };
        if self.tick - tracer.marker_tick >= MARKER_INTERVAL {
            tracer.marker_tick = self.tick;
            tracer.batch.push_event(Event::Marker(marker));
        }
    }

    /// Time goes on otherwise. Where it follows instructions, before or behind, a trace has a marker on both
    /// sides of a jump: so two markers that differ by as many nanoseconds as instructions tell all times
    /// between them.
    pub(crate) fn trace_time(&mut self, base: TimeBase) {
        let (before, rate_before) = (self.trace_marker(), self.time_base.ns_per_tick);
        self.time_base = base;
        let behind = self.trace_marker();
        let Some(tracer) = &mut self.tracer else { return };
        let follows = rate_before != 0 || base.ns_per_tick != 0;
        if follows && (before != behind || rate_before != base.ns_per_tick) {
            tracer.marker_tick = self.tick;
            tracer.batch.push_event(Event::Marker(before));
            if before != behind {
                tracer.batch.push_event(Event::Marker(behind));
            }
        }
    }

    /// Notes something that happened, if anybody wants to know.
    #[inline]
    pub(crate) fn trace_event(&mut self, event: Event) {
        self.trace_walks();
        if let Some(tracer) = &mut self.tracer {
            tracer.batch.push_event(event);
        }
    }

    /// Notes the page walks since the last time.
    #[inline]
    fn trace_walks(&mut self) {
        if let (Some(walks), Some(tracer)) = (&mut self.memory.walks, &mut self.tracer) {
            walks.drain(..).for_each(|walk| tracer.batch.push_event(Event::PageWalk(walk)));
        }
    }

    /// Notes that control has gone to a handler, which returns to a linear address.
    pub(crate) fn trace_delivery(
        &mut self,
        kind: Delivery,
        (vector, error_code): (u8, Option<u32>),
        address: u64,
    ) {
        const PAGE_FAULT: u8 = 14;
        if self.tracer.is_some() {
            let is_page_fault = vector == PAGE_FAULT && kind == Delivery::Exception;
            let fault_address = is_page_fault.then_some(self.system.cr2);
            let event = Event::Delivery { kind, vector, error_code, address, fault_address };
            self.trace_event(event);
        }
    }

    /// Notes that an IRET leads to RIP.
    pub(crate) fn trace_return(&mut self) {
        let address = self.code_address();
        self.trace_event(Event::Return { address });
    }

    /// The linear address of `rip` in the present code segment.
    pub(crate) fn linear_rip(&self, rip: u64) -> u64 {
        self.wrap(self.registers.segment_base[CS].wrapping_add(rip))
    }

    /// Notes what has been written since the last run, where that is wanted.
    fn trace_between(&mut self) {
        if self.tracer.as_ref().is_some_and(|tracer| tracer.is_full()) {
            self.trace_writes_between();
            self.trace_registers_between();
        }
    }

    /// Begins a run of `block`, which is about to run at RIP.
    pub(crate) fn trace_run(&mut self, block: &Block) {
        self.trace_between();
        self.trace_walks();
        let id = self.trace_id(block, self.code_address());
        let tracer = self.tracer.as_mut().expect("somebody traces");
        tracer.run_start = 0;
        tracer.batch.words.push(id);
    }

    /// Runs an operation and notes what it accesses, and the page walks for that.
    #[inline]
    pub(crate) fn run_traced(&mut self, block: &Block, op: &Op) -> Flow {
        if self.tracer.as_ref().is_some_and(|tracer| tracer.is_full()) {
            return self.run_in_full(block, op);
        }
        let flow = self.run_noted(block, op);
        self.trace_walks();
        flow
    }

    #[inline]
    fn run_noted(&mut self, block: &Block, op: &Op) -> Flow {
        let accesses = block.trace_of(op);
        if accesses.repeated {
            self.run_repeated(block, op)
        } else if accesses.far {
            self.run_far(block, op)
        } else {
            self.run_once(block, op)
        }
    }

    #[inline(always)]
    fn run_handler(&mut self, op: &Op) -> Flow {
        // SAFETY: the handler is a function of this crate or a native sequence, made for this operation
        // by `ops::select`; the block, which holds the operation, outlives this call.
        unsafe { (op.handler)(self, op) }
    }

    /// Appends the addresses of what an operation is about to access, and gives the first one's place.
    #[inline(always)]
    fn push_addresses(&mut self, accesses: &OpAccesses) -> usize {
        let before = self.tracer.as_ref().map_or(0, |tracer| tracer.batch.addresses.len());
        for planned in &accesses.list {
            let linear = planned.linear(self);
            if let Some(tracer) = &mut self.tracer {
                tracer.batch.addresses.push(linear);
            }
        }
        before
    }

    #[inline]
    fn run_once(&mut self, block: &Block, op: &Op) -> Flow {
        let accesses = block.trace_of(op);
        let before = self.push_addresses(accesses);
        let rights = self.memory.present_rights();
        let flow = self.run_handler(op);
        if let Some(tracer) = &mut self.tracer {
            if !flow.retires() {
                tracer.batch.addresses.truncate(before);
            } else if tracer.contents.physical {
                let batch = &mut tracer.batch;
                let kinds = accesses.list.iter().map(|planned| planned.access.kind);
                let seen = batch.addresses[before..].iter().zip(kinds);
                let place = |(linear, kind): (&u64, AccessKind)| {
                    self.memory.seen_address(rights, kind.writes(), *linear)
                };
                batch.physical.extend(seen.map(place));
            }
        }
        self.end_where_code_was_marked(flow)
    }

    /// Ends the block where a walk has set an accessed bit in code. Translated code leaves its unit for
    /// that.
    #[inline(always)]
    fn end_where_code_was_marked(&self, flow: Flow) -> Flow {
        let over = flow == Flow::NEXT && self.memory.physical.code_was_written();
        if over { Flow::END_BLOCK } else { flow }
    }

    /// Notes that a run of `block` has stopped at operation `number`.
    pub(crate) fn trace_stop(&mut self, block: &Block, number: usize, flow: Flow) {
        if let Some(tracer) = &mut self.tracer {
            tracer.end_run(block.ops.len(), number + usize::from(flow.retires()));
        }
    }

    /// Notes that only the first `retired` operations of `block` were to run.
    pub(crate) fn trace_part(&mut self, block: &Block, retired: usize) {
        if let Some(tracer) = &mut self.tracer {
            tracer.end_run(block.ops.len(), retired);
        }
    }

    /// Notes what the board answered.
    pub(crate) fn trace_answers(&mut self) {
        if self.tracer.is_some() {
            for event in self.answered.clone().into_iter().filter_map(event_of) {
                self.trace_event(event);
            }
        }
    }

    /// Lends translated code the ends of the vectors.
    pub(crate) fn lend_trace(&mut self, ahead: Ahead) {
        self.trace_walks();
        if let Some(tracer) = &mut self.tracer {
            let [words, addresses, physical] = tracer.cursors(ahead);
            self.registers.gpr[usize::from(TRACE_WORDS)] = words;
            self.registers.gpr[usize::from(TRACE_ADDRESSES)] = addresses;
            self.registers.gpr[usize::from(TRACE_PHYSICAL)] = physical;
        }
    }

    /// Takes them back, with what translated code has written beyond them.
    pub(crate) fn take_trace_back(&mut self, ahead: Ahead) {
        if let Some(tracer) = &mut self.tracer {
            let gpr = &self.registers.gpr;
            let slots = [TRACE_WORDS, TRACE_ADDRESSES, TRACE_PHYSICAL];
            tracer.take_back(slots.map(|slot| gpr[usize::from(slot)]), ahead);
        }
    }
}

/// `None` for what is no access to a device.
fn event_of(AnsweredAccess { access, value }: AnsweredAccess) -> Option<Event> {
    let port =
        |direction, port, size_bytes, value| Event::Port { direction, port, size_bytes, value };
    Some(match access {
        Access::PortRead { port: number, size } => port(Direction::In, number, size, value as u32),
        Access::PortWrite { port: number, size, value } => {
            port(Direction::Out, number, size, value)
        }
        Access::MmioRead { address, size } => Event::Mmio {
            direction: Direction::In,
            physical: address,
            size_bytes: size,
            value: value as u64,
        },
        Access::MmioWrite { address, size, value } => Event::Mmio {
            direction: Direction::Out,
            physical: address,
            size_bytes: size,
            value: value as u64,
        },
        Access::TimeStamp => return None,
    })
}
