//! What stands at a path where a file was expected.

use std::fs::{self, FileType};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// What a path leads to, if that is no regular file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoFile {
    /// A directory.
    Directory,
    /// A character or block device.
    Device,
    /// A named pipe or a shell's process substitution: it gives its bytes once, in order.
    Pipe,
    /// A socket.
    Socket,
}

impl NoFile {
    /// `None` for a regular file.
    pub fn of(kind: FileType) -> Option<Self> {
        let kinds = [
            (kind.is_dir(), Self::Directory),
            (kind.is_char_device() || kind.is_block_device(), Self::Device),
            (kind.is_fifo(), Self::Pipe),
            (kind.is_socket(), Self::Socket),
        ];
        kinds.into_iter().find_map(|(is_so, what)| is_so.then_some(what))
    }
}

/// Whether what is written to one path would be in the file of the other, there or not yet. Devices and pipes keep
/// nothing.
pub fn are_one_file(one: &Path, other: &Path) -> bool {
    match (fs::metadata(one), fs::metadata(other)) {
        (Ok(a), Ok(b)) => a.is_file() && (a.dev(), a.ino()) == (b.dev(), b.ino()),
        (Err(_), Err(_)) => place_of(one).is_some_and(|place| Some(place) == place_of(other)),
        _ => false,
    }
}

/// Where a file of this name would be made.
fn place_of(path: &Path) -> Option<PathBuf> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    Some(parent.unwrap_or(Path::new(".")).canonicalize().ok()?.join(path.file_name()?))
}

impl std::fmt::Display for NoFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Directory => "a directory",
            Self::Device => "a device",
            Self::Pipe => "a pipe",
            Self::Socket => "a socket",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_file_has_many_names() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = |name: &str| directory.path().join(name);
        fs::write(path("here"), "").expect("can be written");
        std::os::unix::fs::symlink(path("here"), path("link")).expect("can be linked");
        fs::hard_link(path("here"), path("again")).expect("can be linked");
        fs::create_dir(path("below")).expect("can be made");
        for (one, other, same) in [
            ("here", "here", true),
            ("here", "link", true),
            ("again", "link", true),
            ("here", "below/../here", true),
            ("here", "there", false),
            ("there", "below/../there", true),
            ("there", "below/there", false),
            ("nowhere/there", "nowhere/there", false),
        ] {
            assert_eq!(are_one_file(&path(one), &path(other)), same, "{one}, {other}");
        }
        assert!(!are_one_file(Path::new("/dev/null"), Path::new("/dev/null")), "it keeps nothing");
    }
}
