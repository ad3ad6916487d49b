//! Where a guest's kernel reads the time-stamp counter, and what else in its text a hypervisor that
//! cannot trap it otherwise wants to know of.
//!
//! A bzImage is unpacked here as it unpacks itself (`payload.rs`), and the ELF file in it read by its
//! sections (`elf.rs`). Every byte pair that could be such an instruction is then judged (`sweep.rs`): it
//! is one only if decoding from a known instruction boundary before it comes to it. Such boundaries are
//! the places that the kernel's own unwind table (ORC) names, one every few instructions; without that
//! table they are the starts of sections. Whoever sets a breakpoint verifies the bytes in RAM first.
//!
//! What the kernel patches into its text at boot is in its table of alternatives (`alternatives.rs`): the
//! places where these instructions may appear later. The boot stub that unpacks the kernel is not searched,
//! only its last jump (`boot_stub.rs`). Not found are modules, BPF programs and whatever else becomes code
//! while the guest runs.
#![forbid(unsafe_code)]

mod alternatives;
mod boot_stub;
mod elf;
mod lz4;
mod payload;
mod sweep;

use std::ops::Range;

pub use boot_stub::{LastJump, Unpacking};
pub use sweep::Instruction;

/// Why nothing can be said of a kernel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SitesError {
    /// A bzImage packed in a way that nobody here unpacks.
    #[error(
        "the kernel is packed with {0}: give one packed with gzip, lz4, xz or zstd, or its vmlinux"
    )]
    Packing(&'static str),
    /// Damaged.
    #[error("the kernel's {0} is damaged: take another copy of it")]
    Damaged(&'static str),
    /// Neither a bzImage nor a 64-bit ELF file with sections.
    #[error("the kernel is no 64-bit ELF file with sections, so its text cannot be searched")]
    NoSections,
}

/// How an instruction was told from bytes that look like it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Evidence {
    /// Decoding from a boundary in the kernel's unwind table comes to it.
    UnwindTable,
    /// Decoding from the start of its section comes to it.
    Section,
    /// It is in a replacement for this place, which the kernel may patch in.
    Alternative,
}

/// One instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Site {
    /// Linear address, as linked.
    pub address: u64,
    /// What it is.
    pub instruction: Instruction,
    /// Its bytes.
    pub bytes: u8,
    /// How that is known.
    pub evidence: Evidence,
}

/// A range of text as linked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text {
    /// The section's name.
    pub name: String,
    /// Linear addresses.
    pub linear: Range<u64>,
    /// Guest-physical address of its first byte, if the kernel lies where it is linked to.
    pub physical: u64,
    /// What it holds, if the kernel gives it up once it has started: by that it is seen whether it has.
    pub initial: Option<Vec<u8>>,
}

/// No-operations that the kernel replaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replaced {
    /// Linear address, as linked.
    pub address: u64,
    /// What stands there before.
    pub bytes: Vec<u8>,
}

/// What there is to know of a kernel's text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelText {
    /// Guest-physical address of the first instruction of the unpacked kernel.
    pub entry: u64,
    /// The first bytes there.
    pub entry_bytes: Vec<u8>,
    /// Instructions that are there from the start, by address.
    pub sites: Vec<Site>,
    /// Instructions that the kernel may patch in, by address.
    pub patched: Vec<Site>,
    /// What the kernel replaces behind the last of those, and keeps for good. It replaces in this order, so
    /// once one of these is replaced, all of those are. They are no-operations before, which nothing else
    /// changes, and no relocation.
    pub replaced_behind: Vec<Replaced>,
    /// Where all of it lies.
    pub text: Vec<Text>,
    /// How the kernel comes to lie there.
    pub unpacking: Unpacking,
    /// Byte pairs that look like such an instruction and are part of another.
    pub mistakable: Vec<u64>,
}

impl KernelText {
    /// Reads a kernel: a bzImage or an ELF file. User code in the kernel's file is in sections whose name
    /// begins with `.user`, and not looked at.
    ///
    /// # Errors
    /// What cannot be read, in a line that says what to do.
    pub fn of_image(image: &[u8]) -> Result<Self, SitesError> {
        let Some(payload) = payload::of_bz_image(image)? else { return elf::kernel_text(image) };
        let kernel = elf::kernel_text(&payload.kernel)?;
        Ok(Self { unpacking: boot_stub::last_jump(payload.stub), ..kernel })
    }

    /// Whether RAM will show that the kernel has patched in what it may, or there is nothing to patch in.
    pub fn shows_when_patched(&self) -> bool {
        self.patched.is_empty() || !self.replaced_behind.is_empty()
    }

    /// The sites of one instruction.
    pub fn sites_of(&self, instruction: Instruction) -> impl Iterator<Item = &Site> {
        self.sites.iter().filter(move |site| site.instruction == instruction)
    }
}
