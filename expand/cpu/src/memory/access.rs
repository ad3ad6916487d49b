//! Loads and stores by instructions: the fast path through the software TLB, and the slow one that
//! crosses pages, meets devices, checks alignment and breakpoints, and notes overwritten code.
#![allow(unsafe_code)]

use reprise_machine::engine::{Access, Exit};
use reprise_trace::cpu_state::SS;
use reprise_trace::instructions::SystemAccessKind::DescriptorWrite;

use super::Page;
use super::journal::By;
use super::physical::PAGE_BYTES;
use super::walk::canonical;
use crate::cpu::{AnsweredAccess, Cpu};
use crate::fault::{Fault, Stop, vector};

/// A value that fits a register.
pub(crate) trait Scalar: Copy + Default {
    const BYTES: u64;
    fn to_u64(self) -> u64;
    fn from_u64(value: u64) -> Self;
}

macro_rules! scalar {
    ($($type:ty),*) => {$(
        impl Scalar for $type {
            const BYTES: u64 = size_of::<$type>() as u64;
            #[inline(always)]
            fn to_u64(self) -> u64 {
                u64::from(self)
            }
            #[inline(always)]
            fn from_u64(value: u64) -> Self {
                value as $type
            }
        }
    )*};
}
scalar!(u8, u16, u32, u64);

/// The largest operand that goes through a bounce buffer: FXSAVE's.
pub(crate) const MAX_OPERAND_BYTES: usize = 512;

impl Cpu {
    /// Loads a value through the data rights in force. `segment` (an index into the segment
    /// registers) only decides between #GP and #SS for a non-canonical address.
    #[inline(always)]
    pub(crate) fn load<T: Scalar>(&mut self, linear: u64, segment: u8) -> Result<T, Stop> {
        match self.memory.hit_read(linear, T::BYTES) {
            // SAFETY: a TLB hit is the host address of BYTES mapped bytes of guest RAM, which any
            // bit pattern fills; guest RAM is not Rust memory that anything else borrows.
            Some(host) => Ok(unsafe { host.cast::<T>().read_unaligned() }),
            None => self.load_scalar_slow(linear, segment),
        }
    }

    #[cold]
    #[inline(never)]
    fn load_scalar_slow<T: Scalar>(&mut self, linear: u64, segment: u8) -> Result<T, Stop> {
        let mut bytes = [0; 8];
        self.load_slow(linear, segment, &mut bytes[..T::BYTES as usize])?;
        Ok(T::from_u64(u64::from_le_bytes(bytes)))
    }

    /// Stores a value through the data rights in force. The caller ends with [`Cpu::stored`].
    #[inline(always)]
    pub(crate) fn store<T: Scalar>(
        &mut self,
        linear: u64,
        segment: u8,
        value: T,
    ) -> Result<(), Stop> {
        match self.memory.hit_write(linear, T::BYTES) {
            Some(host) => {
                // SAFETY: as in `load`; a write hit is only there for pages without decoded code.
                unsafe { host.cast::<T>().write_unaligned(value) };
                Ok(())
            }
            None => {
                let bytes = value.to_u64().to_le_bytes();
                self.store_slow(linear, segment, &bytes[..T::BYTES as usize])
            }
        }
    }

    /// What an instruction that stored ends with: stops the block if it wrote decoded code.
    #[inline(always)]
    pub(crate) fn stored(&self) -> Result<(), Stop> {
        if self.memory.physical.code_was_written() { Err(Stop::EndBlock) } else { Ok(()) }
    }

    /// Loads bytes of any number, crossing pages as they come.
    #[cold]
    pub(crate) fn load_slow(
        &mut self,
        linear: u64,
        segment: u8,
        bytes: &mut [u8],
    ) -> Result<(), Stop> {
        self.check_access(linear, segment, bytes.len() as u64, false)?;
        #[cfg(test)]
        self.memory.spy.note(linear, bytes.len() as u64, false);
        let (mut done, mut places) = (0, [0; 2]);
        while done < bytes.len() {
            let address = self.wrap(linear.wrapping_add(done as u64));
            let piece = piece_bytes(address, bytes.len() - done);
            let target = &mut bytes[done..done + piece];
            let page = self.data_page(address, false)?;
            places[usize::from(done > 0)] = page.physical() + address % PAGE_BYTES;
            match page {
                Page::Ram { physical } => {
                    self.memory.physical.read(physical + address % PAGE_BYTES, target);
                }
                Page::Mmio { physical } => {
                    self.mmio_load(physical + address % PAGE_BYTES, target)?;
                }
            }
            done += piece;
        }
        if let Some(journal) = &mut self.memory.physical.journal {
            journal.note(By::Load, Some(linear), places, bytes);
        }
        Ok(())
    }

    /// Stores bytes of any number, crossing pages as they come: all of them or none.
    #[cold]
    pub(crate) fn store_slow(
        &mut self,
        linear: u64,
        segment: u8,
        bytes: &[u8],
    ) -> Result<(), Stop> {
        self.check_store(linear, segment, bytes.len() as u64)?;
        #[cfg(test)]
        self.memory.spy.note(linear, bytes.len() as u64, true);
        // What the board answers first: for that the instruction starts again, and must find RAM as
        // it was.
        self.store_pieces(linear, bytes, false)?;
        let places = self.store_pieces(linear, bytes, true)?;
        if let Some(journal) = &mut self.memory.physical.journal {
            journal.note(By::Store, Some(linear), places, bytes);
        }
        Ok(())
    }

    /// Stores the pieces that lie in RAM, or those that do not. Gives where both begin.
    fn store_pieces(&mut self, linear: u64, bytes: &[u8], in_ram: bool) -> Result<[u64; 2], Stop> {
        let (mut done, mut places) = (0, [0; 2]);
        while done < bytes.len() {
            let address = self.wrap(linear.wrapping_add(done as u64));
            let piece = piece_bytes(address, bytes.len() - done);
            let source = &bytes[done..done + piece];
            let page = self.data_page(address, true)?;
            places[usize::from(done > 0)] = page.physical() + address % PAGE_BYTES;
            match page {
                Page::Ram { physical } if in_ram => {
                    self.memory.physical.write(physical + address % PAGE_BYTES, source);
                }
                Page::Mmio { physical } if !in_ram => {
                    self.mmio_store(physical + address % PAGE_BYTES, source)?;
                }
                _ => {}
            }
            done += piece;
        }
        Ok(places)
    }

    /// Checks that a store of `size_bytes` would not fault, without storing.
    pub(crate) fn check_store(
        &mut self,
        linear: u64,
        segment: u8,
        size_bytes: u64,
    ) -> Result<(), Stop> {
        self.check_access(linear, segment, size_bytes, true)?;
        self.data_page(linear, true)?;
        let last = self.wrap(linear.wrapping_add(size_bytes - 1));
        if last / PAGE_BYTES != linear / PAGE_BYTES {
            self.data_page(last & !(PAGE_BYTES - 1), true)?;
        }
        Ok(())
    }

    /// Translates one page, raising its page fault.
    pub(crate) fn data_page(&mut self, linear: u64, write: bool) -> Result<Page, Stop> {
        match self.memory.data_page(linear, write) {
            Ok(page) => Ok(page),
            Err(fault) => self.fault(fault),
        }
    }

    /// Linear addresses outside long mode have 32 bits.
    #[inline(always)]
    pub(crate) fn wrap(&self, linear: u64) -> u64 {
        linear & self.registers.linear_mask
    }

    fn check_access(
        &mut self,
        linear: u64,
        segment: u8,
        size_bytes: u64,
        write: bool,
    ) -> Result<(), Stop> {
        let last = self.wrap(linear.wrapping_add(size_bytes - 1));
        if !canonical(linear) || !canonical(last) {
            return self.fault(if usize::from(segment) == SS { Fault::SS0 } else { Fault::GP0 });
        }
        if self.memory.check_alignment && linear & (alignment_bytes(size_bytes) - 1) != 0 {
            return self.fault(Fault::with_code(vector::AC, 0));
        }
        if self.memory.check_breakpoints {
            self.note_data_breakpoints(linear, size_bytes, write);
        }
        Ok(())
    }

    /// Reads guest memory with supervisor rights, as the CPU itself does for descriptor tables.
    pub(crate) fn load_system<T: Scalar>(&mut self, linear: u64) -> Result<T, Stop> {
        let mut bytes = [0; 8];
        self.system_bytes(linear, T::BYTES as usize, |cpu, address, piece| {
            let range = piece;
            cpu.memory.physical.read(address, &mut bytes[range])
        })?;
        Ok(T::from_u64(u64::from_le_bytes(bytes)))
    }

    /// Writes guest memory with supervisor rights.
    pub(crate) fn store_system<T: Scalar>(&mut self, linear: u64, value: T) -> Result<(), Stop> {
        let bytes = value.to_u64().to_le_bytes();
        // Both pages must be writable before either is written.
        let last = self.wrap(linear.wrapping_add(T::BYTES - 1));
        for address in [linear, last] {
            if let Err(fault) = self.memory.system_page(address, true) {
                return self.fault(fault);
            }
        }
        self.system_bytes(linear, T::BYTES as usize, |cpu, address, piece| {
            let at = Some(linear.wrapping_add(piece.start as u64));
            cpu.memory.physical.write_for(DescriptorWrite, at, address, &bytes[piece])
        })
    }

    fn system_bytes(
        &mut self,
        linear: u64,
        size: usize,
        mut each: impl FnMut(&mut Self, u64, std::ops::Range<usize>) -> bool,
    ) -> Result<(), Stop> {
        if !canonical(linear) || !canonical(linear.wrapping_add(size as u64 - 1)) {
            return self.fault(Fault::GP0);
        }
        let mut done = 0;
        while done < size {
            let address = self.wrap(linear.wrapping_add(done as u64));
            let piece = piece_bytes(address, size - done);
            match self.memory.system_page(address, false) {
                // System structures in device space read as nothing and swallow writes: no PC
                // puts them there.
                Ok(Page::Mmio { .. }) => {}
                Ok(Page::Ram { physical }) => {
                    each(self, physical + address % PAGE_BYTES, done..done + piece);
                }
                Err(fault) => return self.fault(fault),
            }
            done += piece;
        }
        Ok(())
    }

    /// Reads device memory: the board answers, after which the instruction starts again and finds
    /// the answer here.
    fn mmio_load(&mut self, physical: u64, bytes: &mut [u8]) -> Result<(), Stop> {
        for (index, chunk) in bytes.chunks_mut(8).enumerate() {
            let address = physical + index as u64 * 8;
            let value = self.board(Access::MmioRead { address, size: chunk.len() as u8 })?;
            chunk.copy_from_slice(&value.to_le_bytes()[..chunk.len()]);
        }
        Ok(())
    }

    fn mmio_store(&mut self, physical: u64, bytes: &[u8]) -> Result<(), Stop> {
        for (index, chunk) in bytes.chunks(8).enumerate() {
            let mut value = [0; 16];
            value[..chunk.len()].copy_from_slice(chunk);
            self.board(Access::MmioWrite {
                address: physical + index as u64 * 8,
                size: chunk.len() as u8,
                value: u128::from_le_bytes(value),
            })?;
        }
        Ok(())
    }

    /// The board's answer to the instruction's next access, if it is there already; else leaves
    /// for it.
    pub(crate) fn board(&mut self, access: Access) -> Result<u128, Stop> {
        if let Some(&AnsweredAccess { access: answered, value }) =
            self.answered.get(self.answered_used)
        {
            if place(answered) != place(access) {
                let what =
                    "an instruction that changes what its own accesses to a device depend on";
                return self.unsupported(what);
            }
            self.answered_used += 1;
            return Ok(value);
        }
        self.pending_exit = Some(Exit::Access(access));
        Err(Stop::Exit)
    }
}

/// An access without the value that it writes. That may differ when the instruction starts again (its
/// source may be a page-table entry, accessed since); the board has seen the first one.
fn place(access: Access) -> Access {
    match access {
        Access::PortWrite { port, size, .. } => Access::PortWrite { port, size, value: 0 },
        Access::MmioWrite { address, size, .. } => Access::MmioWrite { address, size, value: 0 },
        read => read,
    }
}

/// The alignment that #AC asks of an operand of this size. (Intel 64 and IA-32 Architectures Software
/// Developer's Manual, volume 3A, the table of alignment requirements; 16-byte operands that need no
/// alignment otherwise are checked as CPUs do it.)
fn alignment_bytes(size_bytes: u64) -> u64 {
    match size_bytes {
        2 | 4 | 8 | 16 => size_bytes,
        // 80-bit numbers.
        10 => 8,
        // FNSTENV and FNSAVE, in the 16-bit and the 32-bit format.
        14 | 94 => 2,
        28 | 108 => 4,
        _ => 1,
    }
}

/// How much of an access at `linear` lies in its first page.
fn piece_bytes(linear: u64, size: usize) -> usize {
    size.min((PAGE_BYTES - linear % PAGE_BYTES) as usize)
}
