//! Tests: what instructions really access, to hold against what a trace says of them.

use std::cell::RefCell;

/// An access as it was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Touched {
    pub(crate) linear: u64,
    pub(crate) bytes: u64,
    pub(crate) writes: bool,
}

/// Accesses in order, while somebody watches.
#[derive(Debug, Default)]
pub(crate) struct Spy(RefCell<Option<Vec<Touched>>>);

impl Spy {
    pub(crate) fn start(&self) {
        *self.0.borrow_mut() = Some(Vec::new());
    }

    pub(crate) fn stop(&self) -> Vec<Touched> {
        self.0.borrow_mut().take().unwrap_or_default()
    }

    pub(crate) fn note(&self, linear: u64, bytes: u64, writes: bool) {
        if let Some(seen) = &mut *self.0.borrow_mut() {
            seen.push(Touched { linear, bytes, writes });
        }
    }
}
