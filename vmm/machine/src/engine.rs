//! The contract of an engine: what executes the guest.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use reprise_trace::checkpoint::EngineState;
use reprise_trace::cpu_state::CpuState;
use reprise_trace::event::{Assists, HandOver};
use reprise_trace::header::Precaution;
use reprise_trace::moment::{Moment, TickKind};

use crate::clock::TimeBase;
use crate::inputs::Stamp;

/// An access by the guest that the board must answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// IN: answered with [`Engine::finish_access`], value in the low `size` bytes.
    PortRead {
        /// I/O port.
        port: u16,
        /// 1, 2 or 4 bytes.
        size: u8,
    },
    /// OUT: acknowledged with [`Engine::finish_access`], whose value is ignored.
    PortWrite {
        /// I/O port.
        port: u16,
        /// 1, 2 or 4 bytes.
        size: u8,
        /// What is written, in the low `size` bytes.
        value: u32,
    },
    /// A load from a guest-physical address that is not RAM.
    MmioRead {
        /// Guest-physical address.
        address: u64,
        /// 1 to 16 bytes.
        size: u8,
    },
    /// A store to a guest-physical address that is not RAM.
    MmioWrite {
        /// Guest-physical address.
        address: u64,
        /// 1 to 16 bytes.
        size: u8,
        /// What is written, little-endian, in the low `size` bytes.
        value: u128,
    },
    /// RDTSC, from an engine that has it answered: with virtual time in nanoseconds, to which the
    /// engine adds what the guest has set ([`reprise_trace::cpu_state::CpuState::tsc_offset`]).
    TimeStamp,
}

/// Why [`Engine::run`] came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The tick that was asked for is reached: the machine stands at an instruction boundary, and
    /// exactly `until` ticks have passed. A HLT that retires with the last tick gives this or
    /// [`Exit::Halt`]; the machine takes both.
    TickReached,
    /// The guest accesses the board. [`Engine::tick`] does not yet count this instruction. The
    /// machine answers with [`Engine::finish_access`] before it asks the engine anything else.
    Access(Access),
    /// The guest executed HLT, which is retired and counted. RIP is past it. A guest that is halted
    /// already gives this at once.
    Halt,
    /// An interrupt that was asked for with [`Engine::set_interrupt_request`] can be delivered now.
    InterruptWindow,
    /// The guest took a triple fault.
    TripleFault,
    /// Somebody kicked the engine; it stands at an instruction boundary (or, under a clock that
    /// counts exits, anywhere). Where instructions are ticks it is a boundary that another run finds
    /// again by its tick alone: never amid the repetitions of a REP, never between two accesses of
    /// one instruction.
    Kicked,
    /// The engine, which stops late, stopped behind the place that it was to find: whoever drives the
    /// replay goes back and tries again.
    Overshot(Overshoot),
    /// The engine cannot execute what the guest wants; the reason is for a person and names what to
    /// do.
    Unsupported(String),
}

/// A replaying engine that stops late was stopped behind a place in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the guest was stopped {ticks_late} ticks or more behind {place}, short of which it was to stop by \
     {margin}: replay again, the counter is late by another number each time"
)]
pub struct Overshoot {
    /// The place; of one that is known by its tick alone, RIP and RCX are zero.
    pub place: Moment,
    /// Ticks by which the engine was to stop short of it.
    pub margin: u64,
    /// Ticks by which it is past the place's tick.
    pub ticks_late: u64,
}

/// The engine itself failed (an ioctl refused): the host's fault, not the guest's.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct EngineError {
    /// One line that says what failed and what to do.
    pub what: String,
}

/// Stops a running engine from another thread.
pub trait Kick: Send + Sync {
    /// Makes [`Engine::run`] come back soon with [`Exit::Kicked`]. Never lost: a kick that comes
    /// while the engine does not run makes its next run come back at once.
    fn kick(&self);
}

/// A kick that is only a flag, which the engine polls.
#[derive(Clone, Debug, Default)]
pub struct FlagKick(pub Arc<AtomicBool>);

impl Kick for FlagKick {
    fn kick(&self) {
        self.0.store(true, Ordering::Release);
    }
}

/// What executes the guest, and owns its RAM.
pub trait Engine {
    /// What this engine's clock counts.
    fn tick_kind(&self) -> TickKind;

    /// Ticks since the machine started, at this instruction boundary.
    fn tick(&self) -> u64;

    /// Runs the guest until `tick() == until` or an earlier exit. Under
    /// [`TickKind::ConditionalBranch`] that is the first place of the tick, or rarely one soon after it,
    /// and an access or a HLT is counted when its instruction is finished. Under [`TickKind::Exit`] each
    /// access and each HLT is a tick, counted when it is finished, and `until` is only compared at
    /// those. Where one instruction makes several accesses, each is a tick; between them
    /// [`Engine::amid_accesses`] is true, and nothing enters.
    ///
    /// # Panics
    /// If `until` is in the past, or the last access was not finished.
    fn run(&mut self, until: u64) -> Result<Exit, EngineError>;

    /// Under [`TickKind::ConditionalBranch`]: runs the guest until it stands where `stamp` was taken,
    /// which is not where it stands now, and gives [`Exit::TickReached`] there. An earlier exit is given
    /// as by [`Engine::run`]; if the guest's ticks pass the stamp's without that place, this gives
    /// [`Exit::TickReached`] wherever the guest stands then. Where a tick is one place, `run` does it.
    ///
    /// # Panics
    /// As [`Engine::run`].
    fn run_to(&mut self, stamp: &Stamp) -> Result<Exit, EngineError> {
        self.run(stamp.moment.tick)
    }

    /// Whether the guest, which stands where it may have been when `stamp` was taken, comes to exactly that state
    /// later in this tick. An engine that cannot tell says no.
    ///
    /// # Errors
    /// If the engine fails.
    fn comes_exactly(&mut self, _stamp: &Stamp) -> Result<bool, EngineError> {
        Ok(false)
    }

    /// As [`Engine::run`], where the guest comes to what is to happen by itself, at tick `until` at the
    /// latest: an engine to which an exact stop is dear need not make it.
    ///
    /// # Panics
    /// As [`Engine::run`].
    fn run_about(&mut self, until: u64) -> Result<Exit, EngineError> {
        self.run(until)
    }

    /// Has an engine that stops late keep `times` its usual distance from places up to tick `until`.
    fn widen_margin(&mut self, _until: u64, _times: u32) {}

    /// Whether the engine stops late, and at a tick exactly only with effort, which kicks disturb: a
    /// recording does not ask it to.
    fn comes_late(&self) -> bool {
        false
    }

    /// Whether the guest's code runs on a CPU that may set accessed bits early. No log has that, and a guest that
    /// looks at one goes another way then.
    fn sets_accessed_bits_early(&self) -> bool {
        false
    }

    /// Whether the boundary of the last [`Exit::Kicked`] is one that another run finds again. An engine
    /// whose ticks are one place each keeps that promise for every kick.
    fn stands_exactly(&self) -> bool {
        self.tick_kind() != TickKind::Exit
    }

    /// The machine has what RDTSC is to be answered here: an engine whose guest would execute it without
    /// asking hands it over, as if [`Engine::run`] had come back with [`Access::TimeStamp`], and gives true.
    /// Gives false if the guest stands elsewhere, or asks by itself; then nothing has changed.
    ///
    /// # Errors
    /// If the host fails.
    fn ask_for_time_stamp(&mut self) -> Result<bool, EngineError> {
        Ok(false)
    }

    /// Answers the access that [`Engine::run`] came back with: the instruction is then retired and
    /// counted (a REP INS/OUTS or a store that straddles pages may give several accesses before it
    /// is). `value` holds what was read, little-endian.
    fn finish_access(&mut self, value: u128) -> Result<(), EngineError>;

    /// Whether the instruction whose access was finished last has others to make before it retires, where
    /// each counts as a tick: engines agree on when accesses come, and not on what the CPU's state is in
    /// between.
    fn amid_accesses(&mut self) -> Result<bool, EngineError> {
        Ok(false)
    }

    /// Whether the guest would take an external interrupt at this boundary: RFLAGS.IF set, no
    /// interrupt shadow.
    fn interruptible(&mut self) -> Result<bool, EngineError>;

    /// Asks for [`Exit::InterruptWindow`] at the first boundary where the guest is interruptible;
    /// an engine whose clock counts exits ignores it (the machine looks at each exit).
    fn set_interrupt_request(&mut self, wanted: bool);

    /// Delivers an external interrupt through the guest's IDT before the next instruction, and wakes
    /// the guest from HLT. Delivery itself counts no tick. A fault of the delivery is the guest's.
    ///
    /// # Panics
    /// If the guest is not interruptible.
    fn inject(&mut self, vector: u8) -> Result<(), EngineError>;

    /// Tells the engine how virtual time follows ticks from now on.
    fn set_time_base(&mut self, base: TimeBase);

    /// Where the guest stands. Only at an instruction boundary.
    fn moment(&mut self) -> Result<Moment, EngineError>;

    /// The whole CPU state. Only at an instruction boundary, the last access finished.
    fn cpu_state(&mut self) -> Result<CpuState, EngineError>;

    /// Sets the whole CPU state; ticks are not touched.
    fn set_cpu_state(&mut self, state: &CpuState) -> Result<(), EngineError>;

    /// Bits of RFLAGS that the architecture leaves undefined where the guest stands, since its last
    /// instructions did, so that another CPU may have them otherwise. An engine that does not know which
    /// gives none.
    fn undefined_flags(&mut self) -> u64 {
        0
    }

    /// Sets flags that were undefined to what they were on the CPU that recorded.
    ///
    /// # Errors
    /// The engine refuses the state.
    fn set_undefined_flags(&mut self, rflags: u64) -> Result<(), EngineError> {
        let state = self.cpu_state()?;
        self.set_cpu_state(&CpuState { rflags, ..state })
    }

    /// Reads guest RAM.
    ///
    /// # Panics
    /// If the range is not all RAM.
    fn read_ram(&self, address: u64, bytes: &mut [u8]);

    /// RAM, as (guest-physical start, bytes) in address order, passed to `visit` in pieces of whole
    /// pages. Pages that are all zero may be left out.
    fn visit_ram(&self, visit: &mut dyn FnMut(u64, &[u8]));

    /// Starts to show RAM as it is now, for a checkpoint: all of it the first time, later what may have
    /// been written since the last time, pages of zeros included. What the engine does not show here it
    /// shows in [`Engine::continue_capture`], even if the guest has run on and changed it. An engine that
    /// cannot do that, or does not know what was written, shows everything here.
    fn start_capture(&mut self, visit: &mut dyn FnMut(u64, &[u8])) {
        self.visit_ram(visit);
    }

    /// Shows at most so many more pages of RAM as it was at [`Engine::start_capture`]. Gives whether that
    /// was all. At any time while the engine does not run.
    fn continue_capture(&mut self, _max_pages: usize, _visit: &mut dyn FnMut(u64, &[u8])) -> bool {
        true
    }

    /// Everything but RAM that decides how the guest goes on. `None` amid an instruction or the
    /// delivery of an interrupt, and always from an engine that has no checkpoints.
    fn save(&mut self) -> Result<Option<EngineState>, EngineError> {
        Ok(None)
    }

    /// The state from which another engine goes on where this one stands now, whether or not that is a place
    /// for checkpoints; `None` amid an instruction or the delivery of an interrupt.
    fn state_for_successor(&mut self) -> Result<Option<EngineState>, EngineError> {
        self.save()
    }

    /// Takes up a saved state; RAM is as it was then already. What the engine would do next differently
    /// from the one that saved, the guest must not be able to tell.
    fn restore(&mut self, _state: &EngineState) -> Result<(), EngineError> {
        Err(EngineError {
            what: "this engine starts at no checkpoint: use --engine soft".to_owned(),
        })
    }

    /// Another engine goes on from this boundary, in this state and at this tick: becomes that engine,
    /// or goes on by itself if its ticks are what that one's would be. Gives false if it can do neither;
    /// then nothing has changed.
    ///
    /// # Errors
    /// If the other engine cannot be had or does not take the state.
    fn become_engine(&mut self, to: &HandOver) -> Result<bool, EngineError> {
        Ok(to.tick_kind == self.tick_kind())
    }

    /// Instructions that this engine refused and another executed in its place, so far.
    fn assists(&self) -> Assists {
        Assists::new()
    }

    /// What this engine was to keep to itself, and has found that it cannot: what the guest had of it is in no
    /// log.
    fn left_open(&self) -> Vec<Precaution> {
        Vec::new()
    }

    /// Instructions that the guest has retired, by an engine that knows; its ticks, if they are that.
    fn instructions(&self) -> Option<u64> {
        (self.tick_kind() == TickKind::Instruction).then(|| self.tick())
    }

    /// Has the engine stop before the instruction that has so many before it, wherever that is amid its
    /// ticks: with [`Exit::Kicked`] unless it stops there anyway. Gives false if the engine can stop at ticks
    /// alone; then nothing has changed. With `None` it stops at ticks alone again.
    fn pause_at(&mut self, _instructions: Option<u64>) -> bool {
        false
    }

    /// Whether the guest stands before the instruction that [`Engine::pause_at`] named.
    fn is_paused(&self) -> bool {
        false
    }

    /// Something that kicks this engine from another thread.
    fn kicker(&self) -> Arc<dyn Kick>;
}
