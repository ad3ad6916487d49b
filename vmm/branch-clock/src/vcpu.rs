//! What the clock asks of a vCPU: as much as KVM and a performance counter give.

use std::ops::Range;
use std::sync::Arc;

use iced_x86::Instruction;
use reprise_machine::engine::{Access, EngineError, Kick};
use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::CpuState;
use reprise_trace::event::Assists;
use reprise_trace::header::Precaution;

use crate::guest_code::decode_at;

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
    /// The guest is about to execute INT3, which is caught: [`Vcpu::catch_breakpoint_instructions`].
    BreakpointInstruction,
    /// The guest wrote to RAM that is watched: [`Vcpu::watch_writes`] gives where.
    WatchedWrite(Vec<Range<u64>>),
    /// The guest took a triple fault.
    TripleFault,
    /// The vCPU cannot execute what the guest wants, as in
    /// [`reprise_machine::engine::Exit::Unsupported`].
    Unsupported(String),
}

/// How a guest debugs itself, for which it needs what breakpoints take from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnDebugging {
    /// It raised #DB: by RFLAGS.TF, or by INT1.
    Exception,
    /// It has breakpoints of its own: DR7.
    Breakpoints,
    /// It steps (RFLAGS.TF) through a REP that accesses the board.
    Repetition,
}

impl OwnDebugging {
    /// DR7: any breakpoint is enabled.
    const ENABLED: u64 = 0xff;

    /// Whether a guest with this DR7 has breakpoints.
    pub fn has_breakpoints(dr7: u64) -> bool {
        dr7 & Self::ENABLED != 0
    }

    /// Why the run ends at `rip`, for [`VcpuExit::Unsupported`].
    pub fn refusal(self, rip: u64) -> String {
        const WHILE: &str = "while the clock pmu has breakpoints";
        let (does, when) = match self {
            Self::Exception => ("single-steps (TF) or executes INT1", WHILE),
            Self::Breakpoints => ("has breakpoints in debug registers (DR7)", WHILE),
            Self::Repetition => {
                ("single-steps (TF) a REP INS or OUTS", "which the clock pmu cannot follow")
            }
        };
        format!(
            "a debugger in the guest {does} at rip {rip:#x}, {when}: use --engine soft; what was recorded until \
             here is kept"
        )
    }
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

    /// Breakpoints that whoever uses it may set.
    fn breakpoints(&self) -> usize {
        MAX_BREAKPOINTS
    }

    /// Sets breakpoints at these linear addresses and no others, [`Vcpu::breakpoints`] at most. While there are
    /// some, a guest that debugs itself ([`OwnDebugging`]) ends the run: nobody else would tell it.
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

    /// Has INT3 come back instead of reaching the guest, or no longer. Breakpoints stay as they are.
    ///
    /// # Errors
    /// If the host refuses.
    fn catch_breakpoint_instructions(&mut self, catch: bool) -> Result<(), EngineError>;

    /// Has the INT3 that just came back reach the guest after all. The guest is entered next: until then it
    /// stands nowhere, and that entry does not come back before the delivery.
    ///
    /// # Errors
    /// If the host refuses.
    fn pass_breakpoint_instruction(&mut self) -> Result<(), EngineError>;

    /// Has each write to a page of RAM that this guest-physical range touches come back, when it is done and
    /// before another instruction executes; or no longer.
    ///
    /// # Errors
    /// If the host refuses.
    fn watch_writes(&mut self, physical: Range<u64>, watch: bool) -> Result<(), EngineError>;

    /// Has an instruction that somebody else did retire: general registers, RIP and RFLAGS become those
    /// of `after`, and the interrupt shadow ends.
    ///
    /// # Errors
    /// If the host refuses.
    fn retire_instruction(&mut self, after: &CpuState) -> Result<(), EngineError>;

    /// Writes guest RAM within a page.
    ///
    /// # Panics
    /// If the range is not all RAM.
    fn write_ram(&mut self, address: u64, bytes: &[u8]);

    /// The guest's instruction at RIP; `None` where it cannot be fetched or is none.
    fn instruction_at(&self, state: &CpuState) -> Option<Instruction> {
        decode_at(self.ram(), state, state.rip)
    }

    /// Reads guest RAM as the guest has it.
    ///
    /// # Panics
    /// If the range is not all RAM.
    fn read_ram(&self, address: u64, bytes: &mut [u8]) {
        self.ram().read(address, bytes);
    }

    /// Shows guest RAM as the guest has it, as [`reprise_machine::engine::Engine::visit_ram`] does.
    fn visit_ram(&self, visit: &mut dyn FnMut(u64, &[u8])) {
        self.ram().visit(visit);
    }

    /// Whether RDTSC comes back by itself.
    fn traps_time_stamps(&self) -> bool {
        false
    }

    /// See [`Engine::left_open`].
    ///
    /// [`Engine::left_open`]: reprise_machine::engine::Engine::left_open
    fn left_open(&self) -> Vec<Precaution> {
        Vec::new()
    }

    /// Whether the CPU state and guest RAM are all that another vCPU has to know to go on from here.
    fn is_all_in_state(&self) -> bool {
        true
    }

    /// See [`Engine::assists`].
    ///
    /// [`Engine::assists`]: reprise_machine::engine::Engine::assists
    fn assists(&self) -> Assists {
        Assists::new()
    }

    /// The CPU state and guest RAM have become those of a checkpoint, which may be any engine's.
    ///
    /// # Errors
    /// If the host refuses.
    fn resume(&mut self) -> Result<(), EngineError> {
        Ok(())
    }

    /// Guest RAM, with whatever is in it that the guest must not see.
    fn ram(&self) -> &GuestRam;

    /// Something that kicks this vCPU from another thread.
    fn kicker(&self) -> Arc<dyn Kick>;
}

/// Hardware's own vCPU, which may refuse an instruction, and goes on once somebody else has executed it. What
/// [`Vcpu`] does by default it leaves so: whoever assists it asks for none of that.
pub trait RefusingVcpu: Vcpu {
    /// Whether the last [`VcpuExit::Unsupported`] was given for one instruction, which the guest stands at and of
    /// which nothing has happened.
    ///
    /// # Errors
    /// If the host fails.
    fn has_refused(&mut self) -> Result<bool, EngineError>;

    /// The refused instruction has been executed, or the fault that it raised delivered: that led from `before`,
    /// which [`Vcpu::state`] gave, to `after`, and may have written RAM.
    ///
    /// # Errors
    /// If the host does not take the state.
    fn go_on(&mut self, before: &CpuState, after: &CpuState) -> Result<(), EngineError>;
}
