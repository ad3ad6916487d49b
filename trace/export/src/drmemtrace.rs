//! DynamoRIO's drmemtrace, version 7, as a whole-system trace of one CPU: packed records of 12 bytes,
//! little-endian, with encodings, branch outcomes and targets, and physical addresses where the trace
//! has them.
//!
//! A file has one instruction-set mode: instructions of 16-bit and 32-bit code are left out and
//! counted. System calls, interrupts and exceptions become hardware events, and SYSRET and IRET the
//! returns from them. Readers take events and returns to pair, each return to lead to what its event
//! interrupted, and code within an event to be the kernel's; a kernel that switches tasks returns to
//! elsewhere. So events are kept here as on the reader's stack ([`Events`]). User code that no open
//! event was of begins a window, like code behind a gap, with an event and a return of its own; a
//! kernel that no event led to gets an event. Only instructions that retired have a place; the repetitions of a REP that an
//! interrupt suspended are shown as instructions of their own, as its rest is.

use std::collections::HashMap;
use std::io::Write;

use iced_x86::Mnemonic;
use reprise_trace::instructions::{
    AccessKind, CodeWidth, Delivery, Event, Observer, Position, Run, Step, TraceError,
};

use crate::formats::notes;
use crate::instruction::{Branch, Decoded, DecodedBlocks};

/// The version of the format.
const VERSION: u64 = 7;
/// A whole system, x86-64, with encodings.
const FILE_TYPE: u64 = 0x40000 | 0x40 | 0x200;
/// The guest is shown as one process with a thread for each CPU: neither number may be zero.
const FIRST_THREAD: u64 = 1;
const PROCESS: u64 = 1;
const CACHE_LINE_BYTES: u64 = 64;
const PAGE_BYTES: u64 = 4096;
/// Bytes that an encoding record holds.
const ENCODING_BYTES: usize = 8;
/// Microseconds from 1601 to 1970, where virtual time zero is put.
const EPOCH_US: u64 = 11_644_473_600_000_000;

/// Kinds of records: DynamoRIO's `trace_type_t`.
mod kind {
    pub(super) const READ: u16 = 0;
    pub(super) const WRITE: u16 = 1;
    pub(super) const PREFETCH: u16 = 2;
    pub(super) const PREFETCH_T0: u16 = 3;
    pub(super) const PREFETCH_T1: u16 = 4;
    pub(super) const PREFETCH_T2: u16 = 5;
    pub(super) const PREFETCH_NON_TEMPORAL: u16 = 6;
    pub(super) const PREFETCH_WRITE: u16 = 8;
    pub(super) const INSTRUCTION: u16 = 10;
    pub(super) const DIRECT_JUMP: u16 = 11;
    pub(super) const INDIRECT_JUMP: u16 = 12;
    pub(super) const DIRECT_CALL: u16 = 14;
    pub(super) const INDIRECT_CALL: u16 = 15;
    pub(super) const RETURN: u16 = 16;
    pub(super) const THREAD: u16 = 22;
    pub(super) const THREAD_EXIT: u16 = 23;
    pub(super) const PROCESS: u16 = 24;
    pub(super) const HEADER: u16 = 25;
    pub(super) const FOOTER: u16 = 26;
    pub(super) const MARKER: u16 = 28;
    pub(super) const NO_FETCH: u16 = 29;
    pub(super) const ENCODING: u16 = 47;
    pub(super) const TAKEN_JUMP: u16 = 48;
    pub(super) const UNTAKEN_JUMP: u16 = 49;
}

/// Kinds of markers: DynamoRIO's `trace_marker_type_t`.
mod marker {
    pub(super) const TIMESTAMP: u16 = 2;
    pub(super) const CPU_ID: u16 = 3;
    pub(super) const FILE_TYPE: u16 = 9;
    pub(super) const CACHE_LINE_SIZE: u16 = 10;
    pub(super) const VERSION: u16 = 12;
    pub(super) const WINDOW_ID: u16 = 14;
    pub(super) const PHYSICAL_ADDRESS: u16 = 15;
    pub(super) const VIRTUAL_ADDRESS: u16 = 17;
    pub(super) const PAGE_SIZE: u16 = 18;
    pub(super) const BRANCH_TARGET: u16 = 29;
    pub(super) const HARDWARE_EVENT: u16 = 43;
    pub(super) const HARDWARE_CONTEXT_RETURN: u16 = 44;
}

/// What an export did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Records written.
    pub records: u64,
    /// Instructions written.
    pub instructions: u64,
    /// Instructions of 16-bit and 32-bit code, which were left out.
    pub instructions_left_out: u64,
    /// Accesses of instructions that did not retire, which were left out.
    pub accesses_left_out: u64,
}

impl Summary {
    /// What a user should know of it.
    pub(crate) fn notes(&self) -> Vec<String> {
        notes(&[
            (self.instructions_left_out, "instructions of 16-bit and 32-bit code are left out"),
            (self.accesses_left_out, "accesses of instructions that did not retire are left out"),
        ])
    }
}

/// A branch that waits for the address behind it.
#[derive(Clone, Debug)]
struct Waiting {
    branch: Branch,
    linear: u64,
    length: u16,
    /// What goes before it: physical addresses and encoding.
    before: Vec<(u16, u16, u64)>,
    /// Its accesses.
    accesses: Vec<(u16, u16, u64)>,
    /// The address that it interrupts, if it is an event.
    event: Option<u64>,
}

/// The hardware events that a reader takes to be open, by the address each interrupted.
#[derive(Debug, Default)]
struct Events {
    open: Vec<u64>,
}

impl Events {
    /// More open events than hardware nests; readers give up at thirty.
    const MOST: usize = 20;

    /// Markers for a return to `address`: one closes each event down to the one that interrupted it.
    fn close(&mut self, address: u64) -> usize {
        let found = self.open.iter().rposition(|interrupted| *interrupted == address);
        found.map_or(0, |place| self.open.drain(place..).count())
    }

    /// Markers that close all events but the `kept` outermost ones, and the address that the last of
    /// these markers returns to.
    fn forget(&mut self, kept: usize) -> (usize, Option<u64>) {
        let outermost = self.open.get(kept).copied();
        (self.open.drain(kept..).count(), outermost)
    }
}

/// Whether the instruction pops several values that belong together.
fn pops_frame(decoded: &Decoded) -> bool {
    matches!(decoded.mnemonic, Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq | Mnemonic::Retf)
}

/// The record of a prefetch.
fn prefetch(mnemonic: Mnemonic) -> u16 {
    match mnemonic {
        Mnemonic::Prefetcht0 => kind::PREFETCH_T0,
        Mnemonic::Prefetcht1 => kind::PREFETCH_T1,
        Mnemonic::Prefetcht2 => kind::PREFETCH_T2,
        Mnemonic::Prefetchnta => kind::PREFETCH_NON_TEMPORAL,
        Mnemonic::Prefetchw | Mnemonic::Prefetchwt1 => kind::PREFETCH_WRITE,
        _ => kind::PREFETCH,
    }
}

/// Writes drmemtrace's format.
#[derive(Debug)]
pub struct DrMemTrace<W> {
    out: W,
    cpu: u32,
    decoded: DecodedBlocks,
    /// Encodings that were written, by address.
    encodings: HashMap<u64, Vec<u8>>,
    /// Physical pages that were told, by linear page.
    pages: HashMap<u64, u64>,
    waiting: Option<Waiting>,
    records: Vec<(u16, u16, u64)>,
    summary: Summary,
    windows: u64,
    begun: bool,
    events: Events,
    /// Readers expect control here, since returns were told that did not happen.
    expected: Option<u64>,
    /// Virtual time that waits to be told.
    time_ns: Option<u64>,
    /// The last instruction written is a branch: only its target, and no time, may follow.
    behind_branch: bool,
    /// Code was left out since the last instruction written.
    left_out: bool,
    /// The REP at this address goes on, if nothing comes between: traces cut long ones into runs.
    unfinished: Option<u64>,
}

impl<W: Write> DrMemTrace<W> {
    /// Writes to `out`, record by record: a buffer around it helps. The trace is shown as that of the
    /// CPU of this number, and as a thread of its own for each.
    pub fn new(out: W, cpu: u32) -> Self {
        Self {
            out,
            cpu,
            decoded: DecodedBlocks::default(),
            encodings: HashMap::new(),
            pages: HashMap::new(),
            waiting: None,
            records: Vec::new(),
            summary: Summary::default(),
            windows: 0,
            begun: false,
            events: Events::default(),
            expected: None,
            time_ns: None,
            behind_branch: false,
            left_out: false,
            unfinished: None,
        }
    }

    /// What was done so far.
    pub fn summary(&self) -> Summary {
        self.summary
    }

    /// What was written, and to where.
    pub fn into_parts(self) -> (W, Summary) {
        (self.out, self.summary)
    }

    fn put(&mut self, kind: u16, size: u16, address: u64) -> Result<(), TraceError> {
        let mut bytes = [0; 12];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[2..4].copy_from_slice(&size.to_le_bytes());
        bytes[4..].copy_from_slice(&address.to_le_bytes());
        self.summary.records += 1;
        self.out.write_all(&bytes).map_err(TraceError::Write)
    }

    fn put_marker(&mut self, marker: u16, value: u64) -> Result<(), TraceError> {
        self.put(kind::MARKER, marker, value)
    }

    fn put_all(&mut self, records: &[(u16, u16, u64)]) -> Result<(), TraceError> {
        records.iter().try_for_each(|(kind, size, address)| self.put(*kind, *size, *address))
    }

    /// What every file begins with.
    fn put_beginning(&mut self, virtual_ns: u64) -> Result<(), TraceError> {
        if std::mem::replace(&mut self.begun, true) {
            return Ok(());
        }
        self.put(kind::HEADER, 0, VERSION)?;
        self.put_marker(marker::VERSION, VERSION)?;
        self.put_marker(marker::FILE_TYPE, FILE_TYPE)?;
        self.put(kind::THREAD, 4, self.thread())?;
        self.put(kind::PROCESS, 4, PROCESS)?;
        self.put_marker(marker::CACHE_LINE_SIZE, CACHE_LINE_BYTES)?;
        self.put_marker(marker::PAGE_SIZE, PAGE_BYTES)?;
        self.put_time(virtual_ns)?;
        // Readers want the windows of one file to begin with this one, and gaps come unannounced.
        self.put_marker(marker::WINDOW_ID, 0)
    }

    fn thread(&self) -> u64 {
        FIRST_THREAD + u64::from(self.cpu)
    }

    fn put_time(&mut self, virtual_ns: u64) -> Result<(), TraceError> {
        self.put_marker(marker::TIMESTAMP, EPOCH_US + virtual_ns / 1000)?;
        self.put_marker(marker::CPU_ID, u64::from(self.cpu))
    }

    /// Control is at `address` now, if that is known: the branch before it led there.
    fn arrive(&mut self, address: Option<u64>) -> Result<(), TraceError> {
        let Some(waiting) = self.waiting.take() else { return Ok(()) };
        let Waiting { branch, linear, length, before, accesses, event } = waiting;
        let next = linear.wrapping_add(u64::from(length));
        let address = address.unwrap_or(next);
        let kind = match branch {
            Branch::Conditional if address == next => kind::UNTAKEN_JUMP,
            Branch::Conditional => kind::TAKEN_JUMP,
            Branch::DirectJump => kind::DIRECT_JUMP,
            Branch::DirectCall => kind::DIRECT_CALL,
            Branch::IndirectJump => kind::INDIRECT_JUMP,
            Branch::IndirectCall => kind::INDIRECT_CALL,
            Branch::Return | Branch::SystemReturn => kind::RETURN,
            Branch::None | Branch::SystemCall => kind::INSTRUCTION,
        };
        let is_indirect = [kind::INDIRECT_JUMP, kind::INDIRECT_CALL, kind::RETURN].contains(&kind);
        self.put_all(&before)?;
        if is_indirect {
            self.put_marker(marker::BRANCH_TARGET, address)?;
        }
        self.put(kind, length, linear)?;
        self.put_all(&accesses)?;
        if let Some(interrupted) = event {
            self.put_event(interrupted)?;
        }
        if branch == Branch::SystemReturn {
            let markers = self.events.close(address);
            self.put_returns(markers, address)?;
        }
        self.behind_branch = kind != kind::INSTRUCTION;
        Ok(())
    }

    fn put_event(&mut self, interrupted: u64) -> Result<(), TraceError> {
        if self.events.open.len() >= Events::MOST {
            let (markers, again) = self.events.forget(1);
            self.put_returns(markers, interrupted)?;
            // Back in the outermost event, whose code was last interrupted there. An event at once
            // behind another has no instruction before it that would have to lead to its address.
            again.map_or(Ok(()), |address| self.open_event(address))?;
        }
        self.open_event(interrupted)
    }

    fn open_event(&mut self, interrupted: u64) -> Result<(), TraceError> {
        self.events.open.push(interrupted);
        self.expected = None;
        // Readers take zero for no value.
        self.put_marker(marker::HARDWARE_EVENT, interrupted.max(1))
    }

    fn put_returns(&mut self, markers: usize, address: u64) -> Result<(), TraceError> {
        (0..markers)
            .try_for_each(|_| self.put_marker(marker::HARDWARE_CONTEXT_RETURN, address.max(1)))
    }

    /// Before an instruction: user code is within no event, and the kernel's code is in one.
    fn settle(&mut self, is_user: bool, address: u64) -> Result<(), TraceError> {
        if std::mem::take(&mut self.left_out) && self.summary.instructions > 0 {
            self.put_window()?;
        }
        if !is_user {
            return if self.events.open.is_empty() { self.put_event(address) } else { Ok(()) };
        }
        if !self.events.open.is_empty() {
            self.put_window()?;
        }
        if self.expected.take().is_some_and(|expected| expected != address) {
            self.put_event(address)?;
            let markers = self.events.close(address);
            self.put_returns(markers, address)?;
        }
        Ok(())
    }

    /// A gap, or another task than was interrupted: behind it nothing is known of the events before.
    fn put_window(&mut self) -> Result<(), TraceError> {
        let (markers, outermost) = self.events.forget(0);
        self.expected = outermost.or(self.expected);
        self.put_returns(markers, 1)?;
        self.windows += 1;
        self.put_marker(marker::WINDOW_ID, self.windows)
    }

    /// Tells a page's physical address, if it is news.
    fn tell_page(&mut self, linear: u64, physical: u64) {
        let page = physical / PAGE_BYTES;
        if self.pages.insert(linear / PAGE_BYTES, page) != Some(page) {
            let pair = [(marker::PHYSICAL_ADDRESS, physical), (marker::VIRTUAL_ADDRESS, linear)];
            self.records.extend(pair.map(|(marker, value)| (kind::MARKER, marker, value)));
        }
    }

    fn tell_encoding(&mut self, linear: u64, bytes: &[u8]) {
        if self.encodings.get(&linear).is_some_and(|known| known == bytes) {
            return;
        }
        self.encodings.insert(linear, bytes.to_vec());
        self.records.extend(bytes.chunks(ENCODING_BYTES).map(|part| {
            let mut word = [0; ENCODING_BYTES];
            word[..part.len()].copy_from_slice(part);
            (kind::ENCODING, part.len() as u16, u64::from_le_bytes(word))
        }));
    }

    /// Tells the physical pages of a block, whose addresses the trace always has.
    fn tell_code(&mut self, run: &Run<'_>, step: &Step<'_>) {
        let block = run.block();
        let linear = step.instruction.linear();
        let same_page = linear / PAGE_BYTES == block.linear() / PAGE_BYTES;
        let offset = linear % PAGE_BYTES;
        let first = block.physical() - block.physical() % PAGE_BYTES;
        let page = if same_page { Some(first) } else { block.next_page() };
        if let Some(page) = page {
            self.tell_page(linear, page + offset);
        }
        let last = step.instruction.next_linear().wrapping_sub(1);
        if let Some(page) = block.next_page()
            && last / PAGE_BYTES != linear / PAGE_BYTES
        {
            self.tell_page(last, page + last % PAGE_BYTES);
        }
    }

    fn step(
        &mut self,
        run: &Run<'_>,
        step: &Step<'_>,
        decoded: &Decoded,
    ) -> Result<(), TraceError> {
        let instruction = step.instruction;
        if !step.retired && !instruction.is_repeated() {
            self.summary.accesses_left_out += step.addresses.len() as u64;
            return Ok(());
        }
        let linear = instruction.linear();
        let goes_on = self.unfinished.take() == Some(linear);
        self.unfinished = (!step.retired).then_some(linear);
        self.arrive(Some(linear))?;
        if !goes_on
            && !std::mem::take(&mut self.behind_branch)
            && let Some(virtual_ns) = self.time_ns.take()
        {
            self.put_time(virtual_ns)?;
        }
        self.settle(run.block().mode().cpl == 3, linear)?;
        self.summary.instructions += u64::from(step.retired);
        self.records.clear();
        self.tell_code(run, step);
        for access in step.accesses() {
            access.physical.into_iter().for_each(|place| self.tell_page(access.address, place));
        }
        self.tell_encoding(linear, instruction.bytes());
        let before = std::mem::take(&mut self.records);
        let length = instruction.bytes().len() as u16;
        if decoded.branch == Branch::None {
            self.put_all(&before)?;
            let first = if goes_on { kind::NO_FETCH } else { kind::INSTRUCTION };
            self.put_accesses(step, decoded, first, length)?;
            self.records = before;
            return Ok(());
        }
        let mut accesses: Vec<(u16, u16, u64)> = Vec::new();
        for access in step.accesses() {
            let (size, address) = (access.size_bytes, access.address);
            if access.kind.reads() {
                match accesses.last_mut() {
                    // What IRET and far returns pop is one operand to DynamoRIO.
                    Some((kind::READ, before, start))
                        if pops_frame(decoded) && *start + u64::from(*before) == address =>
                    {
                        *before += size;
                    }
                    _ => accesses.push((kind::READ, size, address)),
                }
            }
            accesses.extend(access.kind.writes().then_some((kind::WRITE, size, address)));
        }
        let event = match decoded.branch {
            Branch::SystemCall => Some(instruction.next_linear()),
            _ => None,
        };
        let branch = decoded.branch;
        self.waiting = Some(Waiting { branch, linear, length, before, accesses, event });
        Ok(())
    }

    /// An instruction that does not branch, with a record of its own for each repetition but the first.
    fn put_accesses(
        &mut self,
        step: &Step<'_>,
        decoded: &Decoded,
        first: u16,
        length: u16,
    ) -> Result<(), TraceError> {
        let linear = step.instruction.linear();
        let list = step.instruction.accesses().len();
        let per_repetition = if step.instruction.is_repeated() { list.max(1) } else { usize::MAX };
        // A REP that ends where its last run did has nothing more to show.
        if first == kind::INSTRUCTION || !step.addresses.is_empty() {
            self.put(first, length, linear)?;
        }
        for (number, access) in step.accesses().enumerate() {
            if number > 0 && number % per_repetition == 0 {
                self.put(kind::NO_FETCH, length, linear)?;
            }
            let (size, address) = (access.size_bytes, access.address);
            match access.kind {
                AccessKind::Read => self.put(kind::READ, size, address)?,
                AccessKind::Write => self.put(kind::WRITE, size, address)?,
                AccessKind::ReadWrite => {
                    self.put(kind::READ, size, address)?;
                    self.put(kind::WRITE, size, address)?;
                }
                AccessKind::Prefetch => self.put(prefetch(decoded.mnemonic), size, address)?,
                // DynamoRIO has it read nothing there.
                AccessKind::Invalidate => self.put(kind::READ, 0, address)?,
            }
        }
        Ok(())
    }
}

impl<W: Write> Observer for DrMemTrace<W> {
    fn begin(&mut self, position: &Position) -> Result<(), TraceError> {
        self.put_beginning(position.marker.virtual_ns)
    }

    fn new_blocks(&mut self) {
        self.decoded.clear();
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        self.put_beginning(0)?;
        if run.block().mode().width != CodeWidth::Bits64 {
            self.summary.instructions_left_out += run.retired() as u64;
            self.left_out = true;
            return self.arrive(Some(run.linear()));
        }
        let decoded = self.decoded.get(run.id(), run.block());
        let mut steps = run.steps().zip(&decoded[run.first()..]);
        steps.try_for_each(|(step, decoded)| self.step(run, &step, decoded))
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        if matches!(event, Event::Delivery { .. } | Event::Skipped { .. }) {
            self.unfinished = None;
        }
        match *event {
            // The instruction itself is the event.
            Event::Delivery { kind: Delivery::Software, .. } => Ok(()),
            Event::Delivery { address, .. } => {
                self.put_beginning(0)?;
                self.arrive(Some(address))?;
                // Of code that is left out there is nothing to interrupt.
                if self.left_out { Ok(()) } else { self.put_event(address) }
            }
            Event::AddressSpace { .. } => {
                self.pages.clear();
                Ok(())
            }
            Event::Marker(time) => {
                self.put_beginning(time.virtual_ns)?;
                self.time_ns = Some(time.virtual_ns);
                Ok(())
            }
            Event::Skipped { address, .. } => {
                self.put_beginning(0)?;
                self.arrive(address)?;
                // One gap, however it came about.
                self.left_out = false;
                self.put_window()
            }
            _ => Ok(()),
        }
    }

    fn end(&mut self) -> Result<(), TraceError> {
        self.put_beginning(0)?;
        self.arrive(None)?;
        self.put(kind::THREAD_EXIT, 4, self.thread())?;
        self.put(kind::FOOTER, 0, 0)?;
        self.out.flush().map_err(TraceError::Write)
    }
}
