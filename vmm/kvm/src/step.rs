//! The clock `step`: every instruction is stepped, and each that retires is a tick.
//!
//! One single-step of KVM is nearly one instruction. Where it is not, this file makes it so:
//!
//! - A fault retires nothing, and KVM steps the fault's delivery and the handler's first instruction
//!   together: one tick, as it should be.
//! - An interrupt is delivered and IRETQ executed by [`crate::transfer`], because KVM would step each
//!   together with the instruction behind it.
//! - HLT is executed here: some KVMs report a stepped HLT as any other instruction.
//! - A REP string instruction is stepped many times and retires when RIP leaves it.
//! - An instruction that accesses the board retires when the access is finished and KVM has completed
//!   it without asking for another one.
//!
//! - User code, on a KVM that runs it natively, is stepped in its own way: [`crate::user_step`]. The ways
//!   there and back are executed here.
//!
//! Before each step the instruction is decoded and its possible successors are worked out. A step that
//! ends elsewhere must have gone through an exception handler; where no handler explains it, the run
//! ends with a reason instead of a wrong count.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};
use kvm_bindings::*;
use reprise_machine::engine::{EngineError, Exit};
use reprise_trace::cpu_state::{CpuState, RSP};

use crate::access::PendingExit;
use crate::engine::KvmEngine;
use crate::error::KvmError;
use crate::self_test::steps_user_code;
use crate::transfer::Event;
use crate::user_step::{Hidden, UserStep};
use crate::vcpu::RawExit;
use crate::{state, system_call, transfer};
use reprise_branch_clock::guest_code::{
    Successors, decode_at, handler_of, repeats, stack_word, successors,
};
use reprise_branch_clock::retired::time_stamp_retired;
use reprise_trace::register_bits::{CR0_PE, RFLAGS_IF, RFLAGS_RF, RFLAGS_TF};

/// What cannot be stepped because the guest does it already.
pub(crate) const SELF_STEPPING: &str = "a guest that steps itself (TF)";

/// KVM's single-step ends where user code begins.
const INTO_USER_CODE: &str = "this way into user code (CPL3)";

/// Vectors of exceptions, as against interrupts.
const EXCEPTIONS: std::ops::RangeInclusive<u8> = 0..=31;

/// The guest as the step clock sees it.
#[derive(Default)]
pub(crate) struct Stepper {
    /// Registers, segments, control registers and the interrupt shadow; the rest is not kept.
    pub(crate) view: CpuState,
    /// `view` is what KVM holds.
    current: bool,
    /// KVM_SET_GUEST_DEBUG has been called since registers were last set.
    pub(crate) armed: bool,
    /// The instruction that has begun and not retired.
    pub(crate) begun: Option<Begun>,
    /// An exception has been delivered and nothing has retired since: a run that stops at this tick
    /// stands before it.
    pub(crate) amid_exception: bool,
    /// What of the guest's state KVM does not hold while user code is stepped.
    pub(crate) hidden: Option<Hidden>,
    /// An interrupt that KVM is to deliver with the next step.
    interrupt: Option<u8>,
    /// What the next run comes back with.
    refused: Option<Exit>,
}

/// An instruction that has begun.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Begun {
    pub(crate) rip: u64,
    pub(crate) rsp: u64,
    pub(crate) repeats: bool,
    /// It loads SS, and so holds off interrupts.
    pub(crate) loads_stack_segment: bool,
    pub(crate) successors: Successors,
    /// An interrupt that KVM delivers first.
    pub(crate) interrupt: Option<u8>,
    /// It is user code's.
    pub(crate) user: Option<UserStep>,
}

impl Stepper {
    /// Whether an instruction, or the delivery of an interrupt, is half done.
    pub(crate) fn is_amid_step(&self) -> bool {
        self.begun.is_some() || self.interrupt.is_some() || self.amid_exception
    }

    /// Whatever is known of the guest is out of date.
    pub(crate) fn forget(&mut self) {
        self.current = false;
        self.armed = false;
        self.begun = None;
        self.amid_exception = false;
        self.interrupt = None;
        self.refused = None;
    }
}

impl KvmEngine {
    pub(crate) fn run_step(&mut self, until: u64) -> Result<Exit, EngineError> {
        if let Some(exit) = self.stepper.refused.clone() {
            return Ok(exit);
        }
        let kick = self.kick.clone();
        // SAFETY: the vCPU lives as long as the engine, which this function borrows.
        let _registered = unsafe { kick.register(self.vcpu.immediate_exit()) };
        loop {
            if let Some(exit) = self.pending {
                return Ok(self.present(exit));
            }
            if self.stepper.begun.is_none() && !self.stepper.amid_exception {
                if self.tick == until {
                    return Ok(Exit::TickReached);
                }
                if self.halted {
                    return Ok(Exit::Halt);
                }
                if self.kick.take() {
                    return Ok(Exit::Kicked);
                }
                if self.window_wanted && self.step_interruptible()? {
                    return Ok(Exit::InterruptWindow);
                }
            }
            let exit = match self.queued.take() {
                Some(exit) => {
                    self.refused = exit.is_refusal();
                    self.step_exit(exit)?
                }
                None => self.step()?,
            };
            if let Some(exit) = exit {
                return Ok(exit);
            }
        }
    }

    /// Whether the guest takes interrupts at this boundary.
    pub(crate) fn step_interruptible(&mut self) -> Result<bool, KvmError> {
        self.refresh()?;
        let view = &self.stepper.view;
        Ok(!self.injected && view.rflags & RFLAGS_IF != 0 && !view.interrupt_shadow)
    }

    /// Delivers an interrupt at once where that can be done here, else leaves it to KVM and the next
    /// step.
    pub(crate) fn step_inject(&mut self, vector: u8) -> Result<(), KvmError> {
        self.refresh()?;
        let view = &self.stepper.view;
        match transfer::deliver(&self.ram, view, &Event::interrupt(view, vector)) {
            Some(after) => self.replace(after),
            None if view.cpl() == 3 => {
                let what = format!("interrupt {vector:#x}, which user code takes");
                self.stepper.refused = self.cannot_step(&what)?;
                Ok(())
            }
            None => {
                self.vcpu.interrupt(vector)?;
                self.injected = true;
                self.stepper.interrupt = Some(vector);
                Ok(())
            }
        }
    }

    /// What the machine's answer to the last access leads to.
    pub(crate) fn step_finished_access(&mut self) -> Result<(), EngineError> {
        if self.pending.is_some() {
            return Ok(());
        }
        self.settle()?;
        self.load_view();
        if self.queued.is_none() {
            // An instruction that is not explained is reported by the next run.
            if let Some(exit) = self.retire()? {
                self.stepper.refused = Some(exit);
            }
        }
        Ok(())
    }

    /// One step; `None` to go on.
    fn step(&mut self) -> Result<Option<Exit>, EngineError> {
        self.refresh()?;
        if let Some(vector) = self.stepper.interrupt.take() {
            self.stepper.begun = Some(Begun {
                rip: self.stepper.view.rip,
                rsp: self.stepper.view.gpr[RSP],
                repeats: false,
                loads_stack_segment: false,
                successors: Successors::None,
                interrupt: Some(vector),
                user: None,
            });
        } else if self.stepper.begun.is_none() {
            let view = &self.stepper.view;
            let instruction = decode_at(&self.ram, view, view.rip);
            let outcome = match view.cpl() {
                3 => self.execute_user_here(instruction.as_ref())?,
                _ => self.execute_here(instruction.as_ref())?,
            };
            if let Some(outcome) = outcome {
                return Ok(outcome);
            }
            self.begin(instruction.as_ref());
        }
        self.arm()?;
        let exit = self.vcpu.run()?;
        self.refused = exit.is_refusal();
        self.load_view();
        self.step_exit(exit)
    }

    /// Notes what is about to execute.
    pub(crate) fn begin(&mut self, instruction: Option<&Instruction>) {
        let view = &self.stepper.view;
        let user = (view.cpl() == 3).then(|| UserStep::of(view, instruction));
        let successors = match instruction {
            Some(instruction) => successors(&self.ram, view, instruction),
            None => Successors::None,
        };
        self.stepper.begun = Some(Begun {
            rip: view.rip,
            rsp: view.gpr[RSP],
            repeats: instruction.is_some_and(repeats),
            loads_stack_segment: instruction.is_some_and(loads_stack_segment),
            successors,
            interrupt: None,
            user,
        });
    }

    /// Executes what KVM's single-step does not, or ends the run before what nothing here can step.
    /// The outer `None` means that KVM steps the instruction.
    fn execute_here(
        &mut self,
        instruction: Option<&Instruction>,
    ) -> Result<Option<Option<Exit>>, EngineError> {
        let view = &self.stepper.view;
        let Some(instruction) = instruction else { return Ok(None) };
        // What executes clears RF.
        let started = || CpuState { rflags: view.rflags & !RFLAGS_RF, ..view.clone() };
        let after = match instruction.code() {
            Code::Hlt if view.cpl() == 0 => {
                self.halted = true;
                let rip = instruction.next_ip();
                Some(CpuState { interrupt_shadow: false, rip, ..started() })
            }
            Code::Sti if view.cpl() == 0 && view.rflags & RFLAGS_IF != 0 => {
                // KVM's emulator holds interrupts off even where they were open already.
                let rip = instruction.next_ip();
                Some(CpuState { interrupt_shadow: false, rip, ..started() })
            }
            Code::Rdtsc => {
                let ns = self.time_base.at(self.tick).ns;
                let state = CpuState { tsc_offset: self.tsc[0], ..started() };
                Some(time_stamp_retired(&state, instruction.len(), ns))
            }
            Code::Iretq if self.loads_trap_flag(instruction) => {
                return Ok(Some(self.cannot_step(SELF_STEPPING)?));
            }
            Code::Iretq if !self.returns_to_user(instruction) => transfer::iretq(&self.ram, view),
            Code::Int_imm8 => {
                let (state, vector) = (started(), instruction.immediate8());
                let event = Event::software(&state, vector, instruction.next_ip());
                transfer::deliver(&self.ram, &state, &event)
            }
            Code::Int3 => {
                let state = started();
                let event = Event::software(&state, 3, instruction.next_ip());
                transfer::deliver(&self.ram, &state, &event)
            }
            Code::Popfw | Code::Popfd | Code::Popfq | Code::Iretd | Code::Iretw
                if self.loads_trap_flag(instruction) =>
            {
                return Ok(Some(self.cannot_step(SELF_STEPPING)?));
            }
            _ if self.returns_to_user(instruction) => {
                // KVM would run user code up to its next exit as part of this step.
                let Some(after) = self.return_to_user(instruction.code())? else {
                    return Ok(Some(self.cannot_step(INTO_USER_CODE)?));
                };
                Some(after)
            }
            _ => None,
        };
        let Some(after) = after else { return Ok(None) };
        self.replace(after)?;
        self.count();
        Ok(Some(if self.halted { Some(Exit::Halt) } else { None }))
    }

    /// An instruction has retired.
    pub(crate) fn count(&mut self) {
        self.stepper.begun = None;
        self.stepper.amid_exception = false;
        self.tick += 1;
    }

    /// Whether `instruction` leads from CPL0 to CPL3.
    fn returns_to_user(&self, instruction: &Instruction) -> bool {
        let selector_at = match instruction.code() {
            Code::Sysretq | Code::Sysretd | Code::Sysexitq | Code::Sysexitd => return true,
            Code::Iretw | Code::Retfw | Code::Retfw_imm16 => 2,
            Code::Iretd | Code::Retfd | Code::Retfd_imm16 => 4,
            Code::Iretq | Code::Retfq | Code::Retfq_imm16 => 8,
            _ => return false,
        };
        let view = &self.stepper.view;
        let protected = view.cr0 & CR0_PE != 0;
        protected && stack_word(&self.ram, view, selector_at, 2).is_some_and(|cs| cs & 3 == 3)
    }

    /// The state in user code, where that can be stepped and this is a plain way there.
    fn return_to_user(&mut self, code: Code) -> Result<Option<CpuState>, KvmError> {
        if !steps_user_code() {
            return Ok(None);
        }
        match code {
            Code::Iretq => Ok(transfer::iretq(&self.ram, &self.stepper.view)),
            Code::Sysretq => Ok(system_call::leave(&self.with_system_call_registers()?)),
            _ => Ok(None),
        }
    }

    /// The view, and the registers of SYSCALL and SYSRET.
    pub(crate) fn with_system_call_registers(&self) -> Result<CpuState, KvmError> {
        let CpuState { star, lstar, sfmask, .. } = state::read(&self.vcpu.fd)?;
        Ok(CpuState { star, lstar, sfmask, ..self.stepper.view.clone() })
    }

    /// Whether POPF or IRET is about to set TF, which KVM's own stepping would hide.
    pub(crate) fn loads_trap_flag(&self, instruction: &Instruction) -> bool {
        let offset = match instruction.code() {
            Code::Iretw => 4,
            Code::Iretd => 8,
            Code::Iretq => 16,
            _ => 0,
        };
        stack_word(&self.ram, &self.stepper.view, offset, 2)
            .is_some_and(|flags| flags & RFLAGS_TF != 0)
    }

    pub(crate) fn cannot_step(&mut self, what: &str) -> Result<Option<Exit>, KvmError> {
        let place = self.describe_place()?;
        Ok(Some(Exit::Unsupported(format!(
            "the step clock cannot step {what} at {place} on this host's KVM: use --clock sync or --engine soft"
        ))))
    }

    fn step_exit(&mut self, exit: RawExit) -> Result<Option<Exit>, EngineError> {
        if let Some(Begun { user: Some(user), .. }) = self.stepper.begun
            && let Some(outcome) = self.user_exit(exit, &user)?
        {
            return Ok(outcome);
        }
        match exit {
            RawExit::Debug { .. } => self.retire(),
            RawExit::Interrupted => self.interrupted_step(),
            RawExit::Halt => {
                self.halted = true;
                self.count();
                Ok(Some(Exit::Halt))
            }
            exit => match PendingExit::new(exit) {
                Some(pending) => Ok(Some(self.present(pending))),
                None => self.unusual_exit(exit).map(Some),
            },
        }
    }

    /// A signal came before the step was made, or amid a repeated instruction.
    fn interrupted_step(&mut self) -> Result<Option<Exit>, EngineError> {
        self.vcpu.fd.set_kvm_immediate_exit(0);
        match self.stepper.begun {
            Some(begun) if begun.rip != self.stepper.view.rip => self.retire(),
            Some(begun) if begun.repeats || begun.interrupt.is_some() => Ok(None),
            _ => {
                self.stepper.begun = None;
                Ok(None)
            }
        }
    }

    /// A step is done: counts the instruction if it has retired, checks that it explains where RIP
    /// stands.
    fn retire(&mut self) -> Result<Option<Exit>, EngineError> {
        let Some(begun) = self.stepper.begun else { return Ok(None) };
        if let Some(user) = begun.user {
            return self.retire_user(&begun, &user);
        }
        self.injected = false;
        let rip = self.stepper.view.rip;
        if begun.successors.contain(rip) {
            if begun.repeats && rip == begun.rip {
                return Ok(None);
            }
        } else {
            let handler = self.first_of_handler(&begun);
            if let Some((vector, first)) = &handler
                && !self.hide_trap_flag(&begun, *vector, first)
            {
                return self.unexplained(&begun);
            }
            match handler.map(|(_, first)| first) {
                Some(instruction) if repeats(&instruction) && instruction.ip() == rip => {
                    // The handler's first instruction is under way.
                    self.begin(Some(&instruction));
                    return Ok(None);
                }
                Some(instruction) if instruction.code() == Code::Hlt => self.halted = true,
                Some(_) => {}
                None => return self.unexplained(&begun),
            }
        }
        self.count();
        if begun.loads_stack_segment && begun.successors.contain(rip) {
            // KVM knows this shadow of the first of several only.
            self.replace(CpuState { interrupt_shadow: true, ..self.stepper.view.clone() })?;
        }
        Ok(self.halted.then_some(Exit::Halt))
    }

    /// The first instruction of the handler through which a step must have gone, if there is one.
    fn first_of_handler(&self, begun: &Begun) -> Option<(u8, Instruction)> {
        let view = &self.stepper.view;
        let vectors = match begun.interrupt {
            Some(vector) => vector..=vector,
            None => EXCEPTIONS,
        };
        vectors.into_iter().find_map(|vector| {
            let handler = handler_of(&self.ram, view, vector)?;
            let first = decode_at(&self.ram, view, handler)?;
            // IRETQ would have been stepped together with what follows.
            let counted = first.code() != Code::Iretq;
            let explains = successors(&self.ram, view, &first).contain(view.rip);
            (counted && explains).then_some((vector, first))
        })
    }

    /// Takes the TF of the single-step out of the frame that a handler has found, where KVM shows it:
    /// when a repeated instruction faults after its first repetition. False where that is too late.
    fn hide_trap_flag(&self, begun: &Begun, vector: u8, first: &Instruction) -> bool {
        if !begun.repeats {
            return true;
        }
        let view = &self.stepper.view;
        let mut before = view.clone();
        before.gpr[RSP] = begun.rsp;
        match transfer::hide_trap_flag(&self.ram, &before, vector, begun.rip) {
            Some(hidden) => !hidden || !first.op_kinds().any(|kind| kind == OpKind::Memory),
            None => false,
        }
    }

    pub(crate) fn unexplained(&mut self, begun: &Begun) -> Result<Option<Exit>, EngineError> {
        let place = self.describe_place()?;
        Ok(Some(Exit::Unsupported(format!(
            "one step of this host's KVM led from rip {:#x} to {place}, which is more than an instruction: use --clock sync or --engine soft",
            begun.rip
        ))))
    }

    /// Brings the view up to date.
    fn refresh(&mut self) -> Result<(), KvmError> {
        if self.stepper.current {
            return Ok(());
        }
        let fd = &self.vcpu.fd;
        let regs = fd.get_regs().map_err(|errno| KvmError::refused("KVM_GET_REGS", errno))?;
        let mut sregs =
            fd.get_sregs().map_err(|errno| KvmError::refused("KVM_GET_SREGS", errno))?;
        let shadow = state::read_events(fd)?.interrupt.shadow;
        self.set_view(&regs, &mut sregs, shadow);
        Ok(())
    }

    /// Takes the view from what KVM_RUN left in `kvm_run`.
    fn load_view(&mut self) {
        let kvm_sync_regs { regs, mut sregs, events } = self.vcpu.fd.sync_regs();
        self.set_view(&regs, &mut sregs, events.interrupt.shadow);
    }

    fn set_view(&mut self, regs: &kvm_regs, sregs: &mut kvm_sregs, shadow: u8) {
        let view = &mut self.stepper.view;
        state::read_regs(regs, view);
        state::read_sregs(sregs, view);
        if let Some(hidden) = &self.stepper.hidden {
            view.idtr = hidden.idtr;
        }
        view.interrupt_shadow = shadow != 0;
        self.stepper.current = true;
    }

    /// Puts the guest into the state that executing something here has led to.
    pub(crate) fn replace(&mut self, after: CpuState) -> Result<(), KvmError> {
        if after.cpl() != 3 {
            self.show_hidden()?;
        }
        let fd = &self.vcpu.fd;
        let before = &self.stepper.view;
        if before.segments != after.segments {
            let mut sregs =
                fd.get_sregs().map_err(|errno| KvmError::refused("KVM_GET_SREGS", errno))?;
            state::write_sregs(&after, &mut sregs);
            fd.set_sregs(&sregs).map_err(|errno| KvmError::refused("KVM_SET_SREGS", errno))?;
        }
        if before.interrupt_shadow || after.interrupt_shadow {
            let mut events = state::read_events(fd)?;
            state::write_events(&after, &mut events);
            fd.set_vcpu_events(&events)
                .map_err(|errno| KvmError::refused("KVM_SET_VCPU_EVENTS", errno))?;
        }
        fd.set_regs(&state::write_regs(&after))
            .map_err(|errno| KvmError::refused("KVM_SET_REGS", errno))?;
        self.stepper.view = after;
        self.stepper.armed = false;
        Ok(())
    }

    /// Makes KVM step. Setting registers clears TF on some hosts, so it is done again after that.
    fn arm(&mut self) -> Result<(), KvmError> {
        if self.stepper.armed {
            return Ok(());
        }
        self.vcpu.single_step()?;
        self.stepper.armed = true;
        Ok(())
    }
}

/// Whether an instruction loads SS otherwise than by a far transfer.
fn loads_stack_segment(instruction: &Instruction) -> bool {
    let moves = matches!(instruction.mnemonic(), Mnemonic::Mov | Mnemonic::Pop);
    moves && instruction.op0_register() == Register::SS
}

#[cfg(test)]
#[path = "step_tests.rs"]
mod tests;
