//! What becomes of counters that are refused, and of such that count wrong: the self-test runs its guest on
//! this host's KVM, and a test says what the counter reads.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use reprise_machine::engine::{Engine, Exit};
use reprise_trace::cpu_state::{RAX, RDX};

use super::*;
use crate::branch_events::HostCpu;
use crate::fake_perf_host::{FakePerfHost, counted};
use crate::host::KvmKind;
use crate::testing::{long_mode, ram_with, require_kvm, skipped};

fn ram() -> GuestRam {
    GuestRam::new(MIN_RAM_MIB).expect("the host has 4 MiB")
}

/// A session that asks for the clock gets the reason of the doctor's finding, and what to do.
#[track_caller]
fn refused(host: &FakePerfHost, reason: &str, remedy: &str) {
    let finding = clock_on(host);
    assert!(!finding.available && finding.reason.contains(reason), "{finding}");
    assert!(finding.remedy.as_ref().is_some_and(|text| text.contains(remedy)), "{finding:?}");
    let Err(error) = engine_on(host, ram(), SelfTesting::Run, TimeStampCounter::Hidden) else {
        panic!("no refusal")
    };
    let line = error.to_string();
    assert!(line.contains(reason) && line.contains(remedy) && !line.contains('\n'), "{line}");
    assert!(line.contains("--engine soft"), "{line}");
}

#[test]
fn a_refused_counter_is_a_line_that_says_what_to_do() {
    require_kvm!();
    refused(&FakePerfHost::refusing(libc::EACCES), "no permission", "perf_event_paranoid=1");
    refused(&FakePerfHost::refusing(libc::EOPNOTSUPP), "EOPNOTSUPP", "mediated vPMU");
    refused(&FakePerfHost::refusing(libc::ENOENT), "ENOENT", "PMU");
}

/// Gives a count that grows by `step` with each reading, as a guest that runs in between makes it.
fn growing(step: u64) -> FakePerfHost {
    let reads = AtomicU64::new(0);
    FakePerfHost::reading(move || Some(counted(step * reads.fetch_add(1, Ordering::Relaxed))))
}

/// The self-test's guest on this host's KVM, with counters that are wrong in known ways.
#[test]
fn a_counter_that_counts_wrong_is_refused() {
    require_kvm!();
    refused(&FakePerfHost::new(), "does not count this guest", "bare metal");
}

#[test]
fn a_counter_of_taken_branches_only_is_refused() {
    require_kvm!();
    // Readings: when it opens, and before and after the guest ran.
    let by_read = [0, 0, 59_999];
    let reads = AtomicU64::new(0);
    let host = FakePerfHost::reading(move || {
        let read = reads.fetch_add(1, Ordering::Relaxed) as usize;
        Some(counted(by_read[read % by_read.len()]))
    });
    refused(&host, "only the branches that are taken", "bare metal");
}

#[test]
fn a_counter_that_overcounts_is_refused_with_its_cure() {
    require_kvm!();
    let mut host = growing(150_000);
    refused(&host, "what is not retired", "bare metal");
    // A Zen 3.
    host.facts.cpu = HostCpu::new(*b"AuthenticAMD", 0x00a0_0f11);
    refused(&host, "what is not retired", "zen_workaround.py");
}

#[test]
fn a_counter_that_fails_amid_the_test_is_an_error() {
    require_kvm!();
    let reads = AtomicU64::new(0);
    let host = FakePerfHost::reading(move || match reads.fetch_add(1, Ordering::Relaxed) {
        0 | 1 => Some(counted(0)),
        _ => None,
    });
    let finding = clock_on(&host);
    assert!(!finding.available && finding.reason.contains("taken"), "{finding}");
}

#[test]
fn the_clock_works_or_says_in_one_line_why_not() {
    let began = Instant::now();
    let (counter, clock) = (pmu_counter(), pmu_clock());
    eprintln!("{counter}\n{clock}\nin {:?}", began.elapsed());
    assert!(!clock.reason.contains('\n'), "{clock}");
    assert!(counter.available || !clock.available, "no clock without a counter");
    if !clock.available {
        skipped(format_args!("no PMU: {}", clock.reason));
        let Err(error) = pmu_engine(ram(), SelfTesting::Run, TimeStampCounter::Hidden) else {
            panic!("no counter")
        };
        assert!(error.to_string().contains("--engine soft"), "{error}");
    }
}

/// A replay on the software CPU hides it too, from the guest of a recording with this clock.
#[test]
fn cpuid_hides_the_time_stamp_counter_unless_it_was_shown() {
    /// EDX of these leaves: there is one, and it is invariant.
    const TELL: [(u32, u32); 2] = [(1, 1 << 4), (INVARIANT, 1 << 8)];
    const INVARIANT: u32 = 0x8000_0007;
    require_kvm!();
    for (counter, shown) in [(TimeStampCounter::Hidden, false), (TimeStampCounter::Shown, true)] {
        // cpuid; hlt
        let ram = ram_with(&[0x0f, 0xa2, 0xf4]);
        let engine = engine_on(&FakePerfHost::new(), ram, SelfTesting::Done, counter);
        let mut engine = engine.expect("KVM, and a counter that stands still");
        let table = engine.vcpu().engine.vcpu.fd.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES);
        let table = table.expect("KVM tells what it was given");
        // Pagetable-based KVM puts the host's features in leaf 1.
        let told = match KvmKind::of_this_host() {
            KvmKind::PagetableBased => &TELL[1..],
            _ => &TELL[..],
        };
        for &(leaf, bit) in told {
            let entry = table.as_slice().iter().find(|entry| entry.function == leaf);
            assert_eq!(entry.expect("it is in the model").edx & bit != 0, shown, "leaf {leaf:#x}");
        }
        let mut state = long_mode();
        state.gpr[RAX] = u64::from(INVARIANT);
        engine.set_cpu_state(&state).expect("a state that KVM takes");
        assert_eq!(engine.run(u64::MAX).expect("KVM runs"), Exit::Halt);
        let edx = engine.cpu_state().expect("a state").gpr[RDX] as u32;
        assert_eq!(edx, if shown { 1 << 8 } else { 0 });
    }
}
