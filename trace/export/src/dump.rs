//! A listing of a trace for people: an instruction a line, with what it accessed, and events between.
//! What is shown is also there as data, for JSON.

use std::fmt::{self, Display, Formatter, Write as _};
use std::io;
use std::sync::Arc;

use iced_x86::{Formatter as _, GasFormatter};
use reprise_trace::instructions::{
    AccessKind, Delivery, Direction, Event, Observer, PageWalk, Position, Run, Step,
    SystemAccessKind, TraceError, WalkCause, WalkEntry, register,
};
use serde::Serialize;

use crate::disassembly::{BYTES_COLUMNS, formatter};
use crate::instruction::decode;
use crate::stats::exception;
use crate::symbols::Symbols;

/// A line of the listing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Shown {
    /// An instruction.
    Instruction(ShownInstruction),
    /// Something between instructions.
    Event(ShownEvent),
}

/// An instruction that ran.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ShownInstruction {
    /// Instructions retired before it, since the machine started.
    pub number: u64,
    /// The privilege level.
    pub cpl: u8,
    /// Linear address.
    pub address: u64,
    /// The symbol there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub symbol: Option<String>,
    /// The encoding, in hexadecimal.
    pub bytes: String,
    /// The disassembly.
    pub text: String,
    /// Whether it retired. One that did not is shown if it accessed something.
    pub retired: bool,
    /// What it accessed.
    pub accesses: Vec<ShownAccess>,
    /// Registers that it wrote, if the trace has them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub registers: Vec<ShownRegister>,
}

/// A register that was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ShownRegister {
    /// Its name.
    pub register: &'static str,
    /// Its value in hexadecimal.
    pub value: String,
}

impl ShownRegister {
    fn new(register: u8, words: &[u64]) -> Self {
        let value = match words {
            [low, high, ..] if *high != 0 => format!("{high:#x}{low:016x}"),
            [low, ..] => format!("{low:#x}"),
            [] => "unknown".to_owned(),
        };
        Self { register: register::name(register).unwrap_or("unknown"), value }
    }
}

/// An access.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ShownAccess {
    /// `r`, `w`, or `rw`.
    pub kind: &'static str,
    /// Bytes.
    pub size: u16,
    /// Linear address.
    pub address: u64,
    /// Guest-physical address, if the trace has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub physical: Option<u64>,
    /// Value in words of eight bytes, if the trace has it: what was read, then what was written.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<u64>,
}

/// An event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ShownEvent {
    /// Instructions retired before it.
    pub number: u64,
    /// In words.
    pub event: String,
}

impl Display for Shown {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Instruction(one) => one.fmt(f),
            Self::Event(one) => write!(f, "{:>12}   -- {}", one.number, one.event),
        }
    }
}

impl Display for ShownInstruction {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{:>12} {} {:016x} ", self.number, self.cpl, self.address)?;
        if let Some(symbol) = &self.symbol {
            write!(f, "<{symbol}> ")?;
        }
        write!(f, " {:<BYTES_COLUMNS$}  {}", self.bytes, self.text)?;
        if !self.retired {
            f.write_str("  (not retired)")?;
        }
        self.accesses.iter().try_for_each(|access| access.fmt(f))?;
        self.registers.iter().try_for_each(|one| write!(f, "  {}={}", one.register, one.value))
    }
}

impl Display for ShownAccess {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "  {}{} {:#x}", self.kind, self.size, self.address)?;
        if let Some(physical) = self.physical {
            write!(f, " @{physical:#x}")?;
        }
        self.values.iter().try_for_each(|value| write!(f, " ={value:#x}"))
    }
}

/// Shows a trace, an entry at a time, to `show`.
pub struct Dump<F> {
    show: F,
    formatter: GasFormatter,
    symbols: Arc<Symbols>,
    position: Position,
    /// What the clocks and CR3 said last, until something happens: of many in a row only the last
    /// of each kind is of interest.
    pending: Vec<Event>,
    /// Instructions yet to be shown; `None` for all.
    left: Option<u64>,
}

impl<F> fmt::Debug for Dump<F> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dump").field("left", &self.left).finish_non_exhaustive()
    }
}

impl<F: FnMut(&Shown) -> io::Result<()>> Dump<F> {
    /// Shows at most so many instructions, and what is between them.
    pub fn new(symbols: Symbols, instructions: Option<u64>, show: F) -> Self {
        let symbols = Arc::new(symbols);
        let formatter = formatter(&symbols);
        let (position, pending) = (Position::default(), Vec::new());
        Self { show, formatter, symbols, position, pending, left: instructions }
    }

    /// Whether all was shown that was asked for: reading on shows nothing.
    pub fn is_full(&self) -> bool {
        self.left == Some(0)
    }

    fn instruction(&mut self, run: &Run<'_>, step: &Step<'_>, number: u64) -> ShownInstruction {
        let (mode, address) = (run.block().mode(), step.instruction.linear());
        let mut text = String::new();
        self.formatter.format(&decode(step.instruction, mode.width), &mut text);
        let accesses = step.accesses().map(|access| ShownAccess {
            kind: match access.kind {
                AccessKind::Read => "r",
                AccessKind::Write => "w",
                AccessKind::ReadWrite => "rw",
                AccessKind::Prefetch => "prefetch",
                AccessKind::Invalidate => "invalidate",
            },
            size: access.size_bytes,
            address: access.address,
            physical: access.physical,
            values: access.values.to_vec(),
        });
        let mut words = step.registers;
        let registers = step.instruction.register_writes().iter().map_while(|write| {
            let (value, rest) = words.split_at_checked(usize::from(write.words))?;
            words = rest;
            Some(ShownRegister::new(write.register, value))
        });
        ShownInstruction {
            number,
            cpl: mode.cpl,
            address,
            symbol: self.symbols.describe(address),
            bytes: step.instruction.bytes().iter().map(|byte| format!("{byte:02x}")).collect(),
            text,
            retired: step.retired,
            accesses: accesses.collect(),
            registers: if step.retired { registers.collect() } else { Vec::new() },
        }
    }

    /// An address with its symbol.
    fn place(&self, address: u64) -> String {
        match self.symbols.describe(address) {
            Some(name) => format!("{address:#x} <{name}>"),
            None => format!("{address:#x}"),
        }
    }

    fn describe(&self, event: &Event) -> String {
        match *event {
            Event::Delivery { kind, vector, error_code, address, fault_address } => {
                let what = match kind {
                    Delivery::Exception => format!("exception {vector}, {}", exception(vector)),
                    Delivery::Interrupt => format!("interrupt {vector}"),
                    Delivery::NonMaskable => "non-maskable interrupt".to_owned(),
                    Delivery::Software => format!("software interrupt {vector}"),
                };
                let mut text = format!("{what}, at {}", self.place(address));
                // Writing to a string does not fail.
                if let Some(fault) = fault_address {
                    let _ = write!(text, ", of {fault:#x}");
                }
                if let Some(code) = error_code {
                    let _ = write!(text, ", error code {code:#x}");
                }
                text
            }
            Event::Return { address } => format!("return to {}", self.place(address)),
            Event::AddressSpace { cr3 } => format!("CR3 is {cr3:#x}"),
            Event::Port { direction, port, size_bytes, value } => {
                let verb = transfer(direction, "in", "out");
                format!("{verb} port {port:#x}: {value:#x}, {size_bytes} bytes")
            }
            Event::Mmio { direction, physical, size_bytes, value } => {
                let verb = transfer(direction, "read", "write");
                format!("device memory {verb} @{physical:#x}: {value:#x}, {size_bytes} bytes")
            }
            Event::Dma { direction, physical, bytes } => {
                let verb = transfer(direction, "writes", "reads");
                format!("a device {verb} {bytes} bytes @{physical:#x}")
            }
            Event::SystemAccess { kind, linear, physical, size_bytes } => {
                format!("{} @{physical:#x}, {size_bytes} bytes", system_access(kind, linear))
            }
            Event::MemoryWrite { kind, linear, physical, size_bytes, value, accesses_behind } => {
                let what = system_access(kind, linear);
                let place = before_accesses(accesses_behind);
                format!("{what} @{physical:#x} ={value:#x}, {size_bytes} bytes{place}")
            }
            Event::SecondPage { physical, accesses_behind } => {
                let place = before_accesses(accesses_behind);
                format!("the access reaches into the page @{physical:#x}{place}")
            }
            Event::Register { register, value } => {
                let words = &value[..usize::from(register::words(register))];
                let ShownRegister { register, value } = ShownRegister::new(register, words);
                format!("{register}={value}")
            }
            Event::PageWalk(walk) => self.describe_walk(&walk),
            Event::Marker(marker) => {
                let (seconds, rest) =
                    (marker.virtual_ns / 1_000_000_000, marker.virtual_ns % 1_000_000_000);
                format!("tick {}, guest time {seconds}.{rest:09} s", marker.tick)
            }
            Event::Skipped { instructions, address } => {
                let from = address.map(|address| format!(", from {}", self.place(address)));
                format!("{instructions} instructions left out{}", from.unwrap_or_default())
            }
        }
    }

    fn describe_walk(&self, walk: &PageWalk) -> String {
        let cause = match walk.cause {
            WalkCause::Read => "read",
            WalkCause::Write => "write",
            WalkCause::Fetch => "fetch",
        };
        let mut text = format!("page walk for a {cause} at {}:", self.place(walk.linear));
        for WalkEntry { level, physical, marked } in walk.reads() {
            let marked = if marked { " (marked)" } else { "" };
            // Writing to a string does not fail.
            let _ = write!(text, " level {level} @{physical:#x}{marked},");
        }
        let _ = match walk.page {
            Some(page) => write!(text, " to page @{page:#x}"),
            None => write!(text, " to a fault"),
        };
        text
    }

    fn put_event(&mut self, number: u64, event: &Event) -> Result<(), TraceError> {
        let event = self.describe(event);
        self.put(&Shown::Event(ShownEvent { number, event }))
    }

    fn put_pending(&mut self) -> Result<(), TraceError> {
        let number = self.position.instruction;
        let pending = std::mem::take(&mut self.pending);
        pending.iter().try_for_each(|event| self.put_event(number, event))
    }

    fn put(&mut self, entry: &Shown) -> Result<(), TraceError> {
        (self.show)(entry).map_err(TraceError::Write)
    }
}

fn system_access(kind: SystemAccessKind, linear: Option<u64>) -> String {
    let what = match kind {
        SystemAccessKind::WalkRead => "page walk reads",
        SystemAccessKind::WalkWrite => "page walk writes",
        SystemAccessKind::DescriptorRead => "descriptor is read:",
        SystemAccessKind::DescriptorWrite => "descriptor is written:",
        SystemAccessKind::FrameWrite => "frame is pushed:",
        SystemAccessKind::OtherWrite => "also writes",
    };
    let linear = linear.map(|linear| format!(" {linear:#x}")).unwrap_or_default();
    format!("{what}{linear}")
}

/// Where in the run before something happened.
fn before_accesses(count: u32) -> String {
    match count {
        0 => String::new(),
        1 => ", before the last access".to_owned(),
        _ => format!(", before the last {count} accesses"),
    }
}

fn transfer(direction: Direction, into: &'static str, out: &'static str) -> &'static str {
    match direction {
        Direction::In => into,
        Direction::Out => out,
    }
}

impl<F: FnMut(&Shown) -> io::Result<()>> Observer for Dump<F> {
    fn begin(&mut self, position: &Position) -> Result<(), TraceError> {
        self.position = *position;
        Ok(())
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        if !self.is_full() {
            self.put_pending()?;
        }
        let mut number = self.position.instruction;
        self.position.pass_run(run);
        for step in run.steps() {
            if self.is_full() {
                break;
            }
            let one = self.instruction(run, &step, number);
            self.put(&Shown::Instruction(one))?;
            number += u64::from(step.retired);
            if let Some(left) = &mut self.left {
                *left -= u64::from(step.retired);
            }
        }
        Ok(())
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        let number = self.position.instruction;
        self.position.pass_event(event);
        match event {
            _ if self.is_full() => Ok(()),
            Event::Marker(_) | Event::AddressSpace { .. } => {
                let kind = std::mem::discriminant(event);
                self.pending.retain(|other| std::mem::discriminant(other) != kind);
                self.pending.push(*event);
                Ok(())
            }
            // What a filter left out is no reason to tell what happened in it.
            Event::Skipped { .. } => self.put_event(number, event),
            _ => {
                self.put_pending()?;
                self.put_event(number, event)
            }
        }
    }

    fn end(&mut self) -> Result<(), TraceError> {
        if self.is_full() { Ok(()) } else { self.put_pending() }
    }
}
