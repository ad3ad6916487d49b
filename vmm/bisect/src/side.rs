//! One of the two that are compared: a recording, and how machines are made that replay it.

use reprise_cpu::translate::Translation;
use reprise_machine::engine::{Engine, EngineError};
use reprise_machine::inputs::Replaying;
use reprise_machine::inputs::Verification;
use reprise_machine::ram::GuestRam;
use reprise_machine::stepping::Standing;
use reprise_replay::{
    Beginning, OnSoftware, RecordedClock, ReplayError, Replayable, Start, verification,
};
use reprise_trace::header::Header;

use crate::pair::Base;
use crate::replica::{Replica, Runner};

type Make<'a> = Box<dyn Fn(Beginning) -> Result<Box<dyn Replica>, ReplayError> + 'a>;

/// A recording and an engine for it.
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
        Self::with_engine(name, replayable, move |ram, header| {
            let mut engine = RecordedClock::new(ram, header)?;
            engine.software().set_translation(translation);
            Ok(engine)
        })
    }

    /// The recording replayed by any engine that has the recording's clock, can be moved by instructions
    /// ([`Engine::pause_at`], or because they are its ticks) and saves its state. The header is the one that
    /// is true where the engine begins.
    pub fn with_engine<E: Engine + 'static>(
        name: &str,
        replayable: &'a Replayable,
        make_engine: impl Fn(GuestRam, &Header) -> Result<E, EngineError> + 'a,
    ) -> Self {
        let verification: Verification =
            verification(replayable.recording().header(), replayable.course(), "soft");
        let make = move |beginning: Beginning| -> Result<Box<dyn Replica>, ReplayError> {
            let header = replayable.recording().header().of_stretch(beginning.stretch());
            let set_up = |inputs: Replaying| inputs.verifying(verification);
            Ok(Box::new(beginning.into_machine(|ram| make_engine(ram, &header), set_up)?))
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

    /// At a moment that two machines had in common, where this one stood so.
    pub(crate) fn resume(&self, base: &Base, standing: &Standing) -> Result<Runner, ReplayError> {
        let (state, image) = (standing.state.clone(), &base.image);
        let beginning = self.replayable.begin_from(state, &mut |ram| image.fill(ram))?;
        let replica = (self.make)(beginning)?;
        Ok(Runner::resumed(replica, base.instructions, standing.amid_stretch))
    }
}
