//! How virtual time follows ticks.

use reprise_devices::time::VirtualTime;

/// How a recording's virtual time comes about. Fixed for a recording, in its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeSource {
    /// Virtual time is ticks times this many nanoseconds, plus logged jumps.
    Ticks {
        /// Nanoseconds of guest time in one tick.
        ns_per_tick: u64,
    },
    /// Virtual time is the host's clock, read at exits and logged.
    Host,
}

/// The relation between ticks and virtual time since the last jump. The soft engine answers RDTSC
/// with it (the guest's TSC counts nanoseconds: 1 GHz).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeBase {
    /// The tick of the last jump.
    pub tick: u64,
    /// Virtual time at that tick, in nanoseconds.
    pub ns: u64,
    /// Nanoseconds a tick; zero where time does not follow ticks.
    pub ns_per_tick: u64,
}

impl TimeBase {
    /// Virtual time at `tick`, which is not before the last jump.
    pub fn at(&self, tick: u64) -> VirtualTime {
        VirtualTime::from_ns(self.ns + (tick - self.tick) * self.ns_per_tick)
    }

    /// The first tick at which virtual time has reached `deadline`; `None` where time does not
    /// follow ticks.
    pub fn tick_of(&self, deadline: VirtualTime) -> Option<u64> {
        if self.ns_per_tick == 0 {
            return None;
        }
        Some(self.tick + deadline.ns.saturating_sub(self.ns).div_ceil(self.ns_per_tick))
    }
}
