//! What a PC's firmware keeps in CMOS memory, as the IBM PC/AT Technical Reference lays it out, with
//! the memory sizes that later firmware added.

use alloc::vec;
use alloc::vec::Vec;

/// Registers of the clock and memory together.
pub(super) const BYTES: usize = 128;

const EQUIPMENT: usize = 0x14;
const EQUIPMENT_FPU: u8 = 1 << 1;
/// KiB below 1 MiB.
const BASE_MEMORY: usize = 0x15;
/// KiB above 1 MiB, as set up and as found.
const EXTENDED_MEMORY: [usize; 2] = [0x17, 0x30];
/// Units of 64 KiB above 16 MiB.
const HIGH_MEMORY: usize = 0x34;
/// The checksum, high byte first, of the bytes that set-up decides.
const CHECKSUM: usize = 0x2e;
const CHECKED: core::ops::Range<usize> = 0x10..CHECKSUM;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// CMOS memory of a machine with this much RAM and no disk; the clock's registers are zeros.
pub(super) fn contents(ram_bytes: u64) -> Vec<u8> {
    let mut bytes = vec![0; BYTES];
    bytes[EQUIPMENT] = EQUIPMENT_FPU;
    put(&mut bytes, BASE_MEMORY, ram_bytes / KIB, 640);
    for index in EXTENDED_MEMORY {
        put(&mut bytes, index, ram_bytes.saturating_sub(MIB) / KIB, u16::MAX);
    }
    put(&mut bytes, HIGH_MEMORY, ram_bytes.saturating_sub(16 * MIB) / (64 * KIB), u16::MAX);
    let checksum: u16 = bytes[CHECKED].iter().map(|&byte| u16::from(byte)).sum();
    bytes[CHECKSUM..CHECKSUM + 2].copy_from_slice(&checksum.to_be_bytes());
    bytes
}

/// Stores a size, little-endian, or the largest that is told.
fn put(bytes: &mut [u8], index: usize, size: u64, largest: u16) {
    let size = size.min(u64::from(largest)) as u16;
    bytes[index..index + 2].copy_from_slice(&size.to_le_bytes());
}
