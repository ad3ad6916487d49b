//! The guest's CPU model as KVM takes it.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use reprise_devices::cpu_model::{LEAVES, TimeStampCounter};
use vmm_sys_util::errno::Error as Errno;

use crate::error::KvmError;

/// The model's CPUID table. Leaves that are not in it are zeros, as KVM answers by itself.
pub(crate) fn table(counter: TimeStampCounter) -> Result<CpuId, KvmError> {
    let entries: Vec<kvm_cpuid_entry2> = LEAVES
        .iter()
        .map(|leaf| kvm_cpuid_entry2 {
            function: leaf.leaf,
            index: leaf.subleaf.unwrap_or(0),
            flags: leaf.subleaf.map_or(0, |_| KVM_CPUID_FLAG_SIGNIFCANT_INDEX),
            eax: leaf.eax,
            ebx: leaf.ebx,
            ecx: leaf.ecx,
            edx: leaf.edx & !counter.hidden_in_edx(leaf.leaf),
            padding: [0; 3],
        })
        .collect();
    CpuId::from_entries(&entries)
        .map_err(|_| KvmError::refused("the CPU model's CPUID table", Errno::new(libc::E2BIG)))
}
