//! Recordings of every clock that there is here, whose end says something else than what was recorded: no
//! replay of one passes for verified.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use reprise::session::checkpoints::CheckpointArg;
use reprise::session::choice::{Choice, ClockArg, EngineArg, EngineKind};
use reprise::session::record::{RecordTo, RunPlan, record_on};
use reprise::session::replay::{ReplayOptions, open_replayable, replay_on};
use reprise::session::report::SessionReport;
use reprise_machine::divergence::Difference;
use reprise_tests::hardware::Simulated;
use reprise_trace::event::{Event, Record};
use reprise_trace::log::LogWriter;
use reprise_trace::recording::{Recording, RecordingWriter};

use crate::Session;

/// What is done to the record of the end, and as what that is to be told.
const ALTERED: [(Difference, fn(&mut Record)); 3] = [
    (Difference::FinalState, |record| {
        let Event::End { final_digest: Some(digest), .. } = &mut record.event else {
            panic!("the end is an exact moment: {record:?}");
        };
        digest[31] ^= 1;
    }),
    (Difference::Effects, |record| {
        let Event::End { effects, .. } = &mut record.event else { panic!("{record:?}") };
        effects.console_digest[31] ^= 1;
    }),
    (Difference::CpuState, |record| record.cpu_digest ^= 1 << 63),
];

impl Session {
    fn record_as(&self, kind: EngineKind) -> SessionReport {
        let plan = RunPlan { choice: Choice::of(kind), ..self.plan() };
        let checkpoints = CheckpointArg::default();
        let to = RecordTo { path: self.path(), force: false, checkpoints };
        record_on(&Simulated::intel(1), plan, &to).expect("it records")
    }

    /// A copy of the recording whose last record is another, its frames and chain right.
    fn with_end(&self, change: fn(&mut Record)) -> PathBuf {
        let file = File::open(self.path()).expect("a recording");
        let recording = Recording::open(BufReader::new(file)).expect("a recording");
        let path = self.directory.path().join("altered.rr");
        let out = File::create(&path).expect("the host has room");
        let mut writer = RecordingWriter::create(out, recording.header()).expect("it is written");
        for index in 0..recording.header().guest.images.len() {
            let image = recording.read_image(index).expect("an image");
            writer.write_image(index, &image).expect("it is written");
        }
        let (mut from, mut to) = (recording.log(), LogWriter::new(writer));
        while let Some(record) = from.next_record().expect("the log is whole") {
            let mut record = record.into_inner();
            if matches!(record.event, Event::End { .. }) {
                change(&mut record);
            }
            to.append(record).expect("it is written");
        }
        to.finish().expect("it is written").finish().expect("it is written");
        path
    }
}

/// The ways in which a recording of this kind replays.
fn ways(kind: EngineKind) -> Vec<(EngineArg, ClockArg)> {
    let mut ways = vec![(EngineArg::Auto, ClockArg::Auto), (EngineArg::Soft, ClockArg::Auto)];
    if kind == EngineKind::Soft {
        // Stepped, and rewritten.
        if reprise_kvm::opens() {
            ways.push((EngineArg::Kvm, ClockArg::Step));
        }
        ways.push((EngineArg::Kvm, ClockArg::Pmu));
    }
    ways
}

fn replay(path: &Path, (engine, clock): (EngineArg, ClockArg)) -> anyhow::Result<SessionReport> {
    let options = ReplayOptions { engine, clock, ..ReplayOptions::default() };
    Ok(replay_on(&Simulated::intel(2), &open_replayable(path)?, options)?.report)
}

#[test]
fn another_end_is_refused_under_every_clock() {
    for kind in EngineKind::ALL {
        if matches!(kind, EngineKind::Kvm(_)) && !reprise_kvm::opens() {
            eprintln!("skipped: no KVM for the clock {}", kind.clock_name());
            continue;
        }
        let session = Session::new("hello", "");
        session.record_as(kind);
        for way in ways(kind) {
            let what = format!("{}, replayed as {way:?}", kind.clock_name());
            let report = replay(&session.path(), way).expect("it replays");
            assert_eq!(report.verified, Some(true), "{what}: {report:#?}");
            for (difference, change) in ALTERED {
                match replay(&session.with_end(change), way) {
                    Ok(report) => {
                        assert_eq!(report.verified, Some(false), "{what}: {difference}");
                        let found = report.divergence.expect("it says where");
                        assert_eq!(found.what, difference.to_string(), "{what}");
                        assert_eq!(report.exit_code, 1, "{what}: {difference}");
                    }
                    // What cannot be rewritten is not replayed at all.
                    Err(error) => {
                        let line = format!("{error:#}");
                        assert_eq!(way.1, ClockArg::Pmu, "{what}: {line}");
                        assert!(line.contains(&difference.to_string()), "{what}: {line}");
                    }
                }
            }
        }
    }
}
