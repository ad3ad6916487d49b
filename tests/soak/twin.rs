//! An engine that is two: the software CPU with translated code, and the same without, each with RAM
//! of its own. Whatever the machine asks of it both do, in steps of random length, and behind each
//! step both must stand alike.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use reprise_cpu::engine::SoftEngine;
use reprise_cpu::profile::Profile;
use reprise_cpu::translate::Translation;
use reprise_machine::clock::TimeBase;
use reprise_machine::engine::{Engine, EngineError, Exit, FlagKick, Kick};
use reprise_machine::ram::GuestRam;
use reprise_random::Random;
use reprise_trace::cpu_state::CpuState;
use reprise_trace::moment::{Moment, TickKind};

use crate::difference::differences;

/// How long steps are, at most, each with its weight: the shortest end in the midst of blocks and
/// units, the longest run through many of them.
const STEPS: &[(u64, u64)] = &[(10, 3), (25, 100), (35, 5_000), (30, 60_000)];

/// Two software CPUs that must do the same.
pub(crate) struct Twin {
    translated: SoftEngine,
    interpreted: SoftEngine,
    seed: u64,
    random: Random,
    /// Where both last stood alike.
    agreed: Moment,
    /// RAM is compared whenever so many instructions have run.
    ram_every: u64,
    ram_due: u64,
    steps: u64,
    kick: FlagKick,
}

impl Twin {
    /// Both engines from the same guest, once in each RAM.
    pub(crate) fn new(
        rams: [GuestRam; 2],
        state: &CpuState,
        translation: Translation,
        seed: u64,
        ram_every: u64,
    ) -> Self {
        let [mut translated, mut interpreted] = rams.map(|ram| {
            let mut engine = SoftEngine::new(ram).expect("the host gives memory for code");
            engine.set_cpu_state(state).expect("a first state");
            engine.start_profile();
            engine
        });
        translated.set_translation(translation);
        interpreted.set_translation(Translation::Never);
        let agreed = Moment { tick: 0, rip: state.rip, rcx: 0 };
        let (random, kick) = (Random::new(seed), FlagKick::default());
        let ram_due = ram_every;
        Self { translated, interpreted, seed, random, agreed, ram_every, ram_due, steps: 0, kick }
    }

    /// Steps that both have made.
    pub(crate) fn steps(&self) -> u64 {
        self.steps
    }

    /// What the translated and the interpreted engine counted.
    pub(crate) fn profiles(&self) -> [Profile; 2] {
        [&self.translated, &self.interpreted].map(|engine| engine.profile().expect("it was begun"))
    }

    #[track_caller]
    fn differ(&mut self, what: &str, values: &str) -> ! {
        let [here, there] = [&mut self.translated, &mut self.interpreted]
            .map(|engine| engine.moment().expect("the software CPU always tells"));
        panic!(
            "seed {:#x}: {what} differs at tick {} (interpreted {}), RIP {:#x} (interpreted {:#x}), \
             translated and interpreted:\n{values}\nboth stood alike at tick {}, RIP {:#x}",
            self.seed,
            here.tick,
            there.tick,
            here.rip,
            there.rip,
            self.agreed.tick,
            self.agreed.rip
        );
    }

    #[track_caller]
    fn same<T: PartialEq + std::fmt::Debug>(&mut self, what: &str, one: T, other: T) -> T {
        if one != other {
            self.differ(what, &format!("  {one:x?} and {other:x?}"));
        }
        one
    }

    /// Compares all that can be seen of the CPUs.
    fn compare_states(&mut self) -> Result<CpuState, EngineError> {
        let (one, other) = (self.translated.cpu_state()?, self.interpreted.cpu_state()?);
        if one != other {
            self.differ("the CPU's state", &differences(&one, &other));
        }
        let [tick, other_tick] = [&self.translated, &self.interpreted].map(Engine::tick);
        self.same("the tick", tick, other_tick);
        self.agreed = self.translated.moment()?;
        Ok(one)
    }

    /// Compares all of RAM.
    pub(crate) fn compare_ram(&mut self) {
        // What one leaves out is zero there, so each is held to the other.
        let found = first_difference(&self.translated, &self.interpreted)
            .or_else(|| first_difference(&self.interpreted, &self.translated));
        if let Some(address) = found {
            let [one, other] = [&self.translated, &self.interpreted].map(|engine| {
                let mut bytes = [0; 8];
                engine.read_ram(address, &mut bytes);
                u64::from_le_bytes(bytes)
            });
            let values = format!("  at {address:#x}: {one:#x} and {other:#x}");
            self.differ("RAM", &values);
        }
    }

    /// Runs both to `cut`.
    fn step(&mut self, cut: u64) -> Result<Exit, EngineError> {
        let (one, other) = (self.translated.run(cut)?, self.interpreted.run(cut)?);
        let exit = self.same("the exit", one, other);
        self.steps += 1;
        // Also before an access is answered, where the instruction has done nothing yet, or in both
        // the same part of a REP.
        self.compare_states()?;
        let tick = self.tick();
        assert!(tick <= cut, "seed {:#x}: at tick {tick}, asked to stop at {cut}", self.seed);
        if self.tick() >= self.ram_due {
            self.ram_due = self.tick() + self.ram_every;
            self.compare_ram();
        }
        Ok(exit)
    }
}

/// The address of the first eight bytes of `one`'s RAM that `other` has otherwise.
fn first_difference(one: &SoftEngine, other: &SoftEngine) -> Option<u64> {
    let mut found = None;
    let mut there = Vec::new();
    one.visit_ram(&mut |start, here| {
        there.resize(here.len(), 0);
        other.read_ram(start, &mut there);
        if found.is_none() && *here != *there {
            let words = here.chunks(8).zip(there.chunks(8));
            let at = words.take_while(|(here, there)| here == there).count();
            found = Some(start + 8 * at as u64);
        }
    });
    found
}

impl Engine for Twin {
    fn tick_kind(&self) -> TickKind {
        self.translated.tick_kind()
    }

    fn tick(&self) -> u64 {
        self.translated.tick()
    }

    fn run(&mut self, until: u64) -> Result<Exit, EngineError> {
        loop {
            let longest = self.random.weighted(STEPS);
            let length = 1 + self.random.below(longest);
            let cut = until.min(self.tick().saturating_add(length));
            let exit = self.step(cut)?;
            if exit != Exit::TickReached || cut == until {
                return Ok(exit);
            }
            if self.kick.0.swap(false, Ordering::AcqRel) {
                return Ok(Exit::Kicked);
            }
        }
    }

    fn finish_access(&mut self, value: u128) -> Result<(), EngineError> {
        self.translated.finish_access(value)?;
        self.interpreted.finish_access(value)?;
        self.compare_states().map(drop)
    }

    fn interruptible(&mut self) -> Result<bool, EngineError> {
        let (one, other) = (self.translated.interruptible()?, self.interpreted.interruptible()?);
        Ok(self.same("whether it can be interrupted", one, other))
    }

    fn set_interrupt_request(&mut self, wanted: bool) {
        self.translated.set_interrupt_request(wanted);
        self.interpreted.set_interrupt_request(wanted);
    }

    fn inject(&mut self, vector: u8) -> Result<(), EngineError> {
        self.translated.inject(vector)?;
        self.interpreted.inject(vector)?;
        self.compare_states().map(drop)
    }

    fn set_time_base(&mut self, base: TimeBase) {
        self.translated.set_time_base(base);
        self.interpreted.set_time_base(base);
    }

    fn moment(&mut self) -> Result<Moment, EngineError> {
        let (one, other) = (self.translated.moment()?, self.interpreted.moment()?);
        Ok(self.same("the moment", one, other))
    }

    fn cpu_state(&mut self) -> Result<CpuState, EngineError> {
        self.compare_states()
    }

    fn set_cpu_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.translated.set_cpu_state(state)?;
        self.interpreted.set_cpu_state(state)
    }

    fn read_ram(&self, address: u64, bytes: &mut [u8]) {
        self.translated.read_ram(address, bytes);
    }

    fn visit_ram(&self, visit: &mut dyn FnMut(u64, &[u8])) {
        self.translated.visit_ram(visit);
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::new(self.kick.clone())
    }
}
