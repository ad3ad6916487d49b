//! Bits of control registers, EFER and RFLAGS that the engine looks at (Intel 64 and IA-32
//! Architectures Software Developer's Manual, volume 3A, chapter 2).

/// Protected mode.
pub const CR0_PE: u64 = 1;
/// The kernel cannot write to read-only pages either.
pub const CR0_WP: u64 = 1 << 16;
/// Paging.
pub const CR0_PG: u64 = 1 << 31;

/// User code cannot read the time-stamp counter.
pub const CR4_TSD: u64 = 1 << 2;
/// Pages of 4 MiB.
pub const CR4_PSE: u64 = 1 << 4;
/// Page tables of 64-bit entries.
pub const CR4_PAE: u64 = 1 << 5;
/// The kernel cannot access the user's pages.
pub const CR4_SMAP: u64 = 1 << 21;

/// Long mode is active.
pub const EFER_LMA: u64 = 1 << 10;

/// A trap after each instruction.
pub const RFLAGS_TF: u64 = 1 << 8;
/// Interrupts are open.
pub const RFLAGS_IF: u64 = 1 << 9;
/// A task within a task, which long mode's IRET refuses.
pub const RFLAGS_NT: u64 = 1 << 14;
/// The next instruction's breakpoints do not count.
pub const RFLAGS_RF: u64 = 1 << 16;
/// Virtual-8086 mode.
pub const RFLAGS_VM: u64 = 1 << 17;
