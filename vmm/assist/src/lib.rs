//! Assist: an instruction that an engine refuses is executed by the software CPU.
//!
//! KVM's emulator does not know every instruction: where it has to emulate (all of the kernel on a host
//! without hardware virtualisation, accesses to devices elsewhere) it gives up on the others. The CPU's state is then
//! taken out of KVM, the software CPU executes that one instruction over the same guest RAM, and the state is
//! put back. Accesses to the board go to the same board, as the engine's own; a fault that the instruction raises is
//! delivered. The recording does not know: a tick is what it would have been.
//!
//! [`Assisted`] does so around an engine, [`AssistedVcpu`] around a vCPU of the clock that counts branches.
#![forbid(unsafe_code)]

mod assistant;
mod engine;
mod vcpu;

pub use engine::Assisted;
pub use vcpu::AssistedVcpu;
