//! Whether the host's performance counters can count a guest alone.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

use vmm_sys_util::errno::Error as Errno;

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

const FORMAT_TOTAL_TIME_ENABLED: u64 = 1;
const FORMAT_TOTAL_TIME_RUNNING: u64 = 1 << 1;
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

/// What a counter has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reading {
    pub(crate) count: u64,
    /// Time in which it should have counted.
    pub(crate) enabled_ns: u64,
    /// Time in which it did: as much, unless it shares the hardware with others.
    pub(crate) running_ns: u64,
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
            read_format: FORMAT_TOTAL_TIME_ENABLED | FORMAT_TOTAL_TIME_RUNNING,
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

    /// What it has come to; `None` where it never got hold of the hardware, or has lost it.
    pub(crate) fn reading(&mut self) -> Option<Reading> {
        let mut bytes = [0; 24];
        self.file.read_exact(&mut bytes).ok()?;
        let mut words = bytes.chunks_exact(8).map(|word| {
            u64::from_le_bytes(word.try_into().expect("a chunk of eight bytes has eight"))
        });
        let mut next = || words.next().unwrap_or_default();
        Some(Reading { count: next(), enabled_ns: next(), running_ns: next() })
    }
}
