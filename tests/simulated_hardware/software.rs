//! The software CPU that records, kicked at random instruction counts.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use reprise_cpu::engine::SoftEngine;
use reprise_machine::engine::{Engine, EngineError, Exit};
use reprise_machine::ram::GuestRam;
use reprise_random::Random;
use reprise_tests::ask_engine_within;

/// The software CPU, kicked as its host's threads kick it.
pub(crate) struct KickedSoftware {
    engine: SoftEngine,
    random: Random,
    /// Instructions from kick to kick.
    kick_every: u64,
    kick_at: u64,
    world_clock_ns: Arc<AtomicU64>,
}

impl KickedSoftware {
    pub(crate) fn new(ram: GuestRam, seed: u64, kick_every: u64) -> Self {
        let engine = SoftEngine::new(ram).expect("the host has memory");
        let mut random = Random::new(seed);
        let kick_at = random.below(2 * kick_every);
        Self { engine, random, kick_every, kick_at, world_clock_ns: Arc::default() }
    }

    /// A clock of the world that goes on by a nanosecond an instruction.
    pub(crate) fn world_clock_ns(&self) -> Arc<AtomicU64> {
        self.world_clock_ns.clone()
    }
}

impl Engine for KickedSoftware {
    ask_engine_within!(engine);

    fn run(&mut self, until: u64) -> Result<Exit, EngineError> {
        let stop = until.min(self.kick_at.max(self.engine.tick()));
        let exit = self.engine.run(stop)?;
        self.world_clock_ns.store(self.engine.tick(), Ordering::Relaxed);
        if exit == Exit::TickReached && stop < until {
            self.kick_at = stop + self.random.below(2 * self.kick_every) + 1;
            return Ok(Exit::Kicked);
        }
        Ok(exit)
    }

    fn finish_access(&mut self, value: u128) -> Result<(), EngineError> {
        self.engine.finish_access(value)
    }

    fn set_interrupt_request(&mut self, wanted: bool) {
        self.engine.set_interrupt_request(wanted);
    }
}
