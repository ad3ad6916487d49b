//! The third kind of vCPU, the software CPU undisturbed: the places that the clock finds on it, and on disturbed
//! hardware, are held to those that the software CPU's own clock finds, which is another implementation.

use reprise_branch_clock::settle::Stand;
use reprise_machine::engine::Engine;
use reprise_simulated_hardware::Disturbance;

use crate::case::{Case, Hardware, assert_equal};
use crate::guest;
use crate::watched::Seen;

const SEEDS: u64 = 3;
/// Instructions from kick to kick: without any a recording would lead its guest nowhere.
const KICK_EVERY: u64 = 3_000;

fn undisturbed(stand: Stand) -> Hardware {
    Hardware { disturbance: Disturbance::none(), skid: 1, stand }
}

fn kicked(seed: u64, stand: Stand) -> Hardware {
    let kick_every = Some(KICK_EVERY);
    let disturbance = Disturbance { seed, kick_every, ..Disturbance::none() };
    Hardware { disturbance, ..undisturbed(stand) }
}

/// Where interrupts entered, and behind how many instructions.
fn interrupts(seen: Vec<Seen>) -> Vec<Seen> {
    seen.into_iter().filter(Seen::is_interrupt).collect()
}

#[track_caller]
fn assert_same_places(recorded: &[Seen], replayed: &[Seen], seed: u64) {
    assert_eq!(recorded.len(), replayed.len(), "seed {seed}");
    for (one, other) in recorded.iter().zip(replayed) {
        assert_eq!((one.what, one.moment), (other.what, other.moment), "seed {seed}");
        assert_eq!(one.instructions, other.instructions, "seed {seed}, {:?}", one.moment);
        assert_eq!(one.state, other.state, "seed {seed}, {:?}", one.moment);
    }
}

/// The recorded clock stands in the same state behind as many branches and instructions, at each interrupt and in
/// the end.
fn is_found_by_the_recorded_clock(case: &Case<'_>, stand: Stand, seed: u64) {
    let (recorded, seen) = case.record_watched(&kicked(seed, stand));
    let seen = interrupts(seen);
    assert!(seen.len() > 5, "seed {seed}: only {} interrupts", seen.len());
    for hardware in [undisturbed(stand), Hardware { stand, ..Hardware::intel(1_000 + seed) }] {
        let (replay, again) = case.replay_watched(&recorded.records, &hardware);
        assert_equal(&recorded.outcome, &replay, seed);
        assert_same_places(&seen, &interrupts(again), seed);
    }
    let mut machine = case.on_software(&recorded, &case.header());
    for place in &seen {
        let over = machine.advance_to_instruction(place.instructions).expect("it runs");
        assert!(over.is_none(), "seed {seed}, {:?}: {over:?}", place.moment);
        assert_eq!(machine.engine().tick(), place.moment.tick, "seed {seed}");
        let state = machine.engine().cpu_state().expect("it can be asked");
        assert_eq!(state, place.state, "seed {seed}, {:?}", place.moment);
    }
    let replay = machine.run().expect("it runs");
    assert_equal(&recorded.outcome, &replay, seed);
}

fn check(case: &Case<'_>, stands: &[Stand]) {
    for &stand in stands {
        for seed in 0..SEEDS {
            eprintln!("{}, {stand:?}, seed {seed}", case.source.cmdline);
            is_found_by_the_recorded_clock(case, stand, seed);
        }
    }
}

const BOTH: &[Stand] = &[Stand::BehindBranch, Stand::AtOnce];

#[test]
fn ticks_is_found_by_the_recorded_clock() {
    check(&guest("ticks", "hz=18000 count=60 poll=40", ""), BOTH);
}

#[test]
fn echo_is_found_by_the_recorded_clock() {
    check(&guest("echo", "", "first line\rsecond line\rquit\r"), BOTH);
}

#[test]
fn the_hard_positions_are_found_by_the_recorded_clock() {
    // Not those whose loops are the same in any round, for which any round will do.
    for name in ["rep", "shadow", "hlt", "fault", "window", "user", "code"] {
        let cmdline = format!("do={name} hz=18000 count=20");
        let case = guest("positions", &cmdline, "two at one moment");
        check(&case, BOTH);
    }
}
