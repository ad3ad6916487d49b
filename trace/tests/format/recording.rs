//! Whole recordings: what is written comes back, and a writer that stops anywhere leaves a prefix.

use reprise_random::Random;
use std::cell::RefCell;
use std::io::{self, Write};
use std::rc::Rc;

use reprise_trace::event::{Event, MarkDigest, Record};
use reprise_trace::log::{LogError, LogWriter};
use reprise_trace::moment::Moment;
use reprise_trace::recording::{
    HeaderError, RecordingError, RecordingWriter, SeekIndexState, USUAL_FORMAT_VERSION,
};

use crate::sample::{Sample, header, open, random_bytes, random_records, read_log};

/// Takes so many bytes, then fails, in the middle of a write.
struct FullDisk {
    taken: Rc<RefCell<Vec<u8>>>,
    room: usize,
}

impl Write for FullDisk {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut taken = self.taken.borrow_mut();
        let count = bytes.len().min(self.room - taken.len());
        if count == 0 {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        taken.extend_from_slice(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_closed_recording_comes_back_whole() {
    for (seed, sample) in [(1, Sample::small(1)), (2, Sample::large(2))] {
        let recording = open(&sample.file).expect("sound");
        assert_eq!(*recording.header(), header(&sample.images), "seed {seed}");
        for (index, image) in sample.images.iter().enumerate() {
            assert!(recording.read_image(index).expect("sound") == *image, "image {index}");
        }
        let missing = recording.read_image(sample.images.len());
        assert!(matches!(missing, Err(RecordingError::NoSuchImage { .. })));
        for _ in 0..2 {
            let (records, error) = read_log(&mut recording.log());
            assert!(error.is_none() && records == sample.records, "seed {seed}: {error:?}");
        }
    }
}

#[test]
fn the_summary_counts_what_the_writer_wrote() {
    let sample = Sample::large(3);
    let recording = open(&sample.file).expect("sound");
    let summary = recording.summary();
    assert!(summary.complete && summary.damage.is_none());
    assert_eq!(summary.seek_index, SeekIndexState::Intact);
    assert_eq!(summary.format_version, USUAL_FORMAT_VERSION);
    assert_eq!(summary.log_frames, 15);
    // The header's, two pieces of the first image and one of the third, the log's, the end's.
    assert_eq!(summary.whole_frames, 1 + 2 + 1 + 15 + 1);
    assert_eq!(summary.log_bytes, sample.log_bytes);
    let (log_start, log_end) = (sample.log_ends[0].0, sample.log_ends.last().expect("some").0);
    assert_eq!(summary.log_bytes, log_end - log_start);
    assert!((9000..log_start).contains(&summary.image_bytes), "{}", summary.image_bytes);
    assert_eq!(summary.file_bytes, sample.file.len() as u64);
    assert_eq!(summary.record_count, sample.records.len() as u64);
    assert_eq!(summary.first_moment, Some(sample.records[0].moment));
    assert_eq!(summary.last_record.as_ref(), sample.records.last());
    assert_eq!(summary.last_moment, sample.records.last().map(|record| record.moment));
    assert_eq!(summary.truncated_bytes, 0);
    let again = Sample::large(3);
    assert_eq!(summary.chain, open(&again.file).expect("sound").summary().chain);
    assert_ne!(summary.chain, open(&Sample::large(4).file).expect("sound").summary().chain);
    assert_eq!(summary.chain.len(), 64);
}

#[test]
fn a_recording_without_records_or_images_is_one() {
    let sample = Sample::new(Vec::new(), Vec::new(), 1);
    let recording = open(&sample.file).expect("sound");
    assert!(recording.summary().complete);
    assert_eq!(recording.summary().first_moment, None);
    assert!(read_log(&mut recording.log()).0.is_empty());
}

#[test]
fn images_of_awkward_sizes_come_back() {
    let sizes = [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 0];
    let mut random = Random::new(5);
    let images: Vec<_> = sizes.iter().map(|size| random_bytes(&mut random, *size)).collect();
    let sample = Sample::new(images, random_records(&mut random, 3), 2);
    let recording = open(&sample.file).expect("sound");
    assert!(recording.summary().complete);
    for (index, image) in sample.images.iter().enumerate() {
        assert!(recording.read_image(index).expect("sound") == *image, "image {index}");
    }
}

/// 300 frames with a mark and a time each, as a run of a minute or so cuts them.
#[test]
fn frames_of_a_mark_stay_small() {
    let mut random = Random::new(11);
    let writer = RecordingWriter::create(Vec::new(), &header(&[])).expect("memory takes all");
    let mut log = LogWriter::new(writer);
    let mut moment = Moment { tick: 0, rip: 0, rcx: 0 };
    for number in 0..300 {
        moment.tick += 20_000_000 + random.below(5_000_000);
        moment.rip = 0xffff_ffff_8100_0000 + random.below(1 << 22);
        moment.rcx = random.below(1 << 16);
        let mark = MarkDigest { console_bytes: number * 100, console_digest_prefix: random.next() };
        for event in [Event::Time(moment.tick * 2), Event::Mark(mark)] {
            let record = Record { moment, cpu_digest: random.next(), event };
            log.append(record).expect("in order");
        }
        log.flush().expect("memory takes all");
    }
    let log_bytes = log.finish().expect("memory takes all").log_bytes();
    println!("300 frames of a time and a mark: {log_bytes} bytes");
    assert!(log_bytes < 300 * 90, "{log_bytes}");
}

#[test]
fn a_disk_that_fills_up_leaves_what_was_whole() {
    let sample = Sample::small(6);
    for room in 0..sample.file.len() {
        let taken = Rc::new(RefCell::new(Vec::new()));
        let disk = FullDisk { taken: Rc::clone(&taken), room };
        write_until_it_fails(disk, &sample);
        let file = taken.borrow();
        assert_eq!(**file, sample.file[..room]);
    }
}

/// Writes the sample to a disk too small for it, and sees that nothing follows a failed write.
fn write_until_it_fails(disk: FullDisk, sample: &Sample) {
    let Ok(mut writer) = RecordingWriter::create(disk, &header(&sample.images)) else {
        return;
    };
    for (index, image) in sample.images.iter().enumerate() {
        if writer.write_image(index, image).is_err() {
            let again = writer.write_image(index, image);
            assert!(matches!(again, Err(RecordingError::Log(LogError::Closed))));
            return;
        }
    }
    let mut log = LogWriter::new(writer);
    for (number, record) in (1..).zip(&sample.records) {
        log.append(record.clone()).expect("the frame is not cut yet");
        if number % 5 == 0 && log.flush().is_err() {
            log.append(record.clone()).expect("the frame is not cut yet");
            assert!(matches!(log.flush(), Err(LogError::Closed)));
            return;
        }
    }
    if let Ok(writer) = log.finish() {
        assert!(writer.finish().is_err());
    }
}

#[test]
fn parts_out_of_order_are_refused() {
    let images = [vec![1; 10], vec![2; 20]];
    let create = || RecordingWriter::create(Vec::new(), &header(&images)).expect("memory");
    let is_refusal = |result: Result<(), RecordingError>| {
        matches!(result, Err(RecordingError::Log(LogError::OutOfPlace(_))))
    };
    assert!(is_refusal(create().write_image(1, &images[1])), "the second image first");
    assert!(is_refusal(create().write_image(2, &images[1])), "no such image");
    assert!(is_refusal(create().write_image(0, &images[1])), "another image's bytes");
    assert!(is_refusal(create().finish().map(drop)), "no image");
    let mut writer = create();
    writer.write_image(0, &images[0]).expect("in order");
    assert!(is_refusal(writer.write_image(0, &images[0])), "an image twice");
    let early = writer.write_log_frame(vec![0; 20], 1);
    assert!(matches!(early, Err(LogError::OutOfPlace(_))), "the log before the second image");
    writer.write_image(1, &images[1]).expect("a refusal closes nothing");
    for (records, count) in [(vec![], 0), (vec![0; 5], 0), (vec![0; (1 << 20) + 1], 1)] {
        assert!(matches!(writer.write_log_frame(records, count), Err(LogError::OutOfPlace(_))));
    }
}

#[test]
fn headers_that_no_recording_can_hold_are_refused() {
    let mut header = header(&[]);
    header.guest.command_line = "x".repeat(2 << 20);
    let refused = RecordingWriter::create(Vec::new(), &header);
    assert!(matches!(refused, Err(RecordingError::Header(HeaderError::TooLarge))));
    header.guest.command_line.clear();
    header.guest.images = crate::sample::header(&vec![vec![1]; 17]).guest.images;
    let refused = RecordingWriter::create(Vec::new(), &header);
    assert!(matches!(refused, Err(RecordingError::Header(HeaderError::Images))));
}
