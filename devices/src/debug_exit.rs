//! The debug-exit port: no real part, but what virtual machines have for test kernels that end with
//! a status. The byte that is written is the status; it reads as zero. It has no state.

/// Where CPU test suites and hobby kernels expect it.
pub(crate) const PORT: u16 = 0xf4;

/// What a read gives.
pub(crate) const READS_AS: u8 = 0;
