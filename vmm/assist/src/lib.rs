//! Assist: an instruction that an engine refuses is executed by the software CPU.
//!
//! KVM's emulator does not know every instruction: where it has to emulate (all of the kernel on a host
//! without hardware virtualisation, accesses to devices elsewhere) it gives up on the others.
//! [`Assisted`] then takes the CPU's state out of the engine, has the software CPU execute that one
//! instruction over the same guest RAM, and puts the state back. Accesses to the board go to the
//! same board, as the engine's own; a fault that the instruction raises is delivered. The recording does not know:
//! a tick is what it would have been.
#![forbid(unsafe_code)]

use std::sync::Arc;

use reprise_branch_clock::guest_code::decode_at;
use reprise_cpu::engine::SoftEngine;
use reprise_cpu::translate::Translation;
use reprise_machine::assist::Refusing;
use reprise_machine::clock::TimeBase;
use reprise_machine::engine::{Engine, EngineError, Exit, Kick};
use reprise_machine::inputs::Stamp;
use reprise_trace::checkpoint::EngineState;
use reprise_trace::cpu_state::CpuState;
use reprise_trace::event::Assists;
use reprise_trace::moment::{Moment, TickKind};

/// An engine that refuses some instructions, and the software CPU that executes those.
pub struct Assisted<E> {
    engine: E,
    /// Made at the first refusal.
    assistant: Option<SoftEngine>,
    /// Amid a refused instruction, of which the board is asked something.
    amid: Option<Begun>,
    time_base: Option<TimeBase>,
    assists: Assists,
}

/// A refused instruction at its start.
struct Begun {
    tick: u64,
    state: Box<CpuState>,
}

impl<E: Refusing> Assisted<E> {
    /// `engine`, assisted.
    pub fn new(engine: E) -> Self {
        Self { engine, assistant: None, amid: None, time_base: None, assists: Assists::new() }
    }

    /// The engine itself.
    pub fn engine(&mut self) -> &mut E {
        &mut self.engine
    }

    /// What an exit of the engine comes to: itself, or that of the instruction that it refuses; `None` to
    /// go on.
    fn assist(&mut self, exit: Exit) -> Result<Option<Exit>, EngineError> {
        let Exit::Unsupported(reason) = exit else { return Ok(Some(exit)) };
        if !self.engine.has_refused()? {
            return Ok(Some(Exit::Unsupported(reason)));
        }
        let state = self.engine.cpu_state()?;
        let name = match decode_at(self.engine.ram(), &state, state.rip) {
            Some(instruction) => format!("{:?}", instruction.mnemonic()).to_lowercase(),
            None => "(no instruction)".to_owned(),
        };
        *self.assists.entry(name).or_default() += 1;
        let tick = self.engine.tick();
        let assistant = self.assistant()?;
        assistant.start_over(tick, &state)?;
        let exit = assistant.step(false);
        self.proceed(Begun { tick, state: Box::new(state) }, exit, Some(reason))
    }

    fn assistant(&mut self) -> Result<&mut SoftEngine, EngineError> {
        if self.assistant.is_none() {
            let mut assistant = SoftEngine::new(self.engine.ram().share())?;
            assistant.set_translation(Translation::Never);
            if let Some(base) = self.time_base {
                assistant.set_time_base(base);
            }
            self.assistant = Some(assistant);
        }
        Ok(self.assistant.as_mut().expect("it has just been made"))
    }

    /// The instruction has come to `exit`, or is over.
    fn proceed(
        &mut self,
        begun: Begun,
        exit: Option<Exit>,
        reason: Option<String>,
    ) -> Result<Option<Exit>, EngineError> {
        match exit {
            Some(Exit::Access(_)) => {
                self.amid = Some(begun);
                return Ok(exit);
            }
            Some(Exit::Unsupported(too)) => {
                let reason = reason.map_or(too.clone(), |reason| format!("{reason} ({too})"));
                return Ok(Some(Exit::Unsupported(reason)));
            }
            _ => {}
        }
        let assistant = self.assistant.as_mut().expect("it assists");
        let after = assistant.cpu_state()?;
        let retired = assistant.tick() != begun.tick;
        self.engine.go_on(&begun.state, &after, retired)?;
        Ok(exit)
    }

    /// Has the engine execute until something comes of it.
    fn run_by(
        &mut self,
        mut run: impl FnMut(&mut E) -> Result<Exit, EngineError>,
    ) -> Result<Exit, EngineError> {
        if let Some(begun) = self.amid.take() {
            let exit = self.assistant()?.step(false);
            if let Some(exit) = self.proceed(begun, exit, None)? {
                return Ok(exit);
            }
        }
        loop {
            let exit = run(&mut self.engine)?;
            if let Some(exit) = self.assist(exit)? {
                return Ok(exit);
            }
        }
    }
}

impl<E: Refusing> Engine for Assisted<E> {
    fn tick_kind(&self) -> TickKind {
        self.engine.tick_kind()
    }

    fn tick(&self) -> u64 {
        self.engine.tick()
    }

    fn run(&mut self, until: u64) -> Result<Exit, EngineError> {
        self.run_by(|engine| engine.run(until))
    }

    fn run_to(&mut self, stamp: &Stamp) -> Result<Exit, EngineError> {
        self.run_by(|engine| engine.run_to(stamp))
    }

    fn stands_exactly(&self) -> bool {
        self.engine.stands_exactly()
    }

    fn sets_accessed_bits_early(&self) -> bool {
        self.engine.sets_accessed_bits_early()
    }

    fn finish_access(&mut self, value: u128) -> Result<(), EngineError> {
        let Some(begun) = self.amid.take() else {
            return self.engine.finish_access(value);
        };
        let assistant = self.assistant()?;
        assistant.finish_access(value)?;
        let amid = assistant.amid_instruction();
        self.engine.count_access();
        if amid {
            // What else the instruction wants the next run hands over.
            self.amid = Some(begun);
        } else {
            self.proceed(begun, None, None)?;
        }
        Ok(())
    }

    fn amid_accesses(&mut self) -> Result<bool, EngineError> {
        Ok(self.amid.is_some() || self.engine.amid_accesses()?)
    }

    fn interruptible(&mut self) -> Result<bool, EngineError> {
        Ok(self.amid.is_none() && self.engine.interruptible()?)
    }

    fn set_interrupt_request(&mut self, wanted: bool) {
        self.engine.set_interrupt_request(wanted);
    }

    fn inject(&mut self, vector: u8) -> Result<(), EngineError> {
        self.engine.inject(vector)
    }

    fn set_time_base(&mut self, base: TimeBase) {
        self.time_base = Some(base);
        if let Some(assistant) = &mut self.assistant {
            assistant.set_time_base(base);
        }
        self.engine.set_time_base(base);
    }

    fn moment(&mut self) -> Result<Moment, EngineError> {
        self.engine.moment()
    }

    fn cpu_state(&mut self) -> Result<CpuState, EngineError> {
        self.engine.cpu_state()
    }

    fn set_cpu_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.amid = None;
        self.engine.set_cpu_state(state)
    }

    fn read_ram(&self, address: u64, bytes: &mut [u8]) {
        self.engine.read_ram(address, bytes);
    }

    fn visit_ram(&self, visit: &mut dyn FnMut(u64, &[u8])) {
        self.engine.visit_ram(visit);
    }

    fn start_capture(&mut self, visit: &mut dyn FnMut(u64, &[u8])) {
        self.engine.start_capture(visit);
    }

    fn continue_capture(&mut self, max_pages: usize, visit: &mut dyn FnMut(u64, &[u8])) -> bool {
        self.engine.continue_capture(max_pages, visit)
    }

    fn save(&mut self) -> Result<Option<EngineState>, EngineError> {
        if self.amid.is_some() { Ok(None) } else { self.engine.save() }
    }

    fn restore(&mut self, state: &EngineState) -> Result<(), EngineError> {
        self.amid = None;
        self.engine.restore(state)
    }

    fn assists(&self) -> Assists {
        self.assists.clone()
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.engine.kicker()
    }
}
