//! Guest RAM: where it lies in guest-physical address space, and who owns it.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::touched::{PAGE_BYTES, TouchedPages};

/// Start of the hole below 1 MiB where a PC has its video memory; nothing answers there.
pub const HOLE_START: u64 = 0xa_0000;
/// End of that hole.
pub const HOLE_END: u64 = 0xc_0000;
/// The smallest machine, in MiB.
pub const MIN_RAM_MIB: u64 = 4;
/// The largest machine, in MiB: RAM ends below the 32-bit device window at 3 GiB.
pub const MAX_RAM_MIB: u64 = 3072;

/// RAM is shown in pieces of at most this many bytes: small enough for a processor's cache, so that
/// a copy costs little.
const PIECE_BYTES: usize = 64 << 10;

/// Why RAM cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// Outside the machine's limits.
    #[error("--memory {0} is out of range: give {MIN_RAM_MIB} to {MAX_RAM_MIB} MiB")]
    Size(u64),
    /// The host refused.
    #[error("the host has no {mib} MiB for the guest ({reason}): give a smaller --memory")]
    Host {
        /// What was asked for, in MiB.
        mib: u64,
        /// The host's reason.
        reason: String,
    },
}

/// All of guest RAM. An engine owns it while a machine runs: nothing else writes it.
#[derive(Debug)]
pub struct GuestRam {
    memory: GuestMemoryMmap,
    ram_bytes: u64,
}

impl GuestRam {
    /// Zeroed RAM: `[0, 640 KiB)` and `[768 KiB, ram_mib)`.
    pub fn new(ram_mib: u64) -> Result<Self, RamError> {
        if !(MIN_RAM_MIB..=MAX_RAM_MIB).contains(&ram_mib) {
            return Err(RamError::Size(ram_mib));
        }
        let ram_bytes = ram_mib << 20;
        let ranges = [
            (GuestAddress(0), HOLE_START as usize),
            (GuestAddress(HOLE_END), (ram_bytes - HOLE_END) as usize),
        ];
        let memory = GuestMemoryMmap::from_ranges(&ranges)
            .map_err(|error| RamError::Host { mib: ram_mib, reason: error.to_string() })?;
        Ok(Self { memory, ram_bytes })
    }

    /// The same RAM for another engine, which executes only while the owner does not: whoever has been
    /// away finds RAM written, and must know nothing of it.
    #[must_use]
    pub fn share(&self) -> Self {
        Self { memory: self.memory.clone(), ram_bytes: self.ram_bytes }
    }

    /// The end of RAM: the first guest-physical address past it.
    pub fn ram_bytes(&self) -> u64 {
        self.ram_bytes
    }

    /// The mapping itself, for an engine that gives it to KVM or to generated code, and for
    /// loaders.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Reads guest RAM.
    ///
    /// # Panics
    /// If the range is not all RAM.
    pub fn read(&self, address: u64, bytes: &mut [u8]) {
        self.memory.read_slice(bytes, GuestAddress(address)).expect("range lies in guest RAM");
    }

    /// Puts a page where it lies in guest RAM; false if it does not. Only before an engine owns the RAM.
    #[must_use]
    pub fn place(&mut self, address: u64, page: &[u8]) -> bool {
        self.memory.write_slice(page, GuestAddress(address)).is_ok()
    }

    /// Tells the guest-physical addresses of the pages that were ever touched; all others are zero.
    pub fn visit_touched(&self, visit: &mut dyn FnMut(u64)) {
        let mut touched = TouchedPages::new();
        for region in self.memory.iter() {
            let (start, host) = (region.start_addr().0, region.as_ptr() as usize);
            for offset in (0..region.len() as usize).step_by(PAGE_BYTES) {
                if touched.is_touched(host + offset) {
                    visit(start + offset as u64);
                }
            }
        }
    }

    /// Passes RAM to `visit` as (guest-physical start, bytes), in address order, in pieces of whole
    /// pages. Pages that nobody ever touched, and that therefore are zero, are left out.
    pub fn visit(&self, visit: &mut dyn FnMut(u64, &[u8])) {
        let mut touched = TouchedPages::new();
        let mut piece = vec![0; PIECE_BYTES];
        for region in self.memory.iter() {
            let (start, host) = (region.start_addr().0, region.as_ptr() as usize);
            let pages = region.len() as usize / PAGE_BYTES;
            let mut page = 0;
            while page < pages {
                let run = (page..pages)
                    .take(PIECE_BYTES / PAGE_BYTES)
                    .take_while(|page| touched.is_touched(host + page * PAGE_BYTES))
                    .count();
                if run > 0 {
                    let bytes = &mut piece[..run * PAGE_BYTES];
                    let address = start + (page * PAGE_BYTES) as u64;
                    self.read(address, bytes);
                    visit(address, bytes);
                }
                // The page behind a run that ended early is not touched.
                page += run.max(1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_visit_shows_everything_that_is_not_zero_in_order() {
        let ram = GuestRam::new(64).expect("64 MiB");
        let last = ram.ram_bytes() - 1;
        let across = 0x20_0000 + PIECE_BYTES as u64;
        let written = [0, HOLE_START - 1, HOLE_END, 0x20_0000, across - 1, across, last];
        for (value, address) in (1_u8..).zip(written) {
            ram.memory().write_obj(value, GuestAddress(address)).expect("in RAM");
        }
        let (mut found, mut next) = (Vec::new(), 0);
        ram.visit(&mut |start, bytes| {
            assert!(start >= next && bytes.len().is_multiple_of(PAGE_BYTES));
            next = start + bytes.len() as u64;
            let there = (start..).zip(bytes).filter(|(_, byte)| **byte != 0);
            found.extend(there.map(|(address, byte)| (*byte, address)));
        });
        assert_eq!(found, (1_u8..).zip(written).collect::<Vec<_>>());
    }
}
