//! Bisections as commands run them: watched by a person who may stop them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use indicatif::{MultiProgress, ProgressBar};
use reprise_bisect::Watch;
use reprise_host::StopRequests;

use crate::output::Output;

/// A bar for each machine, and Ctrl-C.
pub struct Watched {
    bars: [ProgressBar; 2],
    /// Keeps the bars on lines of their own.
    _both: MultiProgress,
    stop: Arc<AtomicBool>,
    _signals: StopRequests,
}

impl Watched {
    /// Watches from now on. `names` are what the two sides are called.
    ///
    /// # Errors
    /// If the host refuses signal handlers.
    pub fn start(output: Output, names: [&str; 2]) -> Result<Self> {
        let both = MultiProgress::new();
        let widest = names.iter().map(|name| name.len()).max().unwrap_or(0);
        // Each is drawn for the first time when it has its line.
        let bars = names.map(|name| {
            let bar = both.add(output.hidden_bar());
            bar.set_message(format!("{name:widest$}"));
            bar
        });
        let stop = Arc::<AtomicBool>::default();
        let signals = StopRequests::watch(stop.clone())?;
        Ok(Self { bars, _both: both, stop, _signals: signals })
    }
}

impl Watch for Watched {
    fn progress(&mut self, side: usize, tick: u64, until: u64) {
        let bar = &self.bars[side];
        bar.set_length(until);
        bar.set_position(tick);
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.bars.iter().for_each(ProgressBar::finish_and_clear);
    }
}
