//! [`SimulatedVcpu`].

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use iced_x86::{Instruction, Mnemonic};
use reprise_branch_clock::guest_code::decode_at;
use reprise_branch_clock::vcpu::{MAX_BREAKPOINTS, OwnDebugging, RefusingVcpu, Vcpu, VcpuExit};
use reprise_cpu::engine::SoftEngine;
use reprise_machine::clock::TimeBase;
use reprise_machine::engine::{Engine, EngineError, Exit, Kick};
use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::CpuState;
use reprise_trace::register_bits::RFLAGS_RF;

use crate::disturbance::{Disturbance, Skid};
use crate::page_tables::access_early;
use reprise_random::Random;

/// Steps (elements of a REP among them) from where a kick is due to where it strikes, at most; now and
/// then it may be deep within a long REP.
const STEPS_TO_KICK: [u64; 4] = [40, 40, 40, 8_000];
/// Instructions from the last branch that an overflow lets pass to the interrupt, at most.
const STEPS_OF_SKID: u64 = 12;

/// A vCPU made of the software CPU.
pub struct SimulatedVcpu {
    engine: SoftEngine,
    disturbance: Disturbance,
    random: Random,
    breakpoints: Vec<u64>,
    /// The instruction at this linear address executes, breakpoint or not.
    stepping_off: Option<u64>,
    /// RFLAGS.RF was set for the instruction at this linear address, as KVM's vCPU is stepped off.
    resuming: Option<u64>,
    queued_interrupt: Option<u8>,
    /// INT3 that came back is being delivered.
    passing: bool,
    window_wanted: bool,
    overflow: Overflow,
    kick: Due,
    /// A kick came with an exit: it strikes as soon as the guest is entered again.
    kick_pends: bool,
    signal: Due,
    forget: Due,
    access: Due,
    overcount: Due,
    overcounted: u64,
    refuse: Due,
    /// The last exit was for an instruction that was refused.
    refused: bool,
    /// Entries whose accessed bit was set.
    accessed_early: Vec<u64>,
    /// `tsc_offset` as it was set: hardware keeps its own.
    tsc_offset: u64,
    world_clock_ns: Arc<AtomicU64>,
}

/// The counter's interrupt.
#[derive(Clone, Copy, Debug)]
enum Overflow {
    Never,
    /// When the count of branches is this.
    At(u64),
    /// After so many more branches, and then steps.
    Late {
        branches_until: u64,
        steps: u64,
    },
}

/// Something that happens every now and then.
#[derive(Clone, Copy, Debug)]
struct Due {
    every: Option<u64>,
    /// The instruction count at which it is next.
    at: u64,
}

impl Due {
    fn every(every: Option<u64>, random: &mut Random) -> Self {
        let mut due = Self { every, at: u64::MAX };
        due.schedule(0, random);
        due
    }

    fn schedule(&mut self, now: u64, random: &mut Random) {
        self.at = self.every.map_or(u64::MAX, |mean| now + around(random, mean));
    }

    /// Whether it happens now, and then when next.
    fn happens(&mut self, now: u64, random: &mut Random) -> bool {
        let happens = now >= self.at;
        if happens {
            self.schedule(now, random);
        }
        happens
    }
}

impl SimulatedVcpu {
    /// A vCPU in the state of [`CpuState::default`] whose memory is `ram`.
    ///
    /// # Errors
    /// If the host refuses the memory for generated code.
    pub fn new(ram: GuestRam, disturbance: Disturbance) -> Result<Self, EngineError> {
        let mut engine = SoftEngine::new(ram)?;
        engine.count_conditional_branches(true);
        if disturbance.other_maker {
            engine.invert_undefined_flags(u64::MAX);
        }
        engine.set_time_base(TimeBase { tick: 0, ns: 0, ns_per_tick: 0 });
        let mut random = Random::new(disturbance.seed);
        Ok(Self {
            engine,
            breakpoints: Vec::with_capacity(MAX_BREAKPOINTS),
            stepping_off: None,
            resuming: None,
            queued_interrupt: None,
            passing: false,
            window_wanted: false,
            overflow: Overflow::Never,
            kick: Due::every(disturbance.kick_every, &mut random),
            kick_pends: false,
            signal: Due::every(disturbance.signal_every, &mut random),
            forget: Due::every(disturbance.forget_every, &mut random),
            access: Due::every(disturbance.access_every, &mut random),
            overcount: Due::every(disturbance.overcount_every, &mut random),
            overcounted: 0,
            refuse: Due::every(disturbance.refuse_every, &mut random),
            refused: false,
            accessed_early: Vec::new(),
            disturbance,
            random,
            tsc_offset: 0,
            world_clock_ns: Arc::default(),
        })
    }

    /// Leaves the time-stamp counter out of what CPUID says: what RDTSC reads is in no log.
    pub fn hide_time_stamp_counter(&mut self) {
        self.engine.hide_time_stamp_counter();
    }

    /// A clock of the world outside that goes on while the guest runs, by a nanosecond or so an
    /// instruction.
    pub fn world_clock_ns(&self) -> Arc<AtomicU64> {
        self.world_clock_ns.clone()
    }

    /// Instructions that have retired. Hardware tells nobody: for tests, which hold to it what others find.
    pub fn instruction_count(&self) -> u64 {
        self.engine.tick()
    }

    /// Page tables' entries of pages that no instruction had used when their accessed bit was set: guest-physical
    /// addresses, in order. Hardware tells nobody: for tests.
    pub fn accessed_early(&self) -> &[u64] {
        &self.accessed_early
    }

    /// The guest ran so many instructions.
    fn publish(&self, ran: u64) {
        self.world_clock_ns.fetch_add(ran, Ordering::Relaxed);
    }

    /// What the counter shows.
    fn branches(&self) -> u64 {
        self.engine.conditional_branches() + self.overcounted
    }

    /// What happens to hardware by itself here; whether a kick or another signal strikes.
    fn disturb(&mut self) -> Result<Option<VcpuExit>, EngineError> {
        let now = self.engine.tick();
        if self.forget.happens(now, &mut self.random) {
            self.engine.forget_translations();
        }
        if self.overcount.happens(now, &mut self.random) {
            self.overcounted += 1;
        }
        if self.access.happens(now, &mut self.random) {
            let state = self.engine.cpu_state()?;
            let spares = self.disturbance.spares_accessed_bits;
            let early = access_early(self.engine.ram(), &state, &mut self.random, spares);
            self.accessed_early.extend(early);
        }
        if self.signal.happens(now, &mut self.random) {
            return Ok(Some(VcpuExit::Interrupted { kicked: false }));
        }
        if !self.kick.happens(now, &mut self.random) {
            return Ok(None);
        }
        let most = STEPS_TO_KICK[self.random.below(4) as usize];
        let steps = self.random.below(most);
        let mut left = if std::mem::take(&mut self.kick_pends) { 0 } else { steps };
        while left > 0 {
            let at_once = if self.breakpoints.is_empty() { self.until_overflow() } else { 1 };
            let steps = left.min(at_once).max(1);
            left -= steps;
            let exit = self.step(true, steps);
            let overflow = || VcpuExit::Interrupted { kicked: false };
            let exit = exit.or_else(|| self.overflows().then(overflow));
            if exit.is_some() {
                // A kick that comes too late for this entry is not lost.
                (self.kick.at, self.kick_pends) = (self.engine.tick(), true);
                return Ok(exit);
            }
        }
        Ok(Some(VcpuExit::Interrupted { kicked: true }))
    }

    /// Whether the instruction at RIP is refused.
    fn refuses(&mut self) -> Result<bool, EngineError> {
        let now = self.engine.tick();
        if now < self.refuse.at || self.hits_breakpoint() {
            return Ok(false);
        }
        if self.window_wanted && self.engine.interruptible()? {
            // What is open comes first.
            return Ok(false);
        }
        let state = self.engine.cpu_state()?;
        let decoded = decode_at(self.engine.ram(), &state, state.rip);
        // INT3 and CPUID exit, and RDTSC is the processor's: none of them ever comes to an emulator.
        let is_never = |it: &Instruction| {
            matches!(it.mnemonic(), Mnemonic::Int3 | Mnemonic::Rdtsc | Mnemonic::Cpuid)
        };
        self.refused = !decoded.as_ref().is_none_or(is_never);
        if self.refused {
            self.refuse.schedule(now, &mut self.random);
        }
        Ok(self.refused)
    }

    /// Whether the counter's interrupt comes now.
    fn overflows(&mut self) -> bool {
        let branches = self.branches();
        if let Overflow::At(target) = self.overflow
            && branches >= target
        {
            let late = self.skid();
            let exact = self.disturbance.skid == Skid::UpTo(0);
            let steps = if exact { 0 } else { self.random.below(STEPS_OF_SKID) };
            self.overflow = Overflow::Late { branches_until: target + late, steps };
        }
        match &mut self.overflow {
            Overflow::Late { branches_until, .. } if branches < *branches_until => false,
            Overflow::Late { steps, .. } if *steps > 0 => {
                *steps -= 1;
                false
            }
            Overflow::Late { .. } => {
                self.overflow = Overflow::Never;
                true
            }
            Overflow::Never | Overflow::At(_) => false,
        }
    }

    fn skid(&mut self) -> u64 {
        match self.disturbance.skid {
            // The steps behind the last branch may be branches themselves.
            Skid::UpTo(most) => self.random.below(most.saturating_sub(STEPS_OF_SKID) + 1),
            Skid::Unbounded { usual, seldom } if self.random.one_in(seldom) => {
                usual * (10 + self.random.below(10))
            }
            Skid::Unbounded { usual, .. } => self.random.below(usual),
        }
    }

    /// Instructions that may run before the counter has to be looked at: a branch is at least one.
    fn until_overflow(&self) -> u64 {
        match self.overflow {
            Overflow::Never => u64::MAX,
            Overflow::At(at) | Overflow::Late { branches_until: at, .. } => {
                at.saturating_sub(self.branches())
            }
        }
    }

    /// Instructions that may run before anything has to be looked at but breakpoints.
    fn undisturbed(&self) -> u64 {
        let dues =
            [&self.kick, &self.signal, &self.forget, &self.access, &self.overcount, &self.refuse];
        let next = dues.map(|due| due.at).into_iter().min().unwrap_or(u64::MAX);
        next.saturating_sub(self.engine.tick()).min(self.until_overflow()).min(1 << 40)
    }

    /// Executes instructions one by one up to a breakpoint, but one at least and `most` at most; the
    /// delivery of a fault and, if `by_element`, an element of a REP count like one.
    fn step(&mut self, by_element: bool, most: u64) -> Option<VcpuExit> {
        if self.hits_breakpoint() {
            return Some(VcpuExit::Breakpoint);
        }
        // What is stepped off is a breakpoint again as soon as it has retired.
        let most = if self.stepping_off.is_some() { 1 } else { most.max(1) };
        let before = self.engine.tick();
        let exit = self.engine.step_until(by_element, most, &self.breakpoints);
        if self.engine.tick() != before {
            self.stepping_off = None;
        }
        exit.map(|exit| self.of_engine(exit)).or_else(|| self.watched_write())
    }

    /// An exit as a vCPU gives it.
    fn of_engine(&mut self, exit: Exit) -> VcpuExit {
        match exit {
            Exit::Kicked if self.engine.take_caught_breakpoint() => VcpuExit::BreakpointInstruction,
            Exit::Kicked => self.watched_write().unwrap_or(VcpuExit::Interrupted { kicked: true }),
            exit => of_engine(exit),
        }
    }

    /// The exit for a write that is watched, if there was one.
    fn watched_write(&mut self) -> Option<VcpuExit> {
        let writes = self.engine.take_watched_writes();
        (!writes.is_empty()).then_some(VcpuExit::WatchedWrite(writes))
    }

    fn resume_flag_is_ours(&self) -> bool {
        self.resuming == Some(self.engine.code_address())
    }

    /// Clears RFLAGS.RF if it is ours still.
    fn clear_resume_flag(&mut self) -> Result<(), EngineError> {
        if self.resume_flag_is_ours() && self.engine.resumes() {
            let state = self.engine.cpu_state()?;
            let rflags = state.rflags & !RFLAGS_RF;
            self.engine.retire_instruction(&CpuState { rflags, ..state });
        }
        self.resuming = None;
        Ok(())
    }

    fn hits_breakpoint(&self) -> bool {
        let engine = &self.engine;
        if self.breakpoints.is_empty() || engine.loaded_stack_segment() || engine.resumes() {
            return false;
        }
        let here = engine.code_address();
        self.stepping_off != Some(here) && self.breakpoints.contains(&here)
    }

    fn run(&mut self) -> Result<VcpuExit, EngineError> {
        loop {
            if let Some(exit) = self.disturb()? {
                return Ok(exit);
            }
            if self.overflows() {
                return Ok(VcpuExit::Interrupted { kicked: false });
            }
            if self.refuses()? {
                return Ok(VcpuExit::Unsupported("refused at random".to_owned()));
            }
            let exit = match self.undisturbed() {
                few if few <= 1 || !self.breakpoints.is_empty() => self.step(false, few),
                many => match self.engine.run(self.engine.tick() + many)? {
                    Exit::TickReached => None,
                    exit => Some(self.of_engine(exit)),
                },
            };
            if let Some(exit) = exit {
                return Ok(exit);
            }
        }
    }
}

fn of_engine(exit: Exit) -> VcpuExit {
    match exit {
        Exit::Access(access) => VcpuExit::Access(access),
        Exit::Halt => VcpuExit::Halt,
        Exit::InterruptWindow => VcpuExit::InterruptWindow,
        Exit::TripleFault => VcpuExit::TripleFault,
        Exit::Kicked => VcpuExit::Interrupted { kicked: true },
        Exit::Unsupported(reason) => VcpuExit::Unsupported(reason),
        Exit::TickReached | Exit::Overshot(_) => unreachable!("no exit of a vCPU"),
    }
}

impl SimulatedVcpu {
    /// What the guest does that KVM would not let it while there are breakpoints, as far as DR7 says.
    fn sets_breakpoints_itself(&mut self) -> Result<Option<VcpuExit>, EngineError> {
        if self.breakpoints.is_empty() {
            return Ok(None);
        }
        let state = self.engine.cpu_state()?;
        let sets = OwnDebugging::has_breakpoints(state.dr7);
        let refusal = || VcpuExit::Unsupported(OwnDebugging::Breakpoints.refusal(state.rip));
        Ok(sets.then(refusal))
    }

    fn enter_guest(&mut self) -> Result<VcpuExit, EngineError> {
        if std::mem::take(&mut self.passing) {
            // An exception that is queued is delivered before anything else, and no breakpoint hits.
            self.engine.pass_breakpoint_instruction();
            self.engine.set_interrupt_request(false);
            let exit = self.engine.step_until(false, 1, &[]);
            self.stepping_off = None;
            if let Some(exit) = exit {
                return Ok(self.of_engine(exit));
            }
        }
        if let Some(vector) = self.queued_interrupt.take() {
            // The window is open: it must not be given before the delivery.
            self.engine.inject(vector)?;
        }
        self.engine.set_interrupt_request(self.window_wanted);
        let before = self.engine.tick();
        if let Some(exit) = self.watched_write() {
            return Ok(exit);
        }
        if self.disturbance.time_stamp_runs {
            // The TSC of a machine that does other things as well.
            let ns = self.random.below(1 << 40);
            self.engine.set_time_base(TimeBase { tick: before, ns, ns_per_tick: 1 });
        }
        self.refused = false;
        let exit = self.run()?;
        self.publish(self.engine.tick() - before);
        if !matches!(exit, VcpuExit::Interrupted { .. }) {
            self.clear_resume_flag()?;
            if let Overflow::Late { .. } = self.overflow {
                // Its signal comes where the guest does not run, and interrupts nothing.
                self.overflow = Overflow::Never;
            }
        }
        Ok(exit)
    }
}

impl Vcpu for SimulatedVcpu {
    fn enter(&mut self) -> Result<VcpuExit, EngineError> {
        if let Some(refusal) = self.sets_breakpoints_itself()? {
            return Ok(refusal);
        }
        let debug_exceptions = self.engine.debug_exceptions();
        let exit = self.enter_guest()?;
        if !self.breakpoints.is_empty() && self.engine.debug_exceptions() != debug_exceptions {
            // KVM's guest would not have had it.
            let rip = self.engine.cpu_state()?.rip;
            return Ok(VcpuExit::Unsupported(OwnDebugging::Exception.refusal(rip)));
        }
        Ok(self.sets_breakpoints_itself()?.unwrap_or(exit))
    }

    fn finish_access(&mut self, value: u128) -> Result<bool, EngineError> {
        self.engine.finish_access(value)?;
        self.stepping_off = None;
        self.publish(1);
        Ok(!self.engine.amid_instruction())
    }

    fn conditional_branches(&mut self) -> Result<u64, EngineError> {
        Ok(self.branches())
    }

    fn set_overflow(&mut self, branches: Option<u64>) -> Result<(), EngineError> {
        let now = self.branches();
        self.overflow =
            branches.map_or(Overflow::Never, |branches| Overflow::At(now.saturating_add(branches)));
        Ok(())
    }

    fn set_breakpoints(&mut self, addresses: &[u64]) -> Result<(), EngineError> {
        assert!(addresses.len() <= MAX_BREAKPOINTS, "a CPU has four breakpoints");
        self.clear_resume_flag()?;
        self.breakpoints.clear();
        self.breakpoints.extend_from_slice(addresses);
        self.stepping_off = None;
        Ok(())
    }

    fn step_off(&mut self) -> Result<(), EngineError> {
        let here = self.engine.code_address();
        self.stepping_off = Some(here);
        let state = self.engine.cpu_state()?;
        // In a shadow no breakpoint hits, and the engine's would end with this.
        if !state.interrupt_shadow && state.rflags & RFLAGS_RF == 0 {
            self.resuming = Some(here);
            let rflags = state.rflags | RFLAGS_RF;
            self.engine.retire_instruction(&CpuState { rflags, ..state });
        }
        Ok(())
    }

    fn state(&mut self) -> Result<CpuState, EngineError> {
        let state = self.engine.cpu_state()?;
        let hidden = if self.resume_flag_is_ours() { RFLAGS_RF } else { 0 };
        let rflags = state.rflags & !hidden;
        Ok(CpuState { tsc_offset: self.tsc_offset, rflags, ..state })
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.tsc_offset = state.tsc_offset;
        (self.queued_interrupt, self.passing, self.resuming) = (None, false, None);
        self.engine.set_cpu_state(state)
    }

    fn interruptible(&mut self) -> Result<bool, EngineError> {
        Ok(self.queued_interrupt.is_none() && self.engine.interruptible()?)
    }

    fn set_window_request(&mut self, wanted: bool) {
        self.window_wanted = wanted;
    }

    fn inject(&mut self, vector: u8) -> Result<(), EngineError> {
        self.queued_interrupt = Some(vector);
        Ok(())
    }

    fn catch_breakpoint_instructions(&mut self, catch: bool) -> Result<(), EngineError> {
        self.engine.catch_breakpoint_instructions(catch);
        Ok(())
    }

    fn pass_breakpoint_instruction(&mut self) -> Result<(), EngineError> {
        self.passing = true;
        Ok(())
    }

    fn watch_writes(&mut self, physical: Range<u64>, watch: bool) -> Result<(), EngineError> {
        self.engine.watch_writes(physical, watch);
        Ok(())
    }

    fn retire_instruction(&mut self, after: &CpuState) -> Result<(), EngineError> {
        (self.stepping_off, self.resuming) = (None, None);
        self.engine.retire_instruction(after);
        Ok(())
    }

    fn write_ram(&mut self, address: u64, bytes: &[u8]) {
        self.engine.write_ram(address, bytes);
    }

    fn ram(&self) -> &GuestRam {
        self.engine.ram()
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.engine.kicker()
    }
}

impl RefusingVcpu for SimulatedVcpu {
    fn has_refused(&mut self) -> Result<bool, EngineError> {
        Ok(self.refused)
    }

    fn go_on(&mut self, before: &CpuState, after: &CpuState) -> Result<(), EngineError> {
        assert_eq!(&self.state()?, before, "it stands where it refused");
        (self.stepping_off, self.resuming, self.refused) = (None, None, false);
        self.tsc_offset = after.tsc_offset;
        self.engine.start_over(self.engine.tick(), after)
    }
}

/// A distance whose mean is about `mean`, often short and sometimes long.
fn around(random: &mut Random, mean: u64) -> u64 {
    let longest = match random.below(4) {
        0 => mean / 8,
        1 => mean,
        2 => mean * 2,
        _ => mean * 4,
    };
    1 + random.below(longest.max(1))
}
