//! Counts over a trace: privileges, kinds of instructions, branches, accesses, the busiest blocks,
//! and the working set over time.
//!
//! Most runs are whole runs of blocks that were seen before, so a run is counted by its block's
//! number, and what the block's instructions are is added up when numbers change their meaning.

mod footprint;
mod report;
pub(crate) mod text;

use std::collections::HashMap;

use iced_x86::Mnemonic;
use reprise_trace::instructions::{
    BlockRef, Delivery, Direction, Event, Observer, PageWalk, Position, Run, StaticAccess,
    TraceError, WalkCause,
};

use crate::instruction::{Branch, DecodedBlocks};
use crate::kind::Kind;
use footprint::{Footprint, PAGE_BYTES, Spaces};
pub(crate) use report::exception;
pub use report::{
    BlockRow, BranchRow, BranchesReport, Counted, DeliveryRow, Interval, PageWalks, PrivilegeRow,
    Report, Traffic, WorkingSet,
};

/// Instructions of an interval where the caller gives none.
const DEFAULT_INTERVAL: u64 = 10_000_000;
/// Intervals kept: the last one has whatever comes behind.
const MAX_INTERVALS: usize = 4096;
/// Powers of two that access sizes and block lengths are counted by.
const SIZE_CLASSES: usize = 16;

/// A branch's executions, and how many of them were taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcomes {
    /// How often it retired.
    pub executed: u64,
    /// How often control then went elsewhere than to the next instruction.
    pub taken: u64,
}

/// Accesses of one direction.
#[derive(Clone, Copy, Debug, Default)]
struct Accesses {
    count: u64,
    bytes: u64,
}

/// What a block's instruction counts as.
#[derive(Clone, Copy, Debug)]
struct Operation {
    mnemonic: Mnemonic,
    kind: Kind,
    branch: Branch,
    is_backward: bool,
    next_linear: u64,
}

/// What is kept of a block as long as its number stands for it.
#[derive(Debug)]
struct Seen {
    key: BlockKey,
    operations: Vec<Operation>,
    accesses: Vec<StaticAccess>,
    /// No instruction is repeated: a whole run makes just these accesses.
    is_plain: bool,
    /// Whole runs since they were last added up.
    whole_runs: u64,
    /// The interval in which its code was last counted as touched, plus one.
    touched: u64,
}

/// What a block is known by across numbers: linear and physical address, CPL.
type BlockKey = (u64, u64, u8);

/// Runs of a block and what retired in them.
#[derive(Clone, Copy, Debug, Default)]
struct BlockCount {
    runs: u64,
    instructions: u64,
}

/// A conditional branch that retired last: what is next tells whether it was taken.
#[derive(Clone, Copy, Debug)]
struct Undecided {
    next_linear: u64,
    mnemonic: Mnemonic,
    is_backward: bool,
}

/// What has been added up.
#[derive(Debug, Default)]
struct Tally {
    by_privilege: [u64; 4],
    mnemonics: HashMap<Mnemonic, u64>,
    kinds: HashMap<Kind, u64>,
    /// Branches that are always taken.
    branches: HashMap<Branch, u64>,
    conditional: HashMap<Mnemonic, Outcomes>,
    /// Conditional branches forward and backward.
    directions: [Outcomes; 2],
    reads: Accesses,
    writes: Accesses,
    access_sizes: [u64; SIZE_CLASSES],
    block_lengths: [u64; SIZE_CLASSES],
    blocks: HashMap<BlockKey, BlockCount>,
}

/// Events, by what they are.
#[derive(Debug, Default)]
struct Events {
    deliveries: HashMap<(u8, u8), u64>,
    port: Traffic,
    mmio: Traffic,
    /// Transfers by devices, and bytes.
    dma: Traffic,
    dma_bytes: u64,
    address_space_switches: u64,
    page_walks: PageWalks,
    skipped: u64,
}

/// What a trace amounts to: see [`Stats::report`].
#[derive(Debug)]
pub struct Stats {
    decoded: DecodedBlocks,
    seen: Vec<Option<Seen>>,
    tally: Tally,
    events: Events,
    undecided: Option<Undecided>,
    spaces: Spaces,
    code: Footprint,
    data: Footprint,
    begin: Position,
    position: Position,
    interval_instructions: u64,
    interval_end: u64,
    interval: Interval,
    intervals: Vec<Interval>,
}

impl Default for Stats {
    fn default() -> Self {
        Self::new(DEFAULT_INTERVAL)
    }
}

/// The power of two up to which a number of at least 1 reaches, as far as they are told apart.
fn size_class(number: u64) -> usize {
    (number.max(1).ilog2() as usize).min(SIZE_CLASSES - 1)
}

impl Stats {
    /// Looks at the working set in intervals of this many instructions.
    pub fn new(interval_instructions: u64) -> Self {
        let interval_instructions = interval_instructions.max(1);
        Self {
            decoded: DecodedBlocks::default(),
            seen: Vec::new(),
            tally: Tally::default(),
            events: Events::default(),
            undecided: None,
            spaces: Spaces::default(),
            code: Footprint::default(),
            data: Footprint::default(),
            begin: Position::default(),
            position: Position::default(),
            interval_instructions,
            interval_end: interval_instructions,
            interval: Interval::default(),
            intervals: Vec::new(),
        }
    }

    /// Control arrives at an address.
    #[inline]
    fn arrive(&mut self, address: u64) {
        if let Some(branch) = self.undecided.take()
            && branch.next_linear != address
        {
            self.tally.conditional.entry(branch.mnemonic).or_default().taken += 1;
            self.tally.directions[usize::from(branch.is_backward)].taken += 1;
        }
    }

    /// Meets a block of a number that has no meaning yet.
    fn meet(&mut self, id: u32, block: BlockRef<'_>) {
        let index = id as usize;
        if index >= self.seen.len() {
            self.seen.resize_with(index + 1, || None);
        }
        let decoded = self.decoded.get(id, block);
        let operations =
            block.instructions().zip(decoded.iter()).map(|(instruction, decoded)| Operation {
                mnemonic: decoded.mnemonic,
                kind: decoded.kind,
                branch: decoded.branch,
                is_backward: decoded.target.is_some_and(|target| target <= instruction.linear()),
                next_linear: instruction.next_linear(),
            });
        self.seen[index] = Some(Seen {
            key: (block.linear(), block.physical(), block.mode().cpl),
            operations: operations.collect(),
            accesses: block.static_accesses().to_vec(),
            is_plain: block.instructions().all(|one| !one.is_repeated()),
            whole_runs: 0,
            touched: 0,
        });
    }

    /// Adds up the whole runs of all blocks.
    fn settle(&mut self) {
        for seen in self.seen.iter_mut().flatten() {
            let runs = std::mem::take(&mut seen.whole_runs);
            if runs > 0 {
                self.tally.operations(&seen.operations, runs);
                self.tally.block(seen.key, runs, seen.operations.len() as u64);
                for access in &seen.accesses {
                    self.tally.access(access, runs);
                }
            }
        }
    }

    /// Counts a run that is not whole, or makes other accesses than its block lists.
    fn count_steps(&mut self, run: &Run<'_>, seen: &Seen) {
        let block = run.block();
        for step in run.steps() {
            for access in step.accesses() {
                let (kind, size_bytes) = (access.kind, access.size_bytes);
                self.tally.access(&StaticAccess::plain(kind, size_bytes), 1);
                if kind.touches_memory() {
                    let place = self.spaces.place(access.address, access.physical);
                    self.data.touch(place, u64::from(size_bytes));
                }
            }
            if step.retired {
                let (offset, length) = (step.instruction.offset(), step.instruction.bytes().len());
                touch_code(&mut self.code, block, offset as u64, length as u64);
            }
        }
        let retired = &seen.operations[run.first()..run.first() + run.retired()];
        self.tally.operations(retired, 1);
        self.tally.block(seen.key, 1, run.retired() as u64);
    }

    /// Counts a whole run of a plain block.
    #[inline]
    fn count_whole(&mut self, run: &Run<'_>, seen: &mut Seen) {
        seen.whole_runs += 1;
        let interval = self.intervals.len() as u64 + 1;
        if seen.touched != interval {
            seen.touched = interval;
            let block = run.block();
            touch_code(&mut self.code, block, 0, block.bytes().len() as u64);
        }
        let physical = run.physical();
        for (number, (linear, access)) in run.addresses().iter().zip(&seen.accesses).enumerate() {
            if access.kind.touches_memory() {
                let place = self.spaces.place(*linear, physical.get(number).copied());
                self.data.touch(place, u64::from(access.size_bytes));
            }
        }
    }

    /// Ends the interval if the position is behind it.
    fn look_at_the_time(&mut self) {
        let here = self.position.instruction;
        if here < self.interval_end {
            return;
        }
        let into = (here - self.begin.instruction) % self.interval_instructions;
        self.interval_end = (here - into).saturating_add(self.interval_instructions);
        if self.intervals.len() + 1 < MAX_INTERVALS {
            self.end_interval();
        }
    }

    fn end_interval(&mut self) {
        let next = self.new_interval();
        let interval = std::mem::replace(&mut self.interval, next);
        if interval.instructions() + interval.accesses > 0 {
            let (code, data) = (self.code.now, self.data.now);
            let all = self.code.ever.pages + self.data.ever.pages;
            self.intervals.push(interval.with_working_set(code, data, all));
            self.code.next_interval();
            self.data.next_interval();
        }
    }

    fn new_interval(&self) -> Interval {
        let Position { instruction, marker, .. } = self.position;
        Interval {
            first_instruction: instruction,
            virtual_ns: marker.virtual_ns,
            ..Interval::default()
        }
    }
}

/// Touches bytes of a block's code, which may reach into a second page.
fn touch_code(code: &mut Footprint, block: BlockRef<'_>, offset: u64, length: u64) {
    let in_page = PAGE_BYTES - block.physical() % PAGE_BYTES;
    let first = length.min(in_page.saturating_sub(offset));
    if first > 0 {
        code.touch(block.physical() + offset, first);
    }
    if let Some(page) = block.next_page().filter(|_| length > first) {
        code.touch(page + (offset + first - in_page), length - first);
    }
}

impl Tally {
    fn operations(&mut self, operations: &[Operation], runs: u64) {
        for operation in operations {
            *self.mnemonics.entry(operation.mnemonic).or_insert(0) += runs;
            *self.kinds.entry(operation.kind).or_insert(0) += runs;
            match operation.branch {
                Branch::None => {}
                Branch::Conditional => {
                    self.conditional.entry(operation.mnemonic).or_default().executed += runs;
                    self.directions[usize::from(operation.is_backward)].executed += runs;
                }
                branch => *self.branches.entry(branch).or_insert(0) += runs,
            }
        }
    }

    fn block(&mut self, key: BlockKey, runs: u64, instructions_each: u64) {
        let count = self.blocks.entry(key).or_default();
        count.runs += runs;
        count.instructions += runs * instructions_each;
        if instructions_each > 0 {
            self.block_lengths[size_class(instructions_each)] += runs;
        }
    }

    fn access(&mut self, access: &StaticAccess, runs: u64) {
        let size_bytes = u64::from(access.size_bytes);
        let both =
            [(access.kind.reads(), &mut self.reads), (access.kind.writes(), &mut self.writes)];
        for (_, accesses) in both.into_iter().filter(|(does, _)| *does) {
            accesses.count += runs;
            accesses.bytes += runs * size_bytes;
        }
        if access.kind.touches_memory() {
            self.access_sizes[size_class(size_bytes)] += runs;
        }
    }
}

impl Observer for Stats {
    fn begin(&mut self, position: &Position) -> Result<(), TraceError> {
        (self.begin, self.position) = (*position, *position);
        self.interval_end = position.instruction.saturating_add(self.interval_instructions);
        self.interval = self.new_interval();
        self.spaces.enter(position.cr3);
        Ok(())
    }

    fn new_blocks(&mut self) {
        self.settle();
        self.decoded.clear();
        self.seen.clear();
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        let (block, index, retired) = (run.block(), run.id() as usize, run.retired());
        if !matches!(self.seen.get(index), Some(Some(_))) {
            self.meet(run.id(), block);
        }
        let Some(mut seen) = self.seen[index].take() else { return Ok(()) };
        if retired > 0 {
            self.arrive(run.linear());
            if let Some(last) = seen.operations.get(run.first() + retired - 1)
                && last.branch == Branch::Conditional
            {
                let Operation { mnemonic, is_backward, next_linear, .. } = *last;
                self.undecided = Some(Undecided { next_linear, mnemonic, is_backward });
            }
        }
        let cpl = block.mode().cpl;
        self.tally.by_privilege[usize::from(cpl & 3)] += retired as u64;
        self.interval.count(cpl, retired as u64, run.addresses().len() as u64);
        if seen.is_plain && run.first() == 0 && !run.is_cut() {
            self.count_whole(run, &mut seen);
        } else {
            self.count_steps(run, &seen);
        }
        self.seen[index] = Some(seen);
        self.position.pass_run(run);
        self.look_at_the_time();
        Ok(())
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        match *event {
            Event::Delivery { kind, vector, address, .. } => {
                self.arrive(address);
                *self.events.deliveries.entry((delivery_class(kind), vector)).or_insert(0) += 1;
                self.interval.deliveries += 1;
            }
            Event::Skipped { instructions, address } => {
                self.events.skipped = self.events.skipped.saturating_add(instructions);
                match address {
                    Some(address) => self.arrive(address),
                    None => self.undecided = None,
                }
            }
            Event::AddressSpace { cr3 } => {
                self.events.address_space_switches += 1;
                self.spaces.enter(cr3);
            }
            Event::Port { direction, .. } => self.events.port.count(direction),
            Event::Mmio { direction, .. } => self.events.mmio.count(direction),
            Event::Dma { direction, bytes, .. } => {
                self.events.dma.count(direction);
                self.events.dma_bytes = self.events.dma_bytes.saturating_add(bytes);
            }
            Event::PageWalk(walk) => self.events.page_walks.count(&walk),
            Event::Return { .. }
            | Event::SystemAccess { .. }
            | Event::MemoryWrite { .. }
            | Event::SecondPage { .. }
            | Event::Register { .. }
            | Event::Marker(_) => {}
        }
        self.position.pass_event(event);
        self.look_at_the_time();
        Ok(())
    }

    fn end(&mut self) -> Result<(), TraceError> {
        self.settle();
        self.end_interval();
        Ok(())
    }
}

impl PageWalks {
    fn count(&mut self, walk: &PageWalk) {
        *match walk.cause {
            WalkCause::Read => &mut self.for_reads,
            WalkCause::Write => &mut self.for_writes,
            WalkCause::Fetch => &mut self.for_fetches,
        } += 1;
        self.to_faults += u64::from(walk.page.is_none());
        self.entries_read += walk.reads().count() as u64;
        self.entries_marked += walk.reads().filter(|entry| entry.marked).count() as u64;
    }
}

impl Traffic {
    fn count(&mut self, direction: Direction) {
        match direction {
            Direction::In => self.reads += 1,
            Direction::Out => self.writes += 1,
        }
    }
}

/// Which of the rows of deliveries.
fn delivery_class(kind: Delivery) -> u8 {
    match kind {
        Delivery::Exception => 0,
        Delivery::Interrupt => 1,
        Delivery::NonMaskable => 2,
        Delivery::Software => 3,
    }
}
