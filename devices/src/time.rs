//! Virtual time: the only clock that a device can see.

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
