//! Hands batches to an observer on a thread of its own, so that a producer only fills vectors.

use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::{self, JoinHandle};

use reprise_trace::instructions::{Batch, Contents, Feed, Observer, TraceError};

/// Batches that may wait: with the one that the observer works on and the one that is being filled,
/// so many and two more exist at a time.
const WAITING_BATCHES: usize = 2;

/// An observer on a thread of its own.
#[derive(Debug)]
pub struct Background<O> {
    batches: Option<SyncSender<Batch>>,
    used: Receiver<Batch>,
    thread: Option<JoinHandle<(O, Result<(), TraceError>)>>,
}

impl<O: Observer + Send + 'static> Background<O> {
    /// Starts the thread. `observer` has begun already.
    ///
    /// # Errors
    /// If the host refuses a thread.
    pub fn start(contents: Contents, mut observer: O) -> Result<Self, TraceError> {
        let (batches, incoming) = sync_channel::<Batch>(WAITING_BATCHES);
        let (give_back, used) = sync_channel(WAITING_BATCHES + 2);
        let work = move || {
            let mut feed = Feed::new(contents);
            for mut batch in incoming {
                if let Err(error) = feed.push(&batch, &mut observer) {
                    return (observer, Err(error));
                }
                batch.clear();
                match give_back.try_send(batch) {
                    Ok(()) | Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {}
                }
            }
            let ended = observer.end();
            (observer, ended)
        };
        let thread = thread::Builder::new().name("trace".to_owned()).spawn(work);
        let thread = Some(thread.map_err(TraceError::Write)?);
        Ok(Self { batches: Some(batches), used, thread })
    }

    /// Hands over a full batch and gives an empty one, which has the memory of an earlier one where
    /// there is one. Waits while the observer is behind. False means that the observer has failed:
    /// [`Background::finish`] tells why.
    pub fn exchange(&mut self, batch: &mut Batch) -> bool {
        let empty = self.used.try_recv().unwrap_or_default();
        let full = std::mem::replace(batch, empty);
        self.batches.as_ref().is_some_and(|batches| batches.send(full).is_ok())
    }

    /// Waits until the observer has seen everything and the trace's end, and gives it back, with what
    /// made it fail.
    ///
    /// # Errors
    /// If the thread panicked; what the observer itself says is in the pair.
    pub fn finish(mut self) -> Result<(O, Result<(), TraceError>), TraceError> {
        drop(self.batches.take());
        let thread = self.thread.take().ok_or(TraceError::Contract("a trace ends once"))?;
        thread.join().map_err(|_| TraceError::Contract("the trace's observer panicked"))
    }
}

impl<O> Drop for Background<O> {
    fn drop(&mut self) {
        drop(self.batches.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
