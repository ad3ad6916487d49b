//! [`PmuVcpu`]: KVM's vCPU with a counter of conditional branches, as the branch clock wants one.
//!
//! Signals end KVM_RUN: a kick, and the counter's overflow. One that comes between two KVM_RUNs ends
//! none, which loses nothing: the clock reads the counter before each run and asks anew.

use std::sync::Arc;

use kvm_bindings::KVM_GUESTDBG_USE_HW_BP;
use reprise_branch_clock::engine::{BranchClock, Parameters};
use reprise_branch_clock::probe::what_is_wrong;
use reprise_branch_clock::register_bits::RFLAGS_RF;
use reprise_branch_clock::vcpu::{MAX_BREAKPOINTS, Vcpu, VcpuExit};
use reprise_machine::engine::{Engine, EngineError, Exit, Kick};
use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::CpuState;

use crate::access::PendingExit;
use crate::branch_counter::BranchCounter;
use crate::error::KvmError;
use crate::report::Finding;
use crate::vcpu::RawExit;
use crate::{KvmClock, KvmEngine, state};

/// The smallest machine will do for the probe, in MiB.
const PROBE_RAM_MIB: u64 = reprise_machine::ram::MIN_RAM_MIB;
/// DR7: the bit that always reads one.
const DR7_FIXED: u64 = 0x400;
/// From this skid on, an overflow may come at any time after it is due.
const UNBOUNDED_SKID: u64 = 10_000;
/// The counter refuses periods below this many branches, so that an overflow asked for earlier is late by
/// as many.
const SHORTEST_PERIOD: u64 = 32;

/// KVM's vCPU with a counter.
pub struct PmuVcpu {
    engine: KvmEngine,
    counter: BranchCounter,
    window_wanted: bool,
    /// RFLAGS.RF is set so that the instruction at RIP executes.
    resuming: bool,
    breakpoints_set: bool,
}

impl PmuVcpu {
    fn new(ram: GuestRam) -> Result<Self, KvmError> {
        let engine = KvmEngine::untested(ram, KvmClock::Sync)?;
        let counter = BranchCounter::open()?;
        let (window_wanted, resuming, breakpoints_set) = (false, false, false);
        Ok(Self { engine, counter, window_wanted, resuming, breakpoints_set })
    }

    /// Whether an interrupt that was queued is still not delivered.
    fn delivery_pending(&mut self) -> Result<bool, KvmError> {
        Ok(self.engine.injected
            && state::read_events(&self.engine.vcpu.fd)?.interrupt.injected != 0)
    }

    /// Sets or clears RFLAGS.RF.
    fn set_resume_flag(&mut self, resume: bool) -> Result<(), KvmError> {
        let fd = &self.engine.vcpu.fd;
        let mut regs = fd.get_regs().map_err(|errno| KvmError::refused("KVM_GET_REGS", errno))?;
        let before = regs.rflags;
        regs.rflags = if resume { before | RFLAGS_RF } else { before & !RFLAGS_RF };
        if regs.rflags != before {
            fd.set_regs(&regs).map_err(|errno| KvmError::refused("KVM_SET_REGS", errno))?;
        }
        self.resuming = resume;
        Ok(())
    }

    fn run_once(&mut self) -> Result<VcpuExit, EngineError> {
        if let Some(pending) = self.engine.pending {
            return Ok(access_of(self.engine.present(pending)));
        }
        let exit = match self.engine.queued.take() {
            Some(exit) => exit,
            None => {
                self.engine.vcpu.request_interrupt_window(self.window_wanted);
                self.engine.run_signalled()?
            }
        };
        if self.resuming && exit != RawExit::Interrupted {
            self.set_resume_flag(false)?;
        }
        Ok(match exit {
            RawExit::Interrupted => VcpuExit::Interrupted { kicked: self.engine.kick.take() },
            RawExit::InterruptWindow => VcpuExit::InterruptWindow,
            RawExit::Debug { .. } => VcpuExit::Breakpoint,
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
                    continue;
                }
                self.engine.injected = false;
                return Ok(VcpuExit::Interrupted { kicked: kicked_before });
            }
            self.engine.injected = false;
            if kicked_before {
                // Not lost: the next entry tells.
                self.engine.kick.kick();
            }
            return Ok(exit);
        }
    }

    fn finish_access(&mut self, value: u128) -> Result<bool, EngineError> {
        let before = self.state_rip()?;
        self.engine.finish_access(value)?;
        if self.engine.pending.is_some() {
            return Ok(false);
        }
        self.engine.settle()?;
        if self.engine.queued.is_some() {
            return Ok(false);
        }
        // A string instruction that KVM has begun again stands where it stood.
        let repeats = self.engine.stands_at_repeating_instruction()?;
        Ok(!(repeats && self.state_rip()? == before))
    }

    fn conditional_branches(&mut self) -> Result<u64, EngineError> {
        Ok(self.counter.read()?)
    }

    fn set_overflow(&mut self, branches: Option<u64>) -> Result<(), EngineError> {
        Ok(self.counter.interrupt_after(branches)?)
    }

    fn set_breakpoints(&mut self, addresses: &[u64]) -> Result<(), EngineError> {
        assert!(addresses.len() <= MAX_BREAKPOINTS, "a CPU has four breakpoints");
        if self.resuming {
            self.set_resume_flag(false)?;
        }
        if addresses.is_empty() && !self.breakpoints_set {
            return Ok(());
        }
        let mut debugreg = [0; 8];
        let mut enabled = 0;
        for (number, address) in addresses.iter().enumerate() {
            debugreg[number] = *address;
            // L and G of this breakpoint; type and length zero stand for execution.
            enabled |= 3 << (2 * number);
        }
        debugreg[7] = DR7_FIXED | enabled;
        self.breakpoints_set = !addresses.is_empty();
        let control = if self.breakpoints_set { KVM_GUESTDBG_USE_HW_BP } else { 0 };
        Ok(self.engine.vcpu.set_debug(control, debugreg)?)
    }

    fn step_off(&mut self) -> Result<(), EngineError> {
        Ok(self.set_resume_flag(true)?)
    }

    fn state(&mut self) -> Result<CpuState, EngineError> {
        let state = self.engine.cpu_state()?;
        let hidden = if self.resuming { RFLAGS_RF } else { 0 };
        Ok(CpuState { rflags: state.rflags & !hidden, ..state })
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.resuming = false;
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

    fn ram(&self) -> &GuestRam {
        &self.engine.ram
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.engine.kicker()
    }
}

impl PmuVcpu {
    fn state_rip(&mut self) -> Result<u64, KvmError> {
        let regs = self.engine.vcpu.fd.get_regs();
        Ok(regs.map_err(|errno| KvmError::refused("KVM_GET_REGS", errno))?.rip)
    }
}

/// The engine `kvm` with the clock `pmu`.
pub type PmuEngine = BranchClock<PmuVcpu>;

/// An engine whose memory is `ram`, if this host's counter passes the probe.
///
/// # Errors
/// Says in one line what the host refuses or lacks.
pub fn pmu_engine(ram: GuestRam) -> Result<PmuEngine, EngineError> {
    let finding = pmu_clock();
    if !finding.available {
        return Err(KvmError::NoBranchCounter(finding.reason).into());
    }
    let vcpu = PmuVcpu::new(ram)?;
    let skid = vcpu.counter.event().skid + SHORTEST_PERIOD;
    BranchClock::new(vcpu, Parameters::with_skid(skid))
}

/// Whether this host has the clock `pmu`, and why (not). Runs a tiny guest for some milliseconds.
pub fn pmu_clock() -> Finding {
    ask().unwrap_or_else(|error| Finding::no(error.to_string()))
}

fn ask() -> Result<Finding, EngineError> {
    let ram =
        GuestRam::new(PROBE_RAM_MIB).map_err(|error| EngineError { what: error.to_string() })?;
    let mut vcpu = match PmuVcpu::new(ram) {
        Ok(vcpu) => vcpu,
        Err(KvmError::NoBranchCounter(reason)) => return Ok(Finding::no(reason)),
        Err(error) => return Err(error.into()),
    };
    let event = vcpu.counter.event();
    let skid = event.skid + SHORTEST_PERIOD;
    Ok(match what_is_wrong(&mut vcpu, skid, event.skid < UNBOUNDED_SKID)? {
        Some(reason) => Finding::no(reason),
        None => Finding::yes(format!(
            "event {:#x} counts conditional branches exactly on this {}",
            event.event, event.microarchitecture
        )),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_works_or_says_in_one_line_why_not() {
        let finding = pmu_clock();
        assert!(!finding.reason.contains('\n'), "{finding}");
        if !finding.available {
            eprintln!("skipped: no PMU: {}", finding.reason);
            let ram = GuestRam::new(PROBE_RAM_MIB).expect("the host has 4 MiB");
            let Err(error) = pmu_engine(ram) else { panic!("an engine without its counter") };
            assert!(error.to_string().contains("--engine soft"), "{error}");
        }
    }
}
