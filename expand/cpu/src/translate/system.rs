//! System instructions that need neither the block loop nor page tables: flags, rights of access, GS,
//! control words, the clock. What a unit's mode says (privilege level, SMAP state) is constant here; a
//! unit of supervisor code runs at level 0.
//!
//! Those that end a block, since the next instruction may be interrupted or run with other rights, do
//! so only on their slow way: in line, they make sure that nothing is to be looked at behind them.

use std::mem::offset_of;

use iced_x86::{Code, Mnemonic, OpKind};
use reprise_devices::cpu_model::TSC_HZ;
use reprise_machine::clock::TimeBase;
use reprise_trace::cpu_state::{GS, RAX, RDX, Segment};

use super::assembler::{RAX as HOST_RAX, RDX as HOST_RDX, at, indexed};
use super::emission::{Emission, addressable};
use super::registers::{ADDEND, ADDRESS, GUEST_RSP, Home, SCRATCH, field, general_slot, home};
use super::stack::{OPERAND, SLOT_BYTES, make_room};
use crate::cpu::{CR4_TSD, Cpu, Registers, SHADOWED, SystemState, WAITING};
use crate::decode::op::Op;
use crate::flags;
use crate::memory::access_state;
use crate::mode::Mode;
use crate::native::host_fpu::FpuImage;

/// RFLAGS but for the arithmetic flags.
const RFLAGS: usize = offset_of!(Cpu, rflags_rest);
/// The place in RFLAGS of IF.
const IF_BIT: u8 = flags::IF.trailing_zeros() as u8;
/// Condition codes.
const NOT_ZERO: u8 = 5;

/// Emits an instruction behind which the block goes on; `None`, with nothing emitted, if it is not one
/// of these.
pub(super) fn emit(emission: &mut Emission<'_>, op: &Op) -> Option<()> {
    let user = emission.surroundings.mode.has(Mode::USER);
    match op.instruction.code() {
        Code::Cli if !user => clear_interrupt_flag(emission),
        Code::Swapgs if !user => swap_gs(emission),
        Code::Pushfq => push_flags(emission),
        Code::Rdtsc => read_time_stamp(emission, user),
        Code::Fnstcw_m2byte => store_control_word(emission, op)?,
        Code::Stmxcsr_m32 => store_mxcsr(emission, op)?,
        Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg => {
            store_selector(emission, op)?;
        }
        _ => return None,
    }
    Some(())
}

/// Emits an instruction that ends its block; `None`, with nothing emitted, if it is not one of these.
/// Its slow way must leave. `goes_on` says whether the unit holds the instruction behind it.
pub(super) fn emit_ending(emission: &mut Emission<'_>, op: &Op, goes_on: bool) -> Option<()> {
    let mode = emission.surroundings.mode;
    match op.instruction.mnemonic() {
        // DF is clear.
        Mnemonic::Cld if !mode.has(Mode::DOWNWARDS) => Some(()),
        _ if mode.has(Mode::USER) => None,
        // The shadow is over with the next instruction, which no event can part from this one.
        Mnemonic::Sti if goes_on => {
            set_interrupt_flag(emission);
            Some(())
        }
        Mnemonic::Stac => change_access(emission, true),
        Mnemonic::Clac => change_access(emission, false),
        _ if op.instruction.code() == Code::Popfq => {
            pop_flags(emission);
            Some(())
        }
        _ => None,
    }
}

/// CLI: turned until IF is the top bit, which doubling drops.
fn clear_interrupt_flag(emission: &mut Emission<'_>) {
    emission.settle(32);
    let code = &mut emission.code;
    code.load(SCRATCH, field(RFLAGS));
    code.rotate_right(SCRATCH, SCRATCH, IF_BIT + 1);
    code.lea(SCRATCH, indexed(SCRATCH, SCRATCH, 0, 0));
    code.rotate_right(SCRATCH, SCRATCH, 64 - IF_BIT);
    code.store(field(RFLAGS), SCRATCH);
}

/// STI where IF is clear and no interrupt waits for it.
fn set_interrupt_flag(emission: &mut Emission<'_>) {
    emission.settle(32);
    // TF to NT: where TF is set, no translated code runs, and the others are clear mostly.
    emission.code.load_8(SCRATCH, field(RFLAGS + 1));
    emission.code.load(ADDEND, general_slot(WAITING));
    let found = emission.found();
    emission.code.lea(SCRATCH, indexed(SCRATCH, ADDEND, 0, found));
    emission.slow_unless_found();
    emission.settle(32);
    let code = &mut emission.code;
    code.load(SCRATCH, field(RFLAGS));
    code.lea(SCRATCH, at(SCRATCH, flags::IF as i32));
    code.store(field(RFLAGS), SCRATCH);
    code.store_immediate(general_slot(SHADOWED), 1);
}

/// STAC and CLAC: the mode says whether AC is set, where SMAP is on.
fn change_access(emission: &mut Emission<'_>, overridden: bool) -> Option<()> {
    let before = emission.surroundings.mode;
    let after = before.with_access(overridden)?;
    if after == before {
        return Some(());
    }
    let mode = emission.change_access()?;
    debug_assert_eq!(mode, after);
    emission.settle(64);
    let change = flags::AC as i32;
    let memory = offset_of!(Cpu, memory);
    let code = &mut emission.code;
    code.load(SCRATCH, field(RFLAGS));
    code.lea(SCRATCH, at(SCRATCH, if overridden { change } else { -change }));
    code.store(field(RFLAGS), SCRATCH);
    code.store_immediate_32(field(offset_of!(Cpu, mode)), mode.0);
    code.store_immediate_8(field(memory + access_state::OVERRIDDEN), u8::from(overridden));
    code.store_immediate(field(memory + access_state::TABLE), access_state::table(mode));
    Some(())
}

/// PUSHFQ. RF and VM are clear in translated code.
fn push_flags(emission: &mut Emission<'_>) {
    const ALWAYS_SET: i32 = 2;
    make_room(emission);
    emission.settle(64);
    let code = &mut emission.code;
    code.lea(ADDRESS, indexed(ADDRESS, ADDEND, 0, 0));
    code.copy(ADDEND, HOST_RAX);
    code.flags_to_ah();
    code.ah_to_ecx();
    code.immediate(HOST_RAX, 0);
    code.overflow_to_ah();
    // OF is bit 8 of RAX, and bit 11 of RFLAGS; both halves have the bit that is always set.
    code.lea(SCRATCH, indexed(SCRATCH, HOST_RAX, 3, -ALWAYS_SET));
    code.load(HOST_RAX, field(RFLAGS));
    code.lea(SCRATCH, indexed(SCRATCH, HOST_RAX, 0, 0));
    code.copy(HOST_RAX, ADDEND);
    code.store(at(ADDRESS, 0), SCRATCH);
    code.lea(GUEST_RSP, at(GUEST_RSP, -SLOT_BYTES));
}

/// POPFQ at level 0 that changes no flag but IF and the arithmetic ones, with no interrupt waiting for
/// IF. All arithmetic flags are popped, so those of before are free as soon as no fault can come.
fn pop_flags(emission: &mut Emission<'_>) {
    const OTHERS: u64 = flags::TF | flags::DF | flags::IOPL | flags::NT | flags::AC | flags::ID;
    emission.code.copy(ADDRESS, GUEST_RSP);
    emission.translate(false, SLOT_BYTES as u64);
    emission.settle(120);
    let code = &mut emission.code;
    code.load(ADDRESS, OPERAND);
    code.load(ADDEND, field(RFLAGS));
    code.copy(SCRATCH, ADDRESS);
    code.exclusive_or(SCRATCH, ADDEND);
    code.test_immediate(SCRATCH, OTHERS as i32);
    emission.slow_if(NOT_ZERO);
    emission.code.and_immediate_32(SCRATCH, flags::IF as i32);
    emission.code.test_place(SCRATCH, general_slot(WAITING));
    emission.slow_if(NOT_ZERO);
    let code = &mut emission.code;
    code.exclusive_or(SCRATCH, ADDEND);
    code.store(field(RFLAGS), SCRATCH);
    code.lea(GUEST_RSP, at(GUEST_RSP, SLOT_BYTES));
    code.copy(ADDEND, HOST_RAX);
    code.copy(HOST_RAX, ADDRESS);
    code.rflags_to_ax();
    code.flags_from_ax();
    code.copy(HOST_RAX, ADDEND);
}

fn swap_gs(emission: &mut Emission<'_>) {
    emission.settle(48);
    let segments = offset_of!(Cpu, system) + offset_of!(SystemState, segments);
    let hidden = field(segments + GS * size_of::<Segment>() + offset_of!(Segment, base));
    let kernel = field(offset_of!(Cpu, system) + offset_of!(SystemState, kernel_gs_base));
    let code = &mut emission.code;
    code.load(SCRATCH, hidden);
    code.load(ADDEND, kernel);
    code.store(kernel, SCRATCH);
    code.store(hidden, ADDEND);
    code.store(field(offset_of!(Registers, segment_base) + GS * 8), ADDEND);
}

/// RDTSC where virtual time is ticks: the last jump's time, and the instructions since.
fn read_time_stamp(emission: &mut Emission<'_>, user: bool) {
    const { assert!(TSC_HZ == 1_000_000_000) };
    const HALF: u64 = 32;
    let base = offset_of!(Cpu, time_base);
    let system = offset_of!(Cpu, system);
    let found = emission.found();
    emission.settle(64);
    if user {
        let bit = CR4_TSD.trailing_zeros() as u8;
        emission.code.load(SCRATCH, field(system + offset_of!(SystemState, cr4)));
        emission.code.rotate_right(SCRATCH, SCRATCH, bit + 1);
        emission.code.immediate(ADDEND, 63);
        emission.code.shift_right(SCRATCH, SCRATCH, ADDEND);
        emission.code.lea(SCRATCH, at(SCRATCH, found));
        emission.slow_unless_found();
        emission.settle(64);
    }
    emission.code.load(SCRATCH, field(base + offset_of!(TimeBase, ns_per_tick)));
    emission.code.lea(SCRATCH, at(SCRATCH, found - 1));
    emission.slow_unless_found();
    emission.settle(100);
    // See `Cpu::tick_at_budget`.
    let before = emission.before();
    let code = &mut emission.code;
    code.load(SCRATCH, general_slot(crate::cpu::BUDGET));
    code.load(ADDEND, field(offset_of!(Cpu, budget_end)));
    code.lea(SCRATCH, indexed(SCRATCH, ADDEND, 0, 1 + before));
    code.load(ADDEND, field(base + offset_of!(TimeBase, tick)));
    code.complement(ADDEND);
    code.lea(SCRATCH, indexed(SCRATCH, ADDEND, 0, 1));
    for summand in [base + offset_of!(TimeBase, ns), system + offset_of!(SystemState, tsc_offset)] {
        code.load(ADDEND, field(summand));
        code.lea(SCRATCH, indexed(SCRATCH, ADDEND, 0, 0));
    }
    const { assert!(RAX == 0 && RDX == 2, "they have their own names") };
    code.zero_extend_32(HOST_RAX, SCRATCH);
    code.immediate(ADDEND, HALF);
    code.shift_right(HOST_RDX, SCRATCH, ADDEND);
}

fn store_control_word(emission: &mut Emission<'_>, op: &Op) -> Option<()> {
    const BYTES: u64 = 2;
    if !addressable(op) {
        return None;
    }
    emission.linear_address(op);
    emission.translate(true, BYTES);
    emission.settle(24);
    let control = offset_of!(Cpu, fpu) + FpuImage::CONTROL_OFFSET;
    emission.code.load_16(SCRATCH, field(control));
    emission.code.store_16(OPERAND, SCRATCH);
    Some(())
}

/// STMXCSR where every exception is masked: then the host's is the guest's.
fn store_mxcsr(emission: &mut Emission<'_>, op: &Op) -> Option<()> {
    const BYTES: u64 = 4;
    if !addressable(op) || emission.surroundings.mode.has(Mode::SSE_UNMASKED) {
        return None;
    }
    emission.linear_address(op);
    emission.translate(true, BYTES);
    emission.settle(16);
    emission.code.store_mxcsr(OPERAND);
    Some(())
}

/// MOV from a segment register.
fn store_selector(emission: &mut Emission<'_>, op: &Op) -> Option<()> {
    const BYTES: u64 = 2;
    let register = op.instruction.op0_kind() == OpKind::Register;
    if !addressable(op) || register && u64::from(op.size) == BYTES {
        return None;
    }
    let segments = offset_of!(Cpu, system) + offset_of!(SystemState, segments);
    let segment = segments + usize::from(op.a) * size_of::<Segment>();
    let selector = field(segment + offset_of!(Segment, selector));
    if !register {
        emission.linear_address(op);
        emission.translate(true, BYTES);
        emission.settle(24);
        emission.code.load_16(SCRATCH, selector);
        emission.code.store_16(OPERAND, SCRATCH);
        return Some(());
    }
    emission.settle(24);
    match home(op.instruction.op0_register().number() as u8) {
        Home::Host(host) => emission.code.load_16(host, selector),
        Home::Memory(place) => {
            emission.code.load_16(SCRATCH, selector);
            emission.code.store(place, SCRATCH);
        }
    }
    Some(())
}
