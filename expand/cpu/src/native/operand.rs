//! Bringing a memory operand to a native sequence: at its place in guest RAM where the software TLB
//! knows it, else through a bounce buffer.
#![allow(unsafe_code)]

use iced_x86::{Instruction, Mnemonic};

use super::{MemoryUse, Sequence};
use crate::cpu::Cpu;
use crate::decode::op::{Handler, NativeWithMemory, Op};
use crate::fault::{Fault, Flow, Stop};
use crate::memory::access::MAX_OPERAND_BYTES;
use crate::ops::BlockEnd;

/// An operand that lies across pages, or on a device, or on code, while its instruction runs.
#[repr(align(64))]
struct Bounce([u8; MAX_OPERAND_BYTES]);

/// Gives `op` the native sequence of its instruction; false if there is none.
pub(crate) fn select(cpu: &mut Cpu, op: &mut Op) -> Option<BlockEnd> {
    let sequence = cpu.native.sequence(&op.instruction)?;
    let Sequence { entry, memory } = sequence;
    match memory {
        None => {
            // SAFETY: the sequence takes the CPU in RDI, ignores RSI, and returns a `Flow` in EAX:
            // it has the handler's signature.
            op.handler = unsafe { std::mem::transmute::<*const u8, Handler>(entry) };
            op.instruction.inner = op.handler;
        }
        Some(MemoryUse { size_bytes, reads, writes }) => {
            // SAFETY: the sequence takes the CPU in RDI and the operand's address in RSI.
            op.native = Some(unsafe { std::mem::transmute::<*const u8, NativeWithMemory>(entry) });
            op.operand_bytes = size_bytes;
            op.reads = reads;
            op.writes = writes;
            op.handler = match (writes, needs_alignment(&op.instruction)) {
                (false, false) => read,
                (true, false) => write,
                (_, true) => aligned,
            };
        }
    }
    Some(BlockEnd::Continue)
}

/// Whether a misaligned operand is #GP: all 16-byte operands of legacy SSE instructions but the
/// explicitly unaligned ones, and CMPXCHG16B.
pub(crate) fn needs_alignment(instruction: &Instruction) -> bool {
    use Mnemonic::{Lddqu, Movdqu, Movupd, Movups};
    use Mnemonic::{Pcmpestri, Pcmpestri64, Pcmpestrm, Pcmpestrm64, Pcmpistri, Pcmpistrm};
    let unaligned = matches!(instruction.mnemonic(), Lddqu | Movdqu | Movupd | Movups)
        || matches!(instruction.mnemonic(), Pcmpestri | Pcmpestri64 | Pcmpestrm | Pcmpestrm64)
        || matches!(instruction.mnemonic(), Pcmpistri | Pcmpistrm);
    instruction.memory_size().size() == 16 && !unaligned
}

/// How an operation that [`select`] took brings its operand to its sequence, for those that wrap it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// There is none in memory: [`run_register`].
    Register,
    /// [`read`].
    Read,
    /// [`write`].
    Write,
    /// [`aligned`], whether it is read or written.
    Aligned,
}

/// See [`Form`].
pub(crate) fn form(op: &Op) -> Form {
    match (op.native.is_some(), op.writes) {
        (false, _) => Form::Register,
        _ if needs_alignment(&op.instruction) => Form::Aligned,
        (true, false) => Form::Read,
        (true, true) => Form::Write,
    }
}

/// Runs an operation as [`select`] left it, for a handler that stands in front of any form.
pub(crate) fn run_selected(cpu: &mut Cpu, op: &Op) -> Flow {
    match form(op) {
        Form::Register => run_register(cpu, op),
        Form::Read => read(cpu, op),
        Form::Write => write(cpu, op),
        Form::Aligned => aligned(cpu, op),
    }
}

/// Runs the sequence of an operation without memory operand.
#[inline(always)]
pub(crate) fn run_register(cpu: &mut Cpu, op: &Op) -> Flow {
    // SAFETY: `select` put the sequence there, and only memory operands let anything replace it.
    unsafe { (op.instruction.inner)(cpu, op) }
}

/// Runs `op`'s native sequence on an operand in the caller's hands.
///
/// # Panics
/// If the operand has not the size that the operation asks for.
pub(crate) fn run_on(cpu: &mut Cpu, op: &Op, operand: &mut [u8]) -> Flow {
    assert_eq!(operand.len(), usize::from(op.operand_bytes));
    run(cpu, op, operand.as_mut_ptr())
}

/// Runs `op`'s native sequence on the operand at `host`.
#[inline(always)]
fn run(cpu: &mut Cpu, op: &Op, host: *mut u8) -> Flow {
    let native = op.native.expect("a memory operation has its sequence");
    // SAFETY: the sequence was emitted for this very instruction; it touches the CPU's registers
    // and `operand_bytes` at `host`, which the caller checked to be mapped RAM or its own buffer.
    unsafe { native(cpu, host) }
}

/// An operand that is only read.
pub(crate) extern "sysv64" fn read(cpu: &mut Cpu, op: &Op) -> Flow {
    let linear = op.linear_address(cpu);
    match cpu.memory.hit_read(linear, u64::from(op.operand_bytes)) {
        Some(host) => run(cpu, op, host),
        None => Flow::from(read_slow(cpu, op, linear)),
    }
}

/// An operand that is written, and perhaps read before.
pub(crate) extern "sysv64" fn write(cpu: &mut Cpu, op: &Op) -> Flow {
    let linear = op.linear_address(cpu);
    match cpu.memory.hit_write(linear, u64::from(op.operand_bytes)) {
        Some(host) => run(cpu, op, host),
        None => Flow::from(write_slow(cpu, op, linear)),
    }
}

/// A 16-byte operand that must be aligned.
pub(crate) extern "sysv64" fn aligned(cpu: &mut Cpu, op: &Op) -> Flow {
    if let Err(stop) = check_alignment(cpu, op) {
        return Flow::from(Err(stop));
    }
    if op.writes { write(cpu, op) } else { read(cpu, op) }
}

fn check_alignment(cpu: &mut Cpu, op: &Op) -> Result<(), Stop> {
    if op.linear_address(cpu).is_multiple_of(16) { Ok(()) } else { cpu.fault(Fault::GP0) }
}

/// Loads the operand of an operation that only reads it, for a handler that runs the sequence itself.
pub(crate) fn load(cpu: &mut Cpu, op: &Op, operand: &mut [u8]) -> Result<(), Stop> {
    if form(op) == Form::Aligned {
        check_alignment(cpu, op)?;
    }
    let linear = op.linear_address(cpu);
    cpu.load_slow(linear, op.segment, operand)
}

#[cold]
#[inline(never)]
fn read_slow(cpu: &mut Cpu, op: &Op, linear: u64) -> Result<(), Stop> {
    let mut bounce = Bounce([0; MAX_OPERAND_BYTES]);
    let operand = &mut bounce.0[..usize::from(op.operand_bytes)];
    cpu.load_slow(linear, op.segment, operand)?;
    run(cpu, op, bounce.0.as_mut_ptr());
    Ok(())
}

#[cold]
#[inline(never)]
fn write_slow(cpu: &mut Cpu, op: &Op, linear: u64) -> Result<(), Stop> {
    let size = usize::from(op.operand_bytes);
    let mut bounce = Bounce([0; MAX_OPERAND_BYTES]);
    cpu.check_store(linear, op.segment, size as u64)?;
    if op.reads {
        cpu.load_slow(linear, op.segment, &mut bounce.0[..size])?;
    }
    // The store may leave for the board, after which the instruction runs again from the start: its
    // registers must then be as before. (`ops` sees to x87 stores, which pop.)
    let before = cpu.registers.clone();
    run(cpu, op, bounce.0.as_mut_ptr());
    let stored = cpu.store_slow(linear, op.segment, &bounce.0[..size]);
    if stored.is_err() {
        cpu.registers = before;
        return stored;
    }
    cpu.stored()
}
