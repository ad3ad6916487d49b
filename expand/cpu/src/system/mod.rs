//! System state: segments, exceptions and interrupts, far transfers, control registers, MSRs.

mod control_registers;
pub(crate) mod debug;
pub(crate) mod deliver;
mod descriptor_tables;
mod far_transfer;
mod fast_system_call;
mod interrupt_return;
mod io_permission;
mod model_specific;
pub(crate) mod segment;
mod segment_instructions;
mod software_interrupt;

use iced_x86::{Mnemonic, OpKind};
use reprise_machine::engine::Exit;

use crate::cpu::Cpu;
use crate::decode::op::{Handler, Op};
use crate::fault::{Fault, Stop};
use crate::flags;
use crate::mode::Mode;
use crate::ops::{BlockEnd, handler, raise_ud};

/// Chooses what runs a system instruction.
pub(crate) fn select(op: &mut Op, mode: Mode) -> Option<BlockEnd> {
    const FAMILIES: &[fn(&mut Op, Mode) -> Option<BlockEnd>] = &[
        segment_instructions::select,
        descriptor_tables::select,
        far_transfer::select,
        interrupt_return::select,
        software_interrupt::select,
        fast_system_call::select,
        control_registers::select,
        debug::select,
        model_specific::select,
    ];
    FAMILIES.iter().find_map(|family| family(op, mode)).or_else(|| select_single(op))
}

/// Instructions that are a family of their own.
fn select_single(op: &mut Op) -> Option<BlockEnd> {
    let (handler, end): (Handler, BlockEnd) = match op.instruction.mnemonic() {
        Mnemonic::Hlt => (halt, BlockEnd::After),
        // Rights are looked up at each access, so the block goes on.
        Mnemonic::Clac => (clear_alignment_check, BlockEnd::After),
        Mnemonic::Stac => (set_alignment_check, BlockEnd::After),
        Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2 | Mnemonic::Rsm => {
            (raise_ud, BlockEnd::Branch)
        }
        _ => return None,
    };
    op.handler = handler;
    Some(end)
}

handler!(halt(cpu, _op) {
    cpu.require_level_0()?;
    if cpu.rflags_rest & flags::TF != 0 {
        return Ok(()); // The single-step trap that follows would wake it at once.
    }
    cpu.pending_exit = Some(Exit::Halt);
    Err(Stop::RetiredExit)
});
handler!(clear_alignment_check(cpu, _op) {
    cpu.set_alignment_flag(false)
});
handler!(set_alignment_check(cpu, _op) {
    cpu.set_alignment_flag(true)
});

impl Cpu {
    /// CLAC and STAC.
    fn set_alignment_flag(&mut self, on: bool) -> Result<(), Stop> {
        if self.cpl != 0 {
            return self.fault(Fault::UD);
        }
        self.rflags_rest = self.rflags_rest & !flags::AC | if on { flags::AC } else { 0 };
        self.update_memory_mode();
        Ok(())
    }

    /// #GP(0) unless at privilege level 0.
    fn require_level_0(&mut self) -> Result<(), Stop> {
        if self.cpl == 0 { Ok(()) } else { self.fault(Fault::GP0) }
    }

    /// Gives up on an instruction that this CPU does not execute; `what` names it for a person.
    pub(crate) fn unsupported<T>(&mut self, what: &str) -> Result<T, Stop> {
        self.pending_exit = Some(Exit::Unsupported(format!(
            "the guest uses {what}, which this machine does not execute: run a guest that does not"
        )));
        Err(Stop::Exit)
    }

    /// Loads `size_bytes` (2, 4 or 8), zero-extended.
    fn load_sized(&mut self, linear: u64, segment: u8, size_bytes: u64) -> Result<u64, Stop> {
        Ok(match size_bytes {
            8 => self.load::<u64>(linear, segment)?,
            4 => u64::from(self.load::<u32>(linear, segment)?),
            _ => u64::from(self.load::<u16>(linear, segment)?),
        })
    }

    /// The low 16 bits of a register or memory operand.
    fn word_operand(&mut self, op: &Op, operand: u32) -> Result<u16, Stop> {
        if op.instruction.op_kind(operand) == OpKind::Register {
            let register = op.instruction.op_register(operand);
            return Ok(self.registers.gpr[register.number()] as u16);
        }
        let linear = op.linear_address(self);
        self.load(linear, op.segment)
    }

    /// Writes the first operand: a register of `op.size` bytes, or 16 bits of memory.
    fn store_low(&mut self, op: &Op, value: u64) -> Result<(), Stop> {
        if op.instruction.op0_kind() == OpKind::Register {
            let number = op.instruction.op0_register().number();
            self.set_general(number, value, u64::from(op.size));
            return Ok(());
        }
        let linear = op.linear_address(self);
        self.store(linear, op.segment, value as u16)?;
        self.stored()
    }
}
