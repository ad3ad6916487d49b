//! A copy of the CPU that goes ahead, to see where the guest will come, and takes back what it wrote.

use reprise_machine::engine::{Engine, EngineError, Exit};
use reprise_trace::cpu_state::CpuState;
use reprise_trace::moment::Moment;

use crate::cpu::Cpu;
use crate::engine::SoftEngine;
use crate::other_maker::OtherMaker;
use crate::translate::Translation;

/// The copy. RAM is the original's, which must not run before [`Scout::take_back`]; whoever drops a scout takes
/// back as well.
#[derive(Debug)]
pub struct Scout(SoftEngine);

impl SoftEngine {
    /// A copy that stands where the guest does; `None` amid an instruction, or if the guest sleeps. One that was
    /// sent `before` is sent again: to make one costs far more than its way.
    ///
    /// # Errors
    /// If the host refuses the memory for it.
    pub fn scout(&mut self, before: Option<Scout>) -> Result<Option<Scout>, EngineError> {
        let Some(state) = self.save()?.filter(|state| !state.cpu.halted) else { return Ok(None) };
        let mut scout = match before {
            Some(scout) => scout,
            None => {
                let mut engine = Self::new(self.ram().share())?;
                engine.set_translation(Translation::Never);
                Scout(engine)
            }
        };
        scout.take_back();
        let copy = &mut scout.0;
        // The original has written RAM since.
        copy.start_over(state.tick, &state.cpu)?;
        copy.time_stands_still = self.time_stands_still;
        copy.cpu_mut().become_like(self.cpu());
        copy.restore(&state)?;
        copy.set_conditional_branches(self.conditional_branches());
        copy.set_interrupt_request(self.interrupt_is_requested());
        copy.cpu_mut().memory.physical.keep_all();
        Ok(Some(scout))
    }
}

impl Cpu {
    /// Takes over what was chosen for another CPU, which executes the same guest.
    fn become_like(&mut self, other: &Self) {
        self.time_base = other.time_base;
        self.counts_branches = other.counts_branches;
        self.hides_time_stamp = other.hides_time_stamp;
        self.time_stamps = other.time_stamps;
        self.other_maker = OtherMaker::is_like(&other.other_maker);
    }
}

impl Scout {
    /// Executes an instruction. Gives false where an exit comes first.
    ///
    /// # Errors
    /// If the engine fails.
    pub fn step(&mut self) -> Result<bool, EngineError> {
        let next = self.0.tick() + 1;
        Ok(self.0.run(next)? == Exit::TickReached)
    }

    /// Conditional branches retired, as the original counts them.
    pub fn conditional_branches(&self) -> u64 {
        self.0.conditional_branches()
    }

    /// Where it stands.
    ///
    /// # Errors
    /// If the engine fails.
    pub fn moment(&mut self) -> Result<Moment, EngineError> {
        self.0.moment()
    }

    /// Its CPU state.
    ///
    /// # Errors
    /// If the engine fails.
    pub fn cpu_state(&mut self) -> Result<CpuState, EngineError> {
        self.0.cpu_state()
    }

    /// RAM becomes what it was.
    pub fn take_back(&mut self) {
        self.0.cpu_mut().memory.physical.take_back_writes();
    }
}

impl Drop for Scout {
    fn drop(&mut self) {
        self.take_back();
    }
}
