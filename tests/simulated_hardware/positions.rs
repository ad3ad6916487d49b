//! Interrupts at the positions that are hard to find again, each under many seeds: the guest
//! `positions` is recorded on hardware that kicks often, its clock led to the next branch or left
//! where it is, and replayed on others and on the soft engine.

use crate::case::{Case, Hardware, Recorded, assert_equal};
use crate::guest;
use reprise_branch_clock::settle::Stand;
use reprise_simulated_hardware::Disturbance;

/// Recordings of each scenario and policy, unless `REPRISE_POSITIONS_RECORDINGS` asks for more.
const RECORDINGS: u64 = 2;
/// Replays of each recording, on Intel's hardware and on Zen's.
const REPLAYS: u64 = 2;

/// So often at most is a replay made that is stopped too late.
const ATTEMPTS: u64 = 8;

/// Seeds that failed once, with what it was.
const FAILED_ONCE: &[(&str, Stand, u64)] = &[
    // A moment behind an interrupt's delivery was sought without its breakpoint.
    ("shadow", Stand::AtOnce, 0),
    ("itself", Stand::BehindBranch, 1),
    // The software CPU's own counter interrupted late.
    ("window", Stand::BehindBranch, 0),
    // A handler's first instruction has the instruction count of the fault before it.
    ("fault", Stand::BehindBranch, 1),
    // Two returns from one handler were the same state of the CPU, and another memory.
    ("fault", Stand::AtOnce, 4),
];

/// Hardware that is kicked so often that every position gets its turn.
fn kicked_often(seed: u64, stand: Stand) -> Hardware {
    let disturbance = Disturbance {
        kick_every: Some(3_000),
        signal_every: Some(9_000),
        forget_every: Some(5_000),
        access_every: Some(1_000),
        ..Disturbance::intel(seed)
    };
    Hardware { disturbance, stand, ..Hardware::intel(seed) }
}

fn check(name: &str, stand: Stand, seed: u64) -> Recorded {
    let cmdline = format!("do={name} hz=18000 count=8");
    let case = guest("positions", &cmdline, "two at one moment");
    let recorded = case.record(&kicked_often(seed, stand));
    let banner = format!("positions: {name}, hash ");
    assert!(recorded.console.contains(&banner), "seed {seed}: {:?}", recorded.console);
    for replay in 0..REPLAYS {
        let other = 1_000 * (seed + 1) + replay;
        replay_on(&case, &recorded, &kicked_often(other, stand));
        replay_on(&case, &recorded, &Hardware::zen(other));
    }
    case.replay_on_software(&recorded);
    recorded
}

fn replay_on(case: &Case<'_>, recorded: &Recorded, hardware: &Hardware) {
    let seed = hardware.disturbance.seed;
    // Zen's counter may be too late, and says so.
    for attempt in 0..ATTEMPTS {
        let disturbance = Disturbance { seed: seed + (attempt << 32), ..hardware.disturbance };
        match case.replay(&recorded.records, &Hardware { disturbance, ..*hardware }).0 {
            Err(error) if error.to_string().contains("replay again") => {}
            Err(error) => panic!("seed {seed}: {error}"),
            Ok(replay) => return assert_equal(&recorded.outcome, &replay, seed),
        }
    }
    panic!("seed {seed}: stopped too late {ATTEMPTS} times");
}

/// Both policies, many seeds.
fn check_all(name: &str) {
    for stand in [Stand::BehindBranch, Stand::AtOnce] {
        let mut interrupts = 0;
        let recordings = std::env::var("REPRISE_POSITIONS_RECORDINGS")
            .map_or(RECORDINGS, |count| count.parse().expect("it is a number"));
        for seed in 0..recordings {
            eprintln!("{name}, {stand:?}, recorded under seed {seed}");
            let recorded = check(name, stand, seed);
            interrupts += recorded.outcome.interrupts;
        }
        assert!(interrupts >= 8 * recordings, "only {interrupts} interrupts landed");
    }
    let again = |(failed, _, seed): &&(&str, Stand, u64)| *failed == name && *seed >= RECORDINGS;
    for (_, stand, seed) in FAILED_ONCE.iter().filter(again) {
        eprintln!("{name}, {stand:?}, recorded under seed {seed}, which failed once");
        check(name, *stand, *seed);
    }
}

#[test]
fn inside_a_rep_across_page_faults() {
    check_all("rep");
}

#[test]
fn in_a_loop_without_conditional_branches() {
    check_all("straight");
}

#[test]
fn in_a_jump_to_itself() {
    check_all("itself");
}

#[test]
fn behind_sti_and_mov_ss() {
    check_all("shadow");
}

#[test]
fn at_hlt() {
    check_all("hlt");
}

#[test]
fn on_instructions_that_fault() {
    check_all("fault");
}

#[test]
fn in_the_interrupt_window() {
    check_all("window");
}

#[test]
fn between_user_and_kernel() {
    check_all("user");
}

#[test]
fn amid_code_that_changes() {
    check_all("code");
}
