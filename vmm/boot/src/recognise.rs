//! Says what a file is that is no kernel or no initrd, so that the error helps.

use super::Protocol;
use super::error::BootError;

/// A file's kind, by bytes at a fixed place.
struct Signature {
    offset: usize,
    magic: &'static [u8],
    found: &'static str,
    advice: &'static str,
}

const fn at_start(magic: &'static [u8], found: &'static str, advice: &'static str) -> Signature {
    Signature { offset: 0, magic, found, advice }
}

/// What people hand over as a kernel by mistake.
const NOT_KERNELS: &[Signature] = &[
    at_start(b"\x1f\x8b", "a gzip file", "decompress it first (gunzip)"),
    at_start(b"\xfd7zXZ\0", "an xz file", "decompress it first (unxz)"),
    at_start(b"\x28\xb5\x2f\xfd", "a zstd file", "decompress it first (unzstd)"),
    at_start(b"BZh", "a bzip2 file", "decompress it first (bunzip2)"),
    at_start(b"\x04\x22\x4d\x18", "an LZ4 file", "decompress it first (unlz4)"),
    at_start(b"\x02\x21\x4c\x18", "an LZ4 file", "decompress it first (unlz4)"),
    at_start(b"07070", "a cpio archive", "give it as --initrd, and a kernel as --kernel"),
    at_start(b"\x27\x05\x19\x56", "a U-Boot image", "give the kernel that is in it"),
    at_start(b"PK\x03\x04", "a zip archive", "unpack the kernel from it"),
    at_start(b"!<arch>", "an ar archive or a Debian package", "unpack the kernel from it"),
    at_start(b"\xed\xab\xee\xdb", "an RPM package", "unpack the kernel from it"),
    at_start(b"QFI\xfb", "a qcow2 disk image", "give the kernel that is on it"),
    at_start(b"#!", "a script", "give a kernel"),
    at_start(
        b"MZ",
        "an EFI program without Linux's setup header (or a kernel cut off at its start)",
        "give a bzImage or an ELF kernel",
    ),
    Signature {
        offset: 257,
        magic: b"ustar",
        found: "a tar archive",
        advice: "unpack the kernel from it",
    },
    Signature {
        offset: 0x8001,
        magic: b"CD001",
        found: "a CD image",
        advice: "give the kernel that is on it",
    },
    Signature {
        offset: 510,
        magic: b"\x55\xaa",
        found: "a boot sector or a disk image",
        advice: "give the kernel that is on it",
    },
];

const KERNEL_ADVICE: &str = "give a bzImage, an ELF64 vmlinux, a PVH ELF or a multiboot v1 kernel";

/// What a file is that has none of the supported formats.
pub(super) fn foreign_kernel(file: &[u8]) -> BootError {
    let what = "kernel";
    if let Some(signature) = NOT_KERNELS.iter().find(|signature| signature.matches(file)) {
        return BootError::Foreign { what, found: signature.found, advice: signature.advice };
    }
    if has_multiboot2_header(file) {
        return BootError::Foreign {
            what,
            found: "a multiboot2 kernel",
            advice: "build it with a multiboot v1 header or a PVH note",
        };
    }
    let found = if is_text(file) {
        "a text file"
    } else if file.iter().all(|byte| *byte == 0) {
        "nothing but zeros"
    } else {
        "in no format that this machine boots (or its start is cut off)"
    };
    BootError::Foreign { what, found, advice: KERNEL_ADVICE }
}

/// Refuses what Linux could not unpack; other kernels take modules of any content.
///
/// # Errors
/// Empty, or plainly not an initrd.
pub(super) fn check_initrd(file: &[u8], protocol: Protocol) -> Result<(), BootError> {
    let what = "initrd";
    if file.is_empty() {
        return Err(BootError::Empty { what });
    }
    if protocol != Protocol::BzImage {
        return Ok(());
    }
    let found = if file.starts_with(b"\x7fELF") {
        "an ELF file"
    } else if file.get(0x202..0x206) == Some(b"HdrS") {
        "a Linux kernel"
    } else if file.starts_with(b"MZ") {
        "a Windows or EFI program"
    } else if file.iter().all(|byte| *byte == 0) {
        "nothing but zeros"
    } else if is_text(file) && !file.starts_with(b"07070") {
        "a text file"
    } else {
        return Ok(());
    };
    let advice = "give a cpio archive, compressed or not";
    Err(BootError::Foreign { what, found, advice })
}

impl Signature {
    fn matches(&self, file: &[u8]) -> bool {
        file.get(self.offset..).is_some_and(|rest| rest.starts_with(self.magic))
    }
}

/// The header's magic within the first 32 KiB, 8-byte aligned.
fn has_multiboot2_header(file: &[u8]) -> bool {
    const MAGIC: u32 = 0xe852_50d6;
    let head = &file[..file.len().min(32 << 10)];
    head.chunks_exact(8).any(|chunk| chunk[..4] == MAGIC.to_le_bytes())
}

/// Whether the file's beginning is printable.
fn is_text(file: &[u8]) -> bool {
    let head = &file[..file.len().min(512)];
    head.iter().all(|byte| matches!(byte, b'\t' | b'\n' | b'\r' | 0x20..=0x7e))
}
