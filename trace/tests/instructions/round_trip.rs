//! What was written comes back, whole and from the middle.

use std::io::{Cursor, Read};

use reprise_trace::instructions::{
    Contents, Ending, Event, Feed, Observer, Position, Run, SegmentOptions, TraceError,
    TraceReader, TraceWriter,
};

use crate::account::{Account, Sample, feed, header, read};
use crate::contract::divide;
use crate::synthetic::{Entry, Executed, Options, Synthetic};

/// Every combination of contents.
fn contents() -> impl Iterator<Item = Contents> {
    (0..16).map(|bits| Contents {
        physical: bits & 1 != 0,
        values: bits & 2 != 0,
        registers: bits & 4 != 0,
        page_walks: bits & 8 != 0,
    })
}

#[test]
fn every_instruction_access_and_event_comes_back() {
    for (seed, contents) in (1..).zip(contents()) {
        let options = Options { contents, ..Options::new(seed) };
        let sample = Sample::new(options, 30_000, 7_000);
        let (account, ending) = read(&sample.file);
        let complete = Ending::Complete { notes: sample.notes.clone() };
        assert_eq!(ending.expect("reads"), complete, "seed {seed}");
        assert!(account.ended, "seed {seed}");
        assert_eq!(account.entries.len(), sample.entries.len(), "seed {seed}");
        for (number, (read, made)) in account.entries.iter().zip(&sample.entries).enumerate() {
            assert_eq!(read, made, "seed {seed}, entry {number}");
        }
    }
}

#[test]
fn the_sample_has_everything_that_a_machine_does() {
    let sample = Sample::new(Options::new(1), 30_000, 7_000);
    let has = |wanted: fn(&Entry) -> bool| sample.entries.iter().any(wanted);
    assert!(has(|entry| matches!(entry, Entry::Event(Event::Delivery { vector: 14, .. }))));
    assert!(has(|entry| matches!(entry, Entry::Event(Event::Delivery { vector: 32, .. }))));
    assert!(has(|entry| matches!(entry, Entry::Event(Event::Return { .. }))));
    assert!(has(|entry| matches!(entry, Entry::Event(Event::AddressSpace { .. }))));
    assert!(has(|entry| matches!(entry, Entry::Event(Event::Marker(_)))));
    let executed = |wanted: fn(&Executed) -> bool| {
        sample.entries.iter().any(|entry| match entry {
            Entry::Instruction(one) => wanted(one),
            Entry::Event(_) => false,
        })
    };
    assert!(executed(|one| one.bytes[0] == 0xf3 && one.retired && one.accesses.is_empty()));
    assert!(executed(|one| one.bytes[0] == 0xf3 && one.retired && one.accesses.len() > 4));
    assert!(executed(|one| one.bytes[0] == 0xf3 && !one.retired));
    assert!(executed(|one| one.bytes.starts_with(&[0xb8, 1])), "code is written over");
}

#[test]
fn the_bytes_do_not_depend_on_how_the_trace_came_in_batches() {
    let options = Options::with_everything(3);
    let segments = SegmentOptions { instructions: 6_000, ..SegmentOptions::default() };
    let mut machine = Synthetic::new(options);
    let whole = machine.advance(20_000);
    let write = |pieces: usize| {
        let mut writer =
            TraceWriter::create(Vec::new(), &header(options.contents), segments).expect("writes");
        let mut feed = Feed::new(options.contents);
        // The definitions come first, then the words in pieces, cut where no run is divided.
        for batch in divide(&whole, pieces, options.contents) {
            feed.push(&batch, &mut writer).expect("keeps the contract");
        }
        writer.finish(&[]).expect("finishes")
    };
    let one = write(usize::MAX);
    assert_eq!(one, write(1000));
    assert_eq!(one, write(1));
}

/// Hands on runs one by one, whoever gives it many at once.
struct OneByOne<O>(O);

impl<O: Observer> Observer for OneByOne<O> {
    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        self.0.run(run)
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        self.0.event(event)
    }
}

#[test]
fn the_bytes_do_not_depend_on_whether_runs_come_one_by_one() {
    for contents in contents() {
        let options = Options { contents, ..Options::new(9) };
        let segments = SegmentOptions { instructions: 4_001, ..SegmentOptions::default() };
        let create = || TraceWriter::create(Vec::new(), &header(contents), segments);
        let mut whole = create().expect("writes");
        let mut single = OneByOne(create().expect("writes"));
        feed(options, 20_000, 5_000, &mut whole);
        feed(options, 20_000, 5_000, &mut single);
        let (whole, single) = (whole.finish(&[]), single.0.finish(&[]));
        assert_eq!(whole.expect("finishes"), single.expect("finishes"), "{contents:?}");
    }
}

#[test]
fn it_reads_from_any_segment_on() {
    let sample = Sample::new(Options::with_everything(4), 40_000, 3_000);
    let mut reader = TraceReader::open(Cursor::new(&sample.file[..])).expect("opens");
    let index = reader.index().expect("has an index");
    assert!(index.segments() > 10, "{index:?}");
    let (whole, _) = read(&sample.file);
    let mut unfinished = TraceReader::open(Cursor::new(without_end(&sample.file))).expect("opens");
    let scanned = unfinished.index().expect("scans");
    assert_eq!(scanned, index, "a scan gives the same index");
    for instruction in [0, 1, 2_999, 17_000, index.end_instruction() - 1] {
        reader.seek_to_instruction(&index, instruction).expect("is in the trace");
        let mut account = Account::default();
        assert!(matches!(reader.drive(&mut account), Ok(Ending::Complete { .. })));
        assert!(whole.entries.ends_with(&account.entries), "from {instruction}");
        let position = account.position.expect("began");
        assert!(position.instruction <= instruction);
        // The state at that place is what the events before it said.
        let before = &whole.entries[..whole.entries.len() - account.entries.len()];
        let mut walked = Position::default();
        for entry in before {
            match entry {
                Entry::Instruction(one) => walked.instruction += u64::from(one.retired),
                Entry::Event(event) => walked.pass_event(event),
            }
        }
        assert_eq!(position, walked, "from {instruction}");
    }
    assert!(reader.seek_to_instruction(&index, index.end_instruction()).is_err());
    let segment = index.segment_at_tick(20_000);
    let before = index.segment_before_virtual_ns(40_000);
    assert!(before <= segment && segment <= before + 1, "{before} is not just before {segment}");
    reader.seek_to_segment(&index, segment).expect("is there");
    let mut account = Account::default();
    reader.drive_segment(&mut account).expect("reads");
    let position = account.position.expect("began");
    assert!(position.marker.tick <= 20_000 && position.instruction + 9_000 > 20_000);
}

/// The file up to its end frame.
fn without_end(file: &[u8]) -> Vec<u8> {
    let footer = &file[file.len() - 8..];
    let offset = u64::from_le_bytes(footer.try_into().expect("eight bytes"));
    file[..offset as usize].to_vec()
}

#[test]
fn it_reads_from_a_pipe() {
    struct OneByte<'a>(&'a [u8]);
    impl Read for OneByte<'_> {
        fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
            let count = out.len().min(self.0.len()).min(1);
            out[..count].copy_from_slice(&self.0[..count]);
            self.0 = &self.0[count..];
            Ok(count)
        }
    }
    let sample = Sample::new(Options::new(5), 5_000, 2_000);
    let mut account = Account::default();
    let mut reader = TraceReader::open(OneByte(&sample.file)).expect("opens");
    reader.drive(&mut account).expect("reads");
    assert_eq!(account.entries, sample.entries);
    assert_eq!(*reader.header(), header(sample.contents));
}

#[test]
fn an_empty_trace_is_a_trace() {
    let segments = SegmentOptions::default();
    let writer = TraceWriter::create(Vec::new(), &header(Contents::default()), segments);
    let file = writer.expect("writes").finish(&[]).expect("finishes");
    let (account, ending) = read(&file);
    assert_eq!(account, Account { ended: true, ..Account::default() });
    assert_eq!(ending.expect("reads"), Ending::Complete { notes: vec![] });
}

#[test]
fn two_observers_see_the_same() {
    let mut both = (Account::default(), Account::default());
    let entries = feed(Options::new(8), 3_000, 500, &mut both);
    assert_eq!(both.0.entries, entries);
    assert_eq!(both.0, both.1);
}

/// A file of format version 2, and the CRC32C of what reading it shows, as text. If this fails, the
/// format has changed: raise its version.
const VERSION_2: (&[u8], u32) = (include_bytes!("version-2.trace"), 0x9d65_4f76);

#[test]
fn a_file_of_version_2_still_reads() {
    let (file, shown) = VERSION_2;
    let (account, ending) = read(file);
    assert_eq!(
        ending.expect("reads"),
        Ending::Complete { notes: vec!["left out: nothing".into()] }
    );
    assert_eq!(crc32c::crc32c(format!("{:?}", account.entries).as_bytes()), shown);
}

#[test]
#[ignore = "makes the file that the test above reads"]
fn make_a_file_of_this_version() {
    let options = Options { functions: 8, interrupt_period: 40, ..Options::with_everything(2) };
    let sample = Sample::new(options, 1_500, 800);
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/instructions/version-3.trace");
    std::fs::write(path, &sample.file).expect("can be written");
    println!("{:#x}", crc32c::crc32c(format!("{:?}", sample.entries).as_bytes()));
}
