//! The CPU model's MSRs.
//!
//! KVM would let the guest see MSRs of its own choice, which differ from host to host. So it is told to
//! let pass only those with state, which the model shares with every x86-64 CPU, and to come back
//! with all others: the model's constants are answered here, the rest fault.

use kvm_bindings::*;
use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};
use reprise_devices::cpu_model::{MsrWrite, msr};

use crate::error::KvmError;

/// MSRs that pass: the first one, and how many. TSC; SYSENTER; PAT; EFER and SYSCALL; segment bases.
/// Numbers: AMD64 APM volume 2, appendix A.
const PASSED: [(u32, u32); 5] =
    [(0x10, 1), (0x174, 3), (0x277, 1), (0xc000_0080, 5), (0xc000_0100, 3)];

/// Makes KVM come back with every other MSR. Where it cannot (before Linux 5.10), the guest sees KVM's
/// own choice.
pub(crate) fn restrict(vm: &VmFd) -> Result<(), KvmError> {
    let has = |cap: u32| vm.check_extension_raw(u64::from(cap)) > 0;
    if !has(KVM_CAP_X86_USER_SPACE_MSR) || !has(KVM_CAP_X86_MSR_FILTER) {
        return Ok(());
    }
    let mut user_space_msr =
        kvm_enable_cap { cap: KVM_CAP_X86_USER_SPACE_MSR, ..kvm_enable_cap::default() };
    user_space_msr.args[0] = u64::from(KVM_MSR_EXIT_REASON_VALID_MASK);
    vm.enable_cap(&user_space_msr)
        .map_err(|errno| KvmError::refused("KVM_CAP_X86_USER_SPACE_MSR", errno))?;
    let ranges = PASSED.map(|(base, msr_count)| MsrFilterRange {
        flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
        base,
        msr_count,
        bitmap: &[0xff],
    });
    vm.set_msr_filter(MsrFilterDefaultAction::DENY, &ranges)
        .map_err(|errno| KvmError::refused("KVM_X86_SET_MSR_FILTER", errno))
}

/// Answers an exit for an MSR as the model has it; `None` if the guest is to take #GP.
pub(crate) fn answer(index: u32, is_write: bool) -> Option<u64> {
    let constant = msr(index)?;
    (!is_write || constant.write == MsrWrite::Ignored).then_some(constant.value)
}

#[cfg(test)]
mod tests {
    use reprise_devices::cpu_model::MSRS;

    use super::*;

    #[test]
    fn no_constant_passes_and_every_one_is_answered() {
        for constant in MSRS {
            let passes =
                PASSED.iter().any(|(base, count)| (*base..base + count).contains(&constant.index));
            assert!(!passes, "{:#x}", constant.index);
            assert_eq!(answer(constant.index, false), Some(constant.value));
        }
        assert_eq!(answer(0x8b, true), Some(1 << 32));
        assert_eq!(answer(0x17, true), None);
        assert_eq!(answer(0xfe, false), None);
    }
}
