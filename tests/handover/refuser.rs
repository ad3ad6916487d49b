//! An engine that refuses instructions at random, as KVM's emulator refuses those that it does not know.

use reprise_cpu::engine::SoftEngine;
use reprise_machine::assist::Refusing;
use reprise_machine::engine::{Engine, EngineError, Exit};
use reprise_machine::ram::GuestRam;
use reprise_random::Random;
use reprise_tests::ask_engine_within;
use reprise_trace::checkpoint::EngineState;
use reprise_trace::cpu_state::CpuState;

/// The software CPU, which comes back before one instruction in so many and says that it cannot.
pub(crate) struct Refuser {
    engine: SoftEngine,
    random: Random,
    one_in: u64,
    refuse_at: u64,
    refused: bool,
    window_wanted: bool,
}

impl Refuser {
    pub(crate) fn new(ram: GuestRam, seed: u64, one_in: u64) -> Result<Self, EngineError> {
        let mut random = Random::new(seed);
        let refuse_at = random.below(one_in);
        let engine = SoftEngine::new(ram)?;
        Ok(Self { engine, random, one_in, refuse_at, refused: false, window_wanted: false })
    }
}

impl Engine for Refuser {
    ask_engine_within!(engine);

    fn run(&mut self, until: u64) -> Result<Exit, EngineError> {
        self.refused = false;
        let exit = self.engine.run(until.min(self.refuse_at.max(self.engine.tick())))?;
        if exit == Exit::TickReached
            && self.engine.tick() >= self.refuse_at
            && self.engine.tick() < until
        {
            self.refuse_at = self.engine.tick() + 1 + self.random.below(self.one_in);
            self.refused = true;
            return Ok(Exit::Unsupported("refused at random".to_owned()));
        }
        Ok(exit)
    }
    fn set_interrupt_request(&mut self, wanted: bool) {
        self.window_wanted = wanted;
        self.engine.set_interrupt_request(wanted);
    }
    fn finish_access(&mut self, value: u128) -> Result<(), EngineError> {
        self.engine.finish_access(value)
    }
    fn save(&mut self) -> Result<Option<EngineState>, EngineError> {
        self.engine.save()
    }
    fn restore(&mut self, state: &EngineState) -> Result<(), EngineError> {
        self.engine.restore(state)
    }
}

impl Refusing for Refuser {
    fn has_refused(&mut self) -> Result<bool, EngineError> {
        Ok(self.refused)
    }
    fn ram(&self) -> &GuestRam {
        self.engine.ram()
    }
    fn count_access(&mut self) {}
    fn go_on(
        &mut self,
        before: &CpuState,
        after: &CpuState,
        retired: bool,
    ) -> Result<(), EngineError> {
        assert_eq!(&self.engine.cpu_state()?, before);
        let tick = self.engine.tick() + u64::from(retired);
        self.engine.start_over(tick, after)?;
        self.engine.set_interrupt_request(self.window_wanted);
        Ok(())
    }
}
