//! Guest RAM as KVM's memory slots.

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use reprise_machine::ram::GuestRam;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::error::KvmError;

/// Gives every region of `ram` to the virtual machine. Addresses outside stay without a slot, so
/// that an access there exits as MMIO.
///
/// # Safety
/// `ram` must outlive the virtual machine and every vCPU in it.
pub(crate) unsafe fn map_ram(vm: &VmFd, ram: &GuestRam) -> Result<(), KvmError> {
    for (slot, region) in (0u32..).zip(ram.memory().iter()) {
        let host = region.get_host_address(MemoryRegionAddress(0)).map_err(|error| {
            KvmError::Unusable { path: "guest RAM".into(), reason: error.to_string() }
        })?;
        let slot_region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: host as u64,
        };
        // SAFETY: the range is one whole mapping of guest RAM, which outlives the VM by this
        // function's own contract, and slots do not overlap because regions do not.
        unsafe { vm.set_user_memory_region(slot_region) }
            .map_err(|errno| KvmError::refused(format!("memory slot {slot}"), errno))?;
    }
    Ok(())
}
