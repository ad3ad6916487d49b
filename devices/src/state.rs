//! Saved device state: versioned, so that a build refuses what it does not understand.

/// Why a saved state cannot be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// Saved by a build with another idea of this device.
    #[error(
        "the saved {device} has state version {found}, but this build knows {known}: use the build \
         that saved it"
    )]
    Version {
        /// The device's name.
        device: &'static str,
        /// The version in the saved state.
        found: u32,
        /// The version that this build writes.
        known: u32,
    },
}
