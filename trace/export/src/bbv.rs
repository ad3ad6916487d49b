//! SimPoint's basic-block vectors: a line for each interval, with how many instructions each block
//! executed in it. Blocks are numbered from 1 as they come. A block is known again by its
//! guest-physical address and its bytes, so the same code counts as one in every process.
//!
//! An interval ends with the run that fills it. What is behind the last whole interval has no line:
//! SimPoint takes all lines to be equally long.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;

use reprise_trace::instructions::{BlockRef, Event, Observer, Run, TraceError};

use crate::formats::notes;

/// Instructions of an interval, where the user gives none: SimPoint's usual 100 million.
pub const DEFAULT_INTERVAL: u64 = 100_000_000;

/// What an export did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Lines written.
    pub intervals: u64,
    /// Different blocks met.
    pub blocks: u64,
    /// Instructions behind the last line.
    pub instructions_left_over: u64,
}

impl Summary {
    /// What a user should know of it.
    pub(crate) fn notes(&self) -> Vec<String> {
        notes(&[(
            self.instructions_left_over,
            "instructions behind the last whole interval have no line",
        )])
    }
}

/// Writes basic-block vectors.
#[derive(Debug)]
pub struct BasicBlockVectors<W> {
    out: W,
    interval: u64,
    /// Numbers less one, by what a block is known by.
    indexes: HashMap<(u64, u64), usize>,
    /// The same by the numbers of the trace.
    by_id: Vec<Option<usize>>,
    /// Instructions in this interval, by number less one.
    counts: Vec<u64>,
    instructions: u64,
    intervals: u64,
}

impl<W: Write> BasicBlockVectors<W> {
    /// Writes a line to `out` every `interval` instructions.
    pub fn new(out: W, interval: u64) -> Self {
        Self {
            out,
            interval: interval.max(1),
            indexes: HashMap::new(),
            by_id: Vec::new(),
            counts: Vec::new(),
            instructions: 0,
            intervals: 0,
        }
    }

    /// What was done so far.
    pub fn summary(&self) -> Summary {
        Summary {
            intervals: self.intervals,
            blocks: self.counts.len() as u64,
            instructions_left_over: self.instructions,
        }
    }

    /// What was written, and to where.
    pub fn into_parts(self) -> (W, Summary) {
        let summary = self.summary();
        (self.out, summary)
    }

    fn index(&mut self, id: u32, block: BlockRef<'_>) -> usize {
        let id = id as usize;
        if let Some(Some(index)) = self.by_id.get(id) {
            return *index;
        }
        let mut hasher = DefaultHasher::new();
        block.bytes().hash(&mut hasher);
        let next = self.indexes.len();
        let index = *self.indexes.entry((block.physical(), hasher.finish())).or_insert(next);
        if index == self.counts.len() {
            self.counts.push(0);
        }
        if id >= self.by_id.len() {
            self.by_id.resize(id + 1, None);
        }
        self.by_id[id] = Some(index);
        index
    }

    fn put_line(&mut self) -> Result<(), TraceError> {
        let mut line = String::from("T");
        for (index, count) in self.counts.iter_mut().enumerate() {
            if *count > 0 {
                line.push_str(&format!(":{}:{count} ", index + 1));
                *count = 0;
            }
        }
        line.push('\n');
        self.intervals += 1;
        self.out.write_all(line.as_bytes()).map_err(TraceError::Write)
    }
}

impl<W: Write> Observer for BasicBlockVectors<W> {
    fn new_blocks(&mut self) {
        self.by_id.clear();
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        let index = self.index(run.id(), run.block());
        self.counts[index] += run.retired() as u64;
        self.instructions += run.retired() as u64;
        if self.instructions >= self.interval {
            self.instructions -= self.interval;
            self.put_line()?;
        }
        Ok(())
    }

    fn event(&mut self, _: &Event) -> Result<(), TraceError> {
        Ok(())
    }

    fn end(&mut self) -> Result<(), TraceError> {
        self.out.flush().map_err(TraceError::Write)
    }
}
