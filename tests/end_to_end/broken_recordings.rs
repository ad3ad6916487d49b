//! Recordings cut off and damaged, as the product's commands meet them: status 1 and one line, or
//! everything up to the last whole frame, and never a panic, a hang or memory beyond bounds.
//!
//! (The format's own tests cut at every byte and forge frames; here is what a user sees.)

use std::io::Write;
use std::sync::OnceLock;
use std::time::Duration;

use reprise_random::Random;

use crate::program::{Finished, Workplace, record, reprise, reprise_after, run};

/// Address space that any command must do with on a broken recording of a guest with 64 MiB: RAM,
/// generated code and the program take a part of it, and a forged length would take more.
const ADDRESS_SPACE_KIB: u64 = 2 << 20;
/// Bytes of a frame that stand behind its payload: checksum and chain value.
const FRAME_END_BYTES: usize = 20;
/// Bytes before the first frame.
const PREAMBLE_BYTES: usize = 16;

/// A frame of a recording's file, found by FORMAT.md alone.
#[derive(Clone, Copy, Debug)]
struct Frame {
    kind: u8,
    start: usize,
    end: usize,
}

/// A varint at `at`, and where it ends.
fn varint(bytes: &[u8], mut at: usize) -> (u64, usize) {
    let (mut value, mut shift) = (0, 0);
    loop {
        let byte = bytes[at];
        value |= u64::from(byte & 0x7f) << shift;
        (at, shift) = (at + 1, shift + 7);
        if byte & 0x80 == 0 {
            return (value, at);
        }
    }
}

/// Every frame up to and with the index.
fn frames(file: &[u8]) -> Vec<Frame> {
    let mut found = Vec::new();
    let mut at = PREAMBLE_BYTES;
    loop {
        let (start, kind) = (at, file[at]);
        let (_raw_bytes, after) = varint(file, at + 1);
        let (stored_bytes, after) = varint(file, after);
        let (_count, after) = varint(file, after);
        at = after + usize::try_from(stored_bytes).expect("a small file") + FRAME_END_BYTES;
        found.push(Frame { kind, start, end: at });
        if kind == b'X' {
            return found;
        }
    }
}

/// A recording of several log frames and few instructions: somebody types slowly.
fn slowly_typed() -> &'static [u8] {
    static FILE: OnceLock<Vec<u8>> = OnceLock::new();
    FILE.get_or_init(|| {
        let workplace = Workplace::new();
        let file = workplace.path("typed.rr");
        let words = ["record", "--engine", "soft", "--image", "echo", "--input", "-", "-o", &file];
        let mut running = reprise(&words).with_keyboard().start();
        let mut keyboard = running.keyboard();
        for line in 0..8 {
            write!(keyboard, "line {line}\r").expect("the guest reads");
            std::thread::sleep(Duration::from_millis(350));
        }
        write!(keyboard, "quit\r").expect("the guest reads");
        running.finish().expect_code(0);
        std::fs::read(&file).expect("a recording")
    })
}

/// A recording whose log is larger by far than its image.
fn much_typed() -> &'static [u8] {
    static FILE: OnceLock<Vec<u8>> = OnceLock::new();
    FILE.get_or_init(|| {
        let workplace = Workplace::new();
        let typed: String = (0..1500_u32).map(|line| format!("{}\r", line * line)).collect();
        let input = workplace.file("input", format!("{typed}quit\r"));
        let file = workplace.path("much.rr");
        record(&["--engine", "soft", "--image", "echo", "--input", &input], &file, 0);
        std::fs::read(&file).expect("a recording")
    })
}

/// Runs a command with bounded memory.
fn bounded(words: &[&str]) -> Finished {
    reprise_after(&format!("ulimit -v {ADDRESS_SPACE_KIB}"), words).start().finish()
}

/// What the three commands make of a file.
struct Verdicts {
    info: Finished,
    replay: Finished,
    diff: Finished,
}

impl Verdicts {
    fn on(broken: &str, whole: &str) -> Self {
        let verdicts = Self {
            info: bounded(&["--json", "info", broken]),
            replay: bounded(&["--json", "replay", broken]),
            diff: bounded(&["--json", "diff", broken, whole]),
        };
        for finished in verdicts.all() {
            let report = finished.json();
            match finished.code() {
                0 => assert!(report["error"].is_null(), "{report:#}"),
                _ => assert!(finished.expect_reason().len() > 20),
            }
        }
        verdicts
    }

    fn all(&self) -> [&Finished; 3] {
        [&self.info, &self.replay, &self.diff]
    }

    fn all_refuse(&self, place: &str) {
        for finished in self.all() {
            assert_eq!(finished.code(), 1, "{place}: {}", finished.stderr);
        }
    }
}

/// A number below `bound`, a length in memory.
fn below(random: &mut Random, bound: usize) -> usize {
    random.below(bound as u64) as usize
}

#[test]
fn the_document_of_the_format_finds_every_frame() {
    for file in [slowly_typed(), much_typed()] {
        let frames = frames(file);
        let kinds: String = frames.iter().map(|frame| char::from(frame.kind)).collect();
        assert!(kinds.starts_with("HIL") && kinds.ends_with("LEX"), "{kinds}");
        assert_eq!(frames.last().map(|frame| frame.end + 16), Some(file.len()));
    }
    let logs = frames(slowly_typed()).iter().filter(|frame| frame.kind == b'L').count();
    assert!(logs >= 5, "a frame several times a second, not {logs}");
}

/// What a recording cut at `cut` bytes must give.
fn check_cut(workplace: &Workplace, whole: &str, file: &[u8], cut: usize) {
    let frames = frames(file);
    let broken = workplace.file("cut.rr", &file[..cut]);
    let verdicts = Verdicts::on(&broken, whole);
    let place = format!("cut at {cut} of {}", file.len());
    let has = |kind| frames.iter().any(|frame| frame.kind == kind && frame.end <= cut);
    let (info, replayed) = (verdicts.info.json(), verdicts.replay.json());
    if !has(b'H') {
        return verdicts.all_refuse(&place);
    }
    assert_eq!(verdicts.info.code(), 0, "{place}: {}", verdicts.info.stderr);
    assert_eq!(info["complete"], has(b'E'), "{place}");
    let shown = String::from_utf8_lossy(&run(&["info", &broken]).stdout).into_owned();
    assert_eq!(shown.contains("nothing of it replays"), !has(b'L'), "{place}: {shown}");
    let whole_logs = frames.iter().filter(|frame| frame.kind == b'L' && frame.end <= cut).count();
    assert_eq!(info["log_frames"], whole_logs, "{place}: {info:#}");
    assert_eq!(verdicts.replay.code(), i32::from(!has(b'L')), "{place}: {replayed:#}");
    if has(b'L') {
        assert_eq!(replayed["verified"], true, "{place}: {replayed:#}");
        assert_eq!(replayed["complete"], has(b'E'), "{place}: {replayed:#}");
        assert_eq!(replayed["verified_until"]["tick"], info["last_moment"]["tick"], "{place}");
    }
    assert_eq!(verdicts.diff.code(), 0, "{place}: {}", verdicts.diff.stderr);
    // All records stand before the end frame, so the logs may be the same already without it.
    let all_logs = frames.iter().filter(|frame| frame.kind == b'L').count();
    assert_eq!(verdicts.diff.json()["same_log"], whole_logs == all_logs, "{place}");
}

#[test]
fn a_recording_cut_at_any_frame_says_how_far_it_goes() {
    let (workplace, file) = (Workplace::new(), slowly_typed());
    let whole = workplace.file("whole.rr", file);
    let mut cuts = vec![0, 1, PREAMBLE_BYTES - 1, PREAMBLE_BYTES, file.len() - 1];
    cuts.extend(frames(file).iter().flat_map(|frame| [frame.end - 1, frame.end, frame.end + 1]));
    for cut in cuts {
        check_cut(&workplace, &whole, file, cut);
    }
}

#[test]
fn a_recording_cut_anywhere_says_how_far_it_goes() {
    const SEED: u64 = 2;
    println!("seed {SEED}");
    let (workplace, file) = (Workplace::new(), slowly_typed());
    let whole = workplace.file("whole.rr", file);
    let mut random = Random::new(SEED);
    for _ in 0..50 {
        check_cut(&workplace, &whole, file, below(&mut random, file.len()));
    }
}

#[test]
fn a_changed_bit_is_found_wherever_it_is() {
    const SEED: u64 = 3;
    const FLIPS: usize = 200;
    println!("seed {SEED}");
    let (workplace, file) = (Workplace::new(), much_typed());
    let whole = workplace.file("whole.rr", file);
    let frames = frames(file);
    let mut random = Random::new(SEED);
    for flip in 0..FLIPS {
        // Most of the file is log: every fourth flip is in what stands around it.
        let at = match flip % 4 {
            0 => below(&mut random, frames[1].end),
            1 => {
                let end = frames.iter().find(|frame| frame.kind == b'E').expect("it was closed");
                end.start + below(&mut random, file.len() - end.start)
            }
            _ => below(&mut random, file.len()),
        };
        let mut changed = file.to_vec();
        changed[at] ^= 1 << below(&mut random, 8);
        let broken = workplace.file("changed.rr", &changed);
        let place = format!("flip {flip}: a bit of byte {at}");
        check_flip(&Verdicts::on(&broken, &whole), kind_at(&frames, at), &place);
    }
}

/// The kind of the frame that holds byte `at`; a space before the first and behind the last.
fn kind_at(frames: &[Frame], at: usize) -> char {
    let found = frames.iter().find(|frame| (frame.start..frame.end).contains(&at));
    found.map_or(if at < PREAMBLE_BYTES { 'P' } else { 'F' }, |frame| char::from(frame.kind))
}

/// What a recording with one wrong bit in a frame of this kind must give.
fn check_flip(verdicts: &Verdicts, kind: char, place: &str) {
    let place = format!("{place} ({kind})");
    match kind {
        'P' | 'H' => verdicts.all_refuse(&place),
        // Derived data behind the end: the recording is as good as it was.
        'X' | 'F' => {
            let replayed = verdicts.replay.json();
            assert_eq!(verdicts.replay.code(), 0, "{place}: {replayed:#}");
            assert_eq!(
                (&replayed["verified"], &replayed["complete"]),
                (&true.into(), &true.into())
            );
            assert_eq!(verdicts.info.json()["seek_index"], "damaged", "{place}");
            for finished in verdicts.all() {
                assert!(finished.stderr.contains("the seek index"), "{place}: {}", finished.stderr);
            }
        }
        _ => {
            assert_eq!(verdicts.info.code(), 1, "{place}: {}", verdicts.info.stderr);
            let damage = &verdicts.info.json()["damage"];
            assert!(damage.is_string(), "{place}: {damage}");
            let replayed = verdicts.replay.json();
            verdicts.all_refuse(&place);
            let told = [&replayed["damage"], &replayed["error"], &replayed["divergence"]];
            assert!(told.iter().any(|what| !what.is_null()), "{place}: {replayed:#}");
            assert!(replayed["verified"] != true, "{place}: {replayed:#}");
            for finished in verdicts.all() {
                let advice = finished.stderr.matches("take another copy").count();
                assert_eq!(advice, 1, "{place}: {}", finished.stderr);
            }
            // The end frame stands behind every event: all of them replay.
            if kind == 'E' {
                let info = verdicts.info.json();
                assert_eq!(replayed["events"], info["events"], "{place}: {replayed:#}");
                assert!(verdicts.replay.stderr.contains("agrees"), "{}", verdicts.replay.stderr);
            }
        }
    }
}

#[test]
fn what_is_no_recording_is_refused() {
    let workplace = Workplace::new();
    let whole = workplace.file("whole.rr", slowly_typed());
    let foreign = [
        ("empty", Vec::new()),
        ("text", b"this is no recording\n".repeat(100)),
        ("zeros", vec![0; 1 << 16]),
        ("magic-alone", slowly_typed()[..8].to_vec()),
        ("frames-without-preamble", slowly_typed()[PREAMBLE_BYTES..].to_vec()),
        ("other-version", [&slowly_typed()[..8], &[0xee; 8], &slowly_typed()[16..]].concat()),
    ];
    for (name, bytes) in foreign {
        Verdicts::on(&workplace.file(name, bytes), &whole).all_refuse(name);
    }
}

#[test]
fn two_recordings_in_one_file_are_not_mistaken_for_one() {
    let workplace = Workplace::new();
    let doubled = workplace.file("doubled.rr", slowly_typed().repeat(2));
    let info = run(&["--json", "info", &doubled]);
    let report = info.json();
    let index_is_intact = report["seek_index"] == "intact" && info.code() == 0;
    assert!(!index_is_intact, "what stands behind the end goes unnoticed: {report:#}");
}
