//! The branch clock on simulated hardware: recorded under one seed, replayed under others that kick
//! elsewhere, interrupt later, forget translations and set accessed bits at other times; and replayed
//! on the software CPU, which finds every moment's instruction count.

mod accessed;
mod assisted;
mod case;
mod counting;
mod crossing;
mod kept;
mod linux;
mod makers;
mod met;
mod positions;
mod probe;
mod rewritten;
mod software;
mod third;
mod time_stamps;
mod watched;
mod world;
mod zen;

use reprise::boot::GuestSource;
use reprise_guest_images::{COMPUTE_AT_SCALE_1, embedded};

use case::{Case, Hardware, Recorded, assert_equal};
use world::LONGEST_PAUSE_NS;

pub(crate) fn guest<'a>(name: &str, cmdline: &'a str, typed: &'a str) -> Case<'a> {
    let guest = embedded(name).expect("it is listed");
    let source = GuestSource { kernel: guest.image, initrd: None, cmdline };
    Case { source, ram_mib: 32, typed, longest_pause_ns: LONGEST_PAUSE_NS, stops_ns: None }
}

fn recorded(case: &Case<'_>, hardware: &Hardware, expected: &str) -> Recorded {
    let recorded = case.record(hardware);
    let outcome = &recorded.outcome;
    eprintln!(
        "{} ticks, {} records, {} interrupts, {:?}",
        outcome.ticks,
        recorded.records.len(),
        outcome.interrupts,
        recorded.counts
    );
    assert!(recorded.console.contains(expected), "{:?}", recorded.console);
    recorded
}

/// Records under seed 1 and replays under others, and on the soft engine.
fn replays_under(case: &Case<'_>, expected: &str, seeds: std::ops::Range<u64>) {
    let recorded = recorded(case, &Hardware::intel(1), expected);
    for seed in seeds {
        let (replay, counts) = case.replay(&recorded.records, &Hardware::intel(seed));
        if seed % 50 == 0 {
            eprintln!("seed {seed}: {counts:?}");
        }
        let replay = replay.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        assert_equal(&recorded.outcome, &replay, seed);
    }
    let instructions = case.replay_on_software(&recorded);
    assert!(instructions > recorded.outcome.ticks, "{instructions} instructions");
}

#[test]
fn ticks_replays_under_a_hundred_seeds() {
    replays_under(&guest("ticks", "hz=18000 count=60 poll=40", ""), "ticks: ", 2..102);
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
