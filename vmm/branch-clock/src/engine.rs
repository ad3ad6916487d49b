//! [`BranchClock`]: an engine made of a vCPU and its counter, and how it finds a moment again.

use std::sync::Arc;

use reprise_machine::clock::TimeBase;
use reprise_machine::engine::{Engine, EngineError, Exit, Kick};
use reprise_machine::inputs::Stamp;
use reprise_trace::cpu_state::{CpuState, RCX};
use reprise_trace::moment::{Moment, TickKind};

use crate::guest_code::linear_of;
use crate::settle::{Settled, Stand};
use crate::vcpu::{Vcpu, VcpuExit};

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
}

/// An engine that counts conditional branches.
pub struct BranchClock<V> {
    pub(crate) vcpu: V,
    pub(crate) parameters: Parameters,
    /// Conditional branches when the guest last exited.
    pub(crate) branches: u64,
    /// Accesses finished, HLTs retired and interrupts delivered.
    events: u64,
    halted: bool,
    /// An instruction has accesses that are not finished.
    amid: bool,
    /// An interrupt is queued in the vCPU.
    injected: bool,
    /// The guest stands where another run finds it again.
    stands: bool,
    /// The guest exited in a moment's tick before the counter, asked for so many branches, stopped it
    /// short of that: it may be past the moment.
    doubtful: Option<u64>,
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
            injected: false,
            stands: true,
            doubtful: None,
            kick_owed: false,
            counts: Counts::default(),
        })
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
        self.injected = false;
        self.branches = self.vcpu.conditional_branches()?;
        Ok(exit)
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
                self.events += 1;
                Exit::Halt
            }
            VcpuExit::InterruptWindow => Exit::InterruptWindow,
            VcpuExit::TripleFault => Exit::TripleFault,
            VcpuExit::Unsupported(reason) => Exit::Unsupported(reason),
            VcpuExit::Breakpoint | VcpuExit::Interrupted { .. } => {
                unreachable!("not the guest's doing")
            }
        }
    }

    /// Runs until the guest exits or somebody kicks: a recording.
    fn run_freely(&mut self) -> Result<Exit, EngineError> {
        loop {
            let owed = std::mem::take(&mut self.kick_owed);
            let kicked = if owed && !self.injected && !self.amid {
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
                        return Ok(self.hand_over(exit));
                    }
                }
            };
            if !kicked {
                continue;
            }
            match self.settle()? {
                Settled::Stands => {
                    self.counts.settled += 1;
                    self.stands = true;
                    return Ok(Exit::Kicked);
                }
                Settled::Nowhere => {
                    self.counts.unsettled += 1;
                    self.stands = false;
                    return Ok(Exit::Kicked);
                }
                Settled::Exits(exit) => {
                    self.kick_owed = true;
                    return Ok(exit);
                }
            }
        }
    }

    /// A kick of a replay only shows how far it is.
    fn kicked_on_the_way(&mut self) -> Exit {
        self.stands = false;
        Exit::Kicked
    }

    /// Runs until soon after tick `until`.
    fn run_about(&mut self, until: u64) -> Result<Exit, EngineError> {
        self.vcpu.set_breakpoints(&[])?;
        loop {
            let tick = self.tick();
            if tick >= until && !self.amid {
                return Ok(Exit::TickReached);
            }
            let left = until.saturating_sub(tick).saturating_add(self.parameters.skid);
            self.vcpu.set_overflow(Some(left))?;
            match self.enter()? {
                VcpuExit::Interrupted { kicked: true } => return Ok(self.kicked_on_the_way()),
                VcpuExit::Interrupted { kicked: false } | VcpuExit::Breakpoint => {}
                exit => return Ok(self.hand_over(exit)),
            }
        }
    }

    /// Runs until short of the tick by the skid, at the latest; `None` if it got there.
    fn come_near(&mut self, target: Moment) -> Result<Option<Exit>, EngineError> {
        self.vcpu.set_breakpoints(&[])?;
        loop {
            let skid = self.parameters.skid;
            let distance = target.tick.saturating_sub(self.tick());
            if distance <= skid {
                return Ok(None);
            }
            self.vcpu.set_overflow(Some(distance - skid))?;
            match self.enter()? {
                VcpuExit::Interrupted { kicked } => {
                    if self.tick() >= target.tick {
                        return Err(self.overshot(target, distance - skid));
                    }
                    if kicked {
                        return Ok(Some(self.kicked_on_the_way()));
                    }
                }
                VcpuExit::Breakpoint => {}
                exit => {
                    let exit = self.hand_over(exit);
                    if self.tick() > target.tick {
                        return Err(self.overshot(target, distance - skid));
                    }
                    if self.tick() == target.tick {
                        self.doubtful = Some(distance - skid);
                    }
                    return Ok(Some(exit));
                }
            }
        }
    }

    fn overshot(&self, target: Moment, asked: u64) -> EngineError {
        let late = self.tick().saturating_sub(target.tick);
        let what = format!(
            "the branch counter, asked to stop the guest after {asked} branches, stopped it {late} \
             or more ticks behind {target}: replay again, it is late by another number each time"
        );
        EngineError { what }
    }

    /// Whether the guest stands where `stamp` was taken.
    fn stands_at(&self, stamp: &Stamp, state: &CpuState) -> bool {
        let Moment { tick, rip, rcx } = stamp.moment;
        let near = self.tick() == tick && state.rip == rip && state.gpr[RCX] == rcx;
        near && state.short_digest() == stamp.cpu_digest
    }

    /// Runs from breakpoint to breakpoint at the moment's RIP.
    fn close_in(&mut self, stamp: &Stamp) -> Result<Exit, EngineError> {
        let target = stamp.moment;
        loop {
            let tick = self.tick();
            if tick > target.tick {
                return match self.doubtful.take() {
                    Some(asked) => Err(self.overshot(target, asked)),
                    None => Ok(Exit::TickReached),
                };
            }
            let state = self.vcpu.state()?;
            let settled = !self.injected && !self.amid;
            if settled && self.stands_at(stamp, &state) {
                self.counts.found += 1;
                self.doubtful = None;
                return Ok(Exit::TickReached);
            }
            self.vcpu.set_breakpoints(&[linear_of(&state, target.rip)])?;
            if settled && state.rip == target.rip {
                self.counts.passed_over += 1;
                self.vcpu.step_off()?;
            }
            // A guest that never comes to the place must not run for ever.
            let beyond = (target.tick - tick).saturating_add(self.parameters.skid + 1);
            self.vcpu.set_overflow(Some(beyond))?;
            match self.enter()? {
                VcpuExit::Breakpoint | VcpuExit::Interrupted { kicked: false } => {}
                VcpuExit::Interrupted { kicked: true } => return Ok(self.kicked_on_the_way()),
                exit => return Ok(self.hand_over(exit)),
            }
        }
    }
}

impl<V: Vcpu> Engine for BranchClock<V> {
    fn tick_kind(&self) -> TickKind {
        TickKind::ConditionalBranch
    }

    fn tick(&self) -> u64 {
        self.branches + self.events
    }

    fn run(&mut self, until: u64) -> Result<Exit, EngineError> {
        assert!(until >= self.tick(), "tick {until} is in the past");
        match until {
            _ if self.halted => Ok(Exit::Halt),
            u64::MAX => self.run_freely(),
            _ => self.run_about(until),
        }
    }

    fn run_to(&mut self, stamp: &Stamp) -> Result<Exit, EngineError> {
        if self.halted {
            return Ok(Exit::Halt);
        }
        if !self.amid
            && let Some(exit) = self.come_near(stamp.moment)?
        {
            return Ok(exit);
        }
        self.close_in(stamp)
    }

    fn stands_exactly(&self) -> bool {
        self.stands
    }

    fn finish_access(&mut self, value: u128) -> Result<(), EngineError> {
        self.amid = !self.vcpu.finish_access(value)?;
        self.events += u64::from(!self.amid);
        Ok(())
    }

    fn interruptible(&mut self) -> Result<bool, EngineError> {
        Ok(!self.amid && !self.injected && self.vcpu.interruptible()?)
    }

    fn set_interrupt_request(&mut self, wanted: bool) {
        self.vcpu.set_window_request(wanted);
    }

    fn inject(&mut self, vector: u8) -> Result<(), EngineError> {
        assert!(self.interruptible()?, "only an interruptible guest takes an interrupt");
        self.vcpu.inject(vector)?;
        self.injected = true;
        self.halted = false;
        self.events += 1;
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
        self.vcpu.ram().read(address, bytes);
    }

    fn visit_ram(&self, visit: &mut dyn FnMut(u64, &[u8])) {
        self.vcpu.ram().visit(visit);
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.vcpu.kicker()
    }
}
