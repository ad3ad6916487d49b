//! The proof that a value from outside the machine stands in a log.

/// A value that entered the machine through the log.
///
/// Only this crate can construct one: the log's writer after it has appended the value, and the
/// log's reader. Devices take outside data in no other form, so a byte that was not logged cannot
/// reach them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Logged<T>(T);

impl<T> Logged<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(value)
    }

    /// The value itself.
    pub fn into_inner(self) -> T {
        self.0
    }

    /// The value, borrowed.
    pub fn get(&self) -> &T {
        &self.0
    }
}
