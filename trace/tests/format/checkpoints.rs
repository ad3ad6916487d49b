//! The file of checkpoints from outside: whatever is written comes back, whatever is done to the bytes
//! is told, and nothing that is not what was saved is ever loaded.

use reprise_random::Random;
use std::collections::BTreeMap;
use std::io::{self, Cursor, Write};
use std::sync::{Arc, Mutex};

use reprise_trace::checkpoint::{
    CheckpointError, CheckpointInfo, CheckpointWriter, Checkpoints, ConsoleState, EngineState,
    HiddenState, LastRecord, MachineState, PAGE_BYTES,
};
use reprise_trace::cpu_state::CpuState;
use reprise_trace::moment::Moment;

const RECORDING: [u8; 32] = [7; 32];
const PREAMBLE_BYTES: usize = 16;
const HEAD_BYTES: usize = 16;

type Ram = BTreeMap<u64, Vec<u8>>;

/// A file that whoever wrote it can look at.
#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("nobody panicked").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Shared {
    fn bytes(&self) -> Vec<u8> {
        self.0.lock().expect("nobody panicked").clone()
    }
}

/// What was saved.
struct Saved {
    state: MachineState,
    info: CheckpointInfo,
    ram: Ram,
}

fn state(random: &mut Random, tick: u64) -> MachineState {
    let moment = Moment { tick, rip: random.next(), rcx: random.next() };
    let mut cpu = CpuState { rip: moment.rip, ..CpuState::default() };
    cpu.gpr[1] = moment.rcx;
    let bytes = (0..random.below(300)).map(|_| random.next() as u8).collect();
    MachineState {
        moment,
        virtual_ns: tick * 3,
        records: tick / 10,
        last_record: (tick > 10).then_some(LastRecord { moment, cpu_digest: 5 }),
        engine: EngineState {
            tick,
            cpu,
            hidden: HiddenState { engine: "soft".to_owned(), version: 1, bytes },
        },
        devices: vec![tick as u8; 50],
        base_tick: tick / 2,
        base_ns: 1,
        console: ConsoleState::default(),
        accesses: 1,
        interrupts: 2,
    }
}

fn page(random: &mut Random) -> Vec<u8> {
    // One in four is all zero, and the others compress well or not at all.
    match random.below(4) {
        0 => vec![0; PAGE_BYTES],
        1 => (0..PAGE_BYTES).map(|_| random.next() as u8).collect(),
        _ => vec![random.next() as u8 | 1; PAGE_BYTES],
    }
}

/// Takes checkpoints at these ticks, each after some pages have changed.
fn take<W: Write>(
    writer: &mut CheckpointWriter<W>,
    random: &mut Random,
    ram: &mut Ram,
    ticks: &[u64],
) -> Vec<Saved> {
    let mut saved = Vec::new();
    for &tick in ticks {
        for _ in 0..5 + random.below(20) {
            let address = random.below(200) * PAGE_BYTES as u64;
            let page = page(random);
            writer.page(address, &page).expect("memory takes all");
            if page.iter().all(|byte| *byte == 0) {
                ram.remove(&address);
            } else {
                ram.insert(address, page);
            }
        }
        let state = state(random, tick);
        let info = writer.checkpoint(&state).expect("memory takes all");
        saved.push(Saved { state, info, ram: ram.clone() });
    }
    saved
}

fn sample(seed: u64, ticks: &[u64]) -> (Vec<u8>, Vec<Saved>) {
    let (mut random, file) = (Random::new(seed), Shared::default());
    let mut writer = CheckpointWriter::create(file.clone(), &RECORDING).expect("a file");
    let saved = take(&mut writer, &mut random, &mut Ram::new(), ticks);
    assert_eq!(writer.bytes(), file.bytes().len() as u64);
    (file.bytes(), saved)
}

fn open(file: &[u8]) -> Result<Checkpoints, CheckpointError> {
    Checkpoints::open(Cursor::new(file.to_vec()), &RECORDING)
}

fn load(checkpoints: &Checkpoints, index: usize) -> Result<(MachineState, Ram), CheckpointError> {
    let mut ram = Ram::new();
    let loaded = checkpoints.load(index, &mut |address, page| {
        ram.insert(address, page.to_vec());
        true
    })?;
    Ok((loaded.state, ram))
}

/// Everything that can be loaded is what was saved. Gives how much that is.
fn check(checkpoints: &Checkpoints, saved: &[Saved], what: &str) -> usize {
    let mut loaded = 0;
    for (index, info) in checkpoints.list().iter().enumerate() {
        let Ok((state, ram)) = load(checkpoints, index) else { continue };
        let original = saved.iter().find(|saved| saved.info.moment == info.moment);
        let original = original.unwrap_or_else(|| panic!("{what}: {info:?} was never saved"));
        assert!(
            state == original.state && ram == original.ram,
            "{what}: tick {}",
            info.moment.tick
        );
        assert_eq!(*info, original.info, "{what}");
        loaded += 1;
    }
    loaded
}

#[test]
fn what_was_saved_comes_back_in_the_order_of_ticks() {
    for seed in 0..10 {
        let (file, saved) = sample(seed, &[100, 300, 200, 50]);
        let checkpoints = open(&file).expect("opens");
        let ticks: Vec<_> = checkpoints.list().iter().map(|info| info.moment.tick).collect();
        assert_eq!(ticks, [50, 100, 200, 300]);
        assert_eq!(check(&checkpoints, &saved, &format!("seed {seed}")), 4);
        assert_eq!(checkpoints.sound_bytes(), file.len() as u64);
        for (tick, nearest) in
            [(0, None), (49, None), (50, Some(0)), (299, Some(2)), (u64::MAX, Some(3))]
        {
            assert_eq!(checkpoints.nearest(tick), nearest, "tick {tick}");
        }
    }
}

#[test]
fn a_page_is_stored_once() {
    let file = Shared::default();
    let mut writer = CheckpointWriter::create(file.clone(), &RECORDING).expect("a file");
    let mut random = Random::new(1);
    let page: Vec<u8> = (0..PAGE_BYTES).map(|_| random.next() as u8).collect();
    for address in (0..100).map(|number| number * PAGE_BYTES as u64) {
        writer.page(address, &page).expect("memory takes all");
    }
    for tick in [1, 2, 3] {
        writer.page(0, &page).expect("memory takes all");
        writer.checkpoint(&state(&mut random, tick)).expect("memory takes all");
    }
    assert!(file.bytes().len() < 3 * PAGE_BYTES, "{} bytes", file.bytes().len());
    let checkpoints = open(&file.bytes()).expect("opens");
    assert_eq!(load(&checkpoints, 2).expect("loads").1.len(), 100);
}

#[test]
fn another_recordings_checkpoints_are_refused() {
    let (file, _) = sample(1, &[100]);
    let error = Checkpoints::open(Cursor::new(file), &[8; 32]).expect_err("another recording");
    assert!(matches!(error, CheckpointError::OtherRecording));
    assert!(error.to_string().contains("another recording"));
}

#[test]
fn cut_at_every_byte_the_whole_checkpoints_before_are_there() {
    let (file, saved) = sample(3, &[100, 200, 300]);
    let mut most = 0;
    for length in (0..file.len()).rev().step_by(7) {
        let what = format!("{length} bytes");
        match open(&file[..length]) {
            Ok(checkpoints) => {
                let loaded = check(&checkpoints, &saved, &what);
                assert_eq!(loaded, checkpoints.list().len(), "{what}: nothing is half there");
                assert!(checkpoints.sound_bytes() <= length as u64);
                most = most.max(loaded);
            }
            Err(CheckpointError::Foreign) => assert!(length < 100, "{what}"),
            Err(error) => panic!("{what}: {error}"),
        }
    }
    assert_eq!(most, 2);
}

#[test]
fn a_writer_goes_on_behind_a_torn_frame_and_stores_no_page_again() {
    let (file, mut saved) = sample(4, &[100, 200, 300]);
    let torn = &file[..file.len() - 5];
    let written = open(torn).expect("opens");
    assert_eq!(written.list().len(), 2);
    let sound = written.sound_bytes() as usize;
    let more = Shared::default();
    let mut writer = CheckpointWriter::append(more.clone(), &written).expect("reads the pages");
    let last = saved.pop().expect("three were taken");
    last.ram.iter().for_each(|(address, page)| writer.page(*address, page).expect("memory"));
    let info = writer.checkpoint(&last.state).expect("memory takes all");
    assert_eq!(info, last.info);
    // The frame that was torn was the checkpoint's: all pages are there.
    assert!(more.bytes().len() < PAGE_BYTES, "{} bytes", more.bytes().len());
    saved.push(last);
    let whole = open(&[&torn[..sound], &more.bytes()].concat()).expect("opens");
    assert_eq!(check(&whole, &saved, "gone on"), 3);
}

#[test]
fn a_flipped_bit_anywhere_is_told() {
    let (file, saved) = sample(5, &[100, 200]);
    for at in (0..file.len()).filter(|at| *at < 600 || at % 41 == 0 || *at + 900 > file.len()) {
        let mut flipped = file.clone();
        flipped[at] ^= 1 << (at % 8);
        let what = format!("byte {at}");
        if let Ok(checkpoints) = open(&flipped) {
            let loaded = check(&checkpoints, &saved, &what);
            assert!(loaded < 2, "{what} makes no difference");
        }
    }
}

/// The frames of a file, found by FORMAT.md alone: kind, start and end.
fn frames(file: &[u8]) -> Vec<([u8; 4], usize, usize)> {
    let (mut found, mut at) = (Vec::new(), PREAMBLE_BYTES);
    while at < file.len() {
        let length = u32::from_le_bytes(file[at + 4..at + 8].try_into().expect("four bytes"));
        let end = at + HEAD_BYTES + length as usize;
        found.push((file[at..at + 4].try_into().expect("four bytes"), at, end));
        at = end;
    }
    found
}

/// Makes the checksums of the frame at `start` right again.
fn reseal(file: &mut [u8], start: usize, end: usize) {
    let payload = crc32c::crc32c(&file[start + HEAD_BYTES..end]);
    file[start + 8..start + 12].copy_from_slice(&payload.to_le_bytes());
    let head = crc32c::crc32c(&file[start..start + 12]);
    file[start + 12..start + 16].copy_from_slice(&head.to_le_bytes());
}

#[test]
fn a_forged_field_with_right_checksums_loads_nothing_else() {
    let (file, saved) = sample(6, &[100, 200]);
    let mut kinds = Vec::new();
    for (kind, start, end) in frames(&file) {
        kinds.push(kind);
        // Each field of a checkpoint's description, and the beginning of what is compressed.
        for at in (start + HEAD_BYTES..end).filter(|at| at - start < 300 || at % 97 == 0) {
            let mut forged = file.clone();
            forged[at] = forged[at].wrapping_add(1);
            reseal(&mut forged, start, end);
            if let Ok(checkpoints) = open(&forged) {
                let loaded = check(&checkpoints, &saved, &format!("{kind:?} + {}", at - start));
                assert!(loaded < 2 || kind == *b"PAGE", "{kind:?} + {}", at - start);
            }
        }
    }
    assert_eq!(kinds.iter().filter(|kind| **kind == *b"CKPT").count(), 2);
    assert_eq!(kinds[0], *b"HEAD");
}

#[test]
fn lengths_and_versions_are_checked_before_anything_is_made_of_them() {
    let (file, _) = sample(7, &[100]);
    let (_, start, _) = frames(&file)[1];
    let mut long = file.clone();
    long[start + 4..start + 8].copy_from_slice(&u32::MAX.to_le_bytes());
    let head = crc32c::crc32c(&long[start..start + 12]);
    long[start + 12..start + 16].copy_from_slice(&head.to_le_bytes());
    assert!(open(&long).expect("opens").list().is_empty());
    let mut version = file.clone();
    version[8] = 9;
    let preamble = crc32c::crc32c(&version[..12]);
    version[12..16].copy_from_slice(&preamble.to_le_bytes());
    assert!(matches!(open(&version), Err(CheckpointError::Version { found: 9 })));
    assert!(matches!(open(b"something else entirely"), Err(CheckpointError::Foreign)));
    let checkpoints = open(&file).expect("opens");
    assert!(matches!(load(&checkpoints, 1), Err(CheckpointError::NoSuch { index: 1, count: 1 })));
    let nowhere = checkpoints.load(0, &mut |_, _| false);
    assert!(nowhere.is_err(), "pages where there is no RAM");
}
