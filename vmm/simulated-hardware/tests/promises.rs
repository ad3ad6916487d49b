//! A vCPU that breaks one promise which the trap of RDTSC rests on is told from one that keeps all.

use std::ops::Range;

use reprise_branch_clock::ask_vcpu_within;
use reprise_branch_clock::trap_probe::what_is_wrong;
use reprise_branch_clock::vcpu::{Vcpu, VcpuExit};
use reprise_machine::engine::EngineError;
use reprise_machine::ram::GuestRam;
use reprise_simulated_hardware::{Disturbance, SimulatedVcpu};
use reprise_trace::cpu_state::{CpuState, RSP};
use reprise_trace::register_bits::{CR4_TSD, RFLAGS_RF};

/// What it does not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Broken {
    Nothing,
    /// INT3 reaches the guest at once.
    Catches,
    /// An instruction that was done for the guest executes again.
    Retires,
    /// INT3 that is passed on is lost.
    PassesOn,
    /// Its frame leads to the INT3 itself.
    PassesOnBehind,
    /// Its frame has RFLAGS.RF.
    PassesOnFlags,
    /// Writes do not come back.
    Watches,
    /// A write comes back before it is done.
    WritesFirst,
    /// A write comes back twice.
    WritesOnce,
    /// A page that is not watched any more is.
    Unwatches,
    /// CR4.TSD does nothing.
    RefusesToUser,
    /// The fault that CR4.TSD leads to has another error code.
    FaultsAsGeneralProtection,
}

struct Promising {
    vcpu: SimulatedVcpu,
    broken: Broken,
    /// What the last frame is to be made.
    passing: bool,
    /// What comes back once more.
    again: Option<VcpuExit>,
}

impl Promising {
    /// Changes a word of the frame that the guest has just got.
    fn spoil_frame(&mut self) -> Result<(), EngineError> {
        let top = self.vcpu.state()?.gpr[RSP];
        let mut words = [0; 24];
        self.vcpu.ram().read(top, &mut words);
        let word = |index: usize| {
            u64::from_le_bytes(words[8 * index..8 * index + 8].try_into().expect("eight bytes"))
        };
        match self.broken {
            Broken::PassesOnBehind => self.vcpu.write_ram(top, &(word(0) - 1).to_le_bytes()),
            Broken::PassesOnFlags => {
                self.vcpu.write_ram(top + 16, &(word(2) | RFLAGS_RF).to_le_bytes());
            }
            _ => {}
        }
        Ok(())
    }
}

impl Vcpu for Promising {
    ask_vcpu_within! {
        vcpu: finish_access, conditional_branches, set_overflow, set_breakpoints, step_off, state,
        interruptible, set_window_request, inject, write_ram, ram, kicker
    }

    fn enter(&mut self) -> Result<VcpuExit, EngineError> {
        if let Some(exit) = self.again.take() {
            return Ok(exit);
        }
        let exit = self.vcpu.enter()?;
        if std::mem::take(&mut self.passing) {
            self.spoil_frame()?;
        }
        match (&exit, self.broken) {
            (VcpuExit::WatchedWrite(ranges), Broken::WritesFirst) => {
                for range in ranges {
                    self.vcpu.write_ram(range.start, &[0]);
                }
            }
            (VcpuExit::WatchedWrite(_), Broken::WritesOnce) => self.again = Some(exit.clone()),
            (VcpuExit::WatchedWrite(_), Broken::Watches) => return self.enter(),
            // Where no fault led here, the word there is nobody's.
            (VcpuExit::BreakpointInstruction, Broken::FaultsAsGeneralProtection) => {
                let top = self.vcpu.state()?.gpr[RSP];
                self.vcpu.write_ram(top, &8_u64.to_le_bytes());
            }
            _ => {}
        }
        Ok(exit)
    }

    fn catch_breakpoint_instructions(&mut self, catch: bool) -> Result<(), EngineError> {
        self.vcpu.catch_breakpoint_instructions(catch && self.broken != Broken::Catches)
    }

    fn pass_breakpoint_instruction(&mut self) -> Result<(), EngineError> {
        if self.broken == Broken::PassesOn {
            let state = self.vcpu.state()?;
            return self.vcpu.retire_instruction(&CpuState { rip: state.rip + 1, ..state });
        }
        self.passing = true;
        self.vcpu.pass_breakpoint_instruction()
    }

    fn watch_writes(&mut self, physical: Range<u64>, watch: bool) -> Result<(), EngineError> {
        match self.broken {
            Broken::Unwatches if !watch => {
                // The page with the code that comes next, so that something shows.
                self.vcpu.watch_writes(0..0x10_000, true)?;
                let state = self.vcpu.state()?;
                // mov [rax], rcx once more
                self.vcpu.write_ram(state.rip, &[0x48, 0x89, 0x08]);
                Ok(())
            }
            _ => self.vcpu.watch_writes(physical, watch),
        }
    }

    fn retire_instruction(&mut self, after: &CpuState) -> Result<(), EngineError> {
        let state = match self.broken {
            Broken::Retires => CpuState { gpr: self.vcpu.state()?.gpr, ..after.clone() },
            _ => after.clone(),
        };
        self.vcpu.retire_instruction(&state)
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        let hidden = if self.broken == Broken::RefusesToUser { CR4_TSD } else { 0 };
        self.vcpu.set_state(&CpuState { cr4: state.cr4 & !hidden, ..state.clone() })
    }
}

#[test]
fn each_broken_promise_is_seen() {
    use Broken::*;
    for (broken, expected) in [
        (Nothing, None),
        (Catches, Some("INT3 in kernel code does not come back")),
        (Retires, Some("an instruction that was done for the guest led to")),
        (PassesOn, Some("passed on to the guest led to")),
        (PassesOnBehind, Some("INT3 at 0x8000 that is passed on to the guest returns to 0x8000")),
        (PassesOnFlags, Some("RFLAGS 0x10002")),
        (Watches, Some("a write to RAM that is watched led to")),
        (WritesFirst, Some("a write to RAM that is watched led to")),
        (WritesOnce, Some("behind a write to RAM that is watched the guest came to")),
        (Unwatches, Some("behind a write to RAM that is watched")),
        (RefusesToUser, Some("RDTSC of user code under CR4.TSD has a frame")),
        (
            FaultsAsGeneralProtection,
            Some("RDTSC of user code under CR4.TSD has a frame that is not one of #GP"),
        ),
    ] {
        let ram = GuestRam::new(4).expect("4 MiB");
        let vcpu = SimulatedVcpu::new(ram, Disturbance::none()).expect("the host has memory");
        let mut vcpu = Promising { vcpu, broken, passing: false, again: None };
        let found = what_is_wrong(&mut vcpu).expect("the simulation does not fail");
        match (found, expected) {
            (None, None) => {}
            (Some(reason), Some(expected)) => {
                let told = reason.contains(expected) && !reason.contains('\n');
                assert!(told, "{broken:?}: {reason}");
            }
            (found, _) => panic!("{broken:?}: {found:?}"),
        }
    }
}
