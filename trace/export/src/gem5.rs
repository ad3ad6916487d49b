//! gem5's instruction trace (its `inst.proto`): the four bytes `gem5`, then messages in protocol
//! buffers' encoding, each behind its length: a header, and one message an instruction.
//!
//! A message has the instruction's linear address and bytes, the CPU's number, the guest's virtual time
//! in nanoseconds, a coarse class, and the linear addresses and sizes of all accesses. The format
//! cannot say which accesses write: only an instruction's class tells whether any does. Interrupts
//! have no message; the instructions go on in their handlers.

use std::io::Write;

use iced_x86::Mnemonic;
use reprise_trace::instructions::{Event, Observer, Position, Run, Step, TraceError};

use crate::formats::notes;
use crate::instruction::{Decoded, DecodedBlocks};

/// What a stream of gem5's messages begins with.
const MAGIC: &[u8; 4] = b"gem5";
/// Ticks a second: nanoseconds.
const TICK_FREQUENCY_HZ: u64 = 1_000_000_000;
/// What gem5 calls the producer of a trace.
const OBJECT: &[u8] = b"reprise";
/// gem5's `Request::PRIVILEGED`, which it sets on accesses of the kernel.
const PRIVILEGED: u64 = 0x8000;

/// Fields of `InstHeader`.
mod header {
    pub(super) const OBJECT: u32 = 1;
    pub(super) const TICK_FREQUENCY: u32 = 3;
    pub(super) const HAS_MEMORY: u32 = 4;
}

/// Fields of `Inst`.
mod inst {
    pub(super) const ADDRESS: u32 = 1;
    pub(super) const CPU: u32 = 4;
    pub(super) const TICK: u32 = 5;
    pub(super) const CLASS: u32 = 6;
    pub(super) const ACCESS: u32 = 8;
    pub(super) const BYTES: u32 = 9;
}

/// Fields of `MemAccess`.
mod access {
    pub(super) const ADDRESS: u32 = 1;
    pub(super) const SIZE: u32 = 2;
    pub(super) const FLAGS: u32 = 3;
}

/// Classes of instructions: `InstType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Integer = 1,
    IntegerMultiply = 2,
    IntegerDivide = 3,
    FloatAdd = 4,
    FloatCompare = 5,
    FloatConvert = 6,
    FloatMultiply = 7,
    FloatDivide = 8,
    FloatSquareRoot = 9,
    MemoryRead = 30,
    MemoryWrite = 31,
}

/// What instructions that compute for more than a cycle or two are; all others count as integer ones.
const CLASSES: &[(Class, &[Mnemonic])] = {
    use Mnemonic::*;
    &[
        (Class::IntegerMultiply, &[Mul, Imul, Mulx]),
        (Class::IntegerDivide, &[Div, Idiv]),
        (Class::FloatAdd, &[Addss, Addsd, Addps, Addpd, Subss, Subsd, Subps, Subpd]),
        (Class::FloatAdd, &[Fadd, Faddp, Fiadd, Fsub, Fsubp, Fisub, Fsubr, Fsubrp, Fisubr]),
        (Class::FloatCompare, &[Comiss, Comisd, Ucomiss, Ucomisd, Cmpss, Cmpsd, Cmpps, Cmppd]),
        (Class::FloatCompare, &[Fcom, Fcomp, Fcompp, Fcomi, Fcomip, Fucom, Fucomi, Fucomip]),
        (Class::FloatConvert, &[Cvtsi2ss, Cvtsi2sd, Cvttss2si, Cvttsd2si, Cvtss2sd, Cvtsd2ss]),
        (Class::FloatConvert, &[Cvtdq2ps, Cvtdq2pd, Cvttps2dq, Cvttpd2dq, Cvtps2pd, Cvtpd2ps]),
        (Class::FloatMultiply, &[Mulss, Mulsd, Mulps, Mulpd, Fmul, Fmulp, Fimul]),
        (Class::FloatDivide, &[Divss, Divsd, Divps, Divpd, Fdiv, Fdivp, Fidiv, Fdivr, Fdivrp]),
        (Class::FloatSquareRoot, &[Sqrtss, Sqrtsd, Sqrtps, Sqrtpd, Fsqrt]),
    ]
};

/// As gem5 does it, an instruction that accesses memory is of a class by that.
fn class(step: &Step<'_>, decoded: &Decoded) -> Class {
    let accesses = || step.instruction.accesses().iter();
    if accesses().any(|access| access.kind.writes()) {
        return Class::MemoryWrite;
    }
    if accesses().any(|access| access.kind.reads()) {
        return Class::MemoryRead;
    }
    let known = CLASSES.iter().find(|(_, mnemonics)| mnemonics.contains(&decoded.mnemonic));
    known.map_or(Class::Integer, |(class, _)| *class)
}

/// Protocol buffers' encoding of one message.
#[derive(Debug, Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    /// A field's number and how its value is encoded.
    fn key(&mut self, field: u32, wire_type: u32) {
        self.varint(u64::from(field << 3 | wire_type));
    }

    fn number(&mut self, field: u32, value: u64) {
        self.key(field, 0);
        self.varint(value);
    }

    fn fixed(&mut self, field: u32, value: u64) {
        self.key(field, 1);
        self.0.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, field: u32, bytes: &[u8]) {
        self.key(field, 2);
        self.varint(bytes.len() as u64);
        self.0.extend(bytes);
    }
}

/// What an export did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Messages written, the header apart.
    pub messages: u64,
    /// Accesses of instructions that did not retire, which were left out.
    pub accesses_left_out: u64,
}

impl Summary {
    /// What a user should know of it.
    pub(crate) fn notes(&self) -> Vec<String> {
        notes(&[(
            self.accesses_left_out,
            "accesses of instructions that did not retire are left out",
        )])
    }
}

/// Writes gem5's format.
#[derive(Debug)]
pub struct Gem5<W> {
    out: W,
    cpu: u32,
    decoded: DecodedBlocks,
    position: Position,
    message: Message,
    /// An access within the message.
    part: Message,
    begun: bool,
    summary: Summary,
}

impl<W: Write> Gem5<W> {
    /// Writes to `out`, message by message: a buffer around it helps. The instructions are shown as
    /// those of the CPU of this number.
    pub fn new(out: W, cpu: u32) -> Self {
        Self {
            out,
            cpu,
            decoded: DecodedBlocks::default(),
            position: Position::default(),
            message: Message::default(),
            part: Message::default(),
            begun: false,
            summary: Summary::default(),
        }
    }

    /// What was written, and to where.
    pub fn into_parts(self) -> (W, Summary) {
        (self.out, self.summary)
    }

    fn put_header(&mut self) -> Result<(), TraceError> {
        if std::mem::replace(&mut self.begun, true) {
            return Ok(());
        }
        self.out.write_all(MAGIC).map_err(TraceError::Write)?;
        self.message.bytes(header::OBJECT, OBJECT);
        self.message.number(header::TICK_FREQUENCY, TICK_FREQUENCY_HZ);
        self.message.number(header::HAS_MEMORY, 1);
        self.put_message()
    }

    /// Writes the message behind its length, and empties it.
    fn put_message(&mut self) -> Result<(), TraceError> {
        self.part.0.clear();
        self.part.varint(self.message.0.len() as u64);
        self.out.write_all(&self.part.0).map_err(TraceError::Write)?;
        self.out.write_all(&self.message.0).map_err(TraceError::Write)?;
        self.message.0.clear();
        Ok(())
    }

    fn step(
        &mut self,
        step: &Step<'_>,
        decoded: &Decoded,
        tick: u64,
        flags: u64,
    ) -> Result<(), TraceError> {
        if !step.retired && !step.instruction.is_repeated() {
            self.summary.accesses_left_out += step.addresses.len() as u64;
            return Ok(());
        }
        self.message.number(inst::ADDRESS, step.instruction.linear());
        self.message.number(inst::CPU, u64::from(self.cpu));
        self.message.fixed(inst::TICK, tick);
        self.message.number(inst::CLASS, class(step, decoded) as u64);
        for one in step.accesses().filter(|access| access.kind.touches_memory()) {
            self.part.0.clear();
            self.part.number(access::ADDRESS, one.address);
            self.part.number(access::SIZE, u64::from(one.size_bytes));
            self.part.number(access::FLAGS, flags);
            self.message.bytes(inst::ACCESS, &self.part.0);
        }
        self.message.bytes(inst::BYTES, step.instruction.bytes());
        self.summary.messages += 1;
        self.put_message()
    }
}

impl<W: Write> Observer for Gem5<W> {
    fn begin(&mut self, position: &Position) -> Result<(), TraceError> {
        self.position = *position;
        self.put_header()
    }

    fn new_blocks(&mut self) {
        self.decoded.clear();
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        self.put_header()?;
        let decoded = self.decoded.get(run.id(), run.block());
        let flags = if run.block().mode().cpl == 3 { 0 } else { PRIVILEGED };
        let mut tick = self.position.virtual_ns();
        for (step, decoded) in run.steps().zip(&decoded[run.first()..]) {
            self.step(&step, decoded, tick, flags)?;
            tick += u64::from(step.retired);
        }
        self.position.pass_run(run);
        Ok(())
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        self.position.pass_event(event);
        Ok(())
    }

    fn end(&mut self) -> Result<(), TraceError> {
        self.put_header()?;
        self.out.flush().map_err(TraceError::Write)
    }
}
