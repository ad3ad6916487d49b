//! The smallest sound image of each format, for tests.

use reprise_machine::ram::GuestRam;

/// What the code of every test image is: HLT, over and over.
pub(super) const CODE: [u8; 1024] = [0xf4; 1024];

/// RAM that every test image fits into.
pub(super) fn ram() -> GuestRam {
    GuestRam::new(32).expect("32 MiB")
}

fn put(file: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    if file.len() < offset + bytes.len() {
        file.resize(offset + bytes.len(), 0);
    }
    file[offset..offset + bytes.len()].copy_from_slice(bytes);
}

/// A bzImage that takes an initrd below 16 MiB and unpacks to 16 to 17 MiB.
pub(super) fn bzimage() -> Vec<u8> {
    let mut file = vec![0; 1024];
    put(&mut file, 0x1f1, &[1]);
    put(&mut file, 0x1f4, &(CODE.len() as u32 / 16).to_le_bytes());
    put(&mut file, 0x1fe, &[0x55, 0xaa, 0xeb, 0x66]);
    put(&mut file, 0x202, b"HdrS");
    put(&mut file, 0x206, &0x20f_u16.to_le_bytes());
    put(&mut file, 0x211, &[1]);
    put(&mut file, 0x22c, &0x00ff_ffff_u32.to_le_bytes());
    put(&mut file, 0x236, &1_u16.to_le_bytes());
    put(&mut file, 0x238, &255_u32.to_le_bytes());
    put(&mut file, 0x258, &0x100_0000_u64.to_le_bytes());
    put(&mut file, 0x260, &0x10_0000_u32.to_le_bytes());
    file.extend(CODE);
    file
}

/// A PVH note with this entry point.
fn pvh_note(entry: u32) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4, 4, 18] {
        note.extend(u32::to_le_bytes(word));
    }
    note.extend(b"Xen\0");
    note.extend(entry.to_le_bytes());
    note
}

/// An ELF64 with one segment at 1 MiB (virtual address in the kernel half), entry at its start.
pub(super) fn elf64(pvh_entry: Option<u32>) -> Vec<u8> {
    let note = pvh_entry.map(pvh_note).unwrap_or_default();
    let mut file = Vec::new();
    put(&mut file, 0, b"\x7fELF\x02\x01\x01");
    put(&mut file, 16, &[2, 0, 62, 0, 1, 0, 0, 0]);
    put(&mut file, 24, &0xffff_ffff_8010_0000_u64.to_le_bytes());
    put(&mut file, 32, &64_u64.to_le_bytes());
    put(&mut file, 52, &[64, 0, 56, 0, 2, 0]);
    let segment = |kind: u32, words: [u64; 6]| {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend(5_u32.to_le_bytes());
        bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        bytes
    };
    let code_bytes = CODE.len() as u64;
    let load = [0x200, 0xffff_ffff_8010_0000, 0x10_0000, code_bytes, code_bytes + 4096, 4096];
    let notes = [0x100, 0, 0, note.len() as u64, note.len() as u64, 4];
    put(&mut file, 64, &segment(1, load));
    put(&mut file, 120, &segment(4, notes));
    put(&mut file, 0x100, &note);
    put(&mut file, 0x200, &CODE);
    file
}

/// An ELF32 with one segment at 1 MiB, entry at its start.
pub(super) fn elf32(pvh_entry: Option<u32>) -> Vec<u8> {
    let note = pvh_entry.map(pvh_note).unwrap_or_default();
    let mut file = Vec::new();
    put(&mut file, 0, b"\x7fELF\x01\x01\x01");
    put(&mut file, 16, &[2, 0, 3, 0, 1, 0, 0, 0]);
    put(&mut file, 24, &0x10_0000_u32.to_le_bytes());
    put(&mut file, 28, &52_u32.to_le_bytes());
    put(&mut file, 40, &[52, 0, 32, 0, 2, 0]);
    let segment = |words: [u32; 8]| words.map(u32::to_le_bytes).concat();
    let code_bytes = CODE.len() as u32;
    let note_bytes = note.len() as u32;
    let load = [1, 0x200, 0x10_0000, 0x10_0000, code_bytes, code_bytes + 4096, 5, 4096];
    put(&mut file, 52, &segment(load));
    put(&mut file, 84, &segment([4, 0x100, 0, 0, note_bytes, note_bytes, 4, 4]));
    put(&mut file, 0x100, &note);
    put(&mut file, 0x200, &CODE);
    file
}

/// A multiboot header, with load addresses where given: header, load, load end, BSS end, entry.
fn multiboot_header(flags: u32, addresses: Option<[u32; 5]>) -> Vec<u8> {
    let flags = flags | u32::from(addresses.is_some()) << 16;
    let checksum = 0_u32.wrapping_sub(0x1bad_b002).wrapping_sub(flags);
    let words = [0x1bad_b002, flags, checksum].into_iter().chain(addresses.into_iter().flatten());
    words.flat_map(u32::to_le_bytes).collect()
}

/// A multiboot ELF32.
pub(super) fn multiboot_elf(flags: u32) -> Vec<u8> {
    let mut file = elf32(None);
    put(&mut file, 0x180, &multiboot_header(flags, None));
    file
}

/// A flat multiboot kernel: 16 bytes that are not loaded, then header and code at 1 MiB.
pub(super) fn multiboot_flat() -> Vec<u8> {
    let mut file = vec![0xee; 16];
    file.extend(multiboot_header(3, Some([0x10_0000, 0x10_0000, 0, 0x10_2000, 0x10_0020])));
    file.extend(CODE);
    file
}
