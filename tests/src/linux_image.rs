//! The Linux image, for tests of more than one kind.

use std::path::{Path, PathBuf};

use reprise_guest_images::{LinuxImage, RecipeError, linux};

use crate::skipped::skipped;

/// Where below `kept`, the directory of what is expensive to make, the image's cache is.
pub fn cache_directory(kept: &Path) -> PathBuf {
    kept.join("linux-image")
}

/// The image, fetched once and kept below `kept`; `None`, which is said, where there is no apt or no
/// network.
///
/// # Panics
/// If the recipe fails otherwise.
pub fn linux_image(kept: &Path) -> Option<LinuxImage> {
    match linux(&cache_directory(kept), &mut |step| eprintln!("{step}")) {
        Ok(image) => Some(image),
        Err(error @ (RecipeError::NoApt { .. } | RecipeError::Apt { .. })) => {
            skipped(error);
            None
        }
        Err(error) => panic!("{error}"),
    }
}
