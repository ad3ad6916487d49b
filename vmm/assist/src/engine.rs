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

use crate::assistant::{Assistant, Came, Executed};

/// An engine that refuses some instructions, and the software CPU that executes those.
pub struct Assisted<E> {
    engine: E,
    assistant: Assistant,
}

impl<E: Refusing> Assisted<E> {
    /// `engine`, assisted.
    pub fn new(engine: E) -> Self {
        Self { engine, assistant: Assistant::default() }
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
        let (state, tick) = (self.engine.cpu_state()?, self.engine.tick());
        let came = self.assistant.begin(self.engine.ram(), tick, state, reason)?;
        self.proceed(came)
    }

    /// Behind an instruction that is over the engine goes on.
    fn proceed(&mut self, came: Came) -> Result<Option<Exit>, EngineError> {
        match came {
            Came::Exit(exit) => Ok(Some(exit)),
            Came::Over(executed) => {
                let Executed { before, after, retired, exit } = *executed;
                self.engine.go_on(&before, &after, retired)?;
                Ok(exit)
            }
        }
    }

    /// Has the engine execute until something comes of it.
    fn run_by(
        &mut self,
        mut run: impl FnMut(&mut E) -> Result<Exit, EngineError>,
    ) -> Result<Exit, EngineError> {
        if let Some(came) = self.assistant.go_on()?
            && let Some(exit) = self.proceed(came)?
        {
            return Ok(exit);
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
        if !self.assistant.is_amid() {
            return self.engine.finish_access(value);
        }
        let executed = self.assistant.finish_access(value)?;
        self.engine.count_access();
        if let Some(executed) = executed {
            self.proceed(Came::Over(executed))?;
        }
        Ok(())
    }

    fn amid_accesses(&mut self) -> Result<bool, EngineError> {
        Ok(self.assistant.is_amid() || self.engine.amid_accesses()?)
    }

    fn interruptible(&mut self) -> Result<bool, EngineError> {
        Ok(!self.assistant.is_amid() && self.engine.interruptible()?)
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
        self.assistant.give_up();
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
        if self.assistant.is_amid() { Ok(None) } else { self.engine.save() }
    }

    fn restore(&mut self, state: &EngineState) -> Result<(), EngineError> {
        self.assistant.give_up();
        self.engine.restore(state)
    }

    fn assists(&self) -> Assists {
        self.assistant.assists().clone()
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.engine.kicker()
    }
}
