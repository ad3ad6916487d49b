//! Unmasked SSE exceptions. The host runs with all of them masked; once the guest unmasks one, each
//! instruction that can raise any is followed by a look at what it raised, and undone if the guest is
//! to see a fault instead of a result. Two things a CPU does are beyond this: with an unmasked
//! overflow or underflow it sets the precision flag by what is lost to an unbounded exponent, here by
//! what is lost to the masked result; and in a dot product it stops before additions whose
//! multiplications raised something, here all that any step raises is reported.

use iced_x86::Mnemonic;

use super::x87_exceptions::uses_mmx;
use crate::cpu::{CR4_OSXMMEXCPT, Cpu};
use crate::decode::op::Op;
use crate::fault::{Fault, Flow, vector};
use crate::mode::Mode;
use crate::native;
use crate::native::host_fpu::{Area, EXCEPTIONS, host};

/// MXCSR: invalid operation, denormal operand, division by zero: seen before anything is computed.
const BEFORE_COMPUTATION: u32 = 0b111;
/// MXCSR: underflow.
const UNDERFLOW: u32 = 1 << 4;
/// MXCSR: where the masks lie above the flags.
const MASK_SHIFT: u32 = 7;

/// Replaces the handler that native selection gave an SSE floating-point instruction.
pub(super) fn wrap_native(op: &mut Op, mode: Mode) {
    if !mode.has(Mode::SSE_UNMASKED) || result(op.instruction.mnemonic()).is_none() {
        return;
    }
    // A conversion to or from MMX registers may have been wrapped already, to wait for the x87 unit:
    // `checked` does that too.
    op.handler = checked;
}

/// Where an instruction leaves results that can be too small for a normal number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tiny {
    /// In none.
    No,
    /// In the low single, in four singles, in the low double, in two doubles.
    Single,
    Singles,
    Double,
    Doubles,
}

/// The instructions that can raise SSE exceptions.
fn result(mnemonic: Mnemonic) -> Option<Tiny> {
    use Mnemonic::*;
    Some(match mnemonic {
        Addss | Subss | Mulss | Divss | Cvtsd2ss => Tiny::Single,
        Addps | Subps | Mulps | Divps | Cvtpd2ps | Addsubps | Haddps | Hsubps | Dpps => {
            Tiny::Singles
        }
        Addsd | Subsd | Mulsd | Divsd => Tiny::Double,
        Addpd | Subpd | Mulpd | Divpd | Addsubpd | Haddpd | Hsubpd | Dppd => Tiny::Doubles,
        Sqrtss | Sqrtps | Sqrtsd | Sqrtpd | Minss | Minps | Minsd | Minpd | Maxss | Maxps
        | Maxsd | Maxpd | Cmpss | Cmpps | Cmpsd | Cmppd | Comiss | Comisd | Ucomiss | Ucomisd => {
            Tiny::No
        }
        Cvtpi2ps | Cvtps2pi | Cvttps2pi | Cvtpi2pd | Cvtpd2pi | Cvttpd2pi | Cvtsi2ss | Cvtsi2sd
        | Cvtss2si | Cvttss2si | Cvtsd2si | Cvttsd2si | Cvtps2pd | Cvtss2sd | Cvtdq2ps
        | Cvtps2dq | Cvttps2dq | Cvtpd2dq | Cvttpd2dq => Tiny::No,
        Roundss | Roundps | Roundsd | Roundpd => Tiny::No,
        _ => return None,
    })
}

/// Runs an instruction, and takes it back if it raised an exception that the guest does not mask.
extern "sysv64" fn checked(cpu: &mut Cpu, op: &Op) -> Flow {
    let mmx = uses_mmx(&op.instruction);
    let mut x87 = Area::zeroed();
    if mmx {
        if let Err(stop) = cpu.wait_for_x87() {
            return Flow::from(Err(stop));
        }
        host::fxsave(&mut x87);
    }
    let registers = cpu.registers.clone();
    let flags = u32::from(EXCEPTIONS);
    let mxcsr = host::mxcsr();
    host::set_mxcsr(mxcsr & !flags);
    let flow = native::run_selected(cpu, op);
    let raised = host::mxcsr() & flags;
    if flow != Flow::NEXT {
        host::set_mxcsr(mxcsr);
        return flow;
    }
    let unmasked = !(cpu.fpu.live_mxcsr() >> MASK_SHIFT) & flags;
    let raised = as_unmasked(cpu, op, raised, unmasked);
    host::set_mxcsr(mxcsr | raised);
    if raised & unmasked == 0 {
        return Flow::NEXT;
    }
    cpu.registers = registers;
    if mmx {
        // The operand stays as it was, but the x87 unit has become the MMX unit.
        host::fxrstor(&x87);
        host::enter_mmx();
        host::set_mxcsr(mxcsr | raised);
    }
    let reported = cpu.system.cr4 & CR4_OSXMMEXCPT != 0;
    Flow::from(cpu.fault::<()>(if reported { Fault::plain(vector::XM) } else { Fault::UD }))
}

/// What a computation raises that raised `raised` with all exceptions masked.
fn as_unmasked(cpu: &Cpu, op: &Op, raised: u32, unmasked: u32) -> u32 {
    if raised & unmasked & BEFORE_COMPUTATION != 0 {
        return raised & BEFORE_COMPUTATION;
    }
    // A masked underflow shows only where the result is rounded too; an unmasked one always.
    let exact_underflow = unmasked & UNDERFLOW != 0 && tiny_result(cpu, op);
    raised | if exact_underflow { UNDERFLOW } else { 0 }
}

fn tiny_result(cpu: &Cpu, op: &Op) -> bool {
    let tiny = result(op.instruction.mnemonic()).unwrap_or(Tiny::No);
    let register = op.instruction.op0_register();
    if tiny == Tiny::No || !register.is_xmm() {
        return false;
    }
    let value = cpu.registers.xmm[register.number()];
    // In bits: the host's MXCSR is the guest's, so comparing floating-point values would show.
    let single = |lane: u32| {
        let bits = (value >> (32 * lane)) as u32;
        bits << 1 != 0 && bits << 1 >> 24 == 0
    };
    let double = |lane: u32| {
        let bits = (value >> (64 * lane)) as u64;
        bits << 1 != 0 && bits << 1 >> 53 == 0
    };
    match tiny {
        Tiny::No => false,
        Tiny::Single => single(0),
        Tiny::Singles => (0..4).any(single),
        Tiny::Double => double(0),
        Tiny::Doubles => (0..2).any(double),
    }
}
