//! The engine `kvm` with the clock `pmu`: whether this host has it, and how it is made.

use std::time::Duration;

use reprise_branch_clock::engine::{BranchClock, Parameters};
use reprise_branch_clock::probe::what_is_wrong;
use reprise_devices::cpu_model::TimeStampCounter;
use reprise_machine::engine::EngineError;
use reprise_machine::ram::{GuestRam, MIN_RAM_MIB};

use crate::branch_counter::BranchCounter;
use crate::branch_events::{BranchEvent, Caveat};
use crate::branch_vcpu::PmuVcpu;
use crate::counter_refusal::CounterRefusal;
use crate::error::KvmError;
use crate::perf_host::{HostFacts, PerfHost, ThisHost};
use crate::report::Finding;
use crate::vcpu::{DEVICE, open};

/// So long at most does the guest that tries the counter run at a stretch: a ten thousandth of this,
/// where hardware runs it.
pub(crate) const TIME_LIMIT: Duration = Duration::from_secs(1);

/// Whether the counter is tried out before a guest depends on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SelfTesting {
    /// By a tiny guest, for some milliseconds.
    #[default]
    Run,
    /// It has been, since the host was started.
    Done,
}

/// The engine `kvm` with the clock `pmu`.
pub type PmuEngine = BranchClock<PmuVcpu>;

/// An engine whose memory is `ram`, if this host's counter passes the test. The calling thread runs it.
/// CPUID tells its guest of the time-stamp counter or not.
///
/// # Errors
/// Says in one line what the host refuses or lacks, and what to do.
pub fn pmu_engine(
    ram: GuestRam,
    testing: SelfTesting,
    counter: TimeStampCounter,
) -> Result<PmuEngine, EngineError> {
    engine_on(&ThisHost, ram, testing, counter)
}

fn engine_on(
    host: &dyn PerfHost,
    ram: GuestRam,
    testing: SelfTesting,
    time_stamps: TimeStampCounter,
) -> Result<PmuEngine, EngineError> {
    if testing == SelfTesting::Run {
        self_test(host)??;
    }
    let mut vcpu = PmuVcpu::new(ram, host)?;
    vcpu.show(time_stamps)?;
    let skid = vcpu.counter()?.skid();
    BranchClock::new(vcpu, Parameters::with_skid(skid))
}

/// Whether this host has a counter for the clock `pmu`, untested. Takes microseconds.
pub fn pmu_counter() -> Finding {
    // A thread of its own: the counter belongs to it, and on a hybrid CPU it is kept to some cores.
    on_own_thread(|| counter_on(&ThisHost))
}

fn counter_on(host: &dyn PerfHost) -> Finding {
    match open(DEVICE) {
        Ok(_) => counter_alone_on(host),
        Err(error) => Finding::failed(&error),
    }
}

fn counter_alone_on(host: &dyn PerfHost) -> Finding {
    match BranchCounter::open(host) {
        Ok(counter) => {
            let event = counter.event();
            Finding::yes(format!("{} has {}", event.microarchitecture, event.event_name()))
        }
        Err(refusal) => Finding::refused(&refusal),
    }
}

/// Whether this host has a counter for the clock `pmu`, with or without KVM.
pub(crate) fn counter_alone() -> Finding {
    on_own_thread(|| counter_alone_on(&ThisHost))
}

/// Whether this host has the clock `pmu`, and why (not). Runs a tiny guest for some milliseconds.
pub fn pmu_clock() -> Finding {
    on_own_thread(|| clock_on(&ThisHost))
}

fn clock_on(host: &dyn PerfHost) -> Finding {
    match self_test(host) {
        Ok(Ok(reason)) => Finding::yes(reason),
        Ok(Err(KvmError::NoBranchCounter(refusal))) => Finding::refused(&refusal),
        Ok(Err(error)) => Finding::failed(&error),
        Err(error) => Finding::no(error.to_string()),
    }
}

fn on_own_thread(ask: impl FnOnce() -> Finding + Send) -> Finding {
    std::thread::scope(|scope| {
        let asked = scope.spawn(ask).join();
        // A panic has been reported by the panic hook.
        asked.unwrap_or_else(|_| Finding::no("the question ended in a defect of Reprise"))
    })
}

/// Tries the counter; what is said for it if it is right.
fn self_test(host: &dyn PerfHost) -> Result<Result<String, KvmError>, EngineError> {
    let ram =
        GuestRam::new(MIN_RAM_MIB).map_err(|error| EngineError { what: error.to_string() })?;
    let mut vcpu = match PmuVcpu::new(ram, host) {
        Ok(vcpu) => vcpu,
        Err(error) => return Ok(Err(error)),
    };
    vcpu.watch(TIME_LIMIT);
    let (event, skid) = match vcpu.counter() {
        Ok(counter) => (counter.event(), counter.skid()),
        Err(error) => return Ok(Err(error)),
    };
    Ok(match what_is_wrong(&mut vcpu, skid, event.skid_is_bounded())? {
        Some(wrong) => {
            let speculates =
                wrong.counts_too_much && event.caveats.contains(&Caveat::SpeculatesPastLocks);
            let refusal = CounterRefusal::SelfTest { reason: wrong.text, speculates };
            Err(KvmError::NoBranchCounter(refusal))
        }
        None => Ok(said_for(event, &host.facts())),
    })
}

/// What is said for a counter that is right, with what is to be known of it.
fn said_for(event: &BranchEvent, facts: &HostFacts) -> String {
    let (name, microarchitecture) = (event.event_name(), event.microarchitecture);
    let mut text = format!(
        "{name} has counted conditional branches exactly in its self-test on this {microarchitecture}"
    );
    for caveat in event.caveats {
        if *caveat != Caveat::CountsInSmm || facts.counts_in_smm {
            text.push_str("; ");
            text.push_str(caveat.text());
        }
    }
    text
}

#[cfg(test)]
#[path = "pmu_tests.rs"]
mod tests;
