//! A trace that one thread reads and decodes while another looks at it.

use std::io::Read;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;

use super::batch::Batch;
use super::block::Blocks;
use super::feed::walk;
use super::reader::{Ending, TraceReader};
use super::run::{Observer, Position};
use super::{Contents, Event, TraceError};

/// Pieces that may wait for the observer: a few MiB.
const WAITING_PIECES: usize = 6;

/// What reading a segment gives, in order.
pub(super) enum Piece {
    /// The trace begins.
    Begin(Position),
    /// Something between two segments.
    Event(Event),
    /// The blocks of a segment, which begins.
    Segment(Arc<Blocks>),
    /// A part of the segment.
    Batch(Batch),
}

/// Shows pieces to an observer.
pub(super) struct Showing<'a, O: ?Sized> {
    pub(super) contents: Contents,
    pub(super) blocks: Arc<Blocks>,
    pub(super) observer: &'a mut O,
}

impl<O: Observer + ?Sized> Showing<'_, O> {
    /// Takes the next piece and gives an empty batch, which has the memory of the piece's.
    pub(super) fn take(&mut self, piece: Piece) -> Result<Batch, TraceError> {
        match piece {
            Piece::Begin(position) => self.observer.begin(&position)?,
            Piece::Event(event) => self.observer.event(&event)?,
            Piece::Segment(blocks) => {
                self.blocks = blocks;
                self.observer.new_blocks();
            }
            Piece::Batch(mut batch) => {
                walk(&self.blocks, self.contents, &batch, self.observer)?;
                batch.clear();
                return Ok(batch);
            }
        }
        Ok(Batch::default())
    }
}

/// What the reading thread tells.
enum Message {
    /// A segment, or the end, comes next: at this file offset.
    At(u64),
    Piece(Piece),
}

/// The observer has seen enough, or has failed.
const NOBODY_LOOKS: TraceError = TraceError::Contract("nobody looks at the trace any more");

impl<R: Read + Send> TraceReader<R> {
    /// As [`TraceReader::drive_segment`] to the end, but reading and decoding have a thread of their own.
    /// `observer` is shown the very same. Before each segment, and the end, `goes_on` is told where in the
    /// file it is; if it says no, this gives `None`.
    ///
    /// # Errors
    /// As [`TraceReader::drive`].
    pub fn drive_ahead<O: Observer + ?Sized>(
        &mut self,
        observer: &mut O,
        mut goes_on: impl FnMut(&mut O, u64) -> bool,
    ) -> Result<Option<Ending>, TraceError> {
        let contents = self.header().contents;
        let (send, receive) = sync_channel(WAITING_PIECES);
        let (give_back, used) = sync_channel::<Batch>(WAITING_PIECES);
        let empty = move || used.try_recv().unwrap_or_default();
        thread::scope(|scope| {
            let reading = scope.spawn(move || self.read_ahead(&send, empty));
            let mut showing = Showing { contents, blocks: Arc::default(), observer };
            let mut stopped = None;
            for message in &receive {
                match message {
                    Message::At(offset) if goes_on(showing.observer, offset) => {}
                    Message::At(_) => stopped = Some(Ok(None)),
                    Message::Piece(piece) => match showing.take(piece) {
                        // The reader may have gone already.
                        Ok(batch) => drop(give_back.try_send(batch)),
                        Err(error) => stopped = Some(Err(error)),
                    },
                }
                if stopped.is_some() {
                    break;
                }
            }
            // Ends the reading thread, if it still has something to say.
            drop(receive);
            let ended = reading.join().unwrap_or_else(|panic| resume_unwind(panic));
            stopped.unwrap_or_else(|| ended.map(Some))
        })
    }

    fn read_ahead(
        &mut self,
        send: &SyncSender<Message>,
        empty: impl Fn() -> Batch,
    ) -> Result<Ending, TraceError> {
        let tell = |message| send.send(message).map_err(|_| NOBODY_LOOKS);
        loop {
            tell(Message::At(self.offset()))?;
            let ending = self.next_pieces(&mut |piece| {
                tell(Message::Piece(piece))?;
                Ok(empty())
            })?;
            if let Some(ending) = ending {
                return Ok(ending);
            }
        }
    }
}
