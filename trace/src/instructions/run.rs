//! Runs of blocks with their accesses, as consumers see them.

use super::TraceError;
use super::batch::is_cut;
use super::block::{
    AccessKind, Block, BlockRef, Blocks, InstructionRef, NOWHERE_PAGE, PAGE_BYTES, StaticAccess,
};
use super::event::{Event, Marker};

/// Where in an execution a trace, or a piece of one, begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// Instructions retired before, since the machine started.
    pub instruction: u64,
    /// CR3.
    pub cr3: u64,
    /// The last marker before it, or at it.
    pub marker: Marker,
    /// Instructions retired before that marker.
    pub marker_instruction: u64,
}

impl Position {
    /// The guest's virtual time here, in nanoseconds since the machine started, as far as markers tell:
    /// each instruction behind the last one is taken to last a nanosecond.
    pub fn virtual_ns(&self) -> u64 {
        let since_marker = self.instruction.saturating_sub(self.marker_instruction);
        self.marker.virtual_ns.saturating_add(since_marker)
    }

    /// Goes past a run.
    #[inline]
    pub fn pass_run(&mut self, run: &Run<'_>) {
        self.instruction += run.retired() as u64;
    }

    /// Goes past an event.
    pub fn pass_event(&mut self, event: &Event) {
        match *event {
            Event::AddressSpace { cr3 } => self.cr3 = cr3,
            Event::Marker(marker) => {
                self.marker = marker;
                self.marker_instruction = self.instruction;
            }
            Event::Skipped { instructions, .. } => {
                self.instruction = self.instruction.saturating_add(instructions);
            }
            _ => {}
        }
    }
}

/// Consumes a trace. Filters, exporters and the native format's writer are observers; a filter
/// hands on to another.
pub trait Observer {
    /// The trace begins here. Called once, before anything else.
    ///
    /// # Errors
    /// If the observer cannot go on; it is not called again then.
    fn begin(&mut self, position: &Position) -> Result<(), TraceError> {
        let _ = position;
        Ok(())
    }

    /// Block numbers mean other blocks from here on: forget what was kept by number.
    fn new_blocks(&mut self) {}

    /// A block ran.
    ///
    /// # Errors
    /// If the observer cannot go on; it is not called again then.
    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError>;

    /// Blocks ran, one after the other. An observer that has nothing better to do with many at once
    /// leaves this as it is: then each of them comes to [`Observer::run`].
    ///
    /// # Errors
    /// If the observer cannot go on; it is not called again then.
    #[inline]
    fn runs(&mut self, runs: &mut PlainRuns<'_>) -> Result<(), TraceError> {
        runs.try_for_each(|run| self.run(&run))
    }

    /// Something happened, behind or within the run before.
    ///
    /// # Errors
    /// If the observer cannot go on; it is not called again then.
    fn event(&mut self, event: &Event) -> Result<(), TraceError>;

    /// The trace ends here. Called once, last.
    ///
    /// # Errors
    /// If what the observer kept back cannot be written.
    fn end(&mut self) -> Result<(), TraceError> {
        Ok(())
    }
}

impl<O: Observer + ?Sized> Observer for &mut O {
    fn begin(&mut self, position: &Position) -> Result<(), TraceError> {
        (**self).begin(position)
    }

    fn new_blocks(&mut self) {
        (**self).new_blocks();
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        (**self).run(run)
    }

    fn runs(&mut self, runs: &mut PlainRuns<'_>) -> Result<(), TraceError> {
        (**self).runs(runs)
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        (**self).event(event)
    }

    fn end(&mut self) -> Result<(), TraceError> {
        (**self).end()
    }
}

/// One observer after the other.
impl<A: Observer, B: Observer> Observer for (A, B) {
    fn begin(&mut self, position: &Position) -> Result<(), TraceError> {
        self.0.begin(position)?;
        self.1.begin(position)
    }

    fn new_blocks(&mut self) {
        self.0.new_blocks();
        self.1.new_blocks();
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        self.0.run(run)?;
        self.1.run(run)
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        self.0.event(event)?;
        self.1.event(event)
    }

    fn end(&mut self) -> Result<(), TraceError> {
        self.0.end()?;
        self.1.end()
    }
}

/// A run of a block, or the part of one that a filter left.
#[derive(Clone, Copy, Debug)]
pub struct Run<'a> {
    pub(crate) id: u32,
    pub(crate) block: BlockRef<'a>,
    /// Number of the first instruction of the block that belongs to it.
    pub(crate) first: usize,
    /// Number of the instruction behind the last that retired.
    pub(crate) end: usize,
    pub(crate) unretired_accesses: usize,
    pub(crate) addresses: &'a [u64],
    pub(crate) counts: &'a [u32],
    pub(crate) physical: &'a [u64],
    pub(crate) values: &'a [u64],
    pub(crate) registers: &'a [u64],
}

impl<'a> Run<'a> {
    /// The block's number, which stands for it until [`Observer::new_blocks`].
    #[inline]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The block.
    #[inline]
    pub fn block(&self) -> BlockRef<'a> {
        self.block
    }

    /// Number of the first instruction of the block that belongs to the run: 0, unless a filter
    /// left out what was before.
    #[inline]
    pub fn first(&self) -> usize {
        self.first
    }

    /// How many instructions retired.
    #[inline]
    pub fn retired(&self) -> usize {
        self.end - self.first
    }

    /// Whether control left after fewer instructions than the block has.
    #[inline]
    pub fn is_cut(&self) -> bool {
        self.end < self.block.instruction_count()
    }

    /// Accesses made by an instruction that did not retire.
    #[inline]
    pub fn unretired_accesses(&self) -> usize {
        self.unretired_accesses
    }

    /// Linear addresses of all accesses, in order.
    #[inline]
    pub fn addresses(&self) -> &'a [u64] {
        self.addresses
    }

    /// Guest-physical addresses of all accesses, in order, or nothing. What leads nowhere lies in
    /// [`super::NOWHERE_PAGE`].
    #[inline]
    pub fn physical(&self) -> &'a [u64] {
        self.physical
    }

    /// Linear address of the run's first instruction.
    #[inline]
    pub fn linear(&self) -> u64 {
        self.block.instruction(self.first).map_or(self.block.linear(), |first| first.linear())
    }

    /// Its instructions with what they accessed. The last one has not retired, if an instruction that
    /// did not retire made accesses.
    pub fn steps(&self) -> Steps<'a> {
        Steps { run: *self, index: self.first, taken: Taken::default() }
    }

    /// The part of the run that is these instructions of the block, by number: a part of
    /// `first()..first() + retired()`. What an instruction accessed that did not retire belongs to the
    /// part that reaches up to it.
    pub fn part(&self, first: usize, end: usize) -> Self {
        let (first, end) = (first.clamp(self.first, self.end), end.clamp(self.first, self.end));
        let mut steps = self.steps();
        while steps.index < first && steps.next().is_some() {}
        let from = steps.taken;
        let until = if end == self.end {
            self.everything()
        } else {
            while steps.index < end && steps.next().is_some() {}
            steps.taken
        };
        Self {
            first,
            end: end.max(first),
            unretired_accesses: if end == self.end { self.unretired_accesses } else { 0 },
            addresses: slice(self.addresses, from.addresses, until.addresses),
            counts: slice(self.counts, from.counts, until.counts),
            physical: slice(self.physical, from.addresses, until.addresses),
            values: slice(self.values, from.values, until.values),
            registers: slice(self.registers, from.registers, until.registers),
            ..*self
        }
    }

    fn everything(&self) -> Taken {
        Taken {
            addresses: self.addresses.len(),
            counts: self.counts.len(),
            values: self.values.len(),
            registers: self.registers.len(),
        }
    }
}

/// A part of a column, which is empty where the trace does not have the column.
fn slice<T>(all: &[T], from: usize, until: usize) -> &[T] {
    all.get(from..until).unwrap_or_default()
}

/// How much of a run's columns went by.
#[derive(Clone, Copy, Debug, Default)]
struct Taken {
    addresses: usize,
    counts: usize,
    values: usize,
    registers: usize,
}

/// Instructions of a run: see [`Run::steps`].
#[derive(Clone, Debug)]
pub struct Steps<'a> {
    run: Run<'a>,
    index: usize,
    taken: Taken,
}

/// An instruction of a run with what it accessed.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// The instruction.
    pub instruction: InstructionRef<'a>,
    /// Its number in the block.
    pub index: usize,
    /// Whether it retired.
    pub retired: bool,
    /// How often a repeated instruction that retired made its accesses; 1 for any other.
    pub repetitions: u32,
    /// Linear addresses, one an access.
    pub addresses: &'a [u64],
    /// Guest-physical addresses, one an access, or nothing: as [`Run::physical`].
    pub physical: &'a [u64],
    /// Values of all accesses, or nothing.
    pub values: &'a [u64],
    /// Values of the registers written, or nothing.
    pub registers: &'a [u64],
}

impl<'a> Iterator for Steps<'a> {
    type Item = Step<'a>;

    fn next(&mut self) -> Option<Step<'a>> {
        let run = self.run;
        let retired = self.index < run.end;
        let unfinished = self.index == run.end && run.unretired_accesses > 0;
        if !retired && !unfinished {
            return None;
        }
        let instruction = run.block.instruction(self.index)?;
        let list = instruction.accesses();
        let mut repetitions = 1;
        if retired && instruction.is_repeated() {
            repetitions = run.counts.get(self.taken.counts).copied().unwrap_or(0);
            self.taken.counts += 1;
        }
        let from = self.taken;
        let accesses =
            if retired { list.len() * repetitions as usize } else { run.unretired_accesses };
        self.taken.addresses += accesses;
        if !run.values.is_empty() {
            self.taken.values += value_words(list, accesses);
        }
        if retired && !run.registers.is_empty() {
            let words = instruction.register_writes().iter().map(|write| usize::from(write.words));
            self.taken.registers += words.sum::<usize>();
        }
        let until = self.taken;
        let step = Step {
            instruction,
            index: self.index,
            retired,
            repetitions,
            addresses: slice(run.addresses, from.addresses, until.addresses),
            physical: slice(run.physical, from.addresses, until.addresses),
            values: slice(run.values, from.values, until.values),
            registers: slice(run.registers, from.registers, until.registers),
        };
        self.index += 1;
        Some(step)
    }
}

/// Words of the values of this many accesses, made in turn as `list` says.
pub(super) fn value_words(list: &[StaticAccess], accesses: usize) -> usize {
    if list.is_empty() {
        return 0;
    }
    let words = |part: &[StaticAccess]| part.iter().map(StaticAccess::value_words).sum::<usize>();
    words(list) * (accesses / list.len()) + words(&list[..accesses % list.len()])
}

/// One access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access<'a> {
    /// Linear address.
    pub address: u64,
    /// Guest-physical address, if the trace has it and the linear one leads anywhere.
    pub physical: Option<u64>,
    /// What it does.
    pub kind: AccessKind,
    /// Bytes.
    pub size_bytes: u16,
    /// Its value in eight-byte words, or nothing: see [`StaticAccess::value_words`].
    pub values: &'a [u64],
}

impl<'a> Step<'a> {
    /// Its accesses, in order.
    #[inline]
    pub fn accesses(&self) -> impl Iterator<Item = Access<'a>> + use<'a> {
        let step = *self;
        let mut values_taken = 0;
        let kinds = step.instruction.accesses().iter().cycle();
        step.addresses.iter().zip(kinds).enumerate().map(move |(number, (address, access))| {
            let first_value = values_taken;
            if !step.values.is_empty() {
                values_taken += access.value_words();
            }
            Access {
                address: *address,
                physical: place_of(access.kind, step.physical.get(number).copied()),
                kind: access.kind,
                size_bytes: access.size_bytes,
                values: slice(step.values, first_value, values_taken),
            }
        })
    }
}

/// A guest-physical address as an observer sees it.
#[inline]
fn place_of(kind: AccessKind, physical: Option<u64>) -> Option<u64> {
    physical.filter(|place| kind.touches_memory() || place & !(PAGE_BYTES - 1) != NOWHERE_PAGE)
}

/// Whether each physical address is at the same place in its page as the linear one.
#[inline]
pub(super) fn are_in_place(linear: &[u64], physical: &[u64]) -> bool {
    let apart = linear.iter().zip(physical).fold(0, |apart, (a, b)| apart | (a ^ b));
    linear.len() == physical.len() && apart % PAGE_BYTES == 0
}

/// Whole runs with nothing but addresses, as far as nothing else comes between. Whoever is given them
/// takes all of them.
#[derive(Clone, Copy, Debug)]
pub struct PlainRuns<'a> {
    pub(super) blocks: &'a Blocks,
    pub(super) words: &'a [u32],
    pub(super) addresses: &'a [u64],
    pub(super) physical: &'a [u64],
    pub(super) has_physical: bool,
}

impl<'a> PlainRuns<'a> {
    /// The run behind so many others, if it is plain too: its block and the number of that.
    #[inline(always)]
    pub(super) fn plain(&self, behind: usize) -> Option<(u32, &'a Block)> {
        let id = *self.words.get(behind)?;
        let block = self.blocks.get(id)?.raw();
        let is_cut = self.words.get(behind + 1).is_some_and(|word| is_cut(*word));
        (!block.varies && !is_cut).then_some((id, block))
    }

    /// Takes so many runs, all of them plain, which have so many accesses.
    pub(super) fn split(&mut self, words: usize, addresses: usize) -> Result<Self, TraceError> {
        let short = TraceError::Contract("a batch has less than its words say");
        let physical = if self.has_physical { addresses } else { 0 };
        let (Some(words), Some(addresses), Some(physical)) = (
            self.words.split_at_checked(words),
            self.addresses.split_at_checked(addresses),
            self.physical.split_at_checked(physical),
        ) else {
            return Err(short);
        };
        if self.has_physical && !are_in_place(addresses.0, physical.0) {
            return Err(TraceError::Contract("linear and physical address differ in their page"));
        }
        let taken = Self { words: words.0, addresses: addresses.0, physical: physical.0, ..*self };
        (self.words, self.addresses, self.physical) = (words.1, addresses.1, physical.1);
        Ok(taken)
    }
}

impl<'a> Iterator for PlainRuns<'a> {
    type Item = Run<'a>;

    #[inline(always)]
    fn next(&mut self) -> Option<Run<'a>> {
        let (id, words) = self.words.split_first()?;
        let block = self.blocks.get(*id)?;
        let raw = block.raw();
        if raw.varies || words.first().is_some_and(|word| is_cut(*word)) {
            return None;
        }
        let count = raw.access_count as usize;
        let (addresses, rest) = self.addresses.split_at_checked(count)?;
        let mut physical: &[u64] = &[];
        if self.has_physical {
            let rest;
            (physical, rest) = self.physical.split_at_checked(count)?;
            if !are_in_place(addresses, physical) {
                return None;
            }
            self.physical = rest;
        }
        (self.words, self.addresses) = (words, rest);
        Some(Run {
            id: *id,
            block,
            first: 0,
            end: raw.instruction_count as usize,
            unretired_accesses: 0,
            addresses,
            counts: &[],
            physical,
            values: &[],
            registers: &[],
        })
    }
}
