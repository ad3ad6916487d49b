//! Where the tests run: one body each, on simulated hardware everywhere, and on the host's own KVM and
//! counter where it has one.

use std::sync::OnceLock;

use reprise::session::hardware::{BranchHardware, HostHardware};
use reprise_kvm::{Finding, pmu_clock, time_stamp_trap};
use reprise_tests::hardware::{COUNTS, Simulated};
use reprise_tests::skipped::{skipped, skipped_without_pmu};

/// Hosts to record and replay on. Each run of a test has a number.
pub(crate) trait Hosts {
    type Hardware: BranchHardware;

    /// Hardware whose counter is late by no more than a margin.
    fn host(&self, run: u64) -> Self::Hardware;

    /// Hardware whose counter may be late by any number, where there is a choice.
    fn late(&self, run: u64) -> Self::Hardware;

    /// Hardware whose time-stamp counter goes on whatever the guest does, and is in no log.
    fn running_time_stamps(&self, run: u64) -> Self::Hardware;

    /// What is said for its counter.
    fn said(&self) -> &str;

    /// Whether RDTSC can be trapped; says why not.
    fn traps(&self) -> bool;
}

/// Another simulated machine for each run: its number is the seed.
pub(crate) struct SimulatedHosts;

impl Hosts for SimulatedHosts {
    type Hardware = Simulated;

    fn host(&self, run: u64) -> Simulated {
        Simulated::intel(run)
    }

    fn late(&self, run: u64) -> Simulated {
        Simulated::zen(run)
    }

    fn running_time_stamps(&self, run: u64) -> Simulated {
        let mut hardware = Simulated::intel(run);
        hardware.disturbance.time_stamp_runs = true;
        hardware
    }

    fn said(&self) -> &str {
        COUNTS
    }

    fn traps(&self) -> bool {
        true
    }
}

/// The host that the tests run on, for each run.
pub(crate) struct ThisHost {
    clock: &'static Finding,
}

impl ThisHost {
    /// This host, if it has a counter that counts right; says why not.
    pub(crate) fn with_counter() -> Option<Self> {
        static CLOCK: OnceLock<Finding> = OnceLock::new();
        let clock = CLOCK.get_or_init(pmu_clock);
        if !clock.available {
            skipped_without_pmu(&clock.reason);
        }
        clock.available.then_some(Self { clock })
    }
}

impl Hosts for ThisHost {
    type Hardware = HostHardware;

    fn host(&self, _run: u64) -> HostHardware {
        HostHardware::default()
    }

    fn late(&self, run: u64) -> HostHardware {
        self.host(run)
    }

    fn running_time_stamps(&self, run: u64) -> HostHardware {
        self.host(run)
    }

    fn said(&self) -> &str {
        &self.clock.reason
    }

    fn traps(&self) -> bool {
        let finding = time_stamp_trap();
        if !finding.available {
            skipped(format_args!("RDTSC cannot be trapped: {}", finding.reason));
        }
        finding.available
    }
}

/// Two tests of each of these functions, which take [`Hosts`].
macro_rules! on_each_host {
    ($($body:ident),+ $(,)?) => {
        mod simulated_hardware {
            $(#[test]
            fn $body() {
                super::$body(&$crate::hosts::SimulatedHosts);
            })+
        }

        mod this_host {
            $(#[test]
            fn $body() {
                if let Some(hosts) = $crate::hosts::ThisHost::with_counter() {
                    super::$body(&hosts);
                }
            })+
        }
    };
}
pub(crate) use on_each_host;
