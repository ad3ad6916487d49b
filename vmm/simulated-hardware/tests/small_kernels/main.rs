//! Kernels of a few instructions on simulated hardware, which do what the branch clock and the trap of RDTSC
//! may trip over.

mod kernel;
mod steps;
mod trap;
