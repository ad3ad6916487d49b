//! The software CPU as an engine of the machine.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use reprise_machine::clock::TimeBase;
use reprise_machine::engine::{Access, Engine, EngineError, Exit, FlagKick, Kick};
use reprise_machine::ram::GuestRam;
use reprise_trace::checkpoint::{EngineState, HiddenState};
use reprise_trace::cpu_state::{CpuState, RCX};
use reprise_trace::event::HandOver;
use reprise_trace::instructions::{Contents, Position};
use reprise_trace::moment::{Moment, TickKind};

use crate::cpu::{AnsweredAccess, Cpu};
use crate::flags::Arithmetic;
use crate::latitude_sites::Sites;
use crate::native::host_fpu::with_guest_fpu;
use crate::profile::Profile;
use crate::tracing::BatchSink;
use crate::translate::Translation;

/// Executes the guest in software, counting instructions.
#[derive(Debug)]
pub struct SoftEngine {
    cpu: Box<Cpu>,
    kick: Arc<AtomicBool>,
    interrupt_requested: bool,
    halted: bool,
    /// Which flags are undefined must be known.
    knows_undefined_flags: bool,
    /// RDTSC reads zero.
    pub(crate) time_stands_still: bool,
    /// The access that the machine has been handed and not yet finished.
    unfinished: Option<Access>,
    /// What finishing the last access led to, for the next run to hand over.
    queued: Option<Exit>,
}

impl SoftEngine {
    /// An engine that owns `ram`.
    ///
    /// # Errors
    /// If the host refuses the memory for generated code.
    pub fn new(ram: GuestRam) -> Result<Self, EngineError> {
        let cpu = Cpu::new(ram).map_err(|error| EngineError {
            what: format!("the host refuses memory for generated code: {error}"),
        })?;
        Ok(Self {
            cpu,
            kick: Arc::default(),
            interrupt_requested: false,
            halted: false,
            knows_undefined_flags: false,
            time_stands_still: false,
            unfinished: None,
            queued: None,
        })
    }

    /// Has [`Engine::undefined_flags`] know them, of what runs from here on, which costs speed: for
    /// comparisons with what another CPU recorded. To be called before the guest first runs.
    pub fn know_undefined_flags(&mut self) {
        self.knows_undefined_flags = true;
        self.cpu.other_maker.notes_counts = true;
    }

    /// Instructions in the code that has run whose results the architecture leaves to makers of CPUs.
    pub fn latitude_sites(&self) -> Vec<Sites> {
        self.cpu.latitude_sites.to_vec()
    }

    /// Starts to count where time goes.
    pub fn start_profile(&mut self) {
        self.cpu.profile = Some(Box::default());
    }

    /// What has been counted since [`SoftEngine::start_profile`].
    pub fn profile(&self) -> Option<Profile> {
        let mut profile = self.cpu.profile.as_deref()?.clone();
        profile.page_walks = self.cpu.memory.page_walks;
        Some(profile)
    }

    /// Where a trace that starts here begins.
    pub fn trace_position(&self) -> Position {
        self.cpu.trace_position()
    }

    /// Traces everything that the guest executes from here on.
    /// Values of accesses or registers make it run instruction by instruction.
    pub fn start_trace(&mut self, sink: Box<dyn BatchSink>, contents: Contents) {
        self.cpu.start_trace(sink, contents);
    }

    /// Ends the trace; the sink gets what is left. Without a trace nothing happens.
    pub fn stop_trace(&mut self) {
        self.cpu.stop_trace();
    }

    /// Chooses when blocks are translated from now on.
    pub fn set_translation(&mut self, translation: Translation) {
        if let Some(translator) = &mut self.cpu.translator {
            translator.set_translation(translation);
        }
    }

    fn expect_trace_taken(&self) -> Result<(), EngineError> {
        if self.cpu.trace_is_refused() {
            let what = "whoever takes the trace wants no more of it".to_owned();
            return Err(EngineError { what });
        }
        Ok(())
    }

    pub(crate) fn cpu(&self) -> &Cpu {
        &self.cpu
    }

    pub(crate) fn cpu_mut(&mut self) -> &mut Cpu {
        &mut self.cpu
    }

    pub(crate) fn has_queued_exit(&self) -> bool {
        self.queued.is_some()
    }

    pub(crate) fn interrupt_is_requested(&self) -> bool {
        self.interrupt_requested
    }

    /// Hands over the exit that waits, that of an interrupt window, or else what `step` comes to.
    pub(crate) fn next_exit(
        &mut self,
        step: impl FnOnce(&mut Cpu) -> Option<Exit>,
    ) -> Option<Exit> {
        assert!(self.unfinished.is_none(), "the last access is finished before the guest runs on");
        let exit = match self.queued.take() {
            Some(exit) => Some(exit),
            None if self.interrupt_requested && self.cpu.interruptible() => {
                Some(Exit::InterruptWindow)
            }
            None => step(&mut self.cpu),
        };
        exit.map(|exit| self.hand_over(exit))
    }

    fn hand_over(&mut self, exit: Exit) -> Exit {
        match &exit {
            Exit::Access(access) => self.unfinished = Some(*access),
            Exit::Halt => {
                self.halted = true;
                self.cpu.trace_halted(true);
            }
            _ => {}
        }
        exit
    }
}

impl Engine for SoftEngine {
    fn tick_kind(&self) -> TickKind {
        TickKind::Instruction
    }

    fn tick(&self) -> u64 {
        self.cpu.tick
    }

    fn run(&mut self, until: u64) -> Result<Exit, EngineError> {
        assert!(self.unfinished.is_none(), "the last access is finished before the guest runs on");
        assert!(until >= self.cpu.tick, "tick {until} has passed");
        if let Some(exit) = self.queued.take() {
            // A repeated instruction may ask the board any number of times.
            self.cpu.keep_trace_moving();
            self.expect_trace_taken()?;
            return Ok(self.hand_over(exit));
        }
        assert!(!self.halted, "a halted guest runs only after an interrupt");
        if self.knows_undefined_flags {
            self.cpu.trace_for_flags();
        }
        let (kick, requested) = (&self.kick, self.interrupt_requested);
        let exit = with_guest_fpu(&mut self.cpu, |cpu| cpu.execute(until, kick, requested));
        // A kick comes when it comes, and the trace is to be the same each time.
        if exit != Exit::Kicked {
            self.cpu.mark_trace();
        }
        self.expect_trace_taken()?;
        Ok(self.hand_over(exit))
    }

    fn finish_access(&mut self, value: u128) -> Result<(), EngineError> {
        let access = self.unfinished.take().expect("an access is waiting");
        self.cpu.answered.push(AnsweredAccess { access, value });
        // The instruction runs again from its start and finds the answer; it may ask for another.
        self.queued = with_guest_fpu(&mut self.cpu, |cpu| cpu.execute_one());
        Ok(())
    }

    fn interruptible(&mut self) -> Result<bool, EngineError> {
        Ok(self.queued.is_none() && self.cpu.interruptible())
    }

    fn set_interrupt_request(&mut self, wanted: bool) {
        self.interrupt_requested = wanted;
    }

    fn inject(&mut self, vector: u8) -> Result<(), EngineError> {
        assert!(self.cpu.interruptible(), "the guest takes no interrupt here");
        self.halted = false;
        self.cpu.trace_halted(false);
        if self.cpu.deliver_interrupt(vector).is_err() {
            self.queued = Some(self.cpu.pending_exit.take().unwrap_or(Exit::TripleFault));
        }
        Ok(())
    }

    fn set_time_base(&mut self, base: TimeBase) {
        self.cpu.trace_time(match self.time_stands_still {
            true => TimeBase { tick: base.tick, ns: 0, ns_per_tick: 0 },
            false => base,
        });
    }

    fn moment(&mut self) -> Result<Moment, EngineError> {
        let cpu = &self.cpu;
        Ok(Moment { tick: cpu.tick, rip: cpu.rip, rcx: cpu.registers.gpr[RCX] })
    }

    fn cpu_state(&mut self) -> Result<CpuState, EngineError> {
        Ok(CpuState { halted: self.halted, ..self.cpu.state() })
    }

    fn set_cpu_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.halted = state.halted;
        self.cpu.set_state(state);
        Ok(())
    }

    fn undefined_flags(&mut self) -> u64 {
        self.cpu.undefined_flags()
    }

    fn set_undefined_flags(&mut self, rflags: u64) -> Result<(), EngineError> {
        self.cpu.registers.arithmetic = Arithmetic::from_rflags(rflags);
        Ok(())
    }

    fn read_ram(&self, address: u64, bytes: &mut [u8]) {
        self.cpu.memory.physical.ram().read(address, bytes);
    }

    fn visit_ram(&self, visit: &mut dyn FnMut(u64, &[u8])) {
        self.cpu.memory.physical.ram().visit(visit);
    }

    fn start_capture(&mut self, _visit: &mut dyn FnMut(u64, &[u8])) {
        self.cpu.memory.start_capture();
    }

    fn continue_capture(&mut self, max_pages: usize, visit: &mut dyn FnMut(u64, &[u8])) -> bool {
        self.cpu.memory.physical.continue_capture(max_pages, visit)
    }

    fn save(&mut self) -> Result<Option<EngineState>, EngineError> {
        if self.unfinished.is_some() || self.queued.is_some() {
            return Ok(None);
        }
        let (tick, cpu) = (self.cpu.tick, self.cpu_state()?);
        Ok(Some(EngineState { tick, cpu, hidden: self.cpu.hidden_state() }))
    }

    fn restore(&mut self, state: &EngineState) -> Result<(), EngineError> {
        (self.unfinished, self.queued) = (None, None);
        self.interrupt_requested = false;
        self.halted = state.cpu.halted;
        self.cpu.restore(state).map_err(|what| EngineError { what })
    }

    fn become_engine(&mut self, to: &HandOver) -> Result<bool, EngineError> {
        if to.tick_kind != self.tick_kind() {
            return Ok(false);
        }
        // The engine that took over there knew nothing but the state.
        let hidden = HiddenState { engine: String::new(), version: 0, bytes: Vec::new() };
        let (tick, cpu) = (self.cpu.tick, self.cpu_state()?);
        self.restore(&EngineState { tick, cpu, hidden })?;
        Ok(true)
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::new(FlagKick(self.kick.clone()))
    }
}
