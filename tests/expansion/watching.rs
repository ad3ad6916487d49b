//! An engine that is run instruction by instruction, whatever is asked of it, and looked at in between.

use std::collections::BTreeMap;

use reprise_machine::engine::{Engine, EngineError, Exit};
use reprise_tests::ask_engine_within;
use reprise_trace::cpu_state::CpuState;

/// `E`, and the state that it was seen in, by the number of the instruction that comes next.
#[derive(Debug)]
pub(crate) struct Watching<E> {
    engine: E,
    pub(crate) seen: BTreeMap<u64, CpuState>,
}

impl<E: Engine> Watching<E> {
    pub(crate) fn new(engine: E) -> Self {
        Self { engine, seen: BTreeMap::new() }
    }
}

impl<E: Engine> Engine for Watching<E> {
    ask_engine_within!(engine);

    fn run(&mut self, until: u64) -> Result<Exit, EngineError> {
        loop {
            let tick = self.engine.tick();
            let state = self.engine.cpu_state()?;
            self.seen.insert(tick, state);
            let exit = self.engine.run((tick + 1).min(until))?;
            if exit != Exit::TickReached || self.engine.tick() >= until {
                return Ok(exit);
            }
        }
    }

    fn finish_access(&mut self, value: u128) -> Result<(), EngineError> {
        self.engine.finish_access(value)
    }

    fn set_interrupt_request(&mut self, wanted: bool) {
        self.engine.set_interrupt_request(wanted);
    }
}
