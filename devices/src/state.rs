//! Saved device state: versioned, so that a build refuses what it does not understand.

use serde::{Deserialize, Serialize};

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
    /// No device ever is in this state.
    #[error("the saved {device} is in a state that it never reaches: take another copy")]
    Impossible {
        /// The device's name.
        device: &'static str,
    },
}

/// A device as it was, with the version of its state's meaning.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Saved<D> {
    pub(crate) version: u32,
    pub(crate) device: D,
}

/// The contract of every device for save and load. A device is its own state: all that decides what
/// it does next, and nothing else.
pub(crate) trait Device: Clone {
    /// For messages.
    const NAME: &'static str;
    /// Raised by any change of the fields or of what they mean.
    const STATE_VERSION: u32;

    /// Whether every field holds what the device itself could have put there, as far as its code
    /// relies on that. Saved states come from files.
    fn is_possible(&self) -> bool;

    /// The device as it is.
    fn save(&self) -> Saved<Self> {
        Saved { version: Self::STATE_VERSION, device: self.clone() }
    }

    /// The device as it was when saved.
    fn from_saved(saved: &Saved<Self>) -> Result<Self, LoadError> {
        let (device, known) = (Self::NAME, Self::STATE_VERSION);
        if saved.version != known {
            return Err(LoadError::Version { device, found: saved.version, known });
        }
        if !saved.device.is_possible() {
            return Err(LoadError::Impossible { device });
        }
        Ok(saved.device.clone())
    }
}

/// The tests that every device passes.
#[cfg(test)]
pub(crate) mod contract {
    use alloc::vec::Vec;

    use reprise_random::Random;

    use super::{Device, LoadError};

    /// Accesses before the save, between save and load, and after the load.
    const ACCESSES: usize = 300;

    fn accesses<D>(
        device: &mut D,
        access: &mut impl FnMut(&mut D, &mut Random) -> u64,
        seed: u64,
    ) -> Vec<u64> {
        let mut random = Random::new(seed);
        (0..ACCESSES).map(|_| access(device, &mut random)).collect()
    }

    /// Saves, disturbs, loads: the device is as it was, and goes on as the original does.
    pub(crate) fn saves_and_loads<D>(
        device: D,
        mut access: impl FnMut(&mut D, &mut Random) -> u64,
        seed: u64,
    ) where
        D: Device + PartialEq + core::fmt::Debug,
    {
        let mut original = device;
        accesses(&mut original, &mut access, seed);
        let saved = original.save();
        assert!(original.is_possible(), "seed {seed}");
        let mut disturbed = original.clone();
        // A device with little state may come back to where it was.
        let is_disturbed = (1..100).any(|round| {
            accesses(&mut disturbed, &mut access, seed + (round << 32));
            disturbed != original
        });
        assert!(is_disturbed, "seed {seed}: nothing was disturbed");
        let mut loaded = D::from_saved(&saved).expect("what was saved loads");
        assert_eq!(loaded, original, "seed {seed}");
        let continued = accesses(&mut original, &mut access, seed ^ 2);
        assert_eq!(accesses(&mut loaded, &mut access, seed ^ 2), continued, "seed {seed}");
        assert_eq!(loaded, original, "seed {seed}");
    }

    /// A state of another version is refused.
    pub(crate) fn refuses_other_versions<D: Device + core::fmt::Debug>(device: &D) {
        let known = D::STATE_VERSION;
        for found in [0, known - 1, known + 1, u32::MAX] {
            let mut saved = device.save();
            saved.version = found;
            let refusal = LoadError::Version { device: D::NAME, found, known };
            assert_eq!(D::from_saved(&saved).expect_err("another version"), refusal);
        }
    }

    /// Instantiates the contract for a device: how to make one, and one pseudo-random access to it
    /// that returns the answer.
    macro_rules! device_contract {
        ($device:expr, $access:expr) => {
            #[test]
            fn saves_and_loads() {
                use crate::state::contract;
                for seed in 1..=100 {
                    let access = contract::accessor($access);
                    contract::saves_and_loads($device, access, seed);
                }
            }

            #[test]
            fn refuses_other_versions() {
                crate::state::contract::refuses_other_versions(&$device);
            }
        };
    }
    pub(crate) use device_contract;

    /// Gives a closure the type that the contract wants, so that its argument needs no type.
    pub(crate) fn accessor<D, F: FnMut(&mut D, &mut Random) -> u64>(access: F) -> F {
        access
    }
}
