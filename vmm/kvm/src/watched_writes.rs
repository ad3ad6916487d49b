//! Guest writes that come back: RAM in read-only slots ([`crate::memory`]).

use reprise_branch_clock::vcpu::VcpuExit;
use reprise_machine::paging::write_ram;

use crate::PmuVcpu;
use crate::error::KvmError;
use crate::vcpu::RawExit;

// What KVM's documentation promises (KVM_SET_USER_MEMORY_REGION): a write to a slot with KVM_MEM_READONLY
// exits as MMIO. Seen on pagetable-based KVM: one exit for each 8 bytes and page; REP comes back after each
// element; LOCK is no more than a write, which one vCPU cannot tell.
//
// An instruction that KVM's emulator does not know (FXSAVE) is refused before it has written anything. One that it
// knows but for which it has no MMIO (SGDT) it begins again for ever, until a kick. No kernel writes text so.
//
// Nothing is promised for what the CPU writes by itself. By KVM's source, accessed and dirty bits stay
// clear in page tables that lie in such a slot, and a frame that hardware pushes there has no instruction
// to emulate. Kernels have neither page tables nor stacks in their text.
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
