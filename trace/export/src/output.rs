//! Where an export goes: a pipe, or a file that has its final name only when it is whole.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// Bytes gathered before they go out.
const BUFFER_BYTES: usize = 1 << 18;

/// A file under a temporary name beside its final one. [`PendingFile::finish`] gives it the final
/// name; dropped before that, it is removed. A process that is killed leaves it under the temporary
/// name.
#[derive(Debug)]
pub struct PendingFile {
    file: Option<BufWriter<File>>,
    temporary: PathBuf,
    path: PathBuf,
}

impl PendingFile {
    /// Starts a file that is to be `path`. Whatever has that name keeps it until the end.
    ///
    /// # Errors
    /// If no file can be made there.
    pub fn create(path: &Path) -> io::Result<Self> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        if path.is_dir() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        let mut temporary_name = name.to_owned();
        // Two processes that write the same file do not write into each other's.
        temporary_name.push(format!(".partial-{}", std::process::id()));
        let temporary = path.with_file_name(temporary_name);
        let file = File::create(&temporary)?;
        let file = Some(BufWriter::with_capacity(BUFFER_BYTES, file));
        Ok(Self { file, temporary, path: path.to_owned() })
    }

    /// Where it is until it is finished.
    pub fn temporary(&self) -> &Path {
        &self.temporary
    }

    /// Writes out everything, to the disk itself, and gives the file its final name.
    ///
    /// # Errors
    /// If that fails; the file is removed then.
    pub fn finish(mut self) -> io::Result<()> {
        if let Some(file) = self.file.take() {
            let closed = file.into_inner().map_err(io::IntoInnerError::into_error);
            let renamed = closed
                .and_then(|file| file.sync_all())
                .and_then(|()| fs::rename(&self.temporary, &self.path));
            if let Err(error) = renamed {
                let _ = fs::remove_file(&self.temporary);
                return Err(error);
            }
        }
        Ok(())
    }

    fn open(&mut self) -> io::Result<&mut BufWriter<File>> {
        self.file.as_mut().ok_or_else(|| io::Error::other("the file is finished"))
    }
}

impl Write for PendingFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.open()?.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.open()?.flush()
    }
}

impl Drop for PendingFile {
    fn drop(&mut self) {
        if self.file.take().is_some() {
            // There is nobody left to tell.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}
