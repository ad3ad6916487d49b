//! The recording file: a header, the guest's images, the log and an end, each in frames.
//! `FORMAT.md` describes the bytes.
//!
//! Nothing that a reader is given is trusted: every length is checked before memory is allocated for
//! it, and whatever a file holds, opening it ends in a value.

use std::io::{Read, Seek, SeekFrom, Write};
use std::sync::{Arc, Mutex};

use crate::contents::{Contents, LogSource, SharedInput, lock};
pub use crate::contents::{SeekIndexState, Summary};
use crate::event::Record;
use crate::frame::{
    Chain, Damage, Found, FrameCursor, FrameEncoder, FrameFault, FrameKind, MAX_FRAME_BYTES,
};
pub use crate::header::{
    CpuModelInfo, GuestInfo, Header, HeaderError, HostInfo, ImageInfo, ImageRole, MachineInfo,
};
use crate::log::{FrameSink, LogError, LogReader};
use crate::logged::Logged;
use crate::seek_index::{IndexEntry, SeekIndex};
use crate::stretches::Course;
use crate::varint::put;

/// The format that this crate writes.
pub const FORMAT_VERSION: u32 = 4;
/// The oldest format that it reads.
pub const OLDEST_FORMAT_VERSION: u32 = 1;

/// How every version of the format starts. The first byte is no ASCII, so no text starts so.
const MAGIC: [u8; 8] = *b"\xf2reprise";
/// Magic, format version, CRC32C of both.
const PREAMBLE_BYTES: usize = 16;
/// How the last bytes of a closed recording start.
const FOOTER_MAGIC: [u8; 4] = *b"rrIX";
/// Footer magic, CRC32C of what follows, file offset of the seek index.
pub(crate) const FOOTER_BYTES: usize = 16;
/// Images are embedded in pieces of this many bytes.
const IMAGE_PIECE_BYTES: usize = MAX_FRAME_BYTES as usize;

/// Why a recording cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum RecordingError {
    /// Reading or writing failed, or parts were written out of order.
    #[error(transparent)]
    Log(#[from] LogError),
    /// Nothing in it.
    #[error("the file is empty: recording had not begun; record again")]
    Empty,
    /// Some other file.
    #[error("the file is no Reprise recording: give one that `reprise record` wrote")]
    Foreign,
    /// The first bytes are damaged.
    #[error("the file's first {PREAMBLE_BYTES} bytes are damaged: take another copy")]
    Preamble,
    /// Another version of the format.
    #[error(
        "the recording has format version {found}, and this Reprise reads {OLDEST_FORMAT_VERSION} to {FORMAT_VERSION}: use the Reprise that recorded it"
    )]
    Version {
        /// The version in the file.
        found: u32,
    },
    /// Cut off before the log began.
    #[error(
        "the recording is cut off inside its header, so nothing of it can be used: record again"
    )]
    HeaderCutShort,
    /// The frame that holds the header is damaged.
    #[error("the recording's header cannot be used: {0}; take another copy")]
    HeaderDamaged(Damage),
    /// The header does not decode.
    #[error("the recording cannot be used: {0}")]
    Header(#[from] HeaderError),
    /// No image of that number.
    #[error("the recording has {count} images, and none is numbered {index}")]
    NoSuchImage {
        /// What was asked for.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// Cut off before the image's end.
    #[error(
        "the recording is cut off inside the image {name}, so nothing of it replays: record again"
    )]
    ImageCutShort {
        /// The image's name.
        name: String,
    },
    /// A frame of the image is damaged.
    #[error("the image {name} cannot be used: {damage}; take another copy of the recording")]
    ImageDamaged {
        /// The image's name.
        name: String,
        /// Where and how.
        damage: Damage,
    },
    /// The image's frames are sound, but it is not what the header describes.
    #[error(
        "the image {name} is not the one that was recorded: its BLAKE3 differs from the header's; take another copy of the recording"
    )]
    ImageDigest {
        /// The image's name.
        name: String,
    },
}

/// Writes a recording. Frames go out whole, one write each; a writer that is killed leaves what it
/// had written, and that opens.
pub struct RecordingWriter<W: Write> {
    out: W,
    encoder: FrameEncoder,
    identity: [u8; 32],
    images: Vec<ImageInfo>,
    next_image: usize,
    index: SeekIndex,
    record_count: u64,
    image_bytes: u64,
    log_bytes: u64,
    total_bytes: u64,
    /// A write is under way or has failed.
    closed: bool,
}

impl<W: Write> std::fmt::Debug for RecordingWriter<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RecordingWriter")
            .field("total_bytes", &self.total_bytes)
            .field("closed", &self.closed)
            .finish_non_exhaustive()
    }
}

impl<W: Write> RecordingWriter<W> {
    /// Starts a recording on an empty `out`. Every image that `header` names is to be written next.
    ///
    /// # Errors
    /// If `out` cannot be written, or the header has more than a recording may hold.
    pub fn create(mut out: W, header: &Header) -> Result<Self, RecordingError> {
        let header_bytes = header.encode()?;
        if header_bytes.len() > MAX_FRAME_BYTES as usize {
            return Err(RecordingError::Header(HeaderError::TooLarge));
        }
        let preamble = preamble(FORMAT_VERSION);
        out.write_all(&preamble).map_err(LogError::Write)?;
        let encoder = FrameEncoder::new(Chain::start(&preamble)).map_err(LogError::Write)?;
        let mut writer = Self {
            out,
            encoder,
            identity: [0; 32],
            images: header.guest.images.clone(),
            next_image: 0,
            index: SeekIndex::default(),
            record_count: 0,
            image_bytes: 0,
            log_bytes: 0,
            total_bytes: PREAMBLE_BYTES as u64,
            closed: false,
        };
        writer.put_frame(FrameKind::Header, 0, &header_bytes)?;
        writer.identity = writer.encoder.chain().0;
        Ok(writer)
    }

    /// Embeds the image of this number: `bytes` are what the header's description says. Images go
    /// in order, before the log.
    ///
    /// # Errors
    /// If the recording cannot be written, or this is not the image that is due.
    pub fn write_image(&mut self, index: usize, bytes: &[u8]) -> Result<(), RecordingError> {
        self.check_open()?;
        if index != self.next_image || index >= self.images.len() {
            return Err(out_of_place("the recording expects another image here"));
        }
        if !self.images[index].describes(bytes) {
            return Err(out_of_place("an image is not what the header describes"));
        }
        for piece in bytes.chunks(IMAGE_PIECE_BYTES) {
            self.image_bytes += self.put_frame(FrameKind::Image, index as u32, piece)?;
        }
        self.next_image += 1;
        self.flush()?;
        Ok(())
    }

    /// Writes a frame of encoded records, as a [`crate::log::LogWriter`] gives them, and pushes it
    /// out.
    ///
    /// # Errors
    /// If the recording cannot be written; it is closed then, and what it held before is whole.
    pub fn write_log_frame(&mut self, records: Vec<u8>, record_count: u32) -> Result<(), LogError> {
        self.check_open()?;
        if self.next_image < self.images.len() {
            return Err(LogError::OutOfPlace("the log began before every image was embedded"));
        }
        if record_count == 0 || records.is_empty() || records.len() > MAX_FRAME_BYTES as usize {
            return Err(LogError::OutOfPlace("a log frame has no records, or too many"));
        }
        let entry = IndexEntry { offset: self.total_bytes, records_before: self.record_count };
        let frame_bytes = self.put_frame(FrameKind::Log, record_count, &records)?;
        self.flush()?;
        self.index.push(entry, ());
        self.log_bytes += frame_bytes;
        self.record_count += u64::from(record_count);
        Ok(())
    }

    /// Closes the recording: end, seek index, footer. A file's owner then syncs it.
    ///
    /// # Errors
    /// If the recording cannot be written, or an image is missing.
    pub fn finish(mut self) -> Result<W, RecordingError> {
        self.check_open()?;
        if self.next_image < self.images.len() {
            return Err(out_of_place("an image was not embedded"));
        }
        let totals = Totals {
            chain: self.encoder.chain(),
            frame_count: self.index.frame_count(),
            record_count: self.record_count,
            log_bytes: self.log_bytes,
        };
        self.put_frame(FrameKind::End, 0, &totals.encode())?;
        let footer = footer(self.total_bytes);
        let index = self.index.encode();
        self.put_frame(FrameKind::Index, 0, &index)?;
        self.out.write_all(&footer).map_err(LogError::Write)?;
        self.flush()?;
        Ok(self.out)
    }

    /// As [`Recording::identity`].
    pub fn identity(&self) -> [u8; 32] {
        self.identity
    }

    /// Bytes in the file that hold images, with their framing.
    pub fn image_bytes(&self) -> u64 {
        self.image_bytes
    }

    /// Bytes in the file that hold the log: its frames with their framing.
    pub fn log_bytes(&self) -> u64 {
        self.log_bytes
    }

    /// All bytes written so far.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    fn check_open(&self) -> Result<(), LogError> {
        if self.closed { Err(LogError::Closed) } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), LogError> {
        self.closed = true;
        self.out.flush().map_err(LogError::Write)?;
        self.closed = false;
        Ok(())
    }

    /// Writes one frame and says how long it is.
    fn put_frame(&mut self, kind: FrameKind, count: u32, raw: &[u8]) -> Result<u64, LogError> {
        self.closed = true;
        let frame = self.encoder.encode(kind, count, raw).map_err(LogError::Write)?;
        self.out.write_all(&frame).map_err(LogError::Write)?;
        self.closed = false;
        self.total_bytes += frame.len() as u64;
        Ok(frame.len() as u64)
    }
}

impl<W: Write> FrameSink for RecordingWriter<W> {
    fn write_frame(&mut self, records: Vec<u8>, record_count: u32) -> Result<(), LogError> {
        self.write_log_frame(records, record_count)
    }
}

fn out_of_place(what: &'static str) -> RecordingError {
    RecordingError::Log(LogError::OutOfPlace(what))
}

fn preamble(version: u32) -> [u8; PREAMBLE_BYTES] {
    let mut bytes = [0; PREAMBLE_BYTES];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&version.to_le_bytes());
    let checksum = crc32c::crc32c(&bytes[..12]);
    bytes[12..].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

pub(crate) fn footer(index_offset: u64) -> [u8; FOOTER_BYTES] {
    let offset = index_offset.to_le_bytes();
    let mut bytes = [0; FOOTER_BYTES];
    bytes[..4].copy_from_slice(&FOOTER_MAGIC);
    bytes[4..8].copy_from_slice(&crc32c::crc32c(&offset).to_le_bytes());
    bytes[8..].copy_from_slice(&offset);
    bytes
}

/// What the end frame says about everything before it.
pub(crate) struct Totals {
    pub(crate) chain: Chain,
    pub(crate) frame_count: u64,
    pub(crate) record_count: u64,
    pub(crate) log_bytes: u64,
}

impl Totals {
    /// The end frame's payload. A reader computes the same and compares.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = self.chain.0.to_vec();
        for total in [self.frame_count, self.record_count, self.log_bytes] {
            put(&mut bytes, total);
        }
        bytes
    }
}

/// A recording opened for reading: scanned once, every checksum and chain value verified.
pub struct Recording {
    input: SharedInput,
    header: Header,
    identity: [u8; 32],
    contents: Contents,
    summary: Summary,
}

impl std::fmt::Debug for Recording {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recording").field("summary", &self.summary).finish_non_exhaustive()
    }
}

impl Recording {
    /// Opens a recording and checks all of it. One that is cut short or damaged opens too, if its
    /// header is whole: [`Recording::summary`] says how far it can be used.
    ///
    /// # Errors
    /// If `input` cannot be read, is no recording, or has no usable header.
    pub fn open<R: Read + Seek + Send + 'static>(mut input: R) -> Result<Self, RecordingError> {
        let file_bytes = input.seek(SeekFrom::End(0)).map_err(LogError::Read)?;
        let (chain, version) = read_preamble(&mut input, file_bytes)?;
        let mut cursor =
            FrameCursor { offset: PREAMBLE_BYTES as u64, end: file_bytes, frame: 0, chain };
        let header = read_header(&mut input, &mut cursor)?;
        let identity = cursor.chain.0;
        let contents =
            Contents::scan(&mut input, cursor, &header.guest.images).map_err(LogError::Read)?;
        let input: SharedInput = Arc::new(Mutex::new(input));
        let summary = contents.summary(version, file_bytes);
        let mut recording = Self { input, header, identity, summary, contents };
        recording.look_at_both_ends()?;
        Ok(recording)
    }

    /// What was recorded, on what, and by what.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The chain value behind the header, which stands for everything that the recording began with:
    /// what lies beside it names it so. See [`Summary::chain`] for all of it.
    pub fn identity(&self) -> [u8; 32] {
        self.identity
    }

    /// What the recording holds, as far as it can be used.
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    /// An embedded image's bytes: exactly those that the header describes.
    ///
    /// # Errors
    /// If there is no such image, it cannot be read, or it is cut short, damaged or another one.
    pub fn read_image(&self, index: usize) -> Result<Vec<u8>, RecordingError> {
        let count = self.header.guest.images.len();
        let Some(info) = self.header.guest.images.get(index) else {
            return Err(RecordingError::NoSuchImage { index, count });
        };
        let name = || info.name.clone();
        let mut bytes = Vec::new();
        let mut cursor = self.contents.image_start(index);
        while (bytes.len() as u64) < info.bytes {
            let before = cursor;
            let damaged =
                |fault| RecordingError::ImageDamaged { name: name(), damage: before.damage(fault) };
            match cursor.read(&mut *lock(&self.input)).map_err(LogError::Read)? {
                Found::Frame(frame) => bytes.extend(frame.into_raw().map_err(damaged)?),
                Found::Fault(fault) => return Err(damaged(fault)),
                Found::CutShort => match &self.summary.damage {
                    Some(damage) => return Err(damaged(damage.fault.clone())),
                    None => return Err(RecordingError::ImageCutShort { name: name() }),
                },
            }
        }
        if info.describes(&bytes) {
            Ok(bytes)
        } else {
            Err(RecordingError::ImageDigest { name: name() })
        }
    }

    /// The log from its beginning. It ends where the recording is cut short, and with an error where
    /// it is damaged.
    pub fn log(&self) -> LogReader {
        self.log_from(self.contents.log_start)
    }

    /// The log from the record of this number on, and the record before it. Reads little of what
    /// stands before.
    ///
    /// # Errors
    /// If the log cannot be read up to there, or has not so many records.
    pub fn log_behind(&self, records: u64) -> Result<(LogReader, Option<Record>), LogError> {
        let wanted = records.saturating_sub(1);
        let (frame, records_before) = self.contents.log_frame_before(wanted);
        let mut log = self.log_from(frame);
        let mut last = None;
        for _ in records_before..records {
            let record = log.next_record()?.ok_or(LogError::TooShort { records })?;
            last = Some(record.into_inner());
        }
        Ok((log, last))
    }

    /// Which engine executed what part of it. Reads the whole log.
    pub fn course(&self) -> Course {
        Course::of(self.summary.format_version, &self.header, self.log())
    }

    fn log_from(&self, start: FrameCursor) -> LogReader {
        LogReader::new(Box::new(LogSource::new(&self.input, &self.contents, start)))
    }

    /// Completes the summary with what only the records tell.
    fn look_at_both_ends(&mut self) -> Result<(), RecordingError> {
        let Some(last_log_frame) = self.contents.last_log_frame else {
            return Ok(());
        };
        let first = self.log().next_record();
        self.summary.first_moment = self.noting_damage(first)?.map(|record| record.moment);
        let mut tail = self.log_from(last_log_frame);
        while let Some(record) = self.noting_damage(tail.next_record())? {
            self.summary.last_moment = Some(record.moment);
            self.summary.last_record = Some(record);
        }
        Ok(())
    }

    fn noting_damage(
        &mut self,
        result: Result<Option<Logged<Record>>, LogError>,
    ) -> Result<Option<Record>, RecordingError> {
        match result {
            Ok(record) => Ok(record.map(Logged::into_inner)),
            Err(LogError::Damaged(damage)) => {
                self.summary.note_damage(damage);
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// Checks how the file starts, and gives the chain value before the first frame and the version.
fn read_preamble(
    input: &mut (impl Read + Seek),
    file_bytes: u64,
) -> Result<(Chain, u32), RecordingError> {
    let mut bytes = [0; PREAMBLE_BYTES];
    let present = file_bytes.min(PREAMBLE_BYTES as u64) as usize;
    input.seek(SeekFrom::Start(0)).map_err(LogError::Read)?;
    input.read_exact(&mut bytes[..present]).map_err(LogError::Read)?;
    let magic_bytes = present.min(MAGIC.len());
    if present == 0 {
        return Err(RecordingError::Empty);
    }
    if bytes[..magic_bytes] != MAGIC[..magic_bytes] {
        return Err(RecordingError::Foreign);
    }
    if present < PREAMBLE_BYTES {
        return Err(RecordingError::HeaderCutShort);
    }
    let [.., a, b, c, d, _, _, _, _] = bytes;
    let found = u32::from_le_bytes([a, b, c, d]);
    if bytes != preamble(found) {
        return Err(RecordingError::Preamble);
    }
    if !(OLDEST_FORMAT_VERSION..=FORMAT_VERSION).contains(&found) {
        return Err(RecordingError::Version { found });
    }
    Ok((Chain::start(&bytes), found))
}

/// Reads the frame that holds the header, which is the first.
fn read_header(
    input: &mut (impl Read + Seek),
    cursor: &mut FrameCursor,
) -> Result<Header, RecordingError> {
    let before = *cursor;
    let damaged = |fault| RecordingError::HeaderDamaged(before.damage(fault));
    match cursor.read(input).map_err(LogError::Read)? {
        Found::Frame(frame) if frame.head.kind == FrameKind::Header => {
            Ok(Header::decode(&frame.into_raw().map_err(damaged)?)?)
        }
        Found::Frame(_) => Err(damaged(FrameFault::OutOfPlace)),
        Found::CutShort => Err(RecordingError::HeaderCutShort),
        Found::Fault(fault) => Err(damaged(fault)),
    }
}
