//! MXCSR, and the SSE-era instructions that compute nothing: fences, prefetches, hints.

use iced_x86::{Code, Instruction, Mnemonic, OpCodeTableKind};

use super::{BlockEnd, handler, nothing, sse_exceptions};
use crate::cpu::NO_SEGMENT;
use crate::decode::op::{Handler, Op};
use crate::fault::Fault;
use crate::mode::Mode;
use crate::native::host_fpu::MXCSR_MASK;

pub(super) fn select(op: &mut Op, _mode: Mode) -> Option<BlockEnd> {
    let (handler, reads, writes): (Handler, bool, bool) = match op.instruction.mnemonic() {
        Mnemonic::Lfence | Mnemonic::Mfence | Mnemonic::Sfence => return Some(no_access(op)),
        _ if is_hint(&op.instruction) => return Some(no_access(op)),
        Mnemonic::Clflush => (clflush, true, false),
        Mnemonic::Ldmxcsr => (ldmxcsr, true, false),
        Mnemonic::Stmxcsr => (stmxcsr, false, true),
        _ => return None,
    };
    op.handler = handler;
    op.reads = reads;
    op.writes = writes;
    op.operand_bytes = op.instruction.memory_size().size() as u16;
    Some(BlockEnd::Continue)
}

/// Makes `op` do nothing. A memory operand is only an address then, that no segment checks.
fn no_access(op: &mut Op) -> BlockEnd {
    op.handler = nothing;
    op.segment = NO_SEGMENT;
    BlockEnd::Continue
}

/// Wraps a native SSE instruction in what its sequence does not do; see [`sse_exceptions`].
pub(super) fn wrap_native(op: &mut Op, mode: Mode) {
    sse_exceptions::wrap_native(op, mode);
}

/// Whether the instruction uses SSE state that is not an XMM operand.
pub(super) fn is_sse_state(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Ldmxcsr | Mnemonic::Stmxcsr)
}

/// Whether the encoding does nothing on this CPU model: NOP and PAUSE, prefetches, and the rest of
/// the opcodes that were reserved as NOPs and that later CPUs gave a meaning (0F 0D, 0F 18 to 0F 1F:
/// MPX, CET's ENDBR and RDSSP, CLDEMOTE).
pub(super) fn is_hint(instruction: &Instruction) -> bool {
    let code = instruction.code();
    let plain = matches!(code, Code::Nopw | Code::Nopd | Code::Nopq | Code::Pause);
    let op_code = code.op_code();
    let reserved = op_code.table() == OpCodeTableKind::T0F
        && matches!(op_code.op_code() & !0xff, 0 | 0x1e00)
        && matches!(reserved_nop(op_code.op_code()), 0x0d | 0x18..=0x1f);
    plain || reserved
}

/// The first opcode byte of an opcode of one or two.
fn reserved_nop(op_code: u32) -> u32 {
    if op_code > 0xff { op_code >> 8 } else { op_code }
}

handler!(
    /// CLFLUSH: caches are not modelled, but the line must be readable.
    clflush(cpu, op) {
        let linear = op.linear_address(cpu);
        let _: u8 = cpu.load(linear, op.segment)?;
        Ok(())
    }
);

handler!(
    /// LDMXCSR.
    ldmxcsr(cpu, op) {
        let linear = op.linear_address(cpu);
        let mxcsr: u32 = cpu.load(linear, op.segment)?;
        if mxcsr & !MXCSR_MASK != 0 {
            return cpu.fault(Fault::GP0);
        }
        cpu.fpu.set_live_mxcsr(mxcsr);
        cpu.masks_changed()
    }
);

handler!(
    /// STMXCSR.
    stmxcsr(cpu, op) {
        let linear = op.linear_address(cpu);
        let mxcsr = cpu.fpu.live_mxcsr();
        cpu.store(linear, op.segment, mxcsr)?;
        cpu.stored()
    }
);
