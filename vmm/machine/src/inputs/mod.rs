//! The determinism boundary: everything that a machine could not have known enters through
//! [`Inputs`], which has exactly two implementations.
//!
//! [`Recording`] asks the host, appends to the log, and only then hands on what the log gave back.
//! [`Replaying`] reads the log and holds no host. The trait is sealed, so there is no third way in.

mod recording;
mod replaying;
#[cfg(test)]
mod tests;
mod typing;

use reprise_devices::time::VirtualTime;
use reprise_trace::checkpoint::LastRecord;
use reprise_trace::cpu_state::CpuState;
use reprise_trace::event::{Assists, EffectDigest, Ending, HandOver};
use reprise_trace::header::Precaution;
use reprise_trace::log::LogError;
use reprise_trace::logged::Logged;
use reprise_trace::moment::Moment;

pub use self::recording::{Planned, Recording, Then, When};
pub use self::replaying::{Replaying, Verification};
use crate::clock::{TimeBase, TimeSource};
use crate::digest::StateDigest;
use crate::divergence::Divergence;
use crate::effects::Effects;
use crate::engine::{Access, Engine, EngineError, Overshoot};
use crate::lawful::SetAside;

/// So often at most does virtual time move to a deadline within one sleep of the guest before a
/// record says how far it is: a replay that is not what was recorded, or a forged recording, does
/// not jump from deadline to deadline without end.
const MAX_UNLOGGED_JUMPS: u64 = 1 << 20;

mod sealed {
    /// Keeps [`super::Inputs`] at two implementations.
    pub trait Sealed {}
    impl<H: crate::host::Host, S: reprise_trace::log::FrameSink> Sealed for super::Recording<H, S> {}
    impl Sealed for super::Replaying {}
}

/// Where a machine stands, and the proof: what every log record is stamped with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Where.
    pub moment: Moment,
    /// The first eight bytes of the CPU state's digest; of what was asked, for an answer.
    pub cpu_digest: u64,
}

impl Stamp {
    /// A stamp that is known by its tick alone, because the machine stands at no exact moment.
    pub(crate) fn of_tick(tick: u64) -> Self {
        Self { moment: Moment { tick, rip: 0, rcx: 0 }, cpu_digest: 0 }
    }

    /// An answer is given amid an instruction, where an engine cannot be asked for the CPU's state:
    /// it carries its tick, and a digest of the access that asked.
    pub fn of_access(tick: u64, access: &Access) -> Self {
        let mut hasher = blake3::Hasher::new();
        match *access {
            Access::PortRead { port, size } => {
                hasher.update(&[0, size]).update(&port.to_le_bytes());
            }
            Access::PortWrite { port, size, value } => {
                hasher.update(&[1, size]).update(&port.to_le_bytes());
                hasher.update(&value.to_le_bytes());
            }
            Access::MmioRead { address, size } => {
                hasher.update(&[2, size]).update(&address.to_le_bytes());
            }
            Access::MmioWrite { address, size, value } => {
                hasher.update(&[3, size]).update(&address.to_le_bytes());
                hasher.update(&value.to_le_bytes());
            }
            Access::TimeStamp => {
                hasher.update(&[4]);
            }
        }
        let digest = hasher.finalize();
        let prefix = digest.as_bytes().first_chunk().expect("a digest has 32 bytes");
        Self { cpu_digest: u64::from_le_bytes(*prefix), ..Self::of_tick(tick) }
    }
}

/// An instruction boundary at which something may enter the machine. It is one that the replaying
/// machine finds again: under a clock that counts exits, a finished one.
pub struct Boundary<'a, E> {
    pub(crate) engine: &'a mut E,
    pub(crate) effects: &'a Effects,
    /// Ticks so far.
    pub(crate) tick: u64,
    /// Virtual time here.
    pub(crate) now: VirtualTime,
    /// The next device deadline; it lies after `now`.
    pub(crate) deadline: Option<VirtualTime>,
    /// Console bytes that the guest's UART can take.
    pub(crate) console_room: usize,
    /// The guest is in HLT.
    pub(crate) halted: bool,
    /// Something may have entered at this tick already.
    pub(crate) entered: bool,
    pub(crate) time: TimeSource,
}

impl<E: Engine> Boundary<'_, E> {
    /// Asks the engine where exactly this is.
    pub(crate) fn stamp(&mut self) -> Result<Stamp, EngineError> {
        let moment = self.engine.moment()?;
        Ok(Stamp { moment, cpu_digest: self.engine.cpu_state()?.short_digest() })
    }

    /// Whether the guest is awake and amid nothing, so that its state is all there is to it.
    pub(crate) fn is_whole(&mut self) -> Result<bool, EngineError> {
        let may_be = !self.halted && !self.entered;
        Ok(may_be && self.engine.save()?.is_some_and(|state| !state.cpu.halted))
    }
}

/// What enters the machine at a boundary.
#[derive(Debug)]
pub enum Arrival {
    /// Virtual time is now this many nanoseconds.
    Time(Logged<u64>),
    /// Console input.
    Console(Logged<Vec<u8>>),
    /// Another engine goes on.
    HandOver(HandOver),
    /// The run ends here.
    Stop {
        /// How.
        ending: Ending,
        /// Whether here is an exact moment.
        exact: bool,
    },
}

/// What a halted machine does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Idle {
    /// Looks for arrivals again.
    Look,
    /// Moves virtual time to this deadline, which is the next.
    Jump(VirtualTime),
}

/// Why the run loop stops.
#[derive(Debug)]
pub enum Stop {
    /// The run ended.
    Ended {
        /// How.
        ending: Ending,
        /// Whether the machine stands at an exact moment.
        exact: bool,
    },
    /// The log has no more, and no end.
    CutShort(Option<LogError>),
    /// The tick asked for is reached.
    TargetReached,
    /// Another engine goes on, and the one that is here cannot follow.
    HandedOver(Box<HandOver>),
    /// The replay is not what was recorded.
    Diverged(Box<Divergence>),
    /// The engine failed.
    Engine(EngineError),
    /// The engine is past what the log has next.
    Overshot(Overshoot),
    /// The log cannot be written.
    Unwritable(LogError),
    /// Whoever watches the run wants no more of it.
    Watched,
}

impl From<EngineError> for Stop {
    fn from(error: EngineError) -> Self {
        Self::Engine(error)
    }
}

impl From<Divergence> for Stop {
    fn from(divergence: Divergence) -> Self {
        Self::Diverged(Box::new(divergence))
    }
}

/// The machine where a run ends at an exact moment.
#[derive(Clone, Copy, Debug)]
pub struct EndState<'a> {
    /// All of it.
    pub digest: &'a StateDigest,
    /// Its CPU.
    pub cpu: &'a CpuState,
    /// What [`Engine::undefined_flags`] gives there.
    pub undefined_flags: u64,
}

/// What an engine tells of a run that is over.
#[derive(Debug)]
pub struct Told {
    /// What [`Engine::assists`] gives there.
    pub assists: Assists,
    /// What [`Engine::left_open`] gives there.
    pub left_open: Vec<Precaution>,
}

/// What enters a machine, in the order in which it enters, and what leaves it.
///
/// Implemented by [`Recording`] and [`Replaying`], and by nothing else.
pub trait Inputs: sealed::Sealed {
    /// The tick at which the machine must stand at the latest, because the log has something there;
    /// above `tick`, where it stands now. `base` says what virtual time ticks have.
    fn stop_at(&mut self, tick: u64, base: &TimeBase) -> Result<Option<u64>, Stop>;

    /// The exact place of what the log has next, if it has one; only the tick of an answer, or of an
    /// end that the guest comes to by itself, is known.
    fn place(&mut self) -> Option<Stamp>;

    /// Whether the log has next what RDTSC is answered at this tick.
    fn answers_time_stamp(&mut self, tick: u64) -> bool;

    /// The next thing that enters at this boundary. Called until it gives `None`.
    fn arrival<E: Engine>(&mut self, here: &mut Boundary<'_, E>) -> Result<Option<Arrival>, Stop>;

    /// The guest is about to run freely, on hardware that only a kick stops; a device waits for
    /// `deadline`.
    fn runs_freely(&mut self, deadline: Option<VirtualTime>);

    /// What a halted guest with nothing to wake it does next.
    fn idle<E: Engine>(&mut self, here: &mut Boundary<'_, E>) -> Result<Idle, Stop>;

    /// The host's time in nanoseconds, for an access whose answer depends on it; not before `now`.
    fn clock_answer(
        &mut self,
        tick: u64,
        access: &Access,
        now: VirtualTime,
    ) -> Result<Logged<u64>, Stop>;

    /// The time that the log has beside an access which does not depend on it, if any: where the recording
    /// was made from one whose devices see every instant ([`Event::ClockRead`]). Not before `now`.
    ///
    /// [`Event::ClockRead`]: reprise_trace::event::Event::ClockRead
    fn clock_beside(
        &mut self,
        tick: u64,
        access: &Access,
        now: VirtualTime,
    ) -> Result<Option<Logged<u64>>, Stop>;

    /// At this boundary devices were carried to `now`: time moved, a deadline has come, or input.
    fn devices_followed(&mut self, now: VirtualTime);

    /// Somebody kicked the engine. `exact` says whether that is at a boundary which a replay finds
    /// again.
    fn kicked(&mut self, tick: u64, now: VirtualTime, exact: bool) -> Result<(), Stop>;

    /// The guest wrote to its console.
    fn console_output(&mut self, bytes: &[u8]);

    /// The run ends: recorded, or compared with what was. `state` is `None` where the machine
    /// stands at no exact moment. Gives it as it was recorded, lawful
    /// differences included.
    fn end(
        &mut self,
        stamp: Stamp,
        effects: EffectDigest,
        ending: &Ending,
        state: Option<EndState<'_>>,
        told: Told,
    ) -> Result<Option<StateDigest>, Stop>;

    /// The engine failed, so that where the run ends cannot be said: closes the log behind its last
    /// record.
    fn close_without_end(&mut self) -> Result<(), Stop>;

    /// What the comparison left out so far.
    fn set_aside(&self) -> &[SetAside] {
        &[]
    }

    /// Records written or replayed so far.
    fn events(&self) -> u64;

    /// The last record written or replayed, in this run or before the checkpoint that it began at.
    fn last_record(&self) -> Option<LastRecord>;

    /// The last record that is safe (recording) or agreed (replaying).
    fn confirmed_until(&self) -> Option<Moment>;
}
