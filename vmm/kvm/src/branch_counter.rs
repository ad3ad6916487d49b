//! A counter of the guest's conditional branches that interrupts the vCPU's thread.
//!
//! It counts guest mode only, whatever thread or CPU the vCPU runs on, and holds its place on the hardware
//! (`pinned`); should it lose it all the same, reading it fails. On a hybrid CPU only one kind of core has
//! the event, so the thread is kept to those.

use std::fs;
use std::os::fd::RawFd;

use libc::c_int;
use vmm_sys_util::errno::Error as Errno;

use crate::branch_events::{BranchEvent, HostCpu};
use crate::counters::{Counter, RawEvent, refusal};
use crate::error::KvmError;
use crate::kick;

/// perf_event_open(2): a raw event of the CPU's own counters.
const TYPE_RAW: u32 = 4;
/// "No overflow": a counter cannot change between counting and sampling, so it samples never.
const NEVER: u64 = 1 << 60;
/// Some CPUs refuse a shorter period.
const MIN_PERIOD: u64 = 32;
/// `PERF_EVENT_IOC_PERIOD`: _IOW('$', 4, u64).
const SET_PERIOD: libc::c_ulong = 0x4008_2404;
/// `F_SETSIG` of fcntl(2), where libc's Linux targets lack it.
const F_SETSIG: c_int = 10;
/// `F_SETOWN_EX` and its `F_OWNER_TID`.
const F_SETOWN_EX: c_int = 15;
const F_OWNER_TID: c_int = 0;

/// Where a hybrid CPU's performance cores are described.
const PERFORMANCE_CORES: &str = "/sys/bus/event_source/devices/cpu_core";

#[repr(C)]
struct Owner {
    kind: c_int,
    id: libc::pid_t,
}

/// The counter.
pub(crate) struct BranchCounter {
    counter: Counter,
    event: &'static BranchEvent,
    /// The thread that overflows interrupt.
    owner: Option<libc::pid_t>,
    period: u64,
}

impl BranchCounter {
    /// A counter of what the calling thread's guests retire.
    ///
    /// # Errors
    /// Says in one line why this host has none.
    pub(crate) fn open() -> Result<Self, KvmError> {
        let event = HostCpu::of_this_host().branch_event().map_err(KvmError::NoBranchCounter)?;
        let event_type = performance_cores()?.unwrap_or(TYPE_RAW);
        let raw = RawEvent { event_type, config: event.event, period: NEVER };
        let counter = Counter::open_raw(raw)
            .map_err(|errno| KvmError::NoBranchCounter(refusal(errno).reason))?;
        let mut counter = Self { counter, event, owner: None, period: NEVER };
        counter.signal_this_thread()?;
        Ok(counter)
    }

    /// What is counted, and how late it may interrupt, in conditional branches.
    pub(crate) fn event(&self) -> &'static BranchEvent {
        self.event
    }

    /// Branches so far.
    pub(crate) fn read(&mut self) -> Result<u64, KvmError> {
        self.counter.read().ok_or_else(|| {
            KvmError::NoBranchCounter(
                "the counter lost its place on the hardware to another".into(),
            )
        })
    }

    /// Has the thread interrupted after so many more branches, or some more than that.
    pub(crate) fn interrupt_after(&mut self, branches: Option<u64>) -> Result<(), KvmError> {
        self.signal_this_thread()?;
        let period = branches.unwrap_or(NEVER).clamp(MIN_PERIOD, NEVER);
        if period == NEVER && self.period == NEVER {
            return Ok(());
        }
        // SAFETY: the kernel reads the eight bytes, which live until it returns.
        let result = unsafe { libc::ioctl(self.fd(), SET_PERIOD, &raw const period) };
        check("PERF_EVENT_IOC_PERIOD", result)?;
        self.period = period;
        Ok(())
    }

    /// Has overflows interrupt the calling thread, which runs the guest.
    fn signal_this_thread(&mut self) -> Result<(), KvmError> {
        // SAFETY: gettid has no preconditions.
        let id = unsafe { libc::gettid() };
        if self.owner == Some(id) {
            return Ok(());
        }
        let owner = Owner { kind: F_OWNER_TID, id };
        // SAFETY: the kernel reads the structure, which lives until it returns; the other calls take
        // numbers.
        let results = unsafe {
            [
                libc::fcntl(self.fd(), F_SETOWN_EX, &raw const owner),
                libc::fcntl(self.fd(), F_SETSIG, kick::signal()),
                libc::fcntl(self.fd(), libc::F_SETFL, libc::O_ASYNC),
            ]
        };
        results.into_iter().try_for_each(|result| check("a counter's signal", result))?;
        self.owner = Some(id);
        Ok(())
    }

    fn fd(&self) -> RawFd {
        self.counter.as_raw_fd()
    }
}

fn check(what: &str, result: c_int) -> Result<(), KvmError> {
    if result < 0 { Err(KvmError::refused(what, Errno::last())) } else { Ok(()) }
}

/// On a hybrid CPU, keeps this thread to the performance cores and gives their type of event.
fn performance_cores() -> Result<Option<u32>, KvmError> {
    let read = |name: &str| fs::read_to_string(format!("{PERFORMANCE_CORES}/{name}")).ok();
    let (Some(event_type), Some(cpus)) = (read("type"), read("cpus")) else { return Ok(None) };
    let (Ok(event_type), Some(cpus)) = (event_type.trim().parse(), cpus_of_list(cpus.trim()))
    else {
        let reason = "the host describes its performance cores in a way that is not understood";
        return Err(KvmError::NoBranchCounter(reason.into()));
    };
    // SAFETY: a set of CPUs is plain bits, and all zeros is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    let room = libc::CPU_SETSIZE as usize;
    for cpu in cpus.into_iter().filter(|cpu| *cpu < room) {
        // SAFETY: the number lies within the set.
        unsafe { libc::CPU_SET(cpu, &mut set) };
    }
    // SAFETY: the kernel reads the set, whose size is given; 0 is the calling thread.
    let result = unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) };
    check("sched_setaffinity to the performance cores", result)?;
    Ok(Some(event_type))
}

/// The CPUs of a list such as `0-7,16`; `None` if it is none.
fn cpus_of_list(list: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let bounds = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
        cpus.extend(bounds.0..=bounds.1);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus_are_ranges_and_numbers() {
        assert_eq!(cpus_of_list("0-3,8"), Some(vec![0, 1, 2, 3, 8]));
        assert_eq!(cpus_of_list("5"), Some(vec![5]));
        assert_eq!(cpus_of_list("a-3"), None);
    }

    #[test]
    fn a_host_without_counters_says_so_in_one_line() {
        match BranchCounter::open() {
            Ok(counter) => eprintln!("this host counts by {:?}", counter.event()),
            Err(error) => {
                let reason = error.to_string();
                eprintln!("skipped: no PMU: {reason}");
                assert!(!reason.contains('\n') && reason.contains("--engine soft"), "{reason}");
            }
        }
    }
}
