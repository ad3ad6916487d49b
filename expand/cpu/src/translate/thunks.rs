//! The ways into translated code, out of it, and from it to the operations written in Rust.

use std::mem::offset_of;

use super::assembler::{Assembler, Place, R12, R13, R14, R15, RAX, RBP, RBX, RDI, RSI, at};
use super::registers::{
    IN_REGISTERS, PAGE_SHIFT, SCRATCH, SHIFT, STATE, STATE_BIAS, field, general_slot,
};
use super::site::{LEFT_BY_EXIT, LEFT_WITHOUT_BUDGET, run_last_operation, run_operation};
use crate::cpu::{LEFT_AT, Registers, VECTORS_LOADED};
use crate::native::code_buffer::{CodeBuffer, Region};

/// Addresses of the pieces of code that all blocks share.
#[derive(Clone, Copy, Debug)]
pub(super) struct Thunks {
    /// `extern "sysv64" fn(state, code) -> reason`: runs translated code.
    pub(super) enter: *const u8,
    /// Called with a [`super::site::Site`] in R14: runs its operation and returns, or leaves.
    pub(super) operation: u64,
    /// The same; afterwards the XMM registers are loaded.
    pub(super) operation_with_vectors: u64,
    /// Called: loads the guest's XMM registers.
    pub(super) load_vectors: u64,
    /// Jumped to with a [`super::site::Site`] in R14: runs its operation and leaves.
    pub(super) last_operation: u64,
    /// Jumped to with an [`super::site::Exit`] in R14: leaves.
    pub(super) exit: u64,
    /// Jumped to with a [`super::site::Site`] in R14: leaves before its block.
    pub(super) without_budget: u64,
}

/// Pieces that the other thunks use.
#[derive(Clone, Copy)]
struct Ways {
    /// Called: stores the guest's XMM registers.
    store_vectors: u64,
    /// Jumped to: returns to Rust with the reason in EAX; the guest's registers are stored.
    leave: u64,
}

const XMM_REGISTERS: u8 = 16;

/// Registers that the host's calling convention wants back, in the order of pushing.
const KEPT: [super::assembler::Host; 6] = [RBX, RBP, R12, R13, R14, R15];

impl Thunks {
    pub(super) fn new(buffer: &mut CodeBuffer) -> Self {
        let mut emit = |body: &dyn Fn(&mut Assembler)| {
            let mut code = Assembler::new(buffer.next_address(Region::Hot));
            body(&mut code);
            buffer.append(Region::Hot, &code.finish()).expect("the thunks come first in the buffer")
        };
        let enter = emit(&enter);
        let store_vectors = emit(&store_vectors) as u64;
        let ways = Ways { store_vectors, leave: emit(&leave) as u64 };
        Self {
            enter,
            operation: emit(&|code| operation(code, ways, false)) as u64,
            operation_with_vectors: emit(&|code| operation(code, ways, true)) as u64,
            load_vectors: emit(&|code| {
                load_vectors(code);
                code.ret();
            }) as u64,
            last_operation: emit(&|code| last_operation(code, ways)) as u64,
            exit: emit(&|code| out(code, LEFT_BY_EXIT, ways)) as u64,
            without_budget: emit(&|code| out(code, LEFT_WITHOUT_BUDGET, ways)) as u64,
        }
    }
}

fn enter(code: &mut Assembler) {
    for register in KEPT {
        code.push(register);
    }
    // With the return address that is 56 bytes: eight more align the stack for calls.
    code.reserve_stack(8);
    code.lea(STATE, at(RDI, STATE_BIAS));
    code.copy(R14, RSI);
    load_guest(code);
    code.jump_register(R14);
}

/// See [`Ways::leave`].
fn leave(code: &mut Assembler) {
    code.release_stack(8);
    for register in KEPT.into_iter().rev() {
        code.pop(register);
    }
    code.ret();
}

fn operation(code: &mut Assembler, ways: Ways, with_vectors: bool) {
    store_guest(code, ways.store_vectors);
    // The return address unaligned the stack.
    code.reserve_stack(8);
    call(code, run_operation as *const () as u64);
    code.release_stack(8);
    code.test_eax();
    let stopped = code.jump_forward_if(5);
    load_guest(code);
    if with_vectors {
        load_vectors(code);
    }
    code.ret();
    code.land(stopped);
    code.release_stack(8); // The return address.
    code.jump_to(ways.leave);
}

fn last_operation(code: &mut Assembler, ways: Ways) {
    store_guest(code, ways.store_vectors);
    call(code, run_last_operation as *const () as u64);
    code.jump_to(ways.leave);
}

fn out(code: &mut Assembler, reason: u32, ways: Ways) {
    store_guest(code, ways.store_vectors);
    code.store(general_slot(LEFT_AT), R14);
    code.immediate(RAX, u64::from(reason));
    code.jump_to(ways.leave);
}

/// Calls `function(cpu, R14)`.
fn call(code: &mut Assembler, function: u64) {
    code.lea(RDI, at(STATE, -STATE_BIAS));
    code.copy(RSI, R14);
    code.immediate(RAX, function);
    code.call_register(RAX);
}

/// Stores the guest's registers and flags, its XMM registers if they are loaded.
fn store_guest(code: &mut Assembler, store_vectors: u64) {
    code.load(SCRATCH, general_slot(VECTORS_LOADED));
    let absent = code.jump_near_if_rcx_zero();
    code.call_to(store_vectors);
    code.land(absent);
    for (guest, host) in IN_REGISTERS {
        code.store(general_slot(guest), host);
    }
    code.flags_to_ax();
    code.store_16(field(offset_of!(Registers, arithmetic)), RAX);
}

/// See [`Ways::store_vectors`].
fn store_vectors(code: &mut Assembler) {
    for number in 0..XMM_REGISTERS {
        code.store_vector(vector_slot(number), number);
    }
    code.store_immediate(general_slot(VECTORS_LOADED), 0);
    code.ret();
}

/// Loads the guest's XMM registers.
fn load_vectors(code: &mut Assembler) {
    for number in 0..XMM_REGISTERS {
        code.load_vector(number, vector_slot(number));
    }
    code.store_immediate(general_slot(VECTORS_LOADED), 1);
}

/// Where a guest XMM register is kept.
fn vector_slot(number: u8) -> Place {
    field(offset_of!(Registers, xmm) + usize::from(number) * 16)
}

/// Loads them, and the constant.
fn load_guest(code: &mut Assembler) {
    code.load_16(RAX, field(offset_of!(Registers, arithmetic)));
    code.flags_from_ax();
    for (guest, host) in IN_REGISTERS {
        code.load(host, general_slot(guest));
    }
    code.immediate(SHIFT, PAGE_SHIFT);
}
