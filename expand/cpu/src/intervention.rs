//! What a hypervisor does to a guest behind its back: INT3 of its own in the guest's RAM, writes that it
//! wants to hear of, and instructions that it does in the CPU's place.

use std::ops::Range;

use reprise_machine::engine::Exit;
use reprise_trace::cpu_state::CpuState;

use crate::cpu::{BreakpointInstructions, TimeStamps};
use crate::engine::SoftEngine;
use crate::memory::physical::PAGE_BYTES;

impl SoftEngine {
    /// Chooses who answers RDTSC from now on.
    pub fn set_time_stamps(&mut self, time_stamps: TimeStamps) {
        self.cpu_mut().time_stamps = time_stamps;
    }

    /// Has INT3 come back as [`Exit::Kicked`] before it executes, [`SoftEngine::take_caught_breakpoint`]
    /// telling it from a kick; or no longer.
    pub fn catch_breakpoint_instructions(&mut self, catch: bool) {
        self.cpu_mut().breakpoints = match catch {
            true => BreakpointInstructions::Caught,
            false => BreakpointInstructions::Passed,
        };
    }

    /// Whether the last exit was for INT3.
    pub fn take_caught_breakpoint(&mut self) -> bool {
        let stopped = self.cpu().breakpoints == BreakpointInstructions::Stopped;
        if stopped {
            self.cpu_mut().breakpoints = BreakpointInstructions::Caught;
        }
        stopped
    }

    /// Lets the INT3 at RIP reach the guest.
    pub fn pass_breakpoint_instruction(&mut self) {
        self.cpu_mut().breakpoints = BreakpointInstructions::PassedOnce;
    }

    /// Has every write to a page that `physical` touches come back as [`Exit::Kicked`], the writing
    /// instruction retired, or no longer.
    pub fn watch_writes(&mut self, physical: Range<u64>, watch: bool) {
        let cpu = self.cpu_mut();
        let first = physical.start / PAGE_BYTES * PAGE_BYTES;
        for page in (first..physical.end).step_by(PAGE_BYTES as usize) {
            if cpu.memory.physical.host_page(page).is_some() {
                cpu.memory.physical.watch(page, watch);
            }
        }
        cpu.memory.forbid_all_writes();
    }

    /// Takes the writes that were watched: guest-physical addresses.
    pub fn take_watched_writes(&mut self) -> Vec<Range<u64>> {
        let writes = self.cpu_mut().memory.physical.take_watched_writes();
        writes.into_iter().map(|(address, bytes)| address..address + bytes).collect()
    }

    /// Writes guest RAM as if the CPU had, unwatched. The range lies within a page of RAM.
    pub fn write_ram(&mut self, address: u64, bytes: &[u8]) {
        let cpu = self.cpu_mut();
        let watched = cpu.memory.physical.take_watched_writes();
        cpu.memory.physical.write(address, bytes);
        cpu.memory.physical.set_watched_writes(watched);
        if cpu.memory.physical.code_was_written() {
            cpu.drop_overwritten_code();
        }
    }

    /// Has an instruction that somebody else did retire: general registers, RIP and RFLAGS become those
    /// of `after`, and the interrupt shadow ends.
    pub fn retire_instruction(&mut self, after: &CpuState) {
        let cpu = self.cpu_mut();
        cpu.registers.gpr[..16].copy_from_slice(&after.gpr);
        cpu.rip = after.rip;
        cpu.interrupt_shadow = false;
        cpu.set_rflags(after.rflags);
    }
}

/// Whether an exit may have come for what is asked for here.
pub(crate) fn keeps_shadow(exit: &Exit) -> bool {
    // An instruction that starts again, or one that was not let execute, stands in the shadow still.
    matches!(exit, Exit::Access(_) | Exit::Unsupported(_) | Exit::Kicked)
}
