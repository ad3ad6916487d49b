//! Logs and recordings made from a seed.

use std::io::Cursor;

use reprise_random::Random;
use reprise_trace::event::{EffectDigest, Ending, Event, HandOver, MarkDigest, Record};
use reprise_trace::header::{Precaution, Treatment};
use reprise_trace::log::{LogError, LogReader, LogWriter};
use reprise_trace::moment::{Moment, TickKind};
use reprise_trace::recording::{
    CpuModelInfo, GuestInfo, Header, HostInfo, ImageInfo, ImageRole, MachineInfo, Recording,
    RecordingWriter,
};

/// A number of any magnitude.
fn any_size(random: &mut Random) -> u64 {
    let bits = random.below(65) as u32;
    random.next().checked_shr(64 - bits).unwrap_or(0)
}

pub(crate) fn random_bytes(random: &mut Random, count: usize) -> Vec<u8> {
    (0..count).map(|_| random.byte()).collect()
}

fn digest(random: &mut Random) -> [u8; 32] {
    random_bytes(random, 32).try_into().expect("32 bytes")
}

fn event(random: &mut Random) -> Event {
    match random.below(11) {
        0 => {
            let count = random.below(40) as usize;
            Event::Console(random_bytes(random, count))
        }
        1..=3 => Event::Time(any_size(random)),
        4 | 5 => Event::ClockRead(any_size(random)),
        6 => Event::Mark(MarkDigest {
            console_bytes: any_size(random),
            console_digest_prefix: random.next(),
        }),
        7 => Event::HandOver(hand_over(random)),
        8 => {
            let names = ["cmpxchg16b", "fxsave", "xsave"].map(str::to_owned);
            let count = random.below(4) as usize;
            Event::Assists(names.into_iter().take(count).map(|n| (n, any_size(random))).collect())
        }
        9 => {
            let count = random.below(3) as usize;
            Event::LeftOpen(vec![left_open("RDTSC, user code", "nobody answered"); count])
        }
        _ => Event::End {
            ending: ending(random),
            effects: EffectDigest {
                console_bytes: any_size(random),
                console_digest: digest(random),
            },
            final_digest: (random.below(2) == 0).then(|| digest(random)),
        },
    }
}

/// What a run did not keep.
pub(crate) fn left_open(what: &str, how: &str) -> Precaution {
    Precaution { what: what.to_owned(), treatment: Treatment::Open, how: how.to_owned() }
}

fn hand_over(random: &mut Random) -> HandOver {
    let kinds = [TickKind::Instruction, TickKind::ConditionalBranch, TickKind::Exit];
    HandOver {
        engine: "soft".to_owned(),
        clock: "instructions".to_owned(),
        tick_kind: kinds[random.below(3) as usize],
        ns_per_tick: any_size(random),
    }
}

fn ending(random: &mut Random) -> Ending {
    match random.below(7) {
        0 => Ending::Reset,
        1 => Ending::TripleFault,
        2 => Ending::PowerOff,
        3 => Ending::IdleForever,
        4 => Ending::DebugExit(random.next() as u8),
        5 => Ending::Stopped,
        _ => Ending::EngineFailed("the engine met – what? – an ‹error›".to_owned()),
    }
}

/// Records with every kind of event, repeated addresses and leaps of any size.
pub(crate) fn random_records(random: &mut Random, count: usize) -> Vec<Record> {
    let mut moment = Moment { tick: 0, rip: 0, rcx: 0 };
    let record = |_| {
        let leap = any_size(random);
        moment.tick = moment.tick.checked_add(leap >> 20).unwrap_or(moment.tick);
        if random.below(3) > 0 {
            moment.rip = any_size(random);
        }
        if random.below(3) > 1 {
            moment.rcx = any_size(random);
        }
        Record { moment, cpu_digest: random.next(), event: event(random) }
    };
    (0..count).map(record).collect()
}

/// A header with these images.
pub(crate) fn header(images: &[Vec<u8>]) -> Header {
    let roles = [ImageRole::Kernel, ImageRole::Initrd];
    let described = images.iter().enumerate();
    Header {
        machine: MachineInfo { ram_mib: 64, rtc_start_s: 1_790_000_000 },
        cpu_model: CpuModelInfo { name: "x86-64-v2".to_owned(), version: 1 },
        tick_kind: TickKind::Instruction,
        ns_per_tick: 1,
        engine: "soft".to_owned(),
        clock: "instructions".to_owned(),
        host: HostInfo {
            cpu_vendor: "GenuineIntel".to_owned(),
            cpu_family: 6,
            ..HostInfo::default()
        },
        guest: GuestInfo {
            name: "ticks".to_owned(),
            command_line: "console=ttyS0".to_owned(),
            images: described
                .map(|(index, bytes)| {
                    ImageInfo::of(roles[index % 2], format!("image{index}"), bytes)
                })
                .collect(),
        },
        created_unix_s: 1_790_000_001,
        reprise_version: "0.1.0".to_owned(),
        precautions: vec![Precaution {
            what: "RDTSC, user code".to_owned(),
            treatment: Treatment::Open,
            how: "not trapped".to_owned(),
        }],
    }
}

/// A closed recording, and what went into it.
pub(crate) struct Sample {
    pub(crate) images: Vec<Vec<u8>>,
    pub(crate) records: Vec<Record>,
    pub(crate) file: Vec<u8>,
    /// File length after each log frame, with the records until then.
    pub(crate) log_ends: Vec<(u64, u64)>,
    /// Where the seek index begins: everything before it counts.
    pub(crate) index_offset: u64,
    pub(crate) log_bytes: u64,
}

impl Sample {
    /// Cuts a frame after each `frame_records` records.
    pub(crate) fn new(images: Vec<Vec<u8>>, records: Vec<Record>, frame_records: usize) -> Self {
        let header = header(&images);
        let mut writer = RecordingWriter::create(Vec::new(), &header).expect("memory takes all");
        for (index, image) in images.iter().enumerate() {
            writer.write_image(index, image).expect("images go in order");
        }
        let mut log = LogWriter::new(writer);
        let mut log_ends = vec![(log.sink().total_bytes(), 0)];
        for (number, record) in (1..).zip(&records) {
            let logged = log.append(record.clone()).expect("records are in order");
            assert_eq!(logged.get(), record);
            if number % frame_records == 0 {
                log.flush().expect("memory takes all");
                log_ends.push((log.sink().total_bytes(), log.record_count()));
            }
        }
        let record_count = log.record_count();
        let writer = log.finish().expect("memory takes all");
        log_ends.push((writer.total_bytes(), record_count));
        let log_bytes = writer.log_bytes();
        let file = writer.finish().expect("memory takes all");
        let footer_offset = file.len() - 8;
        let index_offset = u64::from_le_bytes(file[footer_offset..].try_into().expect("8 bytes"));
        Self { images, records, file, log_ends, index_offset, log_bytes }
    }

    /// From a seed: two small images and a log of some frames.
    pub(crate) fn small(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let images = vec![random_bytes(&mut random, 70), vec![0x90; 300]];
        let records = random_records(&mut random, 24);
        Self::new(images, records, 5)
    }

    /// From a seed: images of several pieces, and a log of many frames, some compressed.
    pub(crate) fn large(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let text = b"all work and no play ".repeat(50_000);
        let images = vec![text, Vec::new(), random_bytes(&mut random, 9000)];
        let mut records = random_records(&mut random, 600);
        for record in &mut records[200..400] {
            record.moment = Moment { tick: record.moment.tick, rip: 0x1000, rcx: 0 };
            record.cpu_digest = 5;
            record.event = Event::ClockRead(record.moment.tick);
        }
        Self::new(images, records, 40)
    }

    /// The records that are whole in the first `file_bytes` bytes.
    pub(crate) fn records_within(&self, file_bytes: u64) -> &[Record] {
        let whole = self.log_ends.iter().rev().find(|(end, _)| *end <= file_bytes);
        &self.records[..whole.map_or(0, |(_, count)| *count as usize)]
    }
}

pub(crate) fn open(file: &[u8]) -> Result<Recording, reprise_trace::recording::RecordingError> {
    Recording::open(Cursor::new(file.to_vec()))
}

/// All records, and the error that they end with.
pub(crate) fn read_log(log: &mut LogReader) -> (Vec<Record>, Option<LogError>) {
    let mut records = Vec::new();
    loop {
        match log.next_record() {
            Ok(Some(record)) => records.push(record.into_inner()),
            Ok(None) => return (records, None),
            Err(error) => return (records, Some(error)),
        }
    }
}
