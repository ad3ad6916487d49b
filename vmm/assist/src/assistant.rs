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
    /// A refused instruction of which the board is asked something.
    amid: Option<Begun>,
    assists: Assists,
}

/// A refused instruction at its start.
struct Begun {
    tick: u64,
    state: Box<CpuState>,
}

/// What a refused instruction has come to.
pub(crate) enum Came {
    /// The board is asked something, or the software CPU refuses it as well.
    Exit(Exit),
    Over(Box<Executed>),
}

/// A refused instruction that has been executed, or whose fault has been delivered.
pub(crate) struct Executed {
    pub(crate) before: CpuState,
    pub(crate) after: CpuState,
    pub(crate) retired: bool,
    /// What it comes to besides.
    pub(crate) exit: Option<Exit>,
}

impl Assistant {
    pub(crate) fn assists(&self) -> &Assists {
        &self.assists
    }

    /// Executes the instruction at `state`, at this tick, which was refused for this reason.
    pub(crate) fn begin(
        &mut self,
        ram: &GuestRam,
        tick: u64,
        state: CpuState,
        reason: String,
    ) -> Result<Came, EngineError> {
        let name = match decode_at(ram, &state, state.rip) {
            Some(instruction) => format!("{:?}", instruction.mnemonic()).to_lowercase(),
            None => "(no instruction)".to_owned(),
        };
        *self.assists.entry(name).or_default() += 1;
        if self.cpu.is_none() {
            self.cpu = Some(self.make(ram)?);
        }
        let cpu = self.cpu();
        cpu.start_over(tick, &state)?;
        // Of one that was given up amid its accesses.
        cpu.take_watched_writes();
        self.step(Begun { tick, state: Box::new(state) }, Some(reason))
    }

    /// Goes on with the instruction that it is amid, if it is.
    pub(crate) fn go_on(&mut self) -> Result<Option<Came>, EngineError> {
        self.amid.take().map(|begun| self.step(begun, None)).transpose()
    }

    /// `reason` is why it was refused, if that was just now.
    fn step(&mut self, begun: Begun, reason: Option<String>) -> Result<Came, EngineError> {
        match self.cpu().step(false) {
            Some(exit @ Exit::Access(_)) => {
                self.amid = Some(begun);
                Ok(Came::Exit(exit))
            }
            Some(Exit::Unsupported(too)) => {
                let both = reason.map(|reason| format!("{reason} ({too})"));
                Ok(Came::Exit(Exit::Unsupported(both.unwrap_or(too))))
            }
            exit => self.executed(begun, exit).map(Came::Over),
        }
    }

    fn executed(&mut self, begun: Begun, exit: Option<Exit>) -> Result<Box<Executed>, EngineError> {
        let after = self.cpu().cpu_state()?;
        let retired = self.cpu().tick() != begun.tick;
        Ok(Box::new(Executed { before: *begun.state, after, retired, exit }))
    }

    /// Whether the board was asked something that is not answered, or not all.
    pub(crate) fn is_amid(&self) -> bool {
        self.amid.is_some()
    }

    /// Answers what the board was asked; `None` if [`Self::go_on`] gives what else the instruction wants.
    ///
    /// # Panics
    /// If nothing was asked.
    pub(crate) fn finish_access(
        &mut self,
        value: u128,
    ) -> Result<Option<Box<Executed>>, EngineError> {
        let begun = self.amid.take().expect("the board was asked");
        self.cpu().finish_access(value)?;
        if self.cpu().amid_instruction() {
            self.amid = Some(begun);
            return Ok(None);
        }
        self.executed(begun, None).map(Some)
    }

    /// Somebody sets another state.
    pub(crate) fn give_up(&mut self) {
        self.amid = None;
    }

    /// The writes that are watched, of the instruction that is over.
    pub(crate) fn take_watched_writes(&mut self) -> Vec<Range<u64>> {
        self.cpu().take_watched_writes()
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
    fn cpu(&mut self) -> &mut SoftEngine {
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
