//! Statistics as a page for a browser: one file that needs no other, in light and dark.

mod plot;

use std::fmt::Write as _;

use crate::stats::text::per_cent;
use crate::stats::{BranchRow, Counted, Interval, Report};
use plot::{Plot, Series, Shape, Unit, bytes, short};

const STYLE: &str = include_str!("style.css");
/// Rows of a table beside another.
const ROWS: usize = 20;
/// Pages and cache lines, in bytes.
const PAGE_BYTES: f64 = 4096.0;
const LINE_BYTES: f64 = 64.0;

/// What the page says of the trace itself.
#[derive(Clone, Debug, Default)]
pub struct Heading {
    /// The trace's name.
    pub title: String,
    /// Lines below it.
    pub lead: Vec<String>,
    /// What the reader must know: what is missing, and why.
    pub notes: Vec<String>,
    /// Who made the page.
    pub footer: String,
}

/// Text in which nothing is taken for markup.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            letter if letter.is_control() => escaped.push(' '),
            letter => escaped.push(letter),
        }
    }
    escaped
}

/// A count with its digits in groups of three.
fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let groups = digits.as_bytes().rchunks(3).rev();
    let groups: Vec<&str> = groups.filter_map(|group| std::str::from_utf8(group).ok()).collect();
    groups.join("\u{202f}")
}

fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

/// The page.
pub fn page(heading: &Heading, report: &Report) -> String {
    let title = escape(&heading.title);
    let mut out = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
    );
    for line in &heading.lead {
        let _ = writeln!(out, "<p class=\"lead\">{}</p>", escape(line));
    }
    if !heading.notes.is_empty() {
        let notes = heading.notes.iter().map(|note| format!("<p>{}</p>", escape(note)));
        let _ = writeln!(out, "<div class=\"notes\">{}</div>", notes.collect::<String>());
    }
    tiles(&mut out, report);
    over_time(&mut out, report);
    instructions(&mut out, report);
    branches(&mut out, report);
    places(&mut out, report);
    memory(&mut out, report);
    events(&mut out, report);
    let _ = write!(out, "<footer>{}</footer>\n</body>\n</html>\n", escape(&heading.footer));
    out
}

fn tiles(out: &mut String, report: &Report) {
    let whole = report.instructions;
    let user: u64 =
        report.by_privilege.iter().filter(|row| row.cpl == 3).map(|row| row.instructions).sum();
    let (reads, writes) = (ratio(report.reads, whole), ratio(report.writes, whole));
    let branches: u64 = report.branches.by_type.iter().map(|row| row.executed).sum();
    let conditional = report.branches.by_type.iter().find(|row| row.name == "conditional");
    let taken = conditional.map_or(0.0, |row| per_cent(row.taken, row.executed));
    let set = &report.working_set;
    let (data, code) = (set.data_pages as f64 * PAGE_BYTES, set.code_pages as f64 * PAGE_BYTES);
    let seconds = report.virtual_ns as f64 / 1e9;
    let tiles = [
        (short(whole as f64), "instructions".to_owned()),
        (format!("{:.1}%", per_cent(user, whole)), "of them user code".to_owned()),
        (
            format!("{:.2}", reads + writes),
            format!("accesses an instruction: {reads:.2} reads, {writes:.2} writes"),
        ),
        (
            format!("{:.1}%", per_cent(branches, whole)),
            format!("branches; {taken:.1}% of conditional ones taken"),
        ),
        (bytes(data), format!("data pages touched, {} of code", bytes(code))),
        (format!("{seconds:.3} s"), "of guest time".to_owned()),
    ];
    out.push_str("<div class=\"tiles\">\n");
    for (number, what) in tiles {
        let _ = writeln!(out, "<div class=\"tile\"><b>{number}</b><span>{what}</span></div>");
    }
    out.push_str("</div>\n<div class=\"split\" title=\"user and kernel\">");
    for (class, count) in [("user", user), ("kernel", whole - user.min(whole))] {
        if count > 0 {
            let _ = write!(out, "<i class=\"{class}\" style=\"flex:{count}\"></i>");
        }
    }
    out.push_str("</div>\n<div class=\"legend\">");
    for row in &report.by_privilege {
        let class = if row.cpl == 3 { "user" } else { "kernel" };
        let share = per_cent(row.instructions, whole);
        let _ = write!(
            out,
            "<span><i class=\"{class}\"></i>CPL {}: {} ({share:.2}%)</span>",
            row.cpl,
            grouped(row.instructions)
        );
    }
    out.push_str("</div>\n");
}

fn over_time(out: &mut String, report: &Report) {
    let intervals = &report.intervals;
    let Some(last) = intervals.last().filter(|_| intervals.len() > 1) else { return };
    let each = short(report.interval_instructions as f64);
    let _ = writeln!(
        out,
        "<h2>Over time</h2>\n<p class=\"soft\">By instruction number, in {} intervals of about {each} \
         instructions.</p>",
        intervals.len()
    );
    let mut edges: Vec<f64> = intervals.iter().map(|one| one.first_instruction as f64).collect();
    edges.push(report.end_instruction.max(last.first_instruction + last.instructions()) as f64);
    let series = |name, class, of: &dyn Fn(&Interval) -> f64| Series {
        name,
        class,
        values: intervals.iter().map(of).collect(),
    };
    let mut draw = |title: &str, series, shape, top, unit| {
        let _ = writeln!(out, "<h3>{title}</h3>");
        out.push_str(&Plot { edges: edges.clone(), series, shape, top, unit }.draw());
    };
    let shares = vec![
        series("user", "user", &|one| per_cent(one.user, one.instructions())),
        series("kernel", "kernel", &|one| per_cent(one.kernel, one.instructions())),
    ];
    draw("Who runs", shares, Shape::Stacked, Some(100.0), Unit::Percent);
    let touched = vec![
        series("data", "data", &|one| one.working_set.data_lines as f64 * LINE_BYTES),
        series("code", "code", &|one| one.working_set.code_lines as f64 * LINE_BYTES),
    ];
    draw("Working set of each interval, in cache lines", touched, Shape::Lines, None, Unit::Bytes);
    let pages = vec![
        series("data", "data", &|one| one.working_set.data_pages as f64 * PAGE_BYTES),
        series("code", "code", &|one| one.working_set.code_pages as f64 * PAGE_BYTES),
        series("all so far", "all", &|one| one.pages_so_far as f64 * PAGE_BYTES),
    ];
    draw(
        "Pages touched in each interval, and from the beginning",
        pages,
        Shape::Lines,
        None,
        Unit::Bytes,
    );
    let per_million = |count: u64, one: &Interval| ratio(count, one.instructions()) * 1e6;
    let interrupts =
        vec![series("in a million", "kernel", &|one| per_million(one.deliveries, one))];
    draw("Exceptions and interrupts", interrupts, Shape::Lines, None, Unit::Count);
}

/// A table's row: cells with their class.
fn row(out: &mut String, cells: &[(&str, String)]) {
    out.push_str("<tr>");
    for (class, text) in cells {
        let _ = write!(out, "<td class=\"{class}\">{text}</td>");
    }
    out.push_str("</tr>\n");
}

/// A bar that fills this share of its cell.
fn meter(share: f64) -> String {
    let width = (share * 100.0).clamp(0.0, 100.0);
    format!("<span class=\"meter\"><i style=\"width:{width:.1}%\"></i></span>")
}

/// A table of names, counts, shares and bars.
fn table(out: &mut String, title: &str, rows: &[Counted], whole: u64, limit: usize) {
    if rows.is_empty() {
        return;
    }
    let longest = rows.iter().map(|one| one.count).max().unwrap_or(1);
    let _ = write!(out, "<div><h3>{title}</h3>\n<table>\n");
    for Counted { name, count } in rows.iter().take(limit) {
        row(
            out,
            &[
                ("name", escape(name)),
                ("n", grouped(*count)),
                ("n", format!("{:.2}%", per_cent(*count, whole))),
                ("bar", meter(ratio(*count, longest))),
            ],
        );
    }
    if let Some(more) = rows.len().checked_sub(limit).filter(|more| *more > 0) {
        let rest: u64 = rows[limit..].iter().map(|one| one.count).sum();
        let cells = [
            ("name soft", format!("{more} more")),
            ("n soft", grouped(rest)),
            ("n soft", format!("{:.2}%", per_cent(rest, whole))),
            ("bar", String::new()),
        ];
        row(out, &cells);
    }
    out.push_str("</table></div>\n");
}

fn instructions(out: &mut String, report: &Report) {
    out.push_str("<h2>Instructions</h2>\n<div class=\"columns\">\n");
    let whole = report.instructions;
    out.push_str("<div>");
    table(out, "By kind of work", &report.kinds, whole, ROWS);
    let lengths = ranges(&report.block_lengths, "instruction");
    table(out, "Runs of blocks, by length", &lengths, report.block_runs, ROWS);
    out.push_str("</div>\n");
    table(out, "By name", &report.mix, whole, ROWS + 8);
    out.push_str("</div>\n");
}

/// Rows of counts by powers of two.
fn ranges(counts: &[(u64, u64)], unit: &str) -> Vec<Counted> {
    let named = counts.iter().map(|(from, count)| {
        let name = match from {
            1 => format!("1 {unit}"),
            from => format!("{from} to {} {unit}s", 2 * from - 1),
        };
        Counted { name, count: *count }
    });
    named.collect()
}

fn branches(out: &mut String, report: &Report) {
    let branches = &report.branches;
    out.push_str("<h2>Branches</h2>\n<div class=\"columns\">\n<div>");
    branch_table(out, "By type", &branches.by_type);
    branch_table(out, "Conditional, by direction", &branches.by_direction);
    out.push_str("</div>\n<div>");
    branch_table(out, "Conditional, by name", &branches.conditional);
    out.push_str("</div></div>\n");
}

fn branch_table(out: &mut String, title: &str, rows: &[BranchRow]) {
    let whole: u64 = rows.iter().map(|row| row.executed).sum();
    if whole == 0 {
        return;
    }
    let _ = write!(
        out,
        "<h3>{title}</h3>\n<table>\n<tr><th></th><th class=\"n\">executed</th>\
         <th class=\"n\">share</th><th class=\"n\">taken</th><th></th></tr>\n"
    );
    for BranchRow { name, executed, taken } in rows.iter().take(ROWS) {
        let cells = [
            ("name", escape(name)),
            ("n", grouped(*executed)),
            ("n", format!("{:.2}%", per_cent(*executed, whole))),
            ("n", format!("{:.1}%", per_cent(*taken, *executed))),
            ("bar", meter(ratio(*taken, *executed))),
        ];
        row(out, &cells);
    }
    out.push_str("</table>\n");
}

fn places(out: &mut String, report: &Report) {
    let whole = report.instructions;
    out.push_str("<h2>Where the instructions are</h2>\n");
    let average = report.instructions as f64 / report.block_runs.max(1) as f64;
    let _ = writeln!(
        out,
        "<p class=\"soft\">{} blocks, run {} times, {average:.2} instructions a run.</p>",
        grouped(report.blocks),
        grouped(report.block_runs)
    );
    table(out, "Busiest symbols", &report.top_symbols, whole, 2 * ROWS);
    out.push_str(
        "<h3>Busiest blocks</h3>\n<table class=\"wide\">\n<tr><th>address</th><th>CPL</th><th>symbol</th>\
         <th class=\"n\">runs</th><th class=\"n\">instructions</th><th class=\"n\">share</th>\
         <th></th></tr>\n",
    );
    let longest = report.top_blocks.first().map_or(1, |block| block.instructions);
    for block in &report.top_blocks {
        let cells = [
            ("code", format!("{:016x}", block.address)),
            ("", block.cpl.to_string()),
            ("name", escape(block.symbol.as_deref().unwrap_or("\u{2013}"))),
            ("n", grouped(block.runs)),
            ("n", grouped(block.instructions)),
            ("n", format!("{:.2}%", per_cent(block.instructions, whole))),
            ("bar", meter(ratio(block.instructions, longest))),
        ];
        row(out, &cells);
    }
    out.push_str("</table>\n");
}

fn memory(out: &mut String, report: &Report) {
    out.push_str("<h2>Memory</h2>\n<div class=\"columns\">\n<div>");
    let set = &report.working_set;
    out.push_str(
        "<h3>Touched in all</h3>\n<table>\n<tr><th></th><th class=\"n\">pages</th><th></th>\
         <th class=\"n\">cache lines</th><th></th></tr>\n",
    );
    let rows = [("code", set.code_pages, set.code_lines), ("data", set.data_pages, set.data_lines)];
    for (name, pages, lines) in rows {
        let cells = [
            ("name", name.to_owned()),
            ("n", grouped(pages)),
            ("n soft", bytes(pages as f64 * PAGE_BYTES)),
            ("n", grouped(lines)),
            ("n soft", bytes(lines as f64 * LINE_BYTES)),
        ];
        row(out, &cells);
    }
    out.push_str("</table>\n");
    let directions = [
        ("reads", report.reads, report.bytes_read),
        ("writes", report.writes, report.bytes_written),
    ];
    out.push_str("<h3>Accesses</h3>\n<table>\n");
    for (name, count, volume) in directions {
        let size = format!("{:.2} bytes each", volume as f64 / count.max(1) as f64);
        let cells = [
            ("name", name.to_owned()),
            ("n", grouped(count)),
            ("n", bytes(volume as f64)),
            ("n soft", size),
        ];
        row(out, &cells);
    }
    out.push_str("</table></div>\n");
    let sizes = ranges(&report.access_sizes, "byte");
    let all = sizes.iter().map(|one| one.count).sum();
    table(out, "Accesses by size", &sizes, all, ROWS);
    out.push_str("</div>\n");
}

fn events(out: &mut String, report: &Report) {
    out.push_str("<h2>Events</h2>\n<div class=\"columns\">\n");
    let rows: Vec<Counted> = report
        .deliveries
        .iter()
        .map(|row| Counted {
            name: format!("{} {} {}", row.kind, row.vector, row.name),
            count: row.count,
        })
        .collect();
    let all = rows.iter().map(|one| one.count).sum();
    table(out, "Exceptions and interrupts", &rows, all, ROWS);
    let traffic = [
        ("address space switches", report.address_space_switches),
        ("address spaces", report.address_spaces),
        ("page walks for reads", report.page_walks.for_reads),
        ("page walks for writes", report.page_walks.for_writes),
        ("page walks for fetches", report.page_walks.for_fetches),
        ("port reads", report.ports.reads),
        ("port writes", report.ports.writes),
        ("device memory reads", report.mmio.reads),
        ("device memory writes", report.mmio.writes),
        ("DMA transfers into memory", report.dma.reads),
        ("DMA transfers out of memory", report.dma.writes),
    ];
    out.push_str("<div><h3>Others</h3>\n<table>\n");
    for (name, count) in traffic.into_iter().filter(|(_, count)| *count > 0) {
        row(out, &[("name", name.to_owned()), ("n", grouped(count))]);
    }
    out.push_str("</table></div></div>\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_no_markup() {
        assert_eq!(escape("<a href=\"x\">&\u{1b}"), "&lt;a href=&quot;x&quot;&gt;&amp; ");
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!(grouped(6_123_456), "6\u{202f}123\u{202f}456");
    }
}
