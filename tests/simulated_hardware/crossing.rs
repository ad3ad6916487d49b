//! Recordings of simulated hardware as files: replayed, expanded and checkpointed on the software CPU as
//! any other.

use std::path::{Path, PathBuf};

use reprise::session::assembly::SoftOptions;
use reprise::session::checkpoints;
use reprise::session::expand::{ExpandOptions, Place, Target, expand_recording};
use reprise::session::expand_report::ExpandReport;
use reprise::session::replay::{self, At, ReplayOptions};
use reprise_expand::{Control, Window};
use reprise_host::CheckpointEvery;
use reprise_trace::instructions::Contents;
use reprise_trace::instructions::filter::Selection;
use tempfile::TempDir;

use crate::case::{Case, Hardware, Recorded};
use crate::guest;

/// A recording in a directory of its own.
struct OnDisk {
    directory: TempDir,
    file: PathBuf,
    recorded: Recorded,
}

impl OnDisk {
    fn of(case: &Case<'_>, seed: u64) -> Self {
        let recorded = case.record(&Hardware::intel(seed));
        let directory = TempDir::with_prefix("reprise-test-").expect("a temporary directory");
        let file = directory.path().join("hardware.rr");
        case.write(&recorded, &file);
        Self { directory, file, recorded }
    }

    fn last_tick(&self) -> u64 {
        self.recorded.outcome.ticks
    }

    fn add_checkpoints(&self, every: u64) -> usize {
        let replayable = replay::open_replayable(&self.file).expect("it opens");
        let every = CheckpointEvery::Ticks(every);
        let (checkpointer, thread) =
            checkpoints::of_replay(&replayable, &self.file, every).expect("a writer");
        let options =
            ReplayOptions { checkpointer: Some(checkpointer), ..ReplayOptions::default() };
        let replayed = replay::replay(&replayable, options).expect("it replays");
        assert!(thread.finish().failure.is_none());
        assert_eq!(replayed.report.verified, Some(true), "{:#?}", replayed.report);
        replay::open_replayable(&self.file).expect("it opens").checkpoints().len()
    }

    fn expand(&self, window: Window, jobs: usize, name: &str) -> (ExpandReport, Vec<u8>) {
        let out: &Path = &self.directory.path().join(name);
        let options = ExpandOptions {
            target: Target::Native(Place::Path { path: out.to_owned(), force: false }),
            window,
            contents: Contents::default(),
            selection: Selection::default(),
            filters: Vec::new(),
            jobs,
            segment: None,
            soft: SoftOptions::default(),
        };
        let replayable = replay::open_replayable(&self.file).expect("it opens");
        let report =
            expand_recording(&replayable, options, &Control::default()).expect("it expands");
        assert_eq!(report.verified, Some(true), "{report:#?}");
        (report, std::fs::read(out).expect("a trace"))
    }
}

fn hexadecimal(digest: [u8; 32]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn a_file_of_hardware_replays_and_says_what_it_set_aside() {
    let recording = OnDisk::of(&guest("ticks", "hz=18000 count=60 poll=40", ""), 7);
    let replayable = replay::open_replayable(&recording.file).expect("it opens");
    let replayed = replay::replay(&replayable, ReplayOptions::default()).expect("it replays");
    let report = replayed.report;
    assert_eq!((report.engine, report.clock), ("soft", "pmu"), "no KVM here has that clock");
    assert_eq!(report.verified, Some(true), "{report:#?}");
    assert_eq!(report.ticks, recording.last_tick());
    assert!(report.instructions > Some(report.ticks), "{report:#?}");
    let digest = recording.recorded.outcome.final_digest().map(hexadecimal);
    assert_eq!(report.final_digest, digest);
    let set_aside: Vec<_> = report.set_aside.iter().map(|it| it.what.as_str()).collect();
    assert_eq!(set_aside, ["accessed bits of the guest's page tables"]);
}

#[test]
fn expansion_in_pieces_is_the_same_trace() {
    let typed = "a line of some length\rand another one\rquit\r";
    let recording = OnDisk::of(&guest("echo", "", typed), 3);
    let whole = Window::default();
    let (report, alone) = recording.expand(whole, 1, "alone");
    assert_eq!(report.checkpoints_verified, 0);
    let every = recording.last_tick() / 9;
    let count = recording.add_checkpoints(every);
    assert!((4..=10).contains(&count), "{count} checkpoints");
    let digest = recording.recorded.outcome.final_digest().map(hexadecimal);
    let (one, of_one) = recording.expand(whole, 1, "one");
    let (three, of_three) = recording.expand(whole, 3, "three");
    assert_eq!(one.checkpoints_verified, count as u64);
    assert_eq!((&one.final_digest, &three.final_digest), (&digest, &digest));
    assert_eq!(one.instructions, report.instructions);
    assert!(of_one == of_three, "the trace hangs on the number of threads");
    assert!(!alone.is_empty());
}

#[test]
fn windows_are_in_the_ticks_of_the_recording() {
    let recording = OnDisk::of(&guest("ticks", "hz=18000 count=60 poll=40", ""), 11);
    let end = recording.last_tick();
    let bounds = [0, end / 4, end / 3, 2 * end / 3, u64::MAX];
    let parts = |name: &str| -> Vec<(u64, Option<u64>)> {
        let expand = |(from, to)| {
            let (report, _) = recording.expand(Window { from, to }, 2, &format!("{name}{from}"));
            (report.instructions, report.end_tick)
        };
        bounds.windows(2).map(|bounds| expand((bounds[0], bounds[1]))).collect()
    };
    let before = parts("before");
    let (report, _) = recording.expand(Window::default(), 2, "whole");
    assert_eq!(before.iter().map(|(count, _)| count).sum::<u64>(), report.instructions);
    let ends: Vec<_> = before.iter().filter_map(|(_, tick)| *tick).collect();
    assert_eq!(ends, [end / 4, end / 3, 2 * end / 3, end]);
    // Checkpoints change where a window's replay begins, and nothing else.
    assert!(recording.add_checkpoints(end / 7) > 3);
    assert_eq!(parts("behind"), before);
    let replayable = replay::open_replayable(&recording.file).expect("it opens");
    let (from, until) = (Some(At::Tick(end / 2)), Some(At::Tick(3 * end / 4)));
    let options = ReplayOptions { from, until, ..ReplayOptions::default() };
    let report = replay::replay(&replayable, options).expect("it replays").report;
    assert!(report.from_tick > Some(0), "{report:#?}");
    assert_eq!((report.ticks, report.verified), (3 * end / 4, Some(true)));
}
