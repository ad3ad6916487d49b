//! The branch clock on simulated hardware: recorded under one seed, replayed under others that kick
//! elsewhere, interrupt later, forget translations and set accessed bits at other times.

mod case;
mod world;

use reprise::boot::GuestSource;
use reprise_guest_images::{COMPUTE_AT_SCALE_1, embedded};

use case::{Case, Hardware, assert_equal};

fn guest<'a>(name: &str, cmdline: &'a str, typed: &'a str) -> Case<'a> {
    let guest = embedded(name).expect("it is listed");
    let source = GuestSource { kernel: guest.image, initrd: None, cmdline };
    Case { source, ram_mib: 32, typed }
}

/// Records under seed 1 and replays under `seeds` others.
fn replays_under(case: &Case<'_>, expected: &str, seeds: std::ops::Range<u64>) {
    let recorded = case.record(&Hardware::intel(1));
    let outcome = &recorded.outcome;
    eprintln!(
        "{} ticks, {} records, {} interrupts, {:?}",
        outcome.ticks,
        recorded.records.len(),
        outcome.interrupts,
        recorded.counts
    );
    assert!(recorded.console.contains(expected), "{:?}", recorded.console);
    for seed in seeds {
        let (replay, counts) = case.replay(&recorded.records, &Hardware::intel(seed));
        if seed % 20 == 0 {
            eprintln!("seed {seed}: {counts:?}");
        }
        let replay = replay.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        let attempt = std::panic::AssertUnwindSafe(|| assert_equal(outcome, &replay));
        if let Err(panic) = std::panic::catch_unwind(attempt) {
            eprintln!("failed with seed {seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn ticks_replays_under_a_hundred_seeds() {
    replays_under(&guest("ticks", "hz=2000 count=40 poll=100", ""), "ticks: ", 2..102);
}

#[test]
fn echo_replays_under_a_hundred_seeds() {
    let case = guest("echo", "", "first line\rsecond line\rquit\r");
    replays_under(&case, "echo: 28 bytes", 2..102);
}

#[test]
fn compute_replays_under_other_seeds() {
    replays_under(&guest("compute", "scale=1", ""), COMPUTE_AT_SCALE_1, 2..6);
}
