//! Which host registers stand for which guest registers in translated code, everywhere in it: blocks
//! lead into each other without loading or storing any.
//!
//! Ten guest registers have a host register; most keep their names, so that opcodes which use them
//! implicitly are right without a look. RCX is the one host register that a conditional jump can test
//! without the flags, so the guest's RCX lives elsewhere. The guest's R10 to R15 stay in memory.

use std::mem::offset_of;

use super::assembler::{
    Host, Place, R8, R9, R10, R11, R12, R13, R14, R15, RAX, RBP, RBX, RCX, RDI, RDX, RSI, at,
};
use crate::cpu::Registers;

/// Points into the CPU's registers, [`STATE_BIAS`] bytes past their start, so that all of
/// [`Registers::gpr`] is within reach of an 8-bit displacement.
pub(super) const STATE: Host = RBP;
pub(super) const STATE_BIAS: i32 = 128;
/// Always [`PAGE_SHIFT`], for shifts that leave the flags alone.
pub(super) const SHIFT: Host = R10;
pub(super) const PAGE_SHIFT: u64 = 12;
/// The linear address of an access, then its host address less what [`ADDEND`] holds.
pub(super) const ADDRESS: Host = R15;
/// Belongs to an access as well; free otherwise.
pub(super) const ADDEND: Host = R14;
/// Free between instructions.
pub(super) const SCRATCH: Host = RCX;

/// The guest registers that have a host register, and which.
pub(super) const IN_REGISTERS: [(u8, Host); 10] = [
    (0, RAX),
    (1, R11),
    (2, RDX),
    (3, RBX),
    (4, R12),
    (5, R13),
    (6, RSI),
    (7, RDI),
    (8, R8),
    (9, R9),
];
/// The guest's RCX.
pub(super) const GUEST_RCX: Host = R11;
/// The guest's RSP.
pub(super) const GUEST_RSP: Host = R12;
/// The guest's RBP.
pub(super) const GUEST_RBP: Host = R13;

/// Where a guest register's value is while translated code runs.
#[derive(Clone, Copy, Debug)]
pub(super) enum Home {
    Host(Host),
    Memory(Place),
}

/// Where guest register `number` is.
pub(super) fn home(number: u8) -> Home {
    match IN_REGISTERS.iter().find(|(guest, _)| *guest == number) {
        Some(&(_, host)) => Home::Host(host),
        None => Home::Memory(general_slot(number)),
    }
}

/// Where a slot of [`Registers::gpr`] lies.
pub(super) fn general_slot(slot: u8) -> Place {
    field(offset_of!(Registers, gpr) + usize::from(slot) * 8)
}

/// Where a field of [`Registers`] lies.
pub(super) fn field(offset: usize) -> Place {
    at(STATE, offset as i32 - STATE_BIAS)
}
