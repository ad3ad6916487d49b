//! MASKMOVQ and MASKMOVDQU: stores of chosen bytes at the address in RDI, which no operand names.

use iced_x86::{Mnemonic, OpKind};

use super::{BlockEnd, handler};
use crate::cpu::Cpu;
use crate::decode::op::{Handler, Op, segment_index};
use crate::fault::Stop;
use crate::mode::Mode;
use crate::native::host_fpu::{Area, host};

/// RDI, as an index into the general registers.
const RDI: u8 = 7;

pub(super) fn select(op: &mut Op, _mode: Mode) -> Option<BlockEnd> {
    let (handler, size_bytes): (Handler, u16) = match op.instruction.mnemonic() {
        Mnemonic::Maskmovq => (maskmovq, 8),
        Mnemonic::Maskmovdqu => (maskmovdqu, 16),
        _ => return None,
    };
    op.handler = handler;
    op.base = RDI;
    op.segment = segment_index(op.instruction.memory_segment());
    op.address_mask = match op.instruction.op0_kind() {
        OpKind::MemorySegRDI => u64::MAX,
        OpKind::MemorySegEDI => 0xffff_ffff,
        _ => 0xffff,
    };
    op.a = op.instruction.op1_register().number() as u8;
    op.b = op.instruction.op2_register().number() as u8;
    op.operand_bytes = size_bytes;
    op.writes = true;
    Some(BlockEnd::Continue)
}

handler!(
    /// MASKMOVQ: as every MMX instruction, it leaves the x87 tags valid.
    maskmovq(cpu, op) {
        cpu.wait_for_x87()?;
        let mut area = Area::zeroed();
        host::fxsave(&mut area);
        let source = area.mmx(op.a).to_le_bytes();
        let mask = area.mmx(op.b).to_le_bytes();
        store_chosen(cpu, op, &source, &mask)?;
        host::enter_mmx();
        cpu.stored()
    }
);

handler!(
    /// MASKMOVDQU.
    maskmovdqu(cpu, op) {
        let xmm = &cpu.registers.xmm;
        let source = xmm[usize::from(op.a)].to_le_bytes();
        let mask = xmm[usize::from(op.b)].to_le_bytes();
        store_chosen(cpu, op, &source, &mask)?;
        cpu.stored()
    }
);

/// Stores the bytes of `source` whose byte in `mask` has its top bit set: all of them or none. Bytes
/// that are not stored fault as the others do, which the manuals leave open and CPUs do; but where
/// none is stored, no alignment is checked.
fn store_chosen(cpu: &mut Cpu, op: &Op, source: &[u8], mask: &[u8]) -> Result<(), Stop> {
    let linear = op.linear_address(cpu);
    let address = |cpu: &Cpu, index: usize| cpu.wrap(linear.wrapping_add(index as u64));
    let mut chosen = (0..mask.len()).filter(|index| mask[*index] & 0x80 != 0).peekable();
    if chosen.peek().is_some() {
        cpu.check_store(linear, op.segment, mask.len() as u64)?;
    } else {
        cpu.check_store(linear, op.segment, 1)?;
        cpu.check_store(address(cpu, mask.len() - 1), op.segment, 1)?;
    }
    for index in chosen {
        cpu.store_slow(address(cpu, index), op.segment, &source[index..=index])?;
    }
    Ok(())
}
