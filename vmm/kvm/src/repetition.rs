//! Where KVM stands behind an access: at an instruction boundary, or amid an instruction.
//!
//! Seen on pagetable-based KVM, whose emulator is every KVM's: INS of several elements is one exit, and
//! registers are as before it until all are answered and KVM_RUN has completed them. Behind each element of
//! OUTS, and behind the last of any repetition, the guest stands at the REP with RFLAGS.RF set; that RCX is
//! zero there the next KVM_RUN finds out, and only then RIP moves on. An interrupt would be taken there, with
//! that in its frame, and on no other engine.

use iced_x86::{Instruction, OpKind};
use kvm_bindings::kvm_regs;
use reprise_branch_clock::guest_code::{decode_at, repeats};
use reprise_trace::cpu_state::{CpuState, RCX};
use reprise_trace::register_bits::{RFLAGS_RF, RFLAGS_TF};

use crate::error::KvmError;
use crate::{KvmEngine, state};

impl KvmEngine {
    /// The registers at this instruction boundary; `None` where the guest has finished an access, and not
    /// the instruction that made it. One that has nothing left to repeat retires here.
    pub(crate) fn registers_at_boundary(&mut self) -> Result<Option<kvm_regs>, KvmError> {
        self.settle()?;
        if self.pending.is_some() || self.queued.is_some() {
            return Ok(None);
        }
        let registers = self.registers()?;
        // The emulator sets it before each element, and an access that is not repeated clears it.
        if !self.behind_access || registers.rflags & RFLAGS_RF == 0 {
            return Ok(Some(registers));
        }
        let mut view = CpuState::default();
        state::read_regs(&registers, &mut view);
        let mut segments =
            self.vcpu.fd.get_sregs().map_err(|errno| KvmError::refused("KVM_GET_SREGS", errno))?;
        state::read_sregs(&mut segments, &mut view);
        let Some(instruction) = decode_at(&self.ram, &view, view.rip).filter(repeats) else {
            return Ok(Some(registers));
        };
        if view.gpr[RCX] & counter_mask(&instruction) != 0 || view.rflags & RFLAGS_TF != 0 {
            return Ok(None);
        }
        view.rip = instruction.next_ip();
        view.rflags &= !RFLAGS_RF;
        self.retire_instruction(&view)?;
        Ok(Some(self.registers()?))
    }

    pub(crate) fn registers(&self) -> Result<kvm_regs, KvmError> {
        self.vcpu.fd.get_regs().map_err(|errno| KvmError::refused("KVM_GET_REGS", errno))
    }

    /// Whether the guest stands amid an instruction that has accessed the board.
    pub(crate) fn stands_amid_instruction(&mut self) -> Result<bool, KvmError> {
        Ok(self.registers_at_boundary()?.is_none())
    }
}

/// The bits of RCX that a string instruction counts down: its address size.
fn counter_mask(instruction: &Instruction) -> u64 {
    for kind in instruction.op_kinds() {
        match kind {
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => return 0xffff,
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => {
                return 0xffff_ffff;
            }
            _ => {}
        }
    }
    u64::MAX
}
