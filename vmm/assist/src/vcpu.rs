//! [`AssistedVcpu`]: a vCPU, and the software CPU for what it refuses.

use std::ops::Range;

use reprise_branch_clock::ask_vcpu_within;
use reprise_branch_clock::vcpu::{RefusingVcpu, Vcpu, VcpuExit};
use reprise_machine::engine::{Engine, EngineError, Exit};
use reprise_trace::cpu_state::CpuState;
use reprise_trace::event::Assists;

use crate::assistant::{Assistant, refused_by_both};

/// A vCPU that refuses some instructions, and the software CPU that executes those.
pub struct AssistedVcpu<V> {
    vcpu: V,
    assistant: Assistant,
    /// The state before a refused instruction of which the board is asked something.
    amid: Option<Box<CpuState>>,
    /// Writes of a refused instruction that are watched, and that nobody has been told of: its last access was
    /// answered behind them.
    written: Vec<Range<u64>>,
}

impl<V: RefusingVcpu> AssistedVcpu<V> {
    /// `vcpu`, assisted.
    pub fn new(vcpu: V) -> Self {
        Self { vcpu, assistant: Assistant::default(), amid: None, written: Vec::new() }
    }

    /// The vCPU itself.
    pub fn inner(&self) -> &V {
        &self.vcpu
    }

    /// The instruction that began at this state has come to `exit`, or is over.
    fn proceed(
        &mut self,
        begun: Box<CpuState>,
        exit: Option<Exit>,
        reason: Option<String>,
    ) -> Result<VcpuExit, EngineError> {
        match exit {
            Some(Exit::Access(access)) => {
                self.amid = Some(begun);
                return Ok(VcpuExit::Access(access));
            }
            Some(Exit::Unsupported(too)) => {
                return Ok(VcpuExit::Unsupported(refused_by_both(reason, too)));
            }
            _ => {}
        }
        let after = self.assistant.cpu().cpu_state()?;
        self.vcpu.go_on(&begun, &after)?;
        self.written = self.assistant.cpu().take_watched_writes();
        Ok(match exit {
            Some(Exit::Halt) => VcpuExit::Halt,
            Some(Exit::TripleFault) => VcpuExit::TripleFault,
            // It stands behind the instruction, as if a signal had come there.
            _ => self.watched_write().unwrap_or(VcpuExit::Interrupted { kicked: false }),
        })
    }

    /// The exit for a write that is watched, if there was one.
    fn watched_write(&mut self) -> Option<VcpuExit> {
        let written = std::mem::take(&mut self.written);
        (!written.is_empty()).then_some(VcpuExit::WatchedWrite(written))
    }
}

impl<V: RefusingVcpu> Vcpu for AssistedVcpu<V> {
    ask_vcpu_within! {
        vcpu: set_overflow, set_breakpoints, step_off, state, set_window_request, inject,
        catch_breakpoint_instructions, pass_breakpoint_instruction, retire_instruction, write_ram, ram, kicker
    }

    fn enter(&mut self) -> Result<VcpuExit, EngineError> {
        if let Some(exit) = self.watched_write() {
            return Ok(exit);
        }
        if let Some(begun) = self.amid.take() {
            let exit = self.assistant.cpu().step(false);
            return self.proceed(begun, exit, None);
        }
        let exit = self.vcpu.enter()?;
        let VcpuExit::Unsupported(reason) = exit else { return Ok(exit) };
        if !self.vcpu.has_refused()? {
            return Ok(VcpuExit::Unsupported(reason));
        }
        let state = self.vcpu.state()?;
        let exit = self.assistant.begin(self.vcpu.ram(), 0, &state)?;
        self.proceed(Box::new(state), exit, Some(reason))
    }

    fn finish_access(&mut self, value: u128) -> Result<bool, EngineError> {
        let Some(begun) = self.amid.take() else { return self.vcpu.finish_access(value) };
        let cpu = self.assistant.cpu();
        cpu.finish_access(value)?;
        if cpu.amid_instruction() {
            // What else the instruction wants the next entry gives.
            self.amid = Some(begun);
            return Ok(false);
        }
        if let VcpuExit::WatchedWrite(written) = self.proceed(begun, None, None)? {
            self.written = written;
        }
        Ok(true)
    }

    fn conditional_branches(&mut self) -> Result<u64, EngineError> {
        Ok(self.vcpu.conditional_branches()? + self.assistant.conditional_branches())
    }

    fn interruptible(&mut self) -> Result<bool, EngineError> {
        Ok(self.amid.is_none() && self.vcpu.interruptible()?)
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        (self.amid, self.written) = (None, Vec::new());
        self.vcpu.set_state(state)
    }

    fn watch_writes(&mut self, physical: Range<u64>, watch: bool) -> Result<(), EngineError> {
        self.assistant.watch_writes(physical.clone(), watch);
        self.vcpu.watch_writes(physical, watch)
    }

    fn assists(&self) -> Assists {
        self.assistant.assists().clone()
    }
}
