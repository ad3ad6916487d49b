//! An engine that is run instruction by instruction, whatever is asked of it, and looked at in between.

use std::collections::BTreeMap;
use std::sync::Arc;

use reprise_machine::clock::TimeBase;
use reprise_machine::engine::{Engine, EngineError, Exit, Kick};
use reprise_trace::cpu_state::CpuState;
use reprise_trace::moment::{Moment, TickKind};

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

    fn tick_kind(&self) -> TickKind {
        self.engine.tick_kind()
    }

    fn tick(&self) -> u64 {
        self.engine.tick()
    }

    fn finish_access(&mut self, value: u128) -> Result<(), EngineError> {
        self.engine.finish_access(value)
    }

    fn interruptible(&mut self) -> Result<bool, EngineError> {
        self.engine.interruptible()
    }

    fn set_interrupt_request(&mut self, wanted: bool) {
        self.engine.set_interrupt_request(wanted);
    }

    fn inject(&mut self, vector: u8) -> Result<(), EngineError> {
        self.engine.inject(vector)
    }

    fn set_time_base(&mut self, base: TimeBase) {
        self.engine.set_time_base(base);
    }

    fn moment(&mut self) -> Result<Moment, EngineError> {
        self.engine.moment()
    }

    fn cpu_state(&mut self) -> Result<CpuState, EngineError> {
        self.engine.cpu_state()
    }

    fn set_cpu_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.engine.set_cpu_state(state)
    }

    fn read_ram(&self, address: u64, bytes: &mut [u8]) {
        self.engine.read_ram(address, bytes);
    }

    fn visit_ram(&self, visit: &mut dyn FnMut(u64, &[u8])) {
        self.engine.visit_ram(visit);
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.engine.kicker()
    }
}
