//! What a scan finds in a recording file: where its parts lie, how far they are sound, and how it
//! ends.

use std::io::{self, Read, Seek, SeekFrom};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::event::Record;
use crate::frame::{Damage, Found, Frame, FrameCursor, FrameFault, FrameHead, FrameKind};
use crate::header::ImageInfo;
use crate::log::{FrameSource, LogError, LogFrame};
use crate::moment::Moment;
use crate::recording::{FOOTER_BYTES, Totals, footer};
use crate::seek_index::{IndexEntry, SeekIndex};

/// What became of the seek index, which a scan gives as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SeekIndexState {
    /// Not there: the recording was not closed.
    Absent,
    /// As the scan gives it.
    Intact,
    /// Cut off, or not as the scan gives it. No record depends on it.
    Damaged,
}

/// What a recording holds, as far as it can be used.
#[derive(Clone, Debug)]
pub struct Summary {
    /// The format's version.
    pub format_version: u32,
    /// The recording was closed, and nothing in it is damaged (the seek index apart).
    pub complete: bool,
    /// Whole, sound frames of any kind, seek index apart.
    pub whole_frames: u64,
    /// Those that hold records.
    pub log_frames: u64,
    /// Bytes in the file that hold the log: its frames with their framing.
    pub log_bytes: u64,
    /// Bytes in the file that hold images, with their framing.
    pub image_bytes: u64,
    /// The file's length, in bytes.
    pub file_bytes: u64,
    /// Records in the log.
    pub record_count: u64,
    /// The first record's moment.
    pub first_moment: Option<Moment>,
    /// The last record's moment.
    pub last_moment: Option<Moment>,
    /// The last record: in a complete recording, how the run ended.
    pub last_record: Option<Record>,
    /// Bytes behind the last usable frame of a recording that is not complete.
    pub truncated_bytes: u64,
    /// Where the recording is damaged; `None` also where it is merely cut short.
    pub damage: Option<Damage>,
    /// The seek index.
    pub seek_index: SeekIndexState,
    /// The chain value over everything before the end frame, in hexadecimal. Recordings with the
    /// same value are the same.
    pub chain: String,
}

impl Summary {
    /// What a person should know of the file's end, where nothing of the run stands.
    pub fn end_note(&self) -> Option<&'static str> {
        (self.seek_index == SeekIndexState::Damaged).then_some(
            "the seek index at the file's end is damaged or cut off: nothing of the run depends on it, and \
             none is changed",
        )
    }

    /// Takes note of damage that only decoding showed.
    pub(crate) fn note_damage(&mut self, damage: Damage) {
        if self.damage.as_ref().is_none_or(|known| damage.offset < known.offset) {
            self.damage = Some(damage);
            self.complete = false;
        }
    }
}

/// What a recording is read from.
pub(crate) trait Input: Read + Seek + Send {}
impl<T: Read + Seek + Send> Input for T {}

/// One file, read by a recording and by the readers of its log.
pub(crate) type SharedInput = Arc<Mutex<dyn Input>>;

/// For one seek and the reads after it.
pub(crate) fn lock(input: &SharedInput) -> MutexGuard<'_, dyn Input + 'static> {
    // Whoever reads seeks first, so a thread that panicked leaves nothing half done.
    input.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where the parts of a recording lie.
pub(crate) struct Contents {
    /// Behind the last image, or as far as the scan came before that.
    pub(crate) log_start: FrameCursor,
    /// The last log frame.
    pub(crate) last_log_frame: Option<FrameCursor>,
    /// Each image's first frame, as far as there is one.
    image_starts: Vec<Option<FrameCursor>>,
    /// Behind the last image or log frame.
    sound_end: FrameCursor,
    damage: Option<Damage>,
    complete: bool,
    seek_index: SeekIndexState,
    /// With each log frame's place, where a reader can begin.
    index: SeekIndex<FrameCursor>,
    image_bytes: u64,
    log_bytes: u64,
    record_count: u64,
}

impl Contents {
    /// Reads every frame from `cursor`, which stands behind the header, to the end or to the first
    /// that cannot be used.
    pub(crate) fn scan(
        input: &mut (impl Read + Seek),
        cursor: FrameCursor,
        images: &[ImageInfo],
    ) -> io::Result<Self> {
        let mut contents = Self {
            log_start: cursor,
            last_log_frame: None,
            image_starts: vec![None; images.len()],
            sound_end: cursor,
            damage: None,
            complete: false,
            seek_index: SeekIndexState::Absent,
            index: SeekIndex::default(),
            image_bytes: 0,
            log_bytes: 0,
            record_count: 0,
        };
        let mut due = ImagesDue { images, bytes_seen: vec![0; images.len()] };
        while !contents.complete && contents.damage.is_none() {
            let mut next = contents.sound_end;
            match next.read(input)? {
                Found::Frame(frame) if frame.head.kind == FrameKind::End => {
                    contents.take_end(frame, &due);
                    if contents.complete {
                        contents.seek_index = contents.check_index(input, next)?;
                    }
                }
                Found::Frame(frame) => contents.take_frame(&frame.head, next, &mut due),
                Found::Fault(fault) => contents.set_damage(fault),
                Found::CutShort if has_footer(input, next.end)? => {
                    contents.set_damage(FrameFault::PastEnd);
                }
                Found::CutShort => break,
            }
        }
        Ok(contents)
    }

    /// Where an image's first frame is, and where the part of the file that is sound ends.
    pub(crate) fn image_start(&self, index: usize) -> FrameCursor {
        let start = self.image_starts.get(index).copied().flatten().unwrap_or(self.sound_end);
        FrameCursor { end: self.sound_end.offset, ..start }
    }

    /// A log frame at or before the one with the record of this number, and how many records stand
    /// before that frame.
    pub(crate) fn log_frame_before(&self, record: u64) -> (FrameCursor, u64) {
        match self.index.before_record(record) {
            Some((entry, place)) => (*place, entry.records_before),
            None => (self.log_start, 0),
        }
    }

    /// What the scan tells.
    pub(crate) fn summary(&self, format_version: u32, file_bytes: u64) -> Summary {
        let end_frames = u64::from(self.complete);
        let unused_bytes = file_bytes - self.sound_end.offset;
        Summary {
            format_version,
            complete: self.complete,
            whole_frames: self.sound_end.frame + end_frames,
            log_frames: self.index.frame_count(),
            log_bytes: self.log_bytes,
            image_bytes: self.image_bytes,
            file_bytes,
            record_count: self.record_count,
            first_moment: None,
            last_moment: None,
            last_record: None,
            truncated_bytes: if self.complete { 0 } else { unused_bytes },
            damage: self.damage.clone(),
            seek_index: self.seek_index,
            chain: blake3::Hash::from_bytes(self.sound_end.chain.0).to_hex().to_string(),
        }
    }

    fn set_damage(&mut self, fault: FrameFault) {
        self.damage = Some(self.sound_end.damage(fault));
    }

    /// Takes a sound frame at the end of what was found so far; `next` stands behind it.
    fn take_frame(&mut self, head: &FrameHead, next: FrameCursor, due: &mut ImagesDue<'_>) {
        let frame_bytes = next.offset - self.sound_end.offset;
        match head.kind {
            FrameKind::Image if due.take(head) => {
                self.image_starts[head.count as usize].get_or_insert(self.sound_end);
                self.image_bytes += frame_bytes;
                self.log_start = next;
            }
            FrameKind::Log if due.none_before(due.images.len()) => {
                self.last_log_frame = Some(self.sound_end);
                let offset = self.sound_end.offset;
                let entry = IndexEntry { offset, records_before: self.record_count };
                self.index.push(entry, self.sound_end);
                self.log_bytes += frame_bytes;
                self.record_count += u64::from(head.count);
            }
            _ => return self.set_damage(FrameFault::OutOfPlace),
        }
        self.sound_end = next;
    }

    /// Takes a sound end frame: it has to agree with everything before it.
    fn take_end(&mut self, frame: Frame, due: &ImagesDue<'_>) {
        let totals = Totals {
            chain: self.sound_end.chain,
            frame_count: self.index.frame_count(),
            record_count: self.record_count,
            log_bytes: self.log_bytes,
        };
        match frame.into_raw() {
            Ok(_) if !due.none_before(due.images.len()) => self.set_damage(FrameFault::OutOfPlace),
            Ok(payload) if payload != totals.encode() => self.set_damage(FrameFault::Totals),
            Ok(_) => self.complete = true,
            Err(fault) => self.set_damage(fault),
        }
    }

    /// Compares what stands behind the end frame with what the scan gives.
    fn check_index(
        &self,
        input: &mut (impl Read + Seek),
        mut cursor: FrameCursor,
    ) -> io::Result<SeekIndexState> {
        let index_offset = cursor.offset;
        if index_offset == cursor.end {
            return Ok(SeekIndexState::Absent);
        }
        let Found::Frame(frame) = cursor.read(input)? else {
            return Ok(SeekIndexState::Damaged);
        };
        let is_index = frame.head.kind == FrameKind::Index;
        let stored = frame.into_raw().ok().and_then(|bytes| SeekIndex::decode(&bytes));
        let intact = is_index
            && stored.is_some_and(|stored| stored.encode() == self.index.encode())
            && cursor.end - cursor.offset == FOOTER_BYTES as u64
            && read_footer(input, cursor.end)? == Some(footer(index_offset));
        Ok(if intact { SeekIndexState::Intact } else { SeekIndexState::Damaged })
    }
}

/// Which image's bytes come next.
struct ImagesDue<'a> {
    images: &'a [ImageInfo],
    bytes_seen: Vec<u64>,
}

impl ImagesDue<'_> {
    /// Takes a piece of an image into account; false if it is not the next one's, or too long.
    fn take(&mut self, head: &FrameHead) -> bool {
        let index = head.count as usize;
        if index >= self.images.len() || head.raw_bytes == 0 || !self.none_before(index) {
            return false;
        }
        self.bytes_seen[index] += u64::from(head.raw_bytes);
        self.bytes_seen[index] <= self.images[index].bytes
    }

    /// Whether no image before this one lacks any bytes.
    fn none_before(&self, index: usize) -> bool {
        let seen = self.bytes_seen.iter().zip(self.images).take(index);
        seen.into_iter().all(|(seen, image)| *seen == image.bytes)
    }
}

/// The last bytes of a file that has room for a footer.
fn read_footer(
    input: &mut (impl Read + Seek),
    file_bytes: u64,
) -> io::Result<Option<[u8; FOOTER_BYTES]>> {
    let Some(offset) = file_bytes.checked_sub(FOOTER_BYTES as u64) else {
        return Ok(None);
    };
    let mut bytes = [0; FOOTER_BYTES];
    input.seek(SeekFrom::Start(offset))?;
    input.read_exact(&mut bytes)?;
    Ok(Some(bytes))
}

/// Whether the file ends as a closed recording does.
fn has_footer(input: &mut (impl Read + Seek), file_bytes: u64) -> io::Result<bool> {
    let Some(bytes) = read_footer(input, file_bytes)? else {
        return Ok(false);
    };
    let [.., a, b, c, d, e, f, g, h] = bytes;
    let index_offset = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
    Ok(index_offset < file_bytes && bytes == footer(index_offset))
}

/// Reads the log's frames, checking them once more.
pub(crate) struct LogSource {
    input: SharedInput,
    cursor: FrameCursor,
    damage: Option<Damage>,
}

impl LogSource {
    /// Reads from `start` to the end of what `contents` found sound.
    pub(crate) fn new(input: &SharedInput, contents: &Contents, start: FrameCursor) -> Self {
        Self {
            input: Arc::clone(input),
            cursor: FrameCursor { end: contents.sound_end.offset, ..start },
            damage: contents.damage.clone(),
        }
    }
}

impl FrameSource for LogSource {
    fn next_frame(&mut self) -> Result<Option<LogFrame>, LogError> {
        let before = self.cursor;
        if before.offset >= before.end {
            return match &self.damage {
                Some(damage) => Err(damage.clone().into()),
                None => Ok(None),
            };
        }
        let mut next = before;
        let found = next.read(&mut *lock(&self.input)).map_err(LogError::Read)?;
        // The scan found whole log frames here: anything else has changed since.
        let (record_count, records) = match found {
            Found::Frame(frame) if frame.head.kind == FrameKind::Log => {
                (frame.head.count, frame.into_raw())
            }
            Found::Frame(_) | Found::CutShort => (0, Err(FrameFault::OutOfPlace)),
            Found::Fault(fault) => (0, Err(fault)),
        };
        let records = records.map_err(|fault| before.damage(fault))?;
        self.cursor = next;
        Ok(Some(LogFrame { records, record_count, frame: before.frame, offset: before.offset }))
    }
}
