//! The ways into translated code, out of it, and from it to the operations written in Rust.

use std::mem::offset_of;

use super::assembler::{Assembler, R12, R13, R14, R15, RAX, RBP, RBX, RDI, RSI, at};
use super::registers::{IN_REGISTERS, PAGE_SHIFT, SHIFT, STATE, STATE_BIAS, field, general_slot};
use super::site::{LEFT_BY_EXIT, LEFT_WITHOUT_BUDGET, run_last_operation, run_operation};
use crate::cpu::{LEFT_AT, Registers};
use crate::native::code_buffer::{CodeBuffer, Region};

/// Addresses of the pieces of code that all blocks share.
#[derive(Clone, Copy, Debug)]
pub(super) struct Thunks {
    /// `extern "sysv64" fn(state, code) -> reason`: runs translated code.
    pub(super) enter: *const u8,
    /// Called with a [`super::site::Site`] in R14: runs its operation and returns, or leaves.
    pub(super) operation: u64,
    /// Jumped to with a [`super::site::Site`] in R14: runs its operation and leaves.
    pub(super) last_operation: u64,
    /// Jumped to with an [`super::site::Exit`] in R14: leaves.
    pub(super) exit: u64,
    /// Jumped to with a [`super::site::Site`] in R14: leaves before its block.
    pub(super) without_budget: u64,
}

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
        let leave = emit(&leave) as u64;
        Self {
            enter,
            operation: emit(&|code| operation(code, leave)) as u64,
            last_operation: emit(&|code| last_operation(code, leave)) as u64,
            exit: emit(&|code| out(code, LEFT_BY_EXIT, leave)) as u64,
            without_budget: emit(&|code| out(code, LEFT_WITHOUT_BUDGET, leave)) as u64,
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

/// Returns to Rust with the reason in EAX; the guest's registers are stored.
fn leave(code: &mut Assembler) {
    code.release_stack(8);
    for register in KEPT.into_iter().rev() {
        code.pop(register);
    }
    code.ret();
}

fn operation(code: &mut Assembler, leave: u64) {
    store_guest(code);
    // The return address unaligned the stack.
    code.reserve_stack(8);
    call(code, run_operation as *const () as u64);
    code.release_stack(8);
    code.test_eax();
    let stopped = code.jump_forward_if(5);
    load_guest(code);
    code.ret();
    code.land(stopped);
    code.release_stack(8); // The return address.
    code.jump_to(leave);
}

fn last_operation(code: &mut Assembler, leave: u64) {
    store_guest(code);
    call(code, run_last_operation as *const () as u64);
    code.jump_to(leave);
}

fn out(code: &mut Assembler, reason: u32, leave: u64) {
    store_guest(code);
    code.store(general_slot(LEFT_AT), R14);
    code.immediate(RAX, u64::from(reason));
    code.jump_to(leave);
}

/// Calls `function(cpu, R14)`.
fn call(code: &mut Assembler, function: u64) {
    code.lea(RDI, at(STATE, -STATE_BIAS));
    code.copy(RSI, R14);
    code.immediate(RAX, function);
    code.call_register(RAX);
}

/// Stores the guest's registers and flags.
fn store_guest(code: &mut Assembler) {
    for (guest, host) in IN_REGISTERS {
        code.store(general_slot(guest), host);
    }
    code.flags_to_ax();
    code.store_16(field(offset_of!(Registers, arithmetic)), RAX);
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
