//! A run that another thread watches, and may end early.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// How far a run is, and whether to go on. The machine looks here whenever its engine is kicked. Clones
/// are one and the same.
#[derive(Clone, Debug, Default)]
pub struct Watch {
    stop: Arc<AtomicBool>,
    tick: Arc<AtomicU64>,
    virtual_ns: Arc<AtomicU64>,
}

impl Watch {
    /// One that ends a run when `stop` is set.
    pub fn stopped_by(stop: Arc<AtomicBool>) -> Self {
        Self { stop, ..Self::default() }
    }

    /// Whether the run is to end.
    pub fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Ticks at the last kick.
    pub fn tick(&self) -> u64 {
        self.tick.load(Ordering::Relaxed)
    }

    /// Virtual time at the last kick, in nanoseconds.
    pub fn virtual_ns(&self) -> u64 {
        self.virtual_ns.load(Ordering::Relaxed)
    }

    pub(crate) fn see(&self, tick: u64, virtual_ns: u64) {
        self.tick.store(tick, Ordering::Relaxed);
        self.virtual_ns.store(virtual_ns, Ordering::Relaxed);
    }
}
