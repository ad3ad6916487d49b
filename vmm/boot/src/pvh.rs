//! PVH: an ELF entered in 32-bit protected mode, EBX pointing to Xen's `hvm_start_info`.

use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::{CpuState, RBX};
use vm_memory::ByteValued;

use super::GuestSource;
use super::elf::Elf;
use super::error::BootError;
use super::placement::Placement;
use super::state;

/// No kernel known takes more than a page.
const CMDLINE_BYTES: usize = 4095;
/// The version of the structure that brought the memory map.
const VERSION_WITH_MEMORY_MAP: u32 = 1;

/// Loads an ELF that has a PVH note.
///
/// # Errors
/// Damaged, or too large for RAM.
pub(super) fn load(image: &GuestSource<'_>, ram: &GuestRam) -> Result<CpuState, BootError> {
    let file = Elf::parse(image.kernel)?;
    let entry = file
        .pvh_entry()?
        .ok_or(BootError::Malformed { format: "ELF", what: "its PVH note is gone" })?;
    let mut placement = Placement::new(ram);
    file.load(&mut placement)?;

    let cmdline_paddr = placement.place_cmdline(image.cmdline, CMDLINE_BYTES)?;
    let initrd = placement.place_initrd(image.initrd, u64::MAX)?;
    let (modlist_paddr, nr_modules) = match initrd {
        None => (0, 0),
        Some(range) => {
            let module = hvm_modlist_entry {
                paddr: range.start,
                size: range.end - range.start,
                cmdline_paddr: 0,
                reserved: 0,
            };
            (write_table(&mut placement, "module list", module.as_slice())?, 1)
        }
    };
    let map: Vec<u8> = placement
        .memory_map()
        .iter()
        .flat_map(|entry| {
            let row = hvm_memmap_table_entry {
                addr: entry.start,
                size: entry.bytes,
                type_: entry.kind,
                reserved: 0,
            };
            row.as_slice().to_vec()
        })
        .collect();
    let start_info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: VERSION_WITH_MEMORY_MAP,
        flags: 0,
        nr_modules,
        modlist_paddr,
        cmdline_paddr,
        rsdp_paddr: 0,
        memmap_paddr: write_table(&mut placement, "memory map", &map)?,
        memmap_entries: placement.memory_map().len() as u32,
        reserved: 0,
    };
    let start_info_address = write_table(&mut placement, "start info", start_info.as_slice())?;

    let mut state = state::protected_mode(&mut placement, entry)?;
    state.gpr[RBX] = start_info_address;
    Ok(state)
}

fn write_table(
    placement: &mut Placement<'_>,
    what: &'static str,
    bytes: &[u8],
) -> Result<u64, BootError> {
    let address = placement.place_low(what, bytes.len() as u64)?;
    placement.write(address, bytes);
    Ok(address)
}
