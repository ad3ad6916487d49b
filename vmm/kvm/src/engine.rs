//! [`KvmEngine`]: the contract between the machine and KVM.
//!
//! An access leaves KVM in the middle of an instruction: the kernel completes it (writes the register
//! that IN loads, moves RIP) at the start of the next KVM_RUN. So a finished access is only noted here,
//! and when somebody looks at the CPU before the guest runs on, KVM_RUN is called with `immediate_exit`,
//! which completes the instruction and does nothing else. Where the same instruction then asks for
//! another access (REP OUTS, a read-modify-write of MMIO), that exit is kept for the next run.

use std::sync::Arc;

use kvm_bindings::kvm_regs;
use reprise_branch_clock::guest_code::MAX_BYTES;
use reprise_devices::cpu_model::TimeStampCounter;
use reprise_machine::assist::Refusing;
use reprise_machine::clock::TimeBase;
use reprise_machine::engine::{Engine, EngineError, Exit, Kick};
use reprise_machine::paging::Paging;
use reprise_machine::ram::GuestRam;
use reprise_trace::checkpoint::{EngineState, HiddenState};
use reprise_trace::cpu_state::{CS, CpuState};
use reprise_trace::moment::{Moment, TickKind};
use reprise_trace::register_bits::{RFLAGS_IF, RFLAGS_RF};

use crate::access::PendingExit;
use crate::error::KvmError;
use crate::kick::{VcpuKick, install_handler};
use crate::self_test::step_clock;
use crate::step::Stepper;
use crate::vcpu::{RawExit, Vcpu};
use crate::{cpuid, state};

/// #UD's vector.
const INVALID_OPCODE: u8 = 6;

/// How the engine counts ticks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvmClock {
    /// A tick is an access to the board or a HLT. Each element of a string instruction on ports, and
    /// each access that KVM reports of one instruction on MMIO, is a tick of its own.
    Sync,
    /// A tick is a retired instruction. What the host's KVM does not step exactly ends with a reason.
    Step,
}

/// The guest on the host's KVM.
pub struct KvmEngine {
    // Before `ram`, which must outlive it: fields drop in order.
    pub(crate) vcpu: Vcpu,
    pub(crate) ram: GuestRam,
    pub(crate) clock: KvmClock,
    pub(crate) tick: u64,
    /// An exit with an element that the machine has not answered, or not been told of.
    pub(crate) pending: Option<PendingExit>,
    /// The machine was told of `pending`, and its answer is awaited.
    pub(crate) awaiting_answer: bool,
    /// KVM holds an instruction whose accesses are all answered.
    pub(crate) incomplete: bool,
    /// What completing an instruction brought up.
    pub(crate) queued: Option<RawExit>,
    /// The guest has finished an access and executed nothing since, under the clock of exits.
    pub(crate) behind_access: bool,
    pub(crate) halted: bool,
    /// KVM_RUN's last exit was the refusal of an instruction.
    pub(crate) refused: bool,
    /// An interrupt is queued in KVM and not delivered.
    pub(crate) injected: bool,
    pub(crate) window_wanted: bool,
    pub(crate) kick: Arc<VcpuKick>,
    pub(crate) stepper: Stepper,
    /// `tsc_offset` and `tsc_aux`, which are only kept: not every KVM can set the guest's TSC, and the
    /// CPU model has no RDTSCP.
    pub(crate) tsc: [u64; 2],
    /// What RDTSC that is stepped reads.
    pub(crate) time_base: TimeBase,
    /// Where RDTSC is trapped.
    pub(crate) time_stamp_sites: Vec<u64>,
}

impl KvmEngine {
    /// A vCPU in the state of [`CpuState::default`] whose memory is `ram`.
    ///
    /// # Errors
    /// Says in one line what KVM refuses or lacks: see [`KvmError`].
    pub fn new(ram: GuestRam, clock: KvmClock) -> Result<Self, EngineError> {
        if clock == KvmClock::Step {
            let finding = step_clock();
            if !finding.available {
                return Err(KvmError::CannotStep(finding.reason).into());
            }
        }
        Ok(Self::untested(ram, clock)?)
    }

    /// As [`Self::new`], but does not find out first whether the host can step.
    pub(crate) fn untested(ram: GuestRam, clock: KvmClock) -> Result<Self, KvmError> {
        install_handler()?;
        // SAFETY: the engine owns the RAM and drops it after the vCPU.
        let mut vcpu = unsafe { Vcpu::new(&ram, &cpuid::table(TimeStampCounter::Shown)?)? };
        if clock == KvmClock::Step {
            vcpu.allow_time_stamps();
        }
        Ok(Self {
            vcpu,
            ram,
            clock,
            tick: 0,
            pending: None,
            awaiting_answer: false,
            incomplete: false,
            queued: None,
            behind_access: false,
            halted: false,
            refused: false,
            injected: false,
            window_wanted: false,
            kick: Arc::default(),
            stepper: Stepper::default(),
            tsc: [0; 2],
            time_base: TimeBase { tick: 0, ns: 0, ns_per_tick: 0 },
            time_stamp_sites: Vec::new(),
        })
    }

    /// Brings KVM to an instruction boundary, or, where the instruction wants another access, to
    /// that one.
    pub(crate) fn settle(&mut self) -> Result<(), KvmError> {
        if !std::mem::take(&mut self.incomplete) {
            return Ok(());
        }
        match self.vcpu.complete()? {
            // A debug exit only says that the stepped instruction is done.
            RawExit::Interrupted | RawExit::Debug { .. } => {}
            exit => self.queued = Some(exit),
        }
        Ok(())
    }

    /// Hands an access out.
    pub(crate) fn present(&mut self, exit: PendingExit) -> Exit {
        self.pending = Some(exit);
        self.awaiting_answer = true;
        Exit::Access(exit.access(&mut self.vcpu))
    }

    fn run_sync(&mut self) -> Result<Exit, EngineError> {
        if let Some(exit) = self.pending {
            return Ok(self.present(exit));
        }
        if self.halted {
            return Ok(Exit::Halt);
        }
        if let Some(exit) = self.queued.take() {
            self.refused = exit.is_refusal();
            return self.sync_exit(exit);
        }
        self.refused = false;
        match self.run_watched()? {
            RawExit::Interrupted => Ok(Exit::Kicked),
            exit => {
                self.refused = exit.is_refusal();
                self.injected = false;
                self.sync_exit(exit)
            }
        }
    }

    /// Runs the guest until it exits, or until somebody kicks, which is [`RawExit::Interrupted`].
    pub(crate) fn run_watched(&mut self) -> Result<RawExit, KvmError> {
        let kick = self.kick.clone();
        // SAFETY: the vCPU lives as long as the engine, which this function borrows.
        let _registered = unsafe { kick.register(self.vcpu.immediate_exit()) };
        loop {
            if kick.take() {
                return Ok(RawExit::Interrupted);
            }
            self.incomplete = false;
            self.behind_access = false;
            match self.vcpu.run()? {
                RawExit::Interrupted => self.vcpu.fd.set_kvm_immediate_exit(0),
                exit => return Ok(exit),
            }
        }
    }

    /// Runs the guest until it exits, or until any signal comes, which is [`RawExit::Interrupted`].
    pub(crate) fn run_signalled(&mut self) -> Result<RawExit, KvmError> {
        let kick = self.kick.clone();
        // SAFETY: the vCPU lives as long as the engine, which this function borrows.
        let _registered = unsafe { kick.register(self.vcpu.immediate_exit()) };
        self.incomplete = false;
        if kick.is_requested() {
            return Ok(RawExit::Interrupted);
        }
        self.behind_access = false;
        let exit = self.vcpu.run()?;
        if exit == RawExit::Interrupted {
            self.vcpu.fd.set_kvm_immediate_exit(0);
        }
        Ok(exit)
    }

    fn sync_exit(&mut self, exit: RawExit) -> Result<Exit, EngineError> {
        if let Some(pending) = PendingExit::new(exit) {
            return Ok(self.present(pending));
        }
        if let RawExit::Debug { .. } = exit
            && self.stands_at_time_stamp()?
        {
            let exit = PendingExit::new(RawExit::TimeStamp).expect("it is an access");
            return Ok(self.present(exit));
        }
        if exit == RawExit::Halt {
            self.tick += 1;
            self.halted = true;
            return Ok(Exit::Halt);
        }
        self.unusual_exit(exit)
    }

    /// An exit that ends the run.
    pub(crate) fn unusual_exit(&mut self, exit: RawExit) -> Result<Exit, EngineError> {
        if exit == RawExit::Shutdown {
            self.forget_resume_flag()?;
            return Ok(Exit::TripleFault);
        }
        let place = self.describe_place()?;
        Ok(Exit::Unsupported(format!("{exit} at {place}: use --engine soft")))
    }

    /// KVM's emulator leaves RFLAGS.RF set in shutdown, meant for a frame that it never came to push. No guest
    /// sees that, and no other engine has it.
    fn forget_resume_flag(&mut self) -> Result<(), KvmError> {
        let mut registers = self.registers()?;
        registers.rflags &= !RFLAGS_RF;
        let set = self.vcpu.fd.set_regs(&registers);
        set.map_err(|errno| KvmError::refused("KVM_SET_REGS", errno))
    }

    /// RIP and the bytes there, for a message.
    pub(crate) fn describe_place(&mut self) -> Result<String, KvmError> {
        let state = state::read(&self.vcpu.fd)?;
        let mut bytes = [0; MAX_BYTES];
        let linear = state.segments[CS].base.wrapping_add(state.rip);
        let count = Paging::from(&state).read_prefix(&self.ram, linear, &mut bytes);
        let mut place = format!("rip {:#x}", state.rip);
        if count == 0 {
            place.push_str(" (no memory there)");
            return Ok(place);
        }
        place.push_str(" (bytes");
        for byte in &bytes[..count] {
            place.push_str(&format!(" {byte:02x}"));
        }
        place.push(')');
        Ok(place)
    }

    /// Forgets everything about the guest that goes beyond its state: somebody sets another one.
    pub(crate) fn restart(&mut self) -> Result<(), KvmError> {
        self.abandon_instruction()?;
        self.show_hidden()?;
        self.behind_access = false;
        self.refused = false;
        self.halted = false;
        self.injected = false;
        self.stepper.forget();
        Ok(())
    }

    /// Lets KVM forget a half-done instruction, whose effects no longer matter.
    fn abandon_instruction(&mut self) -> Result<(), KvmError> {
        /// More than any one page of a string instruction gives.
        const MAX_ACCESSES: usize = 1 << 16;
        let half_done = self.pending.take().is_some() | self.queued.take().is_some();
        self.awaiting_answer = false;
        if !half_done && !self.incomplete {
            return Ok(());
        }
        self.incomplete = false;
        for _ in 0..MAX_ACCESSES {
            let exit = self.vcpu.complete()?;
            if PendingExit::new(exit).is_none() {
                return Ok(());
            }
        }
        Err(KvmError::Unusable {
            path: "the vCPU".into(),
            reason: "it stands in an endless string instruction".into(),
        })
    }
}

impl Engine for KvmEngine {
    fn tick_kind(&self) -> TickKind {
        match self.clock {
            KvmClock::Sync => TickKind::Exit,
            KvmClock::Step => TickKind::Instruction,
        }
    }

    fn tick(&self) -> u64 {
        self.tick
    }

    fn run(&mut self, until: u64) -> Result<Exit, EngineError> {
        assert!(!self.awaiting_answer, "the last access is finished before the guest runs on");
        assert!(until >= self.tick, "tick {until} is in the past");
        if self.tick == until && self.clock == KvmClock::Sync {
            return Ok(Exit::TickReached);
        }
        match self.clock {
            KvmClock::Sync => self.run_sync(),
            KvmClock::Step => self.run_step(until),
        }
    }

    fn sets_accessed_bits_early(&self) -> bool {
        true
    }

    fn finish_access(&mut self, value: u128) -> Result<(), EngineError> {
        let mut exit = self.pending.take().expect("run came back with an access");
        assert!(std::mem::take(&mut self.awaiting_answer), "an access is finished once");
        if exit.is_time_stamp() {
            self.retire_time_stamp(value as u64)?;
        } else if exit.finish(&mut self.vcpu, value) {
            self.pending = Some(exit);
        } else {
            self.incomplete = true;
        }
        self.behind_access = self.clock == KvmClock::Sync && !exit.is_time_stamp();
        match self.clock {
            KvmClock::Sync => self.tick += 1,
            KvmClock::Step => self.step_finished_access()?,
        }
        Ok(())
    }

    fn interruptible(&mut self) -> Result<bool, EngineError> {
        if self.clock == KvmClock::Step {
            return Ok(self.step_interruptible()?);
        }
        if self.injected {
            return Ok(false);
        }
        let open = |registers: kvm_regs| registers.rflags & RFLAGS_IF != 0;
        if !self.registers_at_boundary()?.is_some_and(open) {
            return Ok(false);
        }
        Ok(state::read_events(&self.vcpu.fd)?.interrupt.shadow == 0)
    }

    fn amid_accesses(&mut self) -> Result<bool, EngineError> {
        Ok(self.clock == KvmClock::Sync && self.stands_amid_instruction()?)
    }

    fn set_interrupt_request(&mut self, wanted: bool) {
        self.window_wanted = wanted;
    }

    fn inject(&mut self, vector: u8) -> Result<(), EngineError> {
        assert!(self.interruptible()?, "only an interruptible guest takes an interrupt");
        self.halted = false;
        if self.clock == KvmClock::Step {
            return Ok(self.step_inject(vector)?);
        }
        self.vcpu.interrupt(vector)?;
        self.injected = true;
        self.behind_access = false;
        Ok(())
    }

    fn set_time_base(&mut self, base: TimeBase) {
        self.time_base = base;
    }

    fn moment(&mut self) -> Result<Moment, EngineError> {
        let regs = match self.registers_at_boundary()? {
            Some(registers) => registers,
            None => self.registers()?,
        };
        Ok(Moment { tick: self.tick, rip: regs.rip, rcx: regs.rcx })
    }

    fn cpu_state(&mut self) -> Result<CpuState, EngineError> {
        self.registers_at_boundary()?;
        self.show_hidden()?;
        let state = state::read(&self.vcpu.fd)?;
        let [tsc_offset, tsc_aux] = self.tsc;
        Ok(CpuState { halted: self.halted, tsc_offset, tsc_aux, ..state })
    }

    fn set_cpu_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.restart()?;
        state::write(&self.vcpu.fd, state)?;
        self.halted = state.halted;
        self.tsc = [state.tsc_offset, state.tsc_aux];
        Ok(())
    }

    fn read_ram(&self, address: u64, bytes: &mut [u8]) {
        self.ram.read(address, bytes);
    }

    fn visit_ram(&self, visit: &mut dyn FnMut(u64, &[u8])) {
        self.ram.visit(visit);
    }

    fn save(&mut self) -> Result<Option<EngineState>, EngineError> {
        self.settle()?;
        let amid = self.awaiting_answer
            || self.pending.is_some()
            || self.queued.is_some()
            || self.injected
            || self.stepper.is_amid_step()
            || self.amid_accesses()?;
        if amid {
            return Ok(None);
        }
        let hidden = HiddenState::of_kvm();
        Ok(Some(EngineState { tick: self.tick, cpu: self.cpu_state()?, hidden }))
    }

    fn restore(&mut self, state: &EngineState) -> Result<(), EngineError> {
        self.set_cpu_state(&state.cpu)?;
        self.tick = state.tick;
        Ok(())
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.kick.clone()
    }
}

impl Refusing for KvmEngine {
    fn has_refused(&mut self) -> Result<bool, EngineError> {
        let amid = self.pending.is_some() || self.queued.is_some() || self.incomplete;
        if !self.refused || amid {
            return Ok(false);
        }
        // What was about to be delivered would be lost; but KVM itself queues #UD when it refuses.
        let events = state::read_events(&self.vcpu.fd)?;
        let exception = events.exception.injected | events.exception.pending;
        let delivers_exception = exception != 0 && events.exception.nr != INVALID_OPCODE;
        Ok(events.interrupt.injected | events.nmi.injected == 0 && !delivers_exception)
    }

    fn ram(&self) -> &GuestRam {
        &self.ram
    }

    fn count_access(&mut self) {
        if self.clock == KvmClock::Sync {
            self.tick += 1;
        }
    }

    fn go_on(
        &mut self,
        before: &CpuState,
        after: &CpuState,
        retired: bool,
    ) -> Result<(), EngineError> {
        self.restart()?;
        state::write_changes(&self.vcpu.fd, before, after)?;
        self.halted = after.halted;
        self.tsc = [after.tsc_offset, after.tsc_aux];
        let counted = match self.clock {
            KvmClock::Sync => after.halted,
            KvmClock::Step => retired,
        };
        self.tick += u64::from(counted);
        Ok(())
    }
}

#[cfg(test)]
#[path = "engine_tests.rs"]
mod tests;
