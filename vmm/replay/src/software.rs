//! Engines that are the software CPU, whatever they count.

use reprise_cpu::engine::SoftEngine;
use reprise_machine::engine::Engine;

/// An engine that is the software CPU: it knows its instruction count and can be traced.
pub trait OnSoftware: Engine {
    /// The software CPU, whose own ticks are instructions.
    fn software(&mut self) -> &mut SoftEngine;
}

impl OnSoftware for SoftEngine {
    fn software(&mut self) -> &mut SoftEngine {
        self
    }
}
