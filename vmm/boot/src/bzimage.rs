//! Linux's bzImage, started through the 64-bit boot protocol (Documentation/arch/x86/boot.rst).

use std::io::Cursor;

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, KernelLoader};
use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::CpuState;
use vm_memory::{ByteValued, GuestAddress};

use super::error::BootError;
use super::placement::Placement;
use super::{GuestSource, linux64};

const FORMAT: &str = "bzImage";
/// File offset of the setup header.
const HEADER_OFFSET: usize = 0x1f1;
/// File offset of the magic `HdrS`.
const MAGIC_OFFSET: usize = 0x202;
/// File offset of the byte that says how far past [`MAGIC_OFFSET`] the setup header reaches.
const HEADER_END_OFFSET: usize = 0x201;
/// The protocol version that brought `xloadflags`.
const VERSION_WITH_XLOADFLAGS: u16 = 0x20c;
/// `xloadflags`: there is a 64-bit entry point at 0x200.
const XLF_KERNEL_64: u16 = 1;
/// `loadflags`: the protected-mode code is loaded at 1 MiB.
const LOADED_HIGH: u8 = 1;
/// The 64-bit entry point, from the start of the protected-mode code.
const ENTRY_64_OFFSET: u64 = 0x200;
/// Where the protected-mode code goes.
const LOAD_ADDRESS: u64 = 0x10_0000;

/// Whether the file is a Linux kernel with a setup header.
pub(super) fn has_magic(file: &[u8]) -> bool {
    file.get(MAGIC_OFFSET..MAGIC_OFFSET + 4) == Some(b"HdrS")
}

/// Loads a file that [`has_magic`].
///
/// # Errors
/// Truncated, without a 64-bit entry point, or too large for RAM.
pub(super) fn load(image: &GuestSource<'_>, ram: &GuestRam) -> Result<CpuState, BootError> {
    let header = read_header(image.kernel)?;
    let mut placement = Placement::new(ram);

    // The file's protected-mode code, then the area where it unpacks the kernel.
    let code_bytes = image.kernel.len() as u64 - setup_bytes(&header);
    placement.claim("kernel", LOAD_ADDRESS, code_bytes)?;
    placement.claim("kernel", header.pref_address, u64::from(header.init_size))?;
    BzImage::load(
        placement.ram().memory(),
        Some(GuestAddress(LOAD_ADDRESS)),
        &mut Cursor::new(image.kernel),
        None,
    )
    .map_err(|_| BootError::Malformed { format: FORMAT, what: "its setup header is not sound" })?;

    linux64::start(&mut placement, image, header, LOAD_ADDRESS + ENTRY_64_OFFSET)
}

/// Bytes before the protected-mode code: the boot sector and the setup sectors.
fn setup_bytes(header: &setup_header) -> u64 {
    let sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    (sectors + 1) * 512
}

fn read_header(file: &[u8]) -> Result<setup_header, BootError> {
    let truncated = |needed_bytes: u64| BootError::Truncated {
        format: FORMAT,
        needed_bytes,
        file_bytes: file.len() as u64,
    };
    // An old kernel's header is shorter than the structure: what lies behind it is not header.
    let header_end = MAGIC_OFFSET + file.get(HEADER_END_OFFSET).copied().map_or(0, usize::from);
    let mut header = setup_header::default();
    let wanted = header.as_mut_slice();
    let present = header_end.saturating_sub(HEADER_OFFSET).min(wanted.len());
    let source = file
        .get(HEADER_OFFSET..HEADER_OFFSET + present)
        .ok_or_else(|| truncated((HEADER_OFFSET + present) as u64))?;
    wanted[..present].copy_from_slice(source);

    if header.version < VERSION_WITH_XLOADFLAGS || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BootError::Unsupported {
            format: FORMAT,
            what: "it has no 64-bit entry point; give an x86-64 kernel, Linux 3.8 or later",
        });
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(BootError::Malformed { format: FORMAT, what: "it is not loaded high" });
    }
    // The size of the protected-mode code, in units of 16 bytes.
    let code_bytes = u64::from(header.syssize) * 16;
    let needed_bytes = setup_bytes(&header) + code_bytes;
    if (file.len() as u64) < needed_bytes {
        return Err(truncated(needed_bytes));
    }
    if code_bytes <= ENTRY_64_OFFSET {
        return Err(BootError::Malformed { format: FORMAT, what: "it holds no code" });
    }
    if u64::from(header.init_size) < code_bytes {
        return Err(BootError::Malformed { format: FORMAT, what: "it unpacks to less than it is" });
    }
    Ok(header)
}
