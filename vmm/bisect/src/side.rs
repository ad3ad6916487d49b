//! One of the two that are compared: a recording, and how machines are made that replay it.

use reprise_cpu::engine::SoftEngine;
use reprise_cpu::translate::Translation;
use reprise_machine::engine::{Engine, EngineError};
use reprise_machine::inputs::Verification;
use reprise_machine::ram::GuestRam;
use reprise_replay::{Beginning, ReplayError, Replayable, Start, verification};
use reprise_trace::checkpoint::MachineState;

use crate::image::Image;
use crate::replica::{Replica, Runner};

type Make<'a> = Box<dyn Fn(Beginning) -> Result<Box<dyn Replica>, ReplayError> + 'a>;

/// A recording and an engine for it. The engine's ticks are instructions.
pub struct Side<'a> {
    /// What it is called in reports.
    pub name: String,
    replayable: &'a Replayable,
    make: Make<'a>,
}

impl std::fmt::Debug for Side<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Side").field("name", &self.name).finish_non_exhaustive()
    }
}

impl<'a> Side<'a> {
    /// The recording replayed by the software CPU, which translates blocks as told.
    pub fn soft(name: &str, replayable: &'a Replayable, translation: Translation) -> Self {
        Self::with_engine(name, replayable, move |ram| {
            let mut engine = SoftEngine::new(ram)?;
            engine.set_translation(translation);
            Ok(engine)
        })
    }

    /// The recording replayed by any engine whose ticks are instructions and that saves its state.
    pub fn with_engine<E: Engine + 'static>(
        name: &str,
        replayable: &'a Replayable,
        make_engine: impl Fn(GuestRam) -> Result<E, EngineError> + 'a,
    ) -> Self {
        let verification: Verification =
            verification(replayable.recording().header(), replayable.course(), "soft");
        let make = move |beginning: Beginning| -> Result<Box<dyn Replica>, ReplayError> {
            let set_up =
                |inputs: reprise_machine::inputs::Replaying| inputs.verifying(verification);
            Ok(Box::new(beginning.into_machine(&make_engine, set_up)?))
        };
        Self { name: name.to_owned(), replayable, make: Box::new(make) }
    }

    /// The recording.
    pub fn replayable(&self) -> &'a Replayable {
        self.replayable
    }

    pub(crate) fn ram_mib(&self) -> u64 {
        self.replayable.recording().header().machine.ram_mib
    }

    pub(crate) fn begin(&self, start: Start) -> Result<Runner, ReplayError> {
        Ok(Runner::new((self.make)(self.replayable.begin(start)?)?))
    }

    pub(crate) fn resume(
        &self,
        state: &MachineState,
        image: &Image,
    ) -> Result<Runner, ReplayError> {
        let beginning = self.replayable.begin_from(state.clone(), &mut |ram| image.fill(ram))?;
        Ok(Runner::new((self.make)(beginning)?))
    }
}
