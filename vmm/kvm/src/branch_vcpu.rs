//! [`PmuVcpu`]: KVM's vCPU with a counter of conditional branches, as the branch clock wants one.
//!
//! Signals end KVM_RUN: a kick, and the counter's overflow. One that comes between two KVM_RUNs ends
//! none, which loses nothing: the clock reads the counter before each run and asks anew.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use kvm_bindings::{KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP, kvm_regs};
use reprise_branch_clock::guest_code::linear_of;
use reprise_branch_clock::vcpu::{MAX_BREAKPOINTS, Vcpu, VcpuExit};
use reprise_devices::cpu_model::TimeStampCounter;
use reprise_machine::engine::{Engine, EngineError, Exit, Kick};
use reprise_machine::paging::write_ram;
use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::CpuState;
use reprise_trace::register_bits::RFLAGS_RF;

use crate::access::PendingExit;
use crate::branch_counter::BranchCounter;
use crate::breakpoint_instruction::CaughtBy;
use crate::error::KvmError;
use crate::perf_host::PerfHost;
use crate::vcpu::{RawExit, breakpoint_registers};
use crate::watchdog::Watchdog;
use crate::{KvmClock, KvmEngine, cpuid, state};

/// DR7: the guest has breakpoints.
const DR7_ENABLED: u64 = 0xff;
/// DR6: which breakpoints hit.
const DR6_HITS: u64 = 0xf;
/// DR6: a single step.
const DR6_SINGLE_STEP: u64 = 1 << 14;
const OWN_BREAKPOINTS: &str = "the guest has breakpoints of its own (DR7), in whose place are those of \
                               the clock pmu: use --engine soft";
const OWN_DEBUG_EXCEPTION: &str = "the guest raises #DB itself (TF or INT1) while the clock pmu has \
                                   breakpoints: use --engine soft";

/// KVM's vCPU with a counter.
pub struct PmuVcpu {
    pub(crate) engine: KvmEngine,
    /// None only where something else is tried.
    counter: Option<BranchCounter>,
    window_wanted: bool,
    /// RFLAGS.RF was set so that the instruction at this RIP executes: ours while the guest stands there.
    resuming: Option<u64>,
    /// What was asked of the counter last.
    overflow: Option<u64>,
    /// A signal has ended an entry since then: the overflow may be spent.
    overflow_spent: bool,
    /// Linear addresses of breakpoints.
    breakpoints: Vec<u64>,
    /// The guest's own are enabled, as far as is known.
    guest_has_breakpoints: bool,
    /// INT3 that came back is on its way to the guest after all.
    pub(crate) passing_on: bool,
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
            overflow_spent: false,
            breakpoints: Vec::with_capacity(MAX_BREAKPOINTS),
            guest_has_breakpoints: false,
            passing_on: false,
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
        if !self.engine.injected && !self.passing_on {
            return Ok(false);
        }
        let events = state::read_events(&self.engine.vcpu.fd)?;
        let interrupt = self.engine.injected && events.interrupt.injected != 0;
        Ok(interrupt || self.passing_on && events.exception.injected != 0)
    }

    fn set_debug_registers(&mut self) -> Result<(), KvmError> {
        let hardware = if self.breakpoints.is_empty() { 0 } else { KVM_GUESTDBG_USE_HW_BP };
        let software = if self.catches_breakpoints { KVM_GUESTDBG_USE_SW_BP } else { 0 };
        let registers = breakpoint_registers(&self.breakpoints);
        self.engine.vcpu.set_debug(hardware | software, registers)
    }

    /// What #DB that came back is: a breakpoint that was set, or the guest's own affair.
    fn debug_exit(&mut self, dr6: u64) -> Result<VcpuExit, EngineError> {
        let state = self.engine.cpu_state()?;
        let at_breakpoint = self.breakpoints.contains(&linear_of(&state, state.rip));
        Ok(match is_hit(dr6, at_breakpoint) {
            true => VcpuExit::Breakpoint,
            false => VcpuExit::Unsupported(OWN_DEBUG_EXCEPTION.to_owned()),
        })
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

    /// Whether RFLAGS.RF of a guest that stands at `rip` was set for it: once the instruction there has
    /// retired, IRET may have loaded it; and KVM sets it itself for a fault that it is about to deliver.
    fn is_ours(&self, rip: u64) -> Result<bool, KvmError> {
        Ok(self.resuming == Some(rip)
            && state::read_events(&self.engine.vcpu.fd)?.exception.injected == 0)
    }

    fn set_registers(&self, regs: kvm_regs) -> Result<(), KvmError> {
        let set = self.engine.vcpu.fd.set_regs(&regs);
        set.map_err(|errno| KvmError::refused("KVM_SET_REGS", errno))
    }

    /// Asks for the overflow again if a signal may have been it. The kernel may have stopped a counter
    /// that overflowed too often, which the times that it was on the hardware do not show, and a new
    /// period starts it: so each entry behind an overflow has one before it. Nothing retires while a
    /// delivery is pending, so the distance is what it was.
    fn ask_again(&mut self) -> Result<(), KvmError> {
        match &mut self.counter {
            Some(counter) if std::mem::take(&mut self.overflow_spent) => {
                counter.interrupt_after(self.overflow)
            }
            _ => Ok(()),
        }
    }

    fn run_once(&mut self) -> Result<VcpuExit, EngineError> {
        if let Some(pending) = self.engine.pending {
            return Ok(access_of(self.engine.present(pending)));
        }
        if let Some(exit) = self.watched_write() {
            return Ok(exit);
        }
        let exit = match self.engine.queued.take() {
            Some(exit) => exit,
            None if self.guest_has_breakpoints && !self.breakpoints.is_empty() => {
                return Ok(VcpuExit::Unsupported(OWN_BREAKPOINTS.to_owned()));
            }
            None => {
                self.engine.vcpu.request_interrupt_window(self.window_wanted);
                self.ask_again()?;
                self.run_guest()?
            }
        };
        let exit = self.carry_out_writes(exit)?;
        match exit {
            Some(RawExit::Interrupted) => self.overflow_spent = self.overflow.is_some(),
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
/// 5.7), the place tells.
fn is_hit(dr6: u64, at_breakpoint: bool) -> bool {
    match dr6 & (DR6_SINGLE_STEP | DR6_HITS) {
        0 => at_breakpoint,
        causes => causes & DR6_SINGLE_STEP == 0,
    }
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
                        (self.overflow, self.overflow_spent) = (Some(1), true);
                    }
                    continue;
                }
                (self.engine.injected, self.passing_on) = (false, false);
                return Ok(VcpuExit::Interrupted { kicked: kicked_before });
            }
            (self.engine.injected, self.passing_on) = (false, false);
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
        Ok(!self.engine.stands_amid_instruction()?)
    }

    fn conditional_branches(&mut self) -> Result<u64, EngineError> {
        Ok(self.counter()?.read()?)
    }

    fn set_overflow(&mut self, branches: Option<u64>) -> Result<(), EngineError> {
        self.counter()?.interrupt_after(branches)?;
        (self.overflow, self.overflow_spent) = (branches, false);
        Ok(())
    }

    fn set_breakpoints(&mut self, addresses: &[u64]) -> Result<(), EngineError> {
        assert!(addresses.len() <= MAX_BREAKPOINTS, "a CPU has four breakpoints");
        self.clear_resume_flag()?;
        if addresses == self.breakpoints {
            return Ok(());
        }
        if self.breakpoints.is_empty() {
            let debug = self.engine.vcpu.fd.get_debug_regs();
            let debug = debug.map_err(|errno| KvmError::refused("KVM_GET_DEBUGREGS", errno))?;
            self.guest_has_breakpoints = debug.dr7 & DR7_ENABLED != 0;
        }
        self.breakpoints.clear();
        self.breakpoints.extend_from_slice(addresses);
        Ok(self.set_debug_registers()?)
    }

    fn step_off(&mut self) -> Result<(), EngineError> {
        if self.engine.injected || self.passing_on {
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
        (self.resuming, self.passing_on) = (None, false);
        self.guest_has_breakpoints = state.dr7 & DR7_ENABLED != 0;
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

#[cfg(test)]
#[path = "branch_vcpu_tests.rs"]
mod tests;
