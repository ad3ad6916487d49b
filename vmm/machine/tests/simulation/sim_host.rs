//! A world outside that is made up from a seed: a clock, somebody who types, a stop.

use std::collections::VecDeque;

use reprise_machine::host::{Host, Wake};
use reprise_trace::event::Ending;
use reprise_trace::log::{FrameSink, LogError, MemorySink};

use reprise_random::Random;

/// How the world outside behaves.
#[derive(Clone, Debug)]
pub(crate) struct World {
    pub(crate) seed: u64,
    /// Bytes typed in all; then the input is closed.
    pub(crate) typed_bytes: u64,
    /// Somebody asks to stop at this host time.
    pub(crate) stop_at_ns: Option<u64>,
}

impl World {
    /// Somebody types, and the guest comes to its own end.
    pub(crate) fn typing(seed: u64) -> Self {
        let mut random = Random::new(seed ^ 0x0077_6f72_6c64);
        let typed_bytes = [0, 5, 40, 300][random.below(4) as usize];
        Self { seed, typed_bytes, stop_at_ns: None }
    }

    /// Nobody is there.
    pub(crate) fn empty() -> Self {
        Self { seed: 0, typed_bytes: 0, stop_at_ns: None }
    }
}

pub(crate) struct SimHost {
    random: Random,
    now_ns: u64,
    next_typing_ns: u64,
    left_to_type: u64,
    waiting: VecDeque<u8>,
    stop_at_ns: Option<u64>,
    next_flush_ns: u64,
    pub(crate) output: Vec<u8>,
}

impl SimHost {
    pub(crate) fn new(world: &World) -> Self {
        let mut random = Random::new(world.seed);
        Self {
            now_ns: 0,
            next_typing_ns: random.below(100_000),
            left_to_type: world.typed_bytes,
            waiting: VecDeque::new(),
            stop_at_ns: world.stop_at_ns,
            next_flush_ns: 0,
            output: Vec::new(),
            random,
        }
    }

    /// Time passes; whoever types, types.
    fn pass(&mut self, ns: u64) {
        self.now_ns += ns;
        while self.left_to_type > 0 && self.next_typing_ns <= self.now_ns {
            let burst = if self.random.one_in(4) { 25 } else { 1 };
            for _ in 0..(1 + self.random.below(burst)).min(self.left_to_type) {
                self.waiting.push_back(self.random.next() as u8);
                self.left_to_type -= 1;
            }
            self.next_typing_ns += self.random.below(200_000);
        }
    }

    fn stop_due(&self) -> bool {
        self.stop_at_ns.is_some_and(|stop| stop <= self.now_ns)
    }
}

impl Host for SimHost {
    fn now_ns(&mut self) -> u64 {
        let ns = self.random.below(1_000);
        self.pass(ns);
        self.now_ns
    }

    fn take_console_input(&mut self, room: usize) -> Vec<u8> {
        assert!(room > 0, "asked for no bytes");
        let count = room.min(self.waiting.len());
        self.waiting.drain(..count).collect()
    }

    fn input_may_come(&mut self) -> bool {
        self.left_to_type > 0 || !self.waiting.is_empty()
    }

    fn wait(&mut self, timeout_ns: Option<u64>) -> Wake {
        let to_typing = match self.left_to_type {
            0 => None,
            _ => Some(self.next_typing_ns.saturating_sub(self.now_ns)),
        };
        let to_stop = self.stop_at_ns.map(|stop| stop.saturating_sub(self.now_ns));
        let to_look = match (to_typing, to_stop, self.waiting.is_empty()) {
            (_, _, false) => Some(0),
            (typing, stop, true) => typing.into_iter().chain(stop).min(),
        };
        let early = self.random.one_in(5).then(|| self.random.below(5_000));
        let to_look = to_look.into_iter().chain(early).min();
        match (to_look, timeout_ns) {
            (Some(look), Some(timeout)) if timeout <= look => {
                // A sleep takes a little longer than asked for.
                let late = self.random.below(300);
                self.pass(timeout + late);
                Wake::Timeout
            }
            (Some(look), _) => {
                self.pass(look);
                Wake::Look
            }
            (None, Some(timeout)) => {
                self.pass(timeout);
                Wake::Timeout
            }
            (None, None) => panic!("the machine sleeps for ever, and nobody will wake it"),
        }
    }

    fn console_output(&mut self, bytes: &[u8]) {
        self.output.extend_from_slice(bytes);
    }

    fn stop_requested(&mut self) -> Option<Ending> {
        self.stop_due().then_some(Ending::Stopped)
    }

    fn flush_due(&mut self) -> bool {
        let ns = self.random.below(100);
        self.pass(ns);
        let due = self.now_ns >= self.next_flush_ns;
        if due {
            self.next_flush_ns = self.now_ns + 50_000;
        }
        due
    }

    fn progress(&mut self, _tick: u64, _virtual_ns: u64) {}
}

/// A disk that is full after some frames.
pub(crate) struct FullDisk {
    pub(crate) kept: MemorySink,
    pub(crate) frames_left: usize,
}

impl FrameSink for &mut FullDisk {
    fn write_frame(&mut self, records: Vec<u8>, record_count: u32) -> Result<(), LogError> {
        if self.frames_left == 0 {
            return Err(LogError::Write(std::io::Error::from(std::io::ErrorKind::StorageFull)));
        }
        self.frames_left -= 1;
        self.kept.write_frame(records, record_count)
    }
}
