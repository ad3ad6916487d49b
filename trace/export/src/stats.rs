//! Counts over a trace: privileges, kinds of instructions, branches, accesses, the busiest blocks, and
//! the pages touched.

use std::collections::{HashMap, HashSet};
use std::fmt::{self, Write as _};

use iced_x86::Mnemonic;
use reprise_trace::instructions::{Delivery, Event, Observer, Run, TraceError};

use crate::instruction::{Branch, DecodedBlocks};

/// Pages, in bytes.
const PAGE_BYTES: u64 = 4096;
/// Rows of each table in the text.
const ROWS: usize = 20;
/// Columns of the longest bar of a histogram.
const BAR_COLUMNS: u64 = 40;

/// What a trace amounts to.
#[derive(Debug, Default)]
pub struct Stats {
    decoded: DecodedBlocks,
    /// Retired instructions by CPL.
    pub by_privilege: [u64; 4],
    /// Retired instructions left out of the trace.
    pub skipped: u64,
    /// Reads, and bytes read.
    pub reads: (u64, u64),
    /// Writes, and bytes written.
    pub writes: (u64, u64),
    /// Conditional branches, and how many of them were taken.
    pub conditional: (u64, u64),
    /// Other branches that retired: direct jumps, indirect jumps, calls, returns, system calls and
    /// returns from them.
    pub branches: HashMap<Branch, u64>,
    /// Exceptions and interrupts, by vector.
    pub deliveries: HashMap<(bool, u8), u64>,
    /// Retired instructions by name.
    mnemonics: HashMap<Mnemonic, u64>,
    /// Instructions that retired in each block, by its linear address and CPL.
    blocks: HashMap<(u64, u8), u64>,
    code_pages: HashSet<u64>,
    data_pages: HashSet<u64>,
    /// A conditional branch that retired last, by the address behind it.
    undecided: Option<u64>,
}

impl Stats {
    /// Retired instructions.
    pub fn instructions(&self) -> u64 {
        self.by_privilege.iter().sum()
    }

    /// Retired instructions by name, the most frequent first.
    pub fn mix(&self) -> Vec<(String, u64)> {
        let named = self.mnemonics.iter();
        sorted(named.map(|(name, count)| (format!("{name:?}").to_lowercase(), *count)))
    }

    /// Blocks by linear address and CPL, with the instructions that retired in them, the busiest
    /// first.
    pub fn top_blocks(&self) -> Vec<((u64, u8), u64)> {
        sorted(self.blocks.iter().map(|(block, count)| (*block, *count)))
    }

    /// Different linear pages that code and data accesses touched.
    pub fn pages(&self) -> (usize, usize) {
        (self.code_pages.len(), self.data_pages.len())
    }

    fn arrive(&mut self, address: u64) {
        if let Some(next) = self.undecided.take() {
            self.conditional.1 += u64::from(address != next);
        }
    }
}

/// The largest counts first; equal ones in the order of what they count.
fn sorted<T: Ord>(counts: impl Iterator<Item = (T, u64)>) -> Vec<(T, u64)> {
    let mut counts: Vec<_> = counts.collect();
    counts.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    counts
}

impl Observer for Stats {
    fn new_blocks(&mut self) {
        self.decoded.clear();
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        let block = run.block();
        let cpl = block.mode().cpl;
        let retired = run.retired() as u64;
        if retired > 0 {
            self.arrive(run.linear());
        }
        self.by_privilege[usize::from(cpl & 3)] += retired;
        *self.blocks.entry((block.linear(), cpl)).or_insert(0) += retired;
        self.code_pages.insert(block.linear() / PAGE_BYTES);
        let decoded = self.decoded.get(run.id(), block);
        for (step, decoded) in run.steps().zip(&decoded[run.first()..]) {
            for access in step.accesses() {
                let size = u64::from(access.size_bytes);
                self.data_pages.insert(access.address / PAGE_BYTES);
                let kinds = [(access.kind.reads(), &mut self.reads)];
                let both = kinds.into_iter().chain([(access.kind.writes(), &mut self.writes)]);
                for (_, (count, bytes)) in both.filter(|(does, _)| *does) {
                    *count += 1;
                    *bytes += size;
                }
            }
            if !step.retired {
                continue;
            }
            self.arrive(step.instruction.linear());
            *self.mnemonics.entry(decoded.mnemonic).or_insert(0) += 1;
            match decoded.branch {
                Branch::None => {}
                Branch::Conditional => {
                    self.conditional.0 += 1;
                    self.undecided = Some(step.instruction.next_linear());
                }
                branch => *self.branches.entry(branch).or_insert(0) += 1,
            }
        }
        Ok(())
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        match *event {
            Event::Delivery { kind, vector, address, .. } => {
                self.arrive(address);
                let is_exception = kind == Delivery::Exception;
                *self.deliveries.entry((is_exception, vector)).or_insert(0) += 1;
            }
            Event::Skipped { instructions, address } => {
                self.skipped += instructions;
                match address {
                    Some(address) => self.arrive(address),
                    None => self.undecided = None,
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// A share of a whole, in per cent.
fn per_cent(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 * 100.0 / whole as f64 }
}

/// A table with bars.
fn histogram(out: &mut String, rows: &[(String, u64)], whole: u64) -> fmt::Result {
    let longest = rows.first().map_or(1, |(_, count)| *count).max(1);
    for (name, count) in rows.iter().take(ROWS) {
        let bar = "#".repeat((count * BAR_COLUMNS / longest) as usize);
        writeln!(out, "  {name:<20} {count:>14} {:>6.2}%  {bar}", per_cent(*count, whole))?;
    }
    Ok(())
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = self.instructions();
        let mut text = String::new();
        writeln!(text, "instructions {whole}, left out {}", self.skipped)?;
        for (cpl, count) in self.by_privilege.iter().enumerate().filter(|(_, count)| **count > 0) {
            writeln!(text, "  CPL {cpl} {count:>14} {:>6.2}%", per_cent(*count, whole))?;
        }
        let ((reads, read), (writes, written)) = (self.reads, self.writes);
        writeln!(text, "reads {reads} ({read} bytes), writes {writes} ({written} bytes)")?;
        let (code, data) = self.pages();
        writeln!(text, "pages of 4 KiB touched: {code} by code, {data} by data")?;
        let (conditional, taken) = self.conditional;
        writeln!(
            text,
            "conditional branches {conditional}, taken {:.2}%",
            per_cent(taken, conditional)
        )?;
        let named = self.branches.iter().map(|(branch, count)| (format!("{branch:?}"), *count));
        histogram(&mut text, &sorted(named), whole)?;
        writeln!(text, "exceptions and interrupts")?;
        let named = self.deliveries.iter().map(|((is_exception, vector), count)| {
            let what = if *is_exception { "exception" } else { "interrupt" };
            (format!("{what} {vector}"), *count)
        });
        histogram(&mut text, &sorted(named), self.deliveries.values().sum())?;
        writeln!(text, "instructions by name")?;
        histogram(&mut text, &self.mix(), whole)?;
        writeln!(text, "busiest blocks")?;
        let blocks = self.top_blocks();
        let named =
            blocks.iter().map(|((linear, cpl), count)| (format!("{linear:016x} {cpl}"), *count));
        histogram(&mut text, &named.take(ROWS).collect::<Vec<_>>(), whole)?;
        f.write_str(&text)
    }
}
