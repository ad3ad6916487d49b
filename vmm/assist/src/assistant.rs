//! The software CPU that executes what is refused.

use std::ops::Range;

use reprise_branch_clock::guest_code::decode_at;
use reprise_cpu::engine::SoftEngine;
use reprise_cpu::translate::Translation;
use reprise_machine::clock::TimeBase;
use reprise_machine::engine::{Engine, EngineError, Exit};
use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::CpuState;
use reprise_trace::event::Assists;

/// The software CPU, made at the first refusal, and how often it has assisted.
#[derive(Default)]
pub(crate) struct Assistant {
    cpu: Option<SoftEngine>,
    time_base: Option<TimeBase>,
    /// What was watched, and what no longer, in that order.
    watched: Vec<(Range<u64>, bool)>,
    assists: Assists,
}

impl Assistant {
    pub(crate) fn assists(&self) -> &Assists {
        &self.assists
    }

    /// Executes the instruction at `state`, at this tick. Gives its exit, if it has one.
    pub(crate) fn begin(
        &mut self,
        ram: &GuestRam,
        tick: u64,
        state: &CpuState,
    ) -> Result<Option<Exit>, EngineError> {
        let name = match decode_at(ram, state, state.rip) {
            Some(instruction) => format!("{:?}", instruction.mnemonic()).to_lowercase(),
            None => "(no instruction)".to_owned(),
        };
        *self.assists.entry(name).or_default() += 1;
        if self.cpu.is_none() {
            self.cpu = Some(self.make(ram)?);
        }
        let cpu = self.cpu();
        cpu.start_over(tick, state)?;
        // Of one that was given up amid its accesses.
        cpu.take_watched_writes();
        Ok(cpu.step(false))
    }

    fn make(&self, ram: &GuestRam) -> Result<SoftEngine, EngineError> {
        let mut cpu = SoftEngine::new(ram.share())?;
        cpu.set_translation(Translation::Never);
        cpu.count_conditional_branches(true);
        if let Some(base) = self.time_base {
            cpu.set_time_base(base);
        }
        for (range, watch) in &self.watched {
            cpu.watch_writes(range.clone(), *watch);
        }
        Ok(cpu)
    }

    /// The software CPU.
    ///
    /// # Panics
    /// If it has not begun any instruction.
    pub(crate) fn cpu(&mut self) -> &mut SoftEngine {
        self.cpu.as_mut().expect("it assists")
    }

    /// Conditional branches that it has retired.
    pub(crate) fn conditional_branches(&self) -> u64 {
        self.cpu.as_ref().map_or(0, SoftEngine::conditional_branches)
    }

    pub(crate) fn set_time_base(&mut self, base: TimeBase) {
        self.time_base = Some(base);
        if let Some(cpu) = &mut self.cpu {
            cpu.set_time_base(base);
        }
    }

    pub(crate) fn watch_writes(&mut self, physical: Range<u64>, watch: bool) {
        if let Some(cpu) = &mut self.cpu {
            cpu.watch_writes(physical.clone(), watch);
        }
        self.watched.push((physical, watch));
    }
}

/// Both reasons, of who refused first and of the software CPU.
pub(crate) fn refused_by_both(first: Option<String>, too: String) -> String {
    first.map_or(too.clone(), |first| format!("{first} ({too})"))
}
