//! [`TimeStampTrap`]: RDTSC on hardware that lets nobody trap it.
//!
//! *Kernel code.* Breakpoint instructions stand at every RDTSC of the kernel's text. They are put there
//! where the unpacked kernel is first entered, each only if the bytes are what was expected, and not seen
//! in digests. Writes to the text are watched: what they bring is trapped, and what the kernel writes over
//! a breakpoint stays written. Where the kernel lies, which may be anywhere, tells the last jump of the
//! boot stub, which has a breakpoint as well (`boot_stub.rs`).
//!
//! The kernel reads its text in one place only, where it applies its alternatives: it decodes each
//! instruction that may be replaced, and how many branches that takes depends on the bytes. So there are
//! no breakpoints in those before it has replaced something that is behind all of them in its table. A guest
//! without a time-stamp counter in CPUID executes none of them before; [`TrapCounts::open`] says how many
//! there were.
//!
//! *User code.* CR4.TSD is set all the time; the guest's own is kept here, since its MOV to and from CR4
//! have breakpoints too. RDTSC then raises #GP. A breakpoint at the entry of the guest's handler looks at
//! what the frame says, and, if it was RDTSC, puts everything back as it was. What stays is the frame
//! below the handler's stack; whoever replays elsewhere leaves it there as well
//! (`TimeStamps::AskedThroughFault` of the software CPU).
//!
//! *Checkpoints.* What is trapped where follows from CPU state and RAM alone (`placed_kernel.rs`): that the
//! kernel was entered, where it lies, that it has applied its alternatives, and which text it has given up. So
//! a checkpoint keeps nothing of a trap, and one of the software CPU, which traps nothing so, serves as well.
//! The exception is an RDTSC that the kernel's tables did not foresee: once there is one, no more
//! checkpoints are taken.
//!
//! Not trapped: what executes before the kernel is entered, a module's own RDTSC, and what the kernel
//! writes as code that is neither its text nor known from its alternatives.

mod beginning;
mod in_place;
mod left_open;
mod text_writes;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use iced_x86::{Decoder, DecoderOptions, Instruction as Decoded};
use reprise_machine::engine::EngineError;
use reprise_machine::paging::Paging;
use reprise_time_stamp_sites::{Instruction, KernelText};
use reprise_trace::cpu_state::CpuState;
use reprise_trace::header::Precaution;
use reprise_trace::register_bits::CR4_TSD;

use crate::ask_vcpu_within;
use crate::boot_stub::StubTrap;
use crate::candidates::Candidate;
use crate::guest_code::{bitness, linear_of};
use crate::placed_kernel::{PlacedKernel, kernel_at};
use crate::planted::Planted;
use crate::retired::Asking;
use crate::vcpu::{MAX_BREAKPOINTS, Vcpu, VcpuExit};

/// #GP.
const GENERAL_PROTECTION: u8 = 13;
/// Code whose RDTSC no trap knows of, and why: a recording says so among its precautions.
pub const NOT_COVERED: (&str, &str) = (
    "RDTSC, modules and code made at run time",
    "not trapped: only the kernel's text and what its tables patch into it are known",
);

/// What a breakpoint instruction is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Site(Instruction),
    /// The guest's handler of #GP.
    FaultHandler,
}

/// What the trap did, for whoever wants to know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TrapCounts {
    /// RDTSC of kernel code that was answered.
    pub kernel: u64,
    /// RDTSC of user code that was answered.
    pub user: u64,
    /// MOV from and to CR4.
    pub control: u64,
    /// Writes to text that were looked at.
    pub writes: u64,
    /// Sites that such a write brought, as the kernel's alternatives say.
    pub patched: u64,
    /// Sites that such a write brought, and nothing said so before.
    pub unforeseen: u64,
    /// Sites without a breakpoint: their bytes were not what they should be, or another one is in the way.
    pub refused: u64,
    /// Sites without a breakpoint until the kernel has applied its alternatives.
    pub open: u64,
    /// Exits from user code whose RDTSC would have reached the guest as #GP, and not been seen.
    pub unguarded: u64,
}

/// A vCPU whose guest's RDTSC is answered by the machine.
pub struct TimeStampTrap<V> {
    vcpu: V,
    kernel: KernelText,
    /// The guest has been looked at before it runs.
    begun: bool,
    /// The boot stub, as long as the guest may be in it.
    stub: Option<StubTrap>,
    /// The kernel, once it was entered and the breakpoints are there.
    placed: Option<PlacedKernel>,
    planted: Planted<Kind>,
    /// The kernel has applied its alternatives.
    applied: bool,
    /// The breakpoints that whoever uses this vCPU has set.
    breakpoints: Vec<u64>,
    /// CR4.TSD as the guest has it.
    guest_tsd: bool,
    /// Guest-physical address of the entry of its #GP handler.
    fault_handler: Option<u64>,
    /// The RDTSC that waits for its answer.
    asking: Option<Box<Asking>>,
    /// Where breakpoints are that nobody foresaw.
    unforeseen: BTreeSet<u64>,
    /// Why the guest cannot go on.
    refusal: Option<&'static str>,
    /// Writes to each page of text.
    page_writes: BTreeMap<u64, u32>,
    counts: TrapCounts,
}

impl<V: Vcpu> TimeStampTrap<V> {
    /// Traps RDTSC of a guest whose kernel is this. The guest is loaded; it has not run.
    ///
    /// # Errors
    /// If the host refuses.
    pub fn new(mut vcpu: V, kernel: KernelText) -> Result<Self, EngineError> {
        vcpu.catch_breakpoint_instructions(true)?;
        Ok(Self {
            vcpu,
            stub: beginning::stub_of(&kernel),
            kernel,
            begun: false,
            placed: None,
            planted: Planted::new(),
            applied: false,
            breakpoints: Vec::with_capacity(MAX_BREAKPOINTS),
            guest_tsd: false,
            fault_handler: None,
            asking: None,
            unforeseen: BTreeSet::new(),
            refusal: None,
            page_writes: BTreeMap::new(),
            counts: TrapCounts::default(),
        })
    }

    /// The vCPU within.
    pub fn inner(&self) -> &V {
        &self.vcpu
    }

    /// What the trap did so far, or since the checkpoint that it began at; `None` if the kernel was never seen
    /// to be entered.
    pub fn counts(&self) -> Option<TrapCounts> {
        self.placed.as_ref().map(|_| self.counts)
    }

    /// By how many bytes the kernel lies farther on in guest RAM than it is linked to; `None` as long as it
    /// was not seen to be entered.
    pub fn displacement(&self) -> Option<u64> {
        self.placed.as_ref().map(|placed| placed.displacement)
    }

    /// Breakpoint instructions in guest RAM.
    pub fn planted(&self) -> usize {
        self.planted.len()
    }

    /// Sets a breakpoint if the bytes there are the instruction.
    fn plant(&mut self, candidate: Candidate) -> bool {
        let Candidate { physical, instruction, .. } = candidate;
        let Some(code) = candidate.code_in(self.vcpu.ram()) else { return false };
        let planted = self.planted.plant(&mut self.vcpu, physical, &code, Kind::Site(instruction));
        self.counts.refused += u64::from(!planted);
        planted
    }

    /// The guest-physical address of the code at RIP.
    fn code_at(&self, state: &CpuState) -> Option<u64> {
        let mapping = Paging::from(state).walk(self.vcpu.ram(), linear_of(state, state.rip))?;
        Some(mapping.physical)
    }

    /// INT3 came back. Gives the exit, unless the guest has it.
    fn breakpoint_instruction(&mut self) -> Result<Option<VcpuExit>, EngineError> {
        let state = self.vcpu.state()?;
        let place = self.code_at(&state);
        if let Some(place) = place.filter(|place| self.planted.at(*place).is_some()) {
            return self.at_breakpoint(state, place).map(Some);
        }
        let is_last_jump =
            |stub: &mut StubTrap| place.is_some_and(|place| stub.is_at(self.vcpu.ram(), place));
        if let Some(stub) = self.stub.take_if(is_last_jump) {
            return self.leave_stub(&state, &stub).map(Some);
        }
        // Nothing may come between this and the delivery.
        self.vcpu.pass_breakpoint_instruction()?;
        Ok(None)
    }

    fn guest_tsd_bit(&self) -> u64 {
        if self.guest_tsd { CR4_TSD } else { 0 }
    }

    /// Sets the breakpoints that were asked for, and the one at the kernel's entry until it is entered.
    fn set_own_breakpoints(&mut self) -> Result<(), EngineError> {
        let mut all = self.breakpoints.clone();
        let entry = self.kernel.entry;
        if self.awaits_entry() && !all.contains(&entry) {
            all.push(entry);
        }
        self.vcpu.set_breakpoints(&all)
    }

    /// Whether the kernel will be entered, and no breakpoint instruction tells when.
    fn awaits_entry(&self) -> bool {
        self.placed.is_none() && self.stub.is_none()
    }

    /// A breakpoint in a debug register.
    fn breakpoint(&mut self) -> Result<VcpuExit, EngineError> {
        let state = self.vcpu.state()?;
        let here = linear_of(&state, state.rip);
        if self.awaits_entry()
            && here == self.kernel.entry
            && let Some(placed) = kernel_at(&self.kernel, self.vcpu.ram(), 0)
        {
            self.start(placed)?;
        }
        if self.breakpoints.contains(&here) {
            return Ok(VcpuExit::Breakpoint);
        }
        self.set_own_breakpoints()?;
        if self.awaits_entry() {
            self.vcpu.step_off()?;
        }
        Ok(WENT_ON)
    }

    /// Whether there are breakpoint instructions in a range of RAM.
    fn changes(&self, range: &Range<u64>) -> bool {
        self.stub.is_some() || self.planted.overlapping(range).next().is_some()
    }

    /// Puts the guest's own bytes into a copy of RAM.
    fn hide(&self, start: u64, copy: &mut [u8]) {
        self.planted.hide(start, copy);
        if let Some(stub) = &self.stub {
            stub.hide(self.vcpu.ram(), start, copy);
        }
    }

    /// The guest's instruction under a breakpoint at a guest-physical address.
    fn instruction_under(&self, place: u64, bitness: u32, rip: u64) -> Option<Decoded> {
        let stub = self.stub.as_ref().filter(|stub| stub.is_at(self.vcpu.ram(), place));
        match stub {
            Some(stub) => {
                Some(Decoder::with_ip(bitness, stub.jump(), rip, DecoderOptions::NONE).decode())
            }
            None => self.planted.at(place)?.instruction(bitness, rip),
        }
    }
}

/// An exit that is nobody else's business.
const WENT_ON: VcpuExit = VcpuExit::Interrupted { kicked: false };

/// An exit that ends the run.
fn fails(reason: &str) -> VcpuExit {
    VcpuExit::Unsupported(format!("{reason}, where RDTSC is trapped: use --engine soft"))
}

impl<V: Vcpu> Vcpu for TimeStampTrap<V> {
    ask_vcpu_within! {
        vcpu: conditional_branches, set_overflow, step_off, interruptible, set_window_request,
        inject, catch_breakpoint_instructions, pass_breakpoint_instruction, watch_writes,
        retire_instruction, write_ram, assists, ram, kicker
    }

    fn enter(&mut self) -> Result<VcpuExit, EngineError> {
        if !self.begun {
            self.begin()?;
            self.look_for_fault_handler()?;
        }
        let exit = loop {
            break match self.vcpu.enter()? {
                VcpuExit::BreakpointInstruction => match self.breakpoint_instruction()? {
                    Some(exit) => exit,
                    None => continue,
                },
                VcpuExit::WatchedWrite(ranges) => {
                    self.written(&ranges)?;
                    WENT_ON
                }
                VcpuExit::Breakpoint => self.breakpoint()?,
                exit => exit,
            };
        };
        if self.asking.is_none() {
            self.look_for_fault_handler()?;
        }
        Ok(self.refusal.map_or(exit, fails))
    }

    fn finish_access(&mut self, value: u128) -> Result<bool, EngineError> {
        let Some(asking) = self.asking.take() else { return self.vcpu.finish_access(value) };
        self.vcpu.retire_instruction(&asking.answered(value as u64))?;
        Ok(true)
    }

    fn breakpoints(&self) -> usize {
        MAX_BREAKPOINTS - usize::from(self.awaits_entry())
    }

    fn set_breakpoints(&mut self, addresses: &[u64]) -> Result<(), EngineError> {
        self.breakpoints.clear();
        self.breakpoints.extend_from_slice(addresses);
        self.set_own_breakpoints()
    }

    fn state(&mut self) -> Result<CpuState, EngineError> {
        let state = self.vcpu.state()?;
        if self.placed.is_none() {
            return Ok(state);
        }
        Ok(CpuState { cr4: state.cr4 & !CR4_TSD | self.guest_tsd_bit(), ..state })
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.guest_tsd = state.cr4 & CR4_TSD != 0;
        let forced = if self.placed.is_some() { CR4_TSD } else { 0 };
        self.vcpu.set_state(&CpuState { cr4: state.cr4 | forced, ..state.clone() })
    }

    fn instruction_at(&self, state: &CpuState) -> Option<Decoded> {
        let planted = self
            .code_at(state)
            .and_then(|place| self.instruction_under(place, bitness(state), state.rip));
        planted.or_else(|| self.vcpu.instruction_at(state))
    }

    fn read_ram(&self, address: u64, bytes: &mut [u8]) {
        self.vcpu.read_ram(address, bytes);
        self.hide(address, bytes);
    }

    fn visit_ram(&self, visit: &mut dyn FnMut(u64, &[u8])) {
        self.vcpu.visit_ram(&mut |address, bytes| {
            let range = address..address + bytes.len() as u64;
            if !self.changes(&range) {
                return visit(address, bytes);
            }
            let mut copy = bytes.to_vec();
            self.hide(address, &mut copy);
            visit(address, &copy);
        });
    }

    fn traps_time_stamps(&self) -> bool {
        true
    }

    fn left_open(&self) -> Vec<Precaution> {
        left_open::by_counts(self.counts())
    }

    /// What the kernel's tables did not foresee is not found again.
    fn is_all_in_state(&self) -> bool {
        self.counts.unforeseen == 0
    }

    fn resume(&mut self) -> Result<(), EngineError> {
        self.begin_at_checkpoint()
    }
}
