//! The record codec.

use reprise_random::Random;
use reprise_trace::event::{EffectDigest, Ending, Event, HandOver, MarkDigest, Record};
use reprise_trace::log::{
    DiscardSink, FRAME_BYTES, FrameSink, LogError, LogReader, LogWriter, MAX_RECORD_BYTES,
    MemorySink,
};
use reprise_trace::moment::{Moment, TickKind};

use crate::sample::{left_open, random_bytes, random_records, read_log};

/// Keeps frames apart, to decode them one by one.
#[derive(Default)]
struct Frames(Vec<(Vec<u8>, u32)>);

impl FrameSink for Frames {
    fn write_frame(&mut self, records: Vec<u8>, record_count: u32) -> Result<(), LogError> {
        self.0.push((records, record_count));
        Ok(())
    }
}

fn reader_of(frames: &[(Vec<u8>, u32)]) -> LogReader {
    let mut sink = MemorySink::default();
    for (records, count) in frames {
        sink.write_frame(records.clone(), *count).expect("memory takes all");
    }
    sink.into_reader()
}

fn frames_of(records: &[Record]) -> Vec<(Vec<u8>, u32)> {
    let mut log = LogWriter::new(Frames::default());
    for record in records {
        log.append(record.clone()).expect("in order");
    }
    log.finish().expect("memory takes all").0
}

fn console(tick: u64, byte_count: usize) -> Record {
    let event = Event::Console(vec![b'x'; byte_count]);
    Record { moment: Moment { tick, rip: 0, rcx: 0 }, cpu_digest: 0, event }
}

#[test]
fn records_come_back_wherever_frames_are_cut() {
    for seed in 0..200 {
        let mut random = Random::new(seed);
        let count = random.below(60) as usize;
        let records = random_records(&mut random, count);
        let mut log = LogWriter::new(MemorySink::default());
        for record in &records {
            assert_eq!(log.append(record.clone()).expect("in order").into_inner(), *record);
            if random.below(6) == 0 {
                log.flush().expect("memory takes all");
            }
        }
        assert_eq!(log.record_count(), records.len() as u64);
        let mut reader = log.finish().expect("memory takes all").into_reader();
        let (read, error) = read_log(&mut reader);
        assert!(error.is_none(), "seed {seed}: {error:?}");
        assert_eq!(read, records, "seed {seed}");
        let (read, _) = read_log(&mut LogReader::from_records(records.clone()));
        assert_eq!(read, records, "seed {seed}");
    }
}

#[test]
fn frames_are_cut_at_their_size_and_decode_alone() {
    let records = random_records(&mut Random::new(7), 10_000);
    let frames = frames_of(&records);
    assert!(frames.len() > 2, "{} frames", frames.len());
    let (last, full) = frames.split_last().expect("some");
    assert!(full.iter().all(|(bytes, _)| (FRAME_BYTES..FRAME_BYTES + 200).contains(&bytes.len())));
    assert!(last.0.len() < FRAME_BYTES);
    let mut rest = &records[..];
    for frame in &frames {
        let (here, behind) = rest.split_at(frame.1 as usize);
        let (read, error) = read_log(&mut reader_of(std::slice::from_ref(frame)));
        assert!(error.is_none() && read == here);
        rest = behind;
    }
    assert!(rest.is_empty());
}

#[test]
fn extremes_come_back() {
    let ends = [0, u64::MAX, 0, 1, u64::MAX, u64::MAX / 2, u64::MAX / 2 + 1];
    let record = |value| Record {
        moment: Moment { tick: u64::MAX, rip: value, rcx: !value },
        cpu_digest: value,
        event: Event::Time(value),
    };
    let records: Vec<_> = ends.into_iter().map(record).collect();
    assert_eq!(read_log(&mut LogReader::from_records(records.clone())).0, records);
}

#[test]
fn peek_takes_nothing() {
    let records = random_records(&mut Random::new(3), 4);
    let mut log = LogReader::from_records(records.clone());
    for record in &records {
        assert_eq!(log.peek().expect("sound"), Some(record));
        assert_eq!(log.peek().expect("sound"), Some(record));
        assert_eq!(log.next_record().expect("sound").expect("there").get(), record);
    }
    assert!(log.peek().expect("sound").is_none());
    assert!(log.next_record().expect("sound").is_none());
    assert!(log.next_record().expect("sound").is_none());
}

#[test]
fn refused_records_leave_the_log_as_it_was() {
    let mut log = LogWriter::new(MemorySink::default());
    let (first, last) = (console(5, 3), console(6, MAX_RECORD_BYTES - 16));
    log.append(first.clone()).expect("in order");
    let refused = log.append(console(4, 3));
    assert!(matches!(refused, Err(LogError::TickGoesBack { previous: 5, tick: 4 })));
    let refused = log.append(console(9, MAX_RECORD_BYTES));
    assert!(matches!(refused, Err(LogError::RecordTooLarge { .. })));
    log.append(last.clone()).expect("as large as a record may be");
    assert_eq!(log.record_count(), 2);
    let mut log = log.finish().expect("memory takes all").into_reader();
    assert_eq!(read_log(&mut log).0, [first, last]);
}

#[test]
fn ticks_go_forward_across_frames_too() {
    let mut log = LogWriter::new(DiscardSink);
    log.append(console(5, 0)).expect("in order");
    log.flush().expect("nothing to fail");
    assert!(matches!(log.append(console(4, 0)), Err(LogError::TickGoesBack { .. })));
    let late = frames_of(&[console(5, 0)]);
    let early = frames_of(&[console(4, 0)]);
    let (read, error) = read_log(&mut reader_of(&[late, early].concat()));
    assert_eq!(read, [console(5, 0)]);
    assert!(matches!(error, Some(LogError::Damaged(_))), "{error:?}");
}

#[test]
fn flush_cuts_no_empty_frame() {
    let mut log = LogWriter::new(MemorySink::default());
    log.flush().expect("memory takes all");
    log.append(console(1, 0)).expect("in order");
    log.flush().expect("memory takes all");
    log.flush().expect("memory takes all");
    assert_eq!(log.finish().expect("memory takes all").frame_count(), 1);
}

/// `FORMAT.md` shows these bytes: they may change only with the format's version.
#[test]
fn the_bytes_are_those_of_the_documented_example() {
    let at = |tick, rip, rcx, event| Record {
        moment: Moment { tick, rip, rcx },
        cpu_digest: 0x1122_3344_5566_7788,
        event,
    };
    let effects = EffectDigest { console_bytes: 300, console_digest: [0xcc; 32] };
    let final_digest = Some([0xff; 32]);
    let to_kvm = HandOver {
        engine: "kvm".to_owned(),
        clock: "sync".to_owned(),
        tick_kind: TickKind::Exit,
        ns_per_tick: 0,
    };
    let records = [
        at(1000, 0x10_0000, 0, Event::Time(2_000_000)),
        at(1001, 0x10_0000, 3, Event::ClockRead(1_999_999)),
        at(1001, 0xf_ffff, 3, Event::Console(b"ls\n".to_vec())),
        at(
            5000,
            0xf_ffff,
            3,
            Event::Mark(MarkDigest {
                console_bytes: 300,
                console_digest_prefix: effects.mark().console_digest_prefix,
            }),
        ),
        at(5000, 0xf_ffff, 3, Event::HandOver(to_kvm)),
        at(6000, 0xf_ffff, 3, Event::Assists([("fxsave".to_owned(), 300)].into())),
        at(6000, 0xf_ffff, 3, Event::LeftOpen(vec![left_open("RDTSC", "moved")])),
        at(6000, 0xf_ffff, 3, Event::End { ending: Ending::DebugExit(9), effects, final_digest }),
    ];
    let digest = "8877665544332211";
    let expected = [
        &format!("11 e807 80808001 {digest} 8092f401"),
        &format!("0a 01 06 {digest} 01"),
        &format!("10 00 01 {digest} 03 6c730a"),
        &format!("1b 9f1f {digest} d804 cccccccccccccccc"),
        &format!("1d 00 {digest} 03 6b766d 04 73796e63 02 00"),
        &format!("1e e807 {digest} 01 06 667873617665 ac02"),
        &format!("1f 00 {digest} 01 05 5244545343 05 6d6f766564"),
        &format!("1c 00 {digest} 0409 ac02 {} 01 {}", "cc".repeat(32), "ff".repeat(32)),
    ];
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let expected: String = expected.iter().map(|line| line.replace(' ', "")).collect();
    assert_eq!(hex(&frames_of(&records)[0].0), expected);
}

#[test]
fn spoiled_records_end_in_an_error_that_stays() {
    let mut refused = 0;
    for seed in 0..4000 {
        let mut random = Random::new(seed);
        let (mut bytes, count) = frames_of(&random_records(&mut random, 6)).remove(0);
        match random.below(4) {
            0 => bytes.truncate(random.below(bytes.len() as u64) as usize),
            1 => bytes.push(random.next() as u8),
            2 => bytes = random_bytes(&mut random, 50),
            _ => {
                let position = random.below(bytes.len() as u64) as usize;
                bytes[position] = random.next() as u8;
            }
        }
        let mut log = reader_of(&[(bytes, count)]);
        let (read, error) = read_log(&mut log);
        assert!(read.len() <= 6, "seed {seed}");
        if let Some(error) = error {
            refused += 1;
            let again = log.next_record().expect_err("the error stays");
            assert_eq!(error.to_string(), again.to_string(), "seed {seed}");
            assert!(!error.to_string().contains('\n'));
        } else {
            assert_eq!(read.len(), 6, "seed {seed}");
        }
    }
    assert!(refused > 2000, "{refused}");
}
