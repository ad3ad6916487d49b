//! The CPU's first state, and the tables in RAM that agree with it.

use reprise_trace::cpu_state::{CS, CpuState, DescriptorTable, RSP, Segment};

use super::error::BootError;
use super::placement::Placement;

/// Selector of the flat code segment: what Linux's boot protocol calls `__BOOT_CS`.
const CODE_SELECTOR: u16 = 0x10;
/// Selector of the flat data segment: `__BOOT_DS`.
const DATA_SELECTOR: u16 = 0x18;
/// Selector of the task state segment.
const TASK_SELECTOR: u16 = 0x20;

/// Execute/read, accessed, present, 32-bit, 4 KiB granularity.
const CODE_32_ATTRIBUTES: u16 = 0xc09b;
/// Execute/read, accessed, present, 64-bit, 4 KiB granularity.
const CODE_64_ATTRIBUTES: u16 = 0xa09b;
/// Read/write, accessed, present, 32-bit, 4 KiB granularity.
const DATA_ATTRIBUTES: u16 = 0xc093;
/// Busy 32-bit (in long mode 64-bit) task state segment, present.
const TASK_ATTRIBUTES: u16 = 0x008b;

/// CR0: protected mode, and the extension type bit, which cannot be cleared.
const CR0_PROTECTED: u64 = 0x11;
/// CR0.PG.
const CR0_PAGING: u64 = 1 << 31;
/// CR4.PAE.
const CR4_PAE: u64 = 1 << 5;
/// EFER.LME and EFER.LMA.
const EFER_LONG: u64 = 1 << 8 | 1 << 10;

/// What a page-directory level maps: page tables cover the low 4 GiB.
const MAPPED_GIB: u64 = 4;
/// Present, writable, accessed: an entry that points to a table.
const TABLE_FLAGS: u64 = 0x23;
/// Present, writable, accessed, dirty, large page. Accessed and dirty are set from the start, so
/// that no engine's habit of setting them shows in RAM.
const LARGE_PAGE_FLAGS: u64 = 0xe3;

/// A stack for kernels that push before they set their own, as they may after a boot loader.
const STACK_BYTES: u64 = 4096;

/// 32-bit protected mode, flat segments, paging off: multiboot and PVH.
///
/// # Errors
/// The image leaves no room for the tables.
pub(super) fn protected_mode(
    placement: &mut Placement<'_>,
    entry: u32,
) -> Result<CpuState, BootError> {
    flat_state(placement, CODE_32_ATTRIBUTES, u64::from(entry))
}

/// 64-bit mode with the low 4 GiB mapped to themselves: Linux's 64-bit boot protocol.
///
/// # Errors
/// The image leaves no room for the tables.
pub(super) fn long_mode(placement: &mut Placement<'_>, entry: u64) -> Result<CpuState, BootError> {
    let cr3 = write_identity_map(placement)?;
    let state = flat_state(placement, CODE_64_ATTRIBUTES, entry)?;
    Ok(CpuState { cr0: CR0_PROTECTED | CR0_PAGING, cr3, cr4: CR4_PAE, efer: EFER_LONG, ..state })
}

fn flat_state(
    placement: &mut Placement<'_>,
    code_attributes: u16,
    rip: u64,
) -> Result<CpuState, BootError> {
    let flat = |selector, attributes| Segment { selector, attributes, limit: u32::MAX, base: 0 };
    let code = flat(CODE_SELECTOR, code_attributes);
    let data = flat(DATA_SELECTOR, DATA_ATTRIBUTES);
    let task =
        Segment { selector: TASK_SELECTOR, attributes: TASK_ATTRIBUTES, limit: 0x67, base: 0 };

    let gdt = [0, 0, descriptor(&code), descriptor(&data), descriptor(&task), 0];
    let gdt_bytes: Vec<u8> = gdt.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    let gdt_start = placement.place_low("descriptor table", gdt_bytes.len() as u64)?;
    placement.write(gdt_start, &gdt_bytes);
    let stack_start = placement.place_low("stack", STACK_BYTES)?;

    let mut state = CpuState {
        rip,
        segments: [data; 6],
        tr: task,
        gdtr: DescriptorTable { base: gdt_start, limit: (gdt_bytes.len() - 1) as u16 },
        cr0: CR0_PROTECTED,
        ..CpuState::default()
    };
    state.segments[CS] = code;
    state.gpr[RSP] = stack_start + STACK_BYTES;
    Ok(state)
}

/// A segment's eight-byte descriptor.
fn descriptor(segment: &Segment) -> u64 {
    let granular = segment.attributes & 0x8000 != 0;
    let limit = u64::from(if granular { segment.limit >> 12 } else { segment.limit });
    let attributes = u64::from(segment.attributes);
    limit & 0xffff
        | (segment.base & 0xff_ffff) << 16
        | (attributes & 0xff) << 40
        | (limit >> 16 & 0xf) << 48
        | (attributes >> 12 & 0xf) << 52
        | (segment.base >> 24 & 0xff) << 56
}

/// Maps the low 4 GiB to themselves with 2 MiB pages, and returns CR3.
fn write_identity_map(placement: &mut Placement<'_>) -> Result<u64, BootError> {
    const TABLE_BYTES: u64 = 4096;
    let root = placement.place_low("page tables", (2 + MAPPED_GIB) * TABLE_BYTES)?;
    let pointers = root + TABLE_BYTES;
    let directories = pointers + TABLE_BYTES;
    placement.write(root, &(pointers | TABLE_FLAGS).to_le_bytes());
    for gib in 0..MAPPED_GIB {
        let directory = directories + gib * TABLE_BYTES;
        placement.write(pointers + gib * 8, &(directory | TABLE_FLAGS).to_le_bytes());
        for entry in 0..512 {
            let page = gib << 30 | entry << 21;
            placement.write(directory + entry * 8, &(page | LARGE_PAGE_FLAGS).to_le_bytes());
        }
    }
    Ok(root)
}

#[cfg(test)]
mod tests {
    use reprise_machine::ram::GuestRam;
    use reprise_trace::cpu_state::{DS, SS};

    use super::*;

    fn read_u64(ram: &GuestRam, address: u64) -> u64 {
        let mut bytes = [0; 8];
        ram.read(address, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    #[test]
    fn descriptors_encode_as_the_manual_has_them() {
        let flat_code = Segment { selector: 0x10, attributes: 0xc09b, limit: u32::MAX, base: 0 };
        assert_eq!(descriptor(&flat_code), 0x00cf_9b00_0000_ffff);
        let odd =
            Segment { selector: 0, attributes: 0x008b, limit: 0x1_2345, base: 0xab_cd12_34ef };
        assert_eq!(descriptor(&odd), 0xcd01_8b12_34ef_2345);
    }

    #[test]
    fn the_tables_in_ram_agree_with_the_hidden_parts() {
        let ram = GuestRam::new(4).expect("4 MiB");
        let state = long_mode(&mut Placement::new(&ram), 0x10_0200).expect("room");
        for segment in [state.segments[CS], state.segments[SS], state.segments[DS], state.tr] {
            let in_ram = read_u64(&ram, state.gdtr.base + u64::from(segment.selector));
            assert_eq!(in_ram, descriptor(&segment));
        }
        assert!(state.segments[CS].long() && !state.segments[CS].default_32());
        assert_eq!(state.cpl(), 0);
    }

    #[test]
    fn page_tables_map_the_low_4_gib_to_themselves() {
        let ram = GuestRam::new(4).expect("4 MiB");
        let state = long_mode(&mut Placement::new(&ram), 0).expect("room");
        let address_mask = 0x000f_ffff_ffff_f000;
        for linear in [0_u64, 0x20_0000, 0x1234_5678, 0xffff_ffff] {
            let pointers = read_u64(&ram, state.cr3 + (linear >> 39) * 8) & address_mask;
            let directory = read_u64(&ram, pointers + (linear >> 30) * 8) & address_mask;
            let page = read_u64(&ram, directory + (linear >> 21 & 511) * 8);
            assert_eq!(page & 0x83, 0x83, "{linear:#x}");
            assert_eq!(page & address_mask, linear >> 21 << 21, "{linear:#x}");
        }
    }
}
