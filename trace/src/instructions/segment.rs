//! A segment: some millions of instructions that decode by themselves. Writer and reader of its
//! bytes; `FORMAT.md` describes them.

use std::collections::HashMap;

use zstd::bulk::Compressor;

use super::batch::{Batch, CUT, EVENT, MAX_RUN_ACCESSES};
use super::block::{
    BlockDefinition, BlockRef, Blocks, MAX_BLOCK_ACCESSES, MAX_BLOCK_INSTRUCTIONS, PAGE_BYTES,
    RegisterWrite,
};
use super::columns::{Column, ColumnReaders, Columns};
use super::dictionary::{DefinitionTaker, Previous, put_block};
use super::event::Event;
use super::head::{Fault, MAX_SEGMENT_BLOCKS, MAX_SEGMENT_ITEMS, SegmentHead, SegmentOptions};
use super::predict::NONE;
use super::run::{Group, Position, Run, groups, value_words};
use super::streams::{AddressStream, BlockStream, PageStream};
use super::{Contents, TraceError};
use crate::varint::{Taker, put, put_difference};

/// The most instructions, and accesses with register writes, in a segment's definitions.
const MAX_SEGMENT_DEFINITIONS: usize = 1 << 22;
/// A writer ends a segment whose columns have this many bytes. What one run adds behind that stays far
/// below [`super::columns::MAX_COLUMN_BYTES`].
const FULL_COLUMN_BYTES: u64 = 32 << 20;
/// The most words of values that a run brings.
const MAX_RUN_VALUES: usize = 1 << 20;
/// Runs between looks at the size of all columns.
const RUNS_BETWEEN_LOOKS: u64 = 32;
/// Room for the definitions that come between looks.
const MORE_DEFINITIONS: usize =
    RUNS_BETWEEN_LOOKS as usize * (MAX_BLOCK_INSTRUCTIONS + MAX_BLOCK_ACCESSES);
/// A reader gives batches of about this many words.
const BATCH_WORDS: usize = 1 << 14;
/// And of about this many addresses.
const BATCH_ADDRESSES: usize = 1 << 16;

/// Marks: the byte of a cut. The others are events.
const CUT_TAG: u8 = 0;

/// The last value of each word of each register.
type RegisterValues = HashMap<(u8, u8), u64>;

/// A block of the segment under construction.
#[derive(Clone, Copy, Debug)]
struct LocalBlock {
    first_site: u32,
    access_count: u32,
    varies: bool,
}

/// Makes segments of runs and events.
pub(crate) struct SegmentEncoder {
    contents: Contents,
    /// There is more than addresses.
    has_more: bool,
    options: SegmentOptions,
    compressor: Compressor<'static>,
    columns: Columns,
    head: SegmentHead,
    position: Position,
    /// Numbers in the segment, by the numbers that runs come with.
    local_ids: Vec<u32>,
    /// The same for blocks of which a filter left only what is behind an instruction.
    local_parts: HashMap<(u32, usize), u32>,
    locals: Vec<LocalBlock>,
    definition_sizes: (usize, usize),
    previous: Previous,
    blocks: BlockStream,
    addresses: AddressStream,
    pages: PageStream,
    register_values: RegisterValues,
    runs_at_mark: u64,
    groups: Vec<Group>,
}

impl SegmentEncoder {
    /// Starts a segment at `position`.
    pub(crate) fn new(
        contents: Contents,
        options: SegmentOptions,
        position: Position,
    ) -> Result<Self, TraceError> {
        let options = SegmentOptions {
            instructions: options.instructions.clamp(1, MAX_SEGMENT_ITEMS / 2),
            level: options.level.clamp(1, 19),
        };
        Ok(Self {
            contents,
            has_more: contents != Contents::default(),
            options,
            compressor: Compressor::new(options.level).map_err(TraceError::Write)?,
            columns: Columns::default(),
            head: SegmentHead { start: position, ..SegmentHead::default() },
            position,
            local_ids: Vec::new(),
            local_parts: HashMap::new(),
            locals: Vec::new(),
            definition_sizes: (0, 0),
            previous: Previous::default(),
            blocks: BlockStream::new(),
            addresses: AddressStream::new(),
            pages: PageStream::new(),
            register_values: RegisterValues::new(),
            runs_at_mark: 0,
            groups: Vec::new(),
        })
    }

    /// Where the next run begins.
    pub(crate) fn position(&self) -> Position {
        self.position
    }

    /// Whether nothing is in the segment.
    pub(crate) fn is_empty(&self) -> bool {
        self.head.runs == 0 && self.columns.bytes() == 0
    }

    /// Sets where the segment begins, which is empty.
    pub(crate) fn restart(&mut self, position: Position) {
        self.position = position;
        self.head.start = position;
    }

    /// The numbers that runs come with mean other blocks from here on.
    pub(crate) fn new_blocks(&mut self) {
        self.local_ids.clear();
        self.local_parts.clear();
    }

    /// Takes a run; true if the segment is to be finished now.
    #[inline]
    pub(crate) fn run(&mut self, run: &Run<'_>) -> Result<bool, TraceError> {
        if run.values.len() > MAX_RUN_VALUES {
            return Err(TraceError::Contract("a run has more values than a trace stores"));
        }
        let local = match self.local_ids.get(run.id as usize) {
            Some(local) if *local != NONE && run.first == 0 => *local,
            _ => self.local(run)?,
        };
        self.blocks.put(&mut self.columns, local);
        self.head.runs += 1;
        let LocalBlock { first_site, access_count, varies } = self.locals[local as usize];
        let first_site = first_site as usize;
        let is_cut = run.is_cut();
        if is_cut {
            self.put_mark_distance();
            let out = self.columns.get(Column::Marks);
            out.push(CUT_TAG);
            put(out, run.retired() as u64);
            put(out, run.unretired_accesses as u64);
        }
        let plain = !is_cut && !varies && run.addresses.len() == access_count as usize;
        if plain {
            self.addresses.put(&mut self.columns, first_site, run.addresses);
        } else {
            self.put_groups(run, first_site)?;
        }
        if self.has_more {
            self.put_optional(run)?;
        }
        self.head.accesses += run.addresses.len() as u64;
        self.head.instructions += run.retired() as u64;
        self.position.pass_run(run);
        let look = !plain || self.has_more;
        Ok(self.head.instructions >= self.options.instructions
            || ((look || self.head.runs.is_multiple_of(RUNS_BETWEEN_LOOKS)) && self.is_full()))
    }

    /// Takes an event; true if the segment is to be finished now.
    pub(crate) fn event(&mut self, event: &Event) -> bool {
        self.put_mark_distance();
        event.encode(self.columns.get(Column::Marks));
        if let Event::Skipped { instructions, .. } = event {
            self.head.skipped = self.head.skipped.saturating_add(*instructions);
        }
        self.position.pass_event(event);
        self.is_full()
    }

    /// Whether the segment has as much of anything as it may have, instructions apart.
    fn is_full(&self) -> bool {
        self.columns.bytes() >= FULL_COLUMN_BYTES
            || self.head.runs >= self.options.instructions
            || self.head.accesses >= MAX_SEGMENT_ITEMS / 2
            || self.locals.len() + RUNS_BETWEEN_LOOKS as usize > MAX_SEGMENT_BLOCKS
            || self.definition_sizes.0 + MORE_DEFINITIONS > MAX_SEGMENT_DEFINITIONS
            || self.definition_sizes.1 + MORE_DEFINITIONS > MAX_SEGMENT_DEFINITIONS
    }

    /// Ends the segment and gives its bytes; the next one begins.
    pub(crate) fn finish(&mut self) -> Result<(SegmentHead, Vec<u8>), TraceError> {
        self.blocks.finish(&mut self.columns);
        self.addresses.finish(&mut self.columns);
        self.pages.finish(&mut self.columns);
        self.head.blocks = self.locals.len() as u64;
        let head = self.head;
        let mut bytes = Vec::new();
        head.put(&mut bytes);
        self.columns.store(&mut self.compressor, &mut bytes)?;
        self.columns.clear();
        self.head = SegmentHead { start: self.position, ..SegmentHead::default() };
        self.new_blocks();
        self.locals.clear();
        self.definition_sizes = (0, 0);
        self.previous = Previous::default();
        self.blocks.clear();
        self.addresses.clear();
        self.pages.clear();
        self.register_values.clear();
        self.runs_at_mark = 0;
        Ok((head, bytes))
    }

    /// The number in this segment of a run's block, which may be new in it.
    fn local(&mut self, run: &Run<'_>) -> Result<u32, TraceError> {
        if run.first > 0 {
            if let Some(local) = self.local_parts.get(&(run.id, run.first)) {
                return Ok(*local);
            }
            let mut part = Blocks::default();
            part.define(&definition_from(run.block, run.first))?;
            let local = part.get(0).map_or(NONE, |block| self.define(block));
            self.local_parts.insert((run.id, run.first), local);
            return Ok(local);
        }
        let index = run.id as usize;
        if index >= self.local_ids.len() {
            self.local_ids.resize(index + 1, NONE);
        }
        let local = self.define(run.block);
        self.local_ids[index] = local;
        Ok(local)
    }

    fn define(&mut self, block: BlockRef<'_>) -> u32 {
        let accesses = block.static_accesses();
        let local = self.locals.len() as u32;
        let first_site = self.addresses.add(accesses) as u32;
        self.locals.push(LocalBlock {
            first_site,
            access_count: accesses.len() as u32,
            varies: block.raw().varies,
        });
        let writes: usize = block.instructions().map(|one| one.register_writes().len()).sum();
        self.definition_sizes.0 += block.instruction_count();
        self.definition_sizes.1 += accesses.len() + writes;
        self.blocks.add(block.end());
        put_block(&mut self.columns, &mut self.previous, block);
        local
    }

    /// Appends the addresses of a run that is cut, or has repeated instructions.
    fn put_groups(&mut self, run: &Run<'_>, first_site: usize) -> Result<(), TraceError> {
        let mut counts = run.counts.iter();
        let next = || counts.next().copied().ok_or(TraceError::Contract("a count is missing"));
        let range = (run.first, run.end);
        groups(run.block, range, run.unretired_accesses, next, &mut self.groups)?;
        let total: usize = self.groups.iter().map(|group| group.total).sum();
        if total != run.addresses.len() || counts.next().is_some() {
            return Err(TraceError::Contract("a run has other accesses than its block"));
        }
        let out = self.columns.get(Column::Counts);
        run.counts.iter().for_each(|count| put(out, u64::from(*count)));
        let mut rest = run.addresses;
        for Group { first, length, total } in &self.groups {
            let (here, behind) = rest.split_at(*total);
            for turn in here.chunks(*length) {
                self.addresses.put(&mut self.columns, first_site + first, turn);
            }
            rest = behind;
        }
        Ok(())
    }

    /// Appends the columns that a trace need not have.
    fn put_optional(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        let missing = |missing: bool| {
            let fault = TraceError::Contract("a run lacks what the trace's contents promise");
            if missing { Err(fault) } else { Ok(()) }
        };
        if self.contents.physical {
            missing(run.physical.len() != run.addresses.len())?;
            for (linear, physical) in run.addresses.iter().zip(run.physical) {
                self.pages.put(&mut self.columns, *linear, *physical);
            }
        }
        for step in run.steps() {
            if self.contents.values {
                let out = self.columns.get(Column::Values);
                for access in step.accesses() {
                    let size = usize::from(access.size_bytes);
                    let words = size.div_ceil(8);
                    missing(access.values.is_empty() || access.values.len() % words != 0)?;
                    access.values.chunks(words).for_each(|value| put_value(out, value, size));
                }
            }
            if self.contents.registers && step.retired {
                self.put_registers(step.instruction.register_writes(), step.registers);
            }
        }
        Ok(())
    }

    fn put_registers(&mut self, writes: &[RegisterWrite], values: &[u64]) {
        let slots =
            writes.iter().flat_map(|write| (0..write.words).map(|word| (write.register, word)));
        for (slot, value) in slots.zip(values) {
            let before = self.register_values.entry(slot).or_insert(0);
            put_difference(self.columns.get(Column::Registers), *before, *value);
            *before = *value;
        }
    }

    fn put_mark_distance(&mut self) {
        let distance = self.head.runs - self.runs_at_mark;
        self.runs_at_mark = self.head.runs;
        put(self.columns.get(Column::Marks), distance);
    }
}

/// The definition of what is left of a block from an instruction on.
fn definition_from(block: BlockRef<'_>, first: usize) -> BlockDefinition {
    let mut definition = block.to_definition();
    let bytes: usize = definition.instructions.drain(..first).map(|one| one.bytes.len()).sum();
    definition.linear = definition.linear.wrapping_add(bytes as u64);
    let in_page = definition.physical % PAGE_BYTES + bytes as u64;
    definition.physical += bytes as u64;
    if in_page >= PAGE_BYTES
        && let Some(page) = definition.next_page.take()
    {
        definition.physical = page + in_page - PAGE_BYTES;
    }
    definition
}

/// Appends the low bytes of a value.
fn put_value(out: &mut Vec<u8>, words: &[u64], size_bytes: usize) {
    let end = out.len() + size_bytes;
    words.iter().for_each(|word| out.extend_from_slice(&word.to_le_bytes()));
    out.truncate(end);
}

/// Reads a segment in batches.
pub(crate) struct SegmentDecoder {
    contents: Contents,
    head: SegmentHead,
    block_definitions: Blocks,
    /// The first site of each block.
    first_sites: Vec<u32>,
    columns: ColumnReaders,
    blocks: BlockStream,
    addresses: AddressStream,
    pages: PageStream,
    register_values: RegisterValues,
    /// Runs before the next mark, and its first byte.
    mark: Option<(u64, u8)>,
    runs: u64,
    instructions: u64,
    accesses: u64,
    groups: Vec<Group>,
}

impl SegmentDecoder {
    /// Reads the head and the definitions of a segment.
    pub(crate) fn new(contents: Contents, bytes: &[u8]) -> Result<Self, Fault> {
        let mut taker = Taker::new(bytes);
        let head = SegmentHead::take(&mut taker)?;
        let columns = ColumnReaders::load(&mut taker)?;
        let mut decoder = Self {
            contents,
            head,
            block_definitions: Blocks::default(),
            first_sites: Vec::new(),
            columns: columns.ok_or(Fault("its columns do not decompress to their lengths"))?,
            blocks: BlockStream::new(),
            addresses: AddressStream::new(),
            pages: PageStream::new(),
            register_values: RegisterValues::new(),
            mark: None,
            runs: 0,
            instructions: 0,
            accesses: 0,
            groups: Vec::new(),
        };
        decoder.take_definitions()?;
        decoder.blocks.start(&mut decoder.columns)?;
        decoder.addresses.start(&mut decoder.columns)?;
        decoder.pages.start(&mut decoder.columns)?;
        decoder.next_mark()?;
        Ok(decoder)
    }

    /// What stands before the columns.
    pub(crate) fn head(&self) -> &SegmentHead {
        &self.head
    }

    /// The blocks that batches name.
    pub(crate) fn definitions(&self) -> &Blocks {
        &self.block_definitions
    }

    /// Fills an empty batch with what comes next; false at the end.
    pub(crate) fn next_batch(&mut self, batch: &mut Batch) -> Result<bool, Fault> {
        self.take_events(batch)?;
        while self.runs < self.head.runs {
            if batch.words.len() >= BATCH_WORDS || batch.addresses.len() >= BATCH_ADDRESSES {
                return Ok(true);
            }
            self.take_run(batch)?;
            self.take_events(batch)?;
        }
        let counted = (self.instructions, self.accesses);
        let at_end = counted == (self.head.instructions, self.head.accesses)
            && self.mark.is_none()
            && self.blocks.is_at_end(self.block_definitions.len() as u32)
            && self.addresses.is_at_end()
            && self.pages.is_at_end()
            && self.columns.are_at_end(Column::BlockHits);
        if !at_end {
            return Err(Fault("it holds another number of things than its head says"));
        }
        Ok(!batch.words.is_empty())
    }

    fn take_definitions(&mut self) -> Result<(), Fault> {
        let columns = &self.columns;
        let mut definitions = DefinitionTaker::new(|column| columns.whole(column));
        for _ in 0..self.head.blocks {
            let block = definitions.block()?.ok_or(Fault("a block's definition is none"))?;
            let defined = self.block_definitions.define(&block);
            let id = defined.map_err(|_| Fault("a block's definition is none"))?;
            let (instructions, others) = self.block_definitions.sizes();
            if instructions > MAX_SEGMENT_DEFINITIONS || others > MAX_SEGMENT_DEFINITIONS {
                return Err(Fault("it defines more than a segment may"));
            }
            let Some(block) = self.block_definitions.get(id) else { continue };
            self.blocks.add(block.end());
            self.first_sites.push(self.addresses.add(block.static_accesses()) as u32);
        }
        if definitions.is_at_end() { Ok(()) } else { Err(Fault("it has unused definitions")) }
    }

    fn next_mark(&mut self) -> Result<(), Fault> {
        let marks = self.columns.get(Column::Marks);
        self.mark = None;
        if !marks.is_at_end() {
            let distance = marks.varint()?;
            self.mark = Some((self.runs.saturating_add(distance), marks.byte()?));
        }
        Ok(())
    }

    /// Takes the events that stand here.
    fn take_events(&mut self, batch: &mut Batch) -> Result<(), Fault> {
        while let Some((_, tag)) = self.mark.filter(|(runs, _)| *runs == self.runs) {
            let event = self.columns.get(Column::Marks).event(tag)?;
            batch.words.push(EVENT);
            batch.events.push(event.ok_or(Fault("an event is none"))?);
            self.next_mark()?;
        }
        Ok(())
    }

    fn take_run(&mut self, batch: &mut Batch) -> Result<(), Fault> {
        let count = self.block_definitions.len() as u32;
        let id = self.blocks.take(&mut self.columns, count)?;
        let out_of_bounds = Fault("it runs a block that it does not have");
        let block = self.block_definitions.get(id).ok_or(out_of_bounds)?;
        let raw = *block.raw();
        batch.words.push(id);
        self.runs += 1;
        let before = batch.addresses.len();
        let first_site = self.first_sites[id as usize] as usize;
        let is_cut = self.mark == Some((self.runs, CUT_TAG));
        let plain = !is_cut && !raw.varies;
        let mut retired = raw.instruction_count as usize;
        if plain {
            let (columns, count) = (&mut self.columns, raw.access_count as usize);
            self.addresses.take(columns, first_site, count, &mut batch.addresses)?;
            self.groups.clear();
            self.groups.push(Group { first: 0, length: count, total: count });
        } else {
            retired = self.take_groups(id, is_cut, first_site, batch)?;
        }
        self.instructions += retired as u64;
        self.accesses += (batch.addresses.len() - before) as u64;
        if self.instructions > self.head.instructions || self.accesses > self.head.accesses {
            return Err(Fault("it holds another number of things than its head says"));
        }
        if self.contents != Contents::default() {
            self.take_optional(id, retired, before, batch)?;
        }
        Ok(())
    }

    /// Takes the addresses of a run that is cut or has repeated instructions, and gives how many
    /// instructions retired.
    fn take_groups(
        &mut self,
        id: u32,
        is_cut: bool,
        first_site: usize,
        batch: &mut Batch,
    ) -> Result<usize, Fault> {
        let none = Fault("a run is none that its block could make");
        let block = self.block_definitions.get(id).ok_or(none)?;
        let (mut retired, mut unretired_accesses) = (block.instruction_count(), 0);
        if is_cut {
            let marks = self.columns.get(Column::Marks);
            let (end, accesses) = (marks.varint()?, marks.varint()?);
            if end >= retired as u64 || accesses > MAX_RUN_ACCESSES as u64 {
                return Err(none);
            }
            (retired, unretired_accesses) = (end as usize, accesses as usize);
            batch.words.extend([CUT | end as u32, accesses as u32]);
        }
        let counts = self.columns.get(Column::Counts);
        let next = || {
            let count = counts.varint().ok().and_then(|count| u32::try_from(count).ok());
            let count = count.ok_or(TraceError::Contract("a count is missing"))?;
            batch.counts.push(count);
            Ok(count)
        };
        groups(block, (0, retired), unretired_accesses, next, &mut self.groups)
            .map_err(|_| none)?;
        for Group { first, length, total } in &self.groups {
            let (columns, first_site) = (&mut self.columns, first_site + first);
            for _ in 0..total / length {
                self.addresses.take(columns, first_site, *length, &mut batch.addresses)?;
            }
            self.addresses.take(columns, first_site, total % length, &mut batch.addresses)?;
        }
        if is_cut {
            self.next_mark()?;
        }
        Ok(retired)
    }

    /// Takes the columns that a trace need not have; `first` is the run's first address.
    fn take_optional(
        &mut self,
        id: u32,
        retired: usize,
        first: usize,
        batch: &mut Batch,
    ) -> Result<(), Fault> {
        let Some(block) = self.block_definitions.get(id) else { return Ok(()) };
        if self.contents.physical {
            for linear in &batch.addresses[first..] {
                batch.physical.push(self.pages.take(&mut self.columns, *linear)?);
            }
        }
        if self.contents.values {
            let accesses = block.static_accesses();
            let lists =
                self.groups.iter().map(|one| (&accesses[one.first..][..one.length], one.total));
            if lists.clone().map(|(list, total)| value_words(list, total)).sum::<usize>()
                > MAX_RUN_VALUES
            {
                return Err(Fault("a run has more values than a trace stores"));
            }
            let values = self.columns.get(Column::Values);
            for access in lists.flat_map(|(list, total)| list.iter().cycle().take(total)) {
                let size = usize::from(access.size_bytes);
                for _ in 0..access.value_words() / size.div_ceil(8) {
                    take_value(values.bytes(size)?, &mut batch.values);
                }
            }
        }
        if self.contents.registers {
            let writes = block.instructions().take(retired).flat_map(|one| one.register_writes());
            for slot in writes.flat_map(|write| (0..write.words).map(|word| (write.register, word)))
            {
                let value = self.register_values.entry(slot).or_insert(0);
                *value = self.columns.get(Column::Registers).difference(*value)?;
                batch.registers.push(*value);
            }
        }
        Ok(())
    }
}

/// Appends a value as words, its missing high bytes zero.
fn take_value(bytes: &[u8], out: &mut Vec<u64>) {
    out.extend(bytes.chunks(8).map(|chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_le_bytes(word)
    }));
}
