//! The file of checkpoints that lies beside a recording. `FORMAT.md` describes the bytes.
//!
//! Frames are only ever appended, each in one write: pages of RAM that no frame before has, then the
//! checkpoint that uses them. Whatever kills the writer, the checkpoints before stay whole.

use std::collections::HashMap;
use std::io::{Read, Seek, SeekFrom, Write};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::frame::{self, Found, FrameKind, FramePlace};
use super::page_frame::{self, PageFrame, PendingPages};
use super::page_table::{self, Entry};
use super::state::{CheckpointDigest, MachineState, RamDigest, StateFault, page_digest};
use super::{CheckpointError, PAGE_BYTES};
use crate::contents::{SharedInput, lock};
use crate::moment::Moment;
use crate::varint::{Taker, put};

/// The format that this crate writes, and the only one that it reads.
pub(super) const FORMAT_VERSION: u32 = 1;
/// How every version of the format starts. The first byte is no ASCII, so no text starts so.
const MAGIC: [u8; 8] = *b"\xf2rrcheck";
/// Magic, format version, CRC32C of both.
const PREAMBLE_BYTES: usize = 16;
/// zstd's level for states.
const STATE_LEVEL: i32 = 3;
/// What a checkpoint's frame starts with: six numbers and a digest of five parts.
const INFO_BYTES: usize = 6 * 8 + 5 * 32;
/// The most bytes of a state and its page table.
const MAX_BODY_BYTES: u64 = frame::MAX_PAYLOAD_BYTES;

/// A checkpoint, without its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointInfo {
    /// Where the machine stands. Nothing has entered it at this tick yet.
    pub moment: Moment,
    /// Virtual time there, in nanoseconds since the machine started.
    pub virtual_ns: u64,
    /// Records of the log before it.
    pub records: u64,
    /// Pages of guest RAM that are not all zero.
    pub pages: u64,
    /// The digest of the whole machine.
    pub digest: CheckpointDigest,
}

impl CheckpointInfo {
    fn encode(&self) -> Vec<u8> {
        let Moment { tick, rip, rcx } = self.moment;
        let numbers = [tick, rip, rcx, self.virtual_ns, self.records, self.pages];
        let mut bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        let CheckpointDigest { cpu, devices, ram, engine, rest } = self.digest;
        [cpu, devices, ram, engine, rest].iter().for_each(|part| bytes.extend(part));
        bytes
    }

    fn take(taker: &mut Taker<'_>) -> Option<Self> {
        let mut number = || taker.fixed_u64().ok();
        let moment = Moment { tick: number()?, rip: number()?, rcx: number()? };
        let (virtual_ns, records, pages) = (number()?, number()?, number()?);
        let mut part = || taker.array().ok();
        let (cpu, devices, ram, engine, rest) = (part()?, part()?, part()?, part()?, part()?);
        let digest = CheckpointDigest { cpu, devices, ram, engine, rest };
        Some(Self { moment, virtual_ns, records, pages, digest })
    }
}

/// A page of RAM as the last checkpoint or the next one has it.
#[derive(Clone, Copy)]
struct Page {
    id: u32,
    digest: [u8; 32],
}

/// Writes checkpoints. Pages are kept from one to the next: what is not given again is as before.
pub struct CheckpointWriter<W: Write> {
    out: W,
    /// Every page in the file by the first half of its digest.
    known: HashMap<[u8; 16], u32>,
    page_count: u64,
    /// Guest RAM, by page number; pages of zeros are `None`.
    ram: Vec<Option<Page>>,
    /// Pages of the next frame.
    pending: PendingPages,
    bytes: u64,
    /// A write is under way or has failed.
    closed: bool,
}

impl<W: Write> std::fmt::Debug for CheckpointWriter<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CheckpointWriter")
            .field("bytes", &self.bytes)
            .field("page_count", &self.page_count)
            .finish_non_exhaustive()
    }
}

impl<W: Write> CheckpointWriter<W> {
    /// Starts an empty file for the recording of this identity (see
    /// [`crate::recording::Recording::identity`]).
    ///
    /// # Errors
    /// If `out` cannot be written.
    pub fn create(mut out: W, recording: &[u8; 32]) -> Result<Self, CheckpointError> {
        out.write_all(&preamble(FORMAT_VERSION)).map_err(CheckpointError::Write)?;
        let header = frame::write(&mut out, FrameKind::Header, recording);
        let bytes = PREAMBLE_BYTES as u64 + header.map_err(CheckpointError::Write)?;
        Self::new(out, bytes)
    }

    /// Goes on behind what `written` holds; `out` stands at [`Checkpoints::sound_bytes`] and writes to
    /// the same file, which ends there. Reads every page that is there.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn append(out: W, written: &Checkpoints) -> Result<Self, CheckpointError> {
        let mut writer = Self::new(out, written.sound_bytes)?;
        for frame in &written.page_frames {
            // A damaged frame's pages are written again when they come.
            if let Ok(pages) = frame.read(&written.input) {
                for (id, digest) in (frame.first_id..).zip(&pages.digests) {
                    writer.known.insert(key(digest), id as u32);
                }
            }
        }
        writer.page_count = written.page_count;
        Ok(writer)
    }

    fn new(out: W, bytes: u64) -> Result<Self, CheckpointError> {
        let pending = PendingPages::new().map_err(CheckpointError::Write)?;
        Ok(Self {
            out,
            known: HashMap::new(),
            page_count: 0,
            ram: Vec::new(),
            pending,
            bytes,
            closed: false,
        })
    }

    /// What this page of guest RAM holds at the next checkpoint.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn page(&mut self, address: u64, page: &[u8]) -> Result<(), CheckpointError> {
        let number = (address / PAGE_BYTES as u64) as usize;
        if self.ram.len() <= number {
            self.ram.resize(number + 1, None);
        }
        let Some(digest) = page_digest(page) else {
            self.ram[number] = None;
            return Ok(());
        };
        let id = match self.known.get(&key(&digest)) {
            Some(id) => *id,
            None => {
                let id = u32::try_from(self.page_count).map_err(|_| full())?;
                self.page_count += 1;
                self.known.insert(key(&digest), id);
                self.pending.add(page);
                if self.pending.is_full() {
                    self.write_pages()?;
                }
                id
            }
        };
        self.ram[number] = Some(Page { id, digest });
        Ok(())
    }

    /// Writes a checkpoint of `state`, with RAM as it was given.
    ///
    /// # Errors
    /// If the file cannot be written; the checkpoints before it are whole then.
    pub fn checkpoint(&mut self, state: &MachineState) -> Result<CheckpointInfo, CheckpointError> {
        self.write_pages()?;
        let (mut entries, mut ram) = (Vec::new(), RamDigest::default());
        for (number, page) in (0..).zip(&self.ram) {
            if let Some(Page { id, digest }) = page {
                let entry = Entry { page: number, id: *id };
                ram.page(entry.address(), digest);
                entries.push(entry);
            }
        }
        let info = CheckpointInfo {
            moment: state.moment,
            virtual_ns: state.virtual_ns,
            records: state.records,
            pages: entries.len() as u64,
            digest: state.digest(ram.finish()),
        };
        let encoded = state.encode();
        let mut body = Vec::new();
        put(&mut body, encoded.len() as u64);
        body.extend(encoded);
        page_table::encode(&entries, &mut body);
        let mut payload = info.encode();
        put(&mut payload, body.len() as u64);
        payload.extend(zstd::bulk::compress(&body, STATE_LEVEL).map_err(CheckpointError::Write)?);
        self.write_frame(FrameKind::Checkpoint, &payload)?;
        Ok(info)
    }

    /// Bytes of the whole file so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What the file is written to.
    pub fn get_ref(&self) -> &W {
        &self.out
    }

    fn write_pages(&mut self) -> Result<(), CheckpointError> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let payload = self.pending.payload().map_err(CheckpointError::Write)?;
        self.write_frame(FrameKind::Pages, &payload)?;
        self.pending.clear();
        Ok(())
    }

    fn write_frame(&mut self, kind: FrameKind, payload: &[u8]) -> Result<(), CheckpointError> {
        if std::mem::replace(&mut self.closed, true) {
            return Err(CheckpointError::Closed);
        }
        self.bytes += frame::write(&mut self.out, kind, payload).map_err(CheckpointError::Write)?;
        self.out.flush().map_err(CheckpointError::Write)?;
        self.closed = false;
        Ok(())
    }
}

fn key(digest: &[u8; 32]) -> [u8; 16] {
    *digest.first_chunk().expect("a digest has 32 bytes")
}

fn full() -> CheckpointError {
    CheckpointError::Write(std::io::ErrorKind::FileTooLarge.into())
}

fn preamble(version: u32) -> [u8; PREAMBLE_BYTES] {
    let mut bytes = [0; PREAMBLE_BYTES];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&version.to_le_bytes());
    let checksum = crc32c::crc32c(&bytes[..12]);
    bytes[12..].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// A file of checkpoints opened for reading. Only the heads of frames and the checkpoints' short
/// descriptions are read for that.
pub struct Checkpoints {
    input: SharedInput,
    /// In the order of their ticks.
    list: Vec<(CheckpointInfo, FramePlace)>,
    infos: Vec<CheckpointInfo>,
    page_frames: Vec<PageFrame>,
    page_count: u64,
    sound_bytes: u64,
    file_bytes: u64,
    damaged: usize,
}

impl std::fmt::Debug for Checkpoints {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpoints")
            .field("count", &self.infos.len())
            .field("page_count", &self.page_count)
            .finish_non_exhaustive()
    }
}

/// What [`Checkpoints::load`] gives beside RAM.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// Everything but RAM.
    pub state: MachineState,
    /// The digest, which is right.
    pub digest: CheckpointDigest,
}

impl Checkpoints {
    /// Opens the checkpoints of the recording of this identity.
    ///
    /// # Errors
    /// If `input` cannot be read, holds no checkpoints, or those of another recording.
    pub fn open<R: Read + Seek + Send + 'static>(
        mut input: R,
        recording: &[u8; 32],
    ) -> Result<Self, CheckpointError> {
        let file_bytes = input.seek(SeekFrom::End(0)).map_err(CheckpointError::Read)?;
        read_preamble(&mut input, file_bytes)?;
        let header = read_header(&mut input, file_bytes)?;
        let mut payload = header.payload(&mut input).map_err(CheckpointError::Read)?;
        match payload.take().as_deref() {
            Some(found) if found == recording => {}
            Some(found) if found.len() == recording.len() => {
                return Err(CheckpointError::OtherRecording);
            }
            _ => return Err(CheckpointError::Header),
        }
        let mut checkpoints = Self {
            input: Arc::new(Mutex::new(std::io::empty())),
            list: Vec::new(),
            infos: Vec::new(),
            page_frames: Vec::new(),
            page_count: 0,
            sound_bytes: header.end(),
            file_bytes,
            damaged: 0,
        };
        checkpoints.scan(&mut input).map_err(CheckpointError::Read)?;
        checkpoints.list.sort_by_key(|(info, _)| info.moment);
        // One that was added at the tick of another was wanted in its place.
        checkpoints.list.dedup_by(|later, kept| {
            let same = later.0.moment.tick == kept.0.moment.tick;
            if same {
                *kept = *later;
            }
            same
        });
        checkpoints.infos = checkpoints.list.iter().map(|(info, _)| *info).collect();
        checkpoints.input = Arc::new(Mutex::new(input));
        Ok(checkpoints)
    }

    /// Goes from head to head as far as frames are whole.
    fn scan(&mut self, input: &mut (impl Read + Seek)) -> std::io::Result<()> {
        while let Found::Frame(place) = frame::find(input, self.sound_bytes, self.file_bytes)? {
            match place.kind {
                FrameKind::Pages => {
                    let Some(frame) = PageFrame::find(input, place, self.page_count)? else {
                        return Ok(());
                    };
                    self.page_frames.push(frame);
                    self.page_count += frame.count as u64;
                }
                FrameKind::Checkpoint => {
                    let payload = place.payload(input)?.unwrap_or_default();
                    match CheckpointInfo::take(&mut Taker::new(&payload)) {
                        Some(info) => self.list.push((info, place)),
                        None => self.damaged += 1,
                    }
                }
                FrameKind::Header => return Ok(()),
            }
            self.sound_bytes = place.end();
        }
        Ok(())
    }

    /// The checkpoints, in the order of their ticks.
    pub fn list(&self) -> &[CheckpointInfo] {
        &self.infos
    }

    /// The last checkpoint at or before this tick.
    pub fn nearest(&self, tick: u64) -> Option<usize> {
        self.infos.partition_point(|info| info.moment.tick <= tick).checked_sub(1)
    }

    /// The file's length, in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// Where the part of the file ends whose frames are whole: less than [`Self::file_bytes`] after a
    /// writer was killed.
    pub fn sound_bytes(&self) -> u64 {
        self.sound_bytes
    }

    /// Checkpoints that are there and damaged.
    pub fn damaged(&self) -> usize {
        self.damaged
    }

    /// Loads a checkpoint: gives each page of RAM that is not all zero, with its guest-physical
    /// address, to `place`, which says whether there is RAM, and then the state. All of it is compared
    /// with the checkpoint's digest.
    ///
    /// # Errors
    /// If the checkpoint cannot be read or is damaged; what was placed is of no use then.
    pub fn load(
        &self,
        index: usize,
        place: &mut dyn FnMut(u64, &[u8]) -> bool,
    ) -> Result<Loaded, CheckpointError> {
        let (state, entries) = self.read_state(index)?;
        let info = &self.infos[index];
        let tick = info.moment.tick;
        let ram = page_frame::load_ram(&self.input, &self.page_frames, tick, &entries, place)?;
        let digest = state.digest(ram);
        let described = (state.moment, state.virtual_ns, state.records, entries.len() as u64);
        let digest_is_right = digest == info.digest
            && described == (info.moment, info.virtual_ns, info.records, info.pages);
        if !digest_is_right {
            return Err(CheckpointError::Digest { tick });
        }
        Ok(Loaded { state, digest })
    }

    /// Reads a checkpoint's state and leaves its RAM alone.
    ///
    /// # Errors
    /// If it cannot be read or is damaged.
    pub fn load_state(&self, index: usize) -> Result<MachineState, CheckpointError> {
        let (state, _) = self.read_state(index)?;
        let CheckpointInfo { digest, moment, .. } = &self.infos[index];
        match state.digest(digest.ram) == *digest {
            true => Ok(state),
            false => Err(CheckpointError::Digest { tick: moment.tick }),
        }
    }

    /// A checkpoint's state and page table as its frame has them.
    fn read_state(&self, index: usize) -> Result<(MachineState, Vec<Entry>), CheckpointError> {
        let count = self.list.len();
        let Some((info, frame)) = self.list.get(index) else {
            return Err(CheckpointError::NoSuch { index, count });
        };
        let tick = info.moment.tick;
        let damaged = |what| CheckpointError::Damaged { tick, what, offset: frame.offset };
        let payload = frame.payload(&mut *lock(&self.input)).map_err(CheckpointError::Read)?;
        let payload = payload.ok_or_else(|| damaged("its checksum does not match"))?;
        let body = body(&payload).ok_or_else(|| damaged("its state does not decompress"))?;
        let mut taker = Taker::new(&body);
        let state = taker.varint().and_then(|bytes| taker.bytes(bytes));
        let state =
            MachineState::decode(state.unwrap_or_default()).map_err(|fault| match fault {
                StateFault::Version(found) => CheckpointError::StateVersion { tick, found },
                StateFault::Malformed => damaged("its state does not decode"),
            })?;
        // Only frames before it: the pages of one that was cut off are not there.
        let entries = page_table::decode(&mut taker, self.page_count)
            .ok_or_else(|| damaged("its page table does not decode"))?;
        Ok((state, entries))
    }
}

/// A checkpoint's state and page table, from its frame's payload.
fn body(payload: &[u8]) -> Option<Vec<u8>> {
    let mut taker = Taker::new(payload.get(INFO_BYTES..)?);
    let raw_bytes = taker.varint().ok().filter(|bytes| *bytes <= MAX_BODY_BYTES)?;
    let stored = taker.bytes(taker.remaining() as u64).ok()?;
    frame::decompress(stored, raw_bytes as usize)
}

/// Checks how the file starts.
fn read_preamble(input: &mut (impl Read + Seek), file_bytes: u64) -> Result<(), CheckpointError> {
    let mut bytes = [0; PREAMBLE_BYTES];
    if file_bytes < PREAMBLE_BYTES as u64 {
        return Err(CheckpointError::Foreign);
    }
    input.seek(SeekFrom::Start(0)).map_err(CheckpointError::Read)?;
    input.read_exact(&mut bytes).map_err(CheckpointError::Read)?;
    let [.., a, b, c, d, _, _, _, _] = bytes;
    let found = u32::from_le_bytes([a, b, c, d]);
    if bytes[..8] != MAGIC || bytes != preamble(found) {
        return Err(CheckpointError::Foreign);
    }
    if found == FORMAT_VERSION { Ok(()) } else { Err(CheckpointError::Version { found }) }
}

/// Finds the frame that says which recording this is for.
fn read_header(
    input: &mut (impl Read + Seek),
    file_bytes: u64,
) -> Result<FramePlace, CheckpointError> {
    let start = PREAMBLE_BYTES as u64;
    match frame::find(input, start, file_bytes).map_err(CheckpointError::Read)? {
        Found::Frame(place) if place.kind == FrameKind::Header => Ok(place),
        Found::CutShort => Err(CheckpointError::Foreign),
        _ => Err(CheckpointError::Header),
    }
}
