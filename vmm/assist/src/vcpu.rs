//! [`AssistedVcpu`]: a vCPU, and the software CPU for what it refuses.

use std::ops::Range;

use reprise_branch_clock::ask_vcpu_within;
use reprise_branch_clock::vcpu::{RefusingVcpu, Vcpu, VcpuExit};
use reprise_machine::engine::{EngineError, Exit};
use reprise_trace::cpu_state::CpuState;
use reprise_trace::event::Assists;

use crate::assistant::{Assistant, Came, Executed};

/// A vCPU that refuses some instructions, and the software CPU that executes those.
pub struct AssistedVcpu<V> {
    vcpu: V,
    assistant: Assistant,
    /// Writes of a refused instruction that are watched, and that nobody has been told of: its last access was
    /// answered behind them.
    written: Vec<Range<u64>>,
}

impl<V: RefusingVcpu> AssistedVcpu<V> {
    /// `vcpu`, assisted.
    pub fn new(vcpu: V) -> Self {
        Self { vcpu, assistant: Assistant::default(), written: Vec::new() }
    }

    /// The vCPU itself.
    pub fn inner(&self) -> &V {
        &self.vcpu
    }

    fn proceed(&mut self, came: Came) -> Result<VcpuExit, EngineError> {
        let exit = match came {
            Came::Over(executed) => self.go_on(*executed)?,
            Came::Exit(exit) => Some(exit),
        };
        Ok(match exit {
            Some(Exit::Access(access)) => VcpuExit::Access(access),
            Some(Exit::Unsupported(reason)) => VcpuExit::Unsupported(reason),
            Some(Exit::Halt) => VcpuExit::Halt,
            Some(Exit::TripleFault) => VcpuExit::TripleFault,
            // It stands behind the instruction, as if a signal had come there.
            _ => self.watched_write().unwrap_or(VcpuExit::Interrupted { kicked: false }),
        })
    }

    /// The vCPU goes on behind an instruction.
    fn go_on(&mut self, executed: Executed) -> Result<Option<Exit>, EngineError> {
        self.vcpu.go_on(&executed.before, &executed.after)?;
        self.written = self.assistant.take_watched_writes();
        Ok(executed.exit)
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
        if let Some(came) = self.assistant.go_on()? {
            return self.proceed(came);
        }
        let exit = self.vcpu.enter()?;
        let VcpuExit::Unsupported(reason) = exit else { return Ok(exit) };
        if !self.vcpu.has_refused()? {
            return Ok(VcpuExit::Unsupported(reason));
        }
        let state = self.vcpu.state()?;
        let came = self.assistant.begin(self.vcpu.ram(), 0, state, reason)?;
        self.proceed(came)
    }

    fn finish_access(&mut self, value: u128) -> Result<bool, EngineError> {
        if !self.assistant.is_amid() {
            return self.vcpu.finish_access(value);
        }
        let executed = self.assistant.finish_access(value)?;
        let is_over = executed.is_some();
        executed.map(|executed| self.go_on(*executed)).transpose()?;
        Ok(is_over)
    }

    fn conditional_branches(&mut self) -> Result<u64, EngineError> {
        Ok(self.vcpu.conditional_branches()? + self.assistant.conditional_branches())
    }

    fn interruptible(&mut self) -> Result<bool, EngineError> {
        Ok(!self.assistant.is_amid() && self.vcpu.interruptible()?)
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.assistant.give_up();
        self.written.clear();
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
