//! The counter on hosts of all kinds, whose kernel a test answers for.

use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::branch_events::HostCpu;
use crate::fake_perf_host::{Asked, FakePerfHost, counted};
use crate::perf_host::ThisHost;
use crate::testing::skipped;

fn refusal(host: &FakePerfHost) -> CounterRefusal {
    BranchCounter::open(host).err().expect("it is refused")
}

/// The line that a user reads.
fn line(refusal: &CounterRefusal) -> String {
    let line = KvmError::NoBranchCounter(refusal.clone()).to_string();
    assert!(!line.contains('\n') && line.contains("or use --engine soft"), "{line}");
    line
}

#[test]
fn lists_of_cpus_are_ranges_and_numbers() {
    assert_eq!(cpus_of_list("0-3,8"), Some(vec![0, 1, 2, 3, 8]));
    assert_eq!(cpus_of_list("5"), Some(vec![5]));
    assert_eq!(cpus_of_list("a-3"), None);
    assert_eq!(cpus_of_list("0-99999999999"), None);
}

#[test]
fn each_refusal_of_the_kernel_has_its_line_that_says_what_to_do() {
    // (errno, words of the reason, words of what to do)
    let cases = [
        (libc::ENOENT, "no performance counter (ENOENT)", "CPU's PMU"),
        (libc::EOPNOTSUPP, "limited to a guest (EOPNOTSUPP)", "mediated vPMU"),
        (libc::EINVAL, "limited to a guest (EINVAL)", "mediated vPMU"),
        (libc::EACCES, "perf_event_paranoid is 3", "sudo sysctl kernel.perf_event_paranoid=1"),
        (libc::EPERM, "perf_event_paranoid is 3", "CAP_PERFMON"),
        (libc::ENOSYS, "no perf_event_open", "CONFIG_PERF_EVENTS"),
        (libc::EBUSY, "taken by somebody else", "nmi_watchdog=0"),
        (libc::EMFILE, "no file descriptor left", "ulimit -n"),
        (libc::EIO, "was refused (", "reprise doctor"),
    ];
    for (errno, reason, remedy) in cases {
        let mut host = FakePerfHost::refusing(errno);
        host.facts.paranoid_level = Some("3".to_owned());
        let line = line(&refusal(&host));
        assert!(line.contains(reason) && line.contains(remedy), "{line}");
    }
}

#[test]
fn a_vm_without_a_counter_is_to_be_left() {
    let mut host = FakePerfHost::refusing(libc::ENOENT);
    host.facts.in_vm = true;
    assert_eq!(refusal(&host), CounterRefusal::NoHardware { in_vm: true });
    assert!(line(&refusal(&host)).contains("leave this VM"));
}

#[test]
fn a_paranoid_level_that_cannot_be_read_is_unknown() {
    let mut host = FakePerfHost::refusing(libc::EACCES);
    host.facts.paranoid_level = None;
    assert!(line(&refusal(&host)).contains("perf_event_paranoid is unknown"));
}

#[test]
fn a_cpu_without_a_row_is_not_asked() {
    let mut host = FakePerfHost::new();
    host.facts.cpu = HostCpu::new(*b"GenuineIntel", 0x0000_0f29);
    let refusal = refusal(&host);
    assert!(line(&refusal).contains("GenuineIntel, family 0xf, model 0x2"), "{refusal}");
    assert!(host.asked.borrow().is_empty());
}

#[test]
fn the_counter_is_the_rows_and_interrupts_this_thread() {
    let host = FakePerfHost::new();
    let mut counter = BranchCounter::open(&host).expect("it opens");
    counter.interrupt_after(Some(1_000)).expect("a period");
    // Shorter ones are refused by some CPUs, and none is asked for twice.
    counter.interrupt_after(Some(1)).expect("a period");
    counter.interrupt_after(None).expect("a period");
    counter.interrupt_after(None).expect("a period");
    let open = Asked::Open { event_type: TYPE_RAW, config: 0x5101c4, period: NEVER };
    let expected = [
        open,
        Asked::Signal(this_thread()),
        Asked::Period(1_000),
        Asked::Period(SHORTEST_PERIOD),
        Asked::Period(NEVER),
    ];
    assert_eq!(*host.asked.borrow(), expected);
    assert_eq!(counter.skid(), 100 + SHORTEST_PERIOD);
}

#[test]
fn on_a_hybrid_cpu_the_thread_is_kept_to_the_performance_cores() {
    let mut host = FakePerfHost::new();
    host.facts.performance_cores = Some(("10".to_owned(), "0-1,4".to_owned()));
    BranchCounter::open(&host).expect("it opens");
    let asked = host.asked.borrow().clone();
    assert_eq!(asked[..3], [Asked::KeepTo(0), Asked::KeepTo(1), Asked::KeepTo(4)]);
    assert!(matches!(asked[3], Asked::Open { event_type: 10, .. }), "{asked:?}");
}

#[test]
fn a_hybrid_cpu_that_is_not_understood_or_not_allowed_is_refused() {
    let mut host = FakePerfHost::new();
    host.facts.performance_cores = Some(("ten".to_owned(), "0".to_owned()));
    assert_eq!(refusal(&host), CounterRefusal::UnknownCores);
    host.facts.performance_cores = Some(("10".to_owned(), "0".to_owned()));
    host.keep_to = Err(libc::EINVAL);
    assert!(line(&refusal(&host)).contains("taskset"));
}

#[test]
fn a_kernel_that_allows_few_interrupts_is_refused() {
    let mut host = FakePerfHost::new();
    host.facts.max_interrupts_per_second = Some(1_000);
    assert!(line(&refusal(&host)).contains("perf_event_max_sample_rate=100000"));
    host.facts.max_interrupts_per_second = Some(100_000);
    assert!(BranchCounter::open(&host).is_ok());
}

#[test]
fn a_counter_that_never_gets_hold_of_the_hardware_is_refused() {
    assert_eq!(refusal(&FakePerfHost::reading(|| None)), CounterRefusal::Taken);
}

/// A counter that reads well at first, and then so.
fn failing_later(reading: Option<Reading>) -> String {
    let reads = AtomicU64::new(0);
    let host = FakePerfHost::reading(move || match reads.fetch_add(1, Ordering::Relaxed) {
        0 => Some(counted(0)),
        _ => reading,
    });
    let mut counter = BranchCounter::open(&host).expect("it opens");
    let line = counter.read().expect_err("it fails").to_string();
    assert!(line.contains("nmi_watchdog=0") && !line.contains('\n'), "{line}");
    line
}

#[test]
fn a_counter_that_loses_the_hardware_or_shares_it_is_an_error() {
    assert!(failing_later(None).contains("taken"));
    let shared = Reading { count: 7, enabled_ns: 9_000, running_ns: 8_999 };
    assert!(failing_later(Some(shared)).contains("8999 ns of 9000"));
}

#[test]
fn a_period_that_is_refused_is_an_error() {
    let mut host = FakePerfHost::new();
    host.set_period = Err(libc::EINVAL);
    let mut counter = BranchCounter::open(&host).expect("it opens");
    assert!(counter.interrupt_after(Some(100)).is_err());
}

/// The counter of another thread would stand still, and nothing would tell.
#[test]
fn a_counter_counts_the_thread_that_opened_it_and_no_other() {
    /// Only the thread's number is looked at.
    struct Anywhere(BranchCounter);
    // SAFETY: the counter is a fake one without any sharing, and the threads do not overlap.
    unsafe impl Send for Anywhere {}
    let mut counter = Anywhere(BranchCounter::open(&FakePerfHost::new()).expect("it opens"));
    assert!(counter.0.read().is_ok());
    let read = std::thread::spawn(move || {
        let whole = &mut counter;
        whole.0.read().expect_err("another thread").to_string()
    });
    let line = read.join().expect("no panic");
    assert!(line.contains("another thread"), "{line}");
}

/// The kernel moves a thread's counter along with it: needs a PMU.
#[test]
fn a_counter_follows_its_thread_from_cpu_to_cpu() {
    let mut counter = match BranchCounter::open(&ThisHost) {
        Ok(counter) => counter,
        Err(refusal) => return skipped(format_args!("no PMU: {refusal}")),
    };
    let last = counter.read().expect("it reads");
    for cpu in 0..std::thread::available_parallelism().map_or(1, usize::from) {
        // A CPU that the process may not use keeps it where it is.
        let _ = ThisHost.keep_to(&[cpu]);
        assert_eq!(counter.read().expect("it reads on every CPU"), last, "no guest ran");
    }
}
