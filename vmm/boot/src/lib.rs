//! Loads a guest's kernel into RAM and says how its CPU starts.
//!
//! The format is found from the image's content, never from its name: a bzImage, an ELF with a PVH
//! note, a multiboot v1 kernel, an ELF64 vmlinux. All of them start on the machine without a
//! firmware, so each loader writes what a boot loader would leave behind, and nothing else.
#![forbid(unsafe_code)]

mod bzimage;
mod elf;
mod error;
mod linux64;
mod multiboot;
mod placement;
mod pvh;
mod recognise;
mod state;

#[cfg(test)]
mod corruption_tests;
#[cfg(test)]
mod test_images;

use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::CpuState;

pub use error::BootError;

/// What boots.
#[derive(Clone, Copy, Debug)]
pub struct GuestSource<'a> {
    /// The kernel's file.
    pub kernel: &'a [u8],
    /// The initial RAM disk's file: `initrd` of Linux, first module of a multiboot or PVH kernel.
    pub initrd: Option<&'a [u8]>,
    /// The command line, without a terminating NUL.
    pub cmdline: &'a str,
}

/// The boot protocol that an image wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Linux's 64-bit boot protocol, from a bzImage.
    BzImage,
    /// PVH, from an ELF with the note `XEN_ELFNOTE_PHYS32_ENTRY`.
    Pvh,
    /// Multiboot version 1.
    Multiboot,
    /// Linux's 64-bit boot protocol, from an ELF64 without a PVH note.
    Elf64,
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::BzImage => "bzImage",
            Self::Pvh => "PVH ELF",
            Self::Multiboot => "multiboot",
            Self::Elf64 => "ELF64",
        })
    }
}

/// Finds the protocol from the image's content.
///
/// # Errors
/// What the image is instead, where that can be told, and what to do.
pub fn detect(kernel: &[u8]) -> Result<Protocol, BootError> {
    if kernel.is_empty() {
        return Err(BootError::Empty { what: "kernel" });
    }
    if bzimage::has_magic(kernel) {
        return Ok(Protocol::BzImage);
    }
    if elf::has_magic(kernel) {
        // A broken ELF header is reported as such, except that a multiboot kernel with load
        // addresses in its header may be no proper ELF at all.
        match elf::Elf::parse(kernel) {
            Ok(file) if file.pvh_entry()?.is_some() => return Ok(Protocol::Pvh),
            Ok(_) if multiboot::find_header(kernel).is_some() => return Ok(Protocol::Multiboot),
            Ok(file) if file.is_64_bit() => return Ok(Protocol::Elf64),
            Ok(_) => return Err(BootError::Elf32),
            Err(_) if multiboot::find_header(kernel).is_some() => return Ok(Protocol::Multiboot),
            Err(error) => return Err(error),
        }
    }
    if multiboot::find_header(kernel).is_some() {
        return Ok(Protocol::Multiboot);
    }
    Err(recognise::foreign_kernel(kernel))
}

/// Loads `image` into `ram`, which must be fresh (zeroed), and returns the CPU's first state.
///
/// Deterministic: the same image, command line and RAM size give the same RAM and CPU state.
///
/// # Errors
/// Whatever is wrong with the image, or the RAM that it needs: one line that says what to do.
pub fn load(image: &GuestSource<'_>, ram: &GuestRam) -> Result<CpuState, BootError> {
    let protocol = detect(image.kernel)?;
    if image.cmdline.contains(['\0', '\n']) {
        return Err(BootError::CommandLineCharacter);
    }
    if let Some(initrd) = image.initrd {
        recognise::check_initrd(initrd, protocol)?;
    }
    match protocol {
        Protocol::BzImage => bzimage::load(image, ram),
        Protocol::Pvh => pvh::load(image, ram),
        Protocol::Multiboot => multiboot::load(image, ram),
        Protocol::Elf64 => linux64::load_elf(image, ram),
    }
}
