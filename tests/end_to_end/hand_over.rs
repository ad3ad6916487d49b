//! Recordings that go from one engine to another, by the command line.

use serde_json::Value;

use crate::kvm::kvm_opens;
use crate::program::{Workplace, assert_equal_runs, record, replay, run};

fn engines(report: &Value) -> Vec<String> {
    let stretches = report["stretches"].as_array().expect("a list");
    stretches.iter().map(|stretch| format!("{}/{}", stretch["engine"], stretch["clock"])).collect()
}

#[test]
fn a_run_stops_where_it_is_told() {
    let workplace = Workplace::new();
    let file = workplace.path("hello.rr");
    let recorded = record(&["--image", "hello", "--until", "300"], &file, 0);
    assert_eq!((&recorded["ticks"], &recorded["ending"]), (&300.into(), &"stopped".into()));
    assert!(recorded["final_digest"].is_string(), "{recorded:#}");
    assert_equal_runs(&recorded, &replay(&file, &[]));
}

#[test]
fn hand_overs_are_recorded_shown_and_followed() {
    let workplace = Workplace::new();
    let file = workplace.path("hello.rr");
    let there_and_back = ["--until", "100", "--then", "soft", "--until", "300", "--then", "soft"];
    let words = [&["--image", "hello", "--engine", "soft"], &there_and_back[..]].concat();
    let recorded = record(&words, &file, 0);
    assert_eq!(engines(&recorded).len(), 3, "{recorded:#}");
    for options in [&[][..], &["--engine", "soft"]] {
        let replayed = replay(&file, options);
        assert_equal_runs(&recorded, &replayed);
        assert_eq!(recorded["stretches"], replayed["stretches"]);
    }
    let info = run(&["--json", "info", &file]).expect_code(0).json();
    assert_eq!(info["stretches"], recorded["stretches"]);
    assert_eq!(info["assists"], 0);
    run(&["expand", &file]).expect_code(0);
}

#[test]
fn kvm_takes_over_and_gives_back() {
    if !kvm_opens() {
        return;
    }
    let workplace = Workplace::new();
    let (file, console) = (workplace.path("compute.rr"), workplace.path("console"));
    let guest = ["--image", "compute", "--cmdline", "scale=1", "--console", &console];
    let there = ["--engine", "soft", "--until", "500000", "--then", "kvm"];
    let back = ["--until", "500100", "--then", "soft"];
    let recorded = record(&[&guest[..], &there[..], &back[..]].concat(), &file, 0);
    assert_eq!(engines(&recorded)[1], "\"kvm\"/\"sync\"");
    assert_eq!(engines(&recorded).len(), 3);
    let printed = std::fs::read_to_string(&console).expect("a console");
    assert_eq!(printed, reprise_guest_images::COMPUTE_AT_SCALE_1);
    for _ in 0..3 {
        let replayed = replay(&file, &[]);
        assert_eq!(replayed["verification"], "exact");
        assert_equal_runs(&recorded, &replayed);
    }
    let alone = replay(&file, &["--engine", "soft"]);
    assert_eq!(alone["recorded_stretches"], recorded["stretches"]);
    let ran = ["\"soft\"/\"instructions\"", "\"soft\"/\"sync\"", "\"soft\"/\"instructions\""];
    assert_eq!(engines(&alone), ran);
    assert_eq!(alone["verification"], "across-engines");
    assert_eq!(alone["console_digest"], recorded["console_digest"]);
    let executed = alone["instructions"].as_u64().expect("a number");
    let expanded = run(&["--json", "expand", &file]).expect_code(0).json();
    assert_eq!(expanded["instructions"], executed, "{expanded:#}");
    assert!(executed > recorded["ticks"].as_u64().expect("a number"), "user code does not exit");
}

/// The ticks of the checkpoints beside a recording.
fn checkpoint_ticks(file: &str) -> Vec<u64> {
    let info = run(&["--json", "info", file]).expect_code(0).json();
    let list = info["checkpoints"].as_array().expect("a list");
    list.iter().map(|one| one["tick"].as_u64().expect("a tick")).collect()
}

/// From the first checkpoint in each of these stretches, the second of which goes from tick `there` to tick
/// `back`, a replay comes to the recorded end.
fn replays_from_each_stretch(
    file: &str,
    recorded: &Value,
    [there, back]: [u64; 2],
    stretches: &[usize],
) {
    let ticks = checkpoint_ticks(file);
    let stretch = |tick: u64| usize::from(tick > there) + usize::from(tick > back);
    for number in stretches {
        let first = ticks.iter().copied().find(|tick| stretch(*tick) == *number);
        let first = first.unwrap_or_else(|| panic!("none in stretch {number}: {ticks:?}"));
        for engine in ["soft", "auto"] {
            let from = (first + 1).to_string();
            let replayed = replay(file, &["--engine", engine, "--from", &from]);
            for field in ["final_digest", "console_digest", "ticks", "ending", "interrupts"] {
                assert_eq!(recorded[field], replayed[field], "{field}, {engine} from {from}");
            }
            assert_eq!(replayed["from_tick"], first, "from {from}: {replayed:#}");
        }
    }
}

#[test]
fn checkpoints_lie_in_every_stretch_and_expansion_crosses_hand_overs() {
    if !kvm_opens() {
        return;
    }
    let workplace = Workplace::new();
    let file = workplace.path("compute.rr");
    let guest = ["--image", "compute", "--cmdline", "scale=1", "--memory", "16"];
    let there = ["--engine", "soft", "--until", "500000", "--then", "kvm"];
    let back = ["--until", "500010", "--then", "soft", "--until", "1500000"];
    let every = ["--checkpoint-every", "250002"];
    let recorded = record(&[&guest[..], &there[..], &back[..], &every[..]].concat(), &file, 0);
    let from_tick = |stretch: usize| recorded["stretches"][stretch]["from_tick"].as_u64();
    let hand_overs = [1, 2].map(|stretch| from_tick(stretch).expect("a number"));
    // As the recorder left them: the last stretch's do not say how many instructions lie before.
    replays_from_each_stretch(&file, &recorded, hand_overs, &[0, 2]);
    let expand = |name: &str, jobs: &str, more: &[&str]| {
        let out = workplace.path(name);
        let words = ["--json", "expand", &file, "--jobs", jobs, "-o", &out, "--force"];
        let report = run(&[&words[..], more].concat()).expect_code(0).json();
        (report, std::fs::read(&out).expect("a trace"))
    };
    let window = ["--full", "--from", "400000", "--to", "1200000"];
    let (without, _) = expand("without", "2", &window);
    assert_eq!(without["checkpoints_verified"], 0, "{without:#}");
    // As the software CPU makes them afterwards, in place of those.
    run(&["checkpoint", &file, "--every", "250002"]).expect_code(0);
    replays_from_each_stretch(&file, &recorded, hand_overs, &[0, 1, 2]);
    let (expanded, one) = expand("one", "1", &window);
    // At tick 500004, amid KVM's stretch, and behind it.
    let met = expanded["checkpoints_verified"].as_u64().expect("a number");
    assert!(met >= 2, "{expanded:#}");
    assert_eq!(expanded["instructions"], without["instructions"]);
    let (_, two) = expand("two", "2", &window);
    assert!(one == two, "two threads make another trace");
    let check = ["--json", "trace", "check", &workplace.path("one"), "--against", &file];
    let checked = run(&check).expect_code(0).json();
    assert_eq!(checked["against"]["end_verified"], true, "{checked:#}");
    assert_eq!(checked["against"]["checkpoints_verified"], met, "{checked:#}");
    let all = |jobs| expand("all", jobs, &[]);
    let ((report, one), (_, two)) = (all("1"), all("2"));
    assert!(one == two && report["verified"] == true, "{report:#}");
    assert_eq!(report["final_digest"], recorded["final_digest"]);
}

#[test]
fn a_replay_that_would_end_before_it_begins_is_wrong_use() {
    let workplace = Workplace::new();
    let file = workplace.path("hello.rr");
    record(&["--image", "hello", "--engine", "soft"], &file, 0);
    for [from, until] in [["300", "200"], ["0.0000003s", "0.0000002s"], ["0.0000003s", "200"]] {
        let refused = run(&["replay", &file, "--from", from, "--until", until]).expect_code(2);
        let lines: Vec<_> = refused.stderr.lines().collect();
        let last = lines.last().expect("a reason");
        assert!(last.contains("--until") && last.contains("before --from"), "{lines:?}");
        assert!(refused.stdout.is_empty());
    }
    for [from, until] in [["200", "300"], ["200", "200"], ["200", "0.0000003s"]] {
        replay(&file, &["--from", from, "--until", until]);
    }
    let refused = run(&["expand", &file, "--from", "300", "--to", "200"]).expect_code(2);
    assert!(refused.stderr.contains("before --from"), "{}", refused.stderr);
}

#[test]
fn a_clock_is_not_asked_of_a_recording_that_has_several() {
    if !kvm_opens() {
        return;
    }
    let workplace = Workplace::new();
    let file = workplace.path("hello.rr");
    let then = ["--engine", "soft", "--until", "100", "--then", "kvm:sync"];
    let told = run(&[&["record", "--image", "hello", "-o", &file], &then[..]].concat());
    assert!(told.expect_code(0).stderr.contains("RDTSC is not trapped"));
    for clock in ["sync", "pmu"] {
        let refused = run(&["replay", &file, "--clock", clock]).expect_code(2);
        assert!(refused.stderr.contains("leave --clock out"), "{}", refused.stderr);
    }
    replay(&file, &[]);
}

#[test]
fn engines_and_moments_that_do_not_go_together_are_wrong_use() {
    let workplace = Workplace::new();
    let console = workplace.path("console");
    std::fs::write(&console, "of another run").expect("a file");
    let guest = ["run", "--image", "hello", "--console", &console];
    for wrong in [
        &["--then", "kvm"][..],
        &["--until", "5", "--until", "9"],
        &["--until", "9", "--then", "soft", "--until", "5"],
        &["--until", "9", "--then", "pmu"],
    ] {
        run(&[&guest[..], wrong].concat()).expect_code(2);
    }
    assert_eq!(std::fs::read_to_string(&console).expect("a file"), "of another run");
}
