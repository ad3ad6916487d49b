//! IN, OUT, INS and OUTS. The board answers each access, after which the instruction runs again and
//! finds the answer.

use iced_x86::{Mnemonic, OpKind};
use reprise_machine::engine::Access;
use reprise_trace::cpu_state::{ES, RAX, RDI, RDX, RSI};

use super::string::{advance, counter, index_mask, set_counter, string_segment};
use super::{BlockEnd, handler};
use crate::cpu::Cpu;
use crate::decode::op::{Handler, Op};
use crate::fault::Stop;
use crate::mode::Mode;

pub(super) fn select(op: &mut Op, _mode: Mode) -> Option<BlockEnd> {
    let instruction = &*op.instruction;
    let (handler, detail): (Handler, u32) = match instruction.mnemonic() {
        // Which operand holds the value; for the string forms, the element's bytes.
        Mnemonic::In => (port_in, 0),
        Mnemonic::Out => (port_out, 1),
        Mnemonic::Insb => (string_in, 1),
        Mnemonic::Insw => (string_in, 2),
        Mnemonic::Insd => (string_in, 4),
        Mnemonic::Outsb => (string_out, 1),
        Mnemonic::Outsw => (string_out, 2),
        Mnemonic::Outsd => (string_out, 4),
        _ => return None,
    };
    match instruction.mnemonic() {
        Mnemonic::In | Mnemonic::Out => {
            op.size = instruction.op_register(detail).size() as u8;
            let port_operand = 1 - detail;
            // A port in DX, or in the instruction.
            op.a = u8::from(instruction.op_kind(port_operand) == OpKind::Register);
            if instruction.op_kind(port_operand) != OpKind::Register {
                op.immediate = u64::from(instruction.immediate8());
            }
        }
        _ => {
            op.size = detail as u8;
            op.b = string_segment(instruction);
            op.address_mask = index_mask(instruction);
        }
    }
    op.handler = handler;
    // The board may raise an interrupt at once, so the block ends here.
    Some(BlockEnd::After)
}

fn port(cpu: &Cpu, op: &Op) -> u16 {
    if op.a == 1 { cpu.registers.gpr[RDX] as u16 } else { op.immediate as u16 }
}

handler!(port_in(cpu, op) {
    let port = port(cpu, op);
    cpu.check_io(port, op.size)?;
    let value = cpu.board(Access::PortRead { port, size: op.size })? as u64;
    match op.size {
        1 => {
            let rax = &mut cpu.registers.gpr[RAX];
            *rax = *rax & !0xff | value & 0xff;
        }
        size => cpu.set_general(RAX, value, u64::from(size)),
    }
    Ok(())
});
handler!(port_out(cpu, op) {
    let port = port(cpu, op);
    cpu.check_io(port, op.size)?;
    let value = cpu.registers.gpr[RAX] as u32 & size_mask(op.size);
    cpu.board(Access::PortWrite { port, size: op.size, value })?;
    Ok(())
});

fn size_mask(size: u8) -> u32 {
    u32::MAX >> (32 - 8 * u32::from(size))
}

fn repeated(op: &Op) -> bool {
    op.instruction.has_rep_prefix() || op.instruction.has_repne_prefix()
}

handler!(string_in(cpu, op) {
    repeat(cpu, op, |cpu, op, port| {
        let offset = cpu.registers.gpr[RDI] & op.address_mask;
        let size = u64::from(op.size);
        let linear = cpu.segment_address(ES as u8, offset, size, true)?;
        cpu.check_store(linear, ES as u8, size)?;
        let value = cpu.board(Access::PortRead { port, size: op.size })? as u64;
        match op.size {
            1 => cpu.store(linear, ES as u8, value as u8)?,
            2 => cpu.store(linear, ES as u8, value as u16)?,
            _ => cpu.store(linear, ES as u8, value as u32)?,
        }
        advance(cpu, op, RDI);
        Ok(())
    })?;
    cpu.stored()
});
handler!(string_out(cpu, op) {
    repeat(cpu, op, |cpu, op, port| {
        let offset = cpu.registers.gpr[RSI] & op.address_mask;
        let linear = cpu.segment_address(op.b, offset, u64::from(op.size), false)?;
        let value = match op.size {
            1 => u32::from(cpu.load::<u8>(linear, op.b)?),
            2 => u32::from(cpu.load::<u16>(linear, op.b)?),
            _ => cpu.load::<u32>(linear, op.b)?,
        };
        cpu.board(Access::PortWrite { port, size: op.size, value })?;
        advance(cpu, op, RSI);
        Ok(())
    })
});

/// Runs one element, or as many as RCX says. Each finished element is there to stay: the board has
/// seen it.
fn repeat(
    cpu: &mut Cpu,
    op: &Op,
    element: fn(&mut Cpu, &Op, u16) -> Result<(), Stop>,
) -> Result<(), Stop> {
    let port = cpu.registers.gpr[RDX] as u16;
    cpu.check_io(port, op.size)?;
    if !repeated(op) {
        return element(cpu, op, port);
    }
    while counter(cpu, op) != 0 {
        element(cpu, op, port)?;
        set_counter(cpu, op, counter(cpu, op).wrapping_sub(1));
        cpu.forget_answers();
        cpu.between_elements(counter(cpu, op))?;
    }
    Ok(())
}
