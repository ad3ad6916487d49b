//! Conditional branches are counted alike whether code is translated or not, wherever it is stopped.

use reprise::boot;
use reprise_cpu::engine::SoftEngine;
use reprise_cpu::translate::Translation;
use reprise_machine::engine::{Access, Engine, Exit};
use reprise_machine::ram::GuestRam;
use reprise_random::Random;

use crate::case::Case;
use crate::guest;

const INSTRUCTIONS: u64 = 150_000;
/// The longest stretch between two looks at the count.
const LONGEST_STRETCH: u64 = 1_000;
/// What every port reads: of the serial line, that it has room.
const PORT_VALUE: u128 = 0x60;

/// The instruction count and that of branches at random places of a guest's run, up to where it halts.
fn counts(case: &Case<'_>, translation: Translation, seed: u64) -> Vec<(u64, u64)> {
    let ram = GuestRam::new(case.ram_mib).expect("the host has RAM");
    let state = boot::load(&case.source, &ram).expect("it boots");
    let mut engine = SoftEngine::new(ram).expect("the host has memory");
    engine.count_conditional_branches(true);
    engine.set_translation(translation);
    engine.set_cpu_state(&state).expect("a first state");
    let mut random = Random::new(seed);
    let mut counts = Vec::new();
    while engine.tick() < INSTRUCTIONS {
        let until = engine.tick() + 1 + random.below(LONGEST_STRETCH);
        loop {
            match engine.run(until).expect("it runs") {
                Exit::Access(Access::PortRead { .. }) => engine.finish_access(PORT_VALUE),
                Exit::Access(_) => engine.finish_access(0),
                Exit::TickReached => break,
                _ => return counts,
            }
            .expect("it goes on");
            if engine.tick() >= until {
                break;
            }
        }
        counts.push((engine.tick(), engine.conditional_branches()));
    }
    counts
}

#[test]
fn translated_code_counts_as_single_instructions_do() {
    for (name, cmdline) in
        [("compute", "scale=1"), ("positions", "do=code"), ("positions", "do=user")]
    {
        let case = guest(name, cmdline, "");
        for seed in 0..3 {
            let expected = counts(&case, Translation::Never, seed);
            let last = *expected.last().expect("it runs for a while");
            eprintln!("{name} {cmdline}: {} looks, {last:?}", expected.len());
            assert!(expected.len() > 100 && last.1 > 100, "{last:?}");
            for translation in
                [Translation::WhenHot, Translation::AtOnce, Translation::AtOnceWithoutLoop]
            {
                let counted = counts(&case, translation, seed);
                assert_eq!(counted, expected, "{name} {cmdline}, {translation:?}, seed {seed}");
            }
        }
    }
}
