//! What is typed on the console: where it comes from, and the queue between the thread that reads
//! it and the machine.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::{Path, PathBuf};

use crate::HostError;

/// Ctrl-]: ends a run at a terminal, as in telnet.
pub(crate) const ESCAPE_KEY: u8 = 0x1d;
/// The largest file that is typed: read at once, so that nothing but the guest sets its pace.
const MAX_INPUT_FILE_BYTES: u64 = 64 << 20;
/// A stream is read no further ahead than this.
pub(crate) const MAX_WAITING_BYTES: usize = 64 << 10;

/// Where console input comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InputSource {
    /// Nobody types.
    None,
    /// A person at the terminal that is standard input, in raw mode.
    Terminal,
    /// Standard input as a stream of bytes.
    Stdin,
    /// A file.
    File(PathBuf),
    /// These bytes.
    Bytes(Vec<u8>),
}

impl InputSource {
    /// Tells early that a file cannot be read, before anything is begun for it. Pipes are not
    /// opened: that may wait for whoever writes to them.
    ///
    /// # Errors
    /// The file is not there or cannot be read.
    pub fn check(&self) -> Result<(), HostError> {
        let Self::File(path) = self else {
            return Ok(());
        };
        let metadata = fs::metadata(path).map_err(|error| failed(path, error))?;
        if metadata.is_dir() {
            return Err(failed(path, io::ErrorKind::IsADirectory.into()));
        }
        if metadata.is_file() {
            File::open(path).map_err(|error| failed(path, error))?;
        }
        Ok(())
    }
}

/// An opened source: bytes that are there already, and a stream that may bring more.
#[derive(Debug)]
pub(crate) struct OpenInput {
    pub(crate) ready: VecDeque<u8>,
    pub(crate) stream: Option<Stream>,
}

/// A descriptor that can be polled.
#[derive(Debug)]
pub(crate) struct Stream {
    file: File,
    is_terminal: bool,
}

/// What reading a stream gave.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum StreamRead {
    /// These bytes.
    Bytes(Vec<u8>),
    /// These bytes, then the escape key.
    Escaped(Vec<u8>),
    /// The end, or an error that no retry mends.
    Ended,
}

impl OpenInput {
    /// Opens a source; a regular file is read whole.
    pub(crate) fn open(source: &InputSource) -> Result<Self, HostError> {
        match source {
            InputSource::None => Ok(Self { ready: VecDeque::new(), stream: None }),
            InputSource::Terminal => Self::from_stdin(true),
            InputSource::Stdin => Self::from_stdin(false),
            InputSource::File(path) => {
                let file = File::open(path).map_err(|error| failed(path, error))?;
                Self::from_file(file, path)
            }
            InputSource::Bytes(bytes) => Ok(Self { ready: bytes.clone().into(), stream: None }),
        }
    }

    fn from_stdin(is_terminal: bool) -> Result<Self, HostError> {
        let path = Path::new("standard input");
        let owned =
            io::stdin().as_fd().try_clone_to_owned().map_err(|error| failed(path, error))?;
        if is_terminal {
            let stream = Stream { file: owned.into(), is_terminal };
            return Ok(Self { ready: VecDeque::new(), stream: Some(stream) });
        }
        Self::from_file(owned.into(), path)
    }

    fn from_file(file: File, path: &Path) -> Result<Self, HostError> {
        let metadata = file.metadata().map_err(|error| failed(path, error))?;
        if metadata.is_dir() {
            return Err(failed(path, io::ErrorKind::IsADirectory.into()));
        }
        if !metadata.is_file() && can_be_polled(&file) {
            let stream = Stream { file, is_terminal: false };
            return Ok(Self { ready: VecDeque::new(), stream: Some(stream) });
        }
        let mut bytes = Vec::new();
        file.take(MAX_INPUT_FILE_BYTES + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| failed(path, error))?;
        if bytes.len() as u64 > MAX_INPUT_FILE_BYTES {
            return Err(HostError::InputTooLarge {
                path: path.display().to_string(),
                bytes: metadata.len().max(bytes.len() as u64),
                limit_bytes: MAX_INPUT_FILE_BYTES,
            });
        }
        Ok(Self { ready: bytes.into(), stream: None })
    }
}

/// Pipes, terminals and sockets can be polled; devices such as `/dev/null` cannot, and are read as
/// files are.
fn can_be_polled(file: &File) -> bool {
    use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
    Epoll::new().is_ok_and(|epoll| {
        let event = EpollEvent::new(EventSet::IN, 0);
        epoll.ctl(ControlOperation::Add, file.as_raw_fd(), event).is_ok()
    })
}

fn failed(path: &Path, error: io::Error) -> HostError {
    HostError::Input { path: path.display().to_string(), error }
}

impl Stream {
    /// Reads once; the descriptor is known to be readable.
    pub(crate) fn read(&mut self) -> StreamRead {
        let mut bytes = vec![0; 4096];
        let count = loop {
            match self.file.read(&mut bytes) {
                Ok(count) => break count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return StreamRead::Bytes(Vec::new());
                }
                Err(_) => break 0,
            }
        };
        bytes.truncate(count);
        if count == 0 {
            return StreamRead::Ended;
        }
        match bytes.iter().position(|byte| self.is_terminal && *byte == ESCAPE_KEY) {
            Some(at) => {
                bytes.truncate(at);
                StreamRead::Escaped(bytes)
            }
            None => StreamRead::Bytes(bytes),
        }
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_file_is_there_whole_and_a_directory_is_refused() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("typed");
        std::fs::write(&path, "ls\n").expect("write");
        let input = OpenInput::open(&InputSource::File(path.clone())).expect("readable");
        assert_eq!((input.ready.len(), input.stream.is_none()), (3, true));
        for wrong in [directory.path().to_owned(), path.join("absent")] {
            assert!(OpenInput::open(&InputSource::File(wrong)).is_err());
        }
        let null = OpenInput::open(&InputSource::File("/dev/null".into())).expect("readable");
        assert!(null.ready.is_empty() && null.stream.is_none());
    }

    #[test]
    fn only_a_terminal_has_an_escape_key() {
        for (is_terminal, expected) in [
            (true, StreamRead::Escaped(b"ab".to_vec())),
            (false, StreamRead::Bytes(b"ab\x1dcd".to_vec())),
        ] {
            let (reader, mut writer) = io::pipe().expect("a pipe");
            writer.write_all(b"ab\x1dcd").expect("a pipe holds five bytes");
            let file = File::from(std::os::fd::OwnedFd::from(reader));
            assert_eq!(Stream { file, is_terminal }.read(), expected);
        }
    }
}
