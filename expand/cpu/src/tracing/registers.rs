//! Which registers an instruction writes, and which have changed beyond that.

use iced_x86::{CpuidFeature, Instruction, InstructionInfoFactory, OpAccess, Register};
use reprise_trace::cpu_state::CpuState;
use reprise_trace::instructions::register::{self, take_changes};
use reprise_trace::instructions::{Event, RegisterWrite};

use crate::cpu::{Cpu, SystemState};
use crate::decode::block_cache::Block;
use crate::decode::op::Op;
use crate::fault::Flow;

/// The registers as far as the trace has told of them.
#[derive(Debug)]
pub(super) struct Told {
    state: CpuState,
    /// The same of system registers, to be compared at once.
    system: SystemState,
}

/// What is to be told of an instruction's registers whenever it retires.
#[derive(Clone, Debug, Default)]
pub(crate) struct OpRegisters {
    /// Numbers, in order.
    pub(super) written: Box<[u8]>,
    /// It may change the state of the x87 or MXCSR.
    has_fpu: bool,
}

impl OpRegisters {
    /// Those of an instruction, which ends its block as a branch or not.
    pub(super) fn of(
        instruction: &Instruction,
        branches: bool,
        info: &mut InstructionInfoFactory,
    ) -> Self {
        let used = info.info(instruction);
        let is_written = |access: OpAccess| {
            use OpAccess::{CondWrite, ReadCondWrite, ReadWrite, Write};
            matches!(access, Write | CondWrite | ReadWrite | ReadCondWrite)
        };
        let registers = used.used_registers().iter().filter(|used| is_written(used.access()));
        let mut written: Vec<u8> = registers.filter_map(|used| number(used.register())).collect();
        if instruction.rflags_modified() != 0 {
            written.push(register::RFLAGS);
        }
        if branches {
            written.push(register::RIP);
        }
        written.sort_unstable();
        written.dedup();
        let has_fpu = !instruction.cpuid_features().iter().all(|feature| is_integer(*feature));
        Self { written: written.into_boxed_slice(), has_fpu }
    }

    /// As a block's definition has them.
    pub(super) fn writes(&self) -> Vec<RegisterWrite> {
        let write = |register| RegisterWrite { register, words: register::words(register) };
        self.written.iter().copied().map(write).collect()
    }
}

/// The number of a register that instructions write whenever they retire; all others are told as they
/// change.
fn number(register: Register) -> Option<u8> {
    let full = register.full_register();
    if register.is_gpr() {
        Some(full.number() as u8)
    } else if register.is_xmm() {
        Some(register::XMM0 + register.number() as u8)
    } else {
        None
    }
}

/// Whether instructions with this feature leave the x87 and MXCSR alone.
fn is_integer(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    matches!(
        feature,
        F::INTEL8086
            | F::INTEL8086_ONLY
            | F::INTEL186
            | F::INTEL286
            | F::INTEL286_ONLY
            | F::INTEL386
            | F::INTEL386_ONLY
            | F::INTEL486
            | F::X64
            | F::CMOV
            | F::CX8
            | F::CMPXCHG16B
            | F::CPUID
            | F::MULTIBYTENOP
            | F::PAUSE
            | F::POPCNT
            | F::SMAP
            | F::SYSCALL
    )
}

impl Told {
    pub(super) fn new(cpu: &Cpu) -> Self {
        Self { state: cpu.state(), system: cpu.system.clone() }
    }
}

impl Cpu {
    /// Notes the registers that an operation wrote, and those that have changed beside.
    pub(super) fn trace_registers(&mut self, block: &Block, op: &Op, flow: Flow) {
        let Some(mut told) = self.tracer.as_mut().and_then(|tracer| tracer.told.take()) else {
            return;
        };
        let registers = &block.trace_of(op).registers;
        if flow.retires() {
            let is_last = usize::from(op.number) + 1 == block.ops.len();
            let branched = is_last && block.ends_in_branch;
            told.state.rip = if branched { self.rip } else { op.next_rip(self) };
            for number in &registers.written {
                let value = match *number {
                    register::RIP => [told.state.rip, 0],
                    register::RFLAGS => {
                        told.state.rflags = self.rflags();
                        [told.state.rflags, 0]
                    }
                    number if number < register::RIP => {
                        let index = usize::from(number);
                        told.state.gpr[index] = self.registers.gpr[index];
                        [told.state.gpr[index], 0]
                    }
                    number => {
                        let index = usize::from(number - register::XMM0);
                        let value = self.registers.xmm[index];
                        told.state.fpu.xmm[index] = value;
                        [value as u64, (value >> 64) as u64]
                    }
                };
                if let Some(tracer) = &mut self.tracer {
                    let words = usize::from(register::words(*number));
                    tracer.batch.registers.extend_from_slice(&value[..words]);
                }
            }
        }
        self.tell_changes(&mut told);
        if registers.has_fpu {
            let mut now =
                CpuState { fpu: self.fpu.live_state(&self.registers.xmm), ..self.state() };
            let fpu = register::X87_STATE..=register::MXCSR;
            self.tell(&mut told.state, &mut now, fpu);
        }
        if let Some(tracer) = &mut self.tracer {
            tracer.told = Some(told);
        }
    }

    /// Between runs, or at the trace's end: notes what deliveries have changed.
    pub(super) fn trace_registers_between(&mut self) {
        let Some(mut told) = self.tracer.as_mut().and_then(|tracer| tracer.told.take()) else {
            return;
        };
        self.tell_changes(&mut told);
        if told.state.rip != self.rip {
            told.state.rip = self.rip;
            let value = [self.rip, 0];
            self.trace_event(Event::Register { register: register::RIP, value });
        }
        if let Some(tracer) = &mut self.tracer {
            tracer.told = Some(told);
        }
    }

    /// Notes all that differs from what was told, but RIP, x87 and MXCSR.
    fn tell_changes(&mut self, told: &mut Told) {
        let state = &told.state;
        let same_registers = self.registers.gpr[..16] == state.gpr
            && self.rflags() == state.rflags
            && self.interrupt_shadow == state.interrupt_shadow
            && self.registers.xmm == state.fpu.xmm;
        if same_registers && told.system == self.system {
            return;
        }
        told.system.clone_from(&self.system);
        let mut now = self.state();
        let general = (0..=register::LAST_SYSTEM).filter(|number| *number != register::RIP);
        let others = [register::INTERRUPT_SHADOW].into_iter().chain(register::XMM0..register::END);
        self.tell(&mut told.state, &mut now, general.chain(others));
    }

    fn tell(
        &mut self,
        told: &mut CpuState,
        now: &mut CpuState,
        registers: impl Iterator<Item = u8>,
    ) {
        take_changes(told, now, registers, |register, value| {
            self.trace_event(Event::Register { register, value });
        });
    }

    /// Notes that the CPU has halted, or been woken.
    pub(crate) fn trace_halted(&mut self, halted: bool) {
        let wanted = self.tracer.as_mut().and_then(|tracer| tracer.told.as_mut());
        if let Some(told) = wanted
            && std::mem::replace(&mut told.state.halted, halted) != halted
        {
            let value = [u64::from(halted), 0];
            self.trace_event(Event::Register { register: register::HALTED, value });
        }
    }
}
