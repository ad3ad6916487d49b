//! A world outside that follows from a seed: its clock goes on while the guest runs and while it
//! sleeps, somebody types, and the log is flushed now and then.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use reprise_machine::host::{Host, Wake};
use reprise_random::Random;
use reprise_trace::event::Ending;

/// So long at most does somebody think before typing on, unless told otherwise.
pub(crate) const LONGEST_PAUSE_NS: u64 = 3_000_000;
/// Bytes typed at once, at most.
const LONGEST_BURST: u64 = 6;

/// What the recording machine's host is in these tests.
pub(crate) struct SeededWorld {
    /// Goes on while the guest runs.
    guest_clock_ns: Arc<AtomicU64>,
    slept_ns: u64,
    random: Random,
    script: VecDeque<u8>,
    next_typed_ns: u64,
    longest_pause_ns: u64,
    /// When somebody stops the run.
    stops_ns: u64,
    /// What the guest wrote on its console.
    pub(crate) console: Vec<u8>,
}

impl SeededWorld {
    pub(crate) fn new(seed: u64, script: &str, guest_clock_ns: Arc<AtomicU64>) -> Self {
        Self {
            guest_clock_ns,
            slept_ns: 0,
            random: Random::new(seed ^ 0x0077_6f72_6c64),
            script: script.bytes().collect(),
            next_typed_ns: 0,
            longest_pause_ns: LONGEST_PAUSE_NS,
            stops_ns: u64::MAX,
            console: Vec::new(),
        }
    }

    /// Has somebody stop the run then.
    pub(crate) fn stopping_at(self, stops_ns: Option<u64>) -> Self {
        Self { stops_ns: stops_ns.unwrap_or(u64::MAX), ..self }
    }

    /// Has somebody type on after so long at most.
    pub(crate) fn typing_within(self, longest_pause_ns: u64) -> Self {
        Self { longest_pause_ns, ..self }
    }

    fn clock_ns(&self) -> u64 {
        self.guest_clock_ns.load(Ordering::Relaxed) + self.slept_ns
    }
}

impl Host for SeededWorld {
    fn now_ns(&mut self) -> u64 {
        self.clock_ns()
    }

    fn take_console_input(&mut self, room: usize) -> Vec<u8> {
        if self.script.is_empty() || self.clock_ns() < self.next_typed_ns {
            return Vec::new();
        }
        self.next_typed_ns = self.clock_ns() + self.random.below(self.longest_pause_ns);
        let burst = 1 + self.random.below(LONGEST_BURST) as usize;
        self.script.drain(..burst.min(room).min(self.script.len())).collect()
    }

    fn input_may_come(&mut self) -> bool {
        !self.script.is_empty()
    }

    fn wait(&mut self, timeout_ns: Option<u64>) -> Wake {
        let timeout_ns = timeout_ns.unwrap_or(LONGEST_PAUSE_NS);
        if self.random.one_in(4) {
            self.slept_ns += self.random.below(timeout_ns.max(1));
            return Wake::Look;
        }
        self.slept_ns += timeout_ns;
        Wake::Timeout
    }

    fn console_output(&mut self, bytes: &[u8]) {
        self.console.extend_from_slice(bytes);
    }

    fn stop_requested(&mut self) -> Option<Ending> {
        (self.clock_ns() >= self.stops_ns).then_some(Ending::Stopped)
    }

    fn flush_due(&mut self) -> bool {
        self.random.one_in(50)
    }

    fn progress(&mut self, _tick: u64, _virtual_ns: u64) {}
}
