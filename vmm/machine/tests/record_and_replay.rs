//! Recording and replay on simulated hardware: kicks in other places, another world, damaged and
//! changed logs, failing disks and engines.

mod simulation;

use reprise_machine::divergence::Difference;
use reprise_machine::outcome::{Conclusion, MachineError, Outcome};
use reprise_trace::event::{Ending, Event, Record};
use reprise_trace::log::MemorySink;
use reprise_trace::moment::TickKind;

use reprise_random::Random;
use simulation::program::{FINISHES, Finish, Program};
use simulation::sim_host::{FullDisk, World};
use simulation::toy_engine::Disturbance;
use simulation::{CLOCKS, Clock, Recorded, record, record_into, records_of, replay, replaying};

const SEEDS: u64 = 150;

/// Runs `case` for each clock and seed, and says which one failed.
fn for_each_case(seeds: u64, case: impl Fn(Clock, u64)) {
    for clock in CLOCKS {
        for seed in 0..seeds {
            let attempt = std::panic::AssertUnwindSafe(|| case(clock, seed));
            if let Err(panic) = std::panic::catch_unwind(attempt) {
                eprintln!("failed with {clock:?}, seed {seed}");
                std::panic::resume_unwind(panic);
            }
        }
    }
}

fn finish_of(seed: u64) -> Finish {
    FINISHES[(seed % FINISHES.len() as u64) as usize]
}

/// A recording of a program that ends by itself.
fn recorded(clock: Clock, seed: u64) -> (Program, Recorded) {
    let program = Program::random(seed, finish_of(seed));
    let recorded = record(clock, &program, &World::typing(seed), Disturbance::kicks(seed));
    (program, recorded)
}

#[track_caller]
fn assert_equal(recording: &Outcome, replay: &Outcome) {
    let (Conclusion::Ended(recorded), Conclusion::Ended(replayed)) =
        (&recording.conclusion, &replay.conclusion)
    else {
        panic!("recorded {:?}, replayed {:?}", recording.conclusion, replay.conclusion);
    };
    assert_eq!(recorded, replayed);
    assert_eq!(recording.moment, replay.moment);
    assert_eq!(recording.ticks, replay.ticks);
    assert_eq!(recording.effects, replay.effects);
    assert_eq!(recording.state, replay.state);
    assert_eq!(recording.events, replay.events);
    if recording.state.is_some() {
        assert_eq!(recording.virtual_ns, replay.virtual_ns);
        assert_eq!(recording.interrupts, replay.interrupts);
    }
}

/// Some of the records, the last one among them.
fn chosen(recorded: &Recorded, seed: u64) -> Vec<usize> {
    let count = recorded.records.len();
    let mut random = Random::new(seed ^ 0x6368_6f73_656e);
    let mut chosen: Vec<_> = (0..7).map(|_| random.below(count as u64) as usize).collect();
    chosen.push(count - 1);
    chosen
}

#[test]
fn a_replay_equals_its_recording_wherever_kicks_strike() {
    let interrupts = std::cell::Cell::new(0);
    let typed = std::cell::Cell::new(0);
    for_each_case(SEEDS, |clock, seed| {
        let (program, recorded) = recorded(clock, seed);
        let recording = recorded.outcome();
        interrupts.set(interrupts.get() + recording.interrupts);
        let consoles = recorded.records.iter().filter(|r| matches!(r.event, Event::Console(_)));
        typed.set(typed.get() + consoles.count());
        for replay_seed in [seed + 1000, seed + 2000] {
            let replay =
                replay(clock, &program, &recorded.records, Disturbance::kicks(replay_seed));
            assert_equal(recording, &replay);
            assert_eq!(replay.verified_until, recorded.records.last().map(|last| last.moment));
        }
    });
    assert!(interrupts.get() > 3_000, "only {} interrupts were delivered", interrupts.get());
    assert!(typed.get() > 500, "only {} console arrivals were recorded", typed.get());
}

#[test]
fn without_anybody_outside_kicks_change_nothing() {
    for_each_case(SEEDS, |clock, seed| {
        if clock.time == reprise_machine::clock::TimeSource::Host {
            return;
        }
        let program = Program::random(seed, finish_of(seed));
        let undisturbed = record(clock, &program, &World::empty(), Disturbance::none());
        let kicked = record(clock, &program, &World::empty(), Disturbance::kicks(seed + 7));
        let (undisturbed, kicked) = (undisturbed.outcome(), kicked.outcome());
        assert_eq!(undisturbed.state, kicked.state);
        assert_eq!(undisturbed.effects, kicked.effects);
        assert_eq!(undisturbed.moment, kicked.moment);
        assert_eq!(undisturbed.virtual_ns, kicked.virtual_ns);
    });
}

#[test]
fn the_host_sees_the_output_whose_digest_is_recorded() {
    for_each_case(20, |clock, seed| {
        let (program, recorded) = recorded(clock, seed);
        let effects = recorded.outcome().effects;
        assert_eq!(effects.console_bytes, recorded.output.len() as u64);
        assert_eq!(effects.console_digest, *blake3::hash(&recorded.output).as_bytes());
        let seen = std::rc::Rc::new(std::cell::RefCell::new(Vec::new()));
        let sink = seen.clone();
        let machine = replaying(clock, &program, &recorded.records, Disturbance::none());
        let (engine, board, inputs) = machine.into_parts();
        let inputs = inputs.on_console(move |bytes| sink.borrow_mut().extend_from_slice(bytes));
        let mut machine = reprise_machine::machine::Machine::new(engine, board, inputs, clock.time);
        machine.run().expect("the replay ends");
        assert_eq!(*seen.borrow(), recorded.output);
    });
}

#[test]
fn a_stop_from_outside_replays() {
    for_each_case(SEEDS, |clock, seed| {
        let finish = [Finish::SpinForever, Finish::ServeForever][(seed % 2) as usize];
        let program = Program::random(seed, finish);
        let mut random = Random::new(seed);
        let stop_at_ns = Some(random.below(2_000_000));
        let world = World { stop_at_ns, ..World::typing(seed) };
        let kicks = Disturbance { kick_every: Some(40), ..Disturbance::kicks(seed) };
        let recorded = record(clock, &program, &world, kicks);
        let recording = recorded.outcome();
        assert!(matches!(recording.conclusion, Conclusion::Ended(Ending::Stopped)));
        if clock.kind == TickKind::Instruction {
            assert!(recording.state.is_some(), "every instruction is an exact moment");
        }
        let replay = replay(clock, &program, &recorded.records, Disturbance::kicks(seed + 1));
        assert_equal(recording, &replay);
    });
}

/// The moment of a divergence; panics on any other outcome.
#[track_caller]
fn diverged(outcome: &Outcome) -> &reprise_machine::divergence::Divergence {
    outcome.divergence().unwrap_or_else(|| panic!("not noticed: {:?}", outcome.conclusion))
}

#[test]
fn a_changed_stamp_is_a_divergence_at_that_record() {
    for_each_case(12, |clock, seed| {
        let (program, recorded) = recorded(clock, seed);
        for index in chosen(&recorded, seed) {
            let original = &recorded.records[index];
            if matches!(&original.event, Event::End { final_digest: None, .. }) {
                continue;
            }
            let changes: [fn(&mut Record); 3] = [
                |record| record.cpu_digest ^= 1,
                |record| record.moment.rip ^= 1,
                |record| record.moment.rcx ^= 1,
            ];
            for change in changes {
                let mut records = recorded.records.clone();
                change(&mut records[index]);
                let outcome = replay(clock, &program, &records, Disturbance::kicks(seed + 3));
                assert_eq!(diverged(&outcome).moment, records[index].moment, "record {index}");
                let before = index.checked_sub(1).map(|before| records[before].moment);
                assert_eq!(outcome.verified_until, before);
            }
        }
    });
}

#[test]
fn a_record_at_another_tick_is_a_divergence() {
    for_each_case(12, |clock, seed| {
        let (program, recorded) = recorded(clock, seed);
        for index in chosen(&recorded, seed) {
            let mut records = recorded.records.clone();
            records[index].moment.tick += 1;
            let next = records.get(index + 1).map(|next| next.moment.tick);
            if next.is_some_and(|next| next < records[index].moment.tick) {
                continue;
            }
            let outcome = replay(clock, &program, &records, Disturbance::none());
            diverged(&outcome);
        }
    });
}

#[test]
fn a_record_without_a_place_is_passed() {
    let clock = CLOCKS[0];
    for seed in 0..20 {
        let (program, recorded) = recorded(clock, seed);
        // Where time follows ticks, no access asks for it, and it moves in sleep only.
        for event in [Event::ClockRead(1 << 40), Event::Time(1 << 40)] {
            let mut records = recorded.records.clone();
            let record = Record { event, ..records[0].clone() };
            records.insert(1, record);
            let outcome = replay(clock, &program, &records, Disturbance::kicks(seed));
            assert_eq!(diverged(&outcome).difference, Difference::Passed, "seed {seed}");
            assert_eq!(diverged(&outcome).moment, records[1].moment, "seed {seed}");
        }
    }
}

#[test]
fn a_changed_payload_does_not_go_unnoticed() {
    for_each_case(12, |clock, seed| {
        let (program, recorded) = recorded(clock, seed);
        if recorded.outcome().state.is_none() {
            return;
        }
        for index in chosen(&recorded, seed) {
            let mut records = recorded.records.clone();
            match &mut records[index].event {
                Event::Console(bytes) => bytes[0] ^= 0x20,
                Event::Mark(mark) => mark.console_bytes += 1,
                Event::End { ending, .. } => *ending = Ending::DebugExit(0x5a),
                // A time a little off may make no difference to this guest.
                Event::Time(ns) => *ns += 1 << 40,
                Event::ClockRead(ns) => *ns += 1 << 40,
                Event::HandOver(_) | Event::Assists(_) | Event::LeftOpen(_) => {
                    unreachable!("one engine, unassisted, that closes nothing")
                }
            }
            let outcome = replay(clock, &program, &records, Disturbance::none());
            let divergence = diverged(&outcome);
            if let Event::Mark(_) | Event::End { .. } = records[index].event {
                assert_eq!(divergence.moment, records[index].moment);
            }
        }
    });
}

/// The end and marks hold digests of what the machine is and of what left it: whichever is another one is told
/// as that, at that record.
#[test]
fn another_digest_is_told_as_what_it_is_of() {
    let changes: [(Difference, fn(&mut Event) -> bool); 5] = [
        (Difference::FinalState, |event| {
            let Event::End { final_digest: Some(digest), .. } = event else { return false };
            digest[31] ^= 1;
            true
        }),
        (Difference::Effects, |event| {
            let Event::End { effects, .. } = event else { return false };
            effects.console_digest[31] ^= 1;
            true
        }),
        (Difference::Effects, |event| {
            let Event::End { effects, .. } = event else { return false };
            effects.console_bytes += 1;
            true
        }),
        (Difference::Effects, |event| {
            let Event::Mark(mark) = event else { return false };
            mark.console_digest_prefix ^= 1;
            true
        }),
        (Difference::Effects, |event| {
            let Event::Mark(mark) = event else { return false };
            mark.console_bytes += 1;
            true
        }),
    ];
    let made = std::cell::Cell::new([0_u32; 5]);
    for_each_case(12, |clock, seed| {
        let (program, recorded) = recorded(clock, seed);
        for (number, (difference, change)) in changes.iter().enumerate() {
            let mut records = recorded.records.clone();
            let altered = records.iter_mut().rposition(|record| change(&mut record.event));
            let Some(index) = altered else { continue };
            let outcome = replay(clock, &program, &records, Disturbance::kicks(seed + 9));
            let found = diverged(&outcome);
            assert_eq!((found.difference, found.moment), (*difference, records[index].moment));
            let mut counts = made.get();
            counts[number] += 1;
            made.set(counts);
        }
    });
    assert!(made.get().iter().all(|count| *count > 0), "{:?}", made.get());
}

#[test]
fn a_log_cut_at_any_record_replays_to_the_cut() {
    for_each_case(12, |clock, seed| {
        let (program, recorded) = recorded(clock, seed);
        for kept in std::iter::once(0).chain(chosen(&recorded, seed)) {
            let records = &recorded.records[..kept];
            let outcome = replay(clock, &program, records, Disturbance::kicks(seed + 5));
            assert!(matches!(outcome.conclusion, Conclusion::CutShort { damage: None }));
            assert_eq!(outcome.verified_until, records.last().map(|last| last.moment));
            assert_eq!(outcome.events, kept as u64);
            match records.last() {
                // Read amid an instruction, which is finished before the replay stops.
                Some(last) if matches!(last.event, Event::ClockRead(_)) => {}
                Some(last) => assert_eq!(outcome.moment, last.moment),
                None => assert_eq!(outcome.ticks, 0),
            }
        }
    });
}

#[test]
fn a_missing_record_is_noticed() {
    for_each_case(12, |clock, seed| {
        let (program, recorded) = recorded(clock, seed);
        if recorded.outcome().state.is_none() {
            return;
        }
        for index in chosen(&recorded, seed) {
            let mut records = recorded.records.clone();
            let removed = records.remove(index);
            // Without a time, a guest may come to the same end a little earlier.
            if !matches!(removed.event, Event::Console(_) | Event::ClockRead(_)) {
                continue;
            }
            let outcome = replay(clock, &program, &records, Disturbance::none());
            diverged(&outcome);
        }
    });
}

#[test]
fn what_goes_past_the_log_is_noticed() {
    for_each_case(40, |clock, seed| {
        let (program, recorded) = recorded(clock, seed);
        if recorded.outcome().state.is_none() {
            return;
        }
        let flip = Disturbance { flip_at: Some(20 + seed % 10), ..Disturbance::none() };
        let outcome = replay(clock, &program, &recorded.records, flip);
        assert_eq!(diverged(&outcome).difference, Difference::FinalState);
    });
}

#[test]
fn a_full_disk_stops_the_guest_and_keeps_what_went_out() {
    for_each_case(30, |clock, seed| {
        let (program, whole) = recorded(clock, seed);
        let kicks = || Disturbance::kicks(seed);
        let world = World::typing(seed);
        let (_, _, sink) = record_into(clock, &program, &world, kicks(), MemorySink::default());
        let frames = sink.expect("the log is closed").frame_count();
        for frames_left in [0, 1, frames / 2, frames - 1] {
            if frames_left >= frames {
                continue;
            }
            let mut disk = FullDisk { kept: MemorySink::default(), frames_left };
            let (result, _, sink) = record_into(clock, &program, &world, kicks(), &mut disk);
            assert!(sink.is_none());
            let Err(MachineError::Recording { kept_until, .. }) = result else {
                panic!("not noticed with {frames_left} of {frames} frames: {result:?}");
            };
            let kept = records_of(disk.kept.into_reader());
            assert_eq!(kept, whole.records[..kept.len()]);
            assert_eq!(kept_until, kept.last().map(|last| last.moment));
            let outcome = replay(clock, &program, &kept, Disturbance::none());
            assert!(matches!(outcome.conclusion, Conclusion::CutShort { damage: None }));
        }
    });
}

#[test]
fn a_failing_engine_leaves_a_recording_that_replays() {
    let failures = std::cell::Cell::new(0);
    for_each_case(40, |clock, seed| {
        let program = Program::random(seed, Finish::DebugExit);
        let fail_at = Some(30 + seed * 13 % 400);
        let failing = Disturbance { fail_at, ..Disturbance::kicks(seed) };
        let recorded = record(clock, &program, &World::typing(seed), failing);
        let Err(error) = recorded.result else {
            return; // The program was too short.
        };
        assert!(matches!(error, MachineError::Engine(_)));
        failures.set(failures.get() + 1);
        let outcome = replay(clock, &program, &recorded.records, Disturbance::none());
        assert!(matches!(outcome.conclusion, Conclusion::CutShort { damage: None }));
    });
    assert!(failures.get() > 100, "only {} runs failed", failures.get());
}

#[test]
fn what_the_engine_cannot_execute_is_an_ending_with_its_reason() {
    let program = Program::random(1, Finish::Unsupported);
    let recorded = record(CLOCKS[0], &program, &World::empty(), Disturbance::none());
    let expected = Ending::EngineFailed("no such toy".to_owned());
    assert!(matches!(&recorded.outcome().conclusion, Conclusion::Ended(e) if *e == expected));
    // Replayed by an engine that cannot do it either, it is the recorded ending.
    let outcome = replay(CLOCKS[0], &program, &recorded.records, Disturbance::none());
    assert!(matches!(&outcome.conclusion, Conclusion::Ended(e) if *e == expected));
}

/// What an engine cannot execute says nothing about a recording that went on there.
#[test]
fn an_engine_that_gives_up_in_a_replay_is_no_divergence() {
    let [gives_up, goes_on] =
        [Finish::Unsupported, Finish::DebugExit].map(|finish| Program::random(1, finish));
    let recorded = record(CLOCKS[0], &goes_on, &World::empty(), Disturbance::none());
    let mut machine = replaying(CLOCKS[0], &gives_up, &recorded.records, Disturbance::none());
    match machine.run() {
        Err(MachineError::Engine(error)) => assert_eq!(error.what, "no such toy"),
        other => panic!("{other:?}"),
    }
}

/// As AMD's KVM does before it tells of a triple fault.
#[test]
fn a_triple_fault_behind_which_the_cpu_was_reset_is_no_exact_moment() {
    for clock in CLOCKS {
        let program = Program::random(3, Finish::TripleFault);
        let host = |resets| Disturbance { resets, ..Disturbance::none() };
        for resets in [true, false] {
            let recorded = record(clock, &program, &World::empty(), host(resets));
            assert_eq!(recorded.outcome().state.is_none(), resets);
            let replayed = replay(clock, &program, &recorded.records, host(!resets));
            let conclusion = replayed.conclusion;
            assert!(matches!(conclusion, Conclusion::Ended(Ending::TripleFault)), "{conclusion:?}");
        }
    }
}

#[test]
fn every_ending_is_recorded_as_what_it_is() {
    for clock in CLOCKS {
        let ending = |finish| {
            let program = Program::random(3, finish);
            let recorded = record(clock, &program, &World::empty(), Disturbance::none());
            match recorded.result.expect("the run ends").conclusion {
                Conclusion::Ended(ending) => ending,
                other => panic!("{other:?}"),
            }
        };
        assert!(matches!(ending(Finish::DebugExit), Ending::DebugExit(_)));
        assert_eq!(ending(Finish::Reset), Ending::Reset);
        assert_eq!(ending(Finish::PowerOff), Ending::PowerOff);
        assert_eq!(ending(Finish::TripleFault), Ending::TripleFault);
        assert_eq!(ending(Finish::IdleForever), Ending::IdleForever);
    }
}

#[test]
fn a_replay_stops_at_the_tick_asked_for() {
    for_each_case(60, |clock, seed| {
        let (program, recorded) = recorded(clock, seed);
        let ticks = recorded.outcome().ticks;
        let target = 1 + Random::new(seed).below(ticks);
        let stop = |kicks| {
            let mut machine = replaying(clock, &program, &recorded.records, kicks);
            let outcome = machine.run_until(target).expect("the replay stops");
            (outcome, machine)
        };
        let (first, mut machine) = stop(Disturbance::kicks(seed + 11));
        let (second, _) = stop(Disturbance::none());
        assert_eq!(first.state, second.state);
        assert_eq!(first.moment, second.moment);
        if matches!(first.conclusion, Conclusion::TargetReached) {
            assert!(first.ticks >= target);
            // And it goes on from there to the same end.
            assert_equal(recorded.outcome(), &machine.run().expect("the replay ends"));
        }
    });
}

#[test]
fn a_forged_time_is_refused() {
    let clock = CLOCKS[1];
    let (program, recorded) = recorded(clock, 0);
    let time = |record: &Record| matches!(record.event, Event::Time(_) | Event::ClockRead(_));
    let index = recorded.records.iter().position(time).expect("time enters");
    let mut records = recorded.records.clone();
    match &mut records[index].event {
        Event::Time(ns) | Event::ClockRead(ns) => *ns = u64::MAX,
        _ => unreachable!("it is a time"),
    }
    let outcome = replay(clock, &program, &records, Disturbance::none());
    assert_eq!(diverged(&outcome).difference, Difference::Time);
}
