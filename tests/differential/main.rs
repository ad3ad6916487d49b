//! The soft engine against the real CPU: random instruction sequences with random state, run in KVM
//! at CPL3 and on the soft engine, must end in the same registers, flags, memory and faults.
//!
//! What instructions there are, of which feature and kind, what they leave undefined and what they
//! read is written down here once more, on purpose: an account that is independent of the engine's
//! tables, so that a mistake in either of them shows as a difference.
//!
//! `REPRISE_DIFFERENTIAL_CASES` sets how many cases run (a million for a night),
//! `REPRISE_DIFFERENTIAL_SEED` where their seeds start.

mod case;
mod compare;
mod fixtures;
mod generate;
mod judge;
mod lawful;
mod opcodes;
mod preparation;
mod raw_bytes;
mod regressions;
mod soft;
mod values;

use compare::{Comparison, Strictness, differences};
use fixtures::{Fixture, Fixtures};
use judge::{Judge, Verdict};
use regressions::{REGRESSIONS, Regression};
use reprise_cpu::translate::Translation;
use reprise_kvm::KvmKind;
use soft::Soft;

/// Cases in the test command: a few seconds.
const CASES: u64 = 5000;
/// Cases that are run translated and not, where there is no real CPU to compare with.
const TWIN_CASES: u64 = 2000;
/// Seeds of which the fixtures keep the outcome.
const FIXTURES: u64 = 4000;
/// Fixtures that there must be, some of those seeds being set aside.
const MIN_FIXTURES: u64 = 3000;

fn setting(name: &str, default: u64) -> u64 {
    let Ok(text) = std::env::var(name) else { return default };
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.unwrap_or_else(|_| panic!("{name} is not a number: {text}"))
}

#[test]
fn random_sequences_end_as_on_the_real_cpu() {
    let Some(mut judge) = Judge::new() else { return };
    let first = setting("REPRISE_DIFFERENTIAL_SEED", 0);
    let count = setting("REPRISE_DIFFERENTIAL_CASES", CASES);
    eprintln!("seeds {first:#x} and on, {count} cases");
    let verdict = judge.judge((0..count).map(|number| first.wrapping_add(number)));
    verdict.demand_agreement();
}

#[test]
fn what_once_differed_differs_no_more() {
    let Some(mut judge) = Judge::new() else { return };
    for Regression { seed, was } in REGRESSIONS {
        match judge.compare(&generate::case(*seed)) {
            Comparison::Same => {}
            other => panic!("seed {seed:#x}, {was}: {other:#?}"),
        }
    }
}

#[test]
fn recorded_outcomes_are_met() {
    let fixtures = Fixtures::read();
    let host = fixtures::host_cpu();
    let strictness = match host == fixtures.cpu {
        true => Strictness::Everything,
        false => Strictness::Defined,
    };
    eprintln!("outcomes of {}, here {host}: compares {strictness:?}", fixtures.cpu);
    for translation in [Translation::Never, Translation::AtOnce] {
        meet_recorded_outcomes(&fixtures, translation, strictness);
    }
}

fn meet_recorded_outcomes(fixtures: &Fixtures, translation: Translation, strictness: Strictness) {
    let mut soft = Soft::new(translation);
    let mut verdict = Verdict::default();
    for fixture in &fixtures.cases {
        let case = generate::case(fixture.seed);
        let same = fixtures::fingerprint(&case) == fixture.fingerprint;
        assert!(same, "the generator has changed: record the fixtures again (record_fixtures)");
        let real = fixture.outcome(&case);
        let comparison = match soft.run(&case.input) {
            // No outcome that needs the excuses of a kind of KVM was recorded.
            Ok(outcome) => {
                differences(&case, &real, &outcome, strictness, KvmKind::Unknown, &mut soft)
            }
            Err(reason) => Comparison::Different(vec![format!("end: soft {reason}")]),
        };
        verdict.note(&case, comparison);
    }
    assert!(verdict.cases >= MIN_FIXTURES, "only {} fixtures", verdict.cases);
    verdict.demand_agreement();
}

#[test]
fn translation_changes_nothing() {
    let mut soft = Soft::new(Translation::Never);
    let mut translated = Soft::new(Translation::AtOnce);
    for seed in 0..TWIN_CASES {
        let case = generate::case(seed);
        let (soft, translated) = (soft.run(&case.input), translated.run(&case.input));
        assert!(soft == translated, "seed {seed:#x}: {translated:#x?} not {soft:#x?}");
    }
}

/// Writes `fixtures.bin` from this host's CPU: run it after each change of the generator.
#[test]
#[ignore = "rewrites the fixtures"]
fn record_fixtures() {
    let mut judge = Judge::new().expect("KVM records the outcomes");
    let mut cases = Vec::new();
    for seed in REGRESSIONS.iter().map(|regression| regression.seed).chain(0..FIXTURES) {
        let case = generate::case(seed);
        // What is set aside says more about the host than about its CPU.
        if judge.compare(&case) == Comparison::Same {
            let outcome = judge.oracle().run(&case.input).expect("it has just run");
            cases.push(Fixture::new(&case, &outcome));
        }
    }
    Fixtures { cpu: fixtures::host_cpu(), cases }.write();
}
