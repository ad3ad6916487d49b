//! What can be wrong with a guest's image.

/// Why a guest cannot be loaded: one line that says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BootError {
    /// A file of no bytes.
    #[error("the {what} is empty: give another file")]
    Empty {
        /// Which file.
        what: &'static str,
    },
    /// Something else than a kernel or an initrd.
    #[error("the {what} is {found}: {advice}")]
    Foreign {
        /// Which file.
        what: &'static str,
        /// What it is instead.
        found: &'static str,
        /// What to do.
        advice: &'static str,
    },
    /// An ELF32 that no supported protocol starts.
    #[error(
        "the kernel is a 32-bit ELF with neither a multiboot v1 header nor a PVH note: \
         give a kernel with one of them, or a 64-bit one"
    )]
    Elf32,
    /// The file ends too early.
    #[error(
        "the {format} kernel is truncated: its headers promise {needed_bytes} bytes, \
         the file has {file_bytes}; get the file again"
    )]
    Truncated {
        /// Which format.
        format: &'static str,
        /// What its headers promise.
        needed_bytes: u64,
        /// What is there.
        file_bytes: u64,
    },
    /// The headers contradict themselves.
    #[error("the {format} kernel is damaged: {what}; get the file again or rebuild it")]
    Malformed {
        /// Which format.
        format: &'static str,
        /// What is wrong.
        what: &'static str,
    },
    /// A sound image that wants what this machine has not.
    #[error("the {format} kernel cannot start here: {what}")]
    Unsupported {
        /// Which format.
        format: &'static str,
        /// What it wants, and what to do.
        what: &'static str,
    },
    /// More RAM is needed.
    #[error(
        "the {what} does not fit into {ram_mib} MiB of guest memory: \
         give at least --memory {needed_mib}"
    )]
    MemoryTooSmall {
        /// What does not fit.
        what: &'static str,
        /// RAM that would do, in MiB.
        needed_mib: u64,
        /// RAM that is there, in MiB.
        ram_mib: u64,
    },
    /// A load address where a PC has no RAM, however much memory it is given.
    #[error(
        "the {what} wants to be loaded at {start:#x} to {end:#x}, where the machine has no RAM: \
         link it at 1 MiB or above"
    )]
    OutsideRam {
        /// What wants it.
        what: &'static str,
        /// First address.
        start: u64,
        /// Past the last address.
        end: u64,
    },
    /// The command line is too long for the kernel.
    #[error(
        "the command line has {bytes} bytes and this kernel takes at most {limit_bytes}: shorten it"
    )]
    CommandLineTooLong {
        /// Its length.
        bytes: usize,
        /// What the kernel takes.
        limit_bytes: usize,
    },
    /// A character that ends a command line.
    #[error("the command line holds a line break or a NUL: remove it")]
    CommandLineCharacter,
}
