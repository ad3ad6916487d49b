//! MOV to and from control registers, CLTS, LMSW, SMSW, INVLPG, INVD and WBINVD (Intel SDM volume
//! 3A, 2.5).

use iced_x86::{Mnemonic, Register};
use reprise_devices::cpu_model::PHYSICAL_ADDRESS_BITS;
use reprise_trace::cpu_state::CS;
use reprise_trace::instructions::Event;
use reprise_trace::register_bits::CR4_BITS;

use crate::cpu::{
    CR0_AM, CR0_EM, CR0_NE, CR0_PE, CR0_PG, CR0_TS, CR0_WP, CR4_PAE, CR4_PGE, CR4_PSE, CR4_SMAP,
    CR4_SMEP, Cpu, EFER_LMA, EFER_LME,
};
use crate::decode::op::{Handler, Op};
use crate::fault::{Fault, Stop};
use crate::memory::physical::PAGE_BYTES;
use crate::memory::walk::canonical;
use crate::mode::Mode;
use crate::ops::{BlockEnd, handler, raise_ud};

/// Monitor coprocessor.
const CR0_MP: u64 = 1 << 1;
/// Extension type, always set.
const CR0_ET: u64 = 1 << 4;
/// Not write-through.
const CR0_NW: u64 = 1 << 29;
/// Cache disable.
const CR0_CD: u64 = 1 << 30;
/// The bits of CR0 that exist. The others below bit 32 are ignored.
const CR0_BITS: u64 = CR0_PE
    | CR0_MP
    | CR0_EM
    | CR0_TS
    | CR0_ET
    | CR0_NE
    | CR0_WP
    | CR0_AM
    | CR0_NW
    | CR0_CD
    | CR0_PG;
/// Bits of CR0 and CR4 that a cached translation depends on.
const CR0_PAGING: u64 = CR0_PG | CR0_WP | CR0_PE;
const CR4_PAGING: u64 = CR4_PAE | CR4_PSE | CR4_PGE | CR4_SMEP | CR4_SMAP;

pub(super) fn select(op: &mut Op, _mode: Mode) -> Option<BlockEnd> {
    let instruction = &*op.instruction;
    let (handler, end): (Handler, BlockEnd) = match instruction.mnemonic() {
        Mnemonic::Mov if instruction.op0_register().is_cr() => {
            (write_handler(instruction.op0_register()), BlockEnd::After)
        }
        Mnemonic::Mov if instruction.op1_register().is_cr() => {
            (read_handler(instruction.op1_register()), BlockEnd::Continue)
        }
        Mnemonic::Clts => (clear_task_switched, BlockEnd::After),
        Mnemonic::Lmsw => (load_machine_status, BlockEnd::After),
        Mnemonic::Smsw => (store_machine_status, BlockEnd::Continue),
        Mnemonic::Invlpg => (invalidate_page, BlockEnd::After),
        Mnemonic::Invd | Mnemonic::Wbinvd => (invalidate_caches, BlockEnd::Continue),
        _ => return None,
    };
    op.size = match instruction.op0_register() {
        Register::None => 2,
        register => register.size() as u8,
    };
    op.handler = handler;
    Some(end)
}

fn write_handler(register: Register) -> Handler {
    match register {
        Register::CR0 => write_cr0,
        Register::CR2 => write_cr2,
        Register::CR3 => write_cr3,
        Register::CR4 => write_cr4,
        Register::CR8 => write_cr8,
        _ => raise_ud,
    }
}

fn read_handler(register: Register) -> Handler {
    match register {
        Register::CR0 => read_control::<0>,
        Register::CR2 => read_control::<2>,
        Register::CR3 => read_control::<3>,
        Register::CR4 => read_control::<4>,
        Register::CR8 => read_control::<8>,
        _ => raise_ud,
    }
}

/// The general register that is moved to a control register, as wide as the mode has it.
fn source(cpu: &mut Cpu, op: &Op) -> Result<u64, Stop> {
    cpu.require_level_0()?;
    let value = cpu.registers.gpr[op.instruction.op1_register().number()];
    Ok(if cpu.mode_64() { value } else { value & 0xffff_ffff })
}

handler!(read_control<const NUMBER: u8>(cpu, op) {
    cpu.require_level_0()?;
    let value = match NUMBER {
        0 => cpu.system.cr0,
        2 => cpu.system.cr2,
        3 => cpu.system.cr3,
        4 => cpu.system.cr4,
        _ => cpu.system.cr8,
    };
    let size = if cpu.mode_64() { 8 } else { 4 };
    cpu.set_general(op.instruction.op0_register().number(), value, size);
    Ok(())
});

handler!(write_cr0(cpu, op) {
    let value = source(cpu, op)?;
    cpu.set_cr0(value)
});
handler!(write_cr2(cpu, op) {
    cpu.system.cr2 = source(cpu, op)?;
    Ok(())
});
handler!(write_cr3(cpu, op) {
    let value = source(cpu, op)?;
    if cpu.long_mode() && value >> PHYSICAL_ADDRESS_BITS != 0 {
        return cpu.fault(Fault::GP0);
    }
    cpu.check_directory_pointers(cpu.system.cr0, value, cpu.system.cr4)?;
    cpu.system.cr3 = value;
    cpu.trace_event(Event::AddressSpace { cr3: value });
    cpu.change_address_space();
    Ok(())
});
handler!(write_cr4(cpu, op) {
    let value = source(cpu, op)?;
    cpu.set_cr4(value)
});
handler!(write_cr8(cpu, op) {
    let value = source(cpu, op)?;
    if value > 15 {
        return cpu.fault(Fault::GP0);
    }
    cpu.system.cr8 = value;
    Ok(())
});

impl Cpu {
    /// MOV to CR0.
    fn set_cr0(&mut self, value: u64) -> Result<(), Stop> {
        let before = self.system.cr0;
        let inconsistent = value & CR0_PG != 0 && value & CR0_PE == 0
            || value & CR0_NW != 0 && value & CR0_CD == 0;
        if value >> 32 != 0 || inconsistent {
            return self.fault(Fault::GP0);
        }
        let value = value & CR0_BITS | CR0_ET;
        let paging_starts = value & !before & CR0_PG != 0;
        let paging_ends = before & !value & CR0_PG != 0;
        let code_long = self.system.segments[CS].long();
        let mut efer = self.system.efer;
        if paging_starts && efer & EFER_LME != 0 {
            let old_task = self.system.tr.present() && self.system.tr.attributes & 8 == 0;
            if self.system.cr4 & CR4_PAE == 0 || code_long || old_task {
                return self.fault(Fault::GP0);
            }
            efer |= EFER_LMA;
        }
        if paging_ends {
            if self.long_mode() && code_long {
                return self.fault(Fault::GP0);
            }
            efer &= !EFER_LMA;
        }
        if efer & EFER_LMA == 0 && (before ^ value) & CR0_PAGING != 0 {
            self.check_directory_pointers(value, self.system.cr3, self.system.cr4)?;
        }
        self.system.cr0 = value;
        self.system.efer = efer;
        if value & CR0_PE == 0 {
            self.cpl = 0;
        }
        self.update_mode();
        if (before ^ value) & CR0_PAGING != 0 {
            self.flush_translations();
        }
        Ok(())
    }

    /// MOV to CR4.
    fn set_cr4(&mut self, value: u64) -> Result<(), Stop> {
        let before = self.system.cr4;
        let leaves_long = self.long_mode() && value & CR4_PAE == 0;
        if value & !CR4_BITS != 0 || leaves_long {
            return self.fault(Fault::GP0);
        }
        if (before ^ value) & CR4_PAGING != 0 {
            self.check_directory_pointers(self.system.cr0, self.system.cr3, value)?;
        }
        self.system.cr4 = value;
        self.update_mode();
        if (before ^ value) & CR4_PAGING != 0 {
            self.flush_translations();
        }
        Ok(())
    }

    /// Under PAE paging outside long mode, loading CR3 loads the four directory pointers, whose
    /// reserved bits must be clear.
    fn check_directory_pointers(&mut self, cr0: u64, cr3: u64, cr4: u64) -> Result<(), Stop> {
        const PRESENT: u64 = 1;
        const RESERVED: u64 = 0x1e6 | !((1 << PHYSICAL_ADDRESS_BITS) - 1);
        let pae = cr0 & CR0_PG != 0 && cr4 & CR4_PAE != 0;
        if !pae || self.system.efer & EFER_LME != 0 {
            return Ok(());
        }
        let mut table = [0; 32];
        let address = cr3 & 0xffff_ffe0;
        debug_assert!(address % PAGE_BYTES + 32 <= PAGE_BYTES);
        self.memory.physical.read(address, &mut table);
        for entry in table.chunks_exact(8) {
            let entry = u64::from_le_bytes(entry.try_into().expect("eight bytes"));
            if entry & PRESENT != 0 && entry & RESERVED != 0 {
                return self.fault(Fault::GP0);
            }
        }
        Ok(())
    }
}

handler!(clear_task_switched(cpu, _op) {
    cpu.require_level_0()?;
    cpu.system.cr0 &= !CR0_TS;
    cpu.update_mode();
    Ok(())
});
handler!(load_machine_status(cpu, op) {
    const LOADED: u64 = CR0_PE | CR0_MP | CR0_EM | CR0_TS;
    cpu.require_level_0()?;
    let value = u64::from(cpu.word_operand(op, 0)?);
    // LMSW sets PE but never clears it.
    let kept = cpu.system.cr0 & (!LOADED | CR0_PE);
    cpu.set_cr0(kept | value & LOADED)
});
handler!(store_machine_status(cpu, op) {
    cpu.store_low(op, cpu.system.cr0)
});
handler!(invalidate_page(cpu, op) {
    cpu.require_level_0()?;
    let linear = op.linear_address(cpu);
    cpu.invalidate_translation(linear);
    Ok(())
});
handler!(invalidate_caches(cpu, _op) {
    // Caches have no content of their own here.
    cpu.require_level_0()
});

impl Cpu {
    /// INVLPG.
    fn invalidate_translation(&mut self, linear: u64) {
        if canonical(linear) && self.memory.flush_page(linear) {
            self.blocks.forget_half(linear);
        }
    }
}
