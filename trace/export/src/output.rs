//! Where an export goes: a pipe, or a file that has its final name only when it is whole and is
//! compressed as that name's ending says.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use flate2::write::GzEncoder;
use liblzma::write::XzEncoder;

/// Bytes gathered before they go out.
const BUFFER_BYTES: usize = 1 << 18;

/// A file under a temporary name beside its final one. [`PendingFile::finish`] gives it the final
/// name; dropped before that, it is removed. A process that is killed leaves it under the temporary
/// name. What is no regular file, such as a device or a named pipe, is written to as it is.
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
        if path.is_dir() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        // What a link leads to is replaced, not the link.
        let path = &fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let is_special = fs::metadata(path).is_ok_and(|metadata| !metadata.is_file());
        let temporary = if is_special { path.to_owned() } else { temporary_name(path)? };
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
    pub fn finish(self) -> io::Result<()> {
        self.finish_by(|temporary, path| fs::rename(temporary, path))
    }

    /// The same, unless another file has that name meanwhile.
    ///
    /// # Errors
    /// If one has, or that fails; the file is removed then.
    pub fn finish_new(self) -> io::Result<()> {
        self.finish_by(|temporary, path| {
            fs::hard_link(temporary, path).and_then(|()| fs::remove_file(temporary))
        })
    }

    fn finish_by(mut self, name: impl FnOnce(&Path, &Path) -> io::Result<()>) -> io::Result<()> {
        let Some(file) = self.file.take() else { return Ok(()) };
        let closed = file.into_inner().map_err(io::IntoInnerError::into_error);
        if self.is_special() {
            return closed.map(|_| ());
        }
        let named = closed
            .and_then(|file| file.sync_all())
            .and_then(|()| name(&self.temporary, &self.path));
        if named.is_err() {
            let _ = fs::remove_file(&self.temporary);
        }
        named
    }

    /// Whether it is written to under its own name.
    fn is_special(&self) -> bool {
        self.temporary == self.path
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
        if self.file.take().is_some() && !self.is_special() {
            // There is nobody left to tell.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// A directory under a temporary name beside its final one, as [`PendingFile`] is for a file. It replaces
/// nothing that it was not told to.
#[derive(Debug)]
pub struct PendingDirectory {
    temporary: PathBuf,
    path: PathBuf,
    replaces: bool,
    finished: bool,
}

impl PendingDirectory {
    /// Starts a directory that is to be `path`.
    ///
    /// # Errors
    /// If no directory can be made there, or there is something of that name.
    pub fn create(path: &Path) -> io::Result<Self> {
        if path.symlink_metadata().is_ok() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        Self::begin(path, false)
    }

    /// The same; what has that name keeps it until the end, and then goes.
    ///
    /// # Errors
    /// If no directory can be made there.
    pub fn create_over(path: &Path) -> io::Result<Self> {
        Self::begin(path, true)
    }

    fn begin(path: &Path, replaces: bool) -> io::Result<Self> {
        let temporary = temporary_name(path)?;
        fs::create_dir(&temporary)?;
        Ok(Self { temporary, path: path.to_owned(), replaces, finished: false })
    }

    /// Where it is until it is finished.
    pub fn temporary(&self) -> &Path {
        &self.temporary
    }

    /// Gives the directory its final name. Its files are on the disk already.
    ///
    /// # Errors
    /// If that fails; the directory is removed then.
    pub fn finish(mut self) -> io::Result<()> {
        // An empty directory of that name, made meanwhile, would be replaced; nothing else would.
        let rename = || fs::rename(&self.temporary, &self.path);
        if self.replaces {
            let mut old = self.temporary.clone().into_os_string();
            old.push("-old");
            fs::rename(&self.path, &old)?;
            if let Err(error) = rename() {
                // It keeps what it had.
                let _ = fs::rename(&old, &self.path);
                return Err(error);
            }
            // The new one is there: what is left of the old one is in nobody's way.
            let _ = fs::remove_dir_all(&old);
        } else {
            rename()?;
        }
        self.finished = true;
        Ok(())
    }
}

impl Drop for PendingDirectory {
    fn drop(&mut self) {
        if !self.finished {
            // There is nobody left to tell.
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}

/// Where something that is to be `path` is until it is whole. Two processes that write the same do not
/// write into each other's.
fn temporary_name(path: &Path) -> io::Result<PathBuf> {
    let mut name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
    name.push(format!(".partial-{}", std::process::id()));
    Ok(path.with_file_name(name))
}

/// How a file is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip.
    Gzip,
    /// xz.
    Xz,
    /// Zstandard.
    Zstd,
}

/// Each compression, and the ending of a name that asks for it.
pub const COMPRESSIONS: &[(Compression, &str)] =
    &[(Compression::Gzip, "gz"), (Compression::Xz, "xz"), (Compression::Zstd, "zst")];

/// Levels that a producer of a hundred million bytes a second does not wait for too long. xz's is 1 of
/// 0 to 9: above it, it takes several times as long for some per cent.
const GZIP_LEVEL: u32 = 6;
const XZ_LEVEL: u32 = 1;
const ZSTD_LEVEL: i32 = 3;

impl Compression {
    /// What the ending of this name asks for.
    pub fn of(path: &Path) -> Self {
        let extension = path.extension().unwrap_or_default();
        let known = COMPRESSIONS.iter().find(|(_, ending)| extension == *ending);
        known.map_or(Self::None, |(compression, _)| *compression)
    }
}

/// Where the bytes go, and how many went.
struct Raw {
    to: RawKind,
    bytes: u64,
}

enum RawKind {
    Pipe(Box<dyn Write + Send>),
    File(PendingFile),
}

impl Write for Raw {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = match &mut self.to {
            RawKind::Pipe(pipe) => pipe.write(bytes)?,
            RawKind::File(file) => file.write(bytes)?,
        };
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.to {
            RawKind::Pipe(pipe) => pipe.flush(),
            RawKind::File(file) => file.flush(),
        }
    }
}

enum Encoder {
    Plain(Raw),
    Gzip(GzEncoder<Raw>),
    Xz(XzEncoder<Raw>),
    Zstd(zstd::Encoder<'static, Raw>),
}

impl Encoder {
    fn new(raw: Raw, compression: Compression) -> io::Result<Self> {
        Ok(match compression {
            Compression::None => Self::Plain(raw),
            Compression::Gzip => {
                Self::Gzip(GzEncoder::new(raw, flate2::Compression::new(GZIP_LEVEL)))
            }
            Compression::Xz => Self::Xz(XzEncoder::new(raw, XZ_LEVEL)),
            Compression::Zstd => Self::Zstd(zstd::Encoder::new(raw, ZSTD_LEVEL)?),
        })
    }
}

impl Write for Encoder {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(out) => out.write(bytes),
            Self::Gzip(out) => out.write(bytes),
            Self::Xz(out) => out.write(bytes),
            Self::Zstd(out) => out.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(out) => out.flush(),
            // What compresses has more to say only when it ends.
            Self::Gzip(_) | Self::Xz(_) | Self::Zstd(_) => Ok(()),
        }
    }
}

/// A pipe or a file, compressed or not. It gathers small writes. [`Output::finish`] makes it whole.
pub struct Output {
    out: BufWriter<Encoder>,
}

impl std::fmt::Debug for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Output").finish_non_exhaustive()
    }
}

impl Output {
    /// Writes to a pipe, as it comes.
    pub fn pipe(pipe: Box<dyn Write + Send>) -> Self {
        let raw = Raw { to: RawKind::Pipe(pipe), bytes: 0 };
        Self { out: BufWriter::with_capacity(BUFFER_BYTES, Encoder::Plain(raw)) }
    }

    /// Starts a file that is to be `path`, compressed as its name says.
    ///
    /// # Errors
    /// If no file can be made there.
    pub fn file(path: &Path) -> io::Result<Self> {
        let raw = Raw { to: RawKind::File(PendingFile::create(path)?), bytes: 0 };
        let encoder = Encoder::new(raw, Compression::of(path))?;
        Ok(Self { out: BufWriter::with_capacity(BUFFER_BYTES, encoder) })
    }

    /// Writes out everything, gives a file its final name, and says how many bytes it has.
    ///
    /// # Errors
    /// If that fails; a file is removed then.
    pub fn finish(self) -> io::Result<u64> {
        let encoder = self.out.into_inner().map_err(io::IntoInnerError::into_error)?;
        let mut raw = match encoder {
            Encoder::Plain(raw) => raw,
            Encoder::Gzip(encoder) => encoder.finish()?,
            Encoder::Xz(encoder) => encoder.finish()?,
            Encoder::Zstd(encoder) => encoder.finish()?,
        };
        raw.flush()?;
        match raw.to {
            RawKind::Pipe(_) => {}
            RawKind::File(file) => file.finish()?,
        }
        Ok(raw.bytes)
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
