//! A machine moved in small steps by somebody who compares it with another: without the digest of RAM
//! that the end of a run costs, and with a stop between what enters at a boundary and the instruction
//! behind it.

use reprise_trace::event::EffectDigest;

use crate::engine::Engine;
use crate::inputs::{Inputs, Stop};
use crate::machine::{Machine, Target};
use crate::outcome::{MachineError, Outcome};

/// What a machine is beside CPU, devices and RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Surroundings {
    /// Virtual time, in nanoseconds since the machine started.
    pub virtual_ns: u64,
    /// What has left the machine.
    pub effects: EffectDigest,
    /// Accesses to the board so far.
    pub accesses: u64,
    /// Interrupts delivered so far.
    pub interrupts: u64,
}

impl<E: Engine, I: Inputs> Machine<E, I> {
    /// As [`Machine::run_until`], but gives an outcome only if the run is over before tick `target`.
    ///
    /// # Errors
    /// As [`Machine::run`].
    pub fn advance_to(&mut self, target: u64) -> Result<Option<Outcome>, MachineError> {
        match self.go(Target { tick: target, ns: u64::MAX }) {
            Stop::TargetReached => Ok(None),
            stop => self.conclude(stop).map(Some),
        }
    }

    /// Lets everything enter that enters at this boundary (arrivals, what devices do, the interrupt,
    /// and, if the guest sleeps, all until it wakes), and stops before the next instruction. The machine
    /// goes on from there as if it had not stopped. Gives an outcome if the run is over here.
    ///
    /// # Errors
    /// As [`Machine::run`].
    pub fn enter(&mut self) -> Result<Option<Outcome>, MachineError> {
        self.at_rest = false;
        let nowhere = Target { tick: u64::MAX, ns: u64::MAX };
        loop {
            match self.visit(true, nowhere) {
                Ok(true) => return Ok(None),
                Ok(false) => {}
                Err(stop) => return self.conclude(stop).map(Some),
            }
        }
    }

    /// What the machine is beside CPU, devices and RAM.
    pub fn surroundings(&self) -> Surroundings {
        Surroundings {
            virtual_ns: self.now().ns,
            effects: self.effects.digest(),
            accesses: self.accesses,
            interrupts: self.interrupts,
        }
    }
}
