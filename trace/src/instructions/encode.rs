//! Makes segments of runs and events; `decode.rs` reads them back, and `FORMAT.md` describes their bytes.

use std::collections::HashMap;

use zstd::bulk::Compressor;

use super::batch::is_cut;
use super::block::{
    BlockDefinition, BlockRef, Blocks, MAX_BLOCK_ACCESSES, MAX_BLOCK_INSTRUCTIONS, PAGE_BYTES,
    RegisterWrite,
};
use super::columns::{Column, Columns};
use super::dictionary::{Previous, put_block};
use super::event::Event;
use super::feed::{Group, groups};
use super::head::{
    CUT_TAG, MAX_RUN_VALUES, MAX_SEGMENT_BLOCKS, MAX_SEGMENT_DEFINITIONS, MAX_SEGMENT_ITEMS,
    SegmentHead, SegmentOptions,
};
use super::predict::NONE;
use super::run::{PlainRuns, Position, Run, are_in_place};
use super::streams::{AddressStream, BlockStream, PageStream};
use super::{Contents, TraceError};
use crate::varint::{put, put_difference};

/// A writer ends a segment whose columns have this many bytes. What one run adds behind that stays far
/// below [`super::columns::MAX_COLUMN_BYTES`].
const FULL_COLUMN_BYTES: u64 = 32 << 20;
/// Runs between looks at the size of all columns.
const RUNS_BETWEEN_LOOKS: u64 = 32;
/// Room for the definitions that come between looks.
const MORE_DEFINITIONS: usize =
    RUNS_BETWEEN_LOOKS as usize * (MAX_BLOCK_INSTRUCTIONS + MAX_BLOCK_ACCESSES);

/// The last value of each word of each register.
pub(super) type RegisterValues = HashMap<(u8, u8), u64>;

/// Makes segments of runs and events.
pub(crate) struct SegmentEncoder {
    contents: Contents,
    options: SegmentOptions,
    compressor: Compressor<'static>,
    columns: Columns,
    head: SegmentHead,
    /// Where the segment's last event stands.
    position: Position,
    /// Numbers in the segment, by the numbers that runs come with.
    local_ids: Vec<u32>,
    /// The same for blocks of which a filter left only what is behind an instruction.
    local_parts: HashMap<(u32, usize), u32>,
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
            options,
            compressor: Compressor::new(options.level).map_err(TraceError::Write)?,
            columns: Columns::default(),
            head: SegmentHead { start: position, ..SegmentHead::default() },
            position,
            local_ids: Vec::new(),
            local_parts: HashMap::new(),
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
        Position { instruction: self.head.end(), ..self.position }
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

    /// Takes runs until none is left or, then true, until the segment is to be finished.
    pub(crate) fn runs(&mut self, runs: &mut PlainRuns<'_>) -> Result<bool, TraceError> {
        loop {
            let most = (RUNS_BETWEEN_LOOKS - self.head.runs % RUNS_BETWEEN_LOOKS) as usize;
            let mut accesses = [(0, 0); RUNS_BETWEEN_LOOKS as usize];
            let taken = self.put_blocks(runs, &mut accesses[..most]);
            let (before, addresses) = (self.head.accesses, runs.addresses);
            self.put_addresses(runs, &accesses[..taken])?;
            if self.contents.physical {
                let count = addresses.len() - runs.addresses.len();
                let (here, behind) = split_at(runs.physical, count)?;
                self.put_pages(&addresses[..count], here, before)?;
                runs.physical = behind;
            }
            if self.head.instructions >= self.options.instructions
                || (taken == most && self.is_full())
            {
                return Ok(true);
            }
            if taken < most && !self.defines_next(runs) {
                return Ok(false);
            }
        }
    }

    /// Appends the blocks of runs, as long as they are known; at most as many as there is room for in
    /// `accesses`, which gets the first site of each and their number. Gives how many there are.
    #[inline(always)]
    fn put_blocks(&mut self, runs: &mut PlainRuns<'_>, accesses: &mut [(u32, u32)]) -> usize {
        let mut place = self.blocks.predictor.place;
        let mut instructions = self.head.instructions;
        let mut taken = 0;
        let words = runs.words;
        for (accesses, word) in accesses.iter_mut().zip(words) {
            if words.get(taken + 1).is_some_and(|word| is_cut(*word)) {
                break;
            }
            let Some(local) = self.local_ids.get(*word as usize) else { break };
            let Some(block) = self.blocks.predictor.blocks.get(*local as usize) else { break };
            if block.varies || instructions >= self.options.instructions {
                break;
            }
            *accesses = (block.first_site, block.access_count);
            instructions += u64::from(block.instruction_count);
            let mut leads = block.leads();
            if place.expected != *local {
                let before = self.head.runs + taken as u64;
                leads = self.blocks.put_surprise(&mut self.columns, place, *local, before);
            }
            self.blocks.predictor.next(&mut place, *local, leads);
            taken += 1;
        }
        self.blocks.predictor.place = place;
        self.head.instructions = instructions;
        self.head.runs += taken as u64;
        runs.words = &words[taken..];
        taken
    }

    /// Appends the addresses of runs, by the first site of each and their number.
    #[inline(always)]
    fn put_addresses(
        &mut self,
        runs: &mut PlainRuns<'_>,
        accesses: &[(u32, u32)],
    ) -> Result<(), TraceError> {
        let all = runs.addresses;
        let mut rest = all;
        for (first_site, count) in accesses {
            let (here, behind) = split_at(rest, *count as usize)?;
            let before = self.head.accesses + (all.len() - rest.len()) as u64;
            self.addresses.put(&mut self.columns, *first_site as usize, here, before);
            rest = behind;
        }
        self.head.accesses += (all.len() - rest.len()) as u64;
        runs.addresses = rest;
        Ok(())
    }

    /// Appends guest-physical addresses, before which `before` accesses were made.
    fn put_pages(
        &mut self,
        linear: &[u64],
        physical: &[u64],
        before: u64,
    ) -> Result<(), TraceError> {
        if !are_in_place(linear, physical) {
            return Err(TraceError::Contract("linear and physical address differ in their page"));
        }
        self.pages.put(&mut self.columns, linear, physical, before);
        Ok(())
    }

    /// Whether the next run's block was not known yet, and is now.
    fn defines_next(&mut self, runs: &PlainRuns<'_>) -> bool {
        let Some(id) = runs.words.first() else { return false };
        let known = self.local_ids.get(*id as usize).is_some_and(|local| *local != NONE);
        match runs.blocks.get(*id) {
            Some(block) if !known => {
                self.local(*id, block);
                true
            }
            _ => false,
        }
    }

    /// Takes a run; true if the segment is to be finished now.
    pub(crate) fn run(&mut self, run: &Run<'_>) -> Result<bool, TraceError> {
        if run.values.len() > MAX_RUN_VALUES {
            return Err(TraceError::Contract("a run has more values than a trace stores"));
        }
        let local = match self.local_ids.get(run.id as usize) {
            Some(local) if *local != NONE && run.first == 0 => *local,
            _ if run.first == 0 => self.local(run.id, run.block),
            _ => self.local_part(run)?,
        };
        let mut place = self.blocks.predictor.place;
        if place.expected != local {
            self.blocks.put_surprise(&mut self.columns, place, local, self.head.runs);
        }
        let block = self.blocks.predictor.blocks[local as usize];
        self.blocks.predictor.next(&mut place, local, block.leads());
        self.blocks.predictor.place = place;
        self.head.runs += 1;
        let first_site = block.first_site as usize;
        let is_cut = run.is_cut();
        if is_cut {
            self.put_mark_distance();
            let out = self.columns.get(Column::Marks);
            out.push(CUT_TAG);
            put(out, run.retired() as u64);
            put(out, run.unretired_accesses as u64);
        }
        let is_whole =
            !is_cut && !block.varies && run.addresses.len() == block.access_count as usize;
        if is_whole {
            let before = self.head.accesses;
            self.addresses.put(&mut self.columns, first_site, run.addresses, before);
        } else {
            self.put_groups(run, first_site)?;
        }
        if self.contents.physical {
            self.put_pages(run.addresses, run.physical, self.head.accesses)?;
        }
        if !self.contents.is_plain() {
            self.put_values(run)?;
        }
        self.head.accesses += run.addresses.len() as u64;
        self.head.instructions += run.retired() as u64;
        let look = !(is_whole && self.contents.is_plain())
            || self.head.runs.is_multiple_of(RUNS_BETWEEN_LOOKS);
        Ok(self.head.instructions >= self.options.instructions || (look && self.is_full()))
    }

    /// Takes an event; true if the segment is to be finished now.
    pub(crate) fn event(&mut self, event: &Event) -> bool {
        self.put_mark_distance();
        event.encode(self.columns.get(Column::Marks));
        self.position = self.position();
        self.position.pass_event(event);
        if let Event::Skipped { instructions, .. } = event {
            self.head.skipped = self.head.skipped.saturating_add(*instructions);
        }
        self.is_full()
    }

    /// Whether the segment has as much of anything as it may have, instructions apart.
    fn is_full(&self) -> bool {
        self.columns.bytes() >= FULL_COLUMN_BYTES
            || self.head.runs >= self.options.instructions
            || self.head.accesses >= MAX_SEGMENT_ITEMS / 2
            || self.blocks.count() + RUNS_BETWEEN_LOOKS as usize > MAX_SEGMENT_BLOCKS
            || self.definition_sizes.0 + MORE_DEFINITIONS > MAX_SEGMENT_DEFINITIONS
            || self.definition_sizes.1 + MORE_DEFINITIONS > MAX_SEGMENT_DEFINITIONS
    }

    /// Ends the segment and gives its bytes; the next one begins.
    pub(crate) fn finish(&mut self) -> Result<(SegmentHead, Vec<u8>), TraceError> {
        self.blocks.finish(&mut self.columns, self.head.runs);
        self.addresses.finish(&mut self.columns, self.head.accesses);
        if self.contents.physical {
            self.pages.finish(&mut self.columns, self.head.accesses);
        }
        self.head.blocks = self.blocks.count() as u64;
        let head = self.head;
        let mut bytes = Vec::new();
        head.put(&mut bytes);
        self.columns.store(&mut self.compressor, &mut bytes)?;
        self.columns.clear();
        self.position = self.position();
        self.head = SegmentHead { start: self.position, ..SegmentHead::default() };
        self.new_blocks();
        self.definition_sizes = (0, 0);
        self.previous = Previous::default();
        self.blocks.clear();
        self.addresses.clear();
        self.pages.clear();
        self.register_values.clear();
        self.runs_at_mark = 0;
        Ok((head, bytes))
    }

    /// The number in this segment of a block that is new in it.
    #[inline(never)]
    fn local(&mut self, id: u32, block: BlockRef<'_>) -> u32 {
        let index = id as usize;
        if index >= self.local_ids.len() {
            self.local_ids.resize(index + 1, NONE);
        }
        let local = self.define(block);
        self.local_ids[index] = local;
        local
    }

    /// The number in this segment of what a filter left of a block.
    fn local_part(&mut self, run: &Run<'_>) -> Result<u32, TraceError> {
        if let Some(local) = self.local_parts.get(&(run.id, run.first)) {
            return Ok(*local);
        }
        let mut part = Blocks::default();
        part.define(&definition_from(run.block, run.first))?;
        let local = part.get(0).map_or(NONE, |block| self.define(block));
        self.local_parts.insert((run.id, run.first), local);
        Ok(local)
    }

    fn define(&mut self, block: BlockRef<'_>) -> u32 {
        let accesses = block.static_accesses();
        let first_site = self.addresses.add(block);
        let writes: usize = block.instructions().map(|one| one.register_writes().len()).sum();
        self.definition_sizes.0 += block.instruction_count();
        self.definition_sizes.1 += accesses.len() + writes;
        put_block(&mut self.columns, &mut self.previous, block);
        self.blocks.add(block, first_site)
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
        let (mut rest, mut before) = (run.addresses, self.head.accesses);
        for Group { first, length, total } in &self.groups {
            let (here, behind) = rest.split_at(*total);
            for turn in here.chunks(*length) {
                self.addresses.put(&mut self.columns, first_site + first, turn, before);
                before += turn.len() as u64;
            }
            rest = behind;
        }
        Ok(())
    }

    /// Appends the values that a trace need not have.
    fn put_values(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        let missing = |missing: bool| {
            let fault = TraceError::Contract("a run lacks what the trace's contents promise");
            if missing { Err(fault) } else { Ok(()) }
        };
        for step in run.steps() {
            if self.contents.values {
                let out = self.columns.get(Column::Values);
                for access in step.accesses() {
                    let size = usize::from(access.size_bytes);
                    let words = size.div_ceil(8);
                    let has_none = access.values.is_empty() && access.kind.touches_memory();
                    missing(has_none || access.values.len() % words != 0)?;
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

/// The first `count` of a column, and the rest.
#[inline(always)]
fn split_at(column: &[u64], count: usize) -> Result<(&[u64], &[u64]), TraceError> {
    let none = TraceError::Contract("a batch has less than its words say");
    column.split_at_checked(count).ok_or(none)
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
