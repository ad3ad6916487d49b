//! Recordings for the tests, and copies of them that say something else.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::Command;

use reprise_replay::{Replayable, checkpoints_path};
use reprise_trace::checkpoint::{CheckpointWriter, Checkpoints, MachineState};
use reprise_trace::event::Record;
use reprise_trace::log::LogWriter;
use reprise_trace::recording::{Recording, RecordingWriter};
use serde_json::Value;
use tempfile::TempDir;

/// The product.
const BINARY: &str = env!("CARGO_BIN_EXE_reprise-under-test");

/// A directory of a test's own.
pub(crate) struct Workplace(TempDir);

/// What a run of the product came to.
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("{error}: {} {}", self.stdout, self.stderr))
    }
}

/// Runs the product.
pub(crate) fn reprise(words: &[&str]) -> Ran {
    let output = Command::new(BINARY).args(words).output().expect("the product starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ran {
        code: output.status.code().expect("no signal"),
        stdout: text(&output.stdout),
        stderr: text(&output.stderr),
    }
}

impl Workplace {
    pub(crate) fn new() -> Self {
        Self(TempDir::with_prefix("reprise-bisect-").expect("a temporary directory"))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Records a guest on the software CPU, `typed` being typed, with further arguments.
    pub(crate) fn record(&self, name: &str, image: &str, typed: &str, more: &[&str]) -> PathBuf {
        let (file, input) = (self.path(name), self.path("typed"));
        std::fs::write(&input, typed).expect("a file");
        let words = ["--json", "record", "--engine", "soft", "--image", image, "--input"];
        let places = [text(&input), "-o", text(&file)];
        let ran = reprise(&[&words[..], &places, more].concat());
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        file
    }

    /// Records a guest on this engine under this clock.
    pub(crate) fn record_on(
        &self,
        name: &str,
        [engine, clock]: [&str; 2],
        (image, cmdline, typed): (&str, &str, &str),
    ) -> PathBuf {
        let (file, input) = (self.path(name), self.path("typed"));
        std::fs::write(&input, typed).expect("a file");
        let words = ["--json", "record", "--engine", engine, "--clock", clock, "--image", image];
        let more = ["--memory", "8", "--input", text(&input), "-o", text(&file)];
        let set = ["--cmdline", cmdline];
        let cmdline = if cmdline.is_empty() { &[] } else { &set[..] };
        let ran = reprise(&[&words[..], &more, cmdline].concat());
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        file
    }

    /// A copy of a recording whose records `change` has changed, and whose chain is right.
    pub(crate) fn altered(
        &self,
        name: &str,
        recording: &Path,
        change: impl FnOnce(&mut Vec<Record>),
    ) -> PathBuf {
        let file = File::open(recording).expect("a recording");
        let recording = Recording::open(BufReader::new(file)).expect("a recording");
        let mut log = recording.log();
        let mut records = Vec::new();
        while let Some(record) = log.next_record().expect("a sound log") {
            records.push(record.into_inner());
        }
        change(&mut records);
        let path = self.path(name);
        let out = File::create(&path).expect("a file");
        let mut writer = RecordingWriter::create(out, recording.header()).expect("a header");
        for index in 0..recording.header().guest.images.len() {
            writer
                .write_image(index, &recording.read_image(index).expect("an image"))
                .expect("room");
        }
        let mut log = LogWriter::new(writer);
        for record in records {
            log.append(record).expect("ticks rise");
        }
        log.finish().expect("room").finish().expect("room");
        path
    }

    /// Rewrites a recording's checkpoints with bits of a byte set in the RAM of one of them.
    pub(crate) fn alter_checkpoint(&self, recording: &Path, altered: usize, byte: (u64, u8)) {
        self.alter_checkpoint_and_state(recording, altered, byte, |_| {});
    }

    /// The same, and whatever else `change` does to it.
    pub(crate) fn alter_checkpoint_and_state(
        &self,
        recording: &Path,
        altered: usize,
        (at, bits): (u64, u8),
        change: fn(&mut MachineState),
    ) {
        let path = checkpoints_path(recording);
        let identity = open(recording).recording().identity();
        let checkpoints =
            Checkpoints::open(File::open(&path).expect("checkpoints"), &identity).expect("sound");
        let new = self.path("altered.checkpoints");
        let mut writer =
            CheckpointWriter::create(File::create(&new).expect("a file"), &identity).expect("room");
        for index in 0..checkpoints.list().len() {
            let mut pages: Vec<(u64, Vec<u8>)> = Vec::new();
            let mut keep = |address: u64, page: &[u8]| {
                pages.push((address, page.to_vec()));
                true
            };
            let mut loaded = checkpoints.load(index, &mut keep).expect("a sound checkpoint");
            if index == altered {
                change(&mut loaded.state);
            }
            for (address, mut page) in pages {
                if index == altered && (address..address + 4096).contains(&at) {
                    page[(at - address) as usize] |= bits;
                }
                writer.page(address, &page).expect("room");
            }
            writer.checkpoint(&loaded.state).expect("room");
        }
        drop(writer);
        std::fs::rename(new, path).expect("the same directory");
    }
}

/// A path as an argument.
pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are text")
}

/// Opens a recording.
pub(crate) fn open(path: &Path) -> Replayable {
    Replayable::open(path).expect("a recording")
}
