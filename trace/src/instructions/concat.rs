//! Joins the shares of one expansion into the trace that a single process would have written.
//!
//! Segments need no other, so they are copied as they are. What is refused: a share that is missing, of
//! another expansion, in the wrong place, or not whole.

use std::io::{Read, Write};

use super::TraceError;
use super::filter::LeftOut;
use super::frames::{Share, TraceHeader};
use super::head::SegmentOptions;
use super::reader::{Ending, TraceReader, check_kinship};
use super::writer::TraceWriter;

/// Checks that these are the headers of all shares of one expansion, in order, and gives the header of
/// the whole.
///
/// # Errors
/// With the number, from 0, of the first header that is out of place.
pub fn joined_header(headers: &[TraceHeader]) -> Result<TraceHeader, (usize, TraceError)> {
    let mismatch = |index, what: String| Err((index, TraceError::Mismatch(what)));
    let Some(first) = headers.first() else {
        return mismatch(0, "there is none".to_owned());
    };
    let mut before: Option<Share> = None;
    for (index, header) in headers.iter().enumerate() {
        check_kinship(first, header).map_err(|error| (index, error))?;
        let Some(share) = header.share else {
            return mismatch(
                index,
                "it is no share: `expand --segment I/N` makes those".to_owned(),
            );
        };
        let Share { number, count, first_tick, .. } = share;
        let due = before.map_or(1, |before| before.number.saturating_add(1));
        if before.is_some_and(|before| before.count != count) {
            let what = format!("it is one of {count} shares, and those before it are not");
            return mismatch(index, what);
        }
        if number != due {
            let what = format!("it is share {number} of {count} where share {due} is due");
            return mismatch(index, what);
        }
        if let Some(before) = before.filter(|before| before.end_tick != first_tick) {
            let end = before.end_tick;
            let what =
                format!("it begins at tick {first_tick}, and the share before ends at {end}");
            return mismatch(index, what);
        }
        before = Some(share);
    }
    match before {
        Some(Share { number, count, .. }) if number < count => {
            let due = number + 1;
            mismatch(headers.len() - 1, format!("share {due} of {count} is due behind it"))
        }
        _ => Ok(TraceHeader { share: None, ..first.clone() }),
    }
}

/// Writes the trace that shares make together.
#[derive(Debug)]
pub struct Concat<W: Write> {
    header: TraceHeader,
    writer: TraceWriter<W>,
    left_out: LeftOut,
    /// Other notes of the shares, none twice.
    notes: Vec<String>,
}

impl<W: Write> Concat<W> {
    /// Starts a trace with the header that [`joined_header`] gave.
    ///
    /// # Errors
    /// If `out` cannot be written.
    pub fn create(out: W, header: TraceHeader) -> Result<Self, TraceError> {
        let writer = TraceWriter::create(out, &header, SegmentOptions::default())?;
        Ok(Self { header, writer, left_out: LeftOut::default(), notes: Vec::new() })
    }

    /// Appends the next share.
    ///
    /// # Errors
    /// If it is damaged, not whole, or begins elsewhere than the one before it ends; or if the trace
    /// cannot be written.
    pub fn append<R: Read>(&mut self, share: &mut TraceReader<R>) -> Result<(), TraceError> {
        let again = "expand that share again";
        let Ending::Complete { notes } = share.append_to(&self.header, &mut self.writer)? else {
            return Err(TraceError::Mismatch(format!("it is cut short: {again}")));
        };
        let end = self.writer.next_instruction();
        // An expansion that was stopped is a sound trace, but less than its share.
        if let Some(Share { first_tick, end_tick, end_instruction: Some(due), .. }) =
            share.header().share
            && first_tick < end_tick
            && end != due
        {
            let what = format!("it ends at instruction {end}, and its share at {due}: {again}");
            return Err(TraceError::Mismatch(what));
        }
        for note in notes {
            if !self.left_out.add_note(&note) && !self.notes.contains(&note) {
                self.notes.push(note);
            }
        }
        Ok(())
    }

    /// What has been written.
    pub fn writer(&self) -> &TraceWriter<W> {
        &self.writer
    }

    /// Ends the trace.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn finish(self) -> Result<W, TraceError> {
        let notes = [self.left_out.notes(), self.notes].concat();
        self.writer.finish(&notes)
    }
}
