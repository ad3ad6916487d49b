//! Instructions written by hand: those that a native sequence cannot be. Each module names the
//! instructions it handles in its `select`; what none of them takes runs natively.
//!
//! # To add one
//!
//! 1. Write it as a handler in the file of its kind (here, or in `system/`), with the [`handler!`] macro:
//!    `handler!(name(cpu, op) { ... })`. The body ends in `Ok(())`, or in a [`crate::fault::Stop`] that
//!    `cpu.fault(...)` gives. Nothing of the guest may have changed when it faults or leaves for the board:
//!    check first, then change. Operands are in [`Op`]'s fields; memory goes through `cpu.load` and
//!    `cpu.store` (then end with `cpu.stored()`), the stack through `cpu.push` and `cpu.peek`.
//! 2. Name it in that file's `select`, fill in the fields that it reads, and say what it means for its
//!    block: [`BlockEnd::Continue`] if the next instruction may follow in the block, `After` if it
//!    changes how code is decoded, fetched or interrupted, `Branch` if it sets RIP.
//! 3. Translated code calls it where it stands. Should it be worth code of its own, add that to
//!    `translate/`, with nothing that touches the flags and a slow way that is this handler.
//! 4. Add its opcode to the cases in `expand/cpu/tests/` (every guest there runs with and without
//!    translation), and to `tests/differential/opcodes.rs` if it runs at privilege level 3: the real
//!    CPU is asked then. `ops/coverage.rs` fails if two files claim it, or none.

mod bcd;
mod bits;
mod branch;
#[cfg(test)]
mod coverage;
mod divide;
mod flag_ops;
mod masked_move;
mod moves;
mod port_io;
mod sse_control;
#[cfg(test)]
mod sse_control_tests;
mod sse_exceptions;
mod stack;
mod string;
#[cfg(test)]
pub(crate) mod testing;
mod x87_control;
#[cfg(test)]
mod x87_control_tests;
mod x87_exceptions;

use iced_x86::{Code, CpuidFeature, EncodingKind, Instruction, Register};

use crate::cpu::Cpu;
use crate::decode::op::Op;
use crate::fault::{Fault, Flow};
use crate::mode::Mode;
use crate::{counting, native, other_maker, system};

pub(crate) use branch::condition_code;

/// Defines a handler from a body that may end in a `Stop`.
macro_rules! handler {
    ($(#[$meta:meta])* $name:ident $(<$(const $parameter:ident: $type:ty),+>)?
        ($cpu:ident, $op:ident) $body:block) => {
        $(#[$meta])*
        pub(crate) extern "sysv64" fn $name $(<$(const $parameter: $type),+>)?
            ($cpu: &mut $crate::cpu::Cpu, $op: &$crate::decode::op::Op) -> $crate::fault::Flow {
            #[inline(always)]
            fn body $(<$(const $parameter: $type),+>)?
                ($cpu: &mut $crate::cpu::Cpu, $op: &$crate::decode::op::Op)
                -> Result<(), $crate::fault::Stop> $body
            $crate::fault::Flow::from(body $(::<$($parameter),+>)? ($cpu, $op))
        }
    };
}
pub(crate) use handler;

/// What an instruction means for its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BlockEnd {
    /// The next instruction follows in the block.
    Continue,
    /// The block ends; the handler sets RIP.
    Branch,
    /// The block ends, since what follows may be decoded or run differently; RIP follows by itself.
    After,
}

/// The modules' own choices, at most one of which takes an instruction.
const BY_HAND: &[fn(&mut Op, Mode) -> Option<BlockEnd>] = &[
    moves::select,
    stack::select,
    branch::select,
    string::select,
    flag_ops::select,
    bits::select,
    port_io::select,
    bcd::select,
    x87_control::select,
    sse_control::select,
    masked_move::select,
    system::select,
];

/// Chooses what runs `op.instruction` and fills in the fields that it needs.
pub(crate) fn select(cpu: &mut Cpu, op: &mut Op) -> BlockEnd {
    let mode = cpu.mode;
    if undefined(&op.instruction) {
        op.handler = if is_too_long(&op.instruction) { raise_gp } else { raise_ud };
        return BlockEnd::Branch;
    }
    if let Some(handler) = fpu_trap(&op.instruction, mode) {
        op.handler = handler;
        return BlockEnd::Branch;
    }
    for by_hand in BY_HAND {
        if let Some(end) = by_hand(op, mode) {
            counting::wrap_branch(cpu, op);
            return end;
        }
    }
    if let Some(end) = native::select(cpu, op) {
        let alone = op.handler as usize;
        x87_control::wrap_native(op, mode);
        sse_control::wrap_native(op, mode);
        divide::wrap_native(op);
        op.instruction.inline = op.handler as usize == alone;
        other_maker::wrap_native(cpu, op);
        return end;
    }
    op.handler = raise_ud;
    BlockEnd::Branch
}

/// Features of the CPU model, as the decoder names them; an instruction of any other is undefined.
const FEATURES: &[CpuidFeature] = &[
    CpuidFeature::INTEL8086,
    CpuidFeature::INTEL8086_ONLY,
    CpuidFeature::INTEL186,
    CpuidFeature::INTEL286,
    CpuidFeature::INTEL386,
    CpuidFeature::INTEL486,
    CpuidFeature::X64,
    CpuidFeature::CLFSH,
    CpuidFeature::CMOV,
    CpuidFeature::CMPXCHG16B,
    CpuidFeature::CPUID,
    CpuidFeature::CX8,
    CpuidFeature::FPU,
    CpuidFeature::FPU287,
    CpuidFeature::FPU387,
    CpuidFeature::FXSR,
    CpuidFeature::MMX,
    CpuidFeature::MSR,
    CpuidFeature::MULTIBYTENOP,
    CpuidFeature::PAUSE,
    CpuidFeature::POPCNT,
    CpuidFeature::PREFETCHW,
    CpuidFeature::RDPMC,
    CpuidFeature::SEP,
    CpuidFeature::SMAP,
    CpuidFeature::SSE,
    CpuidFeature::SSE2,
    CpuidFeature::SSE3,
    CpuidFeature::SSE4_1,
    CpuidFeature::SSE4_2,
    CpuidFeature::SSSE3,
    CpuidFeature::SYSCALL,
    CpuidFeature::TSC,
];

fn undefined(instruction: &Instruction) -> bool {
    if instruction.code() == Code::INVALID || instruction.encoding() != EncodingKind::Legacy {
        return true;
    }
    // Opcodes that were reserved as NOPs are NOPs, whatever later CPUs made of them.
    if sse_control::is_hint(instruction) {
        return false;
    }
    instruction.cpuid_features().iter().any(|feature| !FEATURES.contains(feature))
}

/// What an x87, MMX or SSE instruction raises because the system has switched the unit off.
fn fpu_trap(instruction: &Instruction, mode: Mode) -> Option<crate::decode::op::Handler> {
    let operands = || {
        (0..instruction.op_count())
            .filter(|&operand| instruction.op_kind(operand) == iced_x86::OpKind::Register)
            .map(|operand| instruction.op_register(operand))
    };
    let mmx = operands().any(Register::is_mm) || instruction.mnemonic() == iced_x86::Mnemonic::Emms;
    let x87 = mmx || x87_control::is_x87_state(instruction);
    let sse = operands().any(Register::is_xmm) || sse_control::is_sse_state(instruction);
    if sse && mode.has(Mode::SSE_UNDEFINED) {
        Some(raise_ud)
    } else if mmx && mode.has(Mode::X87_TRAPS) {
        Some(raise_mmx_trap)
    } else if sse && mode.has(Mode::SSE_TRAPS) || x87 && mode.has(Mode::X87_TRAPS) {
        Some(raise_nm)
    } else {
        None
    }
}

/// Whether the decoder gave up because an instruction has more than 15 bytes.
fn is_too_long(instruction: &Instruction) -> bool {
    const MAX_INSTRUCTION_BYTES: usize = 15;
    instruction.is_invalid() && instruction.len() == MAX_INSTRUCTION_BYTES
}

/// #GP(0).
extern "sysv64" fn raise_gp(cpu: &mut Cpu, _op: &Op) -> Flow {
    Flow::from(cpu.fault::<()>(Fault::GP0))
}

/// #UD.
pub(crate) extern "sysv64" fn raise_ud(cpu: &mut Cpu, _op: &Op) -> Flow {
    Flow::from(cpu.fault::<()>(Fault::UD))
}

/// #NM.
pub(crate) extern "sysv64" fn raise_nm(cpu: &mut Cpu, _op: &Op) -> Flow {
    Flow::from(cpu.fault::<()>(Fault::NM))
}

/// What an MMX instruction raises: #UD where CR0.EM is set, #NM where only CR0.TS is.
extern "sysv64" fn raise_mmx_trap(cpu: &mut Cpu, _op: &Op) -> Flow {
    let emulated = cpu.system.cr0 & crate::cpu::CR0_EM != 0;
    Flow::from(cpu.fault::<()>(if emulated { Fault::UD } else { Fault::NM }))
}

/// An instruction without effect.
pub(crate) extern "sysv64" fn nothing(_cpu: &mut Cpu, _op: &Op) -> Flow {
    Flow::NEXT
}

/// Whether an operation is one without effect.
pub(crate) fn does_nothing(op: &Op) -> bool {
    op.handler as usize == nothing as *const () as usize
}

/// Whether a native sequence runs an instruction.
#[cfg(test)]
pub(crate) fn runs_natively(cpu: &mut Cpu, instruction: &Instruction) -> bool {
    let mode = cpu.mode;
    let op = || Op::new(*instruction, 0, 0);
    let by_hand = BY_HAND.iter().any(|by_hand| by_hand(&mut op(), mode).is_some());
    !undefined(instruction) && !by_hand && native::select(cpu, &mut op()).is_some()
}
