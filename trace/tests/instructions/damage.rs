//! Traces cut short, and traces with flipped, moved and missing bytes.

use reprise_random::Random;
use std::io::{self, Write};

use reprise_trace::instructions::{
    Contents, Ending, Event, Feed, Observer, Position, SegmentOptions, TraceError, TraceReader,
    TraceWriter,
};

use crate::account::{Account, Sample, header, read};
use crate::synthetic::{Entry, Options, Synthetic};

/// Where each frame of a sound file ends, the header's first.
fn frame_ends(file: &[u8]) -> Vec<usize> {
    let (mut offset, mut ends) = (16, Vec::new());
    while offset + 16 < file.len() {
        let length = u32::from_le_bytes(file[offset + 4..offset + 8].try_into().expect("four"));
        offset += 16 + length as usize;
        ends.push(offset);
    }
    ends
}

fn small(seed: u64) -> Sample {
    Sample::new(Options { functions: 6, ..Options::with_everything(seed) }, 600, 200)
}

#[test]
fn cut_at_every_byte_it_gives_the_segments_that_were_whole() {
    let sample = small(1);
    let ends = frame_ends(&sample.file);
    assert!(ends.len() > 4, "several segments");
    let mut whole_segments = 0;
    let mut entries_before = 0;
    for length in 0..sample.file.len() {
        let (account, ending) = read(&sample.file[..length]);
        match ending {
            Err(TraceError::Empty) => assert_eq!(length, 0),
            Err(TraceError::Header) => assert!(length < ends[0]),
            Ok(Ending::CutShort { unused_bytes }) => {
                let begins = ends.iter().rev().find(|end| **end <= length).expect("a header");
                assert_eq!(unused_bytes, (length - begins) as u64);
                assert!(length < ends[ends.len() - 1]);
            }
            Ok(Ending::Complete { .. }) => assert!(length >= ends[ends.len() - 1]),
            other => panic!("{length} bytes: {other:?}"),
        }
        assert!(sample.entries.starts_with(&account.entries), "{length} bytes");
        let whole = ends[1..ends.len() - 1].iter().filter(|end| **end <= length).count();
        if whole == whole_segments {
            assert_eq!(account.entries.len(), entries_before, "{length} bytes");
        } else {
            assert!(account.entries.len() > entries_before, "{length} bytes");
        }
        (whole_segments, entries_before) = (whole, account.entries.len());
    }
    assert_eq!(entries_before, sample.entries.len());
}

/// What a changed copy may give: an error, or a part of what was traced up to where it says that it is
/// damaged or cut short.
fn check_changed(sample: &Sample, file: &[u8], what: &str) {
    let (account, ending) = read(file);
    match ending {
        Err(error) => assert!(!error.to_string().contains('\n'), "{what}: {error}"),
        Ok(Ending::CutShort { .. }) => {}
        Ok(Ending::Complete { .. }) => assert_eq!(account.entries, sample.entries, "{what}"),
    }
    assert!(sample.entries.starts_with(&account.entries), "{what}: more than was traced");
}

#[test]
fn every_changed_byte_is_told_or_harmless() {
    let sample = small(2);
    let mut random = Random::new(2);
    for position in 0..sample.file.len() {
        let mut file = sample.file.clone();
        file[position] ^= 1 << random.below(8);
        check_changed(&sample, &file, &format!("byte {position}"));
    }
}

#[test]
fn spoiled_copies_are_told_or_harmless() {
    let sample = Sample::new(Options::with_everything(3), 6_000, 2_000);
    for seed in 0..200 {
        let mut random = Random::new(seed);
        let mut file = sample.file.clone();
        for _ in 0..=random.below(4) {
            let position = random.below(file.len() as u64) as usize;
            match random.below(4) {
                0 => file[position] = random.next() as u8,
                1 => file.truncate(position),
                2 => file.insert(position, random.next() as u8),
                _ => {
                    let end = file.len().min(position + random.below(100) as usize);
                    drop(file.drain(position..end));
                }
            }
            if file.is_empty() {
                break;
            }
        }
        check_changed(&sample, &file, &format!("seed {seed}"));
    }
}

/// Makes the checksums of a frame match its bytes again.
fn mend(file: &mut [u8], frame: usize, end: usize) {
    let payload = crc32c::crc32c(&file[frame + 16..end]);
    file[frame + 8..frame + 12].copy_from_slice(&payload.to_le_bytes());
    let head = crc32c::crc32c(&file[frame..frame + 12]);
    file[frame + 12..frame + 16].copy_from_slice(&head.to_le_bytes());
}

#[test]
fn malice_that_keeps_the_checksums_right_ends_in_a_value() {
    let (plain, full) = (Options::new(4), Options::with_everything(4));
    for options in [plain, full] {
        let sample = Sample::new(Options { functions: 6, ..options }, 400, 200);
        let ends = frame_ends(&sample.file);
        let (mut sound, mut refused) = (0, 0);
        for (frame, end) in ends.iter().zip(&ends[1..]) {
            for position in frame + 16..*end {
                for value in [0, 0x7f, 0xff, sample.file[position] ^ 1] {
                    let mut file = sample.file.clone();
                    file[position] = value;
                    mend(&mut file, *frame, *end);
                    // Whatever it gives, it gives it in bounded time and memory, without a panic.
                    match read(&file).1 {
                        Ok(_) => sound += 1,
                        Err(_) => refused += 1,
                    }
                }
            }
        }
        assert!(sound > 0 && refused > sound / 4, "{sound} read, {refused} refused");
    }
}

#[test]
fn a_missing_or_repeated_segment_is_told() {
    let sample = Sample::new(Options::new(5), 9_000, 2_000);
    let ends = frame_ends(&sample.file);
    let (first, second, third) = (ends[1], ends[2], ends[3]);
    let bytes = &sample.file;
    let missing = [&bytes[..first], &bytes[second..]].concat();
    let repeated = [&bytes[..second], &bytes[first..]].concat();
    let swapped =
        [&bytes[..first], &bytes[second..third], &bytes[first..second], &bytes[third..]].concat();
    for (what, file) in [("missing", missing), ("repeated", repeated), ("swapped", swapped)] {
        let (_, ending) = read(&file);
        assert!(matches!(ending, Err(TraceError::Damaged { .. })), "{what}: {ending:?}");
    }
}

/// Fails after so many bytes.
struct FullDisk {
    bytes: Vec<u8>,
    room: usize,
}

impl Write for FullDisk {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(self.room - self.bytes.len());
        if count == 0 && !bytes.is_empty() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.bytes.extend(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_full_disk_is_told_and_leaves_whole_segments() {
    let mut machine = Synthetic::new(Options::new(6));
    let batch = machine.advance(9_000);
    let write = |out: &mut dyn Write| {
        let segments = SegmentOptions { instructions: 2_000, ..SegmentOptions::default() };
        let mut writer = TraceWriter::create(out, &header(Contents::default()), segments)?;
        writer.begin(&Position::default())?;
        Feed::new(Contents::default()).push(&batch, &mut writer)?;
        writer.finish(&[]).map(drop)
    };
    let mut whole = Vec::new();
    write(&mut whole).expect("memory suffices");
    for part in 1..8 {
        let mut disk = FullDisk { bytes: Vec::new(), room: whole.len() * part / 8 };
        let written = write(&mut disk);
        assert!(matches!(written, Err(TraceError::Write(_))), "{written:?}");
        let (account, ending) = read(&disk.bytes);
        assert!(matches!(ending, Ok(Ending::CutShort { .. })), "{ending:?}");
        assert!(machine.entries.starts_with(&account.entries));
    }
}

#[test]
fn other_files_are_refused_with_a_reason() {
    let sample = small(7);
    let mut newer = sample.file.clone();
    newer[8] += 1;
    let checksum = crc32c::crc32c(&newer[..12]);
    newer[12..16].copy_from_slice(&checksum.to_le_bytes());
    let found = newer[8].into();
    let refused = read(&newer).1;
    assert!(matches!(refused, Err(TraceError::Version { found: version }) if version == found));
    for text in ["ELF", "\u{7f}ELF, or so, and longer than a preamble", "\u{1f}"] {
        assert!(matches!(read(text.as_bytes()).1, Err(TraceError::Foreign)));
    }
}

#[test]
fn a_trace_of_nothing_but_events_is_a_trace() {
    let segments = SegmentOptions::default();
    let mut writer =
        TraceWriter::create(Vec::new(), &header(Contents::default()), segments).expect("writes");
    let event = Event::AddressSpace { cr3: 0x1000 };
    for _ in 0..3 {
        writer.event(&event).expect("writes");
    }
    let (account, ending) = read(&writer.finish(&[]).expect("finishes"));
    assert!(matches!(ending, Ok(Ending::Complete { .. })));
    assert_eq!(account.entries, [const { Entry::Event(Event::AddressSpace { cr3: 0x1000 }) }; 3]);
}

#[test]
fn a_thread_that_reads_ahead_shows_the_same_of_any_file() {
    const SEED: u64 = 31;
    let sample = small(SEED);
    let mut files = vec![sample.file.clone()];
    files.extend([1, 7, 40].map(|parts| sample.file[..sample.file.len() - parts].to_vec()));
    for place in (16..sample.file.len()).step_by(sample.file.len() / 24) {
        let mut file = sample.file.clone();
        file[place] ^= 0x10;
        files.push(file);
    }
    for (number, file) in files.iter().enumerate() {
        let Ok(mut reader) = TraceReader::open(&file[..]) else { continue };
        let mut ahead = Account::default();
        let ending = reader.drive_ahead(&mut ahead, |_, _| true);
        let (plain, expected) = read(file);
        let what = format!("seed {SEED}, file {number}");
        assert_eq!(format!("{:?}", ending.map(Option::unwrap)), format!("{expected:?}"), "{what}");
        assert!(ahead.entries == plain.entries, "{what}");
    }
}

#[test]
fn reading_ahead_ends_where_enough_was_seen() {
    let sample = small(32);
    let mut reader = TraceReader::open(&sample.file[..]).expect("a trace");
    let (mut looks, mut account) = (0, Account::default());
    let ending = reader.drive_ahead(&mut account, |_, _| {
        looks += 1;
        looks < 3
    });
    assert!(matches!(ending, Ok(None)), "{ending:?}");
    assert_eq!(looks, 3);
    let (all, _) = read(&sample.file);
    assert!(!account.entries.is_empty() && account.entries.len() < all.entries.len());
    assert!(all.entries.starts_with(&account.entries));
}
