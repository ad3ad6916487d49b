//! Recordings cut short, and recordings with flipped, moved and missing bytes.

use reprise_random::Random;
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::sync::{Arc, Mutex};

use reprise_trace::event::Event;
use reprise_trace::frame::FrameFault;
use reprise_trace::log::LogError;
use reprise_trace::recording::{Recording, RecordingError, SeekIndexState};

use crate::sample::{Sample, header, open, random_bytes, random_records, read_log};

#[test]
fn cut_at_every_byte_it_opens_to_what_was_whole_or_says_why_not() {
    for seed in [1, 2] {
        let sample = Sample::small(seed);
        let mut opened = 0;
        for file_bytes in 0..sample.file.len() {
            let recording = match open(&sample.file[..file_bytes]) {
                Ok(recording) => recording,
                Err(RecordingError::Empty) if file_bytes == 0 => continue,
                Err(RecordingError::HeaderCutShort) if opened == 0 => continue,
                Err(error) => panic!("seed {seed}, {file_bytes} bytes: {error}"),
            };
            opened += 1;
            let summary = recording.summary();
            let whole = sample.records_within(file_bytes as u64);
            let (records, error) = read_log(&mut recording.log());
            assert!(error.is_none(), "seed {seed}, {file_bytes} bytes: {error:?}");
            assert_eq!(records, whole, "seed {seed}, {file_bytes} bytes");
            assert_eq!(summary.record_count, whole.len() as u64);
            assert_eq!(summary.last_record.as_ref(), whole.last());
            assert_eq!(summary.damage, None, "cut short is not damaged");
            assert_eq!(summary.complete, file_bytes as u64 >= sample.index_offset);
            assert_ne!(summary.seek_index, SeekIndexState::Intact);
            check_images(&recording, &sample, file_bytes as u64);
        }
        assert!(opened > sample.file.len() / 2, "{opened} of {}", sample.file.len());
    }
}

/// Each image is either whole or said to be cut short, and whole where the log has begun.
fn check_images(recording: &Recording, sample: &Sample, file_bytes: u64) {
    for (index, image) in sample.images.iter().enumerate() {
        match recording.read_image(index) {
            Ok(bytes) => assert_eq!(bytes, *image),
            Err(RecordingError::ImageCutShort { .. }) => assert!(file_bytes < sample.log_ends[0].0),
            Err(error) => panic!("image {index} of {file_bytes} bytes: {error}"),
        }
    }
}

#[test]
fn bytes_that_are_not_used_are_counted() {
    let sample = Sample::small(3);
    let (frame_end, _) = sample.log_ends[2];
    for behind in [0, 1, 20] {
        let recording = open(&sample.file[..frame_end as usize + behind]).expect("header whole");
        assert_eq!(recording.summary().truncated_bytes, behind as u64);
    }
}

/// What a changed copy of the sample may do: fail to open, or give what was recorded up to where it
/// says that it is damaged or cut short. Gives whether the change was told.
fn is_told(sample: &Sample, file: &[u8], what: &str) -> bool {
    let recording = match open(file) {
        Ok(recording) => recording,
        Err(error) => {
            assert!(!error.to_string().contains('\n'), "{what}: {error}");
            return true;
        }
    };
    assert_eq!(*recording.header(), header(&sample.images), "{what}");
    let summary = recording.summary();
    let mut log = recording.log();
    let (records, error) = read_log(&mut log);
    assert!(sample.records.starts_with(&records), "{what}: a record that was not recorded");
    assert_eq!(error.is_some(), summary.damage.is_some(), "{what}: {error:?}");
    assert!(!(summary.complete && summary.damage.is_some()), "{what}");
    if let Some(error) = error {
        assert!(!error.to_string().contains('\n'), "{what}: {error}");
        assert!(log.next_record().is_err(), "{what}: the error stays");
    } else {
        assert_eq!(records.len() as u64, summary.record_count, "{what}");
        assert!(!summary.complete || records == sample.records, "{what}");
    }
    let images_whole = sample.images.iter().enumerate().all(|(index, image)| {
        let read = recording.read_image(index);
        read.as_ref().ok().is_none_or(|bytes| bytes == image) && read.is_ok()
    });
    assert!(images_whole || !summary.complete, "{what}: an image is damaged");
    !summary.complete
}

#[test]
fn every_flipped_bit_of_a_small_recording_is_told_or_harmless() {
    let sample = Sample::small(4);
    for position in 0..sample.file.len() {
        for bit in 0..8 {
            let mut file = sample.file.clone();
            file[position] ^= 1 << bit;
            let told = is_told(&sample, &file, &format!("bit {bit} of byte {position}"));
            assert_eq!(told, (position as u64) < sample.index_offset, "byte {position}");
        }
    }
}

#[test]
fn spoiled_bytes_of_a_larger_recording_are_told_or_harmless() {
    let sample = Sample::large(5);
    for seed in 0..600 {
        let mut random = Random::new(seed);
        let mut file = sample.file.clone();
        let mut changed_before_index = false;
        for _ in 0..=random.below(3) {
            let position = random.below(file.len() as u64) as usize;
            let before = file[position];
            file[position] = random.next() as u8;
            let changed = file[position] != before;
            changed_before_index |= changed && (position as u64) < sample.index_offset;
        }
        if random.below(4) == 0 {
            file.truncate(random.below(file.len() as u64) as usize);
            changed_before_index |= (file.len() as u64) < sample.index_offset;
        }
        let told = is_told(&sample, &file, &format!("seed {seed}"));
        // Two changes may restore each other's byte, but only if they were told of none.
        assert!(told || !changed_before_index, "seed {seed}");
    }
}

#[test]
fn damage_names_its_place_and_spares_what_stands_before_it() {
    let sample = Sample::small(7);
    let (frame_start, count) = sample.log_ends[2];
    let mut file = sample.file.clone();
    file[frame_start as usize + 12] ^= 1;
    let recording = open(&file).expect("the header is whole");
    let damage = recording.summary().damage.clone().expect("there is damage");
    assert_eq!(damage.offset, frame_start);
    // The header's, two images' and two log frames stand before it.
    assert_eq!((damage.frame, damage.fault.clone()), (5, FrameFault::Checksum));
    let (records, error) = read_log(&mut recording.log());
    assert_eq!(records, sample.records[..count as usize]);
    assert!(matches!(error, Some(LogError::Damaged(told)) if told == damage));
    assert!(recording.read_image(1).is_ok());
}

#[test]
fn a_damaged_image_is_told_wherever_it_is_asked_for() {
    let sample = Sample::small(8);
    let mut file = sample.file.clone();
    file[sample.log_ends[0].0 as usize - 25] ^= 1;
    let recording = open(&file).expect("the header is whole");
    assert!(recording.read_image(0).is_ok());
    assert!(matches!(recording.read_image(1), Err(RecordingError::ImageDamaged { .. })));
    let (records, error) = read_log(&mut recording.log());
    assert!(records.is_empty() && matches!(error, Some(LogError::Damaged(_))));
}

#[test]
fn frames_removed_repeated_or_exchanged_are_told() {
    let sample = Sample::small(9);
    let end = |frame: usize| sample.log_ends[frame].0 as usize;
    let file = &sample.file;
    let without = [&file[..end(1)], &file[end(2)..]].concat();
    let repeated = [&file[..end(2)], &file[end(1)..]].concat();
    let exchanged =
        [&file[..end(1)], &file[end(2)..end(3)], &file[end(1)..end(2)], &file[end(3)..]].concat();
    let count = |frame: usize| sample.log_ends[frame].1;
    let other = Sample::small(10);
    let of_another = [&file[..end(1)], &other.file[other.log_ends[1].0 as usize..]].concat();
    let cases = [(without, 1), (repeated, 2), (exchanged, 1), (of_another, 1)];
    for (number, (changed, sound_frames)) in cases.into_iter().enumerate() {
        let recording = open(&changed).expect("the header is whole");
        let summary = recording.summary();
        let fault = summary.damage.clone().expect("it is told").fault;
        assert_eq!(fault, FrameFault::Chain, "case {number}");
        assert_eq!(summary.record_count, count(sound_frames), "case {number}");
    }
}

#[test]
fn a_length_that_reaches_past_a_closed_file_is_damage_and_not_a_cut() {
    let mut random = Random::new(11);
    let mut records = random_records(&mut random, 3);
    for record in &mut records {
        record.event = Event::Console(random_bytes(&mut random, 300));
    }
    let sample = Sample::new(Vec::new(), records, 1);
    let last_frame = sample.log_ends[2].0 as usize;
    let mut file = sample.file.clone();
    // Both lengths, two bytes each: as large as they get.
    let lengths = &mut file[last_frame + 1..last_frame + 5];
    assert!(lengths[0] >= 0x80 && lengths[2] >= 0x80, "the lengths have two bytes each");
    lengths.copy_from_slice(&[0xff, 0x7f, 0xff, 0x7f]);
    let closed = open(&file).expect("the header is whole");
    let damage = closed.summary().damage.clone().expect("it is told");
    assert_eq!(damage.fault, FrameFault::PastEnd);
    file.pop();
    let cut = open(&file).expect("the header is whole");
    assert_eq!(cut.summary().damage, None);
    assert!(!cut.summary().complete);
}

#[test]
fn without_its_index_a_recording_is_complete() {
    let sample = Sample::small(12);
    let index_offset = sample.index_offset as usize;
    let mut longer = sample.file.clone();
    longer.push(0);
    let mut flipped = sample.file.clone();
    flipped[index_offset + 6] ^= 1;
    let cases = [
        (sample.file[..index_offset].to_vec(), SeekIndexState::Absent),
        (sample.file[..index_offset + 9].to_vec(), SeekIndexState::Damaged),
        (longer, SeekIndexState::Damaged),
        (flipped, SeekIndexState::Damaged),
    ];
    for (file, state) in cases {
        let recording = open(&file).expect("sound");
        assert!(recording.summary().complete);
        assert_eq!(recording.summary().seek_index, state);
        assert_eq!(read_log(&mut recording.log()).0, sample.records);
    }
}

/// A file that somebody else changes while it is read.
#[derive(Clone)]
struct Shared {
    bytes: Arc<Mutex<Vec<u8>>>,
    position: u64,
    /// The longest read that was asked for, in bytes.
    longest_read: Arc<Mutex<usize>>,
}

impl Shared {
    fn new(file: &[u8]) -> Self {
        let bytes = Arc::new(Mutex::new(file.to_vec()));
        Self { bytes, position: 0, longest_read: Arc::default() }
    }
}

impl Read for Shared {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let mut longest = self.longest_read.lock().expect("no test panicked");
        *longest = into.len().max(*longest);
        let bytes = self.bytes.lock().expect("no test panicked");
        let mut cursor = Cursor::new(&bytes[..]);
        cursor.set_position(self.position);
        let count = cursor.read(into)?;
        self.position += count as u64;
        Ok(count)
    }
}

impl Seek for Shared {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let bytes = self.bytes.lock().expect("no test panicked");
        let mut cursor = Cursor::new(&bytes[..]);
        cursor.set_position(self.position);
        self.position = cursor.seek(to)?;
        Ok(self.position)
    }
}

#[test]
fn a_file_that_changes_while_it_is_open_is_told() {
    let sample = Sample::small(13);
    let (start, count) = (sample.log_ends[1].0 as usize, sample.log_ends[1].1 as usize);
    let changes: [fn(&mut Vec<u8>, usize); 3] = [
        |file, start| file[start + 9] ^= 1,
        |file, start| file[start] = b'I',
        |file, start| file.truncate(start + 3),
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let input = Shared::new(&sample.file);
        let recording = Recording::open(input.clone()).expect("sound");
        change(&mut input.bytes.lock().expect("no test panicked"), start);
        let mut log = recording.log();
        let (records, error) = read_log(&mut log);
        assert_eq!(records, sample.records[..count], "change {number}");
        assert!(error.is_some() && log.next_record().is_err(), "change {number}");
    }
}

#[test]
fn no_read_is_longer_than_a_frame_whatever_lengths_say() {
    let sample = Sample::small(14);
    for seed in 0..500 {
        let mut random = Random::new(seed);
        let mut file = sample.file.clone();
        let position = random.below(file.len() as u64) as usize;
        file.splice(position..(position + 8).min(sample.file.len()), [0xff, 0xff, 0xff, 0x3f]);
        file.resize(3 << 20, 0);
        let input = Shared::new(&file);
        let longest_read = Arc::clone(&input.longest_read);
        if let Ok(recording) = Recording::open(input) {
            read_log(&mut recording.log());
        }
        let longest_read = *longest_read.lock().expect("no test panicked");
        assert!(longest_read <= (1 << 20) + 64, "seed {seed}: {longest_read}");
    }
}
