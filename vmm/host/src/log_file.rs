//! The recording's file, written by a thread of its own: embedding the images, compression, writing
//! and syncing take nothing from the machine's thread but the hand-over of a frame.
//!
//! The file has its final name from the start. Each frame is one write, so whatever kills the
//! process leaves a recording that replays up to its last whole frame; the disk is told to keep what
//! was written at bounded intervals. The images come first, while the guest runs already: killed
//! within those first moments, the file says that its images are not whole.

use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use reprise_trace::log::{FrameSink, LogError};
use reprise_trace::recording::{RecordingError, RecordingWriter};

/// Frames that may wait to be written: at most 4 MiB of records. A machine that is faster than its
/// disk for longer waits for the disk.
const QUEUE_FRAMES: usize = 64;
/// What a power failure may lose.
const SYNC_INTERVAL: Duration = Duration::from_millis(500);

struct Frame {
    records: Vec<u8>,
    record_count: u32,
}

/// What a finished recording takes in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogTotals {
    /// Bytes of the images with their framing.
    pub image_bytes: u64,
    /// Bytes of the log with its framing.
    pub log_bytes: u64,
    /// Bytes of the whole file.
    pub file_bytes: u64,
}

/// Takes frames and has them written.
#[derive(Debug)]
pub struct LogFile<W: Write + Send + 'static = File> {
    queue: Option<SyncSender<Frame>>,
    thread: Option<JoinHandle<Result<RecordingWriter<W>, RecordingError>>>,
    file: File,
}

/// An image to be embedded.
pub type SharedImage = Arc<Vec<u8>>;

/// Whether a recording's images are all in its file: without them nothing of it can be used.
#[derive(Clone, Debug, Default)]
pub struct ImagesEmbedded(Arc<AtomicBool>);

impl ImagesEmbedded {
    /// Whether they are. Final once the [`LogFile`] is finished or dropped.
    pub fn get(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

impl<W: Write + Send + 'static> LogFile<W> {
    /// Starts the thread, which embeds `images` and then writes what it is given. `writer` has not
    /// taken any image; `file` is what it writes to. `embedded` is told when the images are written.
    ///
    /// # Errors
    /// The host gives no thread.
    pub fn start(
        mut writer: RecordingWriter<W>,
        images: Vec<SharedImage>,
        embedded: &ImagesEmbedded,
        file: File,
    ) -> io::Result<Self> {
        let (queue, frames) = sync_channel(QUEUE_FRAMES);
        let (synced, embedded) = (file.try_clone()?, embedded.clone());
        let thread =
            std::thread::Builder::new().name("log writer".to_owned()).spawn(move || {
                for (index, image) in images.into_iter().enumerate() {
                    writer.write_image(index, &image)?;
                }
                embedded.0.store(true, Ordering::Release);
                Ok(write_frames(writer, &synced, &frames)?)
            })?;
        Ok(Self { queue: Some(queue), thread: Some(thread), file })
    }

    /// Writes what is waiting, closes the recording, and syncs it.
    ///
    /// # Errors
    /// It cannot be written. What was written before replays.
    pub fn finish(mut self) -> Result<LogTotals, RecordingError> {
        let writer = self.join()?;
        let (image_bytes, log_bytes) = (writer.image_bytes(), writer.log_bytes());
        writer.finish()?;
        sync(&self.file).map_err(LogError::Write)?;
        let file_bytes = self.file.metadata().map_err(LogError::Write)?.len();
        Ok(LogTotals { image_bytes, log_bytes, file_bytes })
    }

    /// Ends the thread and takes what it comes to.
    fn join(&mut self) -> Result<RecordingWriter<W>, RecordingError> {
        self.queue = None;
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            // Its failure was reported before, or it has panicked, which the panic hook reported.
            None | Some(Err(_)) => Err(LogError::Closed.into()),
        }
    }
}

impl<W: Write + Send + 'static> FrameSink for LogFile<W> {
    fn write_frame(&mut self, records: Vec<u8>, record_count: u32) -> Result<(), LogError> {
        let queue = self.queue.as_ref().ok_or(LogError::Closed)?;
        match queue.send(Frame { records, record_count }) {
            Ok(()) => Ok(()),
            // The thread has gone: it says why.
            Err(_) => match self.join() {
                Err(RecordingError::Log(error)) => Err(error),
                _ => Err(LogError::Closed),
            },
        }
    }
}

impl<W: Write + Send + 'static> Drop for LogFile<W> {
    /// What was handed over is written even if nobody finishes the recording.
    fn drop(&mut self) {
        let _ = self.join();
    }
}

fn write_frames<W: Write>(
    mut writer: RecordingWriter<W>,
    file: &File,
    frames: &Receiver<Frame>,
) -> Result<RecordingWriter<W>, LogError> {
    let mut last_sync = Instant::now();
    let mut unsynced = false;
    loop {
        let until_sync = SYNC_INTERVAL.saturating_sub(last_sync.elapsed());
        let received = if unsynced {
            frames.recv_timeout(until_sync)
        } else {
            frames.recv().map_err(|_| RecvTimeoutError::Disconnected)
        };
        match received {
            Ok(frame) => {
                writer.write_log_frame(frame.records, frame.record_count)?;
                unsynced = true;
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(writer),
        }
        if unsynced && last_sync.elapsed() >= SYNC_INTERVAL {
            sync(file).map_err(LogError::Write)?;
            (last_sync, unsynced) = (Instant::now(), false);
        }
    }
}

/// Tells the disk to keep the file; pipes and devices keep nothing, and say so.
fn sync(file: &File) -> io::Result<()> {
    match file.sync_data() {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use reprise_trace::event::{Event, MarkDigest, Record};
    use reprise_trace::header::{Header, ImageInfo, ImageRole};
    use reprise_trace::log::LogWriter;
    use reprise_trace::moment::{Moment, TickKind};
    use reprise_trace::recording::Recording;

    use super::*;

    /// More than one frame takes.
    const KERNEL_BYTES: usize = (1 << 20) + 1;

    fn images() -> Vec<SharedImage> {
        // Bytes that no compressor makes anything of.
        let kernel =
            (0..KERNEL_BYTES as u64).map(|at| at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56);
        let kernel = kernel.map(|byte| ((byte * byte) >> 3) as u8 ^ byte as u8).collect();
        vec![Arc::new(kernel), Arc::new(b"initrd".to_vec())]
    }

    fn header() -> Header {
        let image = |bytes: &SharedImage| ImageInfo::of(ImageRole::Kernel, "image", bytes);
        let mut header = Header::bare("soft", "instructions", TickKind::Instruction);
        header.guest.images = images().iter().map(image).collect();
        header
    }

    fn record(tick: u64) -> Record {
        let mark = MarkDigest { console_bytes: 0, console_digest_prefix: 0 };
        let moment = Moment { tick, rip: tick.wrapping_mul(0x9e37_79b9_7f4a_7c15), rcx: tick };
        Record { moment, cpu_digest: !moment.rip, event: Event::Mark(mark) }
    }

    fn start(file: &File) -> LogWriter<LogFile> {
        let handle = |file: &File| file.try_clone().expect("a descriptor");
        let writer = RecordingWriter::create(handle(file), &header()).expect("a header");
        let embedded = ImagesEmbedded::default();
        let log = LogFile::start(writer, images(), &embedded, handle(file)).expect("a thread");
        LogWriter::new(log)
    }

    #[test]
    fn what_was_handed_over_is_in_the_file_closed_or_not() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        for closed in [true, false] {
            let path = directory.path().join(format!("{closed}.rr"));
            let file = File::create_new(&path).expect("a file");
            let mut log = start(&file);
            for tick in 0..20_000 {
                log.append(record(tick)).expect("written");
            }
            log.flush().expect("written");
            if closed {
                let totals = log.finish().expect("written").finish().expect("closed");
                assert_eq!(totals.file_bytes, std::fs::metadata(&path).expect("file").len());
                let parts = totals.image_bytes + totals.log_bytes;
                assert!(totals.image_bytes > 0 && totals.log_bytes > 0, "{totals:?}");
                assert!(parts < totals.file_bytes && parts + 1000 > totals.file_bytes);
            } else {
                drop(log);
            }
            let recording = Recording::open(File::open(&path).expect("file")).expect("opens");
            assert_eq!(recording.summary().complete, closed);
            assert_eq!(recording.summary().record_count, 20_000);
            for (index, image) in images().iter().enumerate() {
                assert_eq!(recording.read_image(index).expect("whole"), **image);
            }
        }
    }

    /// A disk on which there is room for so many bytes.
    struct SmallDisk(usize);

    impl Write for SmallDisk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 = self.0.checked_sub(bytes.len()).ok_or(io::ErrorKind::StorageFull)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_full_disk_comes_back_at_a_later_frame() {
        for (room, images_fit) in [(2 * KERNEL_BYTES, true), (1000, false)] {
            let writer =
                RecordingWriter::create(SmallDisk(room), &header()).expect("room for this");
            let file = tempfile::tempfile().expect("a file");
            let embedded = ImagesEmbedded::default();
            let log = LogFile::start(writer, images(), &embedded, file).expect("a thread");
            let mut log = LogWriter::new(log);
            let error = (0..10_000_000)
                .find_map(|tick| log.append(record(tick)).err())
                .expect("the disk is full");
            assert!(matches!(&error, LogError::Write(_)), "{error}");
            assert_eq!(embedded.get(), images_fit);
            let sink = log.finish().expect("nothing was pending");
            assert!(sink.finish().is_err());
        }
    }
}
