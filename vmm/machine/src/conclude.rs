//! The end of a run: what is logged or compared there, and what becomes of it.

use reprise_trace::event::Ending;
use reprise_trace::log::LogError;

use crate::digest::StateDigest;
use crate::engine::Engine;
use crate::inputs::{EndState, Inputs, Stamp, Stop, Told};
use crate::machine::Machine;
use crate::outcome::{Conclusion, MachineError, Outcome};

impl<E: Engine, I: Inputs> Machine<E, I> {
    /// Closes the log or compares with its end, and says what the run came to.
    pub(crate) fn conclude(&mut self, stop: Stop) -> Result<Outcome, MachineError> {
        match stop {
            Stop::Ended { ending, exact } => match self.end(&ending, exact) {
                Ok((stamp, state)) => Ok(self.outcome(Conclusion::Ended(ending), stamp, state)),
                // The end itself may differ, be missing, or not fit on the disk.
                Err(Stop::Ended { .. }) => unreachable!("an end does not end again"),
                Err(stop) => self.conclude(stop),
            },
            Stop::CutShort(damage) => self.stand(Conclusion::CutShort { damage }),
            Stop::TargetReached => self.stand(Conclusion::TargetReached),
            Stop::HandedOver(to) => {
                let stamp = Stamp::of_tick(self.engine.tick());
                Ok(self.outcome(Conclusion::HandedOver(*to), stamp, None))
            }
            Stop::Diverged(divergence) => {
                let stamp = Stamp::of_tick(self.engine.tick());
                Ok(self.outcome(Conclusion::Diverged(*divergence), stamp, None))
            }
            Stop::Engine(error) => match self.inputs.close_without_end() {
                Err(Stop::Unwritable(error)) => Err(self.unwritable(error)),
                _ => Err(MachineError::Engine(error)),
            },
            Stop::Overshot(overshoot) => Err(MachineError::Overshot(overshoot)),
            Stop::Unwritable(error) => Err(self.unwritable(error)),
            Stop::Watched => Err(MachineError::Stopped),
        }
    }

    fn unwritable(&self, error: LogError) -> MachineError {
        MachineError::Recording { error, kept_until: self.inputs.confirmed_until() }
    }

    /// The run ended at this boundary, or, if not `exact`, somewhere behind this tick.
    fn end(&mut self, ending: &Ending, exact: bool) -> Result<(Stamp, Option<StateDigest>), Stop> {
        let effects = self.effects.digest();
        let told = Told { assists: self.engine.assists(), left_open: self.engine.left_open() };
        if !exact {
            let stamp = Stamp::of_tick(self.engine.tick());
            self.inputs.end(stamp, effects, ending, None, told)?;
            return Ok((stamp, None));
        }
        let (state, cpu) = (self.state_digest()?, self.engine.cpu_state()?);
        let stamp = Stamp { moment: self.engine.moment()?, cpu_digest: state.cpu_short() };
        let undefined_flags = self.engine.undefined_flags();
        let end = EndState { digest: &state, cpu: &cpu, undefined_flags };
        let state = self.inputs.end(stamp, effects, ending, Some(end), told)?;
        Ok((stamp, state))
    }

    /// The outcome of a replay that stops at a boundary.
    fn stand(&mut self, conclusion: Conclusion) -> Result<Outcome, MachineError> {
        let state = self.state_digest()?;
        let stamp = Stamp { moment: self.engine.moment()?, cpu_digest: state.cpu_short() };
        Ok(self.outcome(conclusion, stamp, Some(state)))
    }

    fn outcome(&self, conclusion: Conclusion, stamp: Stamp, state: Option<StateDigest>) -> Outcome {
        Outcome {
            conclusion,
            moment: stamp.moment,
            ticks: self.engine.tick(),
            virtual_ns: self.now().ns,
            effects: self.effects.digest(),
            state,
            events: self.inputs.events(),
            verified_until: self.inputs.confirmed_until(),
            set_aside: self.inputs.set_aside().to_vec(),
            accesses: self.accesses,
            interrupts: self.interrupts,
            hand_overs: self.hand_overs.clone(),
            assists: self.engine.assists(),
            left_open: self.engine.left_open(),
        }
    }
}
