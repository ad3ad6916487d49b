//! The recipe of the `linux` image: Debian's stock cloud kernel and static busybox, fetched as
//! packages without root on first use, and an initramfs that gives a shell on the console. The
//! result is kept in a cache directory, one directory for each pair of versions.

mod cache;
mod initramfs;
mod packages;
mod tar;
mod workload;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use packages::{Apt, Packages};
use tempfile::TempDir;

pub use workload::{WORKLOAD_SMALL, WORKLOAD_W};

/// The kernel's command line: the machine has no APIC and no ACPI, its TSC runs at 1 GHz (hence
/// `lpj`, loops per jiffy, which is that over HZ = 250, and `tsc_early_khz`), and resetting it by a
/// triple fault is quickest. The rest skips what costs instructions and finds nothing.
pub const LINUX_COMMAND_LINE: &str = "console=ttyS0 noapic nolapic acpi=off lpj=4000000 \
     tsc_early_khz=1000000 mitigations=off quiet no_timer_check 8250.nr_uarts=1 cryptomgr.notests \
     reboot=t";

/// Which packages an image was made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinuxVersions {
    /// Name of the kernel's package, which carries the release that `uname -r` prints.
    pub kernel_package: String,
    /// Its Debian version.
    pub kernel: String,
    /// Debian version of busybox-static.
    pub busybox: String,
}

/// The Linux image, ready to be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinuxImage {
    /// The kernel, a bzImage.
    pub kernel: LinuxFile,
    /// The initramfs, an uncompressed cpio archive.
    pub initrd: LinuxFile,
    /// The default command line.
    pub command_line: String,
    /// What it was made from.
    pub versions: LinuxVersions,
}

/// A file of the image: where it is kept, and its bytes, read once and checked.
#[derive(Clone, PartialEq, Eq)]
pub struct LinuxFile {
    /// Where it is.
    pub path: PathBuf,
    /// What is in it.
    pub bytes: Vec<u8>,
    /// BLAKE3 of the bytes.
    pub blake3: [u8; 32],
}

impl std::fmt::Debug for LinuxFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LinuxFile").field("path", &self.path).finish_non_exhaustive()
    }
}

/// Why there is no Linux image.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// A program of Debian's package system is missing.
    #[error(
        "cannot fetch the Linux image: {program} does not run here ({reason}); on a system without \
         Debian's apt give your own kernel with --kernel and --initrd"
    )]
    NoApt {
        /// The program.
        program: String,
        /// The system's reason.
        reason: String,
    },
    /// Debian's package system refused.
    #[error(
        "cannot fetch the Linux image: {program}: {reason}; check the network and the package \
         sources, or give your own kernel with --kernel and --initrd"
    )]
    Apt {
        /// The program.
        program: String,
        /// The first error that it printed.
        reason: String,
    },
    /// A package is not what it should be.
    #[error(
        "the package {package} is of no use: {reason}; give your own kernel with --kernel and \
         --initrd"
    )]
    Package {
        /// Its name.
        package: String,
        /// What is wrong.
        reason: String,
    },
    /// A file of the cache cannot be read or written.
    #[error("{path}: {source}; make room or choose another cache directory", path = path.display())]
    Store {
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

impl RecipeError {
    fn store(path: &Path, source: io::Error) -> Self {
        Self::Store { path: path.to_owned(), source }
    }

    fn start(command: &Command, error: &io::Error) -> Self {
        Self::NoApt { program: packages::program_name(command), reason: error.to_string() }
    }
}

/// The Linux image from `cache_dir`, or, if none is there, fetched and built into it. The cached
/// one is taken without asking for newer packages, so it needs no network. `progress` gets one line at
/// the start of each step. Several processes may do this at once.
///
/// # Errors
/// Without Debian's apt, without a network on first use, and where `cache_dir` cannot be written.
pub fn linux(cache_dir: &Path, progress: &mut dyn FnMut(&str)) -> Result<LinuxImage, RecipeError> {
    match cache::current(cache_dir) {
        Some(image) => Ok(image),
        None => build_linux(cache_dir, progress),
    }
}

/// As [`linux`], but asks apt for the newest packages even if an image is in the cache; what is
/// cached for those very versions is still taken.
///
/// # Errors
/// As [`linux`].
pub fn build_linux(
    cache_dir: &Path,
    progress: &mut dyn FnMut(&str),
) -> Result<LinuxImage, RecipeError> {
    fs::create_dir_all(cache_dir).map_err(|error| RecipeError::store(cache_dir, error))?;
    let scratch = TempDir::with_prefix_in("building-", cache_dir)
        .map_err(|error| RecipeError::store(cache_dir, error))?;
    progress("resolving the packages of the Linux image");
    let first = build_with(&Apt::with_system_lists(scratch.path()), cache_dir, progress);
    match first {
        // The system's package lists are missing, or older than what the mirror still has.
        Err(RecipeError::Apt { .. } | RecipeError::Package { .. }) => {
            progress("fetching fresh package lists");
            build_with(&Apt::with_fresh_lists(scratch.path())?, cache_dir, progress)
        }
        other => other,
    }
}

fn build_with(
    apt: &Apt,
    cache_dir: &Path,
    progress: &mut dyn FnMut(&str),
) -> Result<LinuxImage, RecipeError> {
    let Packages { kernel, busybox } = apt.resolve()?;
    let versions = LinuxVersions {
        kernel_package: kernel.name.clone(),
        kernel: kernel.version.clone(),
        busybox: busybox.version.clone(),
    };
    if let Some(image) = cache::find(cache_dir, &versions) {
        cache::make_current(cache_dir, &versions)?;
        return Ok(image);
    }
    progress(&format!("fetching {} {}", busybox.name, busybox.version));
    let busybox =
        apt.fetch(&busybox, &|name| name == "bin/busybox" || name == "usr/bin/busybox")?;
    progress(&format!("fetching {} {}", kernel.name, kernel.version));
    let kernel = apt.fetch(&kernel, &|name| name.starts_with("boot/vmlinuz-"))?;
    progress("building the initramfs");
    let initrd = initramfs::build(&busybox);
    cache::store(cache_dir, &versions, &kernel, &initrd)
}
