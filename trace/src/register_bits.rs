//! Bits of control registers, EFER and RFLAGS (Intel 64 and IA-32 Architectures Software Developer's
//! Manual, volume 1, 3.4.3, and volume 3A, chapter 2).

/// Protected mode.
pub const CR0_PE: u64 = 1;
/// x87 instructions fault, to be emulated.
pub const CR0_EM: u64 = 1 << 2;
/// Task switched.
pub const CR0_TS: u64 = 1 << 3;
/// Native x87 errors.
pub const CR0_NE: u64 = 1 << 5;
/// The kernel cannot write to read-only pages either.
pub const CR0_WP: u64 = 1 << 16;
/// Alignment mask.
pub const CR0_AM: u64 = 1 << 18;
/// Paging.
pub const CR0_PG: u64 = 1 << 31;

/// User code cannot read the time-stamp counter.
pub const CR4_TSD: u64 = 1 << 2;
/// Debugging extensions.
pub const CR4_DE: u64 = 1 << 3;
/// Pages of 4 MiB.
pub const CR4_PSE: u64 = 1 << 4;
/// Page tables of 64-bit entries.
pub const CR4_PAE: u64 = 1 << 5;
/// Global pages.
pub const CR4_PGE: u64 = 1 << 7;
/// User code may read performance counters.
pub const CR4_PCE: u64 = 1 << 8;
/// The system has FXSAVE and SSE enabled.
pub const CR4_OSFXSR: u64 = 1 << 9;
/// Unmasked SSE exceptions raise #XM rather than #UD.
pub const CR4_OSXMMEXCPT: u64 = 1 << 10;
/// The kernel cannot execute the user's pages.
pub const CR4_SMEP: u64 = 1 << 20;
/// The kernel cannot access the user's pages.
pub const CR4_SMAP: u64 = 1 << 21;

/// The bits of CR4 that the CPU model has: setting any other faults.
pub const CR4_BITS: u64 = CR4_TSD
    | CR4_DE
    | CR4_PSE
    | CR4_PAE
    | CR4_PGE
    | CR4_PCE
    | CR4_OSFXSR
    | CR4_OSXMMEXCPT
    | CR4_SMEP
    | CR4_SMAP;

/// SYSCALL and SYSRET.
pub const EFER_SCE: u64 = 1;
/// Long mode is enabled.
pub const EFER_LME: u64 = 1 << 8;
/// Long mode is active.
pub const EFER_LMA: u64 = 1 << 10;
/// Pages may forbid execution.
pub const EFER_NXE: u64 = 1 << 11;

/// A trap after each instruction.
pub const RFLAGS_TF: u64 = 1 << 8;
/// Interrupts are open.
pub const RFLAGS_IF: u64 = 1 << 9;
/// The lowest privilege level that may close interrupts: both bits.
pub const RFLAGS_IOPL: u64 = 3 << 12;
/// A task within a task, which long mode's IRET refuses.
pub const RFLAGS_NT: u64 = 1 << 14;
/// The next instruction's breakpoints do not count.
pub const RFLAGS_RF: u64 = 1 << 16;
/// Virtual-8086 mode.
pub const RFLAGS_VM: u64 = 1 << 17;
