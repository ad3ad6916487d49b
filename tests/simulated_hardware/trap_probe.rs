//! What the probe of the trap of RDTSC makes of vCPUs that do not do what the trap asks for.

use std::ops::Range;
use std::sync::Arc;

use reprise_branch_clock::trap_probe::what_is_wrong;
use reprise_branch_clock::vcpu::{Vcpu, VcpuExit};
use reprise_machine::engine::{EngineError, Kick};
use reprise_machine::ram::GuestRam;
use reprise_simulated_hardware::{Disturbance, SimulatedVcpu};
use reprise_trace::cpu_state::{CpuState, RSP};
use reprise_trace::register_bits::CR4_TSD;

/// In what a vCPU is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrong {
    Nothing,
    /// INT3 reaches the guest.
    CatchesNothing,
    /// An instruction that retires leaves its result nowhere.
    RetiresWithoutResult,
    /// INT3's frame leads to itself.
    ReturnsToItself,
    /// A watched write is told and not done.
    WritesNothing,
    /// It is told twice.
    TellsTwice,
    /// User code reads the counter whatever CR4.TSD says.
    IgnoresTsd,
    /// The fault has another error code.
    OtherErrorCode,
}

/// Each, and what the probe says of it.
const COMPLAINTS: [(Wrong, &str); 7] = [
    (Wrong::CatchesNothing, "INT3 in kernel code does not come back"),
    (Wrong::RetiresWithoutResult, "an instruction that was done for the guest led to"),
    (Wrong::ReturnsToItself, "INT3 at 0x8000 that is passed on to the guest returns to 0x8000"),
    (Wrong::WritesNothing, "a write to RAM that is watched led to"),
    (Wrong::TellsTwice, "behind a write to RAM that is watched the guest came to"),
    (Wrong::IgnoresTsd, "RDTSC of user code under CR4.TSD does not come back"),
    (Wrong::OtherErrorCode, "RDTSC of user code under CR4.TSD has a frame that is not one of #GP"),
];

/// A vCPU that is wrong.
struct WrongVcpu {
    vcpu: SimulatedVcpu,
    wrong: Wrong,
    /// INT3 was just passed on.
    passed: bool,
    told: Option<VcpuExit>,
}

impl WrongVcpu {
    fn put(&mut self, address: u64, word: u64) {
        self.vcpu.write_ram(address, &word.to_le_bytes());
    }
}

fn complaint(wrong: Wrong) -> Option<String> {
    let ram = GuestRam::new(4).expect("the host has 4 MiB");
    let vcpu = SimulatedVcpu::new(ram, Disturbance::intel(1)).expect("the host has memory");
    let mut vcpu = WrongVcpu { vcpu, wrong, passed: false, told: None };
    what_is_wrong(&mut vcpu).expect("the simulation does not fail")
}

#[test]
fn each_wrong_is_told_in_a_line() {
    assert_eq!(complaint(Wrong::Nothing), None);
    for (wrong, expected) in COMPLAINTS {
        let told = complaint(wrong).unwrap_or_else(|| panic!("{wrong:?} passes"));
        assert!(told.starts_with(expected) && !told.contains('\n'), "{wrong:?}: {told}");
    }
}

impl Vcpu for WrongVcpu {
    fn enter(&mut self) -> Result<VcpuExit, EngineError> {
        if let Some(told) = self.told.take() {
            return Ok(told);
        }
        let exit = self.vcpu.enter()?;
        let state = self.vcpu.state()?;
        let passed = self.passed && exit == VcpuExit::Halt;
        match (&exit, self.wrong) {
            (VcpuExit::Halt, Wrong::ReturnsToItself) if passed => {
                let mut rip = [0; 8];
                self.vcpu.read_ram(state.gpr[RSP], &mut rip);
                self.put(state.gpr[RSP], u64::from_le_bytes(rip) - 1);
            }
            (VcpuExit::WatchedWrite(ranges), Wrong::WritesNothing) => {
                for range in ranges.clone() {
                    self.put(range.start, 0);
                }
            }
            (VcpuExit::WatchedWrite(_), Wrong::TellsTwice) => self.told = Some(exit.clone()),
            // Where no fault led here, the word there is nobody's.
            (VcpuExit::BreakpointInstruction, Wrong::OtherErrorCode) => {
                self.put(state.gpr[RSP], 8);
            }
            _ => {}
        }
        self.passed &= !passed;
        Ok(exit)
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        let ignored = if self.wrong == Wrong::IgnoresTsd { CR4_TSD } else { 0 };
        self.vcpu.set_state(&CpuState { cr4: state.cr4 & !ignored, ..state.clone() })
    }

    fn catch_breakpoint_instructions(&mut self, catch: bool) -> Result<(), EngineError> {
        self.vcpu.catch_breakpoint_instructions(catch && self.wrong != Wrong::CatchesNothing)
    }

    fn pass_breakpoint_instruction(&mut self) -> Result<(), EngineError> {
        self.passed = true;
        self.vcpu.pass_breakpoint_instruction()
    }

    fn retire_instruction(&mut self, after: &CpuState) -> Result<(), EngineError> {
        let mut after = after.clone();
        if self.wrong == Wrong::RetiresWithoutResult {
            after.gpr = self.vcpu.state()?.gpr;
        }
        self.vcpu.retire_instruction(&after)
    }

    fn watch_writes(&mut self, physical: Range<u64>, watch: bool) -> Result<(), EngineError> {
        self.vcpu.watch_writes(physical, watch)
    }

    fn finish_access(&mut self, value: u128) -> Result<bool, EngineError> {
        self.vcpu.finish_access(value)
    }

    fn conditional_branches(&mut self) -> Result<u64, EngineError> {
        self.vcpu.conditional_branches()
    }

    fn set_overflow(&mut self, branches: Option<u64>) -> Result<(), EngineError> {
        self.vcpu.set_overflow(branches)
    }

    fn set_breakpoints(&mut self, addresses: &[u64]) -> Result<(), EngineError> {
        self.vcpu.set_breakpoints(addresses)
    }

    fn step_off(&mut self) -> Result<(), EngineError> {
        self.vcpu.step_off()
    }

    fn state(&mut self) -> Result<CpuState, EngineError> {
        self.vcpu.state()
    }

    fn interruptible(&mut self) -> Result<bool, EngineError> {
        self.vcpu.interruptible()
    }

    fn set_window_request(&mut self, wanted: bool) {
        self.vcpu.set_window_request(wanted);
    }

    fn inject(&mut self, vector: u8) -> Result<(), EngineError> {
        self.vcpu.inject(vector)
    }

    fn write_ram(&mut self, address: u64, bytes: &[u8]) {
        self.vcpu.write_ram(address, bytes);
    }

    fn ram(&self) -> &GuestRam {
        self.vcpu.ram()
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.vcpu.kicker()
    }
}
