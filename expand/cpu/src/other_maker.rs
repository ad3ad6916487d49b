//! The software CPU as another CPU than the host's, where the architecture leaves flags undefined: as one
//! whose laws are known, so that it leaves them as that did; and, for tests where there is only one CPU,
//! as a host on which they come out inverted.
#![allow(unsafe_code)]

use std::arch::asm;
use std::collections::VecDeque;

use iced_x86::OpKind;
use reprise_trace::cpu_state::RCX;

use crate::cpu::Cpu;
use crate::decode::op::Op;
use crate::engine::SoftEngine;
use crate::fault::Flow;
use crate::flag_laws::{Executed, FlagLaws};
use crate::flags::{ARITHMETIC, Arithmetic};
use crate::latitude;

/// How flags that are undefined are left.
#[derive(Debug, Default)]
pub(crate) struct OtherMaker {
    /// These come out inverted, as if the host were another.
    inverted: u64,
    /// As this CPU leaves them, whatever the host does.
    laws: Option<&'static FlagLaws>,
    /// The host clears AF in logic instructions, as every known CPU does.
    logic_clears_af: bool,
    /// Counts in CL are noted, since flags that shifts and rotations leave undefined depend on them.
    pub(crate) notes_counts: bool,
    pub(crate) counts: Counts,
}

impl OtherMaker {
    /// As another CPU leaves flags, without what ran on it.
    pub(crate) fn is_like(other: &Self) -> Self {
        Self { counts: Counts::default(), ..*other }
    }
}

/// Shifts and rotations behind which the flags of one are looked for, at most.
const MAX_COUNTS: usize = 64;

/// CL of the last shifts and rotations by CL that retired.
#[derive(Debug, Default)]
pub(crate) struct Counts(VecDeque<u8>);

impl Counts {
    fn note(&mut self, cl: u8) {
        if self.0.len() == MAX_COUNTS {
            self.0.pop_front();
        }
        self.0.push_back(cl);
    }

    /// From the last one back.
    pub(crate) fn last_first(&self) -> std::iter::Rev<std::collections::vec_deque::Iter<'_, u8>> {
        self.0.iter().rev()
    }
}

impl SoftEngine {
    /// Has these flags come out inverted wherever the host executes an instruction that leaves them
    /// undefined. To be called before the guest first runs.
    pub fn invert_undefined_flags(&mut self, flags: u64) {
        self.cpu_mut().other_maker.inverted = flags & ARITHMETIC;
    }

    /// Leaves undefined flags as the CPU of these laws does, which costs speed. To be called before the guest
    /// first runs.
    pub fn leave_flags_by(&mut self, laws: &'static FlagLaws) {
        let other = &mut self.cpu_mut().other_maker;
        other.laws = Some(laws);
        other.logic_clears_af = host_clears_af();
    }
}

/// Has an operation that the host executes leave undefined flags as the other maker's.
pub(crate) fn wrap_native(cpu: &Cpu, op: &mut Op) {
    let &OtherMaker { inverted, laws, logic_clears_af, notes_counts, .. } = &cpu.other_maker;
    let inverts = latitude::undefined_flags(&op.instruction) & inverted != 0;
    let by_law = || laws.is_some_and(|laws| laws.concern(&op.instruction, logic_clears_af));
    let is_noted = notes_counts && latitude::counts_in_cl(&op.instruction);
    if inverts || is_noted || by_law() {
        op.instruction.own = Some(op.handler);
        op.instruction.inline = false;
        op.handler = otherwise;
    }
}

/// Runs an operation and does to flags what the other maker does.
extern "sysv64" fn otherwise(cpu: &mut Cpu, op: &Op) -> Flow {
    let instruction = &*op.instruction;
    let cl = cpu.registers.gpr[RCX] as u8;
    let is_register = instruction.op0_kind() == OpKind::Register;
    let operand = |cpu: &Cpu| if is_register { cpu.general_operand(instruction, 0) } else { 0 };
    let (operand_before, before) = (operand(cpu), cpu.registers.arithmetic.to_rflags());
    let own = op.instruction.own.expect("such an operation has its own handler");
    // SAFETY: `own` is the handler that was chosen for this very operation.
    let flow = unsafe { own(cpu, op) };
    if flow.retires() {
        let &OtherMaker { inverted, laws, notes_counts, .. } = &cpu.other_maker;
        if notes_counts && latitude::counts_in_cl(instruction) {
            cpu.other_maker.counts.note(cl);
        }
        let undefined = latitude::undefined_flags_for(instruction, cl);
        let mut flags = cpu.registers.arithmetic.to_rflags() ^ undefined & inverted;
        if let Some(laws) = laws {
            let operand = is_register.then(|| [operand_before, operand(cpu)]);
            flags = laws.apply(&Executed { instruction, flags: [before, flags], operand, cl });
        }
        cpu.registers.arithmetic = Arithmetic::from_rflags(flags);
    }
    flow
}

/// Whether AND, OR, XOR and TEST clear AF on this host, tried with AF set and some operands.
fn host_clears_af() -> bool {
    const AF: u16 = 1 << 12;
    [(0, 0), (0xf, 1), (0xffff_ffff, 0x8000_0008), (0x1234_5678, 0x9abc_def0)].iter().all(
        |&(a, b): &(u32, u32)| {
            let (and, or, xor, test): (u16, u16, u16, u16);
            // SAFETY: these instructions work on registers and arithmetic flags alone.
            unsafe {
                asm!("mov ah, 0xd5", "sahf", "and {a:e}, {b:e}", "lahf", a = inout(reg) a => _, b = in(reg) b, out("ax") and);
                asm!("mov ah, 0xd5", "sahf", "or {a:e}, {b:e}", "lahf", a = inout(reg) a => _, b = in(reg) b, out("ax") or);
                asm!("mov ah, 0xd5", "sahf", "xor {a:e}, {b:e}", "lahf", a = inout(reg) a => _, b = in(reg) b, out("ax") xor);
                asm!("mov ah, 0xd5", "sahf", "test {a:e}, {b:e}", "lahf", a = in(reg) a, b = in(reg) b, out("ax") test);
            }
            (and | or | xor | test) & AF == 0
        },
    )
}
