//! [`Assisted`]: an engine, and the software CPU for what it refuses.

use std::sync::Arc;

use reprise_machine::assist::Refusing;
use reprise_machine::clock::TimeBase;
use reprise_machine::engine::{Engine, EngineError, Exit, Kick};
use reprise_machine::inputs::Stamp;
use reprise_trace::checkpoint::EngineState;
use reprise_trace::cpu_state::CpuState;
use reprise_trace::event::Assists;
use reprise_trace::moment::{Moment, TickKind};

use crate::assistant::{Assistant, refused_by_both};

/// An engine that refuses some instructions, and the software CPU that executes those.
pub struct Assisted<E> {
    engine: E,
    assistant: Assistant,
    /// Amid a refused instruction, of which the board is asked something.
    amid: Option<Begun>,
}

/// A refused instruction at its start.
struct Begun {
    tick: u64,
    state: Box<CpuState>,
}

impl<E: Refusing> Assisted<E> {
    /// `engine`, assisted.
    pub fn new(engine: E) -> Self {
        Self { engine, assistant: Assistant::default(), amid: None }
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
        let tick = self.engine.tick();
        let exit = self.assistant.begin(self.engine.ram(), tick, &state)?;
        self.proceed(Begun { tick, state: Box::new(state) }, exit, Some(reason))
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
                return Ok(Some(Exit::Unsupported(refused_by_both(reason, too))));
            }
            _ => {}
        }
        let after = self.assistant.cpu().cpu_state()?;
        let retired = self.assistant.cpu().tick() != begun.tick;
        self.engine.go_on(&begun.state, &after, retired)?;
        Ok(exit)
    }

    /// Has the engine execute until something comes of it.
    fn run_by(
        &mut self,
        mut run: impl FnMut(&mut E) -> Result<Exit, EngineError>,
    ) -> Result<Exit, EngineError> {
        if let Some(begun) = self.amid.take() {
            let exit = self.assistant.cpu().step(false);
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
        let cpu = self.assistant.cpu();
        cpu.finish_access(value)?;
        let amid = cpu.amid_instruction();
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
        self.assistant.set_time_base(base);
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
        self.assistant.assists().clone()
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.engine.kicker()
    }
}
