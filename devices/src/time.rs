//! Virtual time: the only clock that a device can see.

/// Nanoseconds in a second.
pub const NS_PER_S: u64 = 1_000_000_000;

/// Nanoseconds of guest time since the machine started.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    serde::Serialize,
    serde::Deserialize,
)]
pub struct VirtualTime {
    /// Nanoseconds.
    pub ns: u64,
}

impl VirtualTime {
    /// From nanoseconds since the machine started.
    pub fn from_ns(ns: u64) -> Self {
        Self { ns }
    }
}

/// An oscillator that has run since the machine started, with its first edge at time zero.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Oscillator {
    /// Edges in a second.
    pub(crate) hz: u64,
}

impl Oscillator {
    /// Edges up to `time_ns`, that one included, the one at time zero not.
    pub(crate) fn edges_at(self, time_ns: u64) -> u64 {
        let (seconds, rest_ns) = (time_ns / NS_PER_S, time_ns % NS_PER_S);
        seconds * self.hz + rest_ns * self.hz / NS_PER_S
    }

    /// The first nanosecond at which there have been this many edges; saturates.
    pub(crate) fn first_ns_with(self, edges: u64) -> u64 {
        let (seconds, rest) = (edges / self.hz, edges % self.hz);
        seconds.saturating_mul(NS_PER_S).saturating_add((rest * NS_PER_S).div_ceil(self.hz))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_nanosecond_with_an_edge_is_the_first() {
        for hz in [32_768, 1_193_182] {
            let oscillator = Oscillator { hz };
            for edges in (1..100_000).chain([hz - 1, hz, hz + 1, 1 << 40]) {
                let first_ns = oscillator.first_ns_with(edges);
                assert_eq!(oscillator.edges_at(first_ns), edges, "{hz} Hz");
                assert_eq!(oscillator.edges_at(first_ns - 1), edges - 1, "{hz} Hz");
            }
        }
    }

    #[test]
    fn the_end_of_time_does_not_overflow() {
        let oscillator = Oscillator { hz: 1_193_182 };
        assert!(oscillator.edges_at(u64::MAX) > 0);
        assert_eq!(oscillator.first_ns_with(u64::MAX), u64::MAX);
    }
}
