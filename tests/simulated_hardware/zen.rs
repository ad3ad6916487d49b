//! AMD's Zen, whose counter may be late without bound: a replay that was stopped behind a place goes back
//! to a checkpoint and comes to the same end.

use reprise_replay::Start;
use reprise_simulated_hardware::{Disturbance, Skid};

use crate::case::{Case, Hardware, assert_equal};
use crate::guest;

/// Branches by which an overflow is late mostly.
const USUAL: u64 = 1_000;
const SEEDS: std::ops::Range<u64> = 2..14;

/// Signals keep the guest from running on: where there are none, an overflow that is late has its way.
fn undisturbed(seed: u64, seldom: u64) -> Hardware {
    let disturbance = Disturbance {
        skid: Skid::Unbounded { usual: USUAL, seldom },
        kick_every: None,
        signal_every: None,
        ..Disturbance::zen(seed)
    };
    Hardware { disturbance, ..Hardware::zen(seed) }
}

/// Without exits in between, each interrupt is far from the last, and found by an overflow.
fn case() -> Case<'static> {
    guest("ticks", "hz=500 count=12 poll=100000000", "")
}

#[test]
fn a_replay_that_is_too_late_goes_back_to_a_checkpoint() {
    let kept = case().record_to_file(&Hardware::zen(1), 500_000);
    let checkpoints = kept.replayable.checkpoints().len();
    eprintln!(
        "{} ticks, {} records, {checkpoints} checkpoints",
        kept.recorded.outcome.ticks,
        kept.recorded.records.len()
    );
    assert!(checkpoints > 2);
    let mut times_back = 0;
    for seed in SEEDS {
        let replay = kept.replay(Start::Run, &undisturbed(seed, 20));
        let replay = replay.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        assert_equal(&kept.recorded.outcome, &replay.outcome, seed);
        times_back += replay.times_back;
    }
    eprintln!("{times_back} times back in {} replays", SEEDS.end - SEEDS.start);
    assert!(times_back > 4, "it was late {times_back} times only");
}

/// Ten times as late as is believed: what comes there is the margin, wider at each attempt.
#[test]
fn each_attempt_keeps_a_wider_margin() {
    let kept = case().record_to_file(&Hardware::zen(1), 500_000);
    for seed in 2..4 {
        let mut hardware = Hardware { skid: 300, ..undisturbed(seed, 1) };
        hardware.disturbance.skid = Skid::UpTo(3_000);
        let replay = kept.replay(Start::Run, &hardware);
        let replay = replay.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        assert_equal(&kept.recorded.outcome, &replay.outcome, seed);
        assert!(replay.times_back > 6, "seed {seed}: back {} times only", replay.times_back);
    }
}

#[test]
fn a_counter_that_is_always_too_late_is_an_error() {
    let kept = case().record_to_file(&Hardware::zen(1), 500_000);
    let mut hardware = Hardware { skid: 100, ..undisturbed(2, 1) };
    hardware.disturbance.skid = Skid::Unbounded { usual: 100_000, seldom: 1 };
    let error = kept.replay(Start::Run, &hardware).err().expect("it never gets there").to_string();
    assert!(error.contains("6 attempts") && !error.contains('\n'), "{error}");
}
