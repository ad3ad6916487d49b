//! Checkpoints: taking a machine's whole state at a moment, and going on from it.
//!
//! A checkpoint is of a machine that stands at an instruction boundary which a replay finds again by
//! its tick, awake, before anything enters it there. Only the machine knows that it stands so, and says
//! it with a [`Consistent`], which nothing else can make.
//!
//! A machine that runs stops for a checkpoint only as long as it takes to copy what is not RAM. RAM is
//! copied slice by slice at the boundaries that follow, while the engine keeps what the guest is about to
//! change.

use reprise_devices::board::{Board, BoardState};
use reprise_devices::state::LoadError;
use reprise_trace::checkpoint::{
    CheckpointDigest, EngineState, MachineState, PAGE_BYTES, RamDigest, page_digest,
};

use crate::clock::{MAX_VIRTUAL_NS, TimeBase, TimeSource};
use crate::effects::Effects;
use crate::engine::{Engine, EngineError};
use crate::inputs::{Inputs, Replaying};
use crate::machine::Machine;

/// Why a machine cannot go on from a checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum ResumeError {
    /// The engine does not take the state.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A device does not take its state.
    #[error(transparent)]
    Device(#[from] LoadError),
    /// No machine is ever in this state.
    #[error("the checkpoint holds a state that no machine reaches: take another one")]
    Impossible,
}

/// The proof that a machine stands where a checkpoint can be taken, and the machine.
pub struct Consistent<'m> {
    machine: &'m mut dyn Whole,
    engine: EngineState,
}

impl std::fmt::Debug for Consistent<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Consistent").field("tick", &self.tick()).finish_non_exhaustive()
    }
}

/// A machine, whatever its engine and inputs.
trait Whole {
    fn state_with(&mut self, engine: EngineState) -> Result<MachineState, EngineError>;
    fn visit_ram(&self, visit: &mut dyn FnMut(u64, &[u8]));
    fn start_capture(&mut self, visit: &mut dyn FnMut(u64, &[u8]));
    fn continue_capture(&mut self, max_pages: usize, visit: &mut dyn FnMut(u64, &[u8])) -> bool;
}

impl Consistent<'_> {
    /// The tick at which the machine stands.
    pub fn tick(&self) -> u64 {
        self.engine.tick
    }
}

/// Takes a checkpoint: gives `visit` the pages of guest RAM (guest-physical address, 4096 bytes) and
/// returns all other state. The pages are, at this machine's first checkpoint, all that may not be zero;
/// later, those that may have been written since the last one.
///
/// # Errors
/// If the engine fails.
pub fn checkpoint(
    machine: Consistent<'_>,
    visit: &mut dyn FnMut(u64, &[u8]),
) -> Result<MachineState, EngineError> {
    let Consistent { machine, engine } = machine;
    machine.start_capture(&mut by_page(visit));
    machine.continue_capture(usize::MAX, &mut by_page(visit));
    machine.state_with(engine)
}

/// As [`checkpoint`], but shows only the pages that the engine cannot keep: the machine gives all others
/// to its [`Checkpointer`] while it runs on.
///
/// # Errors
/// If the engine fails.
pub fn start_checkpoint(
    machine: Consistent<'_>,
    visit: &mut dyn FnMut(u64, &[u8]),
) -> Result<MachineState, EngineError> {
    let Consistent { machine, engine } = machine;
    machine.start_capture(&mut by_page(visit));
    machine.state_with(engine)
}

/// Takes pieces of whole pages apart.
fn by_page(visit: &mut dyn FnMut(u64, &[u8])) -> impl FnMut(u64, &[u8]) {
    move |start, piece| {
        for (address, page) in (start..).step_by(PAGE_BYTES).zip(piece.chunks(PAGE_BYTES)) {
            visit(address, page);
        }
    }
}

/// The digest that a checkpoint here has. Costs a pass over the guest RAM that was ever touched.
///
/// # Errors
/// If the engine fails.
pub fn digest(machine: Consistent<'_>) -> Result<CheckpointDigest, EngineError> {
    let Consistent { machine, engine } = machine;
    let mut ram = RamDigest::default();
    machine.visit_ram(&mut by_page(&mut |address, page| {
        if let Some(digest) = page_digest(page) {
            ram.page(address, &digest);
        }
    }));
    Ok(machine.state_with(engine)?.digest(ram.finish()))
}

/// Takes a machine's checkpoints while it runs.
pub trait Checkpointer {
    /// The tick at which the machine, which stands at `tick` and `virtual_ns`, shall stand for the next
    /// checkpoint; `None` where that cannot be said yet. Asked again at every boundary, also by a
    /// machine that sleeps where one is due and takes none before it wakes.
    fn due_at(&mut self, tick: u64, virtual_ns: u64) -> Option<u64>;

    /// The machine stands at that tick or behind it. Calls [`start_checkpoint`], or does nothing and
    /// gives false.
    ///
    /// # Errors
    /// If the engine fails.
    fn start(&mut self, machine: Consistent<'_>) -> Result<bool, EngineError>;

    /// How many pages it can take now; it gets no more at once. Asked at every boundary until the
    /// checkpoint is complete; `at_once` at the run's end, where the answer must not be zero.
    fn room(&mut self, at_once: bool) -> usize;

    /// A page of guest RAM as it was when the checkpoint was started.
    fn page(&mut self, address: u64, page: &[u8]);

    /// There are no more pages: the checkpoint is complete.
    fn complete(&mut self);
}

/// While RAM is being copied the machine stands at least this often.
pub(crate) const CAPTURE_TICKS: u64 = 1_000_000;

impl<E: Engine, I: Inputs> Machine<E, I> {
    /// Has checkpoints taken from now on.
    pub fn set_checkpointer(&mut self, checkpointer: Box<dyn Checkpointer>) {
        self.checkpointer = Some(checkpointer);
    }

    /// Where a checkpoint can be taken: a machine that has not begun to run, or that has stopped at the
    /// tick it was to run to ([`Machine::run_until`]), unless it sleeps there.
    ///
    /// # Errors
    /// If the engine fails.
    pub fn consistent(&mut self) -> Result<Option<Consistent<'_>>, EngineError> {
        if !self.at_rest || self.capturing {
            return Ok(None);
        }
        self.consistent_here()
    }

    /// The same at a boundary that a replay finds again.
    pub(crate) fn consistent_here(&mut self) -> Result<Option<Consistent<'_>>, EngineError> {
        // Whoever stops it by instructions stops it before anything enters.
        let entered = self.visited == Some(self.engine.tick()) && !self.engine.is_paused();
        if entered || self.sleep.is_some() || self.power_event.is_some() {
            return Ok(None);
        }
        let saved = self.engine.save()?.filter(|engine| !engine.cpu.halted);
        Ok(saved.map(|engine| Consistent { machine: self, engine }))
    }

    /// Starts a checkpoint if one is due at this boundary.
    pub(crate) fn checkpoint_if_due(&mut self) -> Result<(), EngineError> {
        if self.capturing {
            return Ok(());
        }
        let Some(mut checkpointer) = self.checkpointer.take() else { return Ok(()) };
        let (tick, now) = (self.engine.tick(), self.now());
        let mut started = Ok(false);
        if checkpointer.due_at(tick, now.ns).is_some_and(|due| due <= tick) {
            self.drain_console();
            started = match self.consistent_here() {
                Ok(Some(machine)) => checkpointer.start(machine),
                Ok(None) => Ok(false),
                Err(error) => Err(error),
            };
        }
        self.checkpointer = Some(checkpointer);
        self.capturing = started?;
        Ok(())
    }

    /// Copies some more of RAM for a checkpoint that has been started; all that is left, if `at_once`.
    pub(crate) fn continue_checkpoint(&mut self, at_once: bool) {
        let Some(checkpointer) = self.checkpointer.as_mut().filter(|_| self.capturing) else {
            return;
        };
        loop {
            let room = checkpointer.room(at_once);
            let visit = &mut |start: u64, piece: &[u8]| checkpointer.page(start, piece);
            if self.engine.continue_capture(room, visit) {
                checkpointer.complete();
                self.capturing = false;
                return;
            }
            if !at_once {
                return;
            }
        }
    }
}

impl<E: Engine, I: Inputs> Whole for Machine<E, I> {
    fn state_with(&mut self, engine: EngineState) -> Result<MachineState, EngineError> {
        let devices = postcard::to_allocvec(&self.board.save())
            .expect("device state has no type that can fail to encode");
        Ok(MachineState {
            moment: self.engine.moment()?,
            virtual_ns: self.now().ns,
            records: self.records_before + self.inputs.events(),
            last_record: self.inputs.last_record(),
            engine,
            devices,
            base_tick: self.base.tick,
            base_ns: self.base.ns,
            console: self.effects.state().clone(),
            accesses: self.accesses,
            interrupts: self.interrupts,
        })
    }

    fn visit_ram(&self, visit: &mut dyn FnMut(u64, &[u8])) {
        self.engine.visit_ram(visit);
    }

    fn start_capture(&mut self, visit: &mut dyn FnMut(u64, &[u8])) {
        self.engine.start_capture(visit);
    }

    fn continue_capture(&mut self, max_pages: usize, visit: &mut dyn FnMut(u64, &[u8])) -> bool {
        self.engine.continue_capture(max_pages, visit)
    }
}

impl<E: Engine> Machine<E, Replaying> {
    /// A machine that goes on from a checkpoint, whose RAM `engine` owns already. `board` is a new one;
    /// `inputs` reads the log behind `state.records` records.
    ///
    /// # Errors
    /// If engine or board do not take the state, or it is none that a machine reaches.
    pub fn resume(
        engine: E,
        mut board: Board,
        inputs: Replaying,
        time: TimeSource,
        state: &MachineState,
    ) -> Result<Self, ResumeError> {
        let MachineState { moment, engine: saved, base_tick, base_ns, .. } = state;
        let ns_per_tick = time.ns_per_tick();
        let base = TimeBase { tick: *base_tick, ns: *base_ns, ns_per_tick };
        let effects = Effects::from_state(&state.console).ok_or(ResumeError::Impossible)?;
        let devices: BoardState =
            postcard::from_bytes(&state.devices).map_err(|_| ResumeError::Impossible)?;
        let possible = moment.tick == saved.tick
            && *base_tick <= moment.tick
            && moment.tick < 1 << 62
            && state.virtual_ns == base.at(moment.tick).ns
            && state.virtual_ns <= MAX_VIRTUAL_NS;
        if !possible {
            return Err(ResumeError::Impossible);
        }
        board.load(&devices)?;
        let inputs = inputs.behind(state.last_record);
        let mut machine = Self::new(engine, board, inputs, time);
        machine.engine.restore(saved)?;
        machine.engine.set_time_base(base);
        if machine.engine.moment()? != *moment {
            return Err(ResumeError::Impossible);
        }
        machine.base = base;
        machine.effects = effects;
        machine.records_before = state.records;
        machine.accesses = state.accesses;
        machine.interrupts = state.interrupts;
        Ok(machine)
    }
}
