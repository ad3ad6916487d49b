//! RDMSR, WRMSR, RDTSC, RDPMC and CPUID. Numbers of model-specific registers are those of the Intel
//! SDM, volume 4; which of them exist is the CPU model's matter.

use iced_x86::Mnemonic;
use reprise_devices::cpu_model::{self, MsrWrite, TimeStampCounter};
use reprise_machine::engine::Access;
use reprise_trace::cpu_state::{FS, GS, RAX, RBX, RCX, RDX};

use crate::cpu::{CR0_PG, CR4_TSD, Cpu, EFER_LMA, EFER_LME, EFER_NXE, EFER_SCE, TimeStamps};
use crate::decode::op::{Handler, Op};
use crate::fault::{Fault, Stop};
use crate::memory::walk::canonical;
use crate::mode::Mode;
use crate::ops::{BlockEnd, handler};

pub(super) fn select(op: &mut Op, _mode: Mode) -> Option<BlockEnd> {
    let (handler, end): (Handler, BlockEnd) = match op.instruction.mnemonic() {
        Mnemonic::Rdmsr => (read_register, BlockEnd::Continue),
        Mnemonic::Wrmsr => (write_register, BlockEnd::After),
        Mnemonic::Rdtsc => (read_time_stamp, BlockEnd::Continue),
        Mnemonic::Rdpmc => (read_performance_counter, BlockEnd::Continue),
        Mnemonic::Cpuid => (identify, BlockEnd::Continue),
        _ => return None,
    };
    op.handler = handler;
    Some(end)
}

/// What a register with state may be set to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Allowed {
    /// Any value.
    Any,
    /// A canonical linear address.
    Canonical,
    /// A value of 32 bits.
    Low32,
    /// Eight memory types, one a byte.
    MemoryTypes,
}

/// A model-specific register that is a field of the CPU's state and changes nothing else at once.
struct StateRegister {
    index: u32,
    allowed: Allowed,
    field: fn(&mut Cpu) -> &mut u64,
}

macro_rules! state_registers {
    ($($index:literal $allowed:ident $field:expr;)*) => {
        &[$(StateRegister {
            index: $index,
            allowed: Allowed::$allowed,
            field: $field,
        }),*]
    };
}

static STATE_REGISTERS: &[StateRegister] = state_registers! {
    // IA32_SYSENTER_CS, ESP, EIP.
    0x174 Low32 |cpu| &mut cpu.system.sysenter_cs;
    0x175 Canonical |cpu| &mut cpu.system.sysenter_esp;
    0x176 Canonical |cpu| &mut cpu.system.sysenter_eip;
    // IA32_PAT.
    0x277 MemoryTypes |cpu| &mut cpu.system.pat;
    // IA32_STAR, LSTAR, CSTAR, FMASK.
    0xc000_0081 Any |cpu| &mut cpu.system.star;
    0xc000_0082 Canonical |cpu| &mut cpu.system.lstar;
    0xc000_0083 Canonical |cpu| &mut cpu.system.cstar;
    0xc000_0084 Low32 |cpu| &mut cpu.system.sfmask;
    // IA32_FS_BASE, GS_BASE, KERNEL_GS_BASE.
    0xc000_0100 Canonical |cpu| &mut cpu.system.segments[FS].base;
    0xc000_0101 Canonical |cpu| &mut cpu.system.segments[GS].base;
    0xc000_0102 Canonical |cpu| &mut cpu.system.kernel_gs_base;
};

/// IA32_TIME_STAMP_COUNTER.
const TIME_STAMP_COUNTER: u32 = 0x10;
/// IA32_EFER.
const EXTENDED_FEATURES: u32 = 0xc000_0080;

impl Allowed {
    fn contains(self, value: u64) -> bool {
        match self {
            Self::Any => true,
            Self::Canonical => canonical(value),
            Self::Low32 => value >> 32 == 0,
            // Types 2 and 3 do not exist, nor any above 7.
            Self::MemoryTypes => {
                value.to_le_bytes().iter().all(|kind| matches!(kind, 0 | 1 | 4..=7))
            }
        }
    }
}

impl Cpu {
    /// The time-stamp counter at `op`: it counts nanoseconds of virtual time.
    fn time_stamp(&self, op: &Op) -> u64 {
        const { assert!(cpu_model::TSC_HZ == 1_000_000_000) };
        let now = self.time_base.at(self.tick + u64::from(op.number));
        now.ns.wrapping_add(self.system.tsc_offset)
    }

    /// The time-stamp counter as the machine answers it.
    fn asked_time_stamp(&mut self) -> Result<u64, Stop> {
        let ns = self.board(Access::TimeStamp)? as u64;
        Ok(ns.wrapping_add(self.system.tsc_offset))
    }

    /// WRMSR to EFER.
    fn set_extended_features(&mut self, value: u64) -> Result<(), Stop> {
        let before = self.system.efer;
        // LMA is the CPU's own: what is written there counts for nothing.
        let known = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE;
        let paging = self.system.cr0 & CR0_PG != 0;
        if value & !known != 0 || paging && (value ^ before) & EFER_LME != 0 {
            return self.fault(Fault::GP0);
        }
        self.system.efer = value & !EFER_LMA | before & EFER_LMA;
        self.update_mode();
        if (value ^ before) & EFER_NXE != 0 {
            self.flush_translations();
        }
        Ok(())
    }

    fn set_pair(&mut self, value: u64) {
        self.registers.gpr[RAX] = value & 0xffff_ffff;
        self.registers.gpr[RDX] = value >> 32;
    }
}

handler!(read_register(cpu, op) {
    cpu.require_level_0()?;
    let index = cpu.registers.gpr[RCX] as u32;
    let value = match index {
        TIME_STAMP_COUNTER => cpu.time_stamp(op),
        EXTENDED_FEATURES => cpu.system.efer,
        _ => match STATE_REGISTERS.iter().find(|register| register.index == index) {
            Some(register) => *(register.field)(cpu),
            None => match cpu_model::msr(index) {
                Some(register) => register.value,
                None => return cpu.fault(Fault::GP0),
            },
        },
    };
    cpu.set_pair(value);
    Ok(())
});

handler!(write_register(cpu, op) {
    cpu.require_level_0()?;
    let index = cpu.registers.gpr[RCX] as u32;
    let value = cpu.registers.gpr[RDX] << 32 | cpu.registers.gpr[RAX] & 0xffff_ffff;
    if index == TIME_STAMP_COUNTER {
        let offset = cpu.system.tsc_offset.wrapping_add(value).wrapping_sub(cpu.time_stamp(op));
        cpu.system.tsc_offset = offset;
        return Ok(());
    }
    if index == EXTENDED_FEATURES {
        return cpu.set_extended_features(value);
    }
    if let Some(register) = STATE_REGISTERS.iter().find(|register| register.index == index) {
        if !register.allowed.contains(value) {
            return cpu.fault(Fault::GP0);
        }
        *(register.field)(cpu) = value;
        cpu.update_mode();
        return Ok(());
    }
    match cpu_model::msr(index) {
        Some(register) if register.write == MsrWrite::Ignored => Ok(()),
        _ => cpu.fault(Fault::GP0),
    }
});

handler!(read_time_stamp(cpu, op) {
    if cpu.cpl != 0 && cpu.system.cr4 & CR4_TSD != 0 {
        return cpu.fault(Fault::GP0);
    }
    let value = match cpu.time_stamps {
        TimeStamps::Computed => cpu.time_stamp(op),
        TimeStamps::AskedThroughFault if cpu.cpl == 3 && cpu.answered.is_empty() => {
            cpu.leave_frame_of(Fault::GP0)?;
            cpu.asked_time_stamp()?
        }
        TimeStamps::Asked | TimeStamps::AskedThroughFault => cpu.asked_time_stamp()?,
    };
    cpu.set_pair(value);
    Ok(())
});

handler!(read_performance_counter(cpu, _op) {
    // The CPU model has no performance counters, so every counter number is wrong.
    cpu.fault(Fault::GP0)
});

handler!(identify(cpu, _op) {
    let leaf = cpu.registers.gpr[RAX] as u32;
    let subleaf = cpu.registers.gpr[RCX] as u32;
    let [eax, ebx, ecx, mut edx] = cpu_model::cpuid(leaf, subleaf);
    if cpu.hides_time_stamp {
        edx &= !TimeStampCounter::Hidden.hidden_in_edx(leaf);
    }
    for (register, value) in [(RAX, eax), (RBX, ebx), (RCX, ecx), (RDX, edx)] {
        cpu.registers.gpr[register] = u64::from(value);
    }
    Ok(())
});
