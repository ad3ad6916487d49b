//! RDTSC of the guest, where KVM does not trap it.
//!
//! *Kernel code.* At places that are known to hold RDTSC stand breakpoints in debug registers; the machine
//! is asked for the value, and the instruction is done here. There are four.
//!
//! *User code.* A guest that wants to see it sets CR4.TSD and takes the #GP. Pagetable-based KVM runs user
//! code on the host's own CR4, so the host's kernel has to be asked to set TSD for this thread while the
//! guest runs (`PR_SET_TSC`). In between it must not: this thread's own clock reads use RDTSC.

use iced_x86::{Instruction, Mnemonic};
use kvm_bindings::{KVM_GUESTDBG_USE_HW_BP, KVM_VCPUEVENT_VALID_SHADOW};
use reprise_branch_clock::guest_code::decode_at;
use reprise_branch_clock::retired::time_stamp_retired;
use reprise_branch_clock::vcpu::MAX_BREAKPOINTS;
use reprise_trace::cpu_state::CpuState;

use crate::error::KvmError;
use crate::host::KvmKind;
use crate::vcpu::{Vcpu, breakpoint_registers};
use crate::{KvmEngine, state};

/// RDTSC's length without prefixes.
const BARE_BYTES: usize = 2;

/// Whether user code's RDTSC faults under the guest's CR4.TSD only if the host's thread has it refused too.
pub(crate) fn needs_host_refusal() -> bool {
    KvmKind::of_this_host() == KvmKind::PagetableBased
}

/// Refuses this thread RDTSC, or allows it again.
pub(crate) fn refuse_to_this_thread(refuse: bool) {
    let how = if refuse { libc::PR_TSC_SIGSEGV } else { libc::PR_TSC_ENABLE };
    // SAFETY: the call changes how this thread's RDTSC behaves, and nothing in memory. It cannot fail for
    // these values on x86; if it did, RDTSC would go on as it was.
    unsafe { libc::prctl(libc::PR_SET_TSC, how) };
}

/// Breakpoints in debug registers at these addresses.
pub(crate) fn set_breakpoints(vcpu: &mut Vcpu, addresses: &[u64]) -> Result<(), KvmError> {
    let control = if addresses.is_empty() { 0 } else { KVM_GUESTDBG_USE_HW_BP };
    vcpu.set_debug(control, breakpoint_registers(addresses))
}

impl KvmEngine {
    /// Has RDTSC at these linear addresses of the guest's kernel answered by the machine.
    ///
    /// # Errors
    /// There are more than [`MAX_BREAKPOINTS`], or KVM refuses.
    pub fn trap_time_stamps(&mut self, addresses: &[u64]) -> Result<(), KvmError> {
        if addresses.len() > MAX_BREAKPOINTS {
            return Err(KvmError::TooManyTimeStampSites(addresses.len()));
        }
        self.time_stamp_sites = addresses.to_vec();
        set_breakpoints(&mut self.vcpu, addresses)
    }

    /// Whether the guest stands at an RDTSC that is to be answered: its bytes are verified.
    pub(crate) fn stands_at_time_stamp(&mut self) -> Result<bool, KvmError> {
        let state = state::read(&self.vcpu.fd)?;
        let reads = self.time_stamp_at(&state).is_some();
        Ok(reads && self.time_stamp_sites.contains(&state.rip))
    }

    fn time_stamp_at(&self, state: &CpuState) -> Option<Instruction> {
        decode_at(&self.ram, state, state.rip).filter(|it| it.mnemonic() == Mnemonic::Rdtsc)
    }

    /// Has RDTSC retire with this value of virtual time.
    pub(crate) fn retire_time_stamp(&mut self, ns: u64) -> Result<(), KvmError> {
        let state = state::read(&self.vcpu.fd)?;
        let bytes = self.time_stamp_at(&state).map_or(BARE_BYTES, |it| it.len());
        let state = CpuState { tsc_offset: self.tsc[0], ..state };
        self.retire_instruction(&time_stamp_retired(&state, bytes, ns))
    }

    /// Has an instruction that was done here retire.
    pub(crate) fn retire_instruction(&mut self, after: &CpuState) -> Result<(), KvmError> {
        let fd = &self.vcpu.fd;
        fd.set_regs(&state::write_regs(after))
            .map_err(|errno| KvmError::refused("KVM_SET_REGS", errno))?;
        let mut events = state::read_events(fd)?;
        if events.interrupt.shadow == 0 {
            return Ok(());
        }
        events.interrupt.shadow = 0;
        events.flags |= KVM_VCPUEVENT_VALID_SHADOW;
        fd.set_vcpu_events(&events).map_err(|errno| KvmError::refused("KVM_SET_VCPU_EVENTS", errno))
    }
}
