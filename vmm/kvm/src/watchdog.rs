//! Kicks a guest that runs for too long.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use reprise_machine::engine::Kick;

/// How often the thread looks in one time limit.
const LOOKS: u32 = 10;

/// What the two threads share.
#[derive(Default)]
struct Shared {
    /// The number of the run in progress; zero where there is none.
    running: AtomicU64,
    /// The number of the last run that took too long.
    expired: AtomicU64,
    stopped: AtomicBool,
}

/// A thread that kicks an engine whose run takes longer than a limit. Beginning and ending a run
/// costs a store each.
pub(crate) struct Watchdog {
    shared: Arc<Shared>,
    runs: u64,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Watches runs of the engine behind `kick`; a run may take `limit`, and a tenth more.
    pub(crate) fn start(kick: Arc<dyn Kick>, limit: Duration) -> Self {
        let shared = Arc::new(Shared::default());
        let watched = shared.clone();
        let thread = std::thread::spawn(move || watch(&watched, &*kick, limit));
        Self { shared, runs: 0, thread: Some(thread) }
    }

    /// A run begins.
    pub(crate) fn begin(&mut self) {
        self.runs += 1;
        self.shared.running.store(self.runs, Ordering::SeqCst);
    }

    /// Whether the run in progress has taken too long.
    pub(crate) fn expired(&self) -> bool {
        self.shared.expired.load(Ordering::SeqCst) == self.runs
    }

    /// The run is over.
    pub(crate) fn end(&mut self) {
        self.shared.running.store(0, Ordering::SeqCst);
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It has nothing to say, not even by a panic.
            let _ = thread.join();
        }
    }
}

fn watch(shared: &Shared, kick: &dyn Kick, limit: Duration) {
    let (mut seen, mut looks) = (0, 0);
    while !shared.stopped.load(Ordering::SeqCst) {
        std::thread::park_timeout(limit / LOOKS);
        let running = shared.running.load(Ordering::SeqCst);
        looks = if running == seen { looks + 1 } else { 0 };
        seen = running;
        if running != 0 && looks > LOOKS {
            shared.expired.store(running, Ordering::SeqCst);
            kick.kick();
        }
    }
}
