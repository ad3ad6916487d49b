//! Where a trap begins: before the guest's first instruction, where its kernel is entered, or at a
//! checkpoint.

use reprise_machine::engine::EngineError;
use reprise_time_stamp_sites::{KernelText, Unpacking};
use reprise_trace::cpu_state::{CpuState, RAX};

use super::{TimeStampTrap, TrapCounts, WENT_ON};
use crate::boot_stub::StubTrap;
use crate::candidates::Candidate;
use crate::placed_kernel::{PlacedKernel, kernel_at, kernel_of};
use crate::planted::{Planted, trap, write_bytes};
use crate::retired::retired;
use crate::vcpu::{Vcpu, VcpuExit};
use reprise_trace::register_bits::CR4_TSD;

impl<V: Vcpu> TimeStampTrap<V> {
    /// The guest is about to run its first instruction, or the first one behind a checkpoint in its boot
    /// stub.
    pub(super) fn begin(&mut self) -> Result<(), EngineError> {
        self.begun = true;
        if self.kernel.unpacking == Unpacking::None
            && let Some(placed) = kernel_at(&self.kernel, self.vcpu.ram(), 0)
        {
            return self.start(placed);
        }
        let Some(stub) = &self.stub else { return Ok(()) };
        for jump in stub.jumps(self.vcpu.ram()) {
            write_bytes(&mut self.vcpu, jump, &trap(stub.jump().len()));
        }
        Ok(())
    }

    /// The boot stub jumps to the kernel that it has unpacked.
    pub(super) fn leave_stub(
        &mut self,
        state: &CpuState,
        stub: &StubTrap,
    ) -> Result<VcpuExit, EngineError> {
        for jump in stub.breakpoints(self.vcpu.ram()) {
            write_bytes(&mut self.vcpu, jump, stub.jump());
        }
        let entry = state.gpr[RAX];
        let after = CpuState { rip: entry, ..retired(state, stub.jump().len()) };
        self.vcpu.retire_instruction(&after)?;
        let displacement = entry.wrapping_sub(self.kernel.entry);
        if let Some(placed) = kernel_at(&self.kernel, self.vcpu.ram(), displacement) {
            self.start(placed)?;
        }
        Ok(WENT_ON)
    }

    /// The kernel is there: sets the breakpoints and watches its text.
    pub(super) fn start(&mut self, placed: PlacedKernel) -> Result<(), EngineError> {
        self.stub = None;
        self.applied = placed.has_applied_alternatives(self.vcpu.ram());
        for text in &placed.text {
            for part in placed.kept_parts(self.vcpu.ram(), text) {
                self.vcpu.watch_writes(part, true)?;
            }
        }
        let (applied, placed) = (self.applied, &*self.placed.insert(placed));
        let ram = self.vcpu.ram();
        let candidates = placed.candidates.iter().copied();
        let all: Vec<Candidate> =
            candidates.filter(|it| !placed.is_given_up(ram, it.physical)).collect();
        for candidate in all {
            if candidate.read && !applied {
                self.counts.open += u64::from(!candidate.patched);
            } else {
                let refused = self.counts.refused;
                if !self.plant(candidate) && !candidate.read {
                    self.counts.refused = refused + 1;
                }
            }
        }
        let state = self.vcpu.state()?;
        self.guest_tsd = state.cr4 & CR4_TSD != 0;
        self.vcpu.set_state(&CpuState { cr4: state.cr4 | CR4_TSD, ..state })
    }

    /// The CPU state and guest RAM are those of a checkpoint.
    pub(super) fn begin_at_checkpoint(&mut self) -> Result<(), EngineError> {
        let mut state = self.vcpu.state()?;
        if self.placed.is_some() {
            // The one that is set is this trap's.
            state.cr4 = state.cr4 & !CR4_TSD | self.guest_tsd_bit();
            self.vcpu.set_state(&state)?;
        }
        // What was set up before was for other RAM.
        (self.placed, self.planted, self.stub) = (None, Planted::new(), stub_of(&self.kernel));
        (self.applied, self.fault_handler, self.asking) = (false, None, None);
        self.page_writes.clear();
        self.unforeseen.clear();
        (self.refusal, self.counts) = (None, TrapCounts::default());
        match kernel_of(&self.kernel, self.vcpu.ram(), &state) {
            Some(placed) => {
                self.begun = true;
                self.start(placed)?;
                self.look_for_fault_handler()
            }
            None => self.begin(),
        }
    }
}

pub(super) fn stub_of(kernel: &KernelText) -> Option<StubTrap> {
    match &kernel.unpacking {
        Unpacking::By(jump) => Some(StubTrap::new(jump)),
        Unpacking::None | Unpacking::Unknown => None,
    }
}
