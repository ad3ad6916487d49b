//! [`Relay`]: one engine after the other over the same guest RAM.
//!
//! At a hand-over the state is taken out of the engine that executes, a new engine is made, and that one goes
//! on with the state from the same tick. What an engine keeps beside the CPU's state (decoded code,
//! what its TLB knows) stays behind, in a recording and its replay alike.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use reprise_trace::checkpoint::{EngineState, HiddenState};
use reprise_trace::cpu_state::CpuState;
use reprise_trace::event::{Assists, HandOver};
use reprise_trace::moment::{Moment, TickKind};

use crate::clock::TimeBase;
use crate::engine::{Engine, EngineError, Exit, Kick};
use crate::inputs::Stamp;
use crate::ram::GuestRam;

/// Makes the engine of a stretch.
pub type MakeEngine = Box<dyn FnMut(&HandOver, GuestRam) -> Result<Box<dyn Engine>, EngineError>>;

/// An engine that becomes another one at each hand-over.
pub struct Relay {
    active: Box<dyn Engine>,
    ram: GuestRam,
    make: MakeEngine,
    kick: Arc<RelayKick>,
    /// What engines before the active one refused.
    assists: Assists,
    /// One of those before may have set accessed bits early: what comes of that shows later.
    set_early: bool,
    /// The distance that an engine which stops late is to keep, whichever stretch it executes.
    widened: Option<(u64, u32)>,
}

/// Kicks whichever engine is active.
struct RelayKick(Mutex<Arc<dyn Kick>>);

impl RelayKick {
    fn active(&self) -> MutexGuard<'_, Arc<dyn Kick>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kick for RelayKick {
    fn kick(&self) {
        self.active().kick();
    }
}

impl Relay {
    /// An engine that begins as `first` over `ram`.
    ///
    /// # Errors
    /// If `make` fails, or makes what does not count as the stretch does.
    pub fn new(ram: GuestRam, first: &HandOver, mut make: MakeEngine) -> Result<Self, EngineError> {
        let active = made(&mut make, first, &ram)?;
        let kick = Arc::new(RelayKick(Mutex::new(active.kicker())));
        Ok(Self {
            active,
            ram,
            make,
            kick,
            assists: Assists::new(),
            set_early: false,
            widened: None,
        })
    }

    fn add_assists(&self) -> Assists {
        let mut assists = self.assists.clone();
        for (mnemonic, count) in self.active.assists() {
            *assists.entry(mnemonic).or_default() += count;
        }
        assists
    }
}

/// The engine of a stretch. Its ticks go into the log, or are looked for, as the stretch's.
fn made(
    make: &mut MakeEngine,
    on: &HandOver,
    ram: &GuestRam,
) -> Result<Box<dyn Engine>, EngineError> {
    let engine = make(on, ram.share())?;
    if engine.tick_kind() == on.tick_kind {
        return Ok(engine);
    }
    let HandOver { engine: name, clock, .. } = on;
    let what =
        format!("no engine here counts as engine {name}, clock {clock} does: use --engine soft");
    Err(EngineError { what })
}

impl Engine for Relay {
    fn become_engine(&mut self, to: &HandOver) -> Result<bool, EngineError> {
        let Some(EngineState { tick, cpu, .. }) = self.active.state_for_successor()? else {
            let what = "the guest stands amid an instruction where it is to be handed over: replay it \
                        on the engine that recorded it";
            return Err(EngineError { what: what.to_owned() });
        };
        let mut next = made(&mut self.make, to, &self.ram)?;
        let hidden = HiddenState { engine: String::new(), version: 0, bytes: Vec::new() };
        next.restore(&EngineState { tick, cpu, hidden })?;
        if let Some((until, times)) = self.widened {
            next.widen_margin(until, times);
        }
        self.assists = self.add_assists();
        self.set_early = self.sets_accessed_bits_early();
        *self.kick.active() = next.kicker();
        self.active = next;
        // One that came for the engine before is not lost.
        self.kick.kick();
        Ok(true)
    }

    fn assists(&self) -> Assists {
        self.add_assists()
    }

    fn instructions(&self) -> Option<u64> {
        self.active.instructions()
    }

    fn pause_at(&mut self, instructions: Option<u64>) -> bool {
        self.active.pause_at(instructions)
    }

    fn is_paused(&self) -> bool {
        self.active.is_paused()
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.kick.clone()
    }

    fn tick_kind(&self) -> TickKind {
        self.active.tick_kind()
    }

    fn tick(&self) -> u64 {
        self.active.tick()
    }

    fn run(&mut self, until: u64) -> Result<Exit, EngineError> {
        self.active.run(until)
    }

    fn run_to(&mut self, stamp: &Stamp) -> Result<Exit, EngineError> {
        self.active.run_to(stamp)
    }

    fn comes_exactly(&mut self, stamp: &Stamp) -> Result<bool, EngineError> {
        self.active.comes_exactly(stamp)
    }

    fn run_about(&mut self, until: u64) -> Result<Exit, EngineError> {
        self.active.run_about(until)
    }

    fn widen_margin(&mut self, until: u64, times: u32) {
        self.widened = Some((until, times));
        self.active.widen_margin(until, times);
    }

    fn comes_late(&self) -> bool {
        self.active.comes_late()
    }

    fn sets_accessed_bits_early(&self) -> bool {
        self.set_early || self.active.sets_accessed_bits_early()
    }

    fn stands_exactly(&self) -> bool {
        self.active.stands_exactly()
    }

    fn ask_for_time_stamp(&mut self) -> Result<bool, EngineError> {
        self.active.ask_for_time_stamp()
    }

    fn finish_access(&mut self, value: u128) -> Result<(), EngineError> {
        self.active.finish_access(value)
    }

    fn amid_accesses(&mut self) -> Result<bool, EngineError> {
        self.active.amid_accesses()
    }

    fn interruptible(&mut self) -> Result<bool, EngineError> {
        self.active.interruptible()
    }

    fn set_interrupt_request(&mut self, wanted: bool) {
        self.active.set_interrupt_request(wanted);
    }

    fn inject(&mut self, vector: u8) -> Result<(), EngineError> {
        self.active.inject(vector)
    }

    fn undefined_flags(&mut self) -> u64 {
        self.active.undefined_flags()
    }

    fn set_undefined_flags(&mut self, rflags: u64) -> Result<(), EngineError> {
        self.active.set_undefined_flags(rflags)
    }

    fn set_time_base(&mut self, base: TimeBase) {
        self.active.set_time_base(base);
    }

    fn moment(&mut self) -> Result<Moment, EngineError> {
        self.active.moment()
    }

    fn cpu_state(&mut self) -> Result<CpuState, EngineError> {
        self.active.cpu_state()
    }

    fn set_cpu_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.active.set_cpu_state(state)
    }

    fn read_ram(&self, address: u64, bytes: &mut [u8]) {
        self.ram.read(address, bytes);
    }

    fn visit_ram(&self, visit: &mut dyn FnMut(u64, &[u8])) {
        self.ram.visit(visit);
    }

    fn start_capture(&mut self, visit: &mut dyn FnMut(u64, &[u8])) {
        self.active.start_capture(visit);
    }

    fn continue_capture(&mut self, max_pages: usize, visit: &mut dyn FnMut(u64, &[u8])) -> bool {
        self.active.continue_capture(max_pages, visit)
    }

    fn save(&mut self) -> Result<Option<EngineState>, EngineError> {
        self.active.save()
    }

    fn restore(&mut self, state: &EngineState) -> Result<(), EngineError> {
        self.active.restore(state)
    }
}
