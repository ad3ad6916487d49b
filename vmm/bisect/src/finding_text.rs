//! Where two machines part, as text: the headline, the likely cause, what ran there with the culprit marked,
//! and only what differs, side by side.

use std::fmt::{self, Display, Formatter, Write as _};

use crate::finding::{Finding, Kind};
use crate::listing::Line;
use crate::state_rows::Row;

/// Rows shown of the devices and the like.
const SHOWN_ROWS: usize = 24;
/// The widest that a value is shown beside another.
const VALUE_COLUMNS: usize = 44;

impl Finding {
    /// Where, in one line.
    pub fn headline(&self) -> String {
        let Self { instructions, address, instruction, .. } = self;
        let symbol = self.symbol.as_ref().map(|name| format!(" <{name}>")).unwrap_or_default();
        match self.kind {
            Kind::Start => {
                format!(
                    "they differ where the comparison begins, before instruction {instructions}"
                )
            }
            Kind::Entering => format!(
                "they part before instruction {instructions} (`{instruction}` at {address:#x}{symbol}), in what \
                 enters the machine there"
            ),
            Kind::Instruction => {
                format!(
                    "they part at instruction {instructions}: `{instruction}` at {address:#x}{symbol}"
                )
            }
        }
    }

    /// The likely causes and what to do next.
    fn write_causes(&self, text: &mut String) {
        for (index, cause) in self.causes.iter().enumerate() {
            let which = if index == 0 { "likely cause" } else { "or" };
            let _ = writeln!(text, "{which}: {} ({})", cause.text, cause.name);
        }
        match self.causes.first() {
            Some(cause) => {
                let _ = writeln!(text, "next: {}", cause.next);
            }
            None => {
                *text += "likely cause: none of those that Reprise knows; look at the rows below\n";
            }
        }
    }

    /// Which two they are, and where each stands before the instruction.
    fn side_rows(&self) -> Vec<Row> {
        let [a, b] = &self.sides;
        let row = |name: &str, a: String, b: String| Row { name: name.to_owned(), a, b };
        let mut rows = vec![
            row(
                "recorded by",
                format!("{}, {}", a.engine, a.clock),
                format!("{}, {}", b.engine, b.clock),
            ),
            row("tick", a.tick.to_string(), b.tick.to_string()),
            row("guest time", seconds(a.virtual_ns), seconds(b.virtual_ns)),
        ];
        if [a.interrupts, b.interrupts] != [0; 2] {
            rows.push(row(
                "interrupts taken right before",
                a.interrupts.to_string(),
                b.interrupts.to_string(),
            ));
        }
        rows
    }

    fn write_listing(&self, text: &mut String) {
        let Self { cpl, cr3, rflags, .. } = self;
        let _ = writeln!(
            text,
            "what runs there (instructions before, CPL, address, bytes); CPL {cpl}, CR3 {cr3:#x}, RFLAGS \
             {rflags}:"
        );
        let [one, other] = self.sides.each_ref().map(|side| side.name.as_str());
        let [a, b] = &self.behind;
        let same = a.iter().zip(b).take_while(|(a, b)| a == b).count();
        let marked = |index: usize| if same > 0 && index == 0 { '>' } else { ' ' };
        let parts: [(Option<&str>, &[Line]); 4] = [
            (None, &self.before),
            (None, &a[..same]),
            (Some(one), &a[same..]),
            (Some(other), &b[same..]),
        ];
        for (part, (name, lines)) in parts.into_iter().enumerate() {
            if let Some(name) = name.filter(|_| !lines.is_empty()) {
                let _ = writeln!(text, "  on the {name} side:");
            }
            for (index, line) in lines.iter().enumerate() {
                let culprit = match part {
                    0 => ' ',
                    1 => marked(index),
                    _ if same == 0 && index == 0 => '>',
                    _ => ' ',
                };
                let _ = writeln!(text, "  {culprit} {line}");
            }
        }
        for (side, ending) in self.sides.iter().zip(&self.endings) {
            if let Some(ending) = ending {
                let _ = writeln!(text, "  the {} replay ends there: {ending}", side.name);
            }
        }
    }

    /// What differs behind the instruction.
    fn differing_rows(&self) -> Vec<Row> {
        let memory = self.memory.iter().map(|page| Row {
            name: match &page.table {
                None => format!("RAM {:#x} ({} bytes of its page)", page.address, page.bytes),
                Some(table) => format!(
                    "RAM {:#x} (level {} table, entry of {:#x})",
                    page.address, table.level, table.linear
                ),
            },
            a: page.a.clone(),
            b: page.b.clone(),
        });
        let shown = if self.other_clocks { 0 } else { SHOWN_ROWS };
        let others = self.other.iter().take(shown).cloned();
        self.cpu.iter().cloned().chain(memory).chain(others).collect()
    }

    fn write_what_is_left_out(&self, text: &mut String) {
        let more = self.pages - self.memory.len();
        if more > 0 {
            let _ = writeln!(text, "  and {more} more pages of RAM");
        }
        if self.other_clocks {
            *text += "  ticks, time and devices are not compared: the recordings' clocks are not the same\n";
        } else if let Some(hidden @ 1..) = self.other.len().checked_sub(SHOWN_ROWS) {
            let _ = writeln!(text, "  and {hidden} more fields of devices: see --json");
        }
    }

    /// Rows under the sides' names; a value that is too wide to stand beside another stands above it.
    fn write_rows(&self, text: &mut String, rows: &[Row]) {
        let [one, other] = self.sides.each_ref().map(|side| side.name.as_str());
        let name_columns = rows.iter().map(|row| row.name.len()).max().unwrap_or(0);
        let narrow = rows.iter().map(|row| row.a.len()).filter(|width| *width <= VALUE_COLUMNS);
        let columns = narrow.max().unwrap_or(0).max(one.len());
        let _ = writeln!(text, "  {:name_columns$}  {one:columns$}  {other}", "");
        for Row { name, a, b } in rows {
            if a.len() > columns {
                let _ = writeln!(text, "  {name:name_columns$}  {a}");
                let _ = writeln!(text, "  {:name_columns$}  {:columns$}  {b}", "", "");
            } else {
                let _ = writeln!(text, "  {name:name_columns$}  {a:columns$}  {b}");
            }
        }
    }
}

impl Display for Finding {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut text = format!("{}\n", self.headline());
        self.write_causes(&mut text);
        text += "\nwhere each stands before it:\n";
        self.write_rows(&mut text, &self.side_rows());
        text += "\n";
        self.write_listing(&mut text);
        text += match self.kind {
            Kind::Instruction => "\nwhat differs behind it:\n",
            Kind::Entering => "\nwhat differs once it has entered:\n",
            Kind::Start => "\nwhat differs:\n",
        };
        self.write_rows(&mut text, &self.differing_rows());
        self.write_what_is_left_out(&mut text);
        f.write_str(text.trim_end())
    }
}

/// Nanoseconds as seconds, whole.
fn seconds(ns: u64) -> String {
    format!("{}.{:09} s", ns / 1_000_000_000, ns % 1_000_000_000)
}
