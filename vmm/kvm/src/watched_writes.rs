//! Guest writes that come back: RAM in read-only slots ([`crate::memory`]).

use reprise_branch_clock::paging::write_ram;
use reprise_branch_clock::vcpu::VcpuExit;

use crate::PmuVcpu;
use crate::error::KvmError;
use crate::vcpu::RawExit;

/// Writes that are watched. Watched RAM lies in read-only slots, and KVM's documentation promises that a
/// write there comes back as MMIO (`KVM_SET_USER_MEMORY_REGION`, KVM_MEM_READONLY), one exit for each 8 bytes
/// and page. Its emulator executes the instruction, which it may refuse; such a guest ends with the reason.
/// It gives REP back after each element, and LOCK is no more than a write, which one vCPU cannot tell.
///
/// No promise is made for what the CPU writes by itself. Under two-dimensional paging a page walk that is to
/// set accessed or dirty bits in a read-only slot faults, and KVM then leaves them clear; so a guest's
/// page tables must not be watched. Frames of interrupts and faults are pushed by hardware, and KVM has no
/// instruction to emulate then. Kernels have neither page tables nor stacks in their text.
impl PmuVcpu {
    /// Carries out on RAM what the guest's instruction writes to watched RAM, and completes the instruction.
    /// Gives what else KVM came back with, if it did.
    pub(crate) fn carry_out_writes(&mut self, exit: RawExit) -> Result<Option<RawExit>, KvmError> {
        let mut exit = exit;
        while let RawExit::Mmio { address, size, is_write: true } = exit
            && self.engine.vcpu.memory.is_watched(address)
        {
            let data = *self.engine.vcpu.mmio_data();
            write_ram(&self.engine.ram, address, &data[..usize::from(size)]);
            let end = address + u64::from(size);
            match self.watched_writes.last_mut() {
                Some(before) if before.end == address => before.end = end,
                _ => self.watched_writes.push(address..end),
            }
            exit = self.engine.vcpu.complete()?;
            if matches!(exit, RawExit::Interrupted | RawExit::Debug { .. }) {
                return Ok(None);
            }
        }
        Ok(Some(exit))
    }

    /// The exit for watched writes, if there were any.
    pub(crate) fn watched_write(&mut self) -> Option<VcpuExit> {
        let written = std::mem::take(&mut self.watched_writes);
        (!written.is_empty()).then_some(VcpuExit::WatchedWrite(written))
    }
}

#[cfg(test)]
#[path = "watched_writes_tests.rs"]
mod tests;
