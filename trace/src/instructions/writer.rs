//! Writes a trace file.

use std::io::Write;

use super::encode::SegmentEncoder;
use super::frames::{
    End, FORMAT_VERSION, FrameKind, IndexEntry, Totals, TraceHeader, footer, preamble, write_frame,
};
use super::head::{SegmentHead, SegmentOptions};
use super::run::{Observer, PlainRuns, Position, Run};
use super::segment_writer::EncodedSegment;
use super::{Event, TraceError};

/// Writes a trace. Segments go out whole; a writer that is killed leaves what it had written, and that
/// opens. It never seeks, so `out` may be a pipe. It makes many small writes only at the
/// beginning and the end: no buffer is needed around `out`.
pub struct TraceWriter<W: Write> {
    out: W,
    encoder: SegmentEncoder,
    end: End,
    bytes: u64,
    begun: bool,
    /// Something could not be written: the last segment may be half there.
    failed: bool,
}

impl<W: Write> std::fmt::Debug for TraceWriter<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TraceWriter")
            .field("end", &self.end)
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

impl<W: Write> TraceWriter<W> {
    /// Starts a trace on an empty `out`.
    ///
    /// # Errors
    /// If `out` cannot be written, or the header has more text than a trace may hold.
    pub fn create(
        mut out: W,
        header: &TraceHeader,
        options: SegmentOptions,
    ) -> Result<Self, TraceError> {
        let header_bytes = header.encode()?;
        let preamble = preamble(FORMAT_VERSION);
        out.write_all(&preamble).map_err(TraceError::Write)?;
        let frame_bytes = write_frame(&mut out, FrameKind::Header, &header_bytes)?;
        Ok(Self {
            out,
            encoder: SegmentEncoder::new(header.contents, options, Position::default())?,
            end: End::default(),
            bytes: preamble.len() as u64 + frame_bytes,
            begun: false,
            failed: false,
        })
    }

    /// What has been written, the segment under construction apart.
    pub fn totals(&self) -> Totals {
        self.end.totals
    }

    /// Bytes written so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The number of the next instruction.
    pub fn next_instruction(&self) -> u64 {
        self.encoder.position().instruction
    }

    /// Ends the segment under construction, so that the next one begins here.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn cut(&mut self) -> Result<(), TraceError> {
        if self.encoder.is_empty() {
            return Ok(());
        }
        let (head, bytes) = self.encoder.finish()?;
        self.put_segment(&head, &bytes)
    }

    /// Appends a segment that was encoded elsewhere, with the same contents.
    ///
    /// # Errors
    /// If it cannot be written, or does not begin where the segment before it ended.
    pub fn append_segment(&mut self, segment: &EncodedSegment) -> Result<(), TraceError> {
        self.append(&segment.head, &segment.bytes)
    }

    /// Appends a segment of another trace with the same contents, as it is.
    ///
    /// # Errors
    /// If it cannot be written, or does not begin where the segment before it ended.
    pub(super) fn append(&mut self, head: &SegmentHead, bytes: &[u8]) -> Result<(), TraceError> {
        self.cut()?;
        let position = self.encoder.position();
        if self.begun && head.start.instruction != position.instruction {
            return Err(TraceError::Mismatch(format!(
                "it goes on at instruction {}, and what is before it ends at {}: give all shares, \
                 in order",
                head.start.instruction, position.instruction
            )));
        }
        self.put_segment(head, bytes)?;
        self.encoder.restart(Position { instruction: head.end(), ..head.start });
        self.begun = true;
        Ok(())
    }

    /// Ends the trace: the last segment, totals, notes, index, footer. A file's owner then syncs it.
    /// `notes` say what the trace is without, a line each.
    ///
    /// # Errors
    /// If the trace cannot be written.
    pub fn finish(mut self, notes: &[String]) -> Result<W, TraceError> {
        self.cut()?;
        self.end.notes = notes.to_vec();
        self.end.end_instruction = self.encoder.position().instruction;
        let footer = footer(self.bytes);
        let end = self.end.encode()?;
        write_frame(&mut self.out, FrameKind::End, &end)?;
        self.out.write_all(&footer).map_err(TraceError::Write)?;
        self.out.flush().map_err(TraceError::Write)?;
        Ok(self.out)
    }

    fn put_segment(&mut self, head: &SegmentHead, bytes: &[u8]) -> Result<(), TraceError> {
        if self.failed {
            return Err(TraceError::Contract("a trace goes on after it could not be written"));
        }
        self.failed = true;
        let frame_bytes = write_frame(&mut self.out, FrameKind::Segment, bytes)?;
        self.out.flush().map_err(TraceError::Write)?;
        self.failed = false;
        self.end.entries.push(IndexEntry::new(self.bytes, head));
        self.end.totals.add(head);
        self.bytes += frame_bytes;
        Ok(())
    }
}

impl<W: Write> Observer for TraceWriter<W> {
    fn begin(&mut self, position: &Position) -> Result<(), TraceError> {
        if self.begun || !self.encoder.is_empty() {
            return Err(TraceError::Contract("a trace begins once"));
        }
        self.begun = true;
        self.encoder.restart(*position);
        Ok(())
    }

    fn new_blocks(&mut self) {
        self.encoder.new_blocks();
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        self.begun = true;
        if self.encoder.run(run)? { self.cut() } else { Ok(()) }
    }

    fn runs(&mut self, runs: &mut PlainRuns<'_>) -> Result<(), TraceError> {
        self.begun |= !runs.words.is_empty();
        while self.encoder.runs(runs)? {
            self.cut()?;
        }
        Ok(())
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        self.begun = true;
        if self.encoder.event(event) { self.cut() } else { Ok(()) }
    }

    fn end(&mut self) -> Result<(), TraceError> {
        self.cut()
    }
}
