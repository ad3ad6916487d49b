//! Instructions that one engine refuses and the software CPU executes.

use reprise_assist::Assisted;
use reprise_cpu::engine::SoftEngine;
use reprise_trace::event::Event;

use crate::guest::{Guest, SOFT_TIME, assert_same_run};
use crate::refuser::Refuser;

const GUESTS: [(Guest<'static>, u64); 4] = [
    (Guest { name: "hello", cmdline: "", typed: "" }, 3),
    (Guest { name: "ticks", cmdline: "hz=18000 count=40 poll=40", typed: "" }, 400),
    (Guest { name: "echo", cmdline: "", typed: "first line\rsecond line\rquit\r" }, 100),
    (Guest { name: "positions", cmdline: "do=rep count=8", typed: "" }, 200),
];

/// Whatever is refused, the run is the one without any refusal: I/O goes to the same board, faults are
/// delivered, every tick is what it was.
#[test]
fn refusals_at_random_change_nothing() {
    for (guest, one_in) in GUESTS {
        let plain = guest.record(SOFT_TIME, Vec::new(), SoftEngine::new);
        for seed in 0..3 {
            let what = format!("{}, seed {seed}", guest.name);
            let make = |seed| move |ram| Ok(Assisted::new(Refuser::new(ram, seed, one_in)?));
            let assisted = guest.replay(SOFT_TIME, &plain.records, make(seed));
            assert_same_run(&plain.outcome, &assisted, &what);
            let count: u64 = assisted.assists.values().sum();
            assert!(count > 10, "{what}: {count} assists");
        }
    }
}

#[test]
fn a_recording_says_what_was_assisted_and_replays_with_and_without() {
    let (guest, one_in) = GUESTS[1];
    let make = |seed| move |ram| Ok(Assisted::new(Refuser::new(ram, seed, one_in)?));
    let recorded = guest.record(SOFT_TIME, Vec::new(), make(1));
    let before_end = &recorded.records[recorded.records.len() - 2].event;
    assert_eq!(before_end, &Event::Assists(recorded.outcome.assists.clone()));
    let again = guest.replay(SOFT_TIME, &recorded.records, make(1));
    assert_same_run(&recorded.outcome, &again, "the same refusals");
    assert_eq!(recorded.outcome.assists, again.assists);
    let plain = guest.replay(SOFT_TIME, &recorded.records, SoftEngine::new);
    assert_same_run(&recorded.outcome, &plain, "no refusal");
    assert_eq!(recorded.outcome.events, plain.events);
    assert!(plain.assists.is_empty());
}
