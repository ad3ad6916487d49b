//! [`TimeStampTrap`]: RDTSC on hardware that lets nobody trap it.
//!
//! *Kernel code.* Breakpoint instructions stand at every RDTSC of the kernel's text. They are put there
//! where the unpacked kernel is first entered, each only if the bytes are what was expected, and not seen
//! in digests. Writes to the text are watched: what they bring is trapped, and what the kernel writes over
//! a breakpoint stays written.
//!
//! The kernel reads its text in one place only, where it applies its alternatives: it decodes each
//! instruction that may be replaced, and how many branches that takes depends on the bytes. So there are
//! no breakpoints in those before it has done that, which is at the first access to the board after all of
//! them were patched, and something else since. A guest without a time-stamp counter in CPUID executes none of
//! them before; [`TrapCounts::open`] says how many there were.
//!
//! *User code.* CR4.TSD is set all the time; the guest's own is kept here, since its MOV to and from CR4
//! have breakpoints too. RDTSC then raises #GP. A breakpoint at the entry of the guest's handler looks at
//! what the frame says, and, if it was RDTSC, puts everything back as it was. What stays is the frame
//! below the handler's stack; whoever replays elsewhere leaves it there as well
//! (`TimeStamps::AskedThroughFault` of the software CPU).
//!
//! Not trapped: what executes before the kernel is entered, a module's own RDTSC, and what the kernel
//! writes as code that is neither its text nor known from its alternatives.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use iced_x86::{Instruction as Decoded, Mnemonic};
use reprise_machine::engine::{Access, EngineError, Kick};
use reprise_machine::ram::GuestRam;
use reprise_time_stamp_sites::{Instruction, KernelText};
use reprise_trace::cpu_state::CpuState;

use crate::candidates::{Alternatives, Candidate, candidates_of, is_trapped};
use crate::guest_code::{MAX_BYTES, bitness, decode_at, handler_of, linear_of};
use crate::planted::Planted;
use crate::retired::{before_fault, retired, time_stamp_retired};
use crate::vcpu::{MAX_BREAKPOINTS, Vcpu, VcpuExit};
use reprise_machine::paging::{Paging, is_ram};
use reprise_trace::register_bits::{CR4_TSD, EFER_LMA};

/// #GP.
const GENERAL_PROTECTION: u8 = 13;
/// A page of text that the kernel gives up after it has started is written over and over; then it is no
/// text any more.
const WRITES_TO_TEXT: u32 = 64;
/// No single patch of text is larger.
const MAX_PATCH_BYTES: u64 = 64;

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
    /// Sites whose bytes were not what they should be, so that there is no breakpoint.
    pub refused: u64,
    /// Sites without a breakpoint until the kernel has applied its alternatives.
    pub open: u64,
}

/// A vCPU whose guest's RDTSC is answered by the machine.
pub struct TimeStampTrap<V> {
    vcpu: V,
    kernel: KernelText,
    candidates: Vec<Candidate>,
    /// Text, and whether the kernel gives it up.
    text: Vec<(Range<u64>, bool)>,
    planted: Planted<Kind>,
    /// The kernel was entered, and the breakpoints are there.
    started: bool,
    /// How far the kernel is with its alternatives.
    alternatives: Alternatives,
    /// The breakpoints that whoever uses this vCPU has set.
    breakpoints: Vec<u64>,
    /// CR4.TSD as the guest has it.
    guest_tsd: bool,
    /// Guest-physical address of the entry of its #GP handler.
    fault_handler: Option<u64>,
    /// The state before the RDTSC that waits for its answer.
    asking: Option<Box<CpuState>>,
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
        let (candidates, alternatives) = candidates_of(&kernel);
        let text = kernel.text.iter().map(|text| {
            let bytes = text.linear.end - text.linear.start;
            (text.physical..text.physical + bytes, text.initial)
        });
        let mut trap = Self {
            text: text.collect(),
            vcpu,
            kernel,
            candidates,
            planted: Planted::new(),
            started: false,
            alternatives,
            breakpoints: Vec::with_capacity(MAX_BREAKPOINTS),
            guest_tsd: false,
            fault_handler: None,
            asking: None,
            page_writes: BTreeMap::new(),
            counts: TrapCounts::default(),
        };
        if trap.kernel_is_there() {
            trap.start()?;
        }
        Ok(trap)
    }

    /// The vCPU within.
    pub fn inner(&self) -> &V {
        &self.vcpu
    }

    /// What the trap did so far; `None` if the kernel was never entered where it is linked to, as where
    /// it chooses its place at random.
    pub fn counts(&self) -> Option<TrapCounts> {
        self.started.then_some(self.counts)
    }

    /// Breakpoint instructions in guest RAM.
    pub fn planted(&self) -> usize {
        self.planted.len()
    }

    fn kernel_is_there(&self) -> bool {
        let expected = &self.kernel.entry_bytes;
        let mut found = vec![0; expected.len()];
        if expected.is_empty() || !is_ram(self.vcpu.ram(), self.kernel.entry, expected.len()) {
            return false;
        }
        self.vcpu.ram().read(self.kernel.entry, &mut found);
        found == *expected
    }

    /// The kernel lies where it is linked to: sets the breakpoints and watches its text.
    fn start(&mut self) -> Result<(), EngineError> {
        self.started = true;
        for (range, _) in &self.text {
            self.vcpu.watch_writes(range.clone(), true)?;
        }
        for index in 0..self.candidates.len() {
            let candidate = self.candidates[index];
            if candidate.read {
                self.counts.open += u64::from(!candidate.patched);
            } else if !self.plant(candidate) {
                self.counts.refused += 1;
            }
        }
        Ok(())
    }

    /// The guest accesses the board: if it has applied its alternatives, sets the breakpoints that had to
    /// wait for that.
    fn after_alternatives(&mut self) {
        if self.alternatives != Alternatives::Passed {
            return;
        }
        self.alternatives = Alternatives::Applied;
        self.counts.open = 0;
        for index in 0..self.candidates.len() {
            let candidate = self.candidates[index];
            if candidate.read && self.plant(candidate) {
                self.counts.patched += u64::from(candidate.patched);
            }
        }
    }

    /// Whether the bytes there are the instruction.
    fn holds(&self, candidate: Candidate) -> bool {
        let Candidate { physical, bytes, instruction, .. } = candidate;
        let mut found = [0; MAX_BYTES];
        let found = &mut found[..usize::from(bytes)];
        if !is_ram(self.vcpu.ram(), physical, found.len()) {
            return false;
        }
        self.vcpu.ram().read(physical, found);
        Instruction::at_start_of(found) == Some(instruction)
    }

    /// Sets a breakpoint if the bytes there are the instruction.
    fn plant(&mut self, candidate: Candidate) -> bool {
        let Candidate { physical, bytes, instruction, .. } = candidate;
        let kind = Kind::Site(instruction);
        self.holds(candidate)
            && self.planted.plant(&mut self.vcpu, physical, usize::from(bytes), kind)
    }

    /// The guest-physical address of the code at RIP.
    fn code_at(&self, state: &CpuState) -> Option<u64> {
        let mapping = Paging::from(state).walk(self.vcpu.ram(), linear_of(state, state.rip))?;
        Some(mapping.physical)
    }

    /// INT3 came back.
    fn breakpoint_instruction(&mut self) -> Result<VcpuExit, EngineError> {
        let state = self.vcpu.state()?;
        let place = self.code_at(&state);
        let found = place.and_then(|place| self.planted.at(place).map(|(kind, _)| (place, kind)));
        let Some((place, kind)) = found else {
            self.vcpu.pass_breakpoint_instruction()?;
            return Ok(WENT_ON);
        };
        let decoded = self.planted.instruction(place, bitness(&state), state.rip);
        match (kind, decoded) {
            (Kind::FaultHandler, Some(decoded)) => self.fault(state, place, &decoded),
            (Kind::Site(Instruction::ReadTimeStamp), _) => {
                self.counts.kernel += 1;
                self.asking = Some(Box::new(state));
                Ok(VcpuExit::Access(Access::TimeStamp))
            }
            (Kind::Site(Instruction::ReadControl4), Some(decoded)) => {
                self.counts.control += 1;
                let value = state.cr4 & !CR4_TSD | self.guest_tsd_bit();
                let mut after = retired(&state, decoded.len());
                after.gpr[decoded.op0_register().number()] = value;
                self.vcpu.retire_instruction(&after)?;
                Ok(WENT_ON)
            }
            (Kind::Site(Instruction::WriteControl4), Some(decoded)) => {
                self.counts.control += 1;
                let mut value = state.gpr[decoded.op1_register().number()];
                if bitness(&state) != 64 {
                    value &= 0xffff_ffff;
                }
                self.guest_tsd = value & CR4_TSD != 0;
                let after = CpuState { cr4: value | CR4_TSD, ..retired(&state, decoded.len()) };
                self.vcpu.set_state(&after)?;
                Ok(WENT_ON)
            }
            _ => unreachable!("only these are trapped, and their bytes are known"),
        }
    }

    fn guest_tsd_bit(&self) -> u64 {
        if self.guest_tsd { CR4_TSD } else { 0 }
    }

    /// The guest has entered its handler of #GP.
    fn fault(
        &mut self,
        state: CpuState,
        place: u64,
        first: &Decoded,
    ) -> Result<VcpuExit, EngineError> {
        if !self.guest_tsd
            && let Some(before) = before_fault(self.vcpu.ram(), &state)
            && decode_at(self.vcpu.ram(), &before, before.rip)
                .is_some_and(|decoded| decoded.mnemonic() == Mnemonic::Rdtsc)
        {
            self.counts.user += 1;
            self.vcpu.set_state(&before)?;
            self.asking = Some(Box::new(before));
            return Ok(VcpuExit::Access(Access::TimeStamp));
        }
        self.execute_under(&state, place, first)
    }

    /// Has the guest execute the one instruction under a breakpoint, which leads to the next. Interrupts
    /// are closed there.
    fn execute_under(
        &mut self,
        state: &CpuState,
        place: u64,
        decoded: &Decoded,
    ) -> Result<VcpuExit, EngineError> {
        self.planted.remove(&mut self.vcpu, place, &[]);
        self.vcpu.set_breakpoints(&[linear_of(state, decoded.next_ip())])?;
        let mut kicked = false;
        let exit = loop {
            match self.vcpu.enter()? {
                VcpuExit::Breakpoint => break VcpuExit::Interrupted { kicked },
                VcpuExit::Interrupted { kicked: now } => kicked |= now,
                VcpuExit::WatchedWrite(ranges) => self.written(&ranges)?,
                exit => break exit,
            }
        };
        self.planted.plant(&mut self.vcpu, place, decoded.len(), Kind::FaultHandler);
        self.set_own_breakpoints()?;
        Ok(exit)
    }

    /// Looks whether the guest has set up another handler of #GP, and has a breakpoint at its entry.
    fn look_for_fault_handler(&mut self) -> Result<(), EngineError> {
        if !self.started || self.alternatives != Alternatives::Applied {
            return Ok(());
        }
        let state = self.vcpu.state()?;
        if state.efer & EFER_LMA == 0 {
            return Ok(());
        }
        let Some(handler) = handler_of(self.vcpu.ram(), &state, GENERAL_PROTECTION) else {
            return Ok(());
        };
        // What follows reads the kernel's code as 64-bit code.
        let state = CpuState { rip: handler, ..state };
        let Some(place) = self.code_at(&state) else { return Ok(()) };
        let in_text = |(range, initial): &(Range<u64>, bool)| range.contains(&place) && !initial;
        let known = self.fault_handler == Some(place) && self.planted.at(place).is_some();
        if known || !self.text.iter().any(in_text) {
            return Ok(());
        }
        if let Some(before) = self.fault_handler.take() {
            self.planted.remove(&mut self.vcpu, before, &[]);
        }
        if let Some(first) = decode_at(self.vcpu.ram(), &state, handler) {
            self.planted.plant(&mut self.vcpu, place, first.len(), Kind::FaultHandler);
            self.fault_handler = Some(place);
        }
        Ok(())
    }

    /// The guest wrote to its text.
    fn written(&mut self, ranges: &[Range<u64>]) -> Result<(), EngineError> {
        for range in ranges {
            self.counts.writes += 1;
            let overlapped: Vec<u64> = self.planted.overlapping(range).collect();
            for address in overlapped {
                if !self.planted.is_whole(&self.vcpu, address) {
                    self.planted.remove(&mut self.vcpu, address, ranges);
                }
            }
            if self.is_given_up(range, ranges)? {
                continue;
            }
            match self.alternatives {
                Alternatives::Applied => self.plant_written(range),
                _ => self.note_alternative(range),
            }
        }
        Ok(())
    }

    /// Counts writes to text that the kernel gives up; from some number on it is not watched any more.
    fn is_given_up(
        &mut self,
        range: &Range<u64>,
        ranges: &[Range<u64>],
    ) -> Result<bool, EngineError> {
        let initial =
            |(text, initial): &(Range<u64>, bool)| *initial && text.contains(&range.start);
        if !self.text.iter().any(initial) {
            return Ok(false);
        }
        let page = range.start & !0xfff;
        let writes = self.page_writes.entry(page).or_default();
        *writes += 1;
        let whole = range.end - range.start > MAX_PATCH_BYTES;
        if *writes < WRITES_TO_TEXT && !whole {
            return Ok(false);
        }
        self.vcpu.watch_writes(page..page + 1, false)?;
        let left: Vec<u64> = self.planted.overlapping(&(page..page + 0x1000)).collect();
        for address in left.into_iter().filter(|address| *address >= page) {
            self.planted.remove(&mut self.vcpu, address, ranges);
        }
        Ok(true)
    }

    /// Sees how far the kernel is with its alternatives, from a write to its text.
    fn note_alternative(&mut self, range: &Range<u64>) {
        let is_patch = |candidate: &&Candidate| {
            candidate.patched && candidate.instruction == Instruction::ReadTimeStamp
        };
        match self.alternatives {
            Alternatives::Waiting => {
                let mut patches = self.candidates.iter().filter(is_patch);
                if patches.clone().any(|patch| range.contains(&patch.physical))
                    && patches.all(|patch| self.holds(*patch))
                {
                    self.alternatives = Alternatives::Patched { last: range.start };
                }
            }
            Alternatives::Patched { last } if range.start.abs_diff(last) > MAX_PATCH_BYTES => {
                self.alternatives = Alternatives::Passed;
            }
            _ => {}
        }
    }

    /// Sets breakpoints at what a write to text has brought.
    fn plant_written(&mut self, range: &Range<u64>) {
        let from = range.start.saturating_sub(MAX_BYTES as u64);
        let first = self.candidates.partition_point(|candidate| candidate.physical < from);
        let near: Vec<Candidate> = self.candidates[first..]
            .iter()
            .take_while(|candidate| candidate.physical < range.end)
            .copied()
            .collect();
        for candidate in near {
            self.counts.patched += u64::from(self.plant(candidate));
        }
        // A patch begins with an instruction.
        let length = (range.end - range.start).min(MAX_PATCH_BYTES) as usize;
        let mut bytes = vec![0; length];
        self.vcpu.ram().read(range.start, &mut bytes);
        for (offset, bytes, instruction) in Instruction::all_in(&bytes) {
            let physical = range.start + offset as u64;
            let candidate = Candidate { physical, bytes, instruction, patched: true, read: false };
            if is_trapped(instruction) && self.plant(candidate) {
                self.counts.unforeseen += 1;
            }
        }
    }

    /// Sets the breakpoints that were asked for, and the one at the kernel's entry until it is entered.
    fn set_own_breakpoints(&mut self) -> Result<(), EngineError> {
        let mut all = self.breakpoints.clone();
        let entry = self.kernel.entry;
        if !self.started && all.len() < MAX_BREAKPOINTS && !all.contains(&entry) {
            all.push(entry);
        }
        self.vcpu.set_breakpoints(&all)
    }

    /// A breakpoint in a debug register.
    fn breakpoint(&mut self) -> Result<VcpuExit, EngineError> {
        let state = self.vcpu.state()?;
        let here = linear_of(&state, state.rip);
        if !self.started && here == self.kernel.entry && self.kernel_is_there() {
            self.start()?;
        }
        if self.breakpoints.contains(&here) {
            return Ok(VcpuExit::Breakpoint);
        }
        self.set_own_breakpoints()?;
        if !self.started {
            self.vcpu.step_off()?;
        }
        Ok(WENT_ON)
    }
}

/// An exit that is nobody else's business.
const WENT_ON: VcpuExit = VcpuExit::Interrupted { kicked: false };

impl<V: Vcpu> Vcpu for TimeStampTrap<V> {
    fn enter(&mut self) -> Result<VcpuExit, EngineError> {
        match self.vcpu.enter()? {
            VcpuExit::BreakpointInstruction => self.breakpoint_instruction(),
            VcpuExit::WatchedWrite(ranges) => {
                self.written(&ranges)?;
                Ok(WENT_ON)
            }
            VcpuExit::Breakpoint => self.breakpoint(),
            exit => {
                if matches!(exit, VcpuExit::Access(_)) {
                    self.after_alternatives();
                }
                self.look_for_fault_handler()?;
                Ok(exit)
            }
        }
    }

    fn finish_access(&mut self, value: u128) -> Result<bool, EngineError> {
        let Some(before) = self.asking.take() else { return self.vcpu.finish_access(value) };
        self.vcpu.retire_instruction(&time_stamp_retired(&before, value as u64))?;
        Ok(true)
    }

    fn set_breakpoints(&mut self, addresses: &[u64]) -> Result<(), EngineError> {
        self.breakpoints.clear();
        self.breakpoints.extend_from_slice(addresses);
        self.set_own_breakpoints()
    }

    fn state(&mut self) -> Result<CpuState, EngineError> {
        let state = self.vcpu.state()?;
        Ok(CpuState { cr4: state.cr4 & !CR4_TSD | self.guest_tsd_bit(), ..state })
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.guest_tsd = state.cr4 & CR4_TSD != 0;
        self.vcpu.set_state(&CpuState { cr4: state.cr4 | CR4_TSD, ..state.clone() })
    }

    fn instruction_at(&self, state: &CpuState) -> Option<Decoded> {
        let planted = self
            .code_at(state)
            .and_then(|place| self.planted.instruction(place, bitness(state), state.rip));
        planted.or_else(|| self.vcpu.instruction_at(state))
    }

    fn write_ram(&mut self, address: u64, bytes: &[u8]) {
        self.vcpu.write_ram(address, bytes);
    }

    fn read_ram(&self, address: u64, bytes: &mut [u8]) {
        self.vcpu.read_ram(address, bytes);
        self.planted.hide(address, bytes);
    }

    fn visit_ram(&self, visit: &mut dyn FnMut(u64, &[u8])) {
        self.vcpu.visit_ram(&mut |address, bytes| {
            let range = address..address + bytes.len() as u64;
            if self.planted.overlapping(&range).next().is_none() {
                return visit(address, bytes);
            }
            let mut copy = bytes.to_vec();
            self.planted.hide(address, &mut copy);
            visit(address, &copy);
        });
    }

    fn conditional_branches(&mut self) -> Result<u64, EngineError> {
        self.vcpu.conditional_branches()
    }

    fn set_overflow(&mut self, branches: Option<u64>) -> Result<(), EngineError> {
        self.vcpu.set_overflow(branches)
    }

    fn step_off(&mut self) -> Result<(), EngineError> {
        self.vcpu.step_off()
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

    fn catch_breakpoint_instructions(&mut self, catch: bool) -> Result<(), EngineError> {
        self.vcpu.catch_breakpoint_instructions(catch)
    }

    fn pass_breakpoint_instruction(&mut self) -> Result<(), EngineError> {
        self.vcpu.pass_breakpoint_instruction()
    }

    fn watch_writes(&mut self, physical: Range<u64>, watch: bool) -> Result<(), EngineError> {
        self.vcpu.watch_writes(physical, watch)
    }

    fn retire_instruction(&mut self, after: &CpuState) -> Result<(), EngineError> {
        self.vcpu.retire_instruction(after)
    }

    /// How far the kernel is with its alternatives is in no checkpoint.
    fn is_all_in_state(&self) -> bool {
        false
    }

    fn ram(&self) -> &GuestRam {
        self.vcpu.ram()
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.vcpu.kicker()
    }
}
