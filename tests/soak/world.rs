//! A world outside without a clock or chance: a script is typed as fast as the guest takes it, and time
//! passes only while somebody sleeps.

use std::collections::VecDeque;

use reprise_machine::host::{Host, Wake};
use reprise_trace::event::Ending;

/// Somebody who types a script.
pub(crate) struct Typist {
    left: VecDeque<u8>,
    now_ns: u64,
    /// What the guest wrote on its console.
    pub(crate) console: Vec<u8>,
}

impl Typist {
    pub(crate) fn new(script: &str) -> Self {
        Self { left: script.bytes().collect(), now_ns: 0, console: Vec::new() }
    }
}

impl Host for Typist {
    fn now_ns(&mut self) -> u64 {
        self.now_ns
    }

    fn take_console_input(&mut self, room: usize) -> Vec<u8> {
        self.left.drain(..room.min(self.left.len())).collect()
    }

    fn input_may_come(&mut self) -> bool {
        !self.left.is_empty()
    }

    fn wait(&mut self, timeout_ns: Option<u64>) -> Wake {
        match timeout_ns {
            Some(timeout_ns) => {
                self.now_ns += timeout_ns;
                Wake::Timeout
            }
            None => Wake::Look,
        }
    }

    fn console_output(&mut self, bytes: &[u8]) {
        self.console.extend_from_slice(bytes);
    }

    fn stop_requested(&mut self) -> Option<Ending> {
        None
    }

    fn flush_due(&mut self) -> bool {
        false
    }

    fn progress(&mut self, _tick: u64, _virtual_ns: u64) {}
}
