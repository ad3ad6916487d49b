//! MOVS and STOS, with REP as well, and LODS: the host's own, on what lies in known pages. A repeated one
//! whose elements do not all lie in one page on each side is run in Rust, which goes page by page.
//!
//! DF is clear in the unit's mode. RSI and RDI are the guest's pointers and, for one instruction, the
//! host's: an exception cannot come between, nor any look at them.

use iced_x86::Code;
use reprise_trace::cpu_state::{FS, GS};

use super::assembler::{Host, RAX, RDI, RSI, at, indexed};
use super::emission::Emission;
use super::registers::{ADDEND, ADDRESS, GUEST_RCX, SCRATCH, general_slot};
use crate::cpu::TEMPORARY;
use crate::decode::op::Op;
use crate::mode::Mode;

const REP: u8 = 0xf3;

/// Emits a string instruction; `None`, with nothing emitted, if it is not one of these.
pub(super) fn emit(emission: &mut Emission<'_>, op: &Op) -> Option<()> {
    let instruction = &*op.instruction;
    let (opcode, reads, writes) = match instruction.code() {
        Code::Movsb_m8_m8 => (0xa4, true, true),
        Code::Movsw_m16_m16 | Code::Movsd_m32_m32 | Code::Movsq_m64_m64 => (0xa5, true, true),
        Code::Stosb_m8_AL => (0xaa, false, true),
        Code::Stosw_m16_AX | Code::Stosd_m32_EAX | Code::Stosq_m64_RAX => (0xab, false, true),
        Code::Lodsb_AL_m8 => (0xac, true, false),
        Code::Lodsw_AX_m16 | Code::Lodsd_EAX_m32 | Code::Lodsq_RAX_m64 => (0xad, true, false),
        _ => return None,
    };
    let repeated = is_repeated(op);
    let plain = op.address_mask == u64::MAX && !matches!(usize::from(op.b), FS | GS);
    let down = emission.surroundings.mode.has(Mode::DOWNWARDS);
    // A trace wants each element's address.
    let traced = emission.surroundings.traced;
    if !plain || down || repeated && (!writes || traced) {
        return None;
    }
    if reads && writes {
        find(emission, op, RSI, false);
        emission.code.store(general_slot(TEMPORARY), ADDEND);
        find(emission, op, RDI, true);
        emission.code.load(ADDRESS, general_slot(TEMPORARY));
        to_host(emission, RSI, ADDRESS);
        to_host(emission, RDI, ADDEND);
    } else {
        let pointer = if writes { RDI } else { RSI };
        find(emission, op, pointer, writes);
        to_host(emission, pointer, ADDEND);
    }
    if repeated && instruction.code() == Code::Stosb_m8_AL {
        fill_bytes(emission);
    } else {
        execute(emission, opcode, op.size, repeated);
    }
    if reads && writes {
        to_guest(emission, RSI, ADDRESS);
        to_guest(emission, RDI, ADDEND);
    } else {
        to_guest(emission, if writes { RDI } else { RSI }, ADDEND);
    }
    Some(())
}

fn is_repeated(op: &Op) -> bool {
    op.instruction.has_rep_prefix() || op.instruction.has_repne_prefix()
}

/// [`ADDEND`] = what leads from `pointer` to where its elements are.
fn find(emission: &mut Emission<'_>, op: &Op, pointer: Host, write: bool) {
    if is_repeated(op) {
        return emission.translate_run(pointer, GUEST_RCX, write, u64::from(op.size));
    }
    emission.settle(8);
    emission.code.copy(ADDRESS, pointer);
    emission.translate(write, u64::from(op.size));
}

/// A pointer becomes the host's.
fn to_host(emission: &mut Emission<'_>, pointer: Host, addend: Host) {
    emission.settle(16);
    emission.code.lea(pointer, indexed(pointer, addend, 0, 0));
}

/// A pointer becomes the guest's again.
fn to_guest(emission: &mut Emission<'_>, pointer: Host, addend: Host) {
    emission.settle(16);
    emission.code.complement(addend);
    emission.code.lea(pointer, indexed(pointer, addend, 0, 1));
}

/// REP STOSB, which many hosts do byte by byte: eight bytes at a time, and the last eight at once.
fn fill_bytes(emission: &mut Emission<'_>) {
    const LAST_BYTES: i32 = 8;
    emission.settle(40);
    let code = &mut emission.code;
    code.store(general_slot(TEMPORARY), RAX);
    code.zero_extend_8(RAX, RAX);
    for shift in [8, 16] {
        code.immediate(SCRATCH, shift);
        code.shift_left(ADDRESS, RAX, SCRATCH);
        code.lea(RAX, indexed(RAX, ADDRESS, 0, 0));
    }
    emission.settle(80);
    let code = &mut emission.code;
    code.immediate(SCRATCH, 32);
    code.shift_left(ADDRESS, RAX, SCRATCH);
    code.lea(RAX, indexed(RAX, ADDRESS, 0, 0));
    code.immediate(SCRATCH, 3);
    code.shift_right(SCRATCH, GUEST_RCX, SCRATCH);
    let few = code.jump_near_if_rcx_zero();
    code.lea(ADDRESS, indexed(RDI, GUEST_RCX, 0, 0));
    code.bytes(&[REP, 0x48, 0xab]);
    code.copy(RDI, ADDRESS);
    code.store(at(RDI, -LAST_BYTES), RAX);
    let done = code.jump_near();
    code.land(few);
    code.copy(SCRATCH, GUEST_RCX);
    code.bytes(&[REP, 0xaa]);
    code.land(done);
    code.immediate(GUEST_RCX, 0);
    code.load(RAX, general_slot(TEMPORARY));
}

fn execute(emission: &mut Emission<'_>, opcode: u8, size: u8, repeated: bool) {
    emission.settle(16);
    if repeated {
        emission.code.copy(SCRATCH, GUEST_RCX);
        emission.code.bytes(&[REP]);
    }
    match size {
        2 => emission.code.bytes(&[0x66]),
        8 => emission.code.bytes(&[0x48]),
        _ => {}
    }
    emission.code.bytes(&[opcode]);
    if repeated {
        emission.code.copy(GUEST_RCX, SCRATCH);
    }
}
