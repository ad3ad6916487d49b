//! The guest's CPU model as KVM takes it.

use kvm_bindings::CpuId;

use crate::error::KvmError;

pub(crate) fn table() -> Result<CpuId, KvmError> {
    let kvm = crate::vcpu::open(crate::vcpu::DEVICE)?;
    let mut cpuid = kvm
        .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .map_err(|errno| KvmError::refused("KVM_GET_SUPPORTED_CPUID", errno))?;
    for entry in cpuid.as_mut_slice() {
        if entry.function == 1 {
            entry.ecx &= !(1 << 26 | 1 << 28 | 1 << 27);
        }
    }
    Ok(cpuid)
}
