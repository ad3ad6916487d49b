//! Every format: a sound image starts as its protocol says; a broken one ends in an error.

use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::{CS, CpuState, RAX, RBX, RSI};

use super::test_images::{bzimage, elf32, elf64, multiboot_elf, multiboot_flat, ram};
use super::*;

fn source(kernel: &[u8]) -> GuestSource<'_> {
    GuestSource { kernel, initrd: Some(b"070701 an initrd"), cmdline: "console=ttyS0" }
}

fn read<const N: usize>(ram: &GuestRam, address: u64) -> [u8; N] {
    let mut bytes = [0; N];
    ram.read(address, &mut bytes);
    bytes
}

fn read_u32(ram: &GuestRam, address: u64) -> u64 {
    u64::from(u32::from_le_bytes(read(ram, address)))
}

fn load_sound(kernel: &[u8]) -> (CpuState, GuestRam) {
    let ram = ram();
    let state = load(&source(kernel), &ram).expect("the image is sound");
    (state, ram)
}

fn sound_images() -> Vec<(&'static str, Vec<u8>, Protocol)> {
    vec![
        ("bzImage", bzimage(), Protocol::BzImage),
        ("ELF64", elf64(None), Protocol::Elf64),
        ("PVH ELF64", elf64(Some(0x10_0010)), Protocol::Pvh),
        ("PVH ELF32", elf32(Some(0x10_0010)), Protocol::Pvh),
        ("multiboot ELF", multiboot_elf(3), Protocol::Multiboot),
        ("flat multiboot", multiboot_flat(), Protocol::Multiboot),
    ]
}

#[test]
fn each_format_is_told_by_its_content() {
    for (name, kernel, protocol) in sound_images() {
        assert_eq!(detect(&kernel), Ok(protocol), "{name}");
    }
}

#[test]
fn bzimage_starts_in_64_bit_mode_with_a_zero_page() {
    let (state, ram) = load_sound(&bzimage());
    assert_eq!(state.rip, 0x10_0200);
    assert!(state.segments[CS].long());
    let zero_page = state.gpr[RSI];
    assert_eq!(read(&ram, zero_page + 0x1e8), [3], "three E820 entries");
    assert_eq!(read(&ram, zero_page + 0x202), *b"HdrS");
    assert_eq!(read(&ram, read_u32(&ram, zero_page + 0x228)), *b"console=ttyS0\0");
    let initrd = read_u32(&ram, zero_page + 0x218);
    assert_eq!(initrd, 0xff_f000, "as high as the header allows");
    assert_eq!(read(&ram, initrd), *b"070701 an initrd");
    assert_eq!(read_u32(&ram, zero_page + 0x21c), 16);
    assert_eq!(read(&ram, 0x10_03ff), [0xf4]);
}

#[test]
fn elf64_starts_at_the_physical_address_of_its_entry() {
    let (state, ram) = load_sound(&elf64(None));
    assert_eq!(state.rip, 0x10_0000);
    assert!(state.segments[CS].long());
    assert_eq!(read(&ram, 0x10_0000), [0xf4]);
}

#[test]
fn pvh_starts_in_protected_mode_with_start_info() {
    for kernel in [elf64(Some(0x10_0010)), elf32(Some(0x10_0010))] {
        let (state, ram) = load_sound(&kernel);
        assert_eq!((state.rip, state.cr0, state.efer), (0x10_0010, 0x11, 0));
        assert!(state.segments[CS].default_32());
        let info = state.gpr[RBX];
        assert_eq!(read_u32(&ram, info), 0x336e_c578);
        assert_eq!(read_u32(&ram, info + 12), 1, "one module");
        let module = read_u32(&ram, read_u32(&ram, info + 16));
        assert_eq!(read(&ram, module), *b"070701 an initrd");
        assert_eq!(read(&ram, read_u32(&ram, info + 24)), *b"console=ttyS0\0");
        assert_eq!(read_u32(&ram, info + 48), 3, "entries of the memory map");
    }
}

#[test]
fn multiboot_starts_in_protected_mode_with_information() {
    for (kernel, entry) in [(multiboot_elf(3), 0x10_0000), (multiboot_flat(), 0x10_0020)] {
        let (state, ram) = load_sound(&kernel);
        assert_eq!((state.rip, state.gpr[RAX]), (entry, 0x2bad_b002));
        let info = state.gpr[RBX];
        assert_eq!(read_u32(&ram, info), 0x24d);
        assert_eq!((read_u32(&ram, info + 4), read_u32(&ram, info + 8)), (639, 31 << 10));
        assert_eq!(read(&ram, read_u32(&ram, info + 16)), *b"console=ttyS0\0");
        let module = read_u32(&ram, read_u32(&ram, info + 24));
        assert_eq!(read(&ram, module), *b"070701 an initrd");
        assert_eq!(read(&ram, entry), [0xf4]);
    }
}

#[test]
fn loading_is_deterministic() {
    for (name, kernel, _) in sound_images() {
        let (first_state, first_ram) = load_sound(&kernel);
        let (second_state, second_ram) = load_sound(&kernel);
        assert_eq!(first_state, second_state, "{name}");
        let collect = |ram: &GuestRam| {
            let mut all = Vec::new();
            ram.visit(&mut |start, bytes| all.push((start, bytes.to_vec())));
            all
        };
        assert!(collect(&first_ram) == collect(&second_ram), "{name}");
    }
}

#[test]
fn truncation_at_every_byte_is_an_error() {
    for (name, kernel, protocol) in sound_images() {
        // A flat multiboot kernel says nothing of its length: cut code is only shorter code.
        let first_sound = if name == "flat multiboot" { 16 + 32 } else { kernel.len() };
        let ram = ram();
        for length in 0..first_sound {
            let error = load(&source(&kernel[..length]), &ram).err();
            let error = error.unwrap_or_else(|| panic!("{name} cut to {length} bytes loads"));
            assert!(!error.to_string().contains('\n'), "{name}: {error}");
        }
        assert_eq!(detect(&kernel), Ok(protocol));
    }
}

#[test]
fn flipped_bytes_never_panic() {
    let seed = 0x9e37_79b9_7f4a_7c15_u64;
    println!("seed {seed:#x}");
    let mut random = seed;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random as usize
    };
    let ram = ram();
    for (_, sound, _) in sound_images() {
        for _ in 0..1000 {
            let mut kernel = sound.clone();
            for _ in 0..=next() % 4 {
                let at = next() % kernel.len().min(0x400);
                kernel[at] = if next() % 2 == 0 { next() as u8 } else { 0xff };
            }
            let _ = load(&source(&kernel), &ram);
        }
    }
}

#[test]
fn foreign_files_are_named() {
    let cases: &[(&[u8], &str)] = &[
        (b"", "empty"),
        (b"\x1f\x8b\x08", "gunzip"),
        (b"MZ\x90\0 and nothing of Linux", "EFI program"),
        (b"#!/bin/sh\necho hello\n", "script"),
        (b"Dear reader, this is a letter.\n", "text file"),
        (b"070701 and so on", "--initrd"),
        (&[0; 4096], "zeros"),
        (&[0xd6, 0x50, 0x52, 0xe8, 0, 0, 0, 0], "multiboot2"),
        (&[0x90; 600], "no format"),
    ];
    for (file, expected) in cases {
        let error = detect(file).expect_err("no kernel").to_string();
        assert!(error.contains(expected), "{error}");
    }
    assert_eq!(detect(&elf32(None)), Err(BootError::Elf32));
    for (offset, byte, expected) in [(18, 183, "another CPU"), (16, 1, "object file")] {
        let mut kernel = elf64(None);
        kernel[offset] = byte;
        let error = detect(&kernel).expect_err("not for this machine").to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn what_does_not_fit_says_how_much_memory_would_do() {
    let small = GuestRam::new(8).expect("8 MiB");
    let error = load(&source(&bzimage()), &small).expect_err("it unpacks at 16 MiB");
    assert!(error.to_string().contains("--memory 17"), "{error}");
    let initrd = vec![1; 9 << 20];
    let image = GuestSource { initrd: Some(&initrd), ..source(&[]) };
    let kernel = elf64(None);
    let error = load(&GuestSource { kernel: &kernel, ..image }, &small).expect_err("9 MiB");
    assert!(error.to_string().contains("--memory 11"), "{error}");
}

#[test]
fn wrong_initrds_and_command_lines_are_refused() {
    let kernel = bzimage();
    for (initrd, expected) in [
        (&b""[..], "empty"),
        (b"just words\n", "text"),
        (&kernel, "a Linux kernel"),
        (b"\x7fELF", "an ELF"),
    ] {
        let image = GuestSource { initrd: Some(initrd), ..source(&kernel) };
        let error = load(&image, &ram()).expect_err("no initrd").to_string();
        assert!(error.contains(expected), "{error}");
    }
    let long = "x".repeat(256);
    for (cmdline, expected) in [(long.as_str(), "at most 255"), ("a\nb", "line break")] {
        let image = GuestSource { cmdline, ..source(&kernel) };
        let error = load(&image, &ram()).expect_err("no such command line").to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn an_unknown_multiboot_requirement_is_refused() {
    let error = load(&source(&multiboot_elf(1 << 9)), &ram()).expect_err("flag 9");
    assert!(matches!(error, BootError::Unsupported { .. }), "{error}");
}
