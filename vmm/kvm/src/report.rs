//! What `reprise doctor` says about KVM on this host.

use std::fmt;

use crate::branch_events::{Caveat, HostCpu};
use crate::counter_refusal::{CounterRefusal, ZEN_WORKAROUND};
use crate::counters::Counted;
use crate::error::KvmError;
use crate::host::KvmKind;
use crate::pmu::{counter_alone, pmu_clock};
use crate::self_test::{Level, SelfTest, step_clock};
use crate::vcpu::{CAPABILITIES, DEVICE, open};

/// Whether something can be had, and why (not).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// It can be had.
    pub available: bool,
    /// One line for a person.
    pub reason: String,
    /// What to do about it, as half a sentence, where something is known that helps.
    pub remedy: Option<String>,
}

impl Finding {
    pub(crate) fn yes(reason: impl Into<String>) -> Self {
        Self { available: true, reason: reason.into(), remedy: None }
    }

    pub(crate) fn no(reason: impl Into<String>) -> Self {
        Self { available: false, reason: reason.into(), remedy: None }
    }

    /// A counter that cannot be had.
    pub(crate) fn refused(refusal: &CounterRefusal) -> Self {
        Self { remedy: Some(refusal.remedy().to_owned()), ..Self::no(refusal.to_string()) }
    }

    /// Something that KVM refuses.
    pub(crate) fn failed(error: &KvmError) -> Self {
        Self { remedy: error.remedy(), ..Self::no(error.reason()) }
    }

    /// A question that could not be asked has the answer no.
    fn of(answer: Result<Self, KvmError>) -> Self {
        answer.unwrap_or_else(|error| Self::failed(&error))
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = if self.available { "yes" } else { "no" };
        write!(f, "{word}: {}", self.reason)
    }
}

/// Whether this host's KVM may be used, as far as opening it tells.
pub fn opens() -> bool {
    open(DEVICE).is_ok()
}

/// Something that holds for kernel code (CPL0) and for user code (CPL3) on its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ByLevel {
    /// At CPL0.
    pub kernel: Finding,
    /// At CPL3.
    pub user: Finding,
}

/// A capability of KVM's interface that Reprise uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// As in the kernel's documentation.
    pub name: &'static str,
    /// Without it there is no KVM engine.
    pub needed: bool,
    /// This host has it.
    pub present: bool,
}

/// How this host's CPU counts conditional branches, whether or not the counter can be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CounterOfCpu {
    /// For a person.
    pub microarchitecture: &'static str,
    /// As the CPU's maker calls the event.
    pub event_name: &'static str,
    /// `config` of perf_event_open.
    pub event: u64,
    /// Conditional branches by which an overflow may be late.
    pub skid: u64,
    /// Who says so, in a few words.
    pub source: String,
    /// What is to be known of it, a line each.
    pub caveats: Vec<&'static str>,
    /// What its owner can do about them though the counter passes its self-test.
    pub precaution: Option<&'static str>,
}

impl CounterOfCpu {
    fn of_this_host() -> Option<Self> {
        let cpu = HostCpu::of_this_host();
        let event = cpu.branch_event().ok()?;
        Some(Self {
            microarchitecture: event.microarchitecture,
            event_name: event.event_name(),
            event: event.config(),
            skid: event.skid,
            source: cpu.source(event),
            caveats: event.caveats.iter().map(|caveat| caveat.text()).collect(),
            precaution: event
                .caveats
                .contains(&Caveat::SpeculatesPastLocks)
                .then_some(ZEN_WORKAROUND),
        })
    }
}

/// What KVM on this host can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvmReport {
    /// Whether the device is there and may be opened.
    pub device: Finding,
    /// The interface's version, 12 everywhere; `None` where the device cannot be opened.
    pub api_version: Option<i32>,
    /// How guests run.
    pub kind: KvmKind,
    /// Empty where the device cannot be opened.
    pub capabilities: Vec<Capability>,
    /// The engine `kvm` with the clock `sync`.
    pub sync_clock: Finding,
    /// The engine `kvm` with the clock `step`.
    pub step_clock: Finding,
    /// The engine `kvm` with the clock `pmu`.
    pub pmu_clock: Finding,
    /// Single-step comes back after each instruction.
    pub single_step: ByLevel,
    /// A breakpoint in a debug register comes back.
    pub hardware_breakpoint: ByLevel,
    /// INT3 comes back.
    pub software_breakpoint: ByLevel,
    /// CPUID shows the guest the CPU model.
    pub cpu_model: ByLevel,
    /// The counter of conditional branches that such a CPU has; `None` for one that nobody knows.
    pub counter_of_cpu: Option<CounterOfCpu>,
    /// This host is a virtual machine.
    pub in_vm: bool,
    /// A counter for the clock `pmu`, with or without KVM.
    pub conditional_branch_counter: Finding,
    /// A counter of the guest's retired instructions.
    pub instruction_counter: Finding,
    /// A counter of the guest's retired branches.
    pub branch_counter: Finding,
}

/// Finds out what KVM on this host can do, by running tiny guests. Takes some tens of milliseconds,
/// and ends whatever the guests do.
pub fn probe() -> KvmReport {
    let device = match open(DEVICE) {
        Ok(kvm) => Ok(kvm),
        Err(error) => Err(Finding::failed(&error)),
    };
    let capabilities = device.as_ref().map_or_else(
        |_| Vec::new(),
        |kvm| {
            let ask = |&(cap, name, needed)| Capability {
                name,
                needed,
                present: kvm.check_extension_raw(u64::from(cap)) > 0,
            };
            CAPABILITIES.iter().map(ask).collect()
        },
    );
    let api_version = device.as_ref().ok().map(|kvm| kvm.get_api_version());
    let guest = match &device {
        Ok(_) => SelfTest::new().map_err(|error| Finding::failed(&error)),
        Err(finding) => Err(finding.clone()),
    };
    let device = match device {
        Ok(_) => Finding::yes(format!("{DEVICE} can be opened")),
        Err(finding) => finding,
    };
    with_guest(guest, KvmReport::without_guest(device, api_version, capabilities))
}

impl KvmReport {
    fn without_guest(
        device: Finding,
        api_version: Option<i32>,
        capabilities: Vec<Capability>,
    ) -> Self {
        let unknown = Finding::no("there is no guest to try it with");
        let by_level = ByLevel { kernel: unknown.clone(), user: unknown.clone() };
        Self {
            device,
            api_version,
            kind: KvmKind::of_this_host(),
            capabilities,
            sync_clock: unknown.clone(),
            step_clock: unknown.clone(),
            pmu_clock: unknown.clone(),
            single_step: by_level.clone(),
            hardware_breakpoint: by_level.clone(),
            software_breakpoint: by_level.clone(),
            cpu_model: by_level,
            counter_of_cpu: CounterOfCpu::of_this_host(),
            in_vm: HostCpu::is_virtual(),
            conditional_branch_counter: counter_alone(),
            instruction_counter: unknown.clone(),
            branch_counter: unknown,
        }
    }
}

/// Asks what only a guest can tell.
fn with_guest(guest: Result<SelfTest, Finding>, report: KvmReport) -> KvmReport {
    let mut guest = match guest {
        Ok(guest) => guest,
        Err(finding) => {
            let (sync_clock, step_clock) = (finding.clone(), finding.clone());
            return KvmReport { sync_clock, step_clock, pmu_clock: finding, ..report };
        }
    };
    type Question = fn(&mut SelfTest, Level) -> Result<Finding, KvmError>;
    let mut both = |question: Question| ByLevel {
        kernel: Finding::of(question(&mut guest, Level::Kernel)),
        user: Finding::of(question(&mut guest, Level::User)),
    };
    KvmReport {
        single_step: both(SelfTest::single_step),
        hardware_breakpoint: both(SelfTest::hardware_breakpoint),
        software_breakpoint: both(SelfTest::software_breakpoint),
        cpu_model: both(SelfTest::shows_cpu_model),
        instruction_counter: Finding::of(guest.counter(Counted::Instructions)),
        branch_counter: Finding::of(guest.counter(Counted::Branches)),
        sync_clock: Finding::yes("guests run, and their exits are counted"),
        step_clock: step_clock(),
        pmu_clock: pmu_clock(),
        ..report
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_is_quick_and_every_finding_has_one_line() {
        let began = std::time::Instant::now();
        let report = probe();
        let took = began.elapsed();
        eprintln!("{report:#?} in {took:?}");
        // Ten times what is aimed at: the machine may be busy.
        assert!(took.as_millis() < 3000, "{took:?}");
        assert_eq!(report.device.available, report.api_version == Some(12));
        let levels = [
            &report.single_step,
            &report.hardware_breakpoint,
            &report.software_breakpoint,
            &report.cpu_model,
        ];
        let findings = levels
            .iter()
            .flat_map(|by_level| [&by_level.kernel, &by_level.user])
            .chain([&report.device, &report.sync_clock, &report.step_clock])
            .chain([&report.pmu_clock, &report.instruction_counter, &report.branch_counter]);
        for finding in findings {
            assert!(!finding.reason.is_empty() && !finding.reason.contains('\n'), "{finding}");
        }
    }
}
