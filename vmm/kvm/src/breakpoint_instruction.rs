//! INT3 that comes back instead of reaching the guest, and is passed on to it after all.
//!
//! Where hardware executes the guest, KVM_GUESTDBG_USE_SW_BP makes INT3 a debug exit, RIP at the
//! instruction. #BP is a trap: the frame must hold the address behind it. Neither CPU takes that address from
//! RIP: KVM injects vector 3 as a software exception, on VMX with the length of the instruction that came back
//! last, on SVM with the address of the next one, so RIP has to stay where it is. QEMU, too, passes it on by
//! setting the vCPU's events and nothing else.
//!
//! Where KVM's own emulator executes the guest's kernel code, INT3 is an instruction that it refuses. It has
//! then queued #UD, which is dropped. What it injects it delivers itself, and puts RIP into the frame as it is:
//! there RIP has to be moved first.

use reprise_branch_clock::guest_code::decode_at;

use crate::error::KvmError;
use crate::vcpu::RawExit;
use crate::{PmuVcpu, state};

/// #BP.
const BREAKPOINT: u8 = 3;
/// INT3's length.
const BYTES: u64 = 1;

/// Who gave INT3 back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CaughtBy {
    /// The CPU, by an intercept.
    Hardware,
    /// KVM's emulator, by a refusal.
    Emulator,
}

impl PmuVcpu {
    /// Whether KVM came back for an INT3 that is caught.
    pub(crate) fn caught_breakpoint_instruction(
        &mut self,
        exit: RawExit,
    ) -> Result<bool, KvmError> {
        if matches!(exit, RawExit::Debug { vector, .. } if vector == u32::from(BREAKPOINT)) {
            self.caught_by = CaughtBy::Hardware;
            return Ok(true);
        }
        if !exit.is_refusal() || !self.catches_breakpoints {
            return Ok(false);
        }
        let state = state::read(&self.engine.vcpu.fd)?;
        let stands = decode_at(&self.engine.ram, &state, state.rip)
            .is_some_and(|found| found.mnemonic() == iced_x86::Mnemonic::Int3);
        if stands {
            self.caught_by = CaughtBy::Emulator;
            self.set_exception(None)?;
        }
        Ok(stands)
    }

    /// Has the INT3 that came back reach the guest.
    pub(crate) fn pass_on_breakpoint_instruction(&mut self) -> Result<(), KvmError> {
        let mut regs = self.engine.registers()?;
        if self.caught_by == CaughtBy::Emulator {
            regs.rip = regs.rip.wrapping_add(BYTES);
            let set = self.engine.vcpu.fd.set_regs(&regs);
            set.map_err(|errno| KvmError::refused("KVM_SET_REGS", errno))?;
        }
        self.passing_on = Some((regs.rip, regs.rsp));
        self.set_exception(Some(BREAKPOINT))
    }

    /// Has KVM deliver this exception, which has no error code, before the next instruction, or none.
    fn set_exception(&self, vector: Option<u8>) -> Result<(), KvmError> {
        let fd = &self.engine.vcpu.fd;
        let mut events = state::read_events(fd)?;
        events.exception.injected = u8::from(vector.is_some());
        events.exception.pending = 0;
        events.exception.nr = vector.unwrap_or_default();
        events.exception.has_error_code = 0;
        fd.set_vcpu_events(&events).map_err(|errno| KvmError::refused("KVM_SET_VCPU_EVENTS", errno))
    }
}

#[cfg(test)]
#[path = "breakpoint_instruction_tests.rs"]
mod tests;
