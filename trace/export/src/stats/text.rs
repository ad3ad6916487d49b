//! Statistics as text for a terminal.

use std::fmt::{self, Display, Formatter};

use super::report::{BranchRow, Counted, Interval, Report};

/// Rows of each table.
const ROWS: usize = 20;
/// Columns of the longest bar of a histogram.
const BAR_COLUMNS: u64 = 40;
/// Rows that the time is divided into.
const TIME_ROWS: usize = 16;

/// A share of a whole, in per cent.
pub(crate) fn per_cent(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 * 100.0 / whole as f64 }
}

/// A bar, its length in proportion to the longest.
fn bar(count: u64, longest: u64) -> String {
    let columns = u128::from(count) * u128::from(BAR_COLUMNS) / u128::from(longest.max(1));
    "#".repeat(columns as usize)
}

/// A heading, and rows with bars below it; nothing if there are no rows.
fn histogram(
    f: &mut Formatter<'_>,
    heading: &str,
    rows: &[(String, u64)],
    whole: u64,
) -> fmt::Result {
    if rows.is_empty() {
        return Ok(());
    }
    writeln!(f, "\n{heading}")?;
    let longest = rows.iter().map(|(_, count)| *count).max().unwrap_or(1);
    let width = rows.iter().take(ROWS).map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    for (name, count) in rows.iter().take(ROWS) {
        let share = per_cent(*count, whole);
        writeln!(f, "  {name:<width$} {count:>14} {share:>6.2}%  {}", bar(*count, longest))?;
    }
    if let Some(more) = rows.len().checked_sub(ROWS).filter(|more| *more > 0) {
        let rest = rows[ROWS..].iter().map(|(_, count)| count).sum();
        writeln!(
            f,
            "  {:<width$} {rest:>14} {:>6.2}%",
            format!("{more} more"),
            per_cent(rest, whole)
        )?;
    }
    Ok(())
}

fn named(rows: &[Counted]) -> Vec<(String, u64)> {
    rows.iter().map(|row| (row.name.clone(), row.count)).collect()
}

fn branches(f: &mut Formatter<'_>, heading: &str, rows: &[BranchRow], whole: u64) -> fmt::Result {
    if rows.is_empty() {
        return Ok(());
    }
    writeln!(f, "\n{heading}")?;
    for BranchRow { name, executed, taken } in rows.iter().take(ROWS) {
        let (share, taken) = (per_cent(*executed, whole), per_cent(*taken, *executed));
        writeln!(f, "  {name:<20} {executed:>14} {share:>6.2}%   taken {taken:>6.2}%")?;
    }
    Ok(())
}

/// Intervals, a few together in a row.
fn over_time(f: &mut Formatter<'_>, intervals: &[Interval]) -> fmt::Result {
    if intervals.len() < 2 {
        return Ok(());
    }
    writeln!(f, "\nover time (pages of 4 KiB touched at once, the most of each row)")?;
    writeln!(f, "  {:>16} {:>7} {:>7} {:>7}", "instruction", "user", "code", "data")?;
    let rows = intervals.chunks(intervals.len().div_ceil(TIME_ROWS));
    let busiest = intervals.iter().map(|one| one.working_set.data_pages).max().unwrap_or(0);
    for row in rows {
        let sum = |of: fn(&Interval) -> u64| row.iter().map(of).sum::<u64>();
        let most = |of: fn(&Interval) -> u64| row.iter().map(of).max().unwrap_or(0);
        let user = per_cent(sum(|one| one.user), sum(Interval::instructions));
        let code = most(|one| one.working_set.code_pages);
        let data = most(|one| one.working_set.data_pages);
        let first = row[0].first_instruction;
        writeln!(f, "  {first:>16} {user:>6.1}% {code:>7} {data:>7}  {}", bar(data, busiest))?;
    }
    Ok(())
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let whole = self.instructions;
        let (first, end) = (self.first_instruction, self.end_instruction);
        writeln!(f, "instructions {whole}, left out {}, from {first} to {end}", self.left_out)?;
        for row in &self.by_privilege {
            let share = per_cent(row.instructions, whole);
            writeln!(f, "  CPL {} {:>14} {share:>6.2}%", row.cpl, row.instructions)?;
        }
        let (read, written) = (self.bytes_read, self.bytes_written);
        writeln!(f, "reads        {:>14} ({read} bytes)", self.reads)?;
        writeln!(f, "writes       {:>14} ({written} bytes)", self.writes)?;
        let set = &self.working_set;
        writeln!(f, "code touched {:>14} pages, {} lines", set.code_pages, set.code_lines)?;
        writeln!(f, "data touched {:>14} pages, {} lines", set.data_pages, set.data_lines)?;
        let (blocks, runs) = (self.blocks, self.block_runs);
        let average = whole as f64 / runs.max(1) as f64;
        writeln!(f, "blocks       {blocks:>14}, run {runs} times, {average:.2} instructions each")?;
        let (spaces, switches) = (self.address_spaces, self.address_space_switches);
        writeln!(f, "address spaces {spaces:>12}, {switches} switches")?;
        for (what, traffic) in [("port", self.ports), ("MMIO", self.mmio), ("DMA", self.dma)] {
            if traffic.reads + traffic.writes > 0 {
                writeln!(f, "{what:<12} {:>14} in, {} out", traffic.reads, traffic.writes)?;
            }
        }
        let walks = &self.page_walks;
        if walks.total() > 0 {
            writeln!(
                f,
                "page walks   {:>14} ({} for reads, {} for writes, {} for fetches; {} to a fault)",
                walks.total(),
                walks.for_reads,
                walks.for_writes,
                walks.for_fetches,
                walks.to_faults
            )?;
            let (read, marked) = (walks.entries_read, walks.entries_marked);
            writeln!(f, "  entries    {read:>14} read, {marked} marked")?;
        }
        histogram(f, "instructions by kind", &named(&self.kinds), whole)?;
        histogram(f, "instructions by name", &named(&self.mix), whole)?;
        let branch_count = self.branches.by_type.iter().map(|row| row.executed).sum();
        branches(f, "branches by type", &self.branches.by_type, branch_count)?;
        let conditional = self.branches.conditional.iter().map(|row| row.executed).sum();
        branches(f, "conditional branches by direction", &self.branches.by_direction, conditional)?;
        branches(f, "conditional branches by name", &self.branches.conditional, conditional)?;
        let deliveries = self.deliveries.iter().map(|row| {
            (format!("{} {} {}", row.kind, row.vector, row.name).trim_end().to_owned(), row.count)
        });
        let all = self.deliveries.iter().map(|row| row.count).sum();
        histogram(f, "exceptions and interrupts", &deliveries.collect::<Vec<_>>(), all)?;
        histogram(f, "busiest symbols", &named(&self.top_symbols), whole)?;
        let blocks = self.top_blocks.iter().take(ROWS).map(|row| {
            let symbol = row.symbol.as_deref().unwrap_or("");
            let name = format!("{:016x} {} {symbol}", row.address, row.cpl);
            (name.trim_end().to_owned(), row.instructions)
        });
        histogram(f, "busiest blocks", &blocks.collect::<Vec<_>>(), whole)?;
        over_time(f, &self.intervals)
    }
}
