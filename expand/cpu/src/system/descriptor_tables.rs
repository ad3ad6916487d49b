//! Descriptor tables and what inspects descriptors: LGDT, LIDT, SGDT, SIDT, LLDT, LTR, SLDT, STR,
//! LAR, LSL, VERR, VERW, ARPL.

use iced_x86::{Code, Mnemonic, OpKind};
use reprise_trace::cpu_state::{DescriptorTable, Segment};

use super::segment::{
    Descriptor, LOCAL_TABLE, TSS_AVAILABLE, TSS_BUSY_BIT, is_null, null_segment, rpl,
};
use crate::cpu::Cpu;
use crate::decode::op::{Handler, Op};
use crate::fault::{Fault, Stop, vector};
use crate::flags;
use crate::memory::walk::canonical;
use crate::mode::Mode;
use crate::ops::{BlockEnd, handler};

/// In [`Op::b`]: the table's base has 24 bits.
const BASE_24: u8 = 1;

pub(super) fn select(op: &mut Op, mode: Mode) -> Option<BlockEnd> {
    let instruction = &*op.instruction;
    let (handler, end): (Handler, BlockEnd) = match instruction.mnemonic() {
        Mnemonic::Lgdt => (load_global_table, BlockEnd::After),
        Mnemonic::Lidt => (load_interrupt_table, BlockEnd::After),
        Mnemonic::Sgdt => (store_global_table, BlockEnd::Continue),
        Mnemonic::Sidt => (store_interrupt_table, BlockEnd::Continue),
        Mnemonic::Lldt => (load_local_table, BlockEnd::After),
        Mnemonic::Ltr => (load_task, BlockEnd::After),
        Mnemonic::Sldt => (store_local_selector, BlockEnd::Continue),
        Mnemonic::Str => (store_task_selector, BlockEnd::Continue),
        Mnemonic::Lar => (load_access_rights, BlockEnd::Continue),
        Mnemonic::Lsl => (load_limit, BlockEnd::Continue),
        Mnemonic::Verr => (verify_read, BlockEnd::Continue),
        Mnemonic::Verw => (verify_write, BlockEnd::Continue),
        Mnemonic::Arpl => (adjust_rpl, BlockEnd::Continue),
        _ => return None,
    };
    op.size = match instruction.mnemonic() {
        Mnemonic::Lgdt | Mnemonic::Lidt | Mnemonic::Sgdt | Mnemonic::Sidt => {
            if mode.has(Mode::CODE_64) { 8 } else { 4 }
        }
        _ if instruction.op0_kind() == OpKind::Register => instruction.op0_register().size() as u8,
        _ => 2,
    };
    op.b = match instruction.code() {
        Code::Lgdt_m1632_16 | Code::Lidt_m1632_16 => BASE_24,
        _ => 0,
    };
    op.handler = handler;
    Some(end)
}

fn table_operand(cpu: &mut Cpu, op: &Op) -> Result<DescriptorTable, Stop> {
    cpu.require_level_0()?;
    let linear = op.linear_address(cpu);
    let limit: u16 = cpu.load(linear, op.segment)?;
    let after = cpu.wrap(linear.wrapping_add(2));
    let mut base = cpu.load_sized(after, op.segment, u64::from(op.size))?;
    if op.b == BASE_24 {
        base &= 0xff_ffff;
    }
    if !canonical(base) {
        return cpu.fault(Fault::GP0);
    }
    Ok(DescriptorTable { base, limit })
}

fn store_table(cpu: &mut Cpu, op: &Op, table: DescriptorTable) -> Result<(), Stop> {
    let linear = op.linear_address(cpu);
    let mut bytes = [0; 10];
    bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
    bytes[2..].copy_from_slice(&table.base.to_le_bytes());
    cpu.store_slow(linear, op.segment, &bytes[..2 + usize::from(op.size)])?;
    cpu.stored()
}

handler!(load_global_table(cpu, op) {
    cpu.system.gdtr = table_operand(cpu, op)?;
    Ok(())
});
handler!(load_interrupt_table(cpu, op) {
    cpu.system.idtr = table_operand(cpu, op)?;
    Ok(())
});
handler!(store_global_table(cpu, op) {
    store_table(cpu, op, cpu.system.gdtr)
});
handler!(store_interrupt_table(cpu, op) {
    store_table(cpu, op, cpu.system.idtr)
});
handler!(load_local_table(cpu, op) {
    let selector = system_selector(cpu, op)?;
    cpu.system.ldtr = if is_null(selector) {
        null_segment(selector)
    } else {
        let descriptor = cpu.system_descriptor(selector)?;
        if descriptor.kind() != LOCAL_TABLE {
            return cpu.selector_fault(vector::GP, selector);
        }
        cpu.system_segment(&descriptor)?
    };
    Ok(())
});
handler!(load_task(cpu, op) {
    let selector = system_selector(cpu, op)?;
    if is_null(selector) {
        return cpu.fault(Fault::GP0);
    }
    let descriptor = cpu.system_descriptor(selector)?;
    let old_task = descriptor.kind() == 1 && !cpu.long_mode();
    if descriptor.kind() != TSS_AVAILABLE && !old_task {
        return cpu.selector_fault(vector::GP, selector);
    }
    let mut task = cpu.system_segment(&descriptor)?;
    let type_byte = (descriptor.raw >> 40) as u8 | TSS_BUSY_BIT as u8;
    cpu.store_system(cpu.wrap(descriptor.address.wrapping_add(5)), type_byte)?;
    task.attributes |= TSS_BUSY_BIT;
    cpu.system.tr = task;
    Ok(())
});
handler!(store_local_selector(cpu, op) {
    require_protected(cpu)?;
    cpu.store_low(op, u64::from(cpu.system.ldtr.selector))
});
handler!(store_task_selector(cpu, op) {
    require_protected(cpu)?;
    cpu.store_low(op, u64::from(cpu.system.tr.selector))
});

/// These instructions are not recognised in real mode.
fn require_protected(cpu: &mut Cpu) -> Result<(), Stop> {
    if cpu.protected() { Ok(()) } else { cpu.fault(Fault::UD) }
}

/// The operand of LLDT and LTR.
fn system_selector(cpu: &mut Cpu, op: &Op) -> Result<u16, Stop> {
    require_protected(cpu)?;
    cpu.require_level_0()?;
    cpu.word_operand(op, 0)
}

impl Cpu {
    /// Bytes of a system descriptor.
    fn system_descriptor_bytes(&self) -> u64 {
        if self.long_mode() { 16 } else { 8 }
    }

    /// Reads the descriptor of an LDT or TSS, which must lie in the GDT.
    fn system_descriptor(&mut self, selector: u16) -> Result<Descriptor, Stop> {
        if selector & 4 != 0 {
            return self.selector_fault(vector::GP, selector);
        }
        let size = self.system_descriptor_bytes();
        let descriptor = self.descriptor_of_size(selector, vector::GP, size)?;
        if !descriptor.is_system() {
            return self.selector_fault(vector::GP, selector);
        }
        Ok(descriptor)
    }

    /// What LDTR or TR becomes, presence and the long form's upper half checked.
    fn system_segment(&mut self, descriptor: &Descriptor) -> Result<Segment, Stop> {
        let selector = descriptor.selector;
        if !descriptor.present() {
            return self.selector_fault(vector::NP, selector);
        }
        let mut segment = descriptor.segment(rpl(selector));
        if self.long_mode() {
            let upper: u64 = self.load_system(self.wrap(descriptor.address.wrapping_add(8)))?;
            segment.base |= upper << 32;
            let type_bits = upper >> 40 & 0x1f;
            if type_bits != 0 || !canonical(segment.base) {
                return self.selector_fault(vector::GP, selector);
            }
        }
        Ok(segment)
    }

    /// The descriptor that LAR, LSL, VERR and VERW look at; `None` where they find none.
    fn visible_descriptor(&mut self, selector: u16) -> Result<Option<Descriptor>, Stop> {
        if is_null(selector) {
            return Ok(None);
        }
        let before = self.pending_fault;
        match self.descriptor(selector, vector::GP) {
            Ok(descriptor) => {
                let conforming = descriptor.is_conforming();
                let hidden = self.cpl.max(rpl(selector)) > descriptor.dpl();
                Ok(if hidden && !conforming { None } else { Some(descriptor) })
            }
            // Outside its table: no fault. A page fault is one.
            Err(Stop::Fault) if self.pending_fault.vector == vector::GP => {
                self.pending_fault = before;
                Ok(None)
            }
            Err(stop) => Err(stop),
        }
    }

    fn set_zero_flag(&mut self, on: bool) {
        let others = self.rflags() & !flags::ZF;
        self.registers.arithmetic =
            flags::Arithmetic::from_rflags(others | if on { flags::ZF } else { 0 });
    }
}

/// System descriptor types that LAR and LSL accept, as bit sets by type: outside long mode and in it.
const ACCESS_TYPES: [u16; 2] = [bit_set(&[1, 2, 3, 4, 5, 9, 11, 12]), bit_set(&[2, 9, 11, 12])];
const LIMIT_TYPES: [u16; 2] = [bit_set(&[1, 2, 3, 9, 11]), bit_set(&[2, 9, 11])];

const fn bit_set(kinds: &[u16]) -> u16 {
    let mut set = 0;
    let mut index = 0;
    while index < kinds.len() {
        set |= 1 << kinds[index];
        index += 1;
    }
    set
}

/// Runs LAR or LSL: stores `value` of an accepted descriptor and tells by ZF whether there was one.
fn inspect(
    cpu: &mut Cpu,
    op: &Op,
    system_types: [u16; 2],
    value: fn(&Descriptor) -> u64,
) -> Result<(), Stop> {
    require_protected(cpu)?;
    let selector = cpu.word_operand(op, 1)?;
    let types = system_types[usize::from(cpu.long_mode())];
    let found = cpu
        .visible_descriptor(selector)?
        .filter(|descriptor| !descriptor.is_system() || types >> descriptor.kind() & 1 != 0);
    if let Some(descriptor) = &found {
        let number = op.instruction.op0_register().number();
        cpu.set_general(number, value(descriptor), u64::from(op.size));
    }
    cpu.set_zero_flag(found.is_some());
    Ok(())
}

handler!(load_access_rights(cpu, op) {
    inspect(cpu, op, ACCESS_TYPES, |descriptor| descriptor.raw >> 32 & 0x00f0_ff00)
});
handler!(load_limit(cpu, op) {
    inspect(cpu, op, LIMIT_TYPES, |descriptor| u64::from(descriptor.limit()))
});
handler!(verify_read(cpu, op) {
    verify(cpu, op, Descriptor::is_readable)
});
handler!(verify_write(cpu, op) {
    verify(cpu, op, Descriptor::is_writable)
});

fn verify(cpu: &mut Cpu, op: &Op, right: fn(&Descriptor) -> bool) -> Result<(), Stop> {
    require_protected(cpu)?;
    let selector = cpu.word_operand(op, 0)?;
    let found = cpu.visible_descriptor(selector)?;
    cpu.set_zero_flag(found.is_some_and(|descriptor| right(&descriptor)));
    Ok(())
}

handler!(adjust_rpl(cpu, op) {
    require_protected(cpu)?;
    let wanted = rpl(cpu.registers.gpr[op.instruction.op1_register().number()] as u16);
    let selector = cpu.word_operand(op, 0)?;
    let raised = rpl(selector) < wanted;
    if raised {
        let value = selector & !3 | u16::from(wanted);
        if op.instruction.op0_kind() == OpKind::Register {
            cpu.set_general(op.instruction.op0_register().number(), u64::from(value), 2);
        } else {
            let linear = op.linear_address(cpu);
            cpu.store(linear, op.segment, value)?;
        }
    }
    cpu.set_zero_flag(raised);
    cpu.stored()
});
