//! Where two machines part, as data; as text it is `finding_text.rs`.

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

/// One of the two, right before the instruction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SideInfo {
    /// What it is called.
    pub name: String,
    /// The engine that recorded.
    pub engine: String,
    /// Its clock.
    pub clock: String,
    /// Ticks of that clock since the machine started.
    pub tick: u64,
    /// Virtual time, in nanoseconds since the machine started.
    pub virtual_ns: u64,
    /// Interrupts that enter right before the instruction.
    pub interrupts: u64,
}

/// The first step after which two machines differ.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// What parts them.
    pub kind: Kind,
    /// The two sides.
    pub sides: [SideInfo; 2],
    /// Instructions retired before, since the machine started.
    pub instructions: u64,
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
    /// What differs behind it in the CPU.
    pub cpu: Vec<Row>,
    /// What differs in devices, time and the like; of no meaning if the clocks are not the same.
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
    /// The two recordings' clocks are not the same: ticks, virtual time and devices are not compared.
    pub other_clocks: bool,
    /// The likely causes, the most telling first.
    pub causes: Vec<Cause>,
}
