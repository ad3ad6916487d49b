//! The KVM engine: the only crate that speaks to `/dev/kvm`.
//!
//! [`KvmEngine`] executes the guest on the host's KVM and answers the contract of
//! [`reprise_machine::engine::Engine`]. Nothing of the machine lives in the kernel: no interrupt
//! controller, no timer, no irqfd, no ioeventfd; every access of the guest to the board comes out as
//! an exit.
//!
//! Two clocks: [`KvmClock::Sync`] counts exits and runs at the speed of KVM, [`KvmClock::Step`]
//! counts instructions by stepping each one.
#![allow(unsafe_code)]

mod access;
mod branch_counter;
mod branch_events;
mod branch_vcpu;
mod breakpoint_instruction;
mod counter_refusal;
mod counters;
mod cpuid;
mod engine;
mod error;
mod host;
mod kick;
mod memory;
mod model_specific;
mod nondeterminism;
mod perf_host;
mod pmu;
mod repetition;
mod report;
mod self_test;
mod state;
mod step;
mod system_call;
mod time_stamp;
mod transfer;
mod trap;
pub mod user_oracle;
mod user_step;
mod vcpu;
mod watchdog;
mod watched_writes;

#[cfg(test)]
mod fake_perf_host;
#[cfg(test)]
mod testing;

pub use branch_vcpu::PmuVcpu;
pub use counter_refusal::CounterRefusal;
pub use engine::{KvmClock, KvmEngine};
pub use error::KvmError;
pub use host::KvmKind;
pub use nondeterminism::{Precaution, precautions};
pub use pmu::{PmuEngine, SelfTesting, pmu_clock, pmu_counter, pmu_engine};
pub use report::{ByLevel, Capability, CounterOfCpu, Finding, KvmReport, opens, probe};
pub use trap::time_stamp_trap;
