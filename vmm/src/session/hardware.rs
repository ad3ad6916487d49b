//! What the clock `pmu` counts on.
//!
//! Sessions are written against [`BranchHardware`], so that those on simulated hardware, which tests
//! run everywhere, are those on a real one but for the vCPU's system calls.

use reprise_branch_clock::engine::BranchClock;
use reprise_branch_clock::vcpu::Vcpu;
use reprise_kvm::{PmuVcpu, SelfTesting, pmu_counter, pmu_engine};
use reprise_machine::engine::EngineError;
use reprise_machine::ram::GuestRam;

/// Hardware that counts a guest's conditional branches.
pub trait BranchHardware {
    /// Its vCPU.
    type Vcpu: Vcpu;

    /// Whether there is a counter at all, so that it is worth trying.
    fn is_there(&self) -> bool;

    /// An engine whose memory is `ram`, at the state that its vCPU is made in.
    ///
    /// # Errors
    /// Says in one line what is lacking.
    fn engine(&self, ram: GuestRam) -> Result<BranchClock<Self::Vcpu>, EngineError>;
}

/// This host: its KVM, and a performance counter.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostHardware {
    /// Whether the counter is tried out first.
    pub self_testing: SelfTesting,
}

impl BranchHardware for HostHardware {
    type Vcpu = PmuVcpu;

    fn is_there(&self) -> bool {
        pmu_counter().available
    }

    fn engine(&self, ram: GuestRam) -> Result<BranchClock<PmuVcpu>, EngineError> {
        pmu_engine(ram, self.self_testing)
    }
}
