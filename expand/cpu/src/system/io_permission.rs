//! Which I/O ports less privileged code may touch: the permission bitmap in the TSS.

use super::segment::TSS_AVAILABLE;
use crate::cpu::Cpu;
use crate::fault::{Fault, Stop};
use crate::flags;

/// Offset of the bitmap's own offset, in a 32-bit and in a 64-bit TSS.
const BITMAP_OFFSET: u64 = 0x66;

impl Cpu {
    /// Checks that the current privilege level may access `size_bytes` ports from `port` on.
    ///
    /// # Errors
    /// #GP(0) if neither IOPL nor the TSS allows it, or a page fault on the TSS.
    pub(crate) fn check_io(&mut self, port: u16, size_bytes: u8) -> Result<(), Stop> {
        self.note_port_breakpoints(port, size_bytes);
        let iopl = (self.rflags_rest & flags::IOPL) >> 12;
        if u64::from(self.cpl) <= iopl {
            return Ok(());
        }
        if self.port_is_open(port, size_bytes)? { Ok(()) } else { self.fault(Fault::GP0) }
    }

    fn port_is_open(&mut self, port: u16, size_bytes: u8) -> Result<bool, Stop> {
        let task = self.system.tr;
        let limit = u64::from(task.limit);
        let large = task.attributes & TSS_AVAILABLE == TSS_AVAILABLE;
        if !task.present() || !large || limit < BITMAP_OFFSET + 1 {
            return Ok(false);
        }
        let bitmap: u16 = self.load_system(self.wrap(task.base.wrapping_add(BITMAP_OFFSET)))?;
        let byte = u64::from(bitmap) + u64::from(port / 8);
        // The CPU always reads two bytes, so both must lie within the limit.
        if byte + 1 > limit {
            return Ok(false);
        }
        let bits: u16 = self.load_system(self.wrap(task.base.wrapping_add(byte)))?;
        let wanted = ((1u32 << size_bytes) - 1) << (port % 8);
        Ok(u32::from(bits) & wanted == 0)
    }
}
