//! A vCPU that notes what its guest was about to do when it was kicked and when an interrupt came, so that
//! a test can say which positions it has met.

use iced_x86::{Instruction, OpKind, Register};
use reprise_branch_clock::ask_vcpu_within;
use reprise_branch_clock::engine::BranchClock;
use reprise_branch_clock::guest_code::linear_of;
use reprise_branch_clock::vcpu::{Vcpu, VcpuExit};
use reprise_machine::engine::EngineError;
use reprise_machine::outcome::Outcome;
use reprise_machine::paging::Paging;
use reprise_machine::ram::GuestRam;
use reprise_simulated_hardware::SimulatedVcpu;
use reprise_trace::cpu_state::{CS, CpuState, RCX};
use reprise_trace::event::Record;
use reprise_trace::header::Header;
use reprise_trace::moment::Moment;

use crate::case::{Case, Clocked, Hardware, Recorded};

/// Bytes that are kept from before RIP.
const BEFORE: u64 = 8;
/// Bytes that are kept from RIP on.
const FROM_HERE: usize = 8;

/// What came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// A kick.
    Kick,
    /// The exit that says that interrupts are open.
    Window,
    /// An external interrupt is delivered here.
    Interrupt { vector: u8 },
}

/// The place where it came.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) what: What,
    pub(crate) state: CpuState,
    /// As the clock has it.
    pub(crate) moment: Moment,
    /// Instructions that the guest has executed.
    pub(crate) instructions: u64,
    /// None of them since the exit that said that interrupts are open.
    pub(crate) at_window: bool,
    /// The next instruction reads a page at a fixed address, which is not there.
    pub(crate) reads_absent_page: bool,
    before: [u8; BEFORE as usize],
    here: [u8; FROM_HERE],
}

impl Seen {
    pub(crate) fn is_kick(&self) -> bool {
        self.what == What::Kick
    }

    pub(crate) fn is_interrupt(&self) -> bool {
        matches!(self.what, What::Interrupt { .. })
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
pub(crate) struct Watched {
    vcpu: SimulatedVcpu,
    seen: Vec<Seen>,
    /// Instructions that had been executed when interrupts opened last.
    opened_at: Option<u64>,
    /// Ticks that are no branches, as the clock counts them.
    events: u64,
}

impl Watched {
    fn note(&mut self, what: What) -> Result<(), EngineError> {
        let state = self.vcpu.state()?;
        let (mut before, mut here) = ([0; BEFORE as usize], [0; FROM_HERE]);
        let linear = linear_of(&state, state.rip);
        let paging = Paging::from(&state);
        paging.read_prefix(self.vcpu.ram(), linear.wrapping_sub(BEFORE), &mut before);
        paging.read_prefix(self.vcpu.ram(), linear, &mut here);
        let reads = self.vcpu.instruction_at(&state).and_then(|it| reads_fixed_address(&it));
        let is_there = |address| paging.read(self.vcpu.ram(), address, &mut [0]);
        let reads_absent_page = reads.is_some_and(|address| !is_there(address));
        let tick = self.vcpu.conditional_branches()? + self.events;
        let moment = Moment { tick, rip: state.rip, rcx: state.gpr[RCX] };
        let instructions = self.vcpu.instruction_count();
        let at_window = self.opened_at == Some(instructions);
        let seen =
            Seen { what, state, moment, instructions, at_window, reads_absent_page, before, here };
        self.seen.push(seen);
        Ok(())
    }
}

/// The linear address that an instruction reads, if no register is part of it.
fn reads_fixed_address(instruction: &Instruction) -> Option<u64> {
    let registers = [instruction.memory_base(), instruction.memory_index()];
    let fixed = instruction.op1_kind() == OpKind::Memory && registers == [Register::None; 2];
    fixed.then(|| instruction.memory_displacement64())
}

/// Hardware that is watched.
#[derive(Clone, Copy)]
struct WatchedHardware(Hardware);

impl Clocked for WatchedHardware {
    type Vcpu = Watched;

    fn hardware(&self) -> &Hardware {
        &self.0
    }

    fn on_hardware(&self, hardware: Hardware) -> Self {
        Self(hardware)
    }

    fn engine(&self, ram: GuestRam) -> Result<BranchClock<Self::Vcpu>, EngineError> {
        let watched = |vcpu| Watched { vcpu, seen: Vec::new(), opened_at: None, events: 0 };
        self.0.engine(ram)?.with_vcpu_within(|vcpu| Ok(watched(vcpu)))
    }

    fn simulated(engine: &BranchClock<Self::Vcpu>) -> &SimulatedVcpu {
        &engine.vcpu().vcpu
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

    /// Replays, and gives what was met as well.
    pub(crate) fn replay_watched(
        &self,
        records: &[Record],
        hardware: &Hardware,
    ) -> (Outcome, Vec<Seen>) {
        let (outcome, engine) = self.replay_on(records, &WatchedHardware(*hardware));
        let seed = hardware.disturbance.seed;
        let outcome = outcome.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        (outcome, engine.vcpu().seen.clone())
    }
}

impl Vcpu for Watched {
    ask_vcpu_within! {
        vcpu: conditional_branches, set_overflow, set_breakpoints, step_off, state, set_state,
        interruptible, set_window_request, catch_breakpoint_instructions,
        pass_breakpoint_instruction, watch_writes, retire_instruction, write_ram, instruction_at,
        ram, kicker
    }

    fn enter(&mut self) -> Result<VcpuExit, EngineError> {
        let exit = self.vcpu.enter()?;
        match exit {
            VcpuExit::Interrupted { kicked: true } => self.note(What::Kick)?,
            VcpuExit::InterruptWindow => {
                self.opened_at = Some(self.vcpu.instruction_count());
                self.note(What::Window)?;
            }
            VcpuExit::Halt => self.events += 1,
            _ => {}
        }
        Ok(exit)
    }

    fn inject(&mut self, vector: u8) -> Result<(), EngineError> {
        self.note(What::Interrupt { vector })?;
        self.events += 1;
        self.vcpu.inject(vector)
    }

    fn finish_access(&mut self, value: u128) -> Result<bool, EngineError> {
        let retired = self.vcpu.finish_access(value)?;
        self.events += u64::from(retired);
        Ok(retired)
    }
}
