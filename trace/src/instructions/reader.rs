//! Reads a trace file, from a pipe or from anywhere in a file. Nothing that it is given is trusted:
//! lengths are checked before memory is allocated for them, and whatever a file holds, reading it ends
//! in a value.

use std::io::{Read, Seek, SeekFrom, Write};
use std::sync::Arc;

use super::ahead::{Piece, Showing};
use super::batch::Batch;
use super::decode::SegmentDecoder;
use super::frames::{
    End, FOOTER_BYTES, FRAME_HEAD_BYTES, Found, FrameKind, IndexEntry, PREAMBLE_BYTES, Totals,
    TraceHeader, end_offset, footer_fault, read_frame, read_preamble,
};
use super::head::{Fault, SegmentHead};
use super::run::Observer;
use super::writer::TraceWriter;
use super::{Event, TraceError};
use crate::varint::Taker;

/// How a trace ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It was finished.
    Complete {
        /// What it is without, a line each.
        notes: Vec<String>,
    },
    /// The file ends in a segment, or behind one: its writer was killed, or still writes. All
    /// segments before are sound.
    CutShort {
        /// Bytes of the segment that is not whole.
        unused_bytes: u64,
    },
}

/// What a trace holds, without reading all of it where it was finished.
#[derive(Debug)]
pub struct Outline {
    /// What its segments hold together.
    pub totals: Totals,
    /// Where they lie.
    pub index: TraceIndex,
    /// How it ends, or where it is damaged; damage within a finished trace shows only in reading.
    pub ending: Result<Ending, TraceError>,
    /// What is wrong with the last bytes of a finished trace, which only say where its end begins.
    pub footer_fault: Option<&'static str>,
}

/// Where the segments of a trace lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceIndex {
    entries: Vec<IndexEntry>,
    /// The instruction number behind the last segment.
    end: u64,
}

impl TraceIndex {
    /// How many segments there are.
    pub fn segments(&self) -> usize {
        self.entries.len()
    }

    /// The number of the first instruction.
    pub fn first_instruction(&self) -> u64 {
        self.entries.first().map_or(self.end, |entry| entry.instruction)
    }

    /// The number of the instruction behind the last.
    pub fn end_instruction(&self) -> u64 {
        self.end
    }

    /// The last segment that begins at this tick, by its marker, or before it.
    pub fn segment_at_tick(&self, tick: u64) -> usize {
        self.entries.partition_point(|entry| entry.tick <= tick).saturating_sub(1)
    }

    /// A segment that has no instruction behind the first one of this virtual time before it. A segment
    /// knows the last marker before it, which may be far before and that of several segments.
    pub fn segment_before_virtual_ns(&self, virtual_ns: u64) -> usize {
        let begins_by = |at: u64| self.entries.partition_point(|entry| entry.virtual_ns <= at);
        let last = begins_by(virtual_ns).saturating_sub(1);
        let marker_ns = self.entries.get(last).map_or(0, |entry| entry.virtual_ns);
        marker_ns.checked_sub(1).map_or(0, begins_by).saturating_sub(1)
    }

    /// The segment that holds the instruction of this number.
    pub fn segment_of_instruction(&self, instruction: u64) -> Option<usize> {
        let behind = self.entries.partition_point(|entry| entry.instruction <= instruction);
        (instruction < self.end).then(|| behind.checked_sub(1))?
    }
}

/// Reads a trace, one segment in memory at a time.
#[derive(Debug)]
pub struct TraceReader<R> {
    input: R,
    header: TraceHeader,
    /// File offset of the next frame.
    offset: u64,
    /// What was read, as long as that was everything from the first segment on.
    seen: Option<Totals>,
    /// The instruction number behind the last segment that was read.
    expected_instruction: Option<u64>,
    /// What is wrong with the bytes behind the end.
    footer_fault: Option<&'static str>,
}

impl<R: Read> TraceReader<R> {
    /// Starts to read a trace. `input` need not be able to seek.
    ///
    /// # Errors
    /// If `input` cannot be read, is no trace, or has no usable header.
    pub fn open(mut input: R) -> Result<Self, TraceError> {
        read_preamble(&mut input)?;
        let Found::Frame(FrameKind::Header, bytes) =
            read_frame(&mut input).map_err(TraceError::Read)?
        else {
            return Err(TraceError::Header);
        };
        let header = TraceHeader::decode(&bytes).ok_or(TraceError::Header)?;
        let offset = (PREAMBLE_BYTES + FRAME_HEAD_BYTES + bytes.len()) as u64;
        let seen = Some(Totals::default());
        Ok(Self { input, header, offset, seen, expected_instruction: None, footer_fault: None })
    }

    /// What was traced, and how.
    pub fn header(&self) -> &TraceHeader {
        &self.header
    }

    /// Shows `observer` everything from here to the end.
    ///
    /// # Errors
    /// If the input cannot be read or is damaged (`observer` has seen what stands before), or the
    /// observer fails.
    pub fn drive(&mut self, observer: &mut (impl Observer + ?Sized)) -> Result<Ending, TraceError> {
        let ending = loop {
            if let Some(ending) = self.drive_segment(observer)? {
                break ending;
            }
        };
        observer.end()?;
        Ok(ending)
    }

    /// Shows `observer` the next segment; false at the end. The observer's `begin` is called for
    /// the first one, its `end` never.
    ///
    /// # Errors
    /// As [`TraceReader::drive`].
    pub fn drive_segment(
        &mut self,
        observer: &mut (impl Observer + ?Sized),
    ) -> Result<Option<Ending>, TraceError> {
        let contents = self.header.contents;
        let mut showing = Showing { contents, blocks: Arc::default(), observer };
        self.next_pieces(&mut |piece| showing.take(piece))
    }

    /// Gives what the next segment holds, piece by piece, to `take`, which gives an empty batch back.
    pub(super) fn next_pieces(
        &mut self,
        take: &mut dyn FnMut(Piece) -> Result<Batch, TraceError>,
    ) -> Result<Option<Ending>, TraceError> {
        match self.next_frame()? {
            Next::Segment(offset, bytes) => self.decode(offset, &bytes, take).map(|()| None),
            Next::End(ending) => Ok(Some(ending)),
        }
    }

    /// File offset of what is read next: how far reading is.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// What is wrong with the last bytes of a finished trace that was read to its end, if anything is. They
    /// only say where its end begins, so all that it holds is sound.
    pub fn footer_fault(&self) -> Option<&'static str> {
        self.footer_fault
    }

    /// Segments read so far; 0 after going to another place.
    pub fn segments_read(&self) -> u64 {
        self.seen.map_or(0, |seen| seen.segments)
    }

    /// Appends all segments from here on to another trace, as they are. [`super::Concat`] makes one
    /// trace of several so.
    ///
    /// # Errors
    /// If the input cannot be read or is damaged, the other trace cannot be written, or the two do
    /// not go together.
    pub fn append_to<W: Write>(
        &mut self,
        header: &TraceHeader,
        writer: &mut TraceWriter<W>,
    ) -> Result<Ending, TraceError> {
        check_kinship(header, &self.header)?;
        loop {
            match self.next_frame()? {
                Next::Segment(offset, bytes) => {
                    let head = head(offset, &bytes)?;
                    self.note(&head);
                    writer.append(&head, &bytes)?;
                }
                Next::End(ending) => return Ok(ending),
            }
        }
    }

    fn next_frame(&mut self) -> Result<Next, TraceError> {
        let offset = self.offset;
        let damaged = |what| TraceError::Damaged { offset, what };
        match read_frame(&mut self.input).map_err(TraceError::Read)? {
            Found::Frame(FrameKind::Segment, bytes) => {
                self.offset += (FRAME_HEAD_BYTES + bytes.len()) as u64;
                Ok(Next::Segment(offset, bytes))
            }
            Found::Frame(FrameKind::End, bytes) => {
                let end = End::decode(&bytes).ok_or(damaged("its end is malformed"))?;
                if self.seen.is_some_and(|seen| seen != end.totals) {
                    return Err(damaged("its end does not agree with its segments"));
                }
                self.footer_fault =
                    footer_fault(&mut self.input, offset).map_err(TraceError::Read)?;
                Ok(Next::End(Ending::Complete { notes: end.notes }))
            }
            Found::Frame(FrameKind::Header, _) => Err(damaged("a second header")),
            Found::CutShort(unused_bytes) => Ok(Next::End(Ending::CutShort { unused_bytes })),
            Found::Fault(what) => Err(damaged(what)),
        }
    }

    fn note(&mut self, head: &SegmentHead) {
        if let Some(seen) = &mut self.seen {
            seen.add(head);
        }
        self.expected_instruction = Some(head.end());
    }

    fn decode(
        &mut self,
        offset: u64,
        bytes: &[u8],
        take: &mut dyn FnMut(Piece) -> Result<Batch, TraceError>,
    ) -> Result<(), TraceError> {
        let damaged = |Fault(what)| TraceError::Damaged { offset, what };
        let mut segment = SegmentDecoder::new(self.header.contents, bytes).map_err(damaged)?;
        let start = segment.head().start;
        match self.expected_instruction {
            None => drop(take(Piece::Begin(start))?),
            Some(expected) if expected == start.instruction => {}
            Some(expected) => {
                let instructions = start.instruction.checked_sub(expected);
                let instructions = instructions
                    .ok_or(Fault("it begins before the segment before it ends"))
                    .map_err(damaged)?;
                for event in [
                    Event::Skipped { instructions, address: None },
                    Event::AddressSpace { cr3: start.cr3 },
                    Event::Marker(start.marker),
                ] {
                    take(Piece::Event(event))?;
                }
            }
        }
        self.note(segment.head());
        let mut batch = take(Piece::Segment(segment.definitions()))?;
        while segment.next_batch(&mut batch).map_err(damaged)? {
            batch = take(Piece::Batch(batch))?;
        }
        Ok(())
    }
}

/// What comes next.
enum Next {
    /// A segment: its file offset and its bytes.
    Segment(u64, Vec<u8>),
    End(Ending),
}

fn head(offset: u64, bytes: &[u8]) -> Result<SegmentHead, TraceError> {
    SegmentHead::take(&mut Taker::new(bytes))
        .map_err(|Fault(what)| TraceError::Damaged { offset, what })
}

impl<R: Read + Seek> TraceReader<R> {
    /// Where the segments lie: see [`TraceReader::outline`].
    ///
    /// # Errors
    /// If the input cannot be read.
    pub fn index(&mut self) -> Result<TraceIndex, TraceError> {
        self.outline().map(|outline| outline.index)
    }

    /// What the trace holds: from the end of a finished trace, else by reading all of it once.
    ///
    /// # Errors
    /// If the input cannot be read. A damaged trace has an outline up to the damage.
    pub fn outline(&mut self) -> Result<Outline, TraceError> {
        let here = self.offset;
        let outline = match self.stored_outline()? {
            Some(outline) => outline,
            None => self.scan()?,
        };
        self.seek(here)?;
        Ok(outline)
    }

    /// Goes to the beginning of a segment.
    ///
    /// # Errors
    /// If the input cannot be read or the index has no such segment.
    pub fn seek_to_segment(
        &mut self,
        index: &TraceIndex,
        segment: usize,
    ) -> Result<(), TraceError> {
        let asked = segment as u64;
        let (first, end) = (0, index.entries.len() as u64);
        let none = TraceError::NoSuchInstruction { asked, first, end };
        let offset = index.entries.get(segment).ok_or(none)?.offset;
        self.seek(offset)?;
        self.seen = None;
        self.expected_instruction = None;
        Ok(())
    }

    /// Goes to the beginning of the segment that holds the instruction of this number.
    ///
    /// # Errors
    /// If the input cannot be read or the trace does not hold that instruction.
    pub fn seek_to_instruction(
        &mut self,
        index: &TraceIndex,
        instruction: u64,
    ) -> Result<(), TraceError> {
        match index.segment_of_instruction(instruction) {
            Some(segment) => self.seek_to_segment(index, segment),
            None => Err(TraceError::NoSuchInstruction {
                asked: instruction,
                first: index.first_instruction(),
                end: index.end_instruction(),
            }),
        }
    }

    fn seek(&mut self, offset: u64) -> Result<(), TraceError> {
        self.input.seek(SeekFrom::Start(offset)).map_err(TraceError::Read)?;
        self.offset = offset;
        Ok(())
    }

    /// What a finished trace ends with, if it is sound.
    fn stored_outline(&mut self) -> Result<Option<Outline>, TraceError> {
        let file_bytes = self.input.seek(SeekFrom::End(0)).map_err(TraceError::Read)?;
        let Some(footer_offset) = file_bytes.checked_sub(FOOTER_BYTES as u64) else {
            return Ok(None);
        };
        let mut footer = [0; FOOTER_BYTES];
        self.seek(footer_offset)?;
        self.input.read_exact(&mut footer).map_err(TraceError::Read)?;
        let Some(end_offset) = end_offset(footer) else { return Ok(None) };
        self.seek(end_offset)?;
        let Found::Frame(FrameKind::End, bytes) =
            read_frame(&mut self.input).map_err(TraceError::Read)?
        else {
            return Ok(None);
        };
        let Some(End { totals, end_instruction, notes, entries }) = End::decode(&bytes) else {
            return Ok(None);
        };
        let sorted = entries.is_sorted_by(|a, b| a.offset < b.offset)
            && entries.is_sorted_by(|a, b| a.instruction <= b.instruction);
        let index = TraceIndex { entries, end: end_instruction };
        let ending = Ok(Ending::Complete { notes });
        let footer_fault = footer_fault(&mut self.input, end_offset).map_err(TraceError::Read)?;
        Ok(sorted.then_some(Outline { totals, index, ending, footer_fault }))
    }

    fn scan(&mut self) -> Result<Outline, TraceError> {
        self.seek(PREAMBLE_BYTES as u64)?;
        if let Found::Frame(FrameKind::Header, bytes) =
            read_frame(&mut self.input).map_err(TraceError::Read)?
        {
            self.offset += (FRAME_HEAD_BYTES + bytes.len()) as u64;
        }
        let seen = self.seen.replace(Totals::default());
        let mut index = TraceIndex { entries: Vec::new(), end: 0 };
        let mut totals = Totals::default();
        let ending = loop {
            match self.next_frame() {
                Ok(Next::Segment(offset, bytes)) => match head(offset, &bytes) {
                    Ok(head) => {
                        index.entries.push(IndexEntry::new(offset, &head));
                        index.end = head.end();
                        totals.add(&head);
                        self.seen = Some(totals);
                    }
                    Err(damage) => break Err(damage),
                },
                Ok(Next::End(ending)) => break Ok(ending),
                Err(TraceError::Read(error)) => return Err(TraceError::Read(error)),
                Err(damage) => break Err(damage),
            }
        };
        self.seen = seen;
        let footer_fault = self.footer_fault;
        Ok(Outline { totals, index, ending, footer_fault })
    }
}

/// Whether two traces can be parts of one.
pub(super) fn check_kinship(one: &TraceHeader, other: &TraceHeader) -> Result<(), TraceError> {
    let differences = [
        (one.recording != other.recording, "they are of different recordings"),
        (one.cpu_model != other.cpu_model, "they are of different CPU models"),
        (one.tick != other.tick, "they count different ticks"),
        (one.contents != other.contents, "they were made with different contents"),
        (one.filters != other.filters, "they were made with different filters"),
    ];
    match differences.into_iter().find(|(differs, _)| *differs) {
        Some((_, what)) => Err(TraceError::Mismatch(what.to_owned())),
        None => Ok(()),
    }
}
