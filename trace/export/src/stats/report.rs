//! Statistics as plain numbers, for JSON, text and pages alike.

use std::collections::HashMap;
use std::hash::Hash;

use iced_x86::Mnemonic;
use serde::Serialize;

use super::footprint::Distinct;
use super::{Accesses, BlockCount, BlockKey, Outcomes, SIZE_CLASSES, Stats};
use crate::instruction::Branch;
use crate::symbols::Symbols;

/// Blocks and symbols that a report lists.
const TOP_ROWS: usize = 40;

/// Something and how often it happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Counted {
    /// What.
    pub name: String,
    /// How often.
    pub count: u64,
}

/// Retired instructions of a privilege level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct PrivilegeRow {
    /// 0 to 3.
    pub cpl: u8,
    /// How many.
    pub instructions: u64,
}

/// Accesses in both directions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// Into the CPU, or into memory for DMA.
    pub reads: u64,
    /// Out of it.
    pub writes: u64,
}

/// Branches of a kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BranchRow {
    /// Which.
    pub name: String,
    /// How often it retired.
    pub executed: u64,
    /// How often control then went elsewhere than to the next instruction.
    pub taken: u64,
}

/// All branches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BranchesReport {
    /// Every kind, conditional branches as one, the most frequent first.
    pub by_type: Vec<BranchRow>,
    /// Conditional branches by name, the most frequent first.
    pub conditional: Vec<BranchRow>,
    /// Conditional branches forward and backward.
    pub by_direction: Vec<BranchRow>,
}

/// Exceptions or interrupts of a vector.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeliveryRow {
    /// `exception`, `interrupt`, `nmi` or `software`.
    pub kind: &'static str,
    /// The vector.
    pub vector: u8,
    /// The exception's name.
    pub name: &'static str,
    /// How often.
    pub count: u64,
}

/// A block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BlockRow {
    /// Linear address.
    pub address: u64,
    /// Guest-physical address.
    pub physical: u64,
    /// Its privilege level.
    pub cpl: u8,
    /// How often it ran.
    pub runs: u64,
    /// Instructions that retired in it.
    pub instructions: u64,
    /// Where it is, by symbol.
    pub symbol: Option<String>,
}

/// What was touched in all. Pages of 4 KiB, lines of 64 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct WorkingSet {
    /// Physical pages with code that ran.
    pub code_pages: u64,
    /// Their lines.
    pub code_lines: u64,
    /// Pages accessed: physical ones if the trace has physical addresses, else linear ones of each
    /// address space.
    pub data_pages: u64,
    /// Their lines.
    pub data_lines: u64,
}

/// What happened in an interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Interval {
    /// Number of its first instruction since the machine started.
    pub first_instruction: u64,
    /// Virtual time of the last marker before it, in nanoseconds.
    pub virtual_ns: u64,
    /// Instructions that retired at CPL 3.
    pub user: u64,
    /// Instructions that retired at CPL 0 to 2.
    pub kernel: u64,
    /// Accesses to data.
    pub accesses: u64,
    /// Exceptions and interrupts.
    pub deliveries: u64,
    /// Touched in it.
    #[serde(flatten)]
    pub working_set: WorkingSet,
    /// Pages touched from the beginning to its end.
    pub pages_so_far: u64,
}

impl Interval {
    /// Instructions that retired.
    pub fn instructions(&self) -> u64 {
        self.user + self.kernel
    }

    pub(super) fn count(&mut self, cpl: u8, instructions: u64, accesses: u64) {
        let counter = if cpl == 3 { &mut self.user } else { &mut self.kernel };
        *counter += instructions;
        self.accesses += accesses;
    }

    pub(super) fn with_working_set(
        self,
        code: Distinct,
        data: Distinct,
        pages_so_far: u64,
    ) -> Self {
        Self { working_set: working_set(code, data), pages_so_far, ..self }
    }
}

fn working_set(code: Distinct, data: Distinct) -> WorkingSet {
    WorkingSet {
        code_pages: code.pages,
        code_lines: code.lines,
        data_pages: data.pages,
        data_lines: data.lines,
    }
}

/// Page walks of the software TLB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PageWalks {
    /// Those that a load made.
    pub for_reads: u64,
    /// Those that a store made.
    pub for_writes: u64,
    /// Those that a fetch made.
    pub for_fetches: u64,
    /// Those of all of them that ended in a fault.
    pub to_faults: u64,
    /// Entries of page tables that they read.
    pub entries_read: u64,
    /// Entries in which they set an accessed or dirty bit.
    pub entries_marked: u64,
}

impl PageWalks {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.for_reads + self.for_writes + self.for_fetches
    }
}

/// What a trace amounts to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Number of the first instruction since the machine started.
    pub first_instruction: u64,
    /// Number of the one behind the last.
    pub end_instruction: u64,
    /// Retired instructions.
    pub instructions: u64,
    /// Retired instructions left out of the trace.
    pub left_out: u64,
    /// Retired instructions by privilege level, those with none apart.
    pub by_privilege: Vec<PrivilegeRow>,
    /// Virtual time from the beginning to the last marker, in nanoseconds.
    pub virtual_ns: u64,
    /// Data reads; a read-modify-write is one, and a write too.
    pub reads: u64,
    /// Bytes of them.
    pub bytes_read: u64,
    /// Data writes.
    pub writes: u64,
    /// Bytes of them.
    pub bytes_written: u64,
    /// Accesses by size: up to so many bytes, counts.
    pub access_sizes: Vec<(u64, u64)>,
    /// Instructions by kind of work.
    pub kinds: Vec<Counted>,
    /// Instructions by name.
    pub mix: Vec<Counted>,
    /// Branches.
    pub branches: BranchesReport,
    /// Exceptions and interrupts.
    pub deliveries: Vec<DeliveryRow>,
    /// I/O ports.
    pub ports: Traffic,
    /// Memory-mapped I/O.
    pub mmio: Traffic,
    /// Transfers by devices.
    pub dma: Traffic,
    /// Bytes of them.
    pub dma_bytes: u64,
    /// Page walks, where the trace has them.
    pub page_walks: PageWalks,
    /// Loads of CR3.
    pub address_space_switches: u64,
    /// Different address spaces.
    pub address_spaces: u64,
    /// Runs of blocks.
    pub block_runs: u64,
    /// Different blocks.
    pub blocks: u64,
    /// Runs by instructions: from so many on, counts.
    pub block_lengths: Vec<(u64, u64)>,
    /// The busiest blocks.
    pub top_blocks: Vec<BlockRow>,
    /// The busiest symbols, if there are symbols; code without one counts by privilege.
    pub top_symbols: Vec<Counted>,
    /// What was touched in all.
    pub working_set: WorkingSet,
    /// Instructions of an interval.
    pub interval_instructions: u64,
    /// What happened when.
    pub intervals: Vec<Interval>,
}

/// The largest counts first; equal ones in the order of what they count.
fn sorted<T: Ord>(counts: impl Iterator<Item = (T, u64)>) -> Vec<(T, u64)> {
    let mut counts: Vec<_> = counts.collect();
    counts.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    counts
}

fn counted(counts: impl Iterator<Item = (String, u64)>) -> Vec<Counted> {
    sorted(counts).into_iter().map(|(name, count)| Counted { name, count }).collect()
}

fn mnemonic(mnemonic: Mnemonic) -> String {
    format!("{mnemonic:?}").to_lowercase()
}

/// Counts by size class, those of nothing apart.
fn by_class(counts: &[u64; SIZE_CLASSES]) -> Vec<(u64, u64)> {
    let rows = counts.iter().enumerate().filter(|(_, count)| **count > 0);
    rows.map(|(class, count)| (1 << class, *count)).collect()
}

impl Stats {
    /// What was counted so far; `end` must have been called. `symbols` name the code.
    pub fn report(&self, symbols: &Symbols) -> Report {
        let (tally, events) = (&self.tally, &self.events);
        let Accesses { count: reads, bytes: bytes_read } = tally.reads;
        let Accesses { count: writes, bytes: bytes_written } = tally.writes;
        let privileges = (0..).zip(tally.by_privilege).filter(|(_, count)| *count > 0);
        let kinds = tally.kinds.iter().map(|(kind, count)| (kind.name().to_owned(), *count));
        let mix = tally.mnemonics.iter().map(|(name, count)| (mnemonic(*name), *count));
        Report {
            first_instruction: self.begin.instruction,
            end_instruction: self.position.instruction,
            instructions: tally.by_privilege.iter().sum(),
            left_out: events.skipped,
            by_privilege: privileges
                .map(|(cpl, instructions)| PrivilegeRow { cpl, instructions })
                .collect(),
            virtual_ns: (self.position.marker.virtual_ns)
                .saturating_sub(self.begin.marker.virtual_ns),
            reads,
            bytes_read,
            writes,
            bytes_written,
            access_sizes: by_class(&tally.access_sizes),
            kinds: counted(kinds),
            mix: counted(mix),
            branches: self.branches(),
            deliveries: self.deliveries(),
            ports: events.port,
            mmio: events.mmio,
            dma: events.dma,
            dma_bytes: events.dma_bytes,
            page_walks: events.page_walks,
            address_space_switches: events.address_space_switches,
            address_spaces: self.spaces.count(),
            block_runs: tally.blocks.values().map(|count| count.runs).sum(),
            blocks: tally.blocks.len() as u64,
            block_lengths: by_class(&tally.block_lengths),
            top_blocks: top_blocks(&tally.blocks, symbols),
            top_symbols: top_symbols(&tally.blocks, symbols),
            working_set: working_set(self.code.ever, self.data.ever),
            interval_instructions: self.interval_instructions,
            intervals: self.intervals.clone(),
        }
    }

    fn branches(&self) -> BranchesReport {
        let tally = &self.tally;
        let row = |name: &str, outcomes: Outcomes| BranchRow {
            name: name.to_owned(),
            executed: outcomes.executed,
            taken: outcomes.taken,
        };
        let always = |count| Outcomes { executed: count, taken: count };
        let all = tally.conditional.values().fold(Outcomes::default(), |sum, one| Outcomes {
            executed: sum.executed + one.executed,
            taken: sum.taken + one.taken,
        });
        let others = tally.branches.iter().map(|(kind, count)| row(branch(*kind), always(*count)));
        let conditional = tally.conditional.iter().map(|(name, one)| row(&mnemonic(*name), *one));
        let [forward, backward] = tally.directions;
        BranchesReport {
            by_type: most_executed(
                [row(branch(Branch::Conditional), all)].into_iter().chain(others),
            ),
            conditional: most_executed(conditional),
            by_direction: vec![row("forward", forward), row("backward", backward)],
        }
    }

    fn deliveries(&self) -> Vec<DeliveryRow> {
        let counts = self.events.deliveries.iter().map(|(what, count)| (*what, *count));
        let rows = sorted(counts).into_iter().map(|((class, vector), count)| {
            let kind = ["exception", "interrupt", "nmi", "software"][usize::from(class & 3)];
            let is_exception = class == 0;
            DeliveryRow {
                kind,
                vector,
                name: if is_exception { exception(vector) } else { "" },
                count,
            }
        });
        rows.collect()
    }
}

fn most_executed(rows: impl Iterator<Item = BranchRow>) -> Vec<BranchRow> {
    let mut rows: Vec<_> = rows.filter(|row| row.executed > 0).collect();
    rows.sort_by(|a, b| b.executed.cmp(&a.executed).then_with(|| a.name.cmp(&b.name)));
    rows
}

fn top_blocks(blocks: &HashMap<BlockKey, BlockCount>, symbols: &Symbols) -> Vec<BlockRow> {
    let counts = blocks.iter().map(|(key, count)| (*key, count.instructions));
    let rows = sorted(counts).into_iter().take(TOP_ROWS).map(|(key, instructions)| {
        let (address, physical, cpl) = key;
        let runs = blocks.get(&key).map_or(0, |count| count.runs);
        let symbol = symbols.describe(address);
        BlockRow { address, physical, cpl, runs, instructions, symbol }
    });
    rows.collect()
}

/// Instructions by symbol; without symbols there is no list.
fn top_symbols(blocks: &HashMap<BlockKey, BlockCount>, symbols: &Symbols) -> Vec<Counted> {
    if symbols.is_empty() {
        return Vec::new();
    }
    let names = blocks.iter().map(|((address, _, cpl), count)| {
        let name = symbols.find(*address).map(|(name, _)| &**name);
        let nameless = if *cpl == 3 { "(user, no symbol)" } else { "(kernel, no symbol)" };
        (name.unwrap_or(nameless), count.instructions)
    });
    let mut rows = counted(summed(names).into_iter().map(|(name, sum)| (name.to_owned(), sum)));
    rows.truncate(TOP_ROWS);
    rows
}

fn summed<T: Eq + Hash>(counts: impl Iterator<Item = (T, u64)>) -> HashMap<T, u64> {
    let mut sums = HashMap::new();
    counts.for_each(|(what, count)| *sums.entry(what).or_insert(0) += count);
    sums
}

/// A kind of branch in words.
fn branch(branch: Branch) -> &'static str {
    match branch {
        Branch::None => "none",
        Branch::DirectJump => "direct jump",
        Branch::IndirectJump => "indirect jump",
        Branch::Conditional => "conditional",
        Branch::DirectCall => "direct call",
        Branch::IndirectCall => "indirect call",
        Branch::Return => "return",
        Branch::SystemCall => "system call",
        Branch::SystemReturn => "system return",
    }
}

/// An exception's name (Intel SDM volume 3, table 6-1).
pub(crate) fn exception(vector: u8) -> &'static str {
    match vector {
        0 => "divide error",
        1 => "debug",
        3 => "breakpoint",
        4 => "overflow",
        5 => "bound range",
        6 => "invalid opcode",
        7 => "no FPU",
        8 => "double fault",
        10 => "invalid TSS",
        11 => "segment not present",
        12 => "stack fault",
        13 => "general protection",
        14 => "page fault",
        16 => "x87 fault",
        17 => "alignment check",
        18 => "machine check",
        19 => "SIMD fault",
        _ => "reserved",
    }
}
