//! The clock `pmu`: a guest that runs freely on hardware, stopped at exact moments.
//!
//! Hardware tells how many conditional branches a guest has retired, and interrupts it when a number of
//! them has, but late, by up to a *skid*. [`engine::BranchClock`] makes an engine of that, whatever the
//! vCPU is ([`vcpu::Vcpu`]): the host's KVM, hardware made of the software CPU, or the software CPU
//! itself, which is exact.
//!
//! A tick is a retired conditional branch, a finished access to the board, a HLT, or an interrupt
//! delivered: what hardware counts exactly, and what the machine itself does to the guest. Within a
//! tick, a moment is told by the CPU's whole state.
//!
//! - Recording, the guest is kicked anywhere. It is then led on to the next place that can be found
//!   again (`settle.rs`): the one right behind a conditional branch, if one comes soon.
//! - Replaying, the guest runs until the counter interrupts it short of the tick, and from there from
//!   breakpoint to breakpoint at the moment's RIP, until tick and state agree (`approach.rs`).
//!
//! Single-step is not used: on VMX the trap flag that steps leaks into the flags that PUSHF, SYSCALL
//! and every fault save, and a fault's handler runs unstepped. Breakpoints leave no trace.
#![forbid(unsafe_code)]

mod approach;
mod boot_stub;
mod candidates;
pub mod engine;
pub mod guest_code;
mod placed_kernel;
mod planted;
pub mod probe;
pub mod retired;
pub mod settle;
pub mod time_stamp_trap;
pub mod trap_probe;
pub mod vcpu;
pub mod vcpu_within;
