//! Guest RAM: where it lies in guest-physical address space, and who owns it.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Start of the hole below 1 MiB where a PC has its video memory; nothing answers there.
pub const HOLE_START: u64 = 0xa_0000;
/// End of that hole.
pub const HOLE_END: u64 = 0xc_0000;
/// The smallest machine, in MiB.
pub const MIN_RAM_MIB: u64 = 4;
/// The largest machine, in MiB: RAM ends below the 32-bit device window at 3 GiB.
pub const MAX_RAM_MIB: u64 = 3072;

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

    /// Passes RAM to `visit` as (guest-physical start, bytes), in address order, in pieces of at
    /// most 1 MiB.
    pub fn visit(&self, visit: &mut dyn FnMut(u64, &[u8])) {
        const PIECE_BYTES: u64 = 1 << 20;
        let mut piece = vec![0; PIECE_BYTES as usize];
        for region in self.memory.iter() {
            let end = region.start_addr().0 + region.len();
            let mut start = region.start_addr().0;
            while start < end {
                let bytes = &mut piece[..PIECE_BYTES.min(end - start) as usize];
                self.read(start, bytes);
                visit(start, bytes);
                start += bytes.len() as u64;
            }
        }
    }
}
