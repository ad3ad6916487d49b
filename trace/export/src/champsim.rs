//! ChampSim's trace: records of 64 bytes, little-endian, no header.
//!
//! ChampSim infers a branch's type from the registers of its record and takes its target from the next
//! record's address. So registers are chosen for the type, not for the machine, and where control
//! leaves otherwise (an interrupt, a fault, something left out) a record that the machine never
//! executed stands at the address where control was: an indirect jump to wherever it went. A branch
//! before it so keeps its own target. A repeated instruction has a record for each repetition.

use std::io::Write;

use iced_x86::Register;
use reprise_trace::instructions::{Delivery, Event, Observer, Run, Step, TraceError};

use crate::formats::notes;
use crate::instruction::{Branch, Decoded, DecodedBlocks};

/// Bytes of a record.
pub const RECORD_BYTES: usize = 64;
/// ChampSim's numbers of the registers that decide a branch's type.
const STACK_POINTER: u8 = 6;
const FLAGS: u8 = 25;
const INSTRUCTION_POINTER: u8 = 26;
/// Stands for whatever else an indirect branch reads, where that is no register.
const OTHER: u8 = 255;
/// Other registers have numbers from here on.
const FIRST_OTHER: u8 = 64;
/// Slots for memory that a record reads.
const READ_SLOTS: usize = 4;
/// Slots for memory that a record writes.
const WRITE_SLOTS: usize = 2;

/// What an export did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Records written.
    pub records: u64,
    /// Instructions that retired.
    pub instructions: u64,
    /// Records that stand for interrupts, faults and gaps.
    pub synthetic: u64,
    /// Accesses of instructions that did not retire, which have no place in the format.
    pub accesses_left_out: u64,
}

impl Summary {
    /// What a user should know of it.
    pub(crate) fn notes(&self) -> Vec<String> {
        notes(&[
            (self.synthetic, "records stand for interrupts, faults and gaps"),
            (self.accesses_left_out, "accesses of instructions that did not retire are left out"),
        ])
    }
}

/// One record.
#[derive(Clone, Copy, Debug, Default)]
struct Record {
    address: u64,
    is_branch: bool,
    taken: bool,
    destinations: [u8; 2],
    sources: [u8; 4],
    writes: [u64; WRITE_SLOTS],
    reads: [u64; READ_SLOTS],
}

impl Record {
    fn to_bytes(self) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8] = u8::from(self.is_branch);
        bytes[9] = u8::from(self.taken);
        bytes[10..12].copy_from_slice(&self.destinations);
        bytes[12..16].copy_from_slice(&self.sources);
        for (slot, address) in self.writes.iter().chain(&self.reads).enumerate() {
            bytes[16 + 8 * slot..24 + 8 * slot].copy_from_slice(&address.to_le_bytes());
        }
        bytes
    }
}

/// The number of a register that decides nothing.
fn number(register: Register) -> u8 {
    match register {
        Register::RSP => STACK_POINTER,
        Register::RIP | Register::EIP => 0,
        // Register numbers of the decoder are below 256; folding keeps clear of what decides.
        other => FIRST_OTHER + (other as u32 % u32::from(OTHER - FIRST_OTHER)) as u8,
    }
}

/// The first few of some numbers, zero apart.
fn first<const N: usize>(numbers: impl IntoIterator<Item = u8>) -> [u8; N] {
    let mut slots = [0; N];
    let named = numbers.into_iter().filter(|number| *number != 0);
    slots.iter_mut().zip(named).for_each(|(slot, number)| *slot = number);
    slots
}

/// What a record of this instruction says of registers.
fn template(decoded: &Decoded) -> Record {
    let reads = || decoded.reads.as_slice().iter().map(|register| number(*register));
    let writes = || decoded.writes.as_slice().iter().map(|register| number(*register));
    let others = || reads().filter(|number| *number != STACK_POINTER);
    let other = first::<1>(others().chain([OTHER]))[0];
    let flags = |set: bool| if set { FLAGS } else { 0 };
    let (sp, ip) = (STACK_POINTER, INSTRUCTION_POINTER);
    let (destinations, sources) = match decoded.branch {
        Branch::None => (
            first(writes().chain([flags(decoded.writes_flags)])),
            first([flags(decoded.reads_flags)].into_iter().chain(reads())),
        ),
        Branch::DirectJump => ([ip, 0], [0; 4]),
        Branch::IndirectJump | Branch::SystemCall | Branch::SystemReturn => {
            ([ip, 0], first(others().take(3).chain([other]).take(3)))
        }
        Branch::Conditional => {
            let others = others().filter(|number| *number != 0);
            (
                first([ip].into_iter().chain(writes().filter(|number| *number != sp))),
                first([ip, flags(decoded.reads_flags)].into_iter().chain(others)),
            )
        }
        Branch::DirectCall => ([ip, sp], [ip, sp, 0, 0]),
        Branch::IndirectCall => ([ip, sp], [ip, sp, other, 0]),
        Branch::Return => ([ip, sp], [sp, 0, 0, 0]),
    };
    let is_branch = decoded.branch != Branch::None;
    Record { is_branch, destinations, sources, ..Record::default() }
}

/// A record that waits for the address behind it.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    record: Record,
    is_conditional: bool,
    /// Where it goes if it does not jump.
    next: u64,
}

/// Writes ChampSim's format.
#[derive(Debug)]
pub struct ChampSim<W> {
    out: W,
    decoded: DecodedBlocks,
    waiting: Option<Waiting>,
    summary: Summary,
}

impl<W: Write> ChampSim<W> {
    /// Writes to `out`, record by record: a buffer around it helps.
    pub fn new(out: W) -> Self {
        let (decoded, summary) = (DecodedBlocks::default(), Summary::default());
        Self { out, decoded, waiting: None, summary }
    }

    /// What was written, and to where.
    pub fn into_parts(self) -> (W, Summary) {
        (self.out, self.summary)
    }

    /// What was done so far.
    pub fn summary(&self) -> Summary {
        self.summary
    }

    fn put(&mut self, record: Record) -> Result<(), TraceError> {
        self.summary.records += 1;
        self.out.write_all(&record.to_bytes()).map_err(TraceError::Write)
    }

    /// Control is at `address` now: the branch before it, if any, led there.
    fn arrive(&mut self, address: u64) -> Result<(), TraceError> {
        if let Some(Waiting { mut record, is_conditional, next }) = self.waiting.take() {
            record.taken = !is_conditional || address != next;
            self.put(record)?;
        }
        Ok(())
    }

    /// Control leaves `address` without an instruction that says so.
    fn leave(&mut self, address: u64) -> Result<(), TraceError> {
        self.arrive(address)?;
        let record = Record {
            address,
            is_branch: true,
            destinations: [INSTRUCTION_POINTER, 0],
            sources: [OTHER, 0, 0, 0],
            ..Record::default()
        };
        self.waiting = Some(Waiting { record, is_conditional: false, next: address });
        self.summary.synthetic += 1;
        Ok(())
    }

    fn step(&mut self, step: &Step<'_>, decoded: &Decoded) -> Result<(), TraceError> {
        if !step.retired && !step.instruction.is_repeated() {
            self.summary.accesses_left_out += step.addresses.len() as u64;
            return Ok(());
        }
        self.summary.instructions += u64::from(step.retired);
        let address = step.instruction.linear();
        self.arrive(address)?;
        let last = Record { address, ..template(decoded) };
        // More accesses than a record has slots for go into records before the one that branches.
        let more = match decoded.branch {
            Branch::None => last,
            _ => Record { address, ..Record::default() },
        };
        let per_record = match step.instruction.accesses().len() {
            length if step.instruction.is_repeated() => length.max(1),
            _ => usize::MAX,
        };
        let (mut record, mut in_record, mut reads, mut writes) = (more, 0, 0, 0);
        for access in step.accesses() {
            let (a_read, a_write) = (access.kind.reads(), access.kind.writes());
            let is_full = (a_read && reads == READ_SLOTS) || (a_write && writes == WRITE_SLOTS);
            if is_full || in_record == per_record {
                self.put(record)?;
                (record, in_record, reads, writes) = (more, 0, 0, 0);
            }
            if a_read {
                record.reads[reads] = access.address;
                reads += 1;
            }
            if a_write {
                record.writes[writes] = access.address;
                writes += 1;
            }
            in_record += 1;
        }
        let record = Record { reads: record.reads, writes: record.writes, ..last };
        if decoded.branch == Branch::None {
            return self.put(record);
        }
        let is_conditional = decoded.branch == Branch::Conditional;
        let next = step.instruction.next_linear();
        self.waiting = Some(Waiting { record, is_conditional, next });
        Ok(())
    }
}

impl<W: Write> Observer for ChampSim<W> {
    fn new_blocks(&mut self) {
        self.decoded.clear();
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        let decoded = self.decoded.get(run.id(), run.block());
        let mut steps = run.steps().zip(&decoded[run.first()..]);
        steps.try_for_each(|(step, decoded)| self.step(&step, decoded))
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        match *event {
            // INT is itself the jump to its handler.
            Event::Delivery { kind: Delivery::Software, .. } => Ok(()),
            Event::Delivery { address, .. } | Event::Skipped { address: Some(address), .. } => {
                self.leave(address)
            }
            _ => Ok(()),
        }
    }

    fn end(&mut self) -> Result<(), TraceError> {
        if let Some(Waiting { next, .. }) = self.waiting {
            self.arrive(next)?;
        }
        self.out.flush().map_err(TraceError::Write)
    }
}
