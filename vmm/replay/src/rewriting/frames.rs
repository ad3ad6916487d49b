//! A log in memory, until there is a header for it.

use std::io::Write;

use reprise_trace::log::{FrameSink, LogError};
use reprise_trace::recording::RecordingWriter;

/// Frames of encoded records, and how many are in each.
#[derive(Debug, Default)]
pub(super) struct Frames(Vec<(Vec<u8>, u32)>);

impl Frames {
    /// Writes them behind a recording's images.
    pub(super) fn write<W: Write>(self, to: &mut RecordingWriter<W>) -> Result<(), LogError> {
        self.0.into_iter().try_for_each(|(records, count)| to.write_log_frame(records, count))
    }
}

impl FrameSink for Frames {
    fn write_frame(&mut self, records: Vec<u8>, record_count: u32) -> Result<(), LogError> {
        self.0.push((records, record_count));
        Ok(())
    }
}
