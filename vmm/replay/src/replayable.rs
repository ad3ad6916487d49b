//! A recording with its checkpoints.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufReader, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use reprise_machine::inputs::Replaying;
use reprise_machine::machine::Machine;
use reprise_machine::ram::GuestRam;
use reprise_trace::checkpoint::{
    CheckpointError, CheckpointInfo, Checkpoints, HiddenState, MachineState,
};
use reprise_trace::recording::Recording;
use reprise_trace::stretches::Course;

use crate::beginning::{Beginning, Start, verification};
use crate::error::ReplayError;
use crate::recorded_clock::{RecordedClock, instructions_before};

/// Where a recording's checkpoints lie: beside it, its name with `.checkpoints` added.
pub fn checkpoints_path(recording: &Path) -> PathBuf {
    let mut name = OsString::from(recording);
    name.push(".checkpoints");
    name.into()
}

/// A recording and the checkpoints that lie beside it. Can be shared between threads that make machines
/// of it.
#[derive(Debug)]
pub struct Replayable {
    recording: Recording,
    checkpoints: Option<Checkpoints>,
    /// How many of them lie within what the log holds.
    usable: usize,
    trouble: Option<CheckpointError>,
    course: OnceLock<Course>,
    /// See [`Replayable::told`].
    told: OnceLock<Vec<Option<u64>>>,
}

impl Replayable {
    /// Opens a recording, which is checked whole, and its checkpoints, of which little is read.
    ///
    /// # Errors
    /// The recording cannot be used. What is wrong with the checkpoints is told by
    /// [`Replayable::trouble`].
    pub fn open(path: &Path) -> Result<Self, ReplayError> {
        let file = File::open(path)
            .map_err(|error| ReplayError::File { path: path.display().to_string(), error })?;
        Ok(Self::of(Recording::open(BufReader::new(file))?, path))
    }

    /// As [`Replayable::open`], of a recording that is open already.
    pub fn of(recording: Recording, path: &Path) -> Self {
        let opened = match File::open(checkpoints_path(path)) {
            Ok(file) => Checkpoints::open(file, &recording.identity()).map(Some),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(CheckpointError::Read(error)),
        };
        let (checkpoints, trouble) = match opened {
            Ok(checkpoints) => (checkpoints, None),
            Err(error) => (None, Some(error)),
        };
        // The log of a recorder that was killed may end before its last checkpoint.
        let records = recording.summary().record_count;
        let list = checkpoints.as_ref().map_or(&[][..], Checkpoints::list);
        let usable = list.partition_point(|info| info.records < records);
        let (course, told) = (OnceLock::new(), OnceLock::new());
        Self { recording, checkpoints, usable, trouble, course, told }
    }

    /// A recording beside which nothing can lie, since it has no name.
    pub fn without_checkpoints(recording: Recording) -> Self {
        let (course, told) = (OnceLock::new(), OnceLock::new());
        Self { recording, checkpoints: None, usable: 0, trouble: None, course, told }
    }

    /// The recording.
    pub fn recording(&self) -> &Recording {
        &self.recording
    }

    /// Which engine executed what part of the recording. The first call reads the whole log.
    pub fn course(&self) -> &Course {
        self.course.get_or_init(|| self.recording.course())
    }

    /// The checkpoints that can be started from, in the order of their ticks; [`Start::Checkpoint`]
    /// counts them from 0. Their pages are not looked at before one is loaded.
    pub fn checkpoints(&self) -> &[CheckpointInfo] {
        let list = self.checkpoints.as_ref().map_or(&[][..], Checkpoints::list);
        &list[..self.usable]
    }

    /// The file of checkpoints, if there is a usable one.
    pub fn checkpoint_file(&self) -> Option<&Checkpoints> {
        self.checkpoints.as_ref()
    }

    /// Why the file of checkpoints cannot be used, if it is there.
    pub fn trouble(&self) -> Option<&CheckpointError> {
        self.trouble.as_ref()
    }

    /// What else a person should know of the checkpoints.
    pub fn notes(&self) -> Vec<String> {
        let Some(file) = &self.checkpoints else { return Vec::new() };
        let mut notes = Vec::new();
        let torn = file.file_bytes() - file.sound_bytes();
        if torn > 0 {
            notes.push(format!(
                "the checkpoints' file is cut off or damaged after {} of its bytes: what stands \
                 before is used",
                file.sound_bytes()
            ));
        }
        if file.damaged() > 0 {
            notes.push(format!("damaged checkpoints, which are left out: {}", file.damaged()));
        }
        let beyond = file.list().len() - self.usable;
        if beyond > 0 {
            notes.push(format!("checkpoints behind the log's end, which are left out: {beyond}"));
        }
        notes
    }

    /// Whether the software CPU can begin at the checkpoint of this number as if it had come there by
    /// itself. At hardware's it cannot: they do not say how many instructions lie before them, nor what
    /// was in a TLB. Nor at those that a recorder took on the software CPU behind another engine, which knew
    /// no better, or that an earlier Reprise made, which counted otherwise there.
    pub fn begins_on_soft(&self, index: usize) -> bool {
        let of_hardware = [HiddenState::of_kvm(), HiddenState::of_branch_clock()];
        let of_hardware = of_hardware.map(|hidden| hidden.digest());
        let Some(info) = self.checkpoints().get(index) else { return false };
        !of_hardware.contains(&info.digest.engine) && self.instructions_before(index).is_some()
    }

    /// Instructions of the run before the checkpoint of this number, if it says so.
    pub fn instructions_before(&self, index: usize) -> Option<u64> {
        let info = self.checkpoints().get(index)?;
        match self.course().ticks_are_instructions(info.records) {
            true => Some(info.moment.tick),
            false => self.told()[index],
        }
    }

    /// What each checkpoint's own state tells of the instructions before it. The first call reads all of
    /// those whose tick does not say it, without their RAM; one that is damaged tells nothing.
    fn told(&self) -> &[Option<u64>] {
        self.told.get_or_init(|| {
            let told = |(index, info): (usize, &CheckpointInfo)| {
                let file = self.checkpoints.as_ref()?;
                let tells = !self.course().ticks_are_instructions(info.records);
                let state = tells.then(|| file.load_state(index).ok()).flatten()?;
                instructions_before(&state.engine.hidden)
            };
            self.checkpoints().iter().enumerate().map(told).collect()
        })
    }

    /// Whether the software CPU can replay from the checkpoint of this number on. At those of the clock
    /// `pmu` it begins with an empty TLB, and does not know how many instructions lie before.
    pub fn replays_on_soft(&self, index: usize) -> bool {
        let of_kvm = HiddenState::of_kvm().digest();
        self.checkpoints().get(index).is_some_and(|info| info.digest.engine != of_kvm)
    }

    /// The checkpoints at which the software CPU can begin as if it had come there by itself.
    pub fn on_soft(&self) -> impl Iterator<Item = &CheckpointInfo> {
        let list = self.checkpoints().iter().enumerate();
        list.filter(|(index, _)| self.begins_on_soft(*index)).map(|(_, info)| info)
    }

    /// The last of those at or before this tick, or else the start of the run.
    pub fn nearest(&self, tick: u64) -> Start {
        let before = self.checkpoints().partition_point(|info| info.moment.tick <= tick);
        let last = (0..before).rev().find(|index| self.begins_on_soft(*index));
        last.map_or(Start::Run, Start::Checkpoint)
    }

    /// As [`Replayable::nearest`], before an instruction of the run.
    pub fn nearest_before_instruction(&self, instruction: u64) -> Start {
        let before = |index: &usize| {
            self.begins_on_soft(*index)
                && self.instructions_before(*index).is_some_and(|before| before <= instruction)
        };
        (0..self.usable).rev().find(before).map_or(Start::Run, Start::Checkpoint)
    }

    /// RAM, CPU, board and log at the start of the run or at a checkpoint.
    ///
    /// # Errors
    /// The recording or the checkpoint cannot be used, or there is no RAM.
    pub fn begin(&self, start: Start) -> Result<Beginning, ReplayError> {
        match start {
            Start::Run => Beginning::of_run(&self.recording, self.course()),
            Start::Checkpoint(index) => {
                let count = self.usable;
                let file = self.checkpoints.as_ref().filter(|_| index < count);
                let file = file.ok_or(CheckpointError::NoSuch { index, count })?;
                Beginning::of_checkpoint(&self.recording, self.course(), file, index)
            }
        }
    }

    /// The same at a state that a machine of this recording was in, whose RAM `fill` puts into a new one.
    ///
    /// # Errors
    /// The log cannot be read from there on, or there is no RAM.
    pub fn begin_from(
        &self,
        state: MachineState,
        fill: &mut dyn FnMut(&mut GuestRam),
    ) -> Result<Beginning, ReplayError> {
        Beginning::of_state(&self.recording, self.course(), state, fill)
    }

    /// A machine that replays the recording on the software CPU, whatever recorded it.
    ///
    /// # Errors
    /// As [`Replayable::begin`], and if the software CPU cannot be had.
    pub fn soft_machine(
        &self,
        start: Start,
    ) -> Result<Machine<RecordedClock, Replaying>, ReplayError> {
        self.soft_machine_with(start, |inputs| inputs)
    }

    /// The same with inputs that `observe` completes.
    ///
    /// # Errors
    /// As [`Replayable::soft_machine`].
    pub fn soft_machine_with(
        &self,
        start: Start,
        observe: impl FnOnce(Replaying) -> Replaying,
    ) -> Result<Machine<RecordedClock, Replaying>, ReplayError> {
        self.soft_machine_from(self.begin(start)?, observe)
    }

    /// The same from where a replay of this recording begins.
    ///
    /// # Errors
    /// If the software CPU cannot be had.
    pub fn soft_machine_from(
        &self,
        beginning: Beginning,
        observe: impl FnOnce(Replaying) -> Replaying,
    ) -> Result<Machine<RecordedClock, Replaying>, ReplayError> {
        let header = self.recording.header();
        let verification = verification(header, self.course(), "soft");
        let header = header.of_stretch(beginning.stretch());
        let make = |ram| RecordedClock::new(ram, &header);
        beginning.into_machine(make, |inputs| observe(inputs.verifying(verification)))
    }
}
