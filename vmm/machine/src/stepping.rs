//! A machine moved in small steps by somebody who compares it with another: without the digest of RAM
//! that the end of a run costs, and with a stop between what enters at a boundary and the instruction
//! behind it.

use reprise_trace::checkpoint::MachineState;
use reprise_trace::event::EffectDigest;
use reprise_trace::moment::TickKind;

use crate::checkpoint::checkpoint;
use crate::engine::{Engine, EngineError};
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

/// A machine where it stands, RAM apart.
#[derive(Clone, Debug)]
pub struct Standing {
    /// Its state.
    pub state: MachineState,
    /// It goes on with the next instruction, and nothing enters before.
    pub amid_stretch: bool,
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
        if std::mem::take(&mut self.amid_stretch) && !self.window_opens()? {
            self.amid_stretch = true;
            return Ok(None);
        }
        self.at_rest = false;
        let nowhere = Target { tick: u64::MAX, ns: u64::MAX };
        loop {
            match self.visit(true, nowhere) {
                Ok(true) => {
                    self.amid_stretch = true;
                    return Ok(None);
                }
                Ok(false) => {}
                Err(stop) => return self.conclude(stop).map(Some),
            }
        }
    }

    /// Whether the engine, amid a stretch, would come back at once because interrupts have opened.
    fn window_opens(&mut self) -> Result<bool, MachineError> {
        let looks = self.engine.tick_kind() != TickKind::Exit && self.interrupt_requested;
        Ok(looks && self.engine.interruptible()?)
    }

    /// Moves the guest to the instruction that has so many before it, before anything enters there, whatever
    /// the engine's ticks are. Gives an outcome if the run is over before.
    ///
    /// # Errors
    /// As [`Machine::run`].
    ///
    /// # Panics
    /// If the engine's ticks are no instructions, and it can stop at them alone.
    pub fn advance_to_instruction(
        &mut self,
        instructions: u64,
    ) -> Result<Option<Outcome>, MachineError> {
        if !self.engine.pause_at(Some(instructions)) {
            assert_eq!(self.engine.tick_kind(), TickKind::Instruction, "ticks are instructions");
            return self.advance_to(instructions);
        }
        let moved = self.advance_to(u64::MAX);
        self.engine.pause_at(None);
        moved
    }

    /// Everything that decides how the machine goes on, RAM apart, where [`Self::advance_to_instruction`]
    /// has stopped it: also amid a tick, where no checkpoint can be taken. `None` in a sleep, and amid the
    /// delivery of an interrupt.
    ///
    /// # Errors
    /// If the engine fails.
    pub fn standing(&mut self) -> Result<Option<Standing>, EngineError> {
        let here = self.engine.instructions();
        let paused = self.engine.pause_at(here);
        let amid_stretch = self.amid_stretch;
        let state = match self.consistent()? {
            None => None,
            // Whoever compares pages knows himself which have been written.
            Some(consistent) => Some(checkpoint(consistent, &mut |_, _| {})?),
        };
        if paused {
            self.engine.pause_at(None);
        }
        Ok(state.map(|state| Standing { state, amid_stretch }))
    }

    /// The machine was taken up where it stood amid a stretch ([`Standing::amid_stretch`]): it goes on with
    /// the next instruction.
    pub fn go_on_amid_stretch(&mut self) {
        self.amid_stretch = true;
        // Whenever the machine has stood it asks for a window exactly if an interrupt is still pending.
        self.interrupt_requested = self.board.interrupt_pending();
        self.engine.set_interrupt_request(self.interrupt_requested);
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
