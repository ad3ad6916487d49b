//! Native sequences under the guest's own SSE exception masks.
//!
//! An unmasked SSE exception is a fault, which the host raises as SIGFPE in the middle of a sequence.
//! A sequence stores its results only after the instruction that can fault, so the guest's registers
//! are as before when the signal handler leaves the sequence, and MXCSR holds just what the host sets.
#![allow(unsafe_code)]

use std::arch::asm;
use std::cell::Cell;
use std::ptr::{null, null_mut};
use std::sync::Once;

use super::host_fpu::{EXCEPTIONS, host};
use crate::cpu::Cpu;
use crate::decode::op::Op;

/// An instruction raised an unmasked SSE exception; nothing of it has taken effect but MXCSR's flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Trapped;

/// What a sequence returns in EAX that was left by the signal handler.
const LEFT: u32 = u32::MAX;

/// Where the signal handler goes on.
#[repr(C)]
struct Recovery {
    rip: u64,
    rsp: u64,
    /// The one register that a sequence may have changed and that its caller wants back.
    rbx: u64,
}

thread_local! {
    /// The sequence that this thread is running, if it is to be left on SIGFPE.
    static RECOVERY: Cell<*const Recovery> = const { Cell::new(null()) };
}

/// Has SIGFPE handled from now on.
pub(crate) fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // SAFETY: the handler touches only its arguments and a thread-local that needs no
        // initialisation. Were it not installed, SIGFPE would end the process.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_sigfpe as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaction(libc::SIGFPE, &action, null_mut());
        }
    });
}

extern "C" fn on_sigfpe(
    signal: libc::c_int,
    _information: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes the interrupted context.
    if unsafe { !recover(context) } {
        // Not of the guest's doing: the process ends as it would have without this handler.
        // SAFETY: a plain system call.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// Leaves the sequence that this thread is running, if it is, when the interrupted context is
/// resumed.
///
/// # Safety
/// `context` is what the kernel passed to a signal handler.
pub(crate) unsafe fn recover(context: *mut libc::c_void) -> bool {
    let recovery = RECOVERY.replace(null());
    if recovery.is_null() {
        return false;
    }
    // SAFETY: `run` is still waiting for the sequence, so its `Recovery` is alive; what it says is
    // where that sequence returns to.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        registers[libc::REG_RIP as usize] = (*recovery).rip as i64;
        registers[libc::REG_RSP as usize] = (*recovery).rsp as i64;
        registers[libc::REG_RBX as usize] = (*recovery).rbx as i64;
        registers[libc::REG_RAX as usize] = i64::from(LEFT);
    }
    true
}

/// Runs `op`'s sequence under the guest's masks, on `operand` if it takes one from memory. Either way
/// MXCSR's flags are then those that the guest is to see. [`install`] must have been called.
pub(crate) fn run_trapping(cpu: &mut Cpu, op: &Op, operand: &mut [u8]) -> Result<(), Trapped> {
    assert!(op.native.is_none() || operand.len() == usize::from(op.operand_bytes));
    let entry = match op.native {
        Some(native) => native as usize,
        None => op.instruction.inner as usize,
    };
    let masked = host::mxcsr();
    let mut mxcsr = cpu.fpu.live_mxcsr();
    let mut recovery = Recovery { rip: 0, rsp: 0, rbx: 0 };
    let recovery = &raw mut recovery;
    RECOVERY.set(recovery);
    let result: u64;
    // SAFETY: the sequence was made for this operation: it follows the calling convention, and
    // touches the CPU's registers and the operand. It ends by returning, or by the signal handler
    // going on at label 2 with the registers that a call has to keep. No other code runs under the
    // guest's MXCSR, which has no reserved bit.
    unsafe {
        asm!(
            "lea r11, [rip + 2f]",
            "mov [r10], r11",
            "mov [r10 + 8], rsp",
            "mov [r10 + 16], rbx",
            "ldmxcsr [r12]",
            "call rax",
            "2:",
            "stmxcsr [r12]",
            "ldmxcsr [r13]",
            inout("rax") entry => result,
            in("rdi") &raw mut *cpu,
            in("rsi") operand.as_mut_ptr(),
            in("r10") recovery,
            in("r12") &raw mut mxcsr,
            in("r13") &raw const masked,
            clobber_abi("sysv64"),
        );
    }
    RECOVERY.set(null());
    host::set_mxcsr(masked | mxcsr & u32::from(EXCEPTIONS));
    if result as u32 == LEFT { Err(Trapped) } else { Ok(()) }
}
