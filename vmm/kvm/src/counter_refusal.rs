//! Why a host has no counter for the clock `pmu`, and what its owner can do about that.

use vmm_sys_util::errno::Error as Errno;

use crate::perf_host::HostFacts;

/// What to do about Zen's counting of what it speculated on.
pub(crate) const ZEN_WORKAROUND: &str = "run rr's zen_workaround.py as root after each boot and each sleep (it sets bit 54 of MSR 0xc0011020 on each CPU)";

/// Why the guest's conditional branches cannot be counted. Each reason is one line, and so is what to
/// do ([`CounterRefusal::remedy`]).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CounterRefusal {
    /// The table of events has no row for the CPU.
    #[error("no event is known that counts conditional branches on this CPU ({0})")]
    UnknownCpu(String),
    /// ENOENT.
    #[error("the host has no performance counter (ENOENT)")]
    NoHardware {
        /// It runs under a hypervisor, which could pass one on.
        in_vm: bool,
    },
    /// EOPNOTSUPP, or EINVAL of a counter that cannot leave the host out.
    #[error("the host's counters cannot be limited to a guest ({0})")]
    NotGuestOnly(&'static str),
    /// EACCES or EPERM.
    #[error("no permission to use counters (kernel.perf_event_paranoid is {paranoid_level})")]
    Forbidden {
        /// As the kernel tells it, or `unknown`.
        paranoid_level: String,
    },
    /// ENOSYS.
    #[error("the host's kernel has no perf_event_open (ENOSYS)")]
    NoSystemCall,
    /// EBUSY, or a pinned counter that never got hold of the hardware.
    #[error("every counter of the CPU is taken by somebody else")]
    Taken,
    /// EMFILE or ENFILE.
    #[error("the host has no file descriptor left for a counter")]
    NoDescriptor,
    /// The kernel stops a counter that interrupts more often than this.
    #[error("the host's kernel lets counters interrupt only {per_second} times a second")]
    FewInterrupts {
        /// `kernel.perf_event_max_sample_rate`.
        per_second: u64,
    },
    /// A hybrid CPU whose kinds of core cannot be told apart.
    #[error("the host describes its performance cores in a way that is not understood")]
    UnknownCores,
    /// The thread may not run on a performance core.
    #[error("this process may not run on the CPU's performance cores ({0})")]
    NoPerformanceCore(Errno),
    /// Anything else that the kernel says.
    #[error("perf_event_open was refused ({0})")]
    Other(Errno),
    /// The counter is there, and what the guest that tries it came to was wrong.
    #[error("{reason}")]
    SelfTest {
        /// In a line.
        reason: String,
        /// It counted too much, on a CPU that is known for that.
        speculates: bool,
    },
    /// The counter was off the hardware for a while.
    #[error(
        "the counter shared the hardware with others: it was on for {running_ns} ns of {enabled_ns}"
    )]
    Multiplexed {
        /// Time in which it should have counted.
        enabled_ns: u64,
        /// Time in which it did.
        running_ns: u64,
    },
    /// A counter counts the thread that opened it.
    #[error("the guest runs on another thread than the counter was opened for")]
    OtherThread,
}

impl CounterRefusal {
    /// What the kernel meant by refusing a counter.
    pub(crate) fn of(errno: Errno, paranoid_level: Option<&str>, in_vm: bool) -> Self {
        match errno.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO => Self::NoHardware { in_vm },
            libc::EOPNOTSUPP => Self::NotGuestOnly("EOPNOTSUPP"),
            libc::EINVAL => Self::NotGuestOnly("EINVAL"),
            libc::EACCES | libc::EPERM => {
                Self::Forbidden { paranoid_level: paranoid_level.unwrap_or("unknown").to_owned() }
            }
            libc::ENOSYS => Self::NoSystemCall,
            libc::EBUSY | libc::ENOSPC => Self::Taken,
            libc::EMFILE | libc::ENFILE => Self::NoDescriptor,
            _ => Self::Other(errno),
        }
    }

    /// The same for this host.
    pub(crate) fn of_this_host(errno: Errno) -> Self {
        let facts = HostFacts::of_this_host();
        Self::of(errno, facts.paranoid_level.as_deref(), facts.in_vm)
    }

    /// What to do, as half a sentence.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::UnknownCpu(_) => "use a CPU that Reprise knows (Intel since 2008, AMD since Zen)",
            Self::NoHardware { in_vm: true } => {
                "leave this VM for bare metal, or have its hypervisor pass the PMU on"
            }
            Self::NoHardware { in_vm: false } => {
                "use a host whose kernel drives the CPU's PMU (`sudo dmesg | grep -i pmu` tells)"
            }
            Self::NotGuestOnly(_) => {
                "stop the VMs that have the PMU to themselves (mediated vPMU), or use a host whose PMU \
                 tells guest from host"
            }
            Self::Forbidden { .. } => {
                "run `sudo sysctl kernel.perf_event_paranoid=1`, or give the program CAP_PERFMON"
            }
            Self::NoSystemCall => "use a kernel with CONFIG_PERF_EVENTS, outside of sandboxes",
            Self::Taken | Self::Multiplexed { .. } => {
                "stop what else counts (perf, a profiler; the watchdog by `sudo sysctl \
                 kernel.nmi_watchdog=0`), and try again"
            }
            Self::NoDescriptor => "raise the limit of open files (`ulimit -n`)",
            Self::FewInterrupts { .. } => {
                "run `sudo sysctl kernel.perf_event_max_sample_rate=100000`"
            }
            Self::UnknownCores => "use a CPU with one kind of core",
            Self::NoPerformanceCore(_) => "let it run there (`taskset`, cpusets)",
            Self::Other(_) => "run `reprise doctor` on another host to compare",
            Self::SelfTest { speculates: true, .. } => ZEN_WORKAROUND,
            Self::SelfTest { .. } => "use a host whose counter is exact (bare metal mostly is)",
            Self::OtherThread => "report this as a defect of Reprise",
        }
    }
}
