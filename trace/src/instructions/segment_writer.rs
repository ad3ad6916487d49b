//! Encodes segments and hands each on as it is whole: for whoever makes a trace of several pieces at
//! once and joins them in order ([`super::TraceWriter::append_segment`]).

use super::encode::SegmentEncoder;
use super::event::Event;
use super::head::{SegmentHead, SegmentOptions};
use super::run::{Observer, PlainRuns, Position, Run};
use super::{Contents, TraceError};

/// A segment of a trace, encoded. It needs no other to be read.
#[derive(Debug)]
pub struct EncodedSegment {
    pub(super) head: SegmentHead,
    pub(super) bytes: Vec<u8>,
}

/// Encodes what it observes. Its segments are those that a [`super::TraceWriter`] would write which had
/// just been cut.
pub struct SegmentWriter<S> {
    encoder: SegmentEncoder,
    sink: S,
}

impl<S> std::fmt::Debug for SegmentWriter<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SegmentWriter").finish_non_exhaustive()
    }
}

impl<S: FnMut(EncodedSegment) -> Result<(), TraceError>> SegmentWriter<S> {
    /// Hands segments to `sink`.
    ///
    /// # Errors
    /// If the options are none that a segment may have.
    pub fn new(contents: Contents, options: SegmentOptions, sink: S) -> Result<Self, TraceError> {
        Ok(Self { encoder: SegmentEncoder::new(contents, options, Position::default())?, sink })
    }

    fn cut(&mut self) -> Result<(), TraceError> {
        if self.encoder.is_empty() {
            return Ok(());
        }
        let (head, bytes) = self.encoder.finish()?;
        (self.sink)(EncodedSegment { head, bytes })
    }
}

impl<S: FnMut(EncodedSegment) -> Result<(), TraceError>> Observer for SegmentWriter<S> {
    fn begin(&mut self, position: &Position) -> Result<(), TraceError> {
        self.encoder.restart(*position);
        Ok(())
    }

    fn new_blocks(&mut self) {
        self.encoder.new_blocks();
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        if self.encoder.run(run)? { self.cut() } else { Ok(()) }
    }

    fn runs(&mut self, runs: &mut PlainRuns<'_>) -> Result<(), TraceError> {
        while self.encoder.runs(runs)? {
            self.cut()?;
        }
        Ok(())
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        if self.encoder.event(event) { self.cut() } else { Ok(()) }
    }

    fn end(&mut self) -> Result<(), TraceError> {
        self.cut()
    }
}
