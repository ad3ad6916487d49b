//! Shows observers what producers' batches hold.

use super::batch::{Batch, CUT, Definition, EVENT, MAX_RUN_ACCESSES, is_cut};
use super::block::{BlockRef, Blocks};
use super::run::{Observer, PlainRuns, Run, are_in_place, value_words};
use super::{Contents, TraceError};

/// Accesses of a run that come from one stretch of the block's list of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Group {
    /// The first of the stretch.
    pub(super) first: usize,
    /// How long the stretch is.
    pub(super) length: usize,
    /// How many accesses were made, going round.
    pub(super) total: usize,
}

/// Which accesses a run of the instructions from `first` to `end` made, counted from those of the
/// instruction `first`. `next_count` tells how often the next repeated instruction made its own.
pub(super) fn groups(
    block: BlockRef<'_>,
    (first, end): (usize, usize),
    unretired_accesses: usize,
    mut next_count: impl FnMut() -> Result<u32, TraceError>,
    groups: &mut Vec<Group>,
) -> Result<(), TraceError> {
    let (mut position, mut sum) = (0, 0);
    groups.clear();
    for (index, instruction) in block.instructions().enumerate().take(end + 1).skip(first) {
        let length = instruction.accesses().len();
        let total = if index == end {
            let most = if instruction.is_repeated() { MAX_RUN_ACCESSES } else { length };
            if unretired_accesses > most || (length == 0 && unretired_accesses > 0) {
                return Err(TraceError::Contract(
                    "an instruction made accesses that it cannot make",
                ));
            }
            unretired_accesses
        } else if instruction.is_repeated() {
            length * next_count()? as usize
        } else {
            length
        };
        sum += total;
        if sum > MAX_RUN_ACCESSES {
            return Err(TraceError::Contract("a run has more accesses than MAX_RUN_ACCESSES"));
        }
        if total > 0 {
            groups.push(Group { first: position, length, total });
        }
        position += length;
    }
    Ok(())
}

/// Takes batches from a producer, keeps the blocks that they define, and shows observers the runs.
#[derive(Debug, Default)]
pub struct Feed {
    contents: Contents,
    blocks: Blocks,
}

impl Feed {
    /// For batches that have these contents.
    pub fn new(contents: Contents) -> Self {
        Self { contents, blocks: Blocks::default() }
    }

    /// The blocks defined so far.
    pub fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    /// Shows `observer` what is in `batch`.
    ///
    /// # Errors
    /// If the batch does not keep the contract (then nothing behind the fault was shown), or the
    /// observer fails.
    pub fn push(
        &mut self,
        batch: &Batch,
        observer: &mut (impl Observer + ?Sized),
    ) -> Result<(), TraceError> {
        if batch.restart {
            self.blocks.clear();
            observer.new_blocks();
        }
        for Definition { id, block } in &batch.definitions {
            if *id as usize != self.blocks.len() {
                return Err(TraceError::Contract("blocks are numbered in the order of definition"));
            }
            self.blocks.define(block)?;
        }
        walk(&self.blocks, self.contents, batch, observer)
    }
}

/// Shows `observer` the runs and events of a batch, whose definitions are in `blocks` already.
pub(super) fn walk(
    blocks: &Blocks,
    contents: Contents,
    batch: &Batch,
    observer: &mut (impl Observer + ?Sized),
) -> Result<(), TraceError> {
    let mut walker = Walker {
        contents,
        is_plain: contents.is_plain(),
        runs: PlainRuns {
            blocks,
            words: &batch.words,
            addresses: &batch.addresses,
            physical: &batch.physical,
            has_physical: contents.physical,
        },
        counts: &batch.counts,
        values: &batch.values,
        registers: &batch.registers,
        groups: Vec::new(),
    };
    let mut events = batch.events.iter();
    loop {
        if walker.is_plain {
            observer.runs(&mut walker.runs)?;
        }
        let Some((word, rest)) = walker.runs.words.split_first() else { break };
        walker.runs.words = rest;
        if *word == EVENT {
            let event = events.next();
            observer.event(event.ok_or(TraceError::Contract("an event is missing"))?)?;
        } else {
            observer.run(&walker.run(*word)?)?;
        }
    }
    let at_end = walker.runs.addresses.is_empty()
        && walker.counts.is_empty()
        && walker.runs.physical.is_empty()
        && walker.values.is_empty()
        && walker.registers.is_empty()
        && events.as_slice().is_empty();
    if at_end { Ok(()) } else { Err(TraceError::Contract("a batch has more than its words say")) }
}

/// What of a batch is yet to come.
struct Walker<'a> {
    contents: Contents,
    /// There is nothing but addresses.
    is_plain: bool,
    runs: PlainRuns<'a>,
    counts: &'a [u32],
    values: &'a [u64],
    registers: &'a [u64],
    groups: Vec<Group>,
}

/// The next `count` of a column.
#[inline(always)]
fn take<'a, T>(column: &mut &'a [T], count: usize) -> Result<&'a [T], TraceError> {
    let (taken, rest) = column
        .split_at_checked(count)
        .ok_or(TraceError::Contract("a batch has less than its words say"))?;
    *column = rest;
    Ok(taken)
}

impl<'a> Walker<'a> {
    /// The run that `word` names.
    fn run(&mut self, word: u32) -> Result<Run<'a>, TraceError> {
        let blocks = self.runs.blocks;
        let block =
            blocks.get(word).ok_or(TraceError::Contract("a word names no defined block"))?;
        let is_cut = self.runs.words.first().is_some_and(|word| is_cut(*word));
        self.run_with_more(word, block, is_cut)
    }

    /// Any run.
    fn run_with_more(
        &mut self,
        id: u32,
        block: BlockRef<'a>,
        is_cut: bool,
    ) -> Result<Run<'a>, TraceError> {
        let (mut end, mut unretired_accesses) = (block.instruction_count(), 0);
        if is_cut {
            let words = take(&mut self.runs.words, 2)?;
            let retired = (words[0] & !CUT) as usize;
            if retired >= end || words[1] as usize > MAX_RUN_ACCESSES {
                return Err(TraceError::Contract("a cut run retires less than its block"));
            }
            (end, unretired_accesses) = (retired, words[1] as usize);
        }
        let counts = self.counts;
        let next = || Ok(take(&mut self.counts, 1)?[0]);
        groups(block, (0, end), unretired_accesses, next, &mut self.groups)?;
        let count = self.groups.iter().map(|group| group.total).sum();
        let addresses = take(&mut self.runs.addresses, count)?;
        let mut run = Run {
            id,
            block,
            first: 0,
            end,
            unretired_accesses,
            addresses,
            counts: &counts[..counts.len() - self.counts.len()],
            physical: &[],
            values: &[],
            registers: &[],
        };
        if self.contents.physical {
            run.physical = take(&mut self.runs.physical, count)?;
            if !are_in_place(addresses, run.physical) {
                return Err(TraceError::Contract(
                    "linear and physical address differ in their page",
                ));
            }
        }
        if self.contents.values {
            let list = block.static_accesses();
            let words = |group: &Group| {
                value_words(&list[group.first..group.first + group.length], group.total)
            };
            run.values = take(&mut self.values, self.groups.iter().map(words).sum())?;
        }
        if self.contents.registers {
            let retired = block.instructions().take(end);
            let writes = retired.flat_map(|instruction| instruction.register_writes());
            let words = writes.map(|write| usize::from(write.words)).sum();
            run.registers = take(&mut self.registers, words)?;
        }
        Ok(run)
    }
}
