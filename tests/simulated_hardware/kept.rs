//! Recordings of simulated hardware that lie in a file with their checkpoints, as the product's do, and
//! replays of them that go back where the hardware was late.

use std::cell::RefCell;
use std::fs::File;
use std::path::Path;

use reprise_machine::checkpoint::{Checkpointer, Consistent, checkpoint};
use reprise_machine::clock::TimeSource;
use reprise_machine::divergence::Divergence;
use reprise_machine::engine::EngineError;
use reprise_machine::inputs::Recording as RecordingInputs;
use reprise_machine::machine::Machine;
use reprise_machine::outcome::Outcome;
use reprise_replay::{
    Arrived, RecordedClock, ReplayError, Replayable, Start, checkpoints_path, verification,
};
use reprise_trace::checkpoint::CheckpointWriter;
use reprise_trace::event::Record;
use reprise_trace::log::LogWriter;
use reprise_trace::recording::RecordingWriter;
use tempfile::TempDir;

use crate::case::{Case, Clocked, Recorded};
use crate::world::SeededWorld;

/// What the recording's file is called.
const FILE: &str = "recording.rr";

/// A recording in a file.
pub(crate) struct Kept {
    /// Removes the files in the end.
    directory: TempDir,
    pub(crate) replayable: Replayable,
    pub(crate) recorded: Recorded,
}

impl Case<'_> {
    /// Records into a file, with a checkpoint every so many ticks.
    pub(crate) fn record_to_file<C: Clocked>(&self, hardware: &C, checkpoint_every: u64) -> Kept {
        let directory = tempfile::tempdir().expect("the host has room");
        let path = directory.path().join(FILE);
        let file = File::create(&path).expect("the host has room");
        let header = hardware.header(self);
        let mut writer = RecordingWriter::create(file, &header).expect("it is written");
        writer.write_image(0, self.source.kernel).expect("it is written");
        if let Some(initrd) = self.source.initrd {
            writer.write_image(1, initrd).expect("it is written");
        }
        let identity = writer.identity();
        let (engine, board) = self.start(hardware);
        let seed = hardware.hardware().disturbance.seed;
        let world = SeededWorld::new(seed, self.typed, C::simulated(&engine).world_clock_ns())
            .typing_within(self.longest_pause_ns)
            .stopping_at(self.stops_ns);
        let inputs = RecordingInputs::new(world, LogWriter::new(writer));
        let mut machine = Machine::new(engine, board, inputs, TimeSource::Host);
        machine.set_checkpointer(Box::new(ToFile::beside(&path, &identity, checkpoint_every)));
        let outcome = machine.run().expect("the machine runs");
        let (engine, _, inputs) = machine.into_parts();
        let (world, sink) = inputs.into_parts();
        sink.expect("the log is closed").finish().expect("it is written");
        let replayable = Replayable::open(&path).expect("it is a recording");
        let console = String::from_utf8_lossy(&world.console).into_owned();
        let records = records_of(&replayable);
        let recorded = Recorded { outcome, records, console, counts: engine.counts() };
        Kept { directory, replayable, recorded }
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
    /// Times that an accessed bit, set early, led the guest another way.
    pub(crate) times_parted: u32,
}

impl Kept {
    /// Replays on hardware that may be late, another one after each time, and goes back where it was; and begins
    /// anew where the guest went another way, which it does not on the same hardware but for the accessed bits
    /// that it set early.
    pub(crate) fn replay<C: Clocked>(
        &self,
        start: Start,
        hardware: &C,
    ) -> Result<Replay, ReplayError> {
        let (mut machines, mut records_before) = (0, 0);
        let latest = RefCell::new((start, hardware.with_seed_added(0)));
        let arrived = self.replayable.run_going_back(
            self.replayable.begin(start)?,
            |beginning| {
                let hardware = hardware.with_seed_added(machines << 32);
                machines += 1;
                records_before = beginning.records();
                let begins = beginning.start().expect("the file holds it");
                latest.replace((begins, hardware.clone()));
                beginning.into_machine(|ram| hardware.engine(ram), |inputs| inputs)
            },
            |machine| {
                let outcome = machine.run()?;
                if let Some(divergence) = outcome.divergence() {
                    let (begins, hardware) = &*latest.borrow();
                    self.agrees_with_bits_spared(*begins, hardware, divergence);
                }
                Ok(outcome)
            },
        )?;
        let Arrived { outcome, times_back, times_parted, .. } = arrived;
        let mut outcome = outcome.expect("the machine runs");
        outcome.events += records_before;
        Ok(Replay { outcome, times_back, times_parted })
    }

    /// The same hardware, which sets no accessed bit early, does not come to this divergence.
    fn agrees_with_bits_spared<C: Clocked>(
        &self,
        start: Start,
        hardware: &C,
        divergence: &Divergence,
    ) {
        let sparing = hardware.sparing_accessed_bits();
        let beginning = self.replayable.begin(start).expect("it begins");
        let machine = beginning.into_machine(|ram| sparing.engine(ram), |inputs| inputs);
        let outcome = machine.expect("it begins").run();
        if let Some(other) = outcome.as_ref().ok().and_then(Outcome::divergence) {
            panic!("no accessed bit led there: {divergence}; and with none set early: {other}");
        }
    }

    /// Replays on the software CPU.
    pub(crate) fn replay_on_software(&self, start: Start) -> Result<Outcome, ReplayError> {
        let beginning = self.replayable.begin(start)?;
        let records_before = beginning.records();
        let header = self.replayable.recording().header();
        let verification = verification(header, self.replayable.course(), "soft");
        let mut machine = beginning.into_machine(
            |ram| RecordedClock::new(ram, header),
            |inputs| inputs.verifying(verification),
        )?;
        let mut outcome = machine.run().expect("the machine runs");
        outcome.events += records_before;
        Ok(outcome)
    }

    /// The same recording with checkpoints that the software CPU makes of it instead: so many, at these ticks.
    pub(crate) fn with_checkpoints_of_software(self, from: u64, every: u64, count: usize) -> Self {
        let path = self.directory.path().join(FILE);
        let identity = self.replayable.recording().identity();
        let mut machine = self.replayable.soft_machine(Start::Run).expect("it begins");
        let to_file = ToFile::beside(&path, &identity, every);
        machine.set_checkpointer(Box::new(ToFile { next: from, left: count, ..to_file }));
        machine.run().expect("the machine runs");
        drop(machine);
        let replayable = Replayable::open(&path).expect("it is a recording");
        Self { replayable, ..self }
    }
}

/// Writes checkpoints as they are taken.
pub(crate) struct ToFile {
    every: u64,
    next: u64,
    /// So many more, at most.
    left: usize,
    writer: CheckpointWriter<File>,
}

impl ToFile {
    pub(crate) fn beside(recording: &Path, identity: &[u8; 32], every: u64) -> Self {
        let file = File::create(checkpoints_path(recording)).expect("the host has room");
        let writer = CheckpointWriter::create(file, identity).expect("it is written");
        Self { every, next: every, left: usize::MAX, writer }
    }
}

impl Checkpointer for ToFile {
    fn due_at(&mut self, _tick: u64, _virtual_ns: u64) -> Option<u64> {
        (self.left > 0).then_some(self.next)
    }

    fn start(&mut self, machine: Consistent<'_>) -> Result<bool, EngineError> {
        self.next = machine.tick() + self.every;
        self.left -= 1;
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
        unreachable!("all pages are shown at once");
    }

    fn complete(&mut self) {}
}
