//! An engine for tests of what is around one: it stands somewhere, and does nothing.

use std::sync::Arc;

use reprise_trace::cpu_state::CpuState;
use reprise_trace::moment::{Moment, TickKind};

use crate::clock::TimeBase;
use crate::engine::{Engine, EngineError, Exit, FlagKick, Kick};
use crate::ram::GuestRam;

/// What it stands with.
pub(crate) struct Standing {
    pub(crate) tick: u64,
    pub(crate) state: CpuState,
    pub(crate) ram: GuestRam,
}

impl Engine for Standing {
    fn tick_kind(&self) -> TickKind {
        TickKind::Instruction
    }

    fn tick(&self) -> u64 {
        self.tick
    }

    fn run(&mut self, _until: u64) -> Result<Exit, EngineError> {
        Ok(Exit::Halt)
    }

    fn finish_access(&mut self, _value: u128) -> Result<(), EngineError> {
        Ok(())
    }

    fn interruptible(&mut self) -> Result<bool, EngineError> {
        Ok(true)
    }

    fn set_interrupt_request(&mut self, _wanted: bool) {}

    fn inject(&mut self, _vector: u8) -> Result<(), EngineError> {
        Ok(())
    }

    fn set_time_base(&mut self, _base: TimeBase) {}

    fn moment(&mut self) -> Result<Moment, EngineError> {
        Ok(Moment { tick: self.tick, rip: self.state.rip, rcx: self.state.gpr[1] })
    }

    fn cpu_state(&mut self) -> Result<CpuState, EngineError> {
        Ok(self.state.clone())
    }

    fn set_cpu_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.state = state.clone();
        Ok(())
    }

    fn read_ram(&self, address: u64, bytes: &mut [u8]) {
        self.ram.read(address, bytes);
    }

    fn visit_ram(&self, visit: &mut dyn FnMut(u64, &[u8])) {
        self.ram.visit(visit);
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::new(FlagKick::default())
    }
}
