//! [`BranchClock`]: an engine made of a vCPU and its counter.

use std::sync::Arc;

use iced_x86::Mnemonic;
use reprise_machine::clock::TimeBase;
use reprise_machine::engine::{Engine, EngineError, Exit, Kick};
use reprise_machine::inputs::Stamp;
use reprise_time_stamp_sites::KernelText;
use reprise_trace::checkpoint::{EngineState, HiddenState};
use reprise_trace::cpu_state::{CpuState, RCX};
use reprise_trace::event::Assists;
use reprise_trace::header::Precaution;
use reprise_trace::moment::{Moment, TickKind};
use reprise_trace::register_bits::RFLAGS_TF;

use crate::guest_code::refuses_time_stamps;
use crate::retired::Asking;
use crate::settle::{Settled, Stand};
use crate::time_stamp_trap::TimeStampTrap;
use crate::vcpu::{Vcpu, VcpuExit};

/// A recording whose guest is led nowhere is kicked again some milliseconds later: after so many kicks, seconds, a
/// guest that debugs itself all the time will not be led anywhere.
const MAX_DEBUGGED_KICKS: u32 = 1_000;

/// How the clock is to go about it.
#[derive(Clone, Copy, Debug)]
pub struct Parameters {
    /// Conditional branches by which an overflow may be late, at least 1.
    pub skid: u64,
    /// Where a kicked guest is led to.
    pub stand: Stand,
}

impl Parameters {
    /// For a counter that is late by at most `skid` branches.
    pub fn with_skid(skid: u64) -> Self {
        Self { skid: skid.max(1), stand: Stand::default() }
    }
}

/// What the clock did, for whoever wants to know what it costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Times the guest was entered.
    pub entries: u64,
    /// Kicks of a recording after which the guest stands where it can be found again.
    pub settled: u64,
    /// Kicks after which no such place was found.
    pub unsettled: u64,
    /// Moments found again.
    pub found: u64,
    /// Breakpoints at a moment's RIP that were not yet the moment.
    pub passed_over: u64,
    /// Times that the guest was stopped behind the moment.
    pub overshot: u64,
    /// RDTSC that were executed in the guest's place, because the log said where.
    pub time_stamps: u64,
}

/// An engine that counts conditional branches.
pub struct BranchClock<V> {
    pub(crate) vcpu: V,
    pub(crate) parameters: Parameters,
    /// Conditional branches when the guest last exited.
    pub(crate) branches: u64,
    /// Accesses finished, HLTs retired and interrupts delivered, and the ticks that lie before what this
    /// vCPU has counted: it may have begun at a checkpoint.
    events: u64,
    halted: bool,
    /// An instruction has accesses that are not finished.
    pub(crate) amid: bool,
    /// The vector of the interrupt that is queued in the vCPU.
    pub(crate) injected: Option<u8>,
    asking: Option<Box<Asking>>,
    /// The guest stands where another run finds it again.
    pub(crate) stands: bool,
    /// The guest stands at the first place of its tick.
    pub(crate) first_of_tick: bool,
    /// The guest exited in a moment's tick before the counter, asked to stop it short of that by so many
    /// ticks, did: it may be past the moment.
    pub(crate) doubtful: Option<u64>,
    /// Moments up to this tick are approached with this margin, which is wider than the usual one.
    pub(crate) widened: Option<(u64, u64)>,
    /// In a row, kicks of a recording after which a guest that debugs itself was led nowhere.
    debugged_kicks: u32,
    /// A kick came, and an exit before the guest stood anywhere.
    kick_owed: bool,
    pub(crate) counts: Counts,
}

impl<V: Vcpu> BranchClock<V> {
    /// The clock of a vCPU that has not run yet.
    ///
    /// # Errors
    /// If the counter cannot be read.
    pub fn new(mut vcpu: V, parameters: Parameters) -> Result<Self, EngineError> {
        let branches = vcpu.conditional_branches()?;
        Ok(Self {
            vcpu,
            parameters,
            branches,
            events: 0,
            halted: false,
            amid: false,
            injected: None,
            asking: None,
            stands: true,
            first_of_tick: true,
            doubtful: None,
            widened: None,
            debugged_kicks: 0,
            kick_owed: false,
            counts: Counts::default(),
        })
    }

    /// The same clock, RDTSC of the guest whose kernel this is trapped. Nothing has run yet; the guest is
    /// loaded.
    ///
    /// # Errors
    /// If the vCPU cannot do it.
    pub fn trapping_time_stamps(
        self,
        kernel: KernelText,
    ) -> Result<BranchClock<TimeStampTrap<V>>, EngineError> {
        self.with_vcpu_within(|vcpu| TimeStampTrap::new(vcpu, kernel))
    }

    /// The same clock, with something around its vCPU, which has not run yet.
    ///
    /// # Errors
    /// As `wrap`, and if the counter cannot be read.
    pub fn with_vcpu_within<W: Vcpu>(
        self,
        wrap: impl FnOnce(V) -> Result<W, EngineError>,
    ) -> Result<BranchClock<W>, EngineError> {
        BranchClock::new(wrap(self.vcpu)?, self.parameters)
    }

    /// What the clock did so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// The vCPU, for looking at it.
    pub fn vcpu(&self) -> &V {
        &self.vcpu
    }

    /// Runs the guest until it exits, and reads the counter.
    pub(crate) fn enter(&mut self) -> Result<VcpuExit, EngineError> {
        let exit = self.vcpu.enter()?;
        self.counts.entries += 1;
        self.injected = None;
        self.first_of_tick = false;
        self.branches = self.vcpu.conditional_branches()?;
        Ok(exit)
    }

    fn count_event(&mut self) {
        self.events = self.events.wrapping_add(1);
    }

    /// An exit that the guest caused, as the machine sees it.
    pub(crate) fn hand_over(&mut self, exit: VcpuExit) -> Exit {
        match exit {
            VcpuExit::Access(access) => {
                self.amid = true;
                Exit::Access(access)
            }
            VcpuExit::Halt => {
                self.halted = true;
                self.count_event();
                Exit::Halt
            }
            VcpuExit::InterruptWindow => Exit::InterruptWindow,
            VcpuExit::TripleFault => Exit::TripleFault,
            VcpuExit::Unsupported(reason) => Exit::Unsupported(reason),
            VcpuExit::BreakpointInstruction | VcpuExit::WatchedWrite(_) => {
                unreachable!("nobody asked for it")
            }
            VcpuExit::Breakpoint | VcpuExit::Interrupted { .. } => {
                unreachable!("not the guest's doing")
            }
        }
    }

    /// Runs until the guest exits or somebody kicks: a recording.
    fn run_freely(&mut self) -> Result<Exit, EngineError> {
        loop {
            let owed = std::mem::take(&mut self.kick_owed);
            let kicked = if owed && self.injected.is_none() && !self.amid {
                // The boundary behind an exit is as good as any.
                self.stands = true;
                return Ok(Exit::Kicked);
            } else {
                self.vcpu.set_breakpoints(&[])?;
                self.vcpu.set_overflow(owed.then_some(1))?;
                match self.enter()? {
                    VcpuExit::Interrupted { kicked } => kicked || owed,
                    exit => {
                        self.kick_owed = owed;
                        self.debugged_kicks = 0;
                        return Ok(self.hand_over(exit));
                    }
                }
            };
            if !kicked {
                continue;
            }
            match self.settle()? {
                Settled::Stands { first_of_tick } => {
                    self.counts.settled += 1;
                    self.debugged_kicks = 0;
                    (self.stands, self.first_of_tick) = (true, first_of_tick);
                    return Ok(Exit::Kicked);
                }
                Settled::Nowhere { debugging } => {
                    self.counts.unsettled += 1;
                    self.stands = false;
                    self.debugged_kicks = debugging.map_or(0, |_| self.debugged_kicks + 1);
                    return Ok(match debugging {
                        Some(how) if self.debugged_kicks == MAX_DEBUGGED_KICKS => {
                            Exit::Unsupported(how.refusal(self.vcpu.state()?.rip))
                        }
                        _ => Exit::Kicked,
                    });
                }
                Settled::Exits(exit) => {
                    self.kick_owed = true;
                    return Ok(exit);
                }
            }
        }
    }
}

impl<V: Vcpu> Engine for BranchClock<V> {
    fn tick_kind(&self) -> TickKind {
        TickKind::ConditionalBranch
    }

    fn tick(&self) -> u64 {
        self.branches.wrapping_add(self.events)
    }

    fn run(&mut self, until: u64) -> Result<Exit, EngineError> {
        assert!(until >= self.tick(), "tick {until} is in the past");
        match until {
            _ if self.halted => Ok(Exit::Halt),
            u64::MAX => self.run_freely(),
            _ => self.run_exactly(until),
        }
    }

    fn run_about(&mut self, until: u64) -> Result<Exit, EngineError> {
        match self.halted {
            true => Ok(Exit::Halt),
            false => self.run_past(until),
        }
    }

    fn run_to(&mut self, stamp: &Stamp) -> Result<Exit, EngineError> {
        if self.halted {
            return Ok(Exit::Halt);
        }
        self.find(stamp)
    }

    fn widen_margin(&mut self, until: u64, times: u32) {
        let margin = self.parameters.skid.saturating_mul(u64::from(times));
        self.widened = Some((until, margin));
    }

    fn comes_late(&self) -> bool {
        true
    }

    fn sets_accessed_bits_early(&self) -> bool {
        true
    }

    fn stands_exactly(&self) -> bool {
        self.stands
    }

    fn ask_for_time_stamp(&mut self) -> Result<bool, EngineError> {
        if self.vcpu.traps_time_stamps() || self.halted || self.amid || self.injected.is_some() {
            return Ok(false);
        }
        let before = self.vcpu.state()?;
        let instruction = self.vcpu.instruction_at(&before);
        let reads = instruction.filter(|it| it.mnemonic() == Mnemonic::Rdtsc);
        let Some(instruction) = reads.filter(|_| !refuses_time_stamps(&before)) else {
            return Ok(false);
        };
        if before.rflags & RFLAGS_TF != 0 {
            // #DB behind it would have to be raised as well.
            let what = format!(
                "a debugger in the guest single-steps (TF) the RDTSC at rip {:#x}, which is answered in its \
                 place: use --engine soft",
                before.rip
            );
            return Err(EngineError { what });
        }
        self.asking = Some(Box::new(Asking { before, bytes: instruction.len() }));
        self.amid = true;
        Ok(true)
    }

    fn finish_access(&mut self, value: u128) -> Result<(), EngineError> {
        self.amid = match self.asking.take() {
            None => !self.vcpu.finish_access(value)?,
            Some(asking) => {
                self.vcpu.retire_instruction(&asking.answered(value as u64))?;
                self.counts.time_stamps += 1;
                false
            }
        };
        if !self.amid {
            self.count_event();
            self.first_of_tick = true;
        }
        Ok(())
    }

    fn interruptible(&mut self) -> Result<bool, EngineError> {
        Ok(!self.amid && self.injected.is_none() && self.vcpu.interruptible()?)
    }

    fn set_interrupt_request(&mut self, wanted: bool) {
        self.vcpu.set_window_request(wanted);
    }

    fn inject(&mut self, vector: u8) -> Result<(), EngineError> {
        assert!(self.interruptible()?, "only an interruptible guest takes an interrupt");
        self.vcpu.inject(vector)?;
        self.injected = Some(vector);
        self.halted = false;
        self.count_event();
        Ok(())
    }

    fn set_time_base(&mut self, _base: TimeBase) {
        // Time is the host's.
    }

    fn moment(&mut self) -> Result<Moment, EngineError> {
        let state = self.vcpu.state()?;
        Ok(Moment { tick: self.tick(), rip: state.rip, rcx: state.gpr[RCX] })
    }

    fn cpu_state(&mut self) -> Result<CpuState, EngineError> {
        self.vcpu.state()
    }

    fn set_cpu_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.halted = state.halted;
        self.vcpu.set_state(state)
    }

    fn read_ram(&self, address: u64, bytes: &mut [u8]) {
        self.vcpu.read_ram(address, bytes);
    }

    fn visit_ram(&self, visit: &mut dyn FnMut(u64, &[u8])) {
        self.vcpu.visit_ram(visit);
    }

    fn save(&mut self) -> Result<Option<EngineState>, EngineError> {
        // Only the first place of a tick is found again by the tick alone.
        if !self.first_of_tick { Ok(None) } else { self.state_for_successor() }
    }

    fn state_for_successor(&mut self) -> Result<Option<EngineState>, EngineError> {
        if !self.vcpu.is_all_in_state() || self.halted || self.amid || self.injected.is_some() {
            return Ok(None);
        }
        let cpu = self.vcpu.state()?;
        let hidden = HiddenState::of_branch_clock();
        Ok(Some(EngineState { tick: self.tick(), cpu, hidden }))
    }

    /// Takes up any state of a recording under this clock, whichever engine saved it: what else it kept
    /// decides nothing here, as the translations that hardware knows are its own affair, and what is
    /// trapped follows from CPU and RAM.
    fn restore(&mut self, state: &EngineState) -> Result<(), EngineError> {
        self.set_cpu_state(&state.cpu)?;
        self.vcpu.resume()?;
        self.events = state.tick.wrapping_sub(self.branches);
        (self.amid, self.injected, self.kick_owed) = (false, None, false);
        (self.stands, self.first_of_tick) = (true, true);
        (self.doubtful, self.widened, self.asking) = (None, None, None);
        Ok(())
    }

    fn left_open(&self) -> Vec<Precaution> {
        self.vcpu.left_open()
    }

    fn assists(&self) -> Assists {
        self.vcpu.assists()
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.vcpu.kicker()
    }
}
