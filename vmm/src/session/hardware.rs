//! What the clock `pmu` counts on.
//!
//! Sessions are written against [`BranchHardware`], so that those on simulated hardware, which tests
//! run everywhere, are those on a real one but for the vCPU's system calls.

use std::cell::Cell;
use std::rc::Rc;

use reprise_assist::AssistedVcpu;
use reprise_branch_clock::engine::BranchClock;
use reprise_branch_clock::vcpu::Vcpu;
use reprise_devices::cpu_model::TimeStampCounter;
use reprise_kvm::{Finding, PmuVcpu, SelfTesting, pmu_counter, pmu_engine, time_stamp_trap};
use reprise_machine::engine::EngineError;
use reprise_machine::ram::GuestRam;
use reprise_trace::header::Header;

use super::automatic::{self, Verdict};

/// Hardware that counts a guest's conditional branches.
pub trait BranchHardware: Clone + 'static {
    /// Its vCPU.
    type Vcpu: Vcpu;

    /// Whether there is a counter at all, so that it is worth trying.
    fn is_there(&self) -> bool;

    /// Whether the counter counts right, as far as was found out before, else tried.
    fn verdict(&self) -> Verdict;

    /// Whether it does, tried now.
    fn try_anew(&self) -> Finding;

    /// Whether RDTSC can be trapped on it.
    fn time_stamp_trap(&self) -> Finding;

    /// An engine whose memory is `ram`, at the state that its vCPU is made in. CPUID tells its guest of the
    /// time-stamp counter or not.
    ///
    /// # Errors
    /// Says in one line what is lacking.
    fn engine(
        &self,
        ram: GuestRam,
        counter: TimeStampCounter,
    ) -> Result<BranchClock<Self::Vcpu>, EngineError>;
}

/// What CPUID says of the time-stamp counter where a recording with this header is replayed.
pub fn time_stamp_counter_of(header: &Header) -> TimeStampCounter {
    match header.shows_time_stamp_counter() {
        true => TimeStampCounter::Shown,
        false => TimeStampCounter::Hidden,
    }
}

/// This host: its KVM, and a performance counter.
#[derive(Clone, Debug, Default)]
pub struct HostHardware {
    /// Whether the counter is tried out before the next engine: once for it and all its clones, which are
    /// of one session.
    self_testing: Rc<Cell<SelfTesting>>,
}

impl HostHardware {
    /// This host; its counter may have been tried out already.
    pub fn new(self_testing: SelfTesting) -> Self {
        Self { self_testing: Rc::new(Cell::new(self_testing)) }
    }

    /// Whether the counter is still to be tried out.
    pub fn self_testing(&self) -> SelfTesting {
        self.self_testing.get()
    }
}

impl BranchHardware for HostHardware {
    type Vcpu = AssistedVcpu<PmuVcpu>;

    fn is_there(&self) -> bool {
        pmu_counter().available
    }

    fn verdict(&self) -> Verdict {
        automatic::decide()
    }

    fn try_anew(&self) -> Finding {
        automatic::try_anew()
    }

    fn time_stamp_trap(&self) -> Finding {
        time_stamp_trap()
    }

    fn engine(
        &self,
        ram: GuestRam,
        counter: TimeStampCounter,
    ) -> Result<BranchClock<Self::Vcpu>, EngineError> {
        let engine = pmu_engine(ram, self.self_testing.get(), counter)?;
        self.self_testing.set(SelfTesting::Done);
        engine.with_vcpu_within(|vcpu| Ok(AssistedVcpu::new(vcpu)))
    }
}
