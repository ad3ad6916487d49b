//! The branch clock on simulated hardware: recorded under one seed, replayed under others that kick
//! elsewhere, interrupt later, forget translations and set accessed bits at other times; and replayed
//! on the software CPU, which finds every moment's instruction count.

mod case;
mod counting;
mod crossing;
mod linux;
mod positions;
mod probe;
mod world;

use reprise::boot::GuestSource;
use reprise_guest_images::{COMPUTE_AT_SCALE_1, embedded};
use reprise_simulated_hardware::{Disturbance, Skid};

use case::{Case, Hardware, Recorded, assert_equal};

pub(crate) fn guest<'a>(name: &str, cmdline: &'a str, typed: &'a str) -> Case<'a> {
    let guest = embedded(name).expect("it is listed");
    let source = GuestSource { kernel: guest.image, initrd: None, cmdline };
    Case { source, ram_mib: 32, typed }
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

/// On Zen an overflow may come behind the moment it was to stop short of. That is an error with its
/// reason, and another attempt, late by another number, gets through.
#[test]
#[ignore = "the guest leaves before every overflow, so that none is late yet"]
fn zen_replays_or_says_that_it_was_late() {
    // Without exits in between, each interrupt is far from the last, and found by an overflow.
    let case = guest("ticks", "hz=2000 count=10 poll=100000000", "");
    let zen = |seed| {
        let skid = Skid::Unbounded { usual: 1_000, seldom: 20 };
        let disturbance = Disturbance { skid, ..Disturbance::zen(seed) };
        Hardware { disturbance, ..Hardware::zen(seed) }
    };
    let recorded = recorded(&case, &zen(1), "ticks: ");
    let (mut equal, mut late) = (0, 0);
    for seed in 2..14 {
        match case.replay(&recorded.records, &zen(seed)).0 {
            Ok(replay) => {
                assert_equal(&recorded.outcome, &replay, seed);
                equal += 1;
            }
            Err(error) => {
                assert!(error.to_string().contains("replay again"), "seed {seed}: {error}");
                late += 1;
            }
        }
    }
    eprintln!("{equal} replays were equal, {late} were stopped too late");
    assert!(equal > 0 && late > 0);
}
