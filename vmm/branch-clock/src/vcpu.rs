//! What the clock asks of a vCPU: as much as KVM and a performance counter give.

use std::sync::Arc;

use reprise_machine::engine::{Access, EngineError, Kick};
use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::CpuState;

/// Breakpoints that a CPU has.
pub const MAX_BREAKPOINTS: usize = 4;

/// Why [`Vcpu::enter`] came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VcpuExit {
    /// The guest accesses the board.
    Access(Access),
    /// HLT retired.
    Halt,
    /// The guest takes interrupts here, and that was asked for.
    InterruptWindow,
    /// The guest is about to execute an instruction with a breakpoint.
    Breakpoint,
    /// A signal: a kick, the counter's overflow, or one that means nothing. The guest may stand
    /// anywhere, amid a REP as well.
    Interrupted {
        /// Somebody kicked.
        kicked: bool,
    },
    /// The guest took a triple fault.
    TripleFault,
    /// The vCPU cannot execute what the guest wants, as in
    /// [`reprise_machine::engine::Exit::Unsupported`].
    Unsupported(String),
}

/// One vCPU with a counter of conditional branches.
pub trait Vcpu {
    /// Runs the guest until it exits. A queued interrupt is delivered first, and has been when this
    /// comes back. The guest is not halted, and the last access is finished.
    ///
    /// # Errors
    /// If the host fails.
    fn enter(&mut self) -> Result<VcpuExit, EngineError>;

    /// Answers the access that [`Vcpu::enter`] came back with; `value` holds what was read,
    /// little-endian. Gives whether the instruction has retired; if not, entering again gives its next
    /// access.
    ///
    /// # Errors
    /// If the host fails.
    fn finish_access(&mut self, value: u128) -> Result<bool, EngineError>;

    /// Conditional branches that the guest has retired since the vCPU was made.
    ///
    /// # Errors
    /// If the counter cannot be read, or did not count all the time.
    fn conditional_branches(&mut self) -> Result<u64, EngineError>;

    /// Has the guest interrupted when so many more conditional branches have retired, or later; `None`
    /// for never.
    ///
    /// # Errors
    /// If the counter refuses.
    fn set_overflow(&mut self, branches: Option<u64>) -> Result<(), EngineError>;

    /// Sets breakpoints at these linear addresses and no others, [`MAX_BREAKPOINTS`] at most.
    ///
    /// # Errors
    /// If the host refuses.
    fn set_breakpoints(&mut self, addresses: &[u64]) -> Result<(), EngineError>;

    /// Lets the instruction at RIP execute, breakpoint or not, until breakpoints are set again.
    ///
    /// # Errors
    /// If the host refuses.
    fn step_off(&mut self) -> Result<(), EngineError>;

    /// The whole CPU state, of the guest alone: nothing in it tells of breakpoints. What hardware
    /// keeps on its own account (`tsc_offset`) is left as it was set.
    ///
    /// # Errors
    /// If the host fails.
    fn state(&mut self) -> Result<CpuState, EngineError>;

    /// Sets the whole CPU state.
    ///
    /// # Errors
    /// If the host refuses.
    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError>;

    /// Whether the guest would take an external interrupt: RFLAGS.IF set, no interrupt shadow, none
    /// queued.
    ///
    /// # Errors
    /// If the host fails.
    fn interruptible(&mut self) -> Result<bool, EngineError>;

    /// Asks for [`VcpuExit::InterruptWindow`] at the first boundary where the guest is interruptible.
    fn set_window_request(&mut self, wanted: bool);

    /// Queues an external interrupt, which the next entry delivers. Wakes the guest from HLT.
    ///
    /// # Errors
    /// If the host refuses.
    fn inject(&mut self, vector: u8) -> Result<(), EngineError>;

    /// Guest RAM.
    fn ram(&self) -> &GuestRam;

    /// Something that kicks this vCPU from another thread.
    fn kicker(&self) -> Arc<dyn Kick>;
}
