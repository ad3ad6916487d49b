//! Checkpoints end to end: taken while recording or afterwards, started from, cut off, damaged, mixed
//! up, killed amid.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Duration;

use reprise_cpu::engine::SoftEngine;
use reprise_cpu::translate::Translation;
use reprise_machine::inputs::Replaying;
use reprise_machine::inputs::Verification;
use reprise_machine::machine::Machine;
use reprise_machine::outcome::Conclusion;
use reprise_replay::{Met, Replayable, Start, meet_checkpoint};
use serde_json::Value;

use crate::program::{SIGKILL, Workplace, record, replay, reprise, run};

/// What both a whole replay and one from a checkpoint end with.
#[track_caller]
fn assert_same_end(recorded: &Value, replayed: &Value) {
    for field in
        ["final_digest", "console_digest", "console_bytes", "ticks", "ending", "interrupts"]
    {
        assert_eq!(recorded[field], replayed[field], "{field}: {recorded:#} {replayed:#}");
    }
    assert_eq!(recorded["virtual_seconds"], replayed["virtual_seconds"]);
    assert_eq!(replayed["verified"], true, "{replayed:#}");
}

fn sidecar(file: &str) -> String {
    format!("{file}.checkpoints")
}

fn info(file: &str) -> Value {
    run(&["--json", "info", file]).expect_code(0).json()
}

fn ticks_of(info: &Value) -> Vec<u64> {
    let list = info["checkpoints"].as_array().expect("a list");
    list.iter().map(|one| one["tick"].as_u64().expect("a tick")).collect()
}

/// Records `compute` with a checkpoint every million instructions or so.
fn computed(workplace: &Workplace, every: &str) -> (String, Value) {
    let file = workplace.path("compute.rr");
    let guest = ["--engine", "soft", "--image", "compute", "--cmdline", "scale=1"];
    let recorded = record(&[&guest[..], &["--checkpoint-every", every]].concat(), &file, 0);
    (file, recorded)
}

/// A machine at a checkpoint, with or without translation.
fn machine(replayable: &Replayable, start: Start, never: bool) -> Machine<SoftEngine, Replaying> {
    let make = |ram| {
        let mut engine = SoftEngine::new(ram)?;
        engine.set_translation(if never { Translation::Never } else { Translation::default() });
        Ok(engine)
    };
    let beginning = replayable.begin(start).expect("a beginning");
    beginning.into_machine(make, |inputs| inputs).expect("a machine")
}

/// Every stretch from one checkpoint to the next ends as the next one says, and the last at the
/// recorded end; translated or not.
fn assert_stretches_join(file: &str, at_least: usize) {
    let replayable = Replayable::open(Path::new(file)).expect("opens");
    let checkpoints = replayable.checkpoints();
    assert!(checkpoints.len() >= at_least, "{file}: {} checkpoints", checkpoints.len());
    let exact = Verification::default();
    let starts = std::iter::once(Start::Run).chain((0..checkpoints.len()).map(Start::Checkpoint));
    for (number, start) in starts.enumerate() {
        let mut machine = machine(&replayable, start, number % 3 == 1);
        if let Start::Checkpoint(index) = start {
            let met = meet_checkpoint(&mut machine, &checkpoints[index], exact);
            assert_eq!(met.expect("compares"), Met::default());
        }
        match checkpoints.get(number) {
            Some(next) => {
                let outcome = machine.run_until(next.moment.tick).expect("runs");
                assert!(matches!(outcome.conclusion, Conclusion::TargetReached), "{outcome:?}");
                assert_eq!(outcome.moment, next.moment);
                let met = meet_checkpoint(&mut machine, next, exact).expect("compares");
                assert_eq!(met, Met::default(), "{file}: from {start:?} to {}", next.moment);
            }
            None => {
                let outcome = machine.run().expect("runs");
                assert!(matches!(outcome.conclusion, Conclusion::Ended(_)), "{outcome:?}");
            }
        }
    }
}

#[test]
fn every_stretch_of_every_guest_ends_as_the_next_checkpoint_says() {
    let workplace = Workplace::new();
    let typed = workplace.file("typed", "some words\nand more of them\nquit\n");
    let guests: [(&str, &[&str], &str); 3] = [
        ("compute", &["--cmdline", "scale=1"], "2_500_000"),
        ("ticks", &[], "2_000_000"),
        ("echo", &["--input", &typed], "2000"),
    ];
    for (guest, arguments, every) in guests {
        let file = workplace.path(guest);
        let words = ["--engine", "soft", "--image", guest, "--checkpoint-every", every];
        record(&[&words[..], arguments].concat(), &file, 0);
        let seen = info(&file);
        assert!(!ticks_of(&seen).is_empty(), "{guest}: {seen:#}");
        // A recorder that is busy leaves checkpoints out; a replay does not.
        let added = run(&["--json", "checkpoint", &file, "--every", every]).expect_code(0).json();
        assert_eq!(added["replay"]["verified"], true, "{added:#}");
        assert_eq!(added["added"]["failure"], Value::Null);
        assert_stretches_join(&file, 3);
    }
}

#[test]
fn a_replay_from_any_moment_comes_to_the_recorded_end() {
    let workplace = Workplace::new();
    let (file, recorded) = computed(&workplace, "0.004s");
    let taken = recorded["checkpoints"]["count"].as_u64().expect("a count");
    assert_eq!(ticks_of(&info(&file)).len() as u64, taken);
    // A recorder that is busy leaves some out.
    run(&["checkpoint", &file, "--every", "0.004s"]).expect_code(0);
    let ticks = ticks_of(&info(&file));
    assert!(ticks.len() >= 2, "{ticks:?}");
    let middle = ticks[ticks.len() / 2];
    for (from, at) in [
        (middle.to_string(), Some(middle)),
        ((middle + 77_777).to_string(), Some(middle)),
        (format!("{}s", (middle + 10) as f64 / 1e9), Some(middle)),
        ("1".to_owned(), None),
        ("99999999999".to_owned(), ticks.last().copied()),
    ] {
        let replayed = replay(&file, &["--from", &from]);
        assert_same_end(&recorded, &replayed);
        assert_eq!(replayed["from_tick"].as_u64(), at, "from {from}: {replayed:#}");
        let executed = recorded["ticks"].as_u64().expect("a count") - at.unwrap_or(0);
        assert_eq!(replayed["instructions"].as_u64(), Some(executed), "{replayed:#}");
    }
    // From there to a moment, it stands where a replay from the start stands.
    let until = (middle + 1_234_567).to_string();
    let whole = replay(&file, &["--until", &until]);
    let part = replay(&file, &["--from", &middle.to_string(), "--until", &until]);
    assert_eq!(whole["final_digest"], part["final_digest"]);
    assert_eq!(whole["console_digest"], part["console_digest"]);
    assert_eq!(part["ending"], "target-reached");
}

#[test]
fn a_recording_needs_no_checkpoints_and_none_of_another() {
    let workplace = Workplace::new();
    let (file, recorded) = computed(&workplace, "4000000");
    let side = sidecar(&file);
    let kept = std::fs::read(&side).expect("checkpoints");
    std::fs::remove_file(&side).expect("removed");
    assert_same_end(&recorded, &replay(&file, &[]));
    let from_start = replay(&file, &["--from", "9000000"]);
    assert_same_end(&recorded, &from_start);
    assert!(from_start["from_tick"].is_null());
    // Those of another recording are refused where they are wanted, and in the way nowhere else.
    let other = workplace.path("ticks.rr");
    record(&["--engine", "soft", "--image", "ticks", "--checkpoint-every", "never"], &other, 0);
    assert!(!Path::new(&sidecar(&other)).exists());
    std::fs::write(sidecar(&other), &kept).expect("written");
    replay(&other, &[]);
    let seen = info(&other);
    let trouble = seen["checkpoint_trouble"].as_str().expect("told");
    assert!(trouble.contains("another recording"), "{trouble}");
    for command in [&["replay", &other, "--from", "5"][..], &["checkpoint", &other]] {
        let refused = run(command);
        assert!(refused.expect_reason().contains("another recording"));
    }
    // A new recording of that name finds none of it.
    let words = ["record", "--engine", "soft", "--image", "hello", "-o", &other];
    assert!(run(&words).expect_reason().contains("exists"));
    run(&[&words[..], &["--force"]].concat()).expect_code(0);
    assert!(!Path::new(&sidecar(&other)).exists());
}

#[test]
fn what_is_left_of_a_damaged_file_is_used_and_told() {
    let workplace = Workplace::new();
    let (file, recorded) = computed(&workplace, "3000000");
    let side = sidecar(&file);
    let whole = std::fs::read(&side).expect("checkpoints");
    let ticks = ticks_of(&info(&file));
    assert!(ticks.len() >= 3, "{ticks:?}");
    // Torn: the last checkpoint is not there, and the next writer goes on behind the one before.
    std::fs::write(&side, &whole[..whole.len() - 3]).expect("written");
    let torn = run(&["--json", "info", &file]).expect_code(0);
    assert!(torn.stderr.contains("cut off"), "{}", torn.stderr);
    assert_eq!(ticks_of(&torn.json()), ticks[..ticks.len() - 1]);
    assert_same_end(&recorded, &replay(&file, &["--from", "99999999999"]));
    run(&["checkpoint", &file, "--every", "3000000"]).expect_code(0);
    assert!(ticks_of(&info(&file)).ends_with(&ticks[ticks.len() - 1..]));
    assert_stretches_join(&file, 3);
    // A page that is not what it was: whoever needs it starts at an earlier checkpoint.
    let mut flipped = whole.clone();
    let last = flipped.windows(4).rposition(|kind| kind == b"PAGE").expect("pages");
    flipped[last + 40] ^= 4;
    std::fs::write(&side, &flipped).expect("written");
    let replayed = run(&["--json", "replay", &file, "--from", "99999999999"]).expect_code(0);
    assert!(replayed.stderr.contains("is damaged"), "{}", replayed.stderr);
    assert_same_end(&recorded, &replayed.json());
    assert!(replayed.json()["from_tick"].as_u64() < ticks.last().copied());
}

#[test]
fn a_recorder_killed_amid_its_checkpoints_leaves_what_can_be_used() {
    let workplace = Workplace::new();
    for trial in 0..4 {
        let file = workplace.path(&format!("{trial}.rr"));
        let words =
            ["record", "--engine", "soft", "--image", "compute", "--checkpoint-every", "100000"];
        let words = [&words[..], &["--console", "/dev/null", "-o", &file]].concat();
        let mut running = reprise(&words).start();
        let side = sidecar(&file);
        running.wait_until("checkpoints", || {
            std::fs::metadata(&side).is_ok_and(|metadata| metadata.len() > 200_000)
        });
        std::thread::sleep(Duration::from_millis(500 + 37 * trial));
        running.signal("KILL");
        assert_eq!(running.wait().status.signal(), Some(SIGKILL));
        let seen = info(&file);
        let ticks = ticks_of(&seen);
        let end = seen["ticks"].as_u64().expect("marks went out");
        assert!(ticks.iter().all(|tick| *tick <= end), "{ticks:?} of {end}");
        let Some(last) = ticks.last() else { continue };
        let replayed = replay(&file, &["--from", &last.to_string()]);
        assert_eq!(replayed["ending"], "cut-short", "{replayed:#}");
        assert_eq!(replayed["ticks"], seen["ticks"]);
        assert_eq!(replayed["from_tick"].as_u64(), Some(*last));
    }
}

#[test]
fn wrong_intervals_are_refused() {
    let workplace = Workplace::new();
    let file = workplace.path("hello.rr");
    for every in ["often", "-1", "1e400s"] {
        let words = ["record", "--image", "hello", "-o", &file, "--checkpoint-every", every];
        assert_eq!(run(&words).code(), 2, "{every}");
    }
    record(&["--engine", "soft", "--image", "hello"], &file, 0);
    assert_eq!(run(&["checkpoint", &file, "--every", "never"]).code(), 1);
    let device = ["record", "--engine", "soft", "--image", "hello", "--force", "-o", "/dev/null"];
    run(&[&device[..], &["--checkpoint-every", "1000"]].concat()).expect_code(0);
    assert!(!Path::new("/dev/null.checkpoints").exists());
}
