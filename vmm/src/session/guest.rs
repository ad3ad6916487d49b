//! What the user wants to boot: an embedded guest, the Linux image, or files.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use reprise_guest_images::{EMBEDDED, EmbeddedGuest, LinuxFile};
use reprise_trace::header::{GuestInfo, ImageInfo, ImageRole, MAX_IMAGE_BYTES};

use super::file_kind::NoFile;
use crate::boot::GuestSource;

/// Memory of an embedded guest where the user gives none, in MiB.
const EMBEDDED_MEMORY_MIB: u64 = 64;
/// Memory of Linux and of a kernel from a file where the user gives none, in MiB.
const KERNEL_MEMORY_MIB: u64 = 512;
/// `--image` of the Linux guest.
pub const LINUX: &str = "linux";

/// Which guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestChoice {
    /// An embedded guest, or [`LINUX`].
    Image(String),
    /// A kernel from a file.
    Kernel {
        /// Its path.
        kernel: PathBuf,
        /// The initrd's path.
        initrd: Option<PathBuf>,
    },
}

/// One image of a guest: its file's name and its bytes.
#[derive(Clone, Debug)]
pub struct Image {
    /// The file's name, without a directory.
    pub name: String,
    /// Its bytes, shared with the thread that embeds them in a recording.
    pub bytes: Arc<Vec<u8>>,
    /// BLAKE3 of the bytes, where it is known already.
    blake3: Option<[u8; 32]>,
}

/// A guest, ready to be loaded.
#[derive(Clone, Debug)]
pub struct Guest {
    /// The embedded guest's name, or the kernel's file name.
    pub name: String,
    /// What starts.
    pub kernel: Image,
    /// The initial RAM disk.
    pub initrd: Option<Image>,
    /// The command line.
    pub cmdline: String,
    /// Memory where the user gives none, in MiB.
    pub default_memory_mib: u64,
}

/// Why a guest cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// No such name.
    #[error("there is no image {name:?}: give one of {known}, or a file with --kernel")]
    UnknownImage {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// A file that cannot be read.
    #[error("cannot read {what} {path}: {error}; check the path and its permissions")]
    Unreadable {
        /// The option.
        what: &'static str,
        /// As the user gave it.
        path: String,
        /// The system's reason.
        error: std::io::Error,
    },
    /// A directory or a device.
    #[error("{what} {path} is {kind}: give a file")]
    NoFile {
        /// The option.
        what: &'static str,
        /// As the user gave it.
        path: String,
        /// What it is.
        kind: NoFile,
    },
    /// Larger than a recording embeds.
    #[error("{what} {path} has more than {MAX_IMAGE_BYTES} bytes: give a smaller file")]
    TooLarge {
        /// The option.
        what: &'static str,
        /// As the user gave it.
        path: String,
    },
    /// The recipe failed.
    #[error(transparent)]
    Linux(#[from] reprise_guest_images::RecipeError),
}

impl Guest {
    /// Finds and reads a guest. `cmdline` replaces the guest's own command line; `progress` is told
    /// what takes time.
    ///
    /// # Errors
    /// No such image, or a file that cannot be read.
    pub fn obtain(
        choice: &GuestChoice,
        cmdline: Option<&str>,
        progress: &mut dyn FnMut(&str),
    ) -> Result<Self, GuestError> {
        let mut guest = match choice {
            GuestChoice::Image(name) if name == LINUX => Self::linux(progress)?,
            GuestChoice::Image(name) => Self::embedded(name)?,
            GuestChoice::Kernel { kernel, initrd } => Self::files(kernel, initrd.as_deref())?,
        };
        if let Some(cmdline) = cmdline {
            cmdline.clone_into(&mut guest.cmdline);
        }
        Ok(guest)
    }

    /// An embedded guest.
    ///
    /// # Errors
    /// No such name.
    pub fn embedded(name: &str) -> Result<Self, GuestError> {
        let found = reprise_guest_images::embedded(name).ok_or_else(|| {
            let names = EMBEDDED.iter().map(|guest| guest.name).chain([LINUX]);
            let known = names.collect::<Vec<_>>().join(", ");
            GuestError::UnknownImage { name: name.to_owned(), known }
        })?;
        Ok(Self {
            name: found.name.to_owned(),
            kernel: Image::new(found.name, found.image.to_vec()),
            initrd: None,
            cmdline: found.default_command_line.to_owned(),
            default_memory_mib: EMBEDDED_MEMORY_MIB,
        })
    }

    /// Why its user code reads no time-stamp counter of the host, though nothing traps it; `None` where that is
    /// not known. Only the embedded guests' code is, of which `compute` alone reads it, and can be told to let
    /// its user code do so.
    pub fn keeps_user_time_stamps(&self) -> Option<&'static str> {
        let is_this = |guest: &&EmbeddedGuest| guest.image == self.kernel.bytes.as_slice();
        if EMBEDDED.iter().find(is_this)?.name != "compute" {
            return Some("this guest has none");
        }
        let mut words = self.cmdline.split_ascii_whitespace();
        let is_left_out = words.any(|word| word.starts_with("tsd=") && word != "tsd=1");
        (!is_left_out).then_some("refused by the guest's own CR4.TSD, and answered by its kernel")
    }

    fn linux(progress: &mut dyn FnMut(&str)) -> Result<Self, GuestError> {
        let image = reprise_guest_images::linux(&cache_directory(), progress)?;
        Ok(Self {
            name: LINUX.to_owned(),
            kernel: image.kernel.into(),
            initrd: Some(image.initrd.into()),
            cmdline: image.command_line,
            default_memory_mib: KERNEL_MEMORY_MIB,
        })
    }

    fn files(kernel: &Path, initrd: Option<&Path>) -> Result<Self, GuestError> {
        let kernel = Image::read("--kernel", kernel)?;
        Ok(Self {
            name: kernel.name.clone(),
            kernel,
            initrd: initrd.map(|path| Image::read("--initrd", path)).transpose()?,
            cmdline: String::new(),
            default_memory_mib: KERNEL_MEMORY_MIB,
        })
    }

    /// What the boot loaders take.
    pub fn source(&self) -> GuestSource<'_> {
        GuestSource {
            kernel: &self.kernel.bytes,
            initrd: self.initrd.as_ref().map(|image| &image.bytes[..]),
            cmdline: &self.cmdline,
        }
    }

    /// What a recording's header says of the guest.
    pub fn info(&self) -> GuestInfo {
        let images = self.images().map(|(role, image)| image.info(role));
        GuestInfo {
            name: self.name.clone(),
            command_line: self.cmdline.clone(),
            images: images.collect(),
        }
    }

    /// The images in the order in which a recording embeds them.
    pub fn images(&self) -> impl Iterator<Item = (ImageRole, &Image)> {
        let kernel = [(ImageRole::Kernel, &self.kernel)].into_iter();
        kernel.chain(self.initrd.iter().map(|image| (ImageRole::Initrd, image)))
    }
}

impl Image {
    fn new(name: impl Into<String>, bytes: Vec<u8>) -> Self {
        Self { name: name.into(), bytes: Arc::new(bytes), blake3: None }
    }

    fn info(&self, role: ImageRole) -> ImageInfo {
        match self.blake3 {
            None => ImageInfo::of(role, &self.name, &self.bytes),
            Some(blake3) => {
                let (name, bytes) = (self.name.clone(), self.bytes.len() as u64);
                ImageInfo { role, name, bytes, blake3 }
            }
        }
    }

    fn read(what: &'static str, path: &Path) -> Result<Self, GuestError> {
        let shown = || path.display().to_string();
        let unreadable = |error| GuestError::Unreadable { what, path: shown(), error };
        let file = File::open(path).map_err(unreadable)?;
        let metadata = file.metadata().map_err(unreadable)?;
        let kind = NoFile::of(metadata.file_type());
        // A pipe is as good as a file: it is read once, to its end.
        if let Some(kind) = kind.filter(|kind| *kind != NoFile::Pipe) {
            return Err(GuestError::NoFile { what, path: shown(), kind });
        }
        // A byte more than there is, so that the end is seen without asking for more memory.
        let mut bytes = Vec::with_capacity(metadata.len().min(MAX_IMAGE_BYTES) as usize + 1);
        file.take(MAX_IMAGE_BYTES + 1).read_to_end(&mut bytes).map_err(unreadable)?;
        if bytes.len() as u64 > MAX_IMAGE_BYTES {
            return Err(GuestError::TooLarge { what, path: shown() });
        }
        Ok(Self::new(file_name(path), bytes))
    }
}

impl From<LinuxFile> for Image {
    fn from(LinuxFile { path, bytes, blake3 }: LinuxFile) -> Self {
        Self { blake3: Some(blake3), ..Self::new(file_name(&path), bytes) }
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// Where built images are kept: `$XDG_CACHE_HOME/reprise`, else `~/.cache/reprise`, else a
/// directory below the system's temporary one.
pub fn cache_directory() -> PathBuf {
    let set = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    set("XDG_CACHE_HOME")
        .or_else(|| set("HOME").map(|home| home.join(".cache")))
        .unwrap_or_else(std::env::temp_dir)
        .join("reprise")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_image_names_what_there_is() {
        let error = Guest::embedded("nothing").expect_err("no such guest").to_string();
        assert!(error.contains("hello") && error.contains("linux"), "{error}");
    }

    #[test]
    fn unreadable_files_and_devices_are_refused_with_their_option() {
        for (path, expected) in [
            ("/nonexistent/vmlinuz", "cannot read --kernel /nonexistent/vmlinuz"),
            ("/dev/zero", "--kernel /dev/zero is a device"),
            ("/", "--kernel / is a directory"),
        ] {
            let error =
                Image::read("--kernel", Path::new(path)).expect_err("no kernel").to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
