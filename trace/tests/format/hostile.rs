//! Files that somebody made on purpose: sound checksums and chain, contents that no writer writes.
//! They are made here from `FORMAT.md`, not by the writer, so the document is tested too.

use reprise_random::Random;
use reprise_trace::frame::FrameFault;
use reprise_trace::log::LogError;
use reprise_trace::recording::{
    FORMAT_VERSION, HeaderError, OLDEST_FORMAT_VERSION, RecordingError, SeekIndexState,
};

use crate::sample::{Sample, header, open, random_bytes, read_log};

/// A recording under construction.
#[derive(Clone)]
struct Forge {
    file: Vec<u8>,
    chain: [u8; 32],
    log_frames: u64,
    records: u64,
    log_bytes: u64,
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        let more = value > 0x7f;
        bytes.push((value & 0x7f) as u8 | if more { 0x80 } else { 0 });
        value >>= 7;
        if !more {
            return bytes;
        }
    }
}

impl Forge {
    fn preamble(version: u32) -> Self {
        let mut file = b"\xf2reprise".to_vec();
        file.extend(version.to_le_bytes());
        file.extend(crc32c::crc32c(&file).to_le_bytes());
        let chain = *blake3::hash(&file).as_bytes();
        Self { file, chain, log_frames: 0, records: 0, log_bytes: 0 }
    }

    /// A frame with a head of any content.
    fn frame_of(mut self, head: &[u8], payload: &[u8]) -> Self {
        let covered = [head, payload].concat();
        let chained = [&self.chain[..], &covered].concat();
        self.chain = *blake3::hash(&chained).as_bytes();
        self.file.extend(&covered);
        self.file.extend(crc32c::crc32c(&covered).to_le_bytes());
        self.file.extend(&self.chain[..16]);
        self
    }

    /// A frame that says what it holds.
    fn frame(self, kind: u8, raw_bytes: usize, payload: &[u8], count: u64) -> Self {
        let lengths = [varint(raw_bytes as u64), varint(payload.len() as u64), varint(count)];
        self.frame_of(&[vec![kind], lengths.concat()].concat(), payload)
    }

    fn plain(self, kind: u8, payload: &[u8], count: u64) -> Self {
        self.frame(kind, payload.len(), payload, count)
    }

    fn log(self, records: &[u8], count: u64) -> Self {
        let start = self.file.len();
        let mut forge = self.plain(b'L', records, count);
        forge.log_frames += 1;
        forge.records += count;
        forge.log_bytes += (forge.file.len() - start) as u64;
        forge
    }

    fn header(images: &[Vec<u8>]) -> Self {
        let body = postcard::to_allocvec(&header(images)).expect("it encodes");
        let payload = [b"rrHD\x01\x00", &body[..]].concat();
        Self::preamble(FORMAT_VERSION).plain(b'H', &payload, 0)
    }

    fn end(self) -> Self {
        let totals = [varint(self.log_frames), varint(self.records), varint(self.log_bytes)];
        let payload = [&self.chain[..], &totals.concat()].concat();
        self.plain(b'E', &payload, 0)
    }

    /// What opening says: the fault, if it opened with one.
    fn fault(&self) -> Option<FrameFault> {
        open(&self.file).expect("the header is sound").summary().damage.clone().map(|it| it.fault)
    }
}

/// A console record of no bytes: event 0 with all else unchanged, tick difference 0, digest.
fn empty_record() -> Vec<u8> {
    [&[0x18, 0x00][..], &[0x77; 8], &[0x00]].concat()
}

#[test]
fn a_file_made_from_the_document_is_a_recording() {
    let forge = Forge::header(&[b"kernel".to_vec()])
        .plain(b'I', b"ker", 0)
        .plain(b'I', b"nel", 0)
        .log(&empty_record().repeat(2), 2)
        .log(&empty_record(), 1)
        .end();
    let recording = open(&forge.file).expect("sound");
    let summary = recording.summary();
    assert!(summary.complete, "{:?}", summary.damage);
    assert_eq!((summary.record_count, summary.log_frames), (3, 2));
    assert_eq!(recording.read_image(0).expect("sound"), b"kernel");
    let (records, error) = read_log(&mut recording.log());
    assert!(records.len() == 3 && error.is_none());
    assert_eq!(records[0].cpu_digest, 0x7777_7777_7777_7777);
}

#[test]
fn lengths_that_no_frame_has_are_refused_before_they_are_used() {
    let most = u64::MAX;
    let cases: [(u8, u64, u64, u64); 10] = [
        (b'L', most, most, 1),
        (b'L', (1 << 20) + 1, (1 << 20) + 1, 1),
        (b'L', (1 << 20) + 1, 10, 1),
        (b'L', 10, 11, 1),
        (b'L', 10, 0, 1),
        (b'L', 10, 10, 0),
        (b'L', 10, 10, 11),
        (b'L', 0, 0, 0),
        (b'I', 10, 10, 1 << 40),
        (b'E', 10, 10, 1),
    ];
    for (kind, raw_bytes, stored_bytes, count) in cases {
        let lengths = [varint(raw_bytes), varint(stored_bytes), varint(count)].concat();
        let head = [vec![kind], lengths].concat();
        let mut forge = Forge::header(&[]).frame_of(&head, &[0; 10]);
        forge.file.resize(forge.file.len() + 100, 0);
        assert_eq!(forge.fault(), Some(FrameFault::Lengths), "{kind} {raw_bytes} {stored_bytes}");
    }
    for length in [&[0x80, 0x00][..], &[0xff; 12]] {
        let mut forge = Forge::header(&[]).frame_of(&[b"L", length, &[10, 1]].concat(), &[0; 10]);
        forge.file.resize(forge.file.len() + 100, 0);
        assert_eq!(forge.fault(), Some(FrameFault::Lengths), "{length:x?}");
    }
}

#[test]
fn payloads_that_decompress_to_something_else_are_refused() {
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 3).expect("it compresses");
    let short = zstd::bulk::compress(&[7; 500], 3).expect("it compresses");
    for (payload, raw_bytes) in [(&bomb, 1 << 20), (&short, 501), (&short, 499), (&vec![9; 40], 60)]
    {
        let forge = Forge::header(&[]).frame(b'L', raw_bytes, payload, 1).end();
        assert_eq!(forge.fault(), Some(FrameFault::Compression), "{raw_bytes}");
        let recording = open(&forge.file).expect("the header is sound");
        let (records, error) = read_log(&mut recording.log());
        assert!(records.is_empty() && matches!(error, Some(LogError::Damaged(_))), "{raw_bytes}");
        let image = Forge::header(&[vec![7; raw_bytes]]).frame(b'I', raw_bytes, payload, 0).end();
        let read = open(&image.file).expect("the header is sound").read_image(0);
        assert!(matches!(read, Err(RecordingError::ImageDamaged { .. })), "{raw_bytes}");
    }
}

#[test]
fn frames_in_the_wrong_place_are_refused() {
    let images = [b"one".to_vec(), b"two".to_vec()];
    let start = || Forge::header(&images);
    let both = || start().plain(b'I', b"one", 0).plain(b'I', b"two", 1);
    let cases = [
        ("a second header", both().plain(b'H', b"x", 0)),
        ("an index before the end", both().plain(b'X', b"x", 0)),
        ("the second image first", start().plain(b'I', b"two", 1)),
        ("an image too long", start().plain(b'I', b"ones", 0)),
        ("an image too many", both().plain(b'I', b"two", 2)),
        ("an image again", both().plain(b'I', b"two", 1)),
        ("an empty piece", start().plain(b'I', b"", 0)),
        ("the log before the images", start().plain(b'I', b"one", 0).log(&empty_record(), 1)),
        ("an image in the log", both().log(&empty_record(), 1).plain(b'I', b"two", 1)),
        ("the end before the images", start().plain(b'I', b"one", 0).end()),
    ];
    for (what, forge) in cases {
        assert_eq!(forge.fault(), Some(FrameFault::OutOfPlace), "{what}");
    }
    let unknown = both().plain(b'Z', b"x", 0);
    assert_eq!(unknown.fault(), Some(FrameFault::UnknownKind(b'Z')));
}

#[test]
fn an_end_that_does_not_fit_is_refused() {
    let base = Forge::header(&[]).log(&empty_record(), 1);
    assert_eq!(base.clone().end().fault(), None);
    let changes: [fn(&mut Forge); 3] =
        [|it| it.records += 1, |it| it.log_frames += 1, |it| it.log_bytes -= 1];
    for change in changes {
        let mut forge = base.clone();
        change(&mut forge);
        assert_eq!(forge.end().fault(), Some(FrameFault::Totals));
    }
    let other_chain = base.clone().plain(b'E', &[0; 35], 0);
    assert_eq!(other_chain.fault(), Some(FrameFault::Totals));
}

#[test]
fn records_that_do_not_decode_are_told_by_summary_and_log() {
    let short = &empty_record()[..8];
    let longer = [empty_record(), vec![0]].concat();
    let hostile_length = [&empty_record()[..10], &varint(u64::MAX)].concat();
    let spoiled = [short, &longer, &hostile_length];
    for (number, bytes) in spoiled.into_iter().enumerate() {
        let forge = Forge::header(&[]).log(&empty_record(), 1).log(bytes, 1).end();
        assert_eq!(forge.fault(), Some(FrameFault::Record(0)), "case {number}");
        let recording = open(&forge.file).expect("the header is sound");
        assert!(!recording.summary().complete);
        let (records, error) = read_log(&mut recording.log());
        assert!(records.len() == 1 && matches!(error, Some(LogError::Damaged(_))), "case {number}");
    }
}

#[test]
fn an_image_that_is_not_the_described_one_is_refused() {
    let forge = Forge::header(&[b"right".to_vec()]).plain(b'I', b"wrong", 0).end();
    let recording = open(&forge.file).expect("the header is sound");
    assert!(matches!(recording.read_image(0), Err(RecordingError::ImageDigest { .. })));
}

#[test]
fn a_recording_of_an_older_format_is_read() {
    let sound = postcard::to_allocvec(&header(&[])).expect("it encodes");
    let payload = [&b"rrHD\x01\x00"[..], &sound].concat();
    for version in OLDEST_FORMAT_VERSION..=FORMAT_VERSION {
        let forge = Forge::preamble(version).plain(b'H', &payload, 0);
        let recording = open(&forge.log(&empty_record(), 1).end().file).expect("it is sound");
        assert!(recording.summary().complete && recording.summary().format_version == version);
        assert_eq!(read_log(&mut recording.log()).0.len(), 1);
    }
}

#[test]
fn headers_that_are_none_are_refused() {
    let sound = postcard::to_allocvec(&header(&[])).expect("it encodes");
    let forge = |payload: &[u8]| Forge::preamble(FORMAT_VERSION).plain(b'H', payload, 0);
    let open_with = |payload: &[&[u8]]| open(&forge(&payload.concat()).file).map(drop);
    assert!(open_with(&[b"rrHD\x01\x00", &sound]).is_ok());
    let newer = open_with(&[b"rrHD\x03\x00", &sound]);
    assert!(matches!(newer, Err(RecordingError::Header(HeaderError::Version { found: 3 }))));
    let malformed: [&[&[u8]]; 5] = [
        &[b""],
        &[b"rrHD\x01"],
        &[b"rrXX\x01\x00", &sound],
        &[b"rrHD\x01\x00", &sound[..sound.len() - 1]],
        &[b"rrHD\x01\x00", &sound, b"\x00"],
    ];
    for payload in malformed {
        let refused = open_with(payload);
        assert!(matches!(refused, Err(RecordingError::Header(HeaderError::Malformed))));
    }
    let mut huge = header(&[vec![1]]);
    huge.guest.images[0].bytes = u64::MAX;
    let huge = postcard::to_allocvec(&huge).expect("it encodes");
    let refused = open_with(&[b"rrHD\x01\x00", &huge]);
    assert!(matches!(refused, Err(RecordingError::Header(HeaderError::Images))));
    for seed in 0..500 {
        let mut random = Random::new(seed);
        let mut spoiled = sound.clone();
        let position = random.below(spoiled.len() as u64) as usize;
        spoiled[position] = random.next() as u8;
        let _ = open_with(&[b"rrHD\x01\x00", &spoiled]);
        let noise = random_bytes(&mut random, 60);
        let _ = open_with(&[b"rrHD\x01\x00", &noise]);
    }
}

#[test]
fn files_that_are_no_recording_are_told_apart() {
    let sample = Sample::small(1);
    assert!(matches!(open(b""), Err(RecordingError::Empty)));
    for foreign in [&b"\x7fELF"[..], b"r", b"{\"a\": 1}", &[0; 4096]] {
        assert!(matches!(open(foreign), Err(RecordingError::Foreign)));
    }
    let mut spoiled = sample.file.clone();
    spoiled[9] ^= 1;
    assert!(matches!(open(&spoiled), Err(RecordingError::Preamble)));
    let newer = Forge::preamble(FORMAT_VERSION + 1).plain(b'?', b"what will be", 0);
    assert!(
        matches!(open(&newer.file), Err(RecordingError::Version { found }) if found == FORMAT_VERSION + 1)
    );
    let oldest = Forge::preamble(OLDEST_FORMAT_VERSION - 1).plain(b'?', b"what was", 0);
    assert!(matches!(open(&oldest.file), Err(RecordingError::Version { .. })));
    let no_header = Forge::preamble(FORMAT_VERSION).log(&empty_record(), 1);
    assert!(matches!(open(&no_header.file), Err(RecordingError::HeaderDamaged(_))));
}

#[test]
fn a_seek_index_that_lies_changes_nothing() {
    let forge = Forge::header(&[]).log(&empty_record(), 1).end();
    let lies: [&[u8]; 4] = [&[1, 1, 1, 0, 0], &[0, 0, 0], &[0xff; 30], &[1, 1, 0xff, 0xff, 3]];
    for lie in lies {
        let file = forge.clone().plain(b'X', lie, 0).file;
        let recording = open(&file).expect("sound");
        assert!(recording.summary().complete);
        assert_eq!(recording.summary().seek_index, SeekIndexState::Damaged);
        assert_eq!(read_log(&mut recording.log()).0.len(), 1);
    }
}
