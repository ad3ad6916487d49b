//! Whether the host's performance counters can count a guest alone.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

use vmm_sys_util::errno::Error as Errno;

use crate::report::Finding;

/// `PERF_TYPE_HARDWARE` of perf_event_open(2).
const TYPE_HARDWARE: u32 = 0;

/// What a counter counts, in the guest only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Counted {
    /// Retired instructions (`PERF_COUNT_HW_INSTRUCTIONS`).
    Instructions = 1,
    /// Retired branches (`PERF_COUNT_HW_BRANCH_INSTRUCTIONS`).
    Branches = 4,
}

/// The first version of perf_event_open's attributes, which every kernel takes.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    event_type: u32,
    size_bytes: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    breakpoint_type: u32,
    config1: u64,
}

const FLAG_PINNED: u64 = 1 << 2;
const FLAG_EXCLUDE_HOST: u64 = 1 << 19;

/// An event by its number.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawEvent {
    /// `type` of perf_event_open.
    pub(crate) event_type: u32,
    /// The event.
    pub(crate) config: u64,
    /// Counts from overflow to overflow; 0 for a counter that only counts.
    pub(crate) period: u64,
}

/// A counter of this thread's guest.
pub(crate) struct Counter {
    file: File,
}

impl Counter {
    pub(crate) fn open(counted: Counted) -> Result<Self, Errno> {
        let config = counted as u64;
        Self::open_raw(RawEvent { event_type: TYPE_HARDWARE, config, period: 0 })
    }

    /// A counter of any event, which overflows after each period.
    pub(crate) fn open_raw(event: RawEvent) -> Result<Self, Errno> {
        let attributes = Attributes {
            event_type: event.event_type,
            size_bytes: size_of::<Attributes>() as u32,
            config: event.config,
            sample_period: event.period,
            flags: FLAG_PINNED | FLAG_EXCLUDE_HOST,
            ..Attributes::default()
        };
        let (this_thread, any_cpu, no_group) = (0, -1, -1);
        let close_on_exec: libc::c_ulong = 8;
        // SAFETY: the kernel reads `size_bytes` bytes of the attributes, which live until it returns.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_perf_event_open,
                &raw const attributes,
                this_thread,
                any_cpu,
                no_group,
                close_on_exec,
            )
        };
        if fd < 0 {
            return Err(Errno::last());
        }
        // SAFETY: the kernel has just given this descriptor, and nobody else has it.
        let file = unsafe { File::from_raw_fd(fd as i32) };
        Ok(Self { file })
    }

    /// The file that stands for it.
    pub(crate) fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// The count so far; `None` where the counter never got hold of the hardware.
    pub(crate) fn read(&mut self) -> Option<u64> {
        let mut count = [0; 8];
        self.file.read_exact(&mut count).ok()?;
        Some(u64::from_le_bytes(count))
    }
}

/// Why a counter was refused, and what could be done.
pub(crate) fn refusal(errno: Errno) -> Finding {
    let reason = match errno.errno() {
        libc::ENOENT => {
            "the host has no such hardware counter (ENOENT), as is usual in a cloud VM: use a host with a PMU".into()
        }
        libc::EOPNOTSUPP => {
            "the host's counters cannot be limited to a guest (EOPNOTSUPP): its PMU lacks that, or is handed to guests as a whole (mediated vPMU)".into()
        }
        libc::EACCES | libc::EPERM => format!(
            "no permission to use counters (perf_event_paranoid is {}): set it to 1, or give CAP_PERFMON",
            paranoid_level()
        ),
        libc::ENOSYS => "the host's kernel has no perf_event_open (ENOSYS)".into(),
        _ => format!("perf_event_open was refused ({errno})"),
    };
    Finding { available: false, reason }
}

fn paranoid_level() -> String {
    std::fs::read_to_string("/proc/sys/kernel/perf_event_paranoid")
        .map_or_else(|_| "unknown".into(), |level| level.trim().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_refusal_has_its_own_reason() {
        let reasons = [libc::ENOENT, libc::EOPNOTSUPP, libc::EACCES, libc::ENOSYS, libc::EMFILE]
            .map(|errno| refusal(Errno::new(errno)).reason);
        for (index, reason) in reasons.iter().enumerate() {
            assert!(!reason.contains('\n') && !reasons[..index].contains(reason), "{reason}");
        }
        assert!(reasons[2].contains("perf_event_paranoid"));
    }
}
