//! Recordings of simulated hardware that lie in a file with their checkpoints, as the product's do, and
//! replays of them that go back where the hardware was late.

use std::fs::File;

use reprise_machine::checkpoint::{Checkpointer, Consistent, checkpoint};
use reprise_machine::clock::TimeSource;
use reprise_machine::engine::EngineError;
use reprise_machine::inputs::Recording as RecordingInputs;
use reprise_machine::machine::Machine;
use reprise_machine::outcome::Outcome;
use reprise_replay::{ReplayError, Replayable, Start, checkpoints_path};
use reprise_trace::checkpoint::CheckpointWriter;
use reprise_trace::event::Record;
use reprise_trace::log::LogWriter;
use reprise_trace::recording::RecordingWriter;
use tempfile::TempDir;

use crate::case::{Case, Hardware, Recorded};
use crate::world::SeededWorld;

/// A recording in a file.
pub(crate) struct Kept {
    /// Removes the files in the end.
    _directory: TempDir,
    pub(crate) replayable: Replayable,
    pub(crate) recorded: Recorded,
}

impl Case<'_> {
    /// Records into a file, with a checkpoint every so many ticks.
    pub(crate) fn record_to_file(&self, hardware: &Hardware, checkpoint_every: u64) -> Kept {
        let directory = tempfile::tempdir().expect("the host has room");
        let path = directory.path().join("recording.rr");
        let file = File::create(&path).expect("the host has room");
        let mut writer = RecordingWriter::create(file, &self.header()).expect("it is written");
        writer.write_image(0, self.source.kernel).expect("it is written");
        if let Some(initrd) = self.source.initrd {
            writer.write_image(1, initrd).expect("it is written");
        }
        let identity = writer.identity();
        let (engine, board) = self.start(hardware);
        let seed = hardware.disturbance.seed;
        let world = SeededWorld::new(seed, self.typed, engine.vcpu().world_clock_ns())
            .typing_within(self.longest_pause_ns)
            .stopping_at(self.stops_ns);
        let inputs = RecordingInputs::new(world, LogWriter::new(writer));
        let mut machine = Machine::new(engine, board, inputs, TimeSource::Host);
        let file = File::create(checkpoints_path(&path)).expect("the host has room");
        let writer = CheckpointWriter::create(file, &identity).expect("it is written");
        let next = checkpoint_every;
        machine.set_checkpointer(Box::new(ToFile { every: checkpoint_every, next, writer }));
        let outcome = machine.run().expect("the machine runs");
        let (engine, _, inputs) = machine.into_parts();
        let (world, sink) = inputs.into_parts();
        sink.expect("the log is closed").finish().expect("it is written");
        let replayable = Replayable::open(&path).expect("it is a recording");
        let console = String::from_utf8_lossy(&world.console).into_owned();
        let records = records_of(&replayable);
        let recorded = Recorded { outcome, records, console, counts: engine.counts() };
        Kept { _directory: directory, replayable, recorded }
    }
}

fn records_of(replayable: &Replayable) -> Vec<Record> {
    let mut log = replayable.recording().log();
    let next = || log.next_record().expect("the log is whole");
    std::iter::from_fn(next).map(|record| record.get().clone()).collect()
}

/// What a replay came to, and how often it went back.
pub(crate) struct Replay {
    pub(crate) outcome: Outcome,
    pub(crate) times_back: u32,
}

impl Kept {
    /// Replays on hardware that may be late, another one after each time, and goes back where it was.
    pub(crate) fn replay(&self, start: Start, hardware: &Hardware) -> Result<Replay, ReplayError> {
        let (mut machines, mut records_before) = (0, 0);
        let arrived = self.replayable.run_going_back(
            self.replayable.begin(start)?,
            |beginning| {
                let mut hardware = *hardware;
                hardware.disturbance.seed += machines << 32;
                machines += 1;
                records_before = beginning.records();
                beginning.into_machine(|ram| hardware.engine(ram), |inputs| inputs)
            },
            Machine::run,
        )?;
        let mut outcome = arrived.outcome.expect("the machine runs");
        outcome.events += records_before;
        Ok(Replay { outcome, times_back: arrived.times_back })
    }
}

/// Writes checkpoints as they are taken.
struct ToFile {
    every: u64,
    next: u64,
    writer: CheckpointWriter<File>,
}

impl Checkpointer for ToFile {
    fn due_at(&mut self, _tick: u64, _virtual_ns: u64) -> Option<u64> {
        Some(self.next)
    }

    fn start(&mut self, machine: Consistent<'_>) -> Result<bool, EngineError> {
        self.next = machine.tick() + self.every;
        let writer = &mut self.writer;
        let state = checkpoint(machine, &mut |address, page| {
            writer.page(address, page).expect("the host has room");
        })?;
        writer.checkpoint(&state).expect("the host has room");
        Ok(true)
    }

    fn room(&mut self, _at_once: bool) -> usize {
        usize::MAX
    }

    fn page(&mut self, _address: u64, _page: &[u8]) {
        unreachable!("hardware shows all pages at once");
    }

    fn complete(&mut self) {}
}
