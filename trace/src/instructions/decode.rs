//! Reads segments back in batches; `encode.rs` makes them, and `FORMAT.md` describes their bytes.

use std::sync::Arc;

use super::batch::{Batch, CUT, EVENT, MAX_RUN_ACCESSES};
use super::block::Blocks;
use super::columns::{Column, ColumnReaders};
use super::dictionary::DefinitionTaker;
use super::encode::RegisterValues;
use super::feed::{Group, groups};
use super::head::{CUT_TAG, Fault, MAX_RUN_VALUES, MAX_SEGMENT_DEFINITIONS, SegmentHead};
use super::run::value_words;
use super::streams::{AddressStream, BlockStream, PageStream};
use super::{Contents, TraceError};
use crate::varint::Taker;

/// A reader gives batches of about this many words.
const BATCH_WORDS: usize = 1 << 14;
/// And of about this many addresses.
const BATCH_ADDRESSES: usize = 1 << 16;
/// Runs that are taken at once where nothing comes between.
const RUNS_AT_ONCE: usize = 32;

/// Reads a segment in batches.
pub(crate) struct SegmentDecoder {
    contents: Contents,
    /// There is nothing but addresses.
    is_plain: bool,
    head: SegmentHead,
    block_definitions: Arc<Blocks>,
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
            is_plain: contents.is_plain(),
            head,
            block_definitions: Arc::default(),
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
        if contents.physical {
            decoder.pages.start(&mut decoder.columns)?;
        }
        decoder.next_mark()?;
        Ok(decoder)
    }

    /// What stands before the columns.
    pub(crate) fn head(&self) -> &SegmentHead {
        &self.head
    }

    /// The blocks that batches name.
    pub(crate) fn definitions(&self) -> Arc<Blocks> {
        self.block_definitions.clone()
    }

    /// Fills an empty batch with what comes next; false at the end.
    pub(crate) fn next_batch(&mut self, batch: &mut Batch) -> Result<bool, Fault> {
        self.take_events(batch)?;
        while self.runs < self.head.runs {
            if batch.words.len() >= BATCH_WORDS || batch.addresses.len() >= BATCH_ADDRESSES {
                return Ok(true);
            }
            if self.is_plain && self.take_plain_runs(batch)? {
                continue;
            }
            self.take_run(batch)?;
            self.take_events(batch)?;
        }
        let counted = (self.instructions, self.accesses);
        let at_end = counted == (self.head.instructions, self.head.accesses)
            && self.mark.is_none()
            && self.blocks.is_at_end(self.head.runs)
            && self.addresses.is_at_end()
            && self.pages.is_at_end()
            && self.columns.are_at_end(Column::BlockHits);
        if !at_end {
            return Err(Fault("it holds another number of things than its head says"));
        }
        Ok(!batch.words.is_empty())
    }

    /// Takes whole runs of blocks that come as expected, a few at most, as far as nothing else comes
    /// between; false if there are none here.
    fn take_plain_runs(&mut self, batch: &mut Batch) -> Result<bool, Fault> {
        // The run before a mark may be cut by it.
        let end = self.mark.map_or(self.head.runs, |(runs, _)| self.head.runs.min(runs - 1));
        let mut accesses = [(0, 0); RUNS_AT_ONCE];
        let most = RUNS_AT_ONCE.min((end - self.runs) as usize);
        let (taken, retired) =
            self.blocks.take_expected(self.runs, &mut accesses[..most], &mut batch.words)?;
        let before = batch.addresses.len();
        for (first_site, count) in &accesses[..taken] {
            let (first_site, count) = (*first_site as usize, *count as usize);
            self.addresses.take(&mut self.columns, first_site, count, &mut batch.addresses)?;
        }
        if self.contents.physical {
            let linear = &batch.addresses[before..];
            self.pages.take(&mut self.columns, linear, &mut batch.physical)?;
        }
        self.runs += taken as u64;
        self.instructions += retired;
        self.accesses += (batch.addresses.len() - before) as u64;
        self.check_counts()?;
        Ok(taken > 0)
    }

    fn check_counts(&self) -> Result<(), Fault> {
        if self.instructions > self.head.instructions || self.accesses > self.head.accesses {
            return Err(Fault("it holds another number of things than its head says"));
        }
        Ok(())
    }

    fn take_definitions(&mut self) -> Result<(), Fault> {
        let columns = &self.columns;
        let mut definitions = DefinitionTaker::new(|column| columns.whole(column));
        let mut blocks = Blocks::default();
        for _ in 0..self.head.blocks {
            let block = definitions.block()?.ok_or(Fault("a block's definition is none"))?;
            let defined = blocks.define(&block);
            let id = defined.map_err(|_| Fault("a block's definition is none"))?;
            let (instructions, others) = blocks.sizes();
            if instructions > MAX_SEGMENT_DEFINITIONS || others > MAX_SEGMENT_DEFINITIONS {
                return Err(Fault("it defines more than a segment may"));
            }
            let Some(block) = blocks.get(id) else { continue };
            let first_site = self.addresses.add(block);
            self.blocks.add(block, first_site);
        }
        if !definitions.is_at_end() {
            return Err(Fault("it has unused definitions"));
        }
        self.block_definitions = Arc::new(blocks);
        Ok(())
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
        let (id, block) = self.blocks.take(&mut self.columns, self.runs)?;
        batch.words.push(id);
        self.runs += 1;
        let before = batch.addresses.len();
        let first_site = block.first_site as usize;
        let is_cut = self.mark == Some((self.runs, CUT_TAG));
        let plain = !is_cut && !block.varies;
        let mut retired = usize::from(block.instruction_count);
        if plain {
            let (columns, count) = (&mut self.columns, block.access_count as usize);
            self.addresses.take(columns, first_site, count, &mut batch.addresses)?;
            self.groups.clear();
            self.groups.push(Group { first: 0, length: count, total: count });
        } else {
            retired = self.take_groups(id, is_cut, first_site, batch)?;
        }
        self.instructions += retired as u64;
        self.accesses += (batch.addresses.len() - before) as u64;
        self.check_counts()?;
        if self.contents.physical {
            let linear = &batch.addresses[before..];
            self.pages.take(&mut self.columns, linear, &mut batch.physical)?;
        }
        if !self.is_plain {
            self.take_values(id, retired, batch)?;
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

    /// Takes the values that a trace need not have.
    fn take_values(&mut self, id: u32, retired: usize, batch: &mut Batch) -> Result<(), Fault> {
        let Some(block) = self.block_definitions.get(id) else { return Ok(()) };
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
