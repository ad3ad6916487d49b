//! The timer that kicks a freely running guest when virtual time, which is the host's clock then, comes
//! to a device's deadline.
//!
//! Whoever runs the guest sets it before each entry; most entries find it set already, and cost no
//! system call. The watcher's thread is woken by its expiry and kicks.

use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use vmm_sys_util::timerfd::TimerFd;

use crate::HostError;

/// From one kick to the next for a deadline that is past: the guest stood at no place that a replay
/// finds again, and looking for one costs it some milliseconds at worst.
const RETRY_NS: u64 = 1_000_000;

/// The timer. Times are nanoseconds on the machine's clock.
#[derive(Debug)]
pub(crate) struct Alarm {
    timer: TimerFd,
    /// When it expires, or has expired.
    set_for_ns: Option<u64>,
}

impl Alarm {
    pub(crate) fn new() -> Result<Self, HostError> {
        let timer = TimerFd::new().map_err(|error| HostError::system("a timer")(error.into()))?;
        Ok(Self { timer, set_for_ns: None })
    }

    /// Has it expire at `deadline_ns`, or, if that is past, soon; `None` for never.
    pub(crate) fn set(&mut self, deadline_ns: Option<u64>, now_ns: u64) {
        let wanted_ns = match (deadline_ns, self.set_for_ns) {
            (Some(deadline), _) if deadline > now_ns => Some(deadline),
            // The next attempt for a deadline that is past is under way.
            (Some(_), Some(set_for)) if (now_ns..=now_ns + RETRY_NS).contains(&set_for) => return,
            (Some(_), _) => Some(now_ns + RETRY_NS),
            (None, _) => None,
        };
        if wanted_ns == self.set_for_ns {
            return;
        }
        // Zero means never.
        let left = wanted_ns.map_or(Duration::ZERO, |at| Duration::from_nanos(at - now_ns));
        // A timer takes every duration that is not negative.
        let _ = self.timer.reset(left, None);
        self.set_for_ns = wanted_ns;
    }
}

impl AsRawFd for Alarm {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}
