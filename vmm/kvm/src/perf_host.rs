//! The host as a counter needs it: system calls behind a trait, so that tests can refuse each of them.

use std::fs;
use std::os::fd::RawFd;

use libc::c_int;
use vmm_sys_util::errno::Error as Errno;

use crate::branch_events::HostCpu;
use crate::counters::{Counter, RawEvent, Reading};
use crate::kick;

/// `PERF_EVENT_IOC_PERIOD`: _IOW('$', 4, u64).
const SET_PERIOD: libc::c_ulong = 0x4008_2404;
/// `F_SETSIG` of fcntl(2), where libc's Linux targets lack it.
const F_SETSIG: c_int = 10;
/// `F_SETOWN_EX` and its `F_OWNER_TID`.
const F_SETOWN_EX: c_int = 15;
const F_OWNER_TID: c_int = 0;

#[repr(C)]
struct Owner {
    kind: c_int,
    id: libc::pid_t,
}

/// What is known of a host before a counter is opened.
#[derive(Clone, Debug, Default)]
pub(crate) struct HostFacts {
    pub(crate) cpu: HostCpu,
    /// CPUID says that there is a hypervisor below.
    pub(crate) in_vm: bool,
    /// `/proc/sys/kernel/perf_event_paranoid`.
    pub(crate) paranoid_level: Option<String>,
    /// `/proc/sys/kernel/perf_event_max_sample_rate`.
    pub(crate) max_interrupts_per_second: Option<u64>,
    /// `type` and `cpus` of a hybrid CPU's performance cores.
    pub(crate) performance_cores: Option<(String, String)>,
    /// `/sys/devices/cpu/freeze_on_smi` is 0.
    pub(crate) counts_in_smm: bool,
}

impl HostFacts {
    pub(crate) fn of_this_host() -> Self {
        let read = |path: &str| fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
        let cores = "/sys/bus/event_source/devices/cpu_core";
        let performance_cores = read(&format!("{cores}/type")).zip(read(&format!("{cores}/cpus")));
        let frozen = ["/sys/devices/cpu/freeze_on_smi", "/sys/devices/cpu_core/freeze_on_smi"];
        Self {
            cpu: HostCpu::of_this_host(),
            in_vm: HostCpu::is_virtual(),
            paranoid_level: read("/proc/sys/kernel/perf_event_paranoid"),
            max_interrupts_per_second: read("/proc/sys/kernel/perf_event_max_sample_rate")
                .and_then(|rate| rate.parse().ok()),
            performance_cores,
            counts_in_smm: frozen.iter().any(|path| read(path).as_deref() == Some("0")),
        }
    }
}

/// Opens counters.
pub(crate) trait PerfHost {
    fn facts(&self) -> HostFacts;

    /// Opens a counter of the calling thread's guest.
    fn open(&self, event: RawEvent) -> Result<Box<dyn PerfCounter>, Errno>;

    /// Keeps the calling thread to those of these CPUs on which it may run; an error if there is none.
    fn keep_to(&self, cpus: &[usize]) -> Result<(), Errno>;
}

/// An open counter.
pub(crate) trait PerfCounter {
    /// `None` if it has lost the hardware.
    fn read(&mut self) -> Option<Reading>;

    /// Has it overflow after so many more events.
    fn set_period(&mut self, period: u64) -> Result<(), Errno>;

    /// Has overflows send the signal of kicks to this thread.
    fn signal_thread(&mut self, id: libc::pid_t) -> Result<(), Errno>;
}

/// The host that this runs on.
pub(crate) struct ThisHost;

impl PerfHost for ThisHost {
    fn facts(&self) -> HostFacts {
        HostFacts::of_this_host()
    }

    fn open(&self, event: RawEvent) -> Result<Box<dyn PerfCounter>, Errno> {
        Ok(Box::new(Counter::open_raw(event)?))
    }

    fn keep_to(&self, cpus: &[usize]) -> Result<(), Errno> {
        // SAFETY: a set of CPUs is plain bits, and all zeros is the empty set.
        let [mut allowed, mut kept]: [libc::cpu_set_t; 2] = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes the set, whose size is given; 0 is the calling thread.
        check(unsafe { libc::sched_getaffinity(0, size_of_val(&allowed), &raw mut allowed) })?;
        let room = libc::CPU_SETSIZE as usize;
        for cpu in cpus.iter().filter(|cpu| **cpu < room) {
            // SAFETY: the number lies within both sets.
            unsafe {
                if libc::CPU_ISSET(*cpu, &allowed) {
                    libc::CPU_SET(*cpu, &mut kept);
                }
            }
        }
        // SAFETY: the kernel reads the set, whose size is given; it refuses an empty one.
        check(unsafe { libc::sched_setaffinity(0, size_of_val(&kept), &raw const kept) })
    }
}

impl PerfCounter for Counter {
    fn read(&mut self) -> Option<Reading> {
        self.reading()
    }

    fn set_period(&mut self, period: u64) -> Result<(), Errno> {
        let fd: RawFd = self.as_raw_fd();
        // SAFETY: the kernel reads the eight bytes, which live until it returns.
        check(unsafe { libc::ioctl(fd, SET_PERIOD, &raw const period) })
    }

    fn signal_thread(&mut self, id: libc::pid_t) -> Result<(), Errno> {
        let fd: RawFd = self.as_raw_fd();
        let owner = Owner { kind: F_OWNER_TID, id };
        // SAFETY: the kernel reads the structure, which lives until it returns; the other calls take
        // numbers.
        let results = unsafe {
            [
                libc::fcntl(fd, F_SETOWN_EX, &raw const owner),
                libc::fcntl(fd, F_SETSIG, kick::signal()),
                libc::fcntl(fd, libc::F_SETFL, libc::O_ASYNC),
            ]
        };
        results.into_iter().try_for_each(check)
    }
}

fn check(result: c_int) -> Result<(), Errno> {
    if result < 0 { Err(Errno::last()) } else { Ok(()) }
}

/// The calling thread.
pub(crate) fn this_thread() -> libc::pid_t {
    // SAFETY: gettid has no preconditions.
    unsafe { libc::gettid() }
}
