//! RAM, CPU state, engine and board from a guest: the same code for a run, a recording and a
//! replay, so that all start alike.

use reprise_assist::Assisted;
use reprise_cpu::engine::SoftEngine;
use reprise_cpu::translate::Translation;
use reprise_devices::board::{Board, BoardConfig};
use reprise_devices::cpu_model::TimeStampCounter;
use reprise_kvm::{Finding, KvmClock, KvmEngine, KvmError};
use reprise_machine::engine::{Engine, EngineError};
use reprise_machine::ram::{GuestRam, RamError};
use reprise_replay::{OnSoftware, RecordedClock};
use reprise_time_stamp_sites::{Instruction, KernelText};
use reprise_trace::cpu_state::CpuState;
use reprise_trace::header::Header;

use super::choice::{self, EngineKind};
use super::hardware::BranchHardware;
use super::pmu_trap::{PmuTrap, trapping_engine};
use super::profile_report::ProfileReport;
use super::stretches;
use crate::boot::{self, BootError, GuestSource};

/// Why a machine cannot be put together.
#[derive(Debug, thiserror::Error)]
pub enum AssemblyError {
    /// No RAM.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The guest cannot be loaded.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The engine cannot be had, or refuses the guest's first state.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// How the software CPU is to run.
#[derive(Clone, Copy, Debug, Default)]
pub struct SoftOptions {
    /// When it translates blocks.
    pub translation: Translation,
    /// It counts where its time goes.
    pub profile: bool,
}

/// A guest in RAM, before there is an engine.
#[derive(Debug)]
pub struct LoadedGuest {
    ram: GuestRam,
    state: CpuState,
    board: BoardConfig,
}

impl LoadedGuest {
    /// Loads a guest.
    ///
    /// # Errors
    /// The RAM cannot be had, or the guest cannot be loaded into it.
    pub fn load(
        source: &GuestSource<'_>,
        ram_mib: u64,
        rtc_start_s: u64,
    ) -> Result<Self, AssemblyError> {
        let ram = GuestRam::new(ram_mib)?;
        let state = boot::load(source, &ram).map_err(|error| needing_all(error, source))?;
        let board = BoardConfig { ram_bytes: ram.ram_bytes(), rtc_start_s };
        Ok(Self { ram, state, board })
    }

    /// Hands the guest to an engine, and both to `visitor`; `hardware` has the clock `pmu`. RDTSC is trapped
    /// as `traps` says.
    ///
    /// # Errors
    /// The engine cannot be had, or refuses the guest's first state.
    pub fn with_engine<V: EngineVisitor>(
        self,
        kind: EngineKind,
        hardware: &impl BranchHardware,
        traps: &Traps,
        soft: SoftOptions,
        visitor: V,
    ) -> Result<Visited<V::Output>, AssemblyError> {
        let Self { ram, state, board } = self;
        let board = Board::new(&board);
        match kind {
            EngineKind::Soft => {
                let mut engine = soft_engine(ram, soft)?;
                engine.set_cpu_state(&state)?;
                let (output, engine) = visitor.visit(engine, board);
                Ok(Visited { output, profile: leave(engine) })
            }
            EngineKind::Kvm(clock) => {
                let mut engine = kvm_engine(ram, clock, &traps.sync)?;
                engine.set_cpu_state(&state)?;
                Ok(Visited::of(visitor.visit(engine, board).0))
            }
            EngineKind::Pmu => match &traps.pmu {
                PmuTrap::On(kernel) => {
                    let mut engine = trapping_engine(hardware, ram, kernel)?;
                    engine.set_cpu_state(&state)?;
                    Ok(Visited::of(visitor.visit(engine, board).0))
                }
                PmuTrap::Off(_) => {
                    let mut engine = hardware.engine(ram, TimeStampCounter::Hidden)?;
                    engine.set_cpu_state(&state)?;
                    Ok(Visited::of(visitor.visit(engine, board).0))
                }
            },
        }
    }
}

/// An error of RAM that is too small for one of the images says what would do for all of them.
fn needing_all(error: BootError, source: &GuestSource<'_>) -> BootError {
    let BootError::MemoryTooSmall { what, ram_mib, mut needed_mib } = error else { return error };
    while let Ok(ram) = GuestRam::new(needed_mib)
        && let Err(BootError::MemoryTooSmall { needed_mib: more, .. }) = boot::load(source, &ram)
        && more > needed_mib
    {
        needed_mib = more;
    }
    BootError::MemoryTooSmall { what, ram_mib, needed_mib }
}

impl LoadedGuest {
    /// As [`Self::with_engine`], with an engine that follows hand-overs and begins as `header` says. What is
    /// named there executes the guest, and nothing else.
    ///
    /// # Errors
    /// As [`Self::with_engine`].
    pub fn with_relay<V: EngineVisitor>(
        self,
        hardware: &impl BranchHardware,
        header: &Header,
        soft: SoftOptions,
        visitor: V,
    ) -> Result<V::Output, AssemblyError> {
        let Self { ram, state, board } = self;
        let first = header.first_stretch();
        let mut engine = stretches::relay(hardware, ram, &first, header, choice::named, soft)?;
        engine.set_cpu_state(&state)?;
        Ok(visitor.visit(engine, Board::new(&board)).0)
    }
}

/// What a visitor of an engine has come to.
#[derive(Debug)]
pub struct Visited<T> {
    /// The visitor's own.
    pub output: T,
    /// Where the software CPU's time went, if it was to count that.
    pub profile: Option<ProfileReport>,
}

impl<T> Visited<T> {
    fn of(output: T) -> Self {
        Self { output, profile: None }
    }
}

/// What becomes of the guest's RDTSC in a run: decided once, for its engine and for what its recording says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Traps {
    /// With the clock `sync`.
    pub sync: TimeStampSites,
    /// With the clock `pmu`.
    pub pmu: PmuTrap,
}

impl Traps {
    /// None, because the machine moves between engines, not all of which can.
    pub fn of_relay() -> Self {
        Self { sync: TimeStampSites::of_relay(), pmu: PmuTrap::of_relay() }
    }
}

/// Where a kernel reads the time-stamp counter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TimeStampSites {
    /// At these linear addresses.
    At(Vec<u64>),
    /// That is not known, or of no use; the reason is for a person.
    Unknown(String),
}

impl TimeStampSites {
    /// Of a machine that moves between engines: not trapped, since not all of them can.
    pub fn of_relay() -> Self {
        Self::Unknown("the machine moves between engines".to_owned())
    }

    /// Of a kernel's file.
    pub fn of_kernel(kernel: &[u8]) -> Self {
        // A packed kernel has more than can be trapped with breakpoints in debug registers, and is not
        // there yet when they are set.
        if !kernel.starts_with(b"\x7fELF") {
            return Self::Unknown("the kernel is packed".to_owned());
        }
        match KernelText::of_image(kernel) {
            Ok(text) => {
                let sites = text.sites_of(Instruction::ReadTimeStamp);
                Self::At(sites.map(|site| site.address).collect())
            }
            Err(error) => Self::Unknown(error.to_string()),
        }
    }

    /// Those of them that the clock `sync` traps: all, or none where there are too many or `trap`, what the
    /// host's KVM can do, is not enough.
    ///
    /// # Errors
    /// If that cannot be found out.
    pub fn trapped_by<E>(self, trap: impl FnOnce() -> Result<Finding, E>) -> Result<Self, E> {
        Ok(match self {
            Self::At(places) if places.len() > MAX_TRAPPED => {
                Self::Unknown(format!("{} places, and four breakpoints", places.len()))
            }
            Self::At(places) if !places.is_empty() => {
                let trap = trap()?;
                if trap.available { Self::At(places) } else { Self::Unknown(trap.reason) }
            }
            known => known,
        })
    }

    /// Those of a kernel's file that the clock `sync` traps on this host.
    ///
    /// # Errors
    /// KVM refuses to be asked.
    pub fn trapped_here(kernel: &[u8]) -> Result<Self, EngineError> {
        Ok(Self::of_kernel(kernel).trapped_by(|| {
            let asked = reprise_kvm::precautions()?;
            let of_time_stamps = asked.iter().find(|it| it.instruction == "RDTSC");
            of_time_stamps.map(|it| it.closed.kernel.clone()).ok_or(KvmError::Lacks("an answer"))
        })?)
    }
}

/// Breakpoints in debug registers.
const MAX_TRAPPED: usize = 4;

/// KVM, with the software CPU for the instructions that it refuses, and, with the clock `sync`, the
/// time-stamp counter trapped where these say.
///
/// # Errors
/// The host has no KVM that can be used so.
pub fn kvm_engine(
    ram: GuestRam,
    clock: KvmClock,
    time_stamp_sites: &TimeStampSites,
) -> Result<Assisted<KvmEngine>, EngineError> {
    let mut engine = KvmEngine::new(ram, clock)?;
    if let (KvmClock::Sync, TimeStampSites::At(places)) = (clock, time_stamp_sites) {
        engine.trap_time_stamps(places)?;
    }
    Ok(Assisted::new(engine))
}

/// The software CPU, set up as asked.
///
/// # Errors
/// It cannot be had.
pub fn soft_engine(ram: GuestRam, soft: SoftOptions) -> Result<SoftEngine, EngineError> {
    let mut engine = SoftEngine::new(ram)?;
    set_up(&mut engine, soft);
    Ok(engine)
}

/// The software CPU that counts what a recording counts, set up as asked.
///
/// # Errors
/// It cannot be had.
pub fn replaying_soft_engine(
    ram: GuestRam,
    header: &Header,
    soft: SoftOptions,
) -> Result<RecordedClock, EngineError> {
    let mut engine = RecordedClock::new(ram, header)?;
    set_up(engine.software(), soft);
    Ok(engine)
}

fn set_up(engine: &mut SoftEngine, soft: SoftOptions) {
    engine.set_translation(soft.translation);
    if soft.profile {
        engine.start_profile();
    }
}

/// Gives up the software CPU at the end of a session, and says where its time went, if it was to count
/// that. Its blocks are hundreds of thousands of small pieces of memory, which would be given back one
/// by one. The process's end, which is near, gives them back at once.
pub fn leave(mut engine: impl OnSoftware) -> Option<ProfileReport> {
    let profile = engine.software().profile().as_ref().map(ProfileReport::from);
    std::mem::forget(engine);
    profile
}

/// What is done with a machine's parts, whatever the engine.
pub trait EngineVisitor {
    /// What it comes to.
    type Output;

    /// Takes the engine, which stands before the guest's first instruction, and the board. Gives the
    /// engine back when it is done with it.
    fn visit<E: Engine>(self, engine: E, board: Board) -> (Self::Output, E);
}
