//! Linux's 64-bit boot protocol: the zero page, the command line, the initrd, and 64-bit mode with
//! RSI pointing to the zero page. A bzImage and an ELF64 vmlinux share it.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::{CpuState, RSI};
use vm_memory::ByteValued;

use super::GuestSource;
use super::elf::Elf;
use super::error::BootError;
use super::placement::Placement;
use super::state;

/// `type_of_loader`: a boot loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
/// `vid_mode`: whatever the screen shows.
const VIDEO_MODE_NORMAL: u16 = 0xffff;
/// The command line that a kernel without a setup header takes: Linux's own limit.
const DEFAULT_CMDLINE_BYTES: u32 = 2047;
/// The highest address of an initrd's last byte where a header says nothing.
const DEFAULT_INITRD_ADDRESS_MAX: u32 = 0x7fff_ffff;

/// Loads an ELF64 kernel and starts it at its entry point.
///
/// # Errors
/// Damaged, or too large for RAM.
pub(super) fn load_elf(image: &GuestSource<'_>, ram: &GuestRam) -> Result<CpuState, BootError> {
    let file = Elf::parse(image.kernel)?;
    let entry = file.entry()?;
    let mut placement = Placement::new(ram);
    file.load(&mut placement)?;
    let header = setup_header {
        boot_flag: 0xaa55,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x20f,
        loadflags: 1,
        initrd_addr_max: DEFAULT_INITRD_ADDRESS_MAX,
        cmdline_size: DEFAULT_CMDLINE_BYTES,
        ..setup_header::default()
    };
    start(&mut placement, image, header, entry)
}

/// Writes what goes with a kernel that is in place, and returns the CPU state that enters it.
///
/// # Errors
/// No room for the command line, the initrd or the tables.
pub(super) fn start(
    placement: &mut Placement<'_>,
    image: &GuestSource<'_>,
    mut header: setup_header,
    entry: u64,
) -> Result<CpuState, BootError> {
    let cmdline_address = placement.place_cmdline(image.cmdline, header.cmdline_size as usize)?;
    let initrd_limit = u64::from(header.initrd_addr_max) + 1;
    let initrd = placement.place_initrd(image.initrd, initrd_limit)?;

    header.type_of_loader = LOADER_UNDEFINED;
    header.vid_mode = VIDEO_MODE_NORMAL;
    // All of RAM lies below 4 GiB, so 32-bit fields hold every address.
    header.cmd_line_ptr = cmdline_address as u32;
    if let Some(range) = initrd {
        header.ramdisk_image = range.start as u32;
        header.ramdisk_size = (range.end - range.start) as u32;
    }

    let mut zero_page = boot_params { hdr: header, ..boot_params::default() };
    let map = placement.memory_map();
    for (slot, entry) in zero_page.e820_table.iter_mut().zip(map) {
        *slot = boot_e820_entry { addr: entry.start, size: entry.bytes, r#type: entry.kind };
    }
    zero_page.e820_entries = map.len() as u8;
    let zero_page_address = placement.place_low("zero page", size_of::<boot_params>() as u64)?;
    placement.write(zero_page_address, zero_page.as_slice());

    let mut state = state::long_mode(placement, entry)?;
    state.gpr[RSI] = zero_page_address;
    Ok(state)
}
