//! A trace goes to its sink as it is made, also while one instruction asks the board again and again.

mod guest;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use guest::Guest;
use reprise_cpu::tracing::BatchSink;
use reprise_machine::engine::{Engine, Exit};
use reprise_trace::cpu_state::{RCX, RDX, RSI};
use reprise_trace::instructions::{Batch, Contents};

/// REP OUTSB, HLT.
const CODE: &[u8] = &[0xf3, 0x6e, 0xf4];
const ELEMENTS: u64 = 50_000;
/// Words of a batch, at most, with some to spare.
const BOUND: usize = 70_000;

/// Takes so many batches.
struct Taking {
    batches: usize,
    most_words: Arc<AtomicUsize>,
}

impl BatchSink for Taking {
    fn exchange(&mut self, batch: Batch, _tick: u64) -> Option<Batch> {
        self.most_words.fetch_max(batch.words.len(), Ordering::Relaxed);
        self.batches = self.batches.checked_sub(1)?;
        Some(Batch::default())
    }
}

/// Runs until the guest halts or the engine fails: how often it asked the board, whether it halted, and
/// the most words of a batch.
fn run(batches: usize) -> (u64, bool, usize) {
    let mut engine = Guest::long()
        .code(CODE)
        .with(|guest| {
            guest.state.gpr[RCX] = ELEMENTS;
            guest.state.gpr[RDX] = 0x80;
            guest.state.gpr[RSI] = guest::KERNEL_DATA;
        })
        .engine();
    let most_words = Arc::new(AtomicUsize::new(0));
    let sink = Taking { batches, most_words: most_words.clone() };
    engine.start_trace(Box::new(sink), Contents::default());
    let mut accesses = 0;
    let halted = loop {
        match engine.run(1000) {
            Ok(Exit::Access(_)) => {
                accesses += 1;
                engine.finish_access(0).expect("an answer");
            }
            Ok(exit) => {
                assert_eq!(exit, Exit::Halt);
                break true;
            }
            Err(_) => break false,
        }
    };
    engine.stop_trace();
    (accesses, halted, most_words.load(Ordering::Relaxed))
}

#[test]
fn a_repetition_at_a_port_is_handed_over_as_it_goes() {
    let (accesses, halted, most_words) = run(usize::MAX);
    assert!(halted && accesses == ELEMENTS, "{accesses} accesses");
    assert!(most_words <= BOUND, "{most_words} words in one batch");
}

#[test]
fn a_repetition_at_a_port_can_be_stopped() {
    let (accesses, halted, _) = run(0);
    assert!(
        !halted && accesses < ELEMENTS / 2,
        "{accesses} accesses, though nobody wants the trace"
    );
}
