//! Where two machines part, as data and as text.

use std::fmt::{self, Display, Formatter, Write as _};

use serde::Serialize;

use crate::cause::Cause;
use crate::listing::Line;
use crate::memory::PageDifference;
use crate::state_rows::Row;

/// What parts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// They are not alike where the comparison begins.
    Start,
    /// Something enters before the instruction: input, the end of a sleep, an interrupt.
    Entering,
    /// The instruction.
    Instruction,
}

/// The first step after which two machines differ.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// What parts them.
    pub kind: Kind,
    /// What the two sides are called.
    pub sides: [String; 2],
    /// Instructions retired before.
    pub tick: u64,
    /// Linear address of the instruction, on the first side.
    pub address: u64,
    /// The symbol there.
    pub symbol: Option<String>,
    /// Its disassembly.
    pub instruction: String,
    /// The privilege level.
    pub cpl: u8,
    /// The page-table base.
    pub cr3: u64,
    /// RFLAGS before it, with the flags' names.
    pub rflags: String,
    /// Virtual time before it, in nanoseconds since the machine started.
    pub virtual_ns: u64,
    /// Interrupts that enter right before it, on each side.
    pub interrupts: [u64; 2],
    /// What differs behind it in the CPU.
    pub cpu: Vec<Row>,
    /// What differs in devices, time and the like.
    pub other: Vec<Row>,
    /// What differs in RAM: the first pages.
    pub memory: Vec<PageDifference>,
    /// How many pages differ.
    pub pages: usize,
    /// What ran before, on both sides.
    pub before: Vec<Line>,
    /// The instruction and what follows, on each side.
    pub behind: [Vec<Line>; 2],
    /// How a replay ended that ended here.
    pub endings: [Option<String>; 2],
    /// The likely causes, the most telling first.
    pub causes: Vec<Cause>,
}

/// Rows shown of the devices and the like.
const SHOWN_ROWS: usize = 24;
/// The widest that a value is shown beside another.
const VALUE_COLUMNS: usize = 44;

impl Finding {
    /// Where, in one line.
    pub fn headline(&self) -> String {
        let Self { tick, cpl, cr3, address, instruction, .. } = self;
        let symbol = self.symbol.as_ref().map(|name| format!(" <{name}>")).unwrap_or_default();
        let what = match self.kind {
            Kind::Start => "they differ where the comparison begins, before",
            Kind::Entering => "they differ in what enters before",
            Kind::Instruction => "the first instruction that differs is",
        };
        format!(
            "{what} instruction {tick} at {address:#x}{symbol}: {instruction} (CPL {cpl}, CR3 {cr3:#x})"
        )
    }

    fn write_listing(&self, text: &mut String) {
        let [one, other] = &self.sides;
        for line in &self.before {
            let _ = writeln!(text, "    {line}");
        }
        let [a, b] = &self.behind;
        let same = a.iter().zip(b).take_while(|(a, b)| a == b).count();
        for (index, line) in a[..same].iter().enumerate() {
            let _ = writeln!(text, "  {} {line}", if index == 0 { '>' } else { ' ' });
        }
        for (name, lines) in [(one, &a[same..]), (other, &b[same..])] {
            if !lines.is_empty() {
                let _ = writeln!(text, "  {name}:");
            }
            for (index, line) in lines.iter().enumerate() {
                let sign = if same == 0 && index == 0 { '>' } else { ' ' };
                let _ = writeln!(text, "  {sign} {line}");
            }
        }
    }

    fn write_rows(&self, text: &mut String) {
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
        let hidden = self.other.len().saturating_sub(SHOWN_ROWS);
        let others = self.other.iter().take(SHOWN_ROWS).cloned();
        let rows: Vec<Row> = self.cpu.iter().cloned().chain(memory).chain(others).collect();
        let [one, other] = &self.sides;
        let name_columns = rows.iter().map(|row| row.name.len()).max().unwrap_or(0);
        let widest = rows.iter().map(|row| row.a.len()).max().unwrap_or(0);
        let columns = widest.min(VALUE_COLUMNS).max(one.len());
        let _ = writeln!(text, "  {:name_columns$}  {one:columns$}  {other}", "");
        for Row { name, a, b } in rows {
            if a.len() > VALUE_COLUMNS {
                // Too wide to stand side by side.
                let _ = writeln!(text, "  {name:name_columns$}  {a}");
                let _ = writeln!(text, "  {:name_columns$}  {:columns$}  {b}", "", "");
            } else {
                let _ = writeln!(text, "  {name:name_columns$}  {a:columns$}  {b}");
            }
        }
        let more = self.pages - self.memory.len();
        if more > 0 {
            let _ = writeln!(text, "  and {more} more pages of RAM");
        }
        if hidden > 0 {
            let _ = writeln!(text, "  and {hidden} more fields of devices: see --json");
        }
    }
}

impl Display for Finding {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut text = format!("{}\n", self.headline());
        let _ = writeln!(
            text,
            "  RFLAGS {}, virtual time {} ns, interrupts taken right before: {} and {}",
            self.rflags, self.virtual_ns, self.interrupts[0], self.interrupts[1]
        );
        text += "\nwhat runs there (instructions before, CPL, address, bytes):\n";
        self.write_listing(&mut text);
        for (name, ending) in self.sides.iter().zip(&self.endings) {
            if let Some(ending) = ending {
                let _ = writeln!(text, "  the {name} replay ends there: {ending}");
            }
        }
        text += "\nwhat differs behind it:\n";
        self.write_rows(&mut text);
        text += "\n";
        for (index, cause) in self.causes.iter().enumerate() {
            let which = if index == 0 { "likely cause" } else { "or" };
            let _ = writeln!(text, "{which}: {} ({})", cause.text, cause.name);
        }
        if self.causes.is_empty() {
            text += "likely cause: none of those that Reprise knows; look at the rows above\n";
        }
        f.write_str(text.trim_end())
    }
}
