//! Runs a guest instruction by instruction without translation, and then translated, in steps of many
//! lengths: wherever a step ends, the CPU must stand as it stood there instruction by instruction.
#![allow(dead_code)] // Each test file uses a part of it.

use reprise_cpu::profile::Profile;
use reprise_cpu::translate::Translation;
use reprise_machine::engine::{Engine, Exit};
use reprise_trace::cpu_state::CpuState;

use crate::guest::Guest;
use reprise_random::Random;

/// Instructions of a guest, at most.
const TICKS: u64 = 20_000;
const FIRST_SEED: u64 = 0x10c5_7e90;

/// What a guest came to, however it was run.
pub(crate) struct Lockstep {
    pub(crate) exit: Exit,
    pub(crate) ticks: u64,
    pub(crate) state: CpuState,
    /// The state at each tick.
    pub(crate) states: Vec<CpuState>,
    /// What was counted when blocks were translated as they became hot, run at one go.
    pub(crate) profile: Profile,
}

type Ram = Vec<(u64, Vec<u8>)>;

fn ram(engine: &impl Engine) -> Ram {
    let mut ram = Vec::new();
    engine.visit_ram(&mut |address, bytes| {
        for (page, bytes) in (address..).step_by(0x1000).zip(bytes.chunks(0x1000)) {
            if bytes.iter().any(|byte| *byte != 0) {
                ram.push((page, bytes.to_vec()));
            }
        }
    });
    ram
}

/// Runs the guest that `make` makes, always the same, to its halt, in every way. `what` names the case.
///
/// # Panics
/// If two ways differ, or the guest does not halt.
pub(crate) fn lockstep(what: &str, make: impl Fn() -> Guest) -> Lockstep {
    let mut engine = make().engine();
    engine.set_translation(Translation::Never);
    let mut states = vec![engine.cpu_state().expect("state")];
    let exit = loop {
        assert!(engine.tick() < TICKS, "{what}: the guest does not halt");
        let exit = engine.run(engine.tick() + 1).expect("runs");
        states.push(engine.cpu_state().expect("state"));
        if exit != Exit::TickReached {
            break exit;
        }
    };
    let reference = (exit, engine.tick(), ram(&engine));
    let profile =
        follow(&format!("{what}, when hot"), &make, Translation::WhenHot, 0, &states, &reference);
    follow(&format!("{what}, at once"), &make, Translation::AtOnce, 0, &states, &reference);
    for seed in FIRST_SEED..FIRST_SEED + 2 {
        for translation in [Translation::WhenHot, Translation::AtOnce] {
            let what = format!("{what}, {translation:?}, seed {seed:#x}");
            follow(&what, &make, translation, seed, &states, &reference);
        }
    }
    let (exit, ticks, _) = reference;
    let state = states[states.len() - 1].clone();
    Lockstep { exit, ticks, state, states, profile }
}

/// Runs the guest with translated code and compares; `seed` 0 makes one step of it.
fn follow(
    what: &str,
    make: impl Fn() -> Guest,
    translation: Translation,
    seed: u64,
    states: &[CpuState],
    reference: &(Exit, u64, Ram),
) -> Profile {
    let mut engine = make().engine();
    engine.set_translation(translation);
    engine.start_profile();
    let mut random = Random::new(seed);
    let mut alike_at = 0;
    let exit = loop {
        let step = if seed == 0 { 2 * TICKS } else { 1 + random.below(90) };
        let asked = engine.tick() + step;
        let exit = engine.run(asked).expect("runs");
        let (tick, state) = (engine.tick(), engine.cpu_state().expect("state"));
        assert!(tick <= asked, "{what}: at tick {tick}, asked to stop at {asked}");
        // A triple fault leaves the count where it was.
        let expected = match &exit {
            Exit::TickReached => states.get(tick as usize),
            _ => states.last(),
        };
        assert!(
            expected == Some(&state),
            "{what}: at tick {tick}, alike at {alike_at}: {state:#x?}\ninstead of {expected:#x?}"
        );
        alike_at = tick;
        if exit != Exit::TickReached {
            break exit;
        }
        assert_eq!(tick, asked, "{what}: it stops where it was asked to");
        assert!(tick < TICKS, "{what}: the guest does not halt");
    };
    assert_eq!((&exit, engine.tick()), (&reference.0, reference.1), "{what}");
    let (one, other) = (ram(&engine), &reference.2);
    let changed = one.iter().zip(other).find(|(here, there)| here != there);
    assert!(
        one == *other,
        "{what}: RAM differs, first in page {:x?}",
        changed.map(|(page, _)| page.0)
    );
    engine.profile().expect("it was begun")
}

/// Machine code that is put together at its address.
pub(crate) struct Code {
    base: u64,
    pub(crate) bytes: Vec<u8>,
}

impl Code {
    pub(crate) fn at(base: u64) -> Self {
        Self { base, bytes: Vec::new() }
    }

    /// The next instruction's address.
    pub(crate) fn here(&self) -> u64 {
        self.base + self.bytes.len() as u64
    }

    /// Appends instructions.
    pub(crate) fn put(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend(bytes);
        self
    }

    /// Appends an instruction whose last four bytes lead to `target`, relative to its end.
    pub(crate) fn to(self, opcode: &[u8], target: u64) -> Self {
        let next = self.here() + opcode.len() as u64 + 4;
        let distance = target.wrapping_sub(next) as u32;
        self.put(opcode).put(&distance.to_le_bytes())
    }

    /// Appends NOPs up to an address.
    pub(crate) fn up_to(mut self, address: u64) -> Self {
        while self.here() < address {
            self.bytes.push(0x90);
        }
        assert_eq!(self.here(), address, "the code before is too long");
        self
    }
}
