//! Ctrl-C and its like for work without a guest at a terminal: somebody is told, and may end in order.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::EventFd;

use crate::HostError;
use crate::terminal::StopSignals;

/// Signals that ask the process to end set a flag while this value lives. The third ends the process.
#[derive(Debug)]
pub struct StopRequests {
    signals: Option<StopSignals>,
    wake: EventFd,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl StopRequests {
    /// Sets `flag` when somebody asks.
    ///
    /// # Errors
    /// If the host refuses an eventfd, a signal handler or a thread.
    pub fn watch(flag: Arc<AtomicBool>) -> Result<Self, HostError> {
        let wake = EventFd::new(0).map_err(HostError::system("an eventfd"))?;
        let signals = StopSignals::route_to(&wake)?;
        let waiting = wake.try_clone().map_err(HostError::system("an eventfd"))?;
        let over = Arc::new(AtomicBool::new(false));
        let seen_over = over.clone();
        let wait = move || {
            if waiting.read().is_ok() && !seen_over.load(Ordering::SeqCst) {
                flag.store(true, Ordering::SeqCst);
            }
        };
        let thread = std::thread::Builder::new().name("signals".to_owned()).spawn(wait);
        let thread = thread.map_err(HostError::system("a thread"))?;
        Ok(Self { signals: Some(signals), wake, over, thread: Some(thread) })
    }
}

impl Drop for StopRequests {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        // The handlers go before the descriptor that they write to.
        drop(self.signals.take());
        let woken = self.wake.write(1);
        if let (Ok(()), Some(thread)) = (woken, self.thread.take()) {
            // It only waits for what has just been written.
            let _ = thread.join();
        }
    }
}
