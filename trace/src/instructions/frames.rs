//! The container of a trace: preamble, frames with checksums, footer, and what the first and the last
//! frame hold.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

use super::head::SegmentHead;
use super::{Contents, TraceError};
use crate::header::CpuModelInfo;
use crate::moment::TickKind;
use crate::varint::{Taker, put};

/// The format that this crate writes.
pub const FORMAT_VERSION: u32 = 3;
/// The oldest that it reads: what came later only adds to it.
pub(super) const OLDEST_VERSION: u32 = 2;
/// How every version of the format starts. The first byte is no ASCII, so no text starts so.
const MAGIC: [u8; 8] = *b"\xf2rrtrace";
/// Magic, format version, CRC32C of both.
pub(super) const PREAMBLE_BYTES: usize = 16;
/// Kind, payload length, CRC32C of the payload, CRC32C of those.
pub(super) const FRAME_HEAD_BYTES: usize = 16;
/// How the last bytes of a finished trace start.
const FOOTER_MAGIC: [u8; 4] = *b"rtIX";
/// Footer magic, CRC32C of what follows, file offset of the end frame.
pub(super) const FOOTER_BYTES: usize = 16;
/// The most bytes of one frame: a segment's head, and columns that compression made no longer.
pub(super) const MAX_FRAME_BYTES: u64 = super::columns::MAX_COLUMN_BYTES + (1 << 10);
/// The most bytes of the header's and the notes' texts.
const MAX_TEXT_BYTES: usize = 1 << 16;
/// What the header's bytes start with: the schema's name, then its version, little-endian.
const SCHEMA_ID: [u8; 4] = *b"rtHD";
const SCHEMA_VERSION: u16 = 4;
/// Where the header has whether there are page walks, which schema 2 lacks: behind three other contents, a
/// byte each.
const PAGE_WALKS_AT: usize = 3;

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FrameKind {
    /// The header: first, and exactly once.
    Header,
    /// A segment.
    Segment,
    /// Totals, notes and the index of a finished trace.
    End,
}

const KINDS: [(FrameKind, [u8; 4]); 3] =
    [(FrameKind::Header, *b"HEAD"), (FrameKind::Segment, *b"SEGM"), (FrameKind::End, *b"DONE")];

/// Which part of an expansion a trace is, where `--segment I/N` divided it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Which one: from 1 to `count`.
    pub number: u32,
    /// How many there are.
    pub count: u32,
    /// The recording's tick at which it begins.
    pub first_tick: u64,
    /// The tick at which the next share begins, or the expansion ends.
    pub end_tick: u64,
    /// Instructions of the run before that, where it was known beforehand: ticks are instructions up to there, or
    /// a checkpoint says it. Schema 3 lacks it.
    pub end_instruction: Option<u64>,
}

/// What was traced, and how.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceHeader {
    /// What the trace has beside instructions and addresses.
    pub contents: Contents,
    /// What a tick of its markers is.
    pub tick: TickKind,
    /// The guest's CPU model.
    pub cpu_model: CpuModelInfo,
    /// The chain value of the recording that was expanded, in hexadecimal; empty if there was none.
    pub recording: String,
    /// The filters that it went through, as the user gave them.
    pub filters: Vec<String>,
    /// Which part of an expansion it is; `None` for a whole one. What stands before it in the header
    /// is schema 1.
    pub share: Option<Share>,
}

impl TraceHeader {
    pub(super) fn encode(&self) -> Result<Vec<u8>, TraceError> {
        let mut bytes = SCHEMA_ID.to_vec();
        bytes.extend(SCHEMA_VERSION.to_le_bytes());
        let bytes = postcard::to_extend(self, bytes).map_err(|_| TraceError::TooLarge)?;
        if bytes.len() > MAX_TEXT_BYTES { Err(TraceError::TooLarge) } else { Ok(bytes) }
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (version, rest) = bytes.strip_prefix(&SCHEMA_ID)?.split_first_chunk()?;
        let (version, mut fields) = (u16::from_le_bytes(*version), rest.to_vec());
        let known = (1..=SCHEMA_VERSION).contains(&version) && fields.len() > PAGE_WALKS_AT;
        if !known || bytes.len() > MAX_TEXT_BYTES {
            return None;
        }
        if version < 3 {
            fields.insert(PAGE_WALKS_AT, 0);
        }
        if version == 1 {
            // It ends where an absent share stands.
            fields.push(0);
        }
        let whole = |fields: &[u8]| match postcard::take_from_bytes(fields) {
            Ok((header, [])) => Some(header),
            _ => None,
        };
        whole(&fields).or_else(|| {
            // A share that does not say its last instruction ends where an absent one stands.
            let lacks_it = (2..4).contains(&version);
            let read = lacks_it.then(|| fields.push(0)).and_then(|()| whole(&fields));
            read.filter(|header: &Self| header.share.is_some())
        })
    }
}

/// What all segments of a trace hold together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Segments.
    pub segments: u64,
    /// Instructions that retire.
    pub instructions: u64,
    /// Instructions left out.
    pub skipped: u64,
    /// Runs of blocks.
    pub runs: u64,
    /// Data accesses.
    pub accesses: u64,
}

impl Totals {
    pub(super) fn add(&mut self, head: &SegmentHead) {
        self.segments += 1;
        self.instructions = self.instructions.saturating_add(head.instructions);
        self.skipped = self.skipped.saturating_add(head.skipped);
        self.runs = self.runs.saturating_add(head.runs);
        self.accesses = self.accesses.saturating_add(head.accesses);
    }
}

/// Where a segment lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct IndexEntry {
    /// File offset of its frame.
    pub(super) offset: u64,
    /// The number of its first instruction.
    pub(super) instruction: u64,
    /// The tick and the virtual time of the last marker before it.
    pub(super) tick: u64,
    pub(super) virtual_ns: u64,
}

impl IndexEntry {
    pub(super) fn new(offset: u64, head: &SegmentHead) -> Self {
        let (instruction, marker) = (head.start.instruction, head.start.marker);
        Self { offset, instruction, tick: marker.tick, virtual_ns: marker.virtual_ns }
    }
}

/// What the last frame holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct End {
    pub(super) totals: Totals,
    /// The instruction number behind the last segment.
    pub(super) end_instruction: u64,
    pub(super) notes: Vec<String>,
    pub(super) entries: Vec<IndexEntry>,
}

impl End {
    pub(super) fn encode(&self) -> Result<Vec<u8>, TraceError> {
        let Totals { segments, instructions, skipped, runs, accesses } = self.totals;
        let mut out = Vec::new();
        let numbers = [segments, instructions, skipped, runs, accesses, self.end_instruction];
        numbers.iter().for_each(|number| put(&mut out, *number));
        put(&mut out, self.notes.len() as u64);
        for note in &self.notes {
            put(&mut out, note.len() as u64);
            out.extend_from_slice(note.as_bytes());
        }
        if out.len() > MAX_TEXT_BYTES {
            return Err(TraceError::TooLarge);
        }
        for entry in &self.entries {
            for number in [entry.offset, entry.instruction, entry.tick, entry.virtual_ns] {
                put(&mut out, number);
            }
        }
        Ok(out)
    }

    /// From the frame's payload; `None` if it is none.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut taker = Taker::new(bytes);
        let mut number = || taker.varint().ok();
        let totals = Totals {
            segments: number()?,
            instructions: number()?,
            skipped: number()?,
            runs: number()?,
            accesses: number()?,
        };
        let (end_instruction, note_count) = (number()?, number()?);
        let mut notes = Vec::new();
        for _ in 0..note_count {
            let length = taker.varint().ok()?;
            notes.push(String::from_utf8(taker.bytes(length).ok()?.to_vec()).ok()?);
        }
        let mut entries = Vec::new();
        for _ in 0..totals.segments {
            let mut number = || taker.varint().ok();
            entries.push(IndexEntry {
                offset: number()?,
                instruction: number()?,
                tick: number()?,
                virtual_ns: number()?,
            });
        }
        (taker.remaining() == 0).then_some(Self { totals, end_instruction, notes, entries })
    }
}

/// How a trace of this version starts.
pub(super) fn preamble(version: u32) -> [u8; PREAMBLE_BYTES] {
    let mut bytes = [0; PREAMBLE_BYTES];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&version.to_le_bytes());
    let checksum = crc32c::crc32c(&bytes[..12]);
    bytes[12..].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// Reads and checks how a trace starts.
pub(super) fn read_preamble(input: &mut impl Read) -> Result<(), TraceError> {
    let bytes = read_up_to(input, PREAMBLE_BYTES as u64).map_err(TraceError::Read)?;
    let common = bytes.len().min(MAGIC.len());
    if bytes.is_empty() {
        return Err(TraceError::Empty);
    }
    if bytes[..common] != MAGIC[..common] {
        return Err(TraceError::Foreign);
    }
    let Ok(bytes) = <[u8; PREAMBLE_BYTES]>::try_from(bytes) else {
        return Err(TraceError::Header);
    };
    let [.., a, b, c, d, _, _, _, _] = bytes;
    let found = u32::from_le_bytes([a, b, c, d]);
    if bytes != preamble(found) {
        return Err(TraceError::Header);
    }
    let is_read = (OLDEST_VERSION..=FORMAT_VERSION).contains(&found);
    if is_read { Ok(()) } else { Err(TraceError::Version { found }) }
}

/// How a finished trace ends.
pub(super) fn footer(end_offset: u64) -> [u8; FOOTER_BYTES] {
    let offset = end_offset.to_le_bytes();
    let mut bytes = [0; FOOTER_BYTES];
    bytes[..4].copy_from_slice(&FOOTER_MAGIC);
    bytes[4..8].copy_from_slice(&crc32c::crc32c(&offset).to_le_bytes());
    bytes[8..].copy_from_slice(&offset);
    bytes
}

/// Where the end frame is, from a footer; `None` if it is none.
pub(super) fn end_offset(bytes: [u8; FOOTER_BYTES]) -> Option<u64> {
    let [.., a, b, c, d, e, f, g, h] = bytes;
    let offset = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
    (bytes == footer(offset)).then_some(offset)
}

/// What is wrong with what stands behind an end frame that is at this file offset, if anything is.
pub(super) fn footer_fault(
    input: &mut impl Read,
    end_offset: u64,
) -> io::Result<Option<&'static str>> {
    let bytes = read_up_to(input, FOOTER_BYTES as u64 + 1)?;
    let expected = footer(end_offset);
    Ok(match bytes.len() {
        _ if bytes == expected => None,
        ..FOOTER_BYTES => Some("its last bytes are cut off"),
        _ if bytes.starts_with(&expected) => Some("there are bytes behind its end"),
        _ => Some("its last bytes were changed"),
    })
}

/// Writes a frame and says how long it is.
pub(super) fn write_frame(
    out: &mut impl Write,
    kind: FrameKind,
    payload: &[u8],
) -> Result<u64, TraceError> {
    if payload.len() as u64 > MAX_FRAME_BYTES {
        return Err(TraceError::TooLarge);
    }
    let (_, name) = KINDS.iter().find(|(one, _)| *one == kind).expect("all are listed");
    let mut head = name.to_vec();
    head.extend((payload.len() as u32).to_le_bytes());
    head.extend(crc32c::crc32c(payload).to_le_bytes());
    head.extend(crc32c::crc32c(&head).to_le_bytes());
    out.write_all(&head).map_err(TraceError::Write)?;
    out.write_all(payload).map_err(TraceError::Write)?;
    Ok((FRAME_HEAD_BYTES + payload.len()) as u64)
}

/// What stands at a place in a trace.
pub(super) enum Found {
    /// A frame whose checksums are right.
    Frame(FrameKind, Vec<u8>),
    /// The input ends before the frame does, or, with zero, exactly here: so many bytes are there.
    CutShort(u64),
    /// A frame that is not to be used, and why.
    Fault(&'static str),
}

/// Reads the next frame.
pub(super) fn read_frame(input: &mut impl Read) -> io::Result<Found> {
    let head = read_up_to(input, FRAME_HEAD_BYTES as u64)?;
    let Ok(head) = <[u8; FRAME_HEAD_BYTES]>::try_from(&head[..]) else {
        return Ok(Found::CutShort(head.len() as u64));
    };
    let [kind @ .., l0, l1, l2, l3, p0, p1, p2, p3, h0, h1, h2, h3] = head;
    let length = u64::from(u32::from_le_bytes([l0, l1, l2, l3]));
    let Some((kind, _)) = KINDS.iter().find(|(_, name)| *name == kind) else {
        return Ok(Found::Fault("a frame is of no kind"));
    };
    if u32::from_le_bytes([h0, h1, h2, h3]) != crc32c::crc32c(&head[..12]) {
        return Ok(Found::Fault("the checksum of a frame's head does not match"));
    }
    if length > MAX_FRAME_BYTES {
        return Ok(Found::Fault("a frame is longer than a frame may be"));
    }
    let payload = read_up_to(input, length)?;
    if (payload.len() as u64) < length {
        return Ok(Found::CutShort((FRAME_HEAD_BYTES + payload.len()) as u64));
    }
    if u32::from_le_bytes([p0, p1, p2, p3]) != crc32c::crc32c(&payload) {
        return Ok(Found::Fault("the checksum of a frame does not match its bytes"));
    }
    Ok(Found::Frame(*kind, payload))
}

/// Reads so many bytes, or fewer where the input ends. Allocates as bytes come.
fn read_up_to(input: &mut impl Read, count: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    input.take(count).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As earlier schemas have it, each of which lacks a field.
    fn of_schema(version: u16, header: &TraceHeader) -> Vec<u8> {
        let mut bytes = header.encode().expect("it is short");
        bytes[4..6].copy_from_slice(&version.to_le_bytes());
        if version < 4 && (version > 1 && header.share.is_some() || version == 1) {
            assert_eq!(bytes.pop(), Some(0), "what it lacks is absent");
        }
        if version < 3 {
            assert_eq!(bytes.remove(6 + PAGE_WALKS_AT), 0, "there are no page walks");
        }
        bytes
    }

    #[test]
    fn headers_of_all_schemas_are_read() {
        let header = |share| TraceHeader {
            contents: Contents::default(),
            tick: TickKind::Exit,
            cpu_model: CpuModelInfo { name: "one".to_owned(), version: 1 },
            recording: "00ff".to_owned(),
            filters: vec!["--user".to_owned()],
            share,
        };
        let end_instruction = None;
        let share = Share { number: 1, count: 2, first_tick: 3, end_tick: 500, end_instruction };
        for version in 1..=SCHEMA_VERSION {
            let shares: &[_] = if version == 1 { &[None] } else { &[None, Some(share)] };
            for share in shares {
                let header = header(*share);
                let bytes = of_schema(version, &header);
                assert_eq!(TraceHeader::decode(&bytes), Some(header), "schema {version}");
                for length in 0..bytes.len() {
                    assert_eq!(TraceHeader::decode(&bytes[..length]), None, "{length} bytes");
                }
            }
        }
        let now = header(Some(Share { end_instruction: Some(77), ..share }));
        assert_eq!(TraceHeader::decode(&of_schema(SCHEMA_VERSION, &now)), Some(now.clone()));
        let mut next = of_schema(SCHEMA_VERSION, &now);
        next[4] += 1;
        assert_eq!(TraceHeader::decode(&next), None, "of a later schema");
    }
}
