//! Hardware to test the branch clock on where there is none: a vCPU that behaves as KVM's does on a
//! machine with performance counters, made of the software CPU.
//!
//! It exits for port I/O, MMIO, HLT, interrupt windows, breakpoints and kicks; if asked, for INT3 and for writes
//! to watched RAM; and while there are breakpoints, for #DB of the guest's own and its setting of DR7, which end
//! the run. Its
//! counter of conditional branches is exact, but interrupts late; kicks strike anywhere, amid a REP and
//! before a handler's first instruction too; accessed bits are set before they must be, and
//! translations are forgotten at any time; RDTSC reads a clock that nobody logs. How many instructions
//! it has executed it tells no engine; tests ask.
//!
//! All of it follows from a seed. With [`Disturbance::none`] it is the third kind of vCPU: the
//! software CPU, exact.
#![forbid(unsafe_code)]

pub mod disturbance;
mod page_tables;
pub mod vcpu;

pub use disturbance::{Disturbance, Skid};
pub use vcpu::SimulatedVcpu;
