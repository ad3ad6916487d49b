//! [`PmuVcpu`]: KVM's vCPU with a counter of conditional branches, as the branch clock wants one.
//!
//! Signals end KVM_RUN: a kick, and the counter's overflow. One that comes between two KVM_RUNs ends
//! none, which loses nothing: the clock reads the counter before each run and asks anew.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use kvm_bindings::{KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP, kvm_regs};
use reprise_branch_clock::guest_code::linear_of;
use reprise_branch_clock::vcpu::{MAX_BREAKPOINTS, OwnDebugging, RefusingVcpu, Vcpu, VcpuExit};
use reprise_devices::cpu_model::TimeStampCounter;
use reprise_machine::assist::Refusing;
use reprise_machine::engine::{Engine, EngineError, Exit, Kick};
use reprise_machine::paging::write_ram;
use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::CpuState;
use reprise_trace::register_bits::{RFLAGS_RF, RFLAGS_TF};

use crate::access::PendingExit;
use crate::branch_counter::BranchCounter;
use crate::breakpoint_instruction::CaughtBy;
use crate::error::KvmError;
use crate::perf_host::PerfHost;
use crate::vcpu::{RawExit, breakpoint_registers};
use crate::watchdog::Watchdog;
use crate::{KvmClock, KvmEngine, cpuid, state};

/// DR6: which breakpoints hit.
const DR6_HITS: u64 = 0xf;
/// DR6: a single step.
const DR6_SINGLE_STEP: u64 = 1 << 14;

/// KVM's vCPU with a counter.
pub struct PmuVcpu {
    pub(crate) engine: KvmEngine,
    /// None only where something else is tried.
    counter: Option<BranchCounter>,
    window_wanted: bool,
    /// RFLAGS.RF was set so that the instruction at this RIP executes: ours while the guest stands there.
    resuming: Option<u64>,
    /// What was asked of the counter last...
    overflow: Option<u64>,
    /// ...when it was at this, or further on...
    overflow_from: u64,
    /// ...and whether the guest has run since then: the overflow may be spent.
    overflow_spent: bool,
    /// What the counter showed last.
    counted: u64,
    /// Linear addresses of breakpoints.
    breakpoints: Vec<u64>,
    /// The guest's own are enabled. Looked at before and behind each entry with breakpoints.
    guest_has_breakpoints: bool,
    /// Why the guest cannot go on.
    refusal: Option<String>,
    /// INT3 that came back is on its way to the guest after all: RIP and RSP before its delivery.
    pub(crate) passing_on: Option<(u64, u64)>,
    watchdog: Option<Watchdog>,
    /// INT3 comes back.
    pub(crate) catches_breakpoints: bool,
    /// Who gave back the INT3 that the guest stands at.
    pub(crate) caught_by: CaughtBy,
    /// Writes to watched RAM that are done, and that nobody has been told of.
    pub(crate) watched_writes: Vec<Range<u64>>,
}

impl PmuVcpu {
    /// A vCPU whose memory is `ram`, for the calling thread.
    pub(crate) fn new(ram: GuestRam, host: &dyn PerfHost) -> Result<Self, KvmError> {
        let vcpu = Self::without_counter(ram)?;
        let counter = BranchCounter::open(host).map_err(KvmError::NoBranchCounter)?;
        Ok(Self { counter: Some(counter), ..vcpu })
    }

    /// As [`Self::new`], for trying what needs no counter.
    pub(crate) fn without_counter(ram: GuestRam) -> Result<Self, KvmError> {
        Ok(Self {
            engine: KvmEngine::untested(ram, KvmClock::Sync)?,
            counter: None,
            window_wanted: false,
            resuming: None,
            overflow: None,
            overflow_from: 0,
            overflow_spent: false,
            counted: 0,
            breakpoints: Vec::with_capacity(MAX_BREAKPOINTS),
            guest_has_breakpoints: false,
            refusal: None,
            passing_on: None,
            watchdog: None,
            catches_breakpoints: false,
            caught_by: CaughtBy::Hardware,
            watched_writes: Vec::new(),
        })
    }

    /// Has CPUID tell the guest, which has not run yet, of the time-stamp counter or not.
    pub(crate) fn show(&mut self, counter: TimeStampCounter) -> Result<(), KvmError> {
        let table = cpuid::table(counter)?;
        let set = self.engine.vcpu.fd.set_cpuid2(&table);
        set.map_err(|errno| KvmError::refused("KVM_SET_CPUID2", errno))
    }

    /// From now on, a guest that does not come back for so long is an error.
    pub(crate) fn watch(&mut self, limit: Duration) {
        self.watchdog = Some(Watchdog::start(self.engine.kicker(), limit));
    }

    /// Its counter.
    ///
    /// # Errors
    /// It was made without one.
    pub(crate) fn counter(&mut self) -> Result<&mut BranchCounter, KvmError> {
        self.counter.as_mut().ok_or_else(|| KvmError::Unusable {
            path: "a vCPU made without a counter".into(),
            reason: "it counts nothing".into(),
        })
    }

    /// [`KvmEngine::run_signalled`], watched.
    fn run_guest(&mut self) -> Result<RawExit, KvmError> {
        let Some(mut watchdog) = self.watchdog.take() else {
            return self.engine.run_signalled();
        };
        watchdog.begin();
        let exit = self.engine.run_signalled();
        let expired = watchdog.expired();
        watchdog.end();
        self.watchdog = Some(watchdog);
        if expired {
            let reason = "the guest that tries it does not come back";
            return Err(KvmError::Unusable {
                path: "this host's KVM".into(),
                reason: reason.into(),
            });
        }
        exit
    }

    /// Whether an interrupt that was queued, or INT3 that is passed on, is still not delivered.
    fn delivery_pending(&mut self) -> Result<bool, KvmError> {
        if let Some(before) = self.passing_on {
            // KVM takes #BP among a vCPU's events and never shows it there.
            let regs = self.engine.registers()?;
            return Ok((regs.rip, regs.rsp) == before);
        }
        let injected = self.engine.injected;
        Ok(injected && state::read_events(&self.engine.vcpu.fd)?.interrupt.injected != 0)
    }

    fn set_debug_registers(&mut self) -> Result<(), KvmError> {
        let hardware = if self.breakpoints.is_empty() { 0 } else { KVM_GUESTDBG_USE_HW_BP };
        let software = if self.catches_breakpoints { KVM_GUESTDBG_USE_SW_BP } else { 0 };
        let registers = breakpoint_registers(&self.breakpoints);
        self.engine.vcpu.set_debug(hardware | software, registers)
    }

    fn look_for_guest_breakpoints(&mut self) -> Result<(), KvmError> {
        let debug = self.engine.vcpu.fd.get_debug_regs();
        let debug = debug.map_err(|errno| KvmError::refused("KVM_GET_DEBUGREGS", errno))?;
        self.guest_has_breakpoints = OwnDebugging::has_breakpoints(debug.dr7);
        Ok(())
    }

    fn refuse(&self, how: OwnDebugging) -> Result<VcpuExit, EngineError> {
        Ok(VcpuExit::Unsupported(how.refusal(self.engine.registers()?.rip)))
    }

    /// What #DB that came back is: a breakpoint that was set, or the guest's own affair.
    fn debug_exit(&mut self, dr6: u64) -> Result<VcpuExit, EngineError> {
        let hit = match hit_of(dr6) {
            Some(hit) => hit,
            None => {
                let state = state::read(&self.engine.vcpu.fd)?;
                self.breakpoints.contains(&linear_of(&state, state.rip))
            }
        };
        if hit { Ok(VcpuExit::Breakpoint) } else { self.refuse(OwnDebugging::Exception) }
    }

    /// Sets RFLAGS.RF.
    fn set_resume_flag(&mut self) -> Result<(), KvmError> {
        let regs = self.engine.registers()?;
        if regs.rflags & RFLAGS_RF != 0 {
            // Where it is not ours already, it is the guest's, and stays.
            return Ok(());
        }
        self.resuming = Some(regs.rip);
        self.set_registers(kvm_regs { rflags: regs.rflags | RFLAGS_RF, ..regs })
    }

    /// Clears RFLAGS.RF if it is ours still.
    fn clear_resume_flag(&mut self) -> Result<(), KvmError> {
        if self.resuming.is_none() {
            return Ok(());
        }
        let regs = self.engine.registers()?;
        let ours = self.is_ours(regs.rip)?;
        self.resuming = None;
        match ours && regs.rflags & RFLAGS_RF != 0 {
            true => self.set_registers(kvm_regs { rflags: regs.rflags & !RFLAGS_RF, ..regs }),
            false => Ok(()),
        }
    }

    /// Clears RFLAGS.RF if it was set for the HLT that has retired, which cannot load it: AMD's CPUs may save it as
    /// it was, and KVM skips the instruction by moving RIP alone.
    fn clear_resume_flag_behind_halt(&mut self) -> Result<(), KvmError> {
        if self.resuming.take().is_none() {
            return Ok(());
        }
        let regs = self.engine.registers()?;
        self.set_registers(kvm_regs { rflags: regs.rflags & !RFLAGS_RF, ..regs })
    }

    /// Whether RFLAGS.RF of a guest that stands at `rip` was set for it: once the instruction there has
    /// retired, IRET may have loaded it; and KVM sets it itself for a fault that it is about to deliver. The #UD that
    /// it queues with a refusal is none.
    fn is_ours(&self, rip: u64) -> Result<bool, KvmError> {
        let faults = || {
            let injected = state::read_events(&self.engine.vcpu.fd)?.exception.injected;
            Ok::<_, KvmError>(injected != 0 && !self.engine.refused)
        };
        Ok(self.resuming == Some(rip) && !faults()?)
    }

    fn set_registers(&self, regs: kvm_regs) -> Result<(), KvmError> {
        let set = self.engine.vcpu.fd.set_regs(&regs);
        set.map_err(|errno| KvmError::refused("KVM_SET_REGS", errno))
    }

    /// Asks for the overflow again if the guest has run since it was asked for. The kernel may have stopped a
    /// counter that overflowed too often, which the times that it was on the hardware do not show, and a new
    /// period starts it: so each entry behind an overflow has one before it. Its signal need not have ended an
    /// entry: it may have come with another exit.
    fn ask_again(&mut self) -> Result<(), KvmError> {
        let Some(counter) = &mut self.counter else { return Ok(()) };
        if !std::mem::take(&mut self.overflow_spent) {
            return Ok(());
        }
        self.counted = counter.read()?;
        let retired = self.counted.saturating_sub(self.overflow_from);
        let left = self.overflow.map(|branches| branches.saturating_sub(retired).max(1));
        counter.interrupt_after(left)
    }

    fn run_once(&mut self) -> Result<VcpuExit, EngineError> {
        self.engine.refused = false;
        if let Some(reason) = &self.refusal {
            return Ok(VcpuExit::Unsupported(reason.clone()));
        }
        if let Some(pending) = self.engine.pending {
            return Ok(access_of(self.engine.present(pending)));
        }
        if let Some(exit) = self.watched_write() {
            return Ok(exit);
        }
        let exit = match self.engine.queued.take() {
            Some(exit) => exit,
            None if self.guest_has_breakpoints && !self.breakpoints.is_empty() => {
                return self.refuse(OwnDebugging::Breakpoints);
            }
            None => {
                self.engine.vcpu.request_interrupt_window(self.window_wanted);
                self.ask_again()?;
                let exit = self.run_guest()?;
                self.overflow_spent = self.overflow.is_some();
                if !self.breakpoints.is_empty() {
                    // Those that it has set since do nothing: what they should have raised is lost.
                    self.look_for_guest_breakpoints()?;
                    if self.guest_has_breakpoints {
                        return self.refuse(OwnDebugging::Breakpoints);
                    }
                }
                self.engine.refused = exit.is_refusal();
                exit
            }
        };
        let exit = self.carry_out_writes(exit)?;
        match exit {
            Some(RawExit::Interrupted) => {}
            Some(RawExit::Halt) => self.clear_resume_flag_behind_halt()?,
            _ => self.clear_resume_flag()?,
        }
        if let Some(written) = self.watched_write() {
            self.engine.queued = exit;
            return Ok(written);
        }
        let exit = exit.unwrap_or(RawExit::Interrupted);
        if self.caught_breakpoint_instruction(exit)? {
            return Ok(VcpuExit::BreakpointInstruction);
        }
        Ok(match exit {
            RawExit::Interrupted => VcpuExit::Interrupted { kicked: self.engine.kick.take() },
            RawExit::InterruptWindow => VcpuExit::InterruptWindow,
            RawExit::Debug { dr6, .. } => self.debug_exit(dr6)?,
            RawExit::Halt => {
                self.engine.halted = true;
                VcpuExit::Halt
            }
            exit => match PendingExit::new(exit) {
                Some(pending) => access_of(self.engine.present(pending)),
                None => match self.engine.unusual_exit(exit)? {
                    Exit::TripleFault => VcpuExit::TripleFault,
                    Exit::Unsupported(reason) => VcpuExit::Unsupported(reason),
                    other => unreachable!("{other:?} is no unusual exit"),
                },
            },
        })
    }
}

/// Whether #DB with this DR6 is for a breakpoint, and nothing else. Where KVM gives no DR6 (AMD before Linux
/// 5.7), the place has to tell; one without a cause is INT1's.
fn hit_of(dr6: u64) -> Option<bool> {
    (dr6 != 0).then_some(dr6 & DR6_HITS != 0 && dr6 & DR6_SINGLE_STEP == 0)
}

fn access_of(exit: Exit) -> VcpuExit {
    match exit {
        Exit::Access(access) => VcpuExit::Access(access),
        other => unreachable!("{other:?} is no access"),
    }
}

impl Vcpu for PmuVcpu {
    fn enter(&mut self) -> Result<VcpuExit, EngineError> {
        let mut kicked_before = false;
        loop {
            let exit = self.run_once()?;
            if let VcpuExit::Interrupted { kicked } = exit {
                kicked_before |= kicked;
                if self.delivery_pending()? {
                    if kicked_before {
                        // It comes back soon after the delivery, to tell.
                        (self.overflow, self.overflow_from) = (Some(1), self.counted);
                        self.overflow_spent = true;
                    }
                    continue;
                }
                (self.engine.injected, self.passing_on) = (false, None);
                return Ok(VcpuExit::Interrupted { kicked: kicked_before });
            }
            (self.engine.injected, self.passing_on) = (false, None);
            if kicked_before {
                // Not lost: the next entry tells.
                self.engine.kick.kick();
            }
            return Ok(exit);
        }
    }

    fn finish_access(&mut self, value: u128) -> Result<bool, EngineError> {
        self.engine.finish_access(value)?;
        if self.engine.pending.is_some() {
            return Ok(false);
        }
        self.engine.settle()?;
        if let Some(exit) = self.engine.queued.take() {
            // An input to watched RAM: told with the next entry.
            self.engine.queued = self.carry_out_writes(exit)?;
        }
        if self.engine.queued.is_some() {
            return Ok(false);
        }
        let amid = self.engine.stands_amid_instruction()?;
        if amid {
            let regs = self.engine.registers()?;
            // KVM and CPUs do not agree on when #DB comes, nor would the clock see that the instruction retires.
            let steps = regs.rflags & RFLAGS_TF != 0;
            self.refusal = steps.then(|| OwnDebugging::Repetition.refusal(regs.rip));
        }
        Ok(!amid)
    }

    fn conditional_branches(&mut self) -> Result<u64, EngineError> {
        self.counted = self.counter()?.read()?;
        Ok(self.counted)
    }

    fn set_overflow(&mut self, branches: Option<u64>) -> Result<(), EngineError> {
        self.counter()?.interrupt_after(branches)?;
        (self.overflow, self.overflow_spent) = (branches, false);
        self.overflow_from = self.counted;
        Ok(())
    }

    fn set_breakpoints(&mut self, addresses: &[u64]) -> Result<(), EngineError> {
        assert!(addresses.len() <= MAX_BREAKPOINTS, "a CPU has four breakpoints");
        self.clear_resume_flag()?;
        if addresses == self.breakpoints {
            return Ok(());
        }
        if self.breakpoints.is_empty() {
            self.look_for_guest_breakpoints()?;
        }
        self.breakpoints.clear();
        self.breakpoints.extend_from_slice(addresses);
        Ok(self.set_debug_registers()?)
    }

    fn step_off(&mut self) -> Result<(), EngineError> {
        if self.engine.injected || self.passing_on.is_some() {
            // What is delivered first would save RFLAGS.RF, and no breakpoint hits before it.
            return Ok(());
        }
        Ok(self.set_resume_flag()?)
    }

    fn state(&mut self) -> Result<CpuState, EngineError> {
        let state = self.engine.cpu_state()?;
        let ours = self.resuming.is_some() && self.is_ours(state.rip)?;
        let hidden = if ours { RFLAGS_RF } else { 0 };
        Ok(CpuState { rflags: state.rflags & !hidden, ..state })
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        (self.resuming, self.passing_on, self.refusal) = (None, None, None);
        self.guest_has_breakpoints = OwnDebugging::has_breakpoints(state.dr7);
        self.engine.set_cpu_state(state)
    }

    fn interruptible(&mut self) -> Result<bool, EngineError> {
        self.engine.interruptible()
    }

    fn set_window_request(&mut self, wanted: bool) {
        self.window_wanted = wanted;
    }

    fn inject(&mut self, vector: u8) -> Result<(), EngineError> {
        self.engine.inject(vector)
    }

    fn catch_breakpoint_instructions(&mut self, catch: bool) -> Result<(), EngineError> {
        self.catches_breakpoints = catch;
        Ok(self.set_debug_registers()?)
    }

    fn pass_breakpoint_instruction(&mut self) -> Result<(), EngineError> {
        Ok(self.pass_on_breakpoint_instruction()?)
    }

    fn watch_writes(&mut self, physical: Range<u64>, watch: bool) -> Result<(), EngineError> {
        Ok(self.engine.vcpu.memory.watch(physical, watch)?)
    }

    fn retire_instruction(&mut self, after: &CpuState) -> Result<(), EngineError> {
        self.resuming = None;
        Ok(self.engine.retire_instruction(after)?)
    }

    fn write_ram(&mut self, address: u64, bytes: &[u8]) {
        write_ram(&self.engine.ram, address, bytes);
    }

    fn ram(&self) -> &GuestRam {
        &self.engine.ram
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.engine.kicker()
    }
}

impl RefusingVcpu for PmuVcpu {
    fn has_refused(&mut self) -> Result<bool, EngineError> {
        self.engine.has_refused()
    }

    fn go_on(&mut self, before: &CpuState, after: &CpuState) -> Result<(), EngineError> {
        assert_eq!(self.resuming, None, "the exit ended that");
        self.guest_has_breakpoints = OwnDebugging::has_breakpoints(after.dr7);
        self.engine.go_on(before, after, true)
    }
}

#[cfg(test)]
#[path = "branch_vcpu_tests.rs"]
mod tests;
