//! drmemtrace's records, read back by the rules that its readers and its invariant checker have.

use std::collections::HashMap;

use reprise_export::drmemtrace::{DrMemTrace, Summary};

use reprise_trace::instructions::{
    AccessKind, Batch, BlockDefinition, BlockEnd, CUT, Contents, Definition, Delivery, Event, Feed,
    InstructionDefinition, Mode, Observer, Position, StaticAccess,
};

use crate::account::{deliveries, retired, show, show_user, with_physical};
use crate::synthetic::Executed;

/// A record: type, size, address.
type Record = (u16, u16, u64);

const MARKER: u16 = 28;
const INSTRUCTION: u16 = 10;
const NO_FETCH: u16 = 29;
const ENCODING: u16 = 47;

fn records(bytes: &[u8]) -> Vec<Record> {
    assert_eq!(bytes.len() % 12, 0);
    let split = bytes.chunks(12).map(|one| {
        let half = |at: usize| u16::from_le_bytes(one[at..at + 2].try_into().expect("two bytes"));
        (half(0), half(2), u64::from_le_bytes(one[4..].try_into().expect("eight bytes")))
    });
    split.collect()
}

fn export(seed: u64) -> (Vec<Record>, Summary, Vec<crate::synthetic::Entry>) {
    let mut exporter = DrMemTrace::new(Vec::new(), 0);
    let entries = show(with_physical(seed), 20_000, &mut exporter);
    let (bytes, summary) = exporter.into_parts();
    (records(&bytes), summary, entries)
}

/// An instruction as a reader would show it.
#[derive(Debug, Default)]
struct Fetched {
    kind: u16,
    address: u64,
    bytes: Vec<u8>,
    target: Option<u64>,
    accesses: Vec<(u16, u16, u64)>,
    /// Readers take it to be the kernel's.
    in_event: bool,
}

impl Fetched {
    /// Control is at `address` behind it: does it lead there?
    fn check_flow(&self, address: u64) {
        let next = self.address + self.bytes.len() as u64;
        let displacement = |at: usize| {
            let bytes = self.bytes[at..at + 4].try_into().expect("four bytes");
            next.wrapping_add_signed(i64::from(i32::from_le_bytes(bytes)))
        };
        let expected = match self.kind {
            10 | 49 => next,
            48 => displacement(2),
            11 | 14 => displacement(1),
            12 | 15 | 16 => self.target.expect("an indirect branch has its target"),
            other => panic!("an instruction of type {other}"),
        };
        assert_eq!(address, expected, "behind {self:x?}");
    }
}

fn is_fetch(kind: u16) -> bool {
    (10..=16).contains(&kind) || [31, 48, 49].contains(&kind)
}

fn is_branch(kind: u16) -> bool {
    (11..=16).contains(&kind) || [48, 49].contains(&kind)
}

/// Puts the records together, checking what a reader checks.
#[derive(Default)]
struct Reader {
    encodings: HashMap<u64, Vec<u8>>,
    pending_encoding: Vec<u8>,
    pending_target: Option<u64>,
    pages: HashMap<u64, u64>,
    physical: Option<u64>,
    fetched: Vec<Fetched>,
    /// Open events: what each interrupted, and the last instruction before it.
    interrupted: Vec<(u64, Option<usize>)>,
    /// The last instruction that was fetched since the innermost open event.
    last_in_event: Option<usize>,
    /// Behind a return: where it must lead.
    returned: Option<u64>,
    /// An event or a return stands before the next instruction.
    is_transferred: bool,
    /// A gap stands before the next instruction.
    in_gap: bool,
    events: usize,
    windows: usize,
}

impl Reader {
    fn take(&mut self, (kind, size, address): Record) {
        match kind {
            ENCODING => {
                assert!((1..=8).contains(&size));
                self.pending_encoding.extend(&address.to_le_bytes()[..usize::from(size)]);
            }
            MARKER => self.marker(size, address),
            kind if is_fetch(kind) => self.fetch(kind, size, address),
            NO_FETCH => {
                let last = self.fetched.last().expect("a fetch comes first");
                assert_eq!((last.address, last.kind), (address, 10), "a repetition of the last");
                assert_eq!(last.bytes.len(), usize::from(size));
            }
            0 | 1 | 3 | 8 => {
                assert!(self.pages.contains_key(&(address >> 12)), "its page was told");
                let last = self.fetched.last_mut().expect("a fetch comes first");
                last.accesses.push((kind, size, address));
            }
            other => panic!("a record of type {other} here"),
        }
    }

    fn marker(&mut self, marker: u16, value: u64) {
        match marker {
            2 | 3 => {
                let is_behind_branch = self.fetched.last().is_some_and(|last| is_branch(last.kind));
                assert!(!is_behind_branch, "no time between a branch and its target");
            }
            14 => {
                self.windows += 1;
                self.in_gap = true;
            }
            15 => self.physical = Some(value),
            17 => {
                let physical = self.physical.take().expect("the physical address comes first");
                assert_eq!(physical & 0xfff, value & 0xfff);
                self.pages.insert(value >> 12, physical >> 12);
            }
            29 => self.pending_target = Some(value),
            43 => {
                if let Some(last) = self.last_in_event.filter(|_| !self.in_gap) {
                    // A REP that an interrupt suspends begins again where it stands.
                    let last = &self.fetched[last];
                    if last.bytes[0] != 0xf3 || last.address != value {
                        last.check_flow(value);
                    }
                }
                assert_ne!(value, 0);
                self.returned = None;
                self.interrupted.push((value, self.last_in_event.take()));
                assert!(self.interrupted.len() < 30, "readers take this for missing returns");
                self.events += 1;
                self.is_transferred = true;
            }
            44 => {
                assert_ne!(value, 0);
                // A reader that counts below zero shows the kernel's code as the user's from there on.
                let (interrupted, last) = self.interrupted.pop().expect("an event came before");
                (self.returned, self.last_in_event) = (Some(interrupted), last);
                self.is_transferred = true;
            }
            other => panic!("marker {other} here"),
        }
    }

    fn fetch(&mut self, kind: u16, size: u16, address: u64) {
        let anywhere = std::mem::take(&mut self.is_transferred) | std::mem::take(&mut self.in_gap);
        if let Some(last) = self.fetched.last().filter(|_| !anywhere) {
            last.check_flow(address);
        }
        if let Some(interrupted) = self.returned.take() {
            assert_eq!(address, interrupted, "a return leads to what was interrupted");
        }
        let encoding = std::mem::take(&mut self.pending_encoding);
        if !encoding.is_empty() {
            self.encodings.insert(address, encoding);
        }
        let bytes = self.encodings.get(&address).expect("the encoding was told").clone();
        assert_eq!(bytes.len(), usize::from(size));
        let last = address + u64::from(size) - 1;
        assert!(
            self.pages.contains_key(&(address >> 12)) && self.pages.contains_key(&(last >> 12))
        );
        let target = self.pending_target.take();
        assert_eq!(
            target.is_some(),
            [12, 15, 16].contains(&kind),
            "indirect branches have targets"
        );
        assert!(!is_branch(kind) || kind != 13, "conditional branches say whether they are taken");
        let (accesses, in_event) = (Vec::new(), !self.interrupted.is_empty());
        self.last_in_event = Some(self.fetched.len());
        self.fetched.push(Fetched { kind, address, bytes, target, accesses, in_event });
    }
}

/// The type that the bytes say.
fn kinds(bytes: &[u8]) -> &'static [u16] {
    match bytes {
        [0x0f, 0x85, ..] => &[48, 49],
        [0xe8, ..] => &[14],
        [0xff, 0xd0] => &[15],
        [0xc3] | [0x48, 0xcf] => &[16],
        _ => &[10],
    }
}

/// What a reader should show of an instruction's accesses.
fn accesses(executed: &Executed) -> Vec<(u16, u16, u64)> {
    let both = executed.accesses.iter().flat_map(|one| {
        let read = match one.kind {
            // PREFETCHT0 and PREFETCHW are the machine's; INVLPG reads nothing there.
            AccessKind::Prefetch => {
                Some((if executed.bytes[1] == 0x18 { 3 } else { 8 }, 1, one.address))
            }
            AccessKind::Invalidate => Some((0, 0, one.address)),
            kind => kind.reads().then_some((0, one.size_bytes, one.address)),
        };
        let write = one.kind.writes().then_some((1, one.size_bytes, one.address));
        read.into_iter().chain(write)
    });
    // IRETQ pops five values, which are one operand to DynamoRIO.
    let both: Vec<_> = both.collect();
    if executed.bytes == [0x48, 0xcf] { vec![(0, 40, both[0].2)] } else { both }
}

#[test]
fn a_file_begins_and_ends_as_readers_expect() {
    let (records, summary, _) = export(1);
    assert_eq!(records.len() as u64, summary.records);
    let begin = [
        (25, 0, 7),
        (MARKER, 12, 7),
        (MARKER, 9, 0x40000 | 0x40 | 0x200),
        (22, 4, 1),
        (24, 4, 1),
        (MARKER, 10, 64),
        (MARKER, 18, 4096),
        (MARKER, 2, 11_644_473_600_000_000),
        (MARKER, 3, 0),
        (MARKER, 14, 0),
    ];
    assert_eq!(records[..10], begin);
    assert_eq!(records[records.len() - 2..], [(23, 4, 1), (26, 0, 0)]);
    let times: Vec<u64> =
        records.iter().filter(|one| one.0 == MARKER && one.1 == 2).map(|one| one.2).collect();
    assert!(times.len() > 2 && times.is_sorted());
}

#[test]
fn a_reader_sees_what_the_machine_did() {
    for seed in 1..4 {
        let (records, summary, entries) = export(seed);
        let mut reader = Reader::default();
        records[9..records.len() - 2].iter().for_each(|record| reader.take(*record));
        // An interrupted REP is shown too, as an instruction of its own.
        let executed: Vec<&Executed> = entries
            .iter()
            .filter_map(|entry| match entry {
                crate::synthetic::Entry::Instruction(executed) => Some(executed),
                crate::synthetic::Entry::Event(_) => None,
            })
            .collect();
        assert_eq!(summary.instructions, retired(&entries).len() as u64);
        assert_eq!(reader.fetched.len(), executed.len(), "seed {seed}");
        for (fetched, executed) in reader.fetched.iter().zip(executed) {
            assert_eq!(fetched.address, executed.linear, "seed {seed}");
            assert_eq!(fetched.bytes, executed.bytes, "seed {seed}");
            assert_eq!(fetched.accesses, accesses(executed), "seed {seed}: {executed:x?}");
            assert_eq!(fetched.in_event, executed.mode.cpl != 3, "seed {seed}: {executed:x?}");
            assert!(kinds(&fetched.bytes).contains(&fetched.kind), "seed {seed}: {fetched:x?}");
            for one in &executed.accesses {
                let physical = one.physical.expect("physical addresses are in the trace");
                assert_eq!(physical & 0xfff, one.address & 0xfff);
            }
        }
        let system_calls = reader.fetched.iter().filter(|one| one.bytes == [0x0f, 0x05]).count();
        // The machine leaves some of the kernel's returns out, and is in the kernel again behind that.
        assert!(reader.events >= deliveries(&entries) + system_calls, "seed {seed}");
    }
}

#[test]
fn a_gap_is_a_new_window() {
    let exporter = show_user(4, 20_000, DrMemTrace::new(Vec::new(), 0));
    let records = records(&exporter.into_parts().0);
    let windows: Vec<u64> =
        records.iter().filter(|one| one.0 == MARKER && one.1 == 14).map(|one| one.2).collect();
    assert!(windows.len() > 10);
    assert!(windows.is_sorted_by(|a, b| a < b));
}

/// A block of one instruction.
fn block(id: u32, linear: u64, bytes: &[u8], mode: Mode) -> Definition {
    let bytes = bytes.to_vec();
    let instructions = vec![InstructionDefinition { bytes, ..InstructionDefinition::default() }];
    let (physical, next_page, end) = (linear & 0xf_ffff, None, BlockEnd::Other);
    Definition {
        id,
        block: BlockDefinition { linear, physical, next_page, mode, end, instructions },
    }
}

/// An interrupt at `address`.
fn interrupt(address: u64) -> Event {
    let (kind, error_code, fault_address) = (Delivery::Interrupt, None, None);
    Event::Delivery { kind, vector: 32, error_code, address, fault_address }
}

const NOP: &[u8] = &[0x90];
const IRETQ: &[u8] = &[0x48, 0xcf];
const TASKS: [u64; 2] = [0x40_1000, 0x50_1000];
const HANDLER: u64 = 0xffff_ffff_8100_0000;

/// Two user tasks and the kernel's IRETQ, which sees to it that the other task goes on.
fn switches(exporter: &mut dyn Observer, times: usize) {
    let definitions = vec![
        block(0, TASKS[0], NOP, Mode::USER),
        block(1, TASKS[1], NOP, Mode::USER),
        block(2, HANDLER, IRETQ, Mode::KERNEL),
    ];
    let mut batch = Batch { definitions, ..Batch::default() };
    for turn in 0..times {
        batch.words.push(turn as u32 % 2);
        batch.push_event(interrupt(TASKS[turn % 2] + 1));
        batch.words.push(2);
    }
    exporter.begin(&Position::default()).expect("begins");
    Feed::new(Contents::default()).push(&batch, exporter).expect("is a batch");
    exporter.end().expect("ends");
}

#[test]
fn a_return_to_another_task_than_was_interrupted_begins_a_window() {
    let mut exporter = DrMemTrace::new(Vec::new(), 0);
    switches(&mut exporter, 100);
    let reader = read(exporter);
    // Each turn is interrupted, and each but the first goes on where nothing open was.
    assert_eq!((reader.events, reader.windows), (199, 100));
    assert_eq!(reader.fetched.len(), 200);
    for fetched in &reader.fetched {
        assert_eq!(fetched.in_event, fetched.address == HANDLER);
    }
}

/// What the reader sees in all of a trace's records.
fn read(exporter: DrMemTrace<Vec<u8>>) -> Reader {
    let records = records(&exporter.into_parts().0);
    // It begins with the first window.
    let begin = records.iter().position(|one| *one == (MARKER, 14, 0)).expect("a window");
    let mut reader = Reader::default();
    records[begin..records.len() - 2].iter().for_each(|record| reader.take(*record));
    reader
}

#[test]
fn a_kernel_that_never_returns_keeps_readers_from_counting_too_many_events() {
    let definitions = (0..100).map(|at| block(at, HANDLER + u64::from(at) * 16, NOP, Mode::KERNEL));
    let mut batch = Batch { definitions: definitions.collect(), ..Batch::default() };
    for at in 0..100 {
        batch.words.push(at);
        batch.push_event(interrupt(HANDLER + u64::from(at) * 16 + 1));
    }
    batch.words.push(0);
    let mut exporter = DrMemTrace::new(Vec::new(), 0);
    Feed::new(Contents::default()).push(&batch, &mut exporter).expect("is a batch");
    exporter.end().expect("ends");
    let reader = read(exporter);
    assert_eq!((reader.fetched.len(), reader.windows), (101, 1));
    assert!(reader.fetched.iter().all(|fetched| fetched.in_event));
}

#[test]
fn a_trace_that_begins_in_the_kernel_says_so() {
    let mut exporter = DrMemTrace::new(Vec::new(), 0);
    let definitions = vec![block(0, HANDLER, NOP, Mode::KERNEL)];
    let batch = Batch { definitions, words: vec![0, 0], ..Batch::default() };
    Feed::new(Contents::default()).push(&batch, &mut exporter).expect("is a batch");
    exporter.end().expect("ends");
    let records = records(&exporter.into_parts().0);
    let events: Vec<_> = records.iter().filter(|one| one.0 == MARKER && one.1 == 43).collect();
    assert_eq!(events, [&(MARKER, 43, HANDLER)]);
}

#[test]
fn a_repetition_that_a_trace_cut_in_pieces_is_fetched_once() {
    const REP_STOSB: &[u8] = &[0xf3, 0xaa];
    const STORE: u16 = 1;
    let mut repeated = block(0, HANDLER, REP_STOSB, Mode::KERNEL);
    repeated.block.instructions[0].repeated = true;
    repeated.block.instructions[0].accesses = vec![StaticAccess::plain(AccessKind::Write, 1)];
    let pieces = |between: &[Event]| {
        let mut batch = Batch { definitions: vec![repeated.clone()], ..Batch::default() };
        batch.words = vec![0, CUT, 2];
        between.iter().for_each(|event| batch.push_event(*event));
        batch.words.push(0);
        (batch.addresses, batch.counts) = (vec![0x1000, 0x1001, 0x1002], vec![1]);
        let mut exporter = DrMemTrace::new(Vec::new(), 0);
        Feed::new(Contents::default()).push(&batch, &mut exporter).expect("is a batch");
        exporter.end().expect("ends");
        let records = records(&exporter.into_parts().0);
        let kinds = records.iter().map(|record| record.0);
        kinds.filter(|kind| [STORE, INSTRUCTION, NO_FETCH].contains(kind)).collect::<Vec<_>>()
    };
    let at_once = [INSTRUCTION, STORE, NO_FETCH, STORE, NO_FETCH, STORE];
    assert_eq!(pieces(&[]), at_once);
    // What goes on behind an interrupt is fetched anew.
    assert_eq!(pieces(&[interrupt(HANDLER)])[4], INSTRUCTION);
}
