//! What stands at a path where a file was expected.

use std::fs::FileType;
use std::os::unix::fs::FileTypeExt;

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
