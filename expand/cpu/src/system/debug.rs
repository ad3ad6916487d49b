//! Breakpoints, the trap flag and the resume flag.

use crate::cpu::Cpu;
use crate::decode::op::Op;
use crate::execute::TripleFault;
use crate::fault::Stop;

impl Cpu {
    pub(crate) fn check_instruction_breakpoint(&mut self, _shadow: bool) -> Result<(), Stop> {
        Ok(())
    }

    pub(crate) fn clear_resume_flag(&mut self, _op: &Op) {}

    pub(crate) fn after_instruction(&mut self, _trap: bool) -> Result<(), TripleFault> {
        Ok(())
    }

    pub(crate) fn note_data_breakpoints(&mut self, _linear: u64, _size_bytes: u64, _write: bool) {}
}
