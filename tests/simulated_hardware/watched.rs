//! A vCPU that notes what its guest was about to do when it was kicked and when an interrupt came, so that
//! a test can say which positions it has met.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use reprise_branch_clock::ask_vcpu_within;
use reprise_branch_clock::engine::{BranchClock, Parameters};
use reprise_branch_clock::guest_code::linear_of;
use reprise_branch_clock::vcpu::{Vcpu, VcpuExit};
use reprise_machine::engine::EngineError;
use reprise_machine::paging::Paging;
use reprise_machine::ram::GuestRam;
use reprise_simulated_hardware::SimulatedVcpu;
use reprise_trace::cpu_state::{CS, CpuState};
use reprise_trace::header::Header;

use crate::case::{Case, Clocked, Hardware, Recorded};

/// Bytes that are kept from before RIP.
const BEFORE: u64 = 8;
/// Bytes that are kept from RIP on.
const FROM_HERE: usize = 8;

/// What came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// A kick; the guest has not stood anywhere since interrupts opened.
    Kick { at_window: bool },
    /// The exit that says that interrupts are open.
    Window,
    /// An external interrupt is delivered here.
    Interrupt { vector: u8, at_window: bool },
}

/// The place where it came.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) what: What,
    pub(crate) state: CpuState,
    before: [u8; BEFORE as usize],
    here: [u8; FROM_HERE],
}

impl Seen {
    pub(crate) fn is_kick(&self) -> bool {
        matches!(self.what, What::Kick { .. })
    }

    pub(crate) fn is_interrupt(&self) -> bool {
        matches!(self.what, What::Interrupt { .. })
    }

    pub(crate) fn is_at_window(&self) -> bool {
        use What::{Interrupt, Kick};
        matches!(self.what, Kick { at_window: true } | Interrupt { at_window: true, .. })
    }

    /// Whether the next instruction begins with these bytes.
    pub(crate) fn is_at(&self, code: &[u8]) -> bool {
        self.here.starts_with(code)
    }

    /// Whether these bytes lie right before the next instruction, `behind` bytes between.
    pub(crate) fn follows(&self, code: &[u8], behind: usize) -> bool {
        self.before[..BEFORE as usize - behind].ends_with(code)
    }

    pub(crate) fn in_user_code(&self) -> bool {
        self.state.segments[CS].selector & 3 == 3
    }
}

/// The vCPU that is watched.
pub(crate) struct Watched<V> {
    vcpu: V,
    seen: Vec<Seen>,
    /// The last exit was for a window.
    at_window: bool,
}

impl<V: Vcpu> Watched<V> {
    fn note(&mut self, what: What) -> Result<(), EngineError> {
        let state = self.vcpu.state()?;
        let (mut before, mut here) = ([0; BEFORE as usize], [0; FROM_HERE]);
        let linear = linear_of(&state, state.rip);
        let paging = Paging::from(&state);
        paging.read_prefix(self.vcpu.ram(), linear.wrapping_sub(BEFORE), &mut before);
        paging.read_prefix(self.vcpu.ram(), linear, &mut here);
        self.seen.push(Seen { what, state, before, here });
        Ok(())
    }
}

/// Hardware that is watched.
#[derive(Clone, Copy)]
struct WatchedHardware(Hardware);

impl Clocked for WatchedHardware {
    type Vcpu = Watched<SimulatedVcpu>;

    fn hardware(&self) -> &Hardware {
        &self.0
    }

    fn with_seed_added(&self, seed: u64) -> Self {
        Self(self.0.with_seed_added(seed))
    }

    fn engine(&self, ram: GuestRam) -> Result<BranchClock<Self::Vcpu>, EngineError> {
        let Hardware { disturbance, skid, stand } = self.0;
        let mut vcpu = SimulatedVcpu::new(ram, disturbance)?;
        vcpu.hide_time_stamp_counter();
        let vcpu = Watched { vcpu, seen: Vec::new(), at_window: false };
        BranchClock::new(vcpu, Parameters { skid, stand })
    }

    fn world_clock_ns(engine: &BranchClock<Self::Vcpu>) -> Arc<AtomicU64> {
        engine.vcpu().vcpu.world_clock_ns()
    }

    fn header(&self, case: &Case<'_>) -> Header {
        self.0.header(case)
    }
}

impl Case<'_> {
    /// As [`Case::record`], and what was met.
    pub(crate) fn record_watched(&self, hardware: &Hardware) -> (Recorded, Vec<Seen>) {
        let (engine, recorded) = self.record_on(&WatchedHardware(*hardware));
        (recorded, engine.vcpu().seen.clone())
    }
}

impl<V: Vcpu> Vcpu for Watched<V> {
    ask_vcpu_within! {
        vcpu: finish_access, conditional_branches, set_overflow, set_breakpoints, step_off, state,
        set_state, interruptible, set_window_request, catch_breakpoint_instructions,
        pass_breakpoint_instruction, watch_writes, retire_instruction, write_ram, instruction_at,
        ram, kicker
    }

    fn enter(&mut self) -> Result<VcpuExit, EngineError> {
        let exit = self.vcpu.enter()?;
        let at_window = std::mem::replace(&mut self.at_window, exit == VcpuExit::InterruptWindow);
        match exit {
            VcpuExit::Interrupted { kicked: true } => self.note(What::Kick { at_window })?,
            VcpuExit::InterruptWindow => self.note(What::Window)?,
            _ => {}
        }
        Ok(exit)
    }

    fn inject(&mut self, vector: u8) -> Result<(), EngineError> {
        self.note(What::Interrupt { vector, at_window: self.at_window })?;
        self.vcpu.inject(vector)
    }
}
