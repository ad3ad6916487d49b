//! From the CPU's batches to an observer: on the machine's thread, or on one of its own.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use reprise_cpu::tracing::BatchSink;
use reprise_export::background::Background;
use reprise_trace::instructions::{Batch, Contents, Feed, Observer, TraceError};

use crate::approach::Journey;

/// How many threads an expansion takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// The machine and the observer take turns.
    One,
    /// The observer has a thread of its own.
    Two,
}

/// What another thread sees of an expansion, and how it stops one. Clones are one and the same.
#[derive(Clone, Debug, Default)]
pub struct Control {
    stop: Arc<AtomicBool>,
    instructions: Arc<AtomicU64>,
    journey: Arc<Mutex<Option<Journey>>>,
}

impl Control {
    /// Ends the expansion soon. What the observer has seen by then is a whole, shorter trace; before the
    /// window there is none, and the expansion fails with [`crate::ExpandError::StoppedBefore`].
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Whether somebody has asked for that.
    pub fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// The flag behind [`Control::stop`], for a signal handler.
    pub fn stop_flag(&self) -> Arc<AtomicBool> {
        self.stop.clone()
    }

    /// How much of the way to a window is replayed, from 0 to 1; `None` if nothing is on its way there.
    pub fn approach(&self) -> Option<f64> {
        self.journey.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(Journey::fraction)
    }

    pub(crate) fn set_journey(&self, journey: Option<Journey>) {
        *self.journey.lock().unwrap_or_else(PoisonError::into_inner) = journey;
    }

    /// Instructions expanded so far, on all threads.
    pub fn instructions(&self) -> u64 {
        self.instructions.load(Ordering::Relaxed)
    }
}

enum Way<O> {
    InLine { feed: Feed, observer: O },
    OnThread(Background<O>),
}

/// Where the batches go.
struct Pipeline<O> {
    way: Way<O>,
    failure: Option<TraceError>,
}

/// The machine's end of a pipeline.
struct Sink<O> {
    pipeline: Arc<Mutex<Pipeline<O>>>,
    control: Control,
    /// Where the machine was at the last exchange.
    tick: u64,
}

/// The other end, which gets the observer back.
pub(crate) struct Receiver<O> {
    pipeline: Arc<Mutex<Pipeline<O>>>,
}

/// Lays a pipeline from a machine that stands at `tick` to `observer`, which has begun.
pub(crate) fn lay<O: Observer + Send + 'static>(
    observer: O,
    contents: Contents,
    threads: Threads,
    control: &Control,
    tick: u64,
) -> Result<(Box<dyn BatchSink>, Receiver<O>), TraceError> {
    let way = match threads {
        Threads::One => Way::InLine { feed: Feed::new(contents), observer },
        Threads::Two => Way::OnThread(Background::start(contents, observer)?),
    };
    let pipeline = Arc::new(Mutex::new(Pipeline { way, failure: None }));
    let sink = Sink { pipeline: pipeline.clone(), control: control.clone(), tick };
    Ok((Box::new(sink), Receiver { pipeline }))
}

impl<O: Observer + Send + 'static> BatchSink for Sink<O> {
    fn exchange(&mut self, mut batch: Batch, tick: u64) -> Option<Batch> {
        self.control.instructions.fetch_add(tick - self.tick, Ordering::Relaxed);
        self.tick = tick;
        let mut pipeline = self.pipeline.lock().unwrap_or_else(PoisonError::into_inner);
        let Pipeline { way, failure } = &mut *pipeline;
        let goes_on = match way {
            Way::InLine { feed, observer } => match feed.push(&batch, observer) {
                Ok(()) => {
                    batch.clear();
                    true
                }
                Err(error) => {
                    *failure = Some(error);
                    false
                }
            },
            Way::OnThread(background) => background.exchange(&mut batch),
        };
        (goes_on && !self.control.is_stopped()).then_some(batch)
    }
}

impl<O: Observer + Send + 'static> Receiver<O> {
    /// The observer, which has seen the end. The machine's end is gone already.
    ///
    /// # Errors
    /// What the observer failed with.
    pub(crate) fn finish(self) -> Result<O, TraceError> {
        let pipeline = Arc::into_inner(self.pipeline).expect("the machine has dropped its end");
        let Pipeline { way, failure } =
            pipeline.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some(failure) = failure {
            return Err(failure);
        }
        match way {
            Way::InLine { mut observer, .. } => {
                observer.end()?;
                Ok(observer)
            }
            Way::OnThread(background) => {
                let (observer, ended) = background.finish()?;
                ended?;
                Ok(observer)
            }
        }
    }
}
