//! Interrupts at the positions that are hard to find again, each under four seeds and more: the guest
//! `positions` is recorded on hardware that kicks often, its clock led to the next branch or left
//! where it is, and replayed on others and on the soft engine.

use crate::case::{Case, Hardware, Recorded, assert_equal};
use crate::guest;
use crate::met::{ANY, Met, POSITIONS, Position};
use reprise_branch_clock::settle::Stand;
use reprise_simulated_hardware::Disturbance;

/// Recordings of each scenario and policy, unless `REPRISE_POSITIONS_RECORDINGS` asks for more.
const RECORDINGS: u64 = 4;
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

/// How a scenario is recorded: distances are mean numbers of instructions.
#[derive(Clone, Copy)]
struct Manner {
    kick_every: u64,
    signal_every: u64,
    timer_hz: u64,
    interrupts: u64,
    typed: usize,
    longest_pause_ns: u64,
}

/// As those were that failed once.
const AS_ONCE: Manner = Manner {
    kick_every: 3_000,
    signal_every: 9_000,
    timer_hz: 18_000,
    interrupts: 8,
    typed: 1,
    longest_pause_ns: 3_000_000,
};

/// Kicks and interrupts so often that every position of a scenario gets its turn, and typing so fast that
/// input comes where the timer is due.
fn often(name: &str) -> Manner {
    let plain = Manner {
        kick_every: 500,
        signal_every: 3_000,
        timer_hz: 100_000,
        interrupts: 40,
        typed: 8,
        longest_pause_ns: 20_000,
    };
    match name {
        // Mostly the guest sleeps.
        "hlt" => Manner { kick_every: 12, interrupts: 400, typed: 80, ..plain },
        // Its handlers' first instructions are few among many.
        "rep" | "user" => Manner { kick_every: 100, ..plain },
        _ => plain,
    }
}

impl Manner {
    fn hardware(&self, seed: u64, stand: Stand) -> Hardware {
        let disturbance = Disturbance {
            kick_every: Some(self.kick_every),
            signal_every: Some(self.signal_every),
            forget_every: Some(5_000),
            access_every: Some(1_000),
            ..Disturbance::intel(seed)
        };
        Hardware { disturbance, stand, ..Hardware::intel(seed) }
    }
}

/// Gives the interrupts, and how often each of the scenario's positions was met.
fn check(name: &str, manner: &Manner, stand: Stand, seed: u64) -> (u64, Vec<usize>) {
    let Manner { timer_hz, interrupts, longest_pause_ns, .. } = *manner;
    let cmdline = format!("do={name} hz={timer_hz} count={interrupts}");
    let typed = "two at one moment ".repeat(manner.typed);
    let case = Case { longest_pause_ns, ..guest("positions", &cmdline, &typed) };
    let (recorded, seen) = case.record_watched(&manner.hardware(seed, stand));
    let banner = format!("positions: {name}, hash ");
    assert!(recorded.console.contains(&banner), "seed {seed}: {:?}", recorded.console);
    for replay in 0..REPLAYS {
        let other = 1_000 * (seed + 1) + replay;
        replay_on(&case, &recorded, &AS_ONCE.hardware(other, stand));
        replay_on(&case, &recorded, &Hardware::zen(other));
    }
    case.expand(&recorded, &case.header());
    let met = Met { seen: &seen, records: &recorded.records };
    (recorded.outcome.interrupts, positions_of(name).map(|(_, _, count)| count(&met)).collect())
}

/// The positions that a scenario is to meet. In `window` nothing is taken where it arrives, as its own rows say.
fn positions_of(name: &str) -> impl Iterator<Item = &Position> {
    let of_any = move |scenario| scenario == ANY && name != "window";
    POSITIONS.iter().filter(move |(scenario, ..)| *scenario == name || of_any(*scenario))
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

/// Of this scenario. Between user code and kernel single instructions are to be met, which is seldom.
fn recordings_of(name: &str) -> u64 {
    if name == "user" { 2 * RECORDINGS } else { RECORDINGS }
}

/// Both policies, each under all seeds.
fn check_all(name: &str) {
    check_led_to(name, &[Stand::BehindBranch, Stand::AtOnce]);
}

/// These policies, each under all seeds.
fn check_led_to(name: &str, stands: &[Stand]) {
    let mut met = vec![0; positions_of(name).count()];
    for &stand in stands {
        let mut interrupts = 0;
        let recordings = std::env::var("REPRISE_POSITIONS_RECORDINGS")
            .map_or(recordings_of(name), |count| count.parse().expect("it is a number"));
        for seed in 0..recordings {
            eprintln!("{name}, {stand:?}, recorded under seed {seed}");
            let (came, counts) = check(name, &often(name), stand, seed);
            interrupts += came;
            met.iter_mut().zip(counts).for_each(|(met, count)| *met += count);
        }
        assert!(interrupts >= 40 * recordings, "only {interrupts} interrupts landed");
    }
    for ((_, position, _), count) in positions_of(name).zip(met) {
        eprintln!("{name}: {position}, {count} times");
        assert!(count > 0, "{name} does not meet {position}");
    }
    let again = |(failed, ..): &&(&str, Stand, u64)| *failed == name;
    for (_, stand, seed) in FAILED_ONCE.iter().filter(again) {
        eprintln!("{name}, {stand:?}, recorded under seed {seed}, which failed once");
        check(name, &AS_ONCE, *stand, *seed);
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

/// Not left where it is: most of its places are the same in every round.
#[test]
fn in_a_loop_whose_rounds_memory_tells_apart() {
    check_led_to("memory", &[Stand::BehindBranch]);
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
