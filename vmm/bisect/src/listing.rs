//! Disassembly of what machines are about to execute.

use std::fmt::{self, Display, Formatter};
use std::sync::Arc;

use iced_x86::{Decoder, DecoderOptions, Formatter as _, GasFormatter};
use reprise_branch_clock::guest_code::{MAX_BYTES, decode_at, linear_of};
use reprise_export::disassembly::{BYTES_COLUMNS, formatter};
use reprise_export::symbols::Symbols;
use reprise_machine::paging::Paging;
use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::CpuState;
use serde::Serialize;

/// An instruction about to be executed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Line {
    /// Instructions retired before it, since the machine started.
    pub number: u64,
    /// The privilege level.
    pub cpl: u8,
    /// Linear address.
    pub address: u64,
    /// The symbol there.
    pub symbol: Option<String>,
    /// The encoding, in hexadecimal; empty where it cannot be fetched.
    pub bytes: String,
    /// The disassembly.
    pub text: String,
    /// What happened right before it, an interrupt say.
    pub note: Option<String>,
}

impl Display for Line {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { number, cpl, address, symbol, bytes, text, note } = self;
        write!(f, "{number:>12} {cpl} {address:016x} ")?;
        if let Some(symbol) = symbol {
            write!(f, "<{symbol}> ")?;
        }
        write!(f, " {bytes:<BYTES_COLUMNS$}  {text}")?;
        match note {
            Some(note) => write!(f, "   ({note})"),
            None => Ok(()),
        }
    }
}

/// Makes lines.
pub(crate) struct Disassembler {
    symbols: Arc<Symbols>,
    formatter: GasFormatter,
}

impl Disassembler {
    pub(crate) fn new(symbols: Arc<Symbols>) -> Self {
        Self { formatter: formatter(&symbols), symbols }
    }

    /// The instruction that the CPU is about to execute, `ram` being its RAM.
    pub(crate) fn line(&mut self, ram: &GuestRam, number: u64, cpu: &CpuState) -> Line {
        let address = linear_of(cpu, cpu.rip);
        let mut bytes = [0; MAX_BYTES];
        let fetched = Paging::from(cpu).read_prefix(ram, address, &mut bytes);
        let (length, text) = match decode_at(ram, cpu, cpu.rip) {
            Some(instruction) => {
                let mut text = String::new();
                self.formatter.format(&instruction, &mut text);
                (instruction.len(), text)
            }
            None if fetched == 0 => (0, "(not mapped: a page fault)".to_owned()),
            None => (fetched, "(no instruction)".to_owned()),
        };
        self.shown(number, cpu.cpl(), address, &bytes[..length], text)
    }

    /// An instruction whose bytes are at hand.
    pub(crate) fn decoded(
        &mut self,
        number: u64,
        cpl: u8,
        address: u64,
        bytes: &[u8],
        bits: u32,
    ) -> Line {
        let mut text = String::new();
        let decoded = Decoder::with_ip(bits, bytes, address, DecoderOptions::NONE).decode();
        self.formatter.format(&decoded, &mut text);
        self.shown(number, cpl, address, bytes, text)
    }

    fn shown(&self, number: u64, cpl: u8, address: u64, bytes: &[u8], text: String) -> Line {
        let bytes = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let symbol = self.symbols.describe(address);
        Line { number, cpl, address, symbol, bytes, text, note: None }
    }
}
