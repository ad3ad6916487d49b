//! Who lies where in guest RAM while a guest is being loaded.
//!
//! An image dictates its own addresses; what a boot loader adds (tables, command line, initrd)
//! goes wherever room is left, so an image may be linked anywhere.

use std::ops::Range;

use reprise_machine::ram::{GuestRam, HOLE_END, HOLE_START, MAX_RAM_MIB};
use vm_memory::{Bytes, GuestAddress};

use super::error::BootError;

/// Where a BIOS keeps its extended data area: conventional memory ends here.
const EBDA_START: u64 = 0x9_fc00;
/// Where memory above the BIOS begins.
const HIGH_START: u64 = 0x10_0000;
/// Interrupt vectors and the BIOS data area end below this; tables go above.
const LOW_START: u64 = 0x1000;
/// Alignment of everything that is placed: a page.
const PAGE_BYTES: u64 = 4096;

/// One range of the memory map that a BIOS would report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MapEntry {
    /// First guest-physical address.
    pub(super) start: u64,
    /// Length.
    pub(super) bytes: u64,
    /// 1 usable RAM, 2 reserved: the types that E820, PVH and multiboot share.
    pub(super) kind: u32,
}

/// Usable RAM, in the numbering of E820.
const KIND_RAM: u32 = 1;
/// Reserved.
const KIND_RESERVED: u32 = 2;

/// RAM being filled.
pub(super) struct Placement<'a> {
    ram: &'a GuestRam,
    used: Vec<Range<u64>>,
}

impl<'a> Placement<'a> {
    /// Starts with the few words of the BIOS data area that kernels look at.
    pub(super) fn new(ram: &'a GuestRam) -> Self {
        let placement = Self { ram, used: Vec::new() };
        // COM1's port, the EBDA's segment, conventional memory in KiB: as a BIOS leaves them.
        placement.write(0x400, &0x3f8_u16.to_le_bytes());
        placement.write(0x40e, &((EBDA_START >> 4) as u16).to_le_bytes());
        placement.write(0x413, &((EBDA_START >> 10) as u16).to_le_bytes());
        placement
    }

    /// The end of RAM.
    pub(super) fn ram_bytes(&self) -> u64 {
        self.ram.ram_bytes()
    }

    /// The memory map that a BIOS would report.
    pub(super) fn memory_map(&self) -> [MapEntry; 3] {
        [
            MapEntry { start: 0, bytes: EBDA_START, kind: KIND_RAM },
            MapEntry { start: EBDA_START, bytes: HIGH_START - EBDA_START, kind: KIND_RESERVED },
            MapEntry { start: HIGH_START, bytes: self.ram_bytes() - HIGH_START, kind: KIND_RAM },
        ]
    }

    /// Marks a range that an image dictates, so that nothing is placed there.
    ///
    /// # Errors
    /// The range is not all RAM.
    pub(super) fn claim(
        &mut self,
        what: &'static str,
        start: u64,
        bytes: u64,
    ) -> Result<(), BootError> {
        let end = start.saturating_add(bytes);
        let crosses_hole = start < HOLE_END && end > HOLE_START && bytes > 0;
        if crosses_hole || end > MAX_RAM_MIB << 20 {
            return Err(BootError::OutsideRam { what, start, end });
        }
        if end > self.ram_bytes() {
            return Err(self.too_small(what, end));
        }
        self.used.push(start..end);
        Ok(())
    }

    /// The error of RAM that ends before `needed_bytes`.
    pub(super) fn too_small(&self, what: &'static str, needed_bytes: u64) -> BootError {
        BootError::MemoryTooSmall {
            what,
            needed_mib: needed_bytes.div_ceil(1 << 20),
            ram_mib: self.ram_bytes() >> 20,
        }
    }

    /// The lowest free pages of conventional memory, for a boot loader's tables.
    ///
    /// # Errors
    /// The image leaves no room there.
    pub(super) fn place_low(&mut self, what: &'static str, bytes: u64) -> Result<u64, BootError> {
        let mut start = LOW_START;
        while start + bytes <= EBDA_START {
            match self.first_overlap(start, bytes) {
                None => {
                    self.used.push(start..start + bytes);
                    return Ok(start);
                }
                Some(taken) => start = taken.end.next_multiple_of(PAGE_BYTES),
            }
        }
        Err(BootError::OutsideRam { what, start, end: start + bytes })
    }

    /// The highest free pages above 1 MiB that end at or below `limit`, for an initrd.
    ///
    /// # Errors
    /// No such room: says how much memory would do.
    pub(super) fn place_high(
        &mut self,
        what: &'static str,
        bytes: u64,
        limit: u64,
    ) -> Result<u64, BootError> {
        let mut end = limit.min(self.ram_bytes());
        while let Some(unaligned) = end.checked_sub(bytes).filter(|start| *start >= HIGH_START) {
            let start = unaligned / PAGE_BYTES * PAGE_BYTES;
            match self.first_overlap(start, bytes) {
                None if start >= HIGH_START => {
                    self.used.push(start..start + bytes);
                    return Ok(start);
                }
                None => break,
                Some(taken) => end = taken.start,
            }
        }
        let top = self.used.iter().map(|range| range.end).max().unwrap_or(0).max(HIGH_START);
        let needed_bytes = top.next_multiple_of(PAGE_BYTES) + bytes.next_multiple_of(PAGE_BYTES);
        if needed_bytes > limit.min(MAX_RAM_MIB << 20) || needed_bytes <= self.ram_bytes() {
            return Err(BootError::Unsupported {
                format: "given",
                what: "its initrd is too large for the addresses that it may have; shrink it",
            });
        }
        Err(self.too_small(what, needed_bytes))
    }

    /// Copies bytes into RAM that was claimed or placed.
    pub(super) fn write(&self, address: u64, bytes: &[u8]) {
        self.ram
            .memory()
            .write_slice(bytes, GuestAddress(address))
            .expect("only claimed or placed RAM is written");
    }

    /// Places the command line, NUL-terminated, and returns its address.
    ///
    /// # Errors
    /// Longer than `limit_bytes`.
    pub(super) fn place_cmdline(
        &mut self,
        cmdline: &str,
        limit_bytes: usize,
    ) -> Result<u64, BootError> {
        if cmdline.len() > limit_bytes {
            return Err(BootError::CommandLineTooLong { bytes: cmdline.len(), limit_bytes });
        }
        let address = self.place_low("command line", cmdline.len() as u64 + 1)?;
        self.write(address, cmdline.as_bytes());
        self.write(address + cmdline.len() as u64, &[0]);
        Ok(address)
    }

    /// Places and copies the initrd, if there is one, ending at or below `limit`.
    ///
    /// # Errors
    /// No room for it.
    pub(super) fn place_initrd(
        &mut self,
        initrd: Option<&[u8]>,
        limit: u64,
    ) -> Result<Option<Range<u64>>, BootError> {
        let Some(bytes) = initrd else { return Ok(None) };
        let start = self.place_high("initrd", bytes.len() as u64, limit)?;
        self.write(start, bytes);
        Ok(Some(start..start + bytes.len() as u64))
    }

    /// The RAM that this fills, for linux-loader.
    pub(super) fn ram(&self) -> &GuestRam {
        self.ram
    }

    fn first_overlap(&self, start: u64, bytes: u64) -> Option<Range<u64>> {
        let end = start + bytes;
        self.used.iter().find(|range| range.start < end && start < range.end).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_go_around_what_an_image_claims() {
        let ram = GuestRam::new(4).expect("4 MiB");
        let mut placement = Placement::new(&ram);
        placement.claim("image", 0x800, 0x1000).expect("conventional memory");
        assert_eq!(placement.place_low("table", 0x2000), Ok(0x2000));
        assert_eq!(placement.place_low("table", 1), Ok(0x4000));
        placement.claim("image", 0x5000, EBDA_START - 0x5000).expect("conventional memory");
        assert!(matches!(placement.place_low("table", 1), Err(BootError::OutsideRam { .. })));
    }

    #[test]
    fn an_initrd_goes_as_high_as_it_may() {
        let ram = GuestRam::new(8).expect("8 MiB");
        let mut placement = Placement::new(&ram);
        assert_eq!(placement.place_high("initrd", 0x1001, u64::MAX), Ok(0x7f_e000));
        assert_eq!(placement.place_high("initrd", 0x1000, u64::MAX), Ok(0x7f_d000));
        assert_eq!(placement.place_high("initrd", 0x1000, 0x40_0000), Ok(0x3f_f000));
        placement.claim("image", 0x10_0000, 0x2f_f000).expect("high memory");
        let error = placement.place_high("initrd", 0x60_0000, u64::MAX);
        assert_eq!(
            error,
            Err(BootError::MemoryTooSmall { what: "initrd", needed_mib: 14, ram_mib: 8 })
        );
    }

    #[test]
    fn an_image_in_the_video_hole_or_past_the_end_is_refused() {
        let ram = GuestRam::new(4).expect("4 MiB");
        let mut placement = Placement::new(&ram);
        for (start, bytes) in [(0x9_f000, 0x2000), (0xb_8000, 1), (u64::MAX - 1, 2), (3 << 30, 1)] {
            let error = placement.claim("image", start, bytes);
            assert!(matches!(error, Err(BootError::OutsideRam { .. })), "{start:#x}: {error:?}");
        }
        assert_eq!(
            placement.claim("image", 0x40_0000, 1),
            Err(BootError::MemoryTooSmall { what: "image", needed_mib: 5, ram_mib: 4 })
        );
    }
}
