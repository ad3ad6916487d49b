//! The software CPU from within, for whoever makes hardware of it: conditional branches counted as a
//! performance counter counts them, single steps that also stop amid a REP and before a handler's first
//! instruction, and translations that are forgotten as a TLB forgets them.
//!
//! Counting costs nothing where nobody counts: a branch is counted by the handler that its operation
//! gets when it is decoded. Translated code adds the branches of a unit that have retired where it takes
//! their instructions from the budget, on every way out.
#![allow(unsafe_code)]

use iced_x86::{FlowControl, Instruction};
use reprise_machine::engine::{Engine, EngineError, Exit};
use reprise_machine::ram::GuestRam;
use reprise_trace::checkpoint::{EngineState, HiddenState};
use reprise_trace::cpu_state::CpuState;

use crate::cpu::{BRANCHES, Cpu};
use crate::decode::op::Op;
use crate::engine::SoftEngine;
use crate::fault::Flow;
use crate::flags;
use crate::native::host_fpu::with_guest_fpu;

/// Whether a performance counter of conditional branches counts this: Jcc, and LOOP and JRCXZ with
/// their kin.
pub(crate) fn is_conditional_branch(instruction: &Instruction) -> bool {
    instruction.flow_control() == FlowControl::ConditionalBranch
}

/// Has an operation counted if it is a conditional branch and such are counted.
pub(crate) fn wrap_branch(cpu: &Cpu, op: &mut Op) {
    if cpu.counts_branches && is_conditional_branch(&op.instruction) {
        op.instruction.inner = op.handler;
        op.handler = counted;
    }
}

/// Runs a conditional branch and counts it if it retires.
extern "sysv64" fn counted(cpu: &mut Cpu, op: &Op) -> Flow {
    // SAFETY: `inner` is the handler that `ops::select` chose for this very operation.
    let flow = unsafe { (op.instruction.inner)(cpu, op) };
    cpu.registers.gpr[usize::from(BRANCHES)] += u64::from(flow == Flow::NEXT);
    flow
}

impl SoftEngine {
    /// Counts conditional branches from here on, or no longer. To be called while no code is decoded, which
    /// would go on as it was: before the guest first runs, or behind [`Self::start_over`].
    pub fn count_conditional_branches(&mut self, counts: bool) {
        self.cpu_mut().counts_branches = counts;
    }

    /// Goes on counting from so many.
    pub fn set_conditional_branches(&mut self, branches: u64) {
        self.cpu_mut().registers.gpr[usize::from(BRANCHES)] = branches;
    }

    /// Conditional branches retired since [`SoftEngine::count_conditional_branches`].
    pub fn conditional_branches(&self) -> u64 {
        self.cpu().registers.gpr[usize::from(BRANCHES)]
    }

    /// #DB that the guest has taken: single steps, breakpoints of its own, INT1.
    pub fn debug_exceptions(&self) -> u64 {
        self.cpu().debug_exceptions
    }

    /// Leaves the time-stamp counter out of what CPUID says, as a hypervisor does that cannot trap RDTSC.
    pub fn hide_time_stamp_counter(&mut self) {
        self.cpu_mut().hides_time_stamp = true;
    }

    /// Has CPUID say again that there is a time-stamp counter.
    pub fn show_time_stamp_counter(&mut self) {
        self.cpu_mut().hides_time_stamp = false;
    }

    /// Has RDTSC read zero whatever the time is, as where simulated hardware's counter stands still.
    pub fn stop_time_stamp_counter(&mut self) {
        self.time_stands_still = true;
    }

    /// Executes one instruction or the delivery of one fault, whichever comes first, or one element of
    /// a REP if `by_element`. Gives an exit if that needs the machine; the guest is not halted.
    ///
    /// # Panics
    /// If the last access was not finished.
    pub fn step(&mut self, by_element: bool) -> Option<Exit> {
        self.step_until(by_element, 1, &[])
    }

    /// As many steps as `most`, which is not zero, but none from an address in `stops` besides the first.
    ///
    /// # Panics
    /// If the last access was not finished.
    pub fn step_until(&mut self, by_element: bool, most: u64, stops: &[u64]) -> Option<Exit> {
        let requested = self.interrupt_is_requested();
        self.next_exit(|cpu| {
            cpu.stops_between_elements = by_element;
            let exit = with_guest_fpu(cpu, |cpu| {
                for _ in 1..most {
                    let exit = cpu.execute_one();
                    let window = requested && cpu.interruptible();
                    let watched = cpu.memory.physical.has_watched_writes();
                    if exit.is_some() || window || watched || stops.contains(&cpu.code_address()) {
                        return exit;
                    }
                }
                cpu.execute_one()
            });
            cpu.stops_between_elements = false;
            exit
        })
    }

    /// Whether the instruction whose access was finished last has more to do before it retires.
    pub fn amid_instruction(&self) -> bool {
        self.has_queued_exit()
    }

    /// Whether the guest is at CPL 3.
    pub fn is_in_user_code(&self) -> bool {
        self.cpu().cpl == 3
    }

    /// The linear address of the next instruction.
    pub fn code_address(&self) -> u64 {
        self.cpu().code_address()
    }

    /// Whether RFLAGS.RF lets the next instruction execute whatever breakpoint it has.
    pub fn resumes(&self) -> bool {
        self.cpu().rflags_rest & flags::RF != 0
    }

    /// Whether the last instruction loaded SS, behind which no debug exception is delivered.
    pub fn loaded_stack_segment(&self) -> bool {
        let cpu = self.cpu();
        cpu.interrupt_shadow && cpu.debug.is_behind_stack_switch(cpu.tick)
    }

    /// Forgets every cached translation, as a TLB may at any time.
    pub fn forget_translations(&mut self) {
        self.cpu_mut().flush_translations();
    }

    /// Takes over a state at a tick and forgets everything that was known of RAM, which somebody else has written
    /// since: decoded code, translations, half-done accesses.
    ///
    /// # Errors
    /// Never, at present: a state without hidden parts is taken as it is.
    pub fn start_over(&mut self, tick: u64, state: &CpuState) -> Result<(), EngineError> {
        let hidden = HiddenState { engine: String::new(), version: 0, bytes: Vec::new() };
        self.restore(&EngineState { tick, cpu: state.clone(), hidden })?;
        self.cpu_mut().forget_code();
        Ok(())
    }

    /// Guest RAM.
    pub fn ram(&self) -> &GuestRam {
        self.cpu().memory.physical.ram()
    }
}
