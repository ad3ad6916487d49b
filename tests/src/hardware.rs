//! Hardware for sessions: simulated, or refusing.

use reprise::session::automatic::Verdict;
use reprise::session::hardware::BranchHardware;
use reprise_assist::AssistedVcpu;
use reprise_branch_clock::engine::{BranchClock, Parameters};
use reprise_branch_clock::probe::what_is_wrong;
use reprise_branch_clock::trap_probe;
use reprise_devices::cpu_model::TimeStampCounter;
use reprise_kvm::Finding;
use reprise_machine::engine::EngineError;
use reprise_machine::ram::{GuestRam, MIN_RAM_MIB};
use reprise_simulated_hardware::{Disturbance, SimulatedVcpu};

/// A vCPU made of the software CPU.
#[derive(Clone, Debug)]
pub struct Simulated {
    /// What its world does to the guest.
    pub disturbance: Disturbance,
    /// Conditional branches by which an overflow may be late, as the clock believes.
    skid: u64,
    bounded: bool,
    /// RDTSC can be trapped.
    pub traps: bool,
}

fn finding(available: bool, reason: &str) -> Finding {
    Finding { available, reason: reason.to_owned(), remedy: None }
}

/// What simulated hardware says for its counter.
pub const COUNTS: &str = "the counter is simulated";
/// What is said against trapping.
pub const CANNOT_TRAP: &str = "writes to text do not come back";

impl Simulated {
    /// An Intel machine, kicked by its host alone.
    #[must_use]
    pub fn intel(seed: u64) -> Self {
        let disturbance = Disturbance { kick_every: None, ..Disturbance::intel(seed) };
        Self::with_skid(disturbance, 100, true)
    }

    /// A Zen machine, kicked by its host alone.
    #[must_use]
    pub fn zen(seed: u64) -> Self {
        let disturbance = Disturbance { kick_every: None, ..Disturbance::zen(seed) };
        Self::with_skid(disturbance, 10_000, false)
    }

    fn with_skid(disturbance: Disturbance, skid: u64, bounded: bool) -> Self {
        Self { disturbance, skid, bounded, traps: true }
    }

    /// The same where RDTSC cannot be trapped.
    #[must_use]
    pub fn without_traps(self) -> Self {
        Self { traps: false, ..self }
    }

    /// For a tiny guest that tries it: nothing in that is refused.
    fn tried_vcpu(&self) -> Result<SimulatedVcpu, EngineError> {
        let small = GuestRam::new(MIN_RAM_MIB).expect("the host has memory");
        SimulatedVcpu::new(small, Disturbance { refuse_every: None, ..self.disturbance })
    }
}

impl BranchHardware for Simulated {
    type Vcpu = AssistedVcpu<SimulatedVcpu>;

    fn is_there(&self) -> bool {
        true
    }

    fn verdict(&self) -> Verdict {
        Verdict { finding: self.try_anew(), remembered: false }
    }

    fn try_anew(&self) -> Finding {
        finding(true, COUNTS)
    }

    /// As on KVM, it is tried.
    fn time_stamp_trap(&self) -> Finding {
        let mut vcpu = self.tried_vcpu().expect("the host has memory");
        let wrong = trap_probe::what_is_wrong(&mut vcpu).expect("the simulation does not fail");
        assert_eq!(wrong, None, "seed {}", self.disturbance.seed);
        finding(self.traps, if self.traps { "it is simulated" } else { CANNOT_TRAP })
    }

    /// As on KVM, the counter is tried out first, unless it is to be a wrong one.
    fn engine(
        &self,
        ram: GuestRam,
        counter: TimeStampCounter,
    ) -> Result<BranchClock<Self::Vcpu>, EngineError> {
        if self.disturbance.overcount_every.is_none() {
            let wrong = what_is_wrong(&mut self.tried_vcpu()?, self.skid, self.bounded)?;
            assert_eq!(wrong, None, "seed {}", self.disturbance.seed);
        }
        let mut vcpu = SimulatedVcpu::new(ram, self.disturbance)?;
        if counter == TimeStampCounter::Hidden {
            vcpu.hide_time_stamp_counter();
        }
        BranchClock::new(AssistedVcpu::new(vcpu), Parameters::with_skid(self.skid))
    }
}

/// What a host without a counter says.
pub const REFUSAL: &str = "there is no counter: use --engine soft";

/// A host without a counter.
#[derive(Clone, Debug)]
pub struct Refusing;

impl BranchHardware for Refusing {
    type Vcpu = AssistedVcpu<SimulatedVcpu>;

    fn is_there(&self) -> bool {
        false
    }

    fn verdict(&self) -> Verdict {
        Verdict { finding: self.try_anew(), remembered: false }
    }

    fn try_anew(&self) -> Finding {
        finding(false, REFUSAL)
    }

    fn time_stamp_trap(&self) -> Finding {
        finding(false, REFUSAL)
    }

    fn engine(
        &self,
        _ram: GuestRam,
        _counter: TimeStampCounter,
    ) -> Result<BranchClock<Self::Vcpu>, EngineError> {
        Err(EngineError { what: REFUSAL.to_owned() })
    }
}
