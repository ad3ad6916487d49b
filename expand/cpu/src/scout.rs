//! A copy of the CPU that goes ahead, to see where the guest will come, and takes back what it wrote.

use reprise_machine::engine::{Engine, EngineError, Exit};
use reprise_trace::cpu_state::CpuState;
use reprise_trace::moment::Moment;

use crate::cpu::Cpu;
use crate::engine::SoftEngine;
use crate::other_maker::OtherMaker;
use crate::translate::Translation;

/// The copy. RAM is the original's, which must not run before [`Scout::take_back`].
#[derive(Debug)]
#[must_use = "what it writes has to be taken back"]
pub struct Scout(SoftEngine);

impl SoftEngine {
    /// A copy that stands where the guest does; `None` amid an instruction, or if the guest sleeps.
    ///
    /// # Errors
    /// If the host refuses the memory for it.
    pub fn scout(&mut self) -> Result<Option<Scout>, EngineError> {
        let Some(state) = self.save()?.filter(|state| !state.cpu.halted) else { return Ok(None) };
        let mut scout = Self::new(self.ram().share())?;
        scout.set_translation(Translation::Never);
        scout.time_stands_still = self.time_stands_still;
        scout.cpu_mut().become_like(self.cpu());
        scout.restore(&state)?;
        scout.set_conditional_branches(self.conditional_branches());
        scout.set_interrupt_request(self.interrupt_is_requested());
        scout.cpu_mut().memory.physical.keep_all();
        Ok(Some(Scout(scout)))
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
    pub fn take_back(mut self) {
        self.0.cpu_mut().memory.physical.take_back_writes();
    }
}
