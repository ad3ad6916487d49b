//! The software CPU as a CPU of another maker, for tests where there is only one: flags that the
//! architecture leaves undefined come out inverted.
#![allow(unsafe_code)]

use reprise_trace::cpu_state::RCX;

use crate::cpu::Cpu;
use crate::decode::op::Op;
use crate::engine::SoftEngine;
use crate::fault::Flow;
use crate::flags::{ARITHMETIC, Arithmetic};
use crate::latitude;

impl SoftEngine {
    /// Has these flags come out inverted wherever an instruction leaves them undefined. To be
    /// called before the guest first runs.
    pub fn invert_undefined_flags(&mut self, flags: u64) {
        self.cpu_mut().inverted_undefined = flags & ARITHMETIC;
    }
}

impl Cpu {
    /// Has an operation that leaves flags undefined leave them as the other maker's.
    pub(crate) fn leave_to_other_maker(&self, op: &mut Op) {
        if latitude::undefined_flags(&op.instruction) & self.inverted_undefined != 0 {
            op.instruction.own = Some(op.handler);
            op.instruction.inline = false;
            op.handler = inverted;
        }
    }
}

/// Runs an operation and inverts what it left undefined.
extern "sysv64" fn inverted(cpu: &mut Cpu, op: &Op) -> Flow {
    let cl = cpu.registers.gpr[RCX] as u8;
    let own = op.instruction.own.expect("such an operation has its own handler");
    // SAFETY: `own` is the handler that was chosen for this very operation.
    let flow = unsafe { own(cpu, op) };
    if flow.retires() {
        let undefined = latitude::undefined_flags_for(&op.instruction, cl) & cpu.inverted_undefined;
        let flags = cpu.registers.arithmetic.to_rflags() ^ undefined;
        cpu.registers.arithmetic = Arithmetic::from_rflags(flags);
    }
    flow
}
