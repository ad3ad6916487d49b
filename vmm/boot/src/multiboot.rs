//! Multiboot version 1, as hobby kernels and CPU test suites use it: a header within the first
//! 8 KiB, an ELF or plain load addresses, 32-bit protected mode with EBX pointing to the
//! information structure.

use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::{CpuState, RAX, RBX};

use super::GuestSource;
use super::elf::{self, Elf};
use super::error::BootError;
use super::placement::Placement;
use super::state;

const FORMAT: &str = "multiboot";
const HEADER_MAGIC: u32 = 0x1bad_b002;
/// What EAX holds when the kernel starts.
const LOADER_MAGIC: u64 = 0x2bad_b002;
/// The header lies, 4-byte aligned, within this much of the file.
const SEARCH_BYTES: usize = 8192;
/// Header flags 0 to 2 are known: page-aligned modules, memory information, video mode. A video
/// mode is not provided; kernels that ask for one also run on the serial console.
const KNOWN_REQUIREMENTS: u32 = 0x7;
/// Header flag 16: the header holds load addresses, which stand above the ELF's own.
const HAS_ADDRESSES: u32 = 1 << 16;
/// Kernels of this protocol keep their command line in buffers of a page or less.
const CMDLINE_BYTES: usize = 4095;

/// Information flags: memory sizes (0), command line (2), modules (3), memory map (6), loader's
/// name (9).
const INFO_FLAGS: u32 = 1 | 1 << 2 | 1 << 6 | 1 << 9;
const INFO_FLAG_MODULES: u32 = 1 << 3;
const INFO_BYTES: usize = 88;

/// A header whose checksum holds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    /// Where in the file it starts.
    offset: usize,
    flags: u32,
}

fn u32_at(file: &[u8], offset: usize) -> Option<u32> {
    file.get(offset..offset + 4).map(|bytes| u32::from_le_bytes(bytes.try_into().expect("four")))
}

/// Finds the header, if the file has one.
pub(super) fn find_header(file: &[u8]) -> Option<Header> {
    (0..file.len().min(SEARCH_BYTES)).step_by(4).find_map(|offset| {
        let magic = u32_at(file, offset)?;
        let flags = u32_at(file, offset + 4)?;
        let checksum = u32_at(file, offset + 8)?;
        let sound = magic == HEADER_MAGIC && magic.wrapping_add(flags).wrapping_add(checksum) == 0;
        sound.then_some(Header { offset, flags })
    })
}

/// Loads a file in which [`find_header`] finds a header.
///
/// # Errors
/// Damaged, or too large for RAM.
pub(super) fn load(image: &GuestSource<'_>, ram: &GuestRam) -> Result<CpuState, BootError> {
    let file = image.kernel;
    let header = find_header(file)
        .ok_or(BootError::Malformed { format: FORMAT, what: "its multiboot header is gone" })?;
    if header.flags & 0xffff & !KNOWN_REQUIREMENTS != 0 {
        return Err(BootError::Unsupported {
            format: FORMAT,
            what: "its header requires features that multiboot v1 does not define; \
                   build it for multiboot version 1",
        });
    }
    let mut placement = Placement::new(ram);
    let entry = if header.flags & HAS_ADDRESSES != 0 {
        load_by_addresses(file, header, &mut placement)?
    } else if elf::has_magic(file) {
        let parsed = Elf::parse(file)?;
        parsed.load(&mut placement)?;
        parsed.entry()?
    } else {
        return Err(BootError::Malformed {
            format: FORMAT,
            what: "it is no ELF and its header gives no load addresses",
        });
    };
    let entry = u32::try_from(entry)
        .map_err(|_| BootError::Malformed { format: FORMAT, what: "it starts above 4 GiB" })?;

    let info_address = write_info(image, &mut placement)?;
    let mut state = state::protected_mode(&mut placement, entry)?;
    state.gpr[RAX] = LOADER_MAGIC;
    state.gpr[RBX] = info_address;
    Ok(state)
}

/// Loads what the header's address fields describe, and returns the entry point.
fn load_by_addresses(
    file: &[u8],
    header: Header,
    placement: &mut Placement<'_>,
) -> Result<u64, BootError> {
    let malformed = |what| BootError::Malformed { format: FORMAT, what };
    let field = |index: usize| {
        u32_at(file, header.offset + 12 + 4 * index).map(u64::from).ok_or(BootError::Truncated {
            format: FORMAT,
            needed_bytes: (header.offset + 32) as u64,
            file_bytes: file.len() as u64,
        })
    };
    let (header_address, load_start, load_end, bss_end, entry) =
        (field(0)?, field(1)?, field(2)?, field(3)?, field(4)?);

    let before_header = header_address
        .checked_sub(load_start)
        .ok_or(malformed("its header lies before its load address"))?;
    let file_start = (header.offset as u64)
        .checked_sub(before_header)
        .ok_or(malformed("its load address lies before the start of the file"))?;
    let load_bytes = match load_end {
        0 => file.len() as u64 - file_start,
        end => end.checked_sub(load_start).ok_or(malformed("it ends before it starts"))?,
    };
    let needed_bytes = file_start + load_bytes;
    let bytes =
        file.get(file_start as usize..needed_bytes as usize).ok_or(BootError::Truncated {
            format: FORMAT,
            needed_bytes,
            file_bytes: file.len() as u64,
        })?;
    let memory_bytes = match bss_end {
        0 => load_bytes,
        end => end.checked_sub(load_start).ok_or(malformed("its BSS ends before it starts"))?,
    };
    placement.claim("kernel", load_start, load_bytes.max(memory_bytes))?;
    placement.write(load_start, bytes);
    Ok(entry)
}

/// Writes the information structure and what it points to; returns its address.
fn write_info(image: &GuestSource<'_>, placement: &mut Placement<'_>) -> Result<u64, BootError> {
    const LOADER_NAME: &[u8] = b"Reprise\0";
    let cmdline = placement.place_cmdline(image.cmdline, CMDLINE_BYTES)?;
    let map = memory_map_bytes(placement);
    let map_address = placement.place_low("memory map", map.len() as u64)?;
    placement.write(map_address, &map);
    let name_address = placement.place_low("loader's name", LOADER_NAME.len() as u64)?;
    placement.write(name_address, LOADER_NAME);

    let mut flags = INFO_FLAGS;
    let mut modules = (0, 0);
    if let Some(range) = placement.place_initrd(image.initrd, u64::MAX)? {
        let list = [range.start as u32, range.end as u32, 0, 0];
        let bytes: Vec<u8> = list.iter().flat_map(|word| word.to_le_bytes()).collect();
        let address = placement.place_low("module list", bytes.len() as u64)?;
        placement.write(address, &bytes);
        flags |= INFO_FLAG_MODULES;
        modules = (1, address as u32);
    }

    let [lower, .., upper] = placement.memory_map();
    let mut info = [0; INFO_BYTES];
    // (offset in the structure, value); all addresses lie below 4 GiB.
    let fields = [
        (0, flags),
        (4, (lower.bytes >> 10) as u32),
        (8, (upper.bytes >> 10) as u32),
        (16, cmdline as u32),
        (20, modules.0),
        (24, modules.1),
        (44, map.len() as u32),
        (48, map_address as u32),
        (64, name_address as u32),
    ];
    for (offset, value) in fields {
        info[offset..offset + 4].copy_from_slice(&u32::to_le_bytes(value));
    }
    let info_address = placement.place_low("information structure", INFO_BYTES as u64)?;
    placement.write(info_address, &info);
    Ok(info_address)
}

/// The memory map: each entry starts with its size, that field not counted.
fn memory_map_bytes(placement: &Placement<'_>) -> Vec<u8> {
    const ENTRY_BYTES: u32 = 20;
    let mut bytes = Vec::new();
    for entry in placement.memory_map() {
        bytes.extend(ENTRY_BYTES.to_le_bytes());
        bytes.extend(entry.start.to_le_bytes());
        bytes.extend(entry.bytes.to_le_bytes());
        bytes.extend(entry.kind.to_le_bytes());
    }
    bytes
}
