//! A guest that looks at its pages' accessed bits goes another way where hardware sets one early. No log has that:
//! a replay begins anew, and comes to the recorded end unless it happens each time.

use std::sync::Arc;

use reprise_bisect::Unwatched;
use reprise_bisect::interval::narrow;
use reprise_machine::outcome::Conclusion;
use reprise_replay::{MAX_BEGINNINGS, Replayable, Start};
use reprise_simulated_hardware::Disturbance;
use tempfile::TempDir;

use crate::case::{Case, Hardware, assert_equal};
use crate::guest;
use crate::kept::Kept;

const CHECKPOINT_EVERY: u64 = 100_000;
/// Instructions from one to the next: about one of sixty falls on a page whose bit is looked at, so that some runs
/// have none.
const RARELY: u64 = 200_000;
/// So that most have none.
const MORE_RARELY: u64 = 1_000_000;

fn case() -> Case<'static> {
    guest("positions", "do=accessed hz=2000 count=20", "")
}

/// Intel's, whose accessed bits are early as often as this.
fn hardware(seed: u64, access_every: Option<u64>) -> Hardware {
    let disturbance = Disturbance { access_every, ..Disturbance::intel(seed) };
    Hardware { disturbance, ..Hardware::intel(seed) }
}

fn recorded(access_every: Option<u64>) -> Kept {
    let kept = case().record_to_file(&hardware(1, access_every), CHECKPOINT_EVERY);
    let (outcome, console) = (&kept.recorded.outcome, &kept.recorded.console);
    let checkpoints = kept.replayable.checkpoints().len();
    eprintln!("{} ticks, {checkpoints} checkpoints", outcome.ticks);
    assert!(console.contains("positions: accessed, hash "), "{console}");
    assert!(checkpoints > 2, "{checkpoints}");
    kept
}

#[test]
fn a_guest_that_went_another_way_is_replayed_again() {
    let kept = recorded(None);
    let mut times_parted = 0;
    for seed in 2..22 {
        let replay = kept.replay(Start::Run, &hardware(seed, Some(MORE_RARELY)));
        let replay = replay.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        assert_equal(&kept.recorded.outcome, &replay.outcome, seed);
        times_parted += replay.times_parted;
    }
    eprintln!("{times_parted} times another way in 20 replays");
    assert!(times_parted > 4, "{times_parted}");
}

#[test]
fn a_guest_that_always_goes_another_way_diverges() {
    let kept = recorded(None);
    let replay = kept.replay(Start::Run, &hardware(2, Some(50))).expect("it replays");
    let Conclusion::Diverged(divergence) = replay.outcome.conclusion else {
        panic!("{:?}", replay.outcome.conclusion);
    };
    eprintln!("{divergence}");
    let again = 1..MAX_BEGINNINGS;
    assert!(again.contains(&replay.times_parted), "{} times: {divergence}", replay.times_parted);
}

/// A bit was set early while recording. The software CPU, which sets none so, finds it by trying.
#[test]
fn a_bit_that_was_set_early_while_recording_is_found() {
    let mut diverged = 0;
    for seed in 2..8 {
        let (engine, recorded) = case().record_on(&hardware(seed, Some(RARELY)));
        let early = engine.vcpu().accessed_early();
        let directory = TempDir::with_prefix("reprise-test-").expect("a directory");
        let path = directory.path().join("early.rr");
        case().write(&recorded, &path);
        let replayable = Replayable::open(&path).expect("it is a recording");
        let interval =
            narrow(&replayable, &Arc::default(), &mut Unwatched).expect("it is looked at");
        if early.is_empty() {
            assert_eq!(interval.divergence, None, "seed {seed}");
            continue;
        }
        eprintln!("seed {seed}, {early:x?}: {interval}");
        assert_eq!(interval.causes[0].name, "accessed-bit", "seed {seed}");
        assert_eq!(interval.early_bit.expect("it was found").entry, early[0], "seed {seed}");
        diverged += 1;
    }
    assert!(diverged > 2, "{diverged}");
}
