//! How virtual time follows ticks.

use reprise_devices::time::VirtualTime;

/// Virtual time goes no further than this many nanoseconds, 146 years: a recording that says so is
/// forged.
pub const MAX_VIRTUAL_NS: u64 = 1 << 62;

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

impl TimeSource {
    /// As a recording's header and a hand-over have it.
    pub fn of(ns_per_tick: u64) -> Self {
        match ns_per_tick {
            0 => Self::Host,
            ns_per_tick => Self::Ticks { ns_per_tick },
        }
    }

    /// Nanoseconds of guest time in one tick; zero where time does not follow ticks.
    pub fn ns_per_tick(self) -> u64 {
        match self {
            Self::Ticks { ns_per_tick } => ns_per_tick,
            Self::Host => 0,
        }
    }
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
    /// Virtual time at `tick`, which is not before the last jump. Saturates: a forged log may hold
    /// any jump.
    pub fn at(&self, tick: u64) -> VirtualTime {
        let ticks = tick.saturating_sub(self.tick);
        VirtualTime::from_ns(self.ns.saturating_add(ticks.saturating_mul(self.ns_per_tick)))
    }

    /// The first tick at which virtual time has reached `deadline`; `None` where time does not
    /// follow ticks.
    pub fn tick_of(&self, deadline: VirtualTime) -> Option<u64> {
        if self.ns_per_tick == 0 {
            return None;
        }
        let ticks = deadline.ns.saturating_sub(self.ns).div_ceil(self.ns_per_tick);
        Some(self.tick.saturating_add(ticks))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tick_of_a_deadline_is_the_first_that_reaches_it() {
        let base = TimeBase { tick: 1000, ns: 50, ns_per_tick: 100 };
        for deadline_ns in [50, 51, 149, 150, 151, 12_345] {
            let tick = base.tick_of(VirtualTime::from_ns(deadline_ns)).unwrap();
            assert!(base.at(tick).ns >= deadline_ns, "deadline {deadline_ns}");
            assert!(tick == 1000 || base.at(tick - 1).ns < deadline_ns, "deadline {deadline_ns}");
        }
    }

    #[test]
    fn a_forged_jump_saturates() {
        let base = TimeBase { tick: 0, ns: u64::MAX - 1, ns_per_tick: 100 };
        assert_eq!(base.at(u64::MAX).ns, u64::MAX);
        let base = TimeBase { tick: u64::MAX - 1, ns: 0, ns_per_tick: 1 };
        assert_eq!(base.tick_of(VirtualTime::from_ns(u64::MAX)), Some(u64::MAX));
    }

    #[test]
    fn time_from_the_host_follows_no_tick() {
        let base = TimeBase { tick: 3, ns: 70, ns_per_tick: 0 };
        assert_eq!(base.at(1_000_000).ns, 70);
        assert_eq!(base.tick_of(VirtualTime::from_ns(71)), None);
    }
}
