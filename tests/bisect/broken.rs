//! A software CPU that is made to do something wrong, once.

use reprise_cpu::engine::SoftEngine;
use reprise_machine::engine::{Engine, EngineError, Exit};
use reprise_machine::ram::GuestRam;
use reprise_tests::ask_engine_within;
use reprise_trace::checkpoint::{EngineState, PAGE_BYTES};
use reprise_trace::cpu_state::CpuState;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// What goes wrong right behind the instruction that is the `tick`th to retire, counted from 0.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Wrong {
    /// The instruction leaves another CPU state.
    Cpu { tick: u64, change: fn(&mut CpuState) },
    /// A bit of RAM is set.
    Memory { tick: u64, address: u64, bits: u8 },
    /// All translations are forgotten.
    Forgets { tick: u64 },
}

impl Wrong {
    fn tick(&self) -> u64 {
        match self {
            Self::Cpu { tick, .. } | Self::Memory { tick, .. } | Self::Forgets { tick } => *tick,
        }
    }
}

/// The software CPU with a fault in it.
pub(crate) struct Broken {
    inner: SoftEngine,
    memory: GuestMemoryMmap,
    wrong: Wrong,
}

impl Broken {
    pub(crate) fn new(ram: GuestRam, wrong: Wrong) -> Result<Self, EngineError> {
        let memory = ram.memory().clone();
        Ok(Self { inner: SoftEngine::new(ram)?, memory, wrong })
    }

    /// Sets what is wrong, so that doing it twice is as once.
    fn go_wrong(&mut self) -> Result<(), EngineError> {
        match self.wrong {
            Wrong::Cpu { change, .. } => {
                let mut state = self.inner.cpu_state()?;
                change(&mut state);
                self.inner.set_cpu_state(&state)
            }
            Wrong::Memory { address, bits, .. } => {
                let place = GuestAddress(address);
                let byte: u8 = self.memory.read_obj(place).expect("in RAM");
                self.memory.write_obj(byte | bits, place).expect("in RAM");
                Ok(())
            }
            Wrong::Forgets { .. } => {
                self.inner.forget_translations();
                Ok(())
            }
        }
    }
}

impl Engine for Broken {
    ask_engine_within!(inner);

    fn run(&mut self, until: u64) -> Result<Exit, EngineError> {
        let behind = self.wrong.tick() + 1;
        let here = self.inner.tick();
        if here < behind && until >= behind {
            let exit = self.inner.run(behind)?;
            if self.inner.tick() == behind && exit == Exit::TickReached {
                self.go_wrong()?;
                if until > behind {
                    return self.inner.run(until);
                }
            }
            return Ok(exit);
        }
        self.inner.run(until)
    }

    fn finish_access(&mut self, value: u128) -> Result<(), EngineError> {
        let here = self.inner.tick();
        self.inner.finish_access(value)?;
        // An IN or OUT retires here.
        if here == self.wrong.tick() && self.inner.tick() == here + 1 {
            self.go_wrong()?;
        }
        Ok(())
    }

    fn set_interrupt_request(&mut self, wanted: bool) {
        self.inner.set_interrupt_request(wanted);
    }

    fn start_capture(&mut self, visit: &mut dyn FnMut(u64, &[u8])) {
        self.inner.start_capture(visit);
        if let Wrong::Memory { address, .. } = self.wrong {
            // Written behind the software CPU's back.
            let page = address & !(PAGE_BYTES as u64 - 1);
            let mut bytes = [0; PAGE_BYTES];
            self.inner.read_ram(page, &mut bytes);
            visit(page, &bytes);
        }
    }

    fn continue_capture(&mut self, max_pages: usize, visit: &mut dyn FnMut(u64, &[u8])) -> bool {
        self.inner.continue_capture(max_pages, visit)
    }

    fn save(&mut self) -> Result<Option<EngineState>, EngineError> {
        self.inner.save()
    }

    fn restore(&mut self, state: &EngineState) -> Result<(), EngineError> {
        self.inner.restore(state)
    }
}
