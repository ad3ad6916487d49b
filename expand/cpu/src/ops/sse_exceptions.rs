//! Unmasked SSE exceptions. The host runs with all of them masked; once the guest unmasks one, each
//! instruction that can raise any runs under the guest's own masks, one at a time.

use iced_x86::Mnemonic;

use super::x87_exceptions::uses_mmx;
use crate::cpu::{CR4_OSXMMEXCPT, Cpu};
use crate::decode::op::Op;
use crate::fault::{Fault, Flow, Stop, vector};
use crate::mode::Mode;
use crate::native;
use crate::native::trapping::{self, Trapped};

/// Bytes of the largest memory operand.
const MAX_OPERAND_BYTES: usize = 16;

/// An operand as its sequence wants it.
#[repr(align(16))]
struct Operand([u8; MAX_OPERAND_BYTES]);

/// Replaces the handler that native selection gave an SSE floating-point instruction.
pub(super) fn wrap_native(op: &mut Op, mode: Mode) {
    if mode.has(Mode::SSE_UNMASKED) && can_raise(op.instruction.mnemonic()) {
        // A conversion to or from MMX registers may have been wrapped already, to wait for the x87
        // unit: `checked` does that too.
        op.handler = checked;
        trapping::install();
    }
}

/// Whether an instruction can raise SSE exceptions.
fn can_raise(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    let computes = matches!(
        mnemonic,
        Addss
            | Addps
            | Addsd
            | Addpd
            | Subss
            | Subps
            | Subsd
            | Subpd
            | Mulss
            | Mulps
            | Mulsd
            | Mulpd
            | Divss
            | Divps
            | Divsd
            | Divpd
            | Sqrtss
            | Sqrtps
            | Sqrtsd
            | Sqrtpd
            | Addsubps
            | Addsubpd
            | Haddps
            | Haddpd
            | Hsubps
            | Hsubpd
            | Dpps
            | Dppd
    );
    let compares = matches!(
        mnemonic,
        Minss
            | Minps
            | Minsd
            | Minpd
            | Maxss
            | Maxps
            | Maxsd
            | Maxpd
            | Cmpss
            | Cmpps
            | Cmpsd
            | Cmppd
            | Comiss
            | Comisd
            | Ucomiss
            | Ucomisd
    );
    let converts = matches!(
        mnemonic,
        Cvtpi2ps
            | Cvtps2pi
            | Cvttps2pi
            | Cvtpi2pd
            | Cvtpd2pi
            | Cvttpd2pi
            | Cvtsi2ss
            | Cvtsi2sd
            | Cvtss2si
            | Cvttss2si
            | Cvtsd2si
            | Cvttsd2si
            | Cvtps2pd
            | Cvtpd2ps
            | Cvtss2sd
            | Cvtsd2ss
            | Cvtdq2ps
            | Cvtps2dq
            | Cvttps2dq
            | Cvtpd2dq
            | Cvttpd2dq
            | Roundss
            | Roundps
            | Roundsd
            | Roundpd
    );
    computes || compares || converts
}

extern "sysv64" fn checked(cpu: &mut Cpu, op: &Op) -> Flow {
    Flow::from(run_checked(cpu, op))
}

fn run_checked(cpu: &mut Cpu, op: &Op) -> Result<(), Stop> {
    if uses_mmx(&op.instruction) {
        cpu.wait_for_x87()?;
    }
    let mut operand = Operand([0; MAX_OPERAND_BYTES]);
    let operand = &mut operand.0[..usize::from(op.operand_bytes)];
    if op.native.is_some() {
        native::load(cpu, op, operand)?;
    }
    match trapping::run_trapping(cpu, op, operand) {
        Ok(()) => Ok(()),
        Err(Trapped) if cpu.system.cr4 & CR4_OSXMMEXCPT != 0 => cpu.fault(Fault::plain(vector::XM)),
        Err(Trapped) => cpu.fault(Fault::UD),
    }
}
