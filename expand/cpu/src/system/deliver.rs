//! Exceptions and interrupts through the IDT.

use crate::cpu::Cpu;
use crate::execute::TripleFault;
use crate::fault::Fault;

impl Cpu {
    pub(crate) fn deliver_exception(&mut self, _fault: Fault) -> Result<(), TripleFault> {
        Err(TripleFault)
    }

    pub(crate) fn deliver_interrupt(&mut self, _vector: u8) -> Result<(), TripleFault> {
        Err(TripleFault)
    }
}
