//! Differences that are as they should be: where the host is another CPU than the model, or where the
//! host's KVM does not give what its CPU would.

use iced_x86::{Decoder, FlowControl, Instruction, Mnemonic, OpKind};
use reprise_kvm::KvmKind;
use reprise_kvm::user_oracle::{CODE_ADDRESS, UserOutcome};
use reprise_trace::cpu_state::{CpuState, FpuState, RSP};

use crate::case::{Case, DECODER};
use crate::opcodes::{beyond_the_model, shows_the_host};
use crate::raw_bytes;

const UD: u8 = 6;
const GP: u8 = 13;
const PF: u8 = 14;
const AC: u8 = 17;
const SS: u8 = 12;
const DE: u8 = 0;

/// Why an outcome may differ, if it may. `trace` has the state before each executed instruction, and
/// `kvm` is what ran the real one.
pub(crate) fn reason(
    case: &Case,
    trace: &[CpuState],
    real: &UserOutcome,
    soft: &UserOutcome,
    kvm: KvmKind,
) -> Option<&'static str> {
    if kvm == KvmKind::PagetableBased
        && let Some(reason) = of_pagetable_based_kvm(case, trace, real, soft)
    {
        return Some(reason);
    }
    let instructions = || trace.iter().filter_map(|state| executed(case, state));
    if instructions().any(|(instruction, _)| {
        !instruction.is_invalid()
            && (beyond_the_model(&instruction) || shows_the_host(&instruction))
    }) {
        return Some(
            "the host has the instruction and the CPU model has not, or it shows the host",
        );
    }
    if instructions().any(|(instruction, bytes)| {
        instruction.is_invalid() && raw_bytes::meaning_depends_on_the_host(bytes)
            || is_counting(&instruction, bytes)
    }) {
        return Some("the opcode is of an extension that the host may have");
    }
    if instructions().any(|(instruction, bytes)| is_narrow_branch(&instruction, bytes)) {
        return Some(
            "AMD cuts the target of a near branch with a 66 prefix, Intel and the model do not",
        );
    }
    if instructions().any(|(instruction, _)| {
        instruction.mnemonic() == Mnemonic::Movsxd && instruction.op0_register().size() == 2
    }) {
        return Some("MOVSXD to 16 bits reads four bytes on AMD, two on Intel and in the model");
    }
    if instructions().any(|(instruction, _)| {
        let masked = matches!(instruction.mnemonic(), Mnemonic::Maskmovq | Mnemonic::Maskmovdqu);
        let real_faults = matches!(real.exception.vector, PF | AC | UD);
        let soft_is_misaligned = soft.exception.vector == AC;
        masked
            && (real_faults && instruction.ip() == real.rip
                || soft_is_misaligned && instruction.ip() == soft.rip)
    }) {
        return Some(
            "a masked store may fault for bytes it leaves out, and with MMX registers in use",
        );
    }
    if instructions().any(|(instruction, bytes)| is_loop_by_prefix(&instruction, bytes)) {
        return Some(LOOP_BY_PREFIX);
    }
    const MISALIGNED_MASK: u32 = 1 << 17;
    if real.fpu.mxcsr & MISALIGNED_MASK != 0 {
        return Some("AMD has a bit in MXCSR that the model has not");
    }
    if instructions().any(|(instruction, _)| {
        instruction.mnemonic() == Mnemonic::Reservednop
            && instruction.op0_kind() == OpKind::Register
    }) {
        return Some("AMD has no register form of PREFETCHW, and pagetable-based KVM emulates it");
    }
    if instructions().any(|(instruction, bytes)| {
        let own = &bytes[..instruction.len().min(bytes.len())];
        let extended = own.len() >= 2 && own[own.len() - 2] & (REX | 0xf0 | REX_B) == REX | REX_B;
        instruction.mnemonic() == Mnemonic::Pause && (extended || own.first() != Some(&0xf3))
    }) {
        return Some("PAUSE with REX.B is XCHG on AMD");
    }
    let last = trace.iter().rev().find_map(|state| Some((executed(case, state)?.0, state)));
    let (instruction, state) = last?;
    of_the_last(&instruction, state, real, soft)
}

/// The same for what pagetable-based KVM makes of code that the CPU would have run: it emulates what
/// faults, and not exactly.
fn of_pagetable_based_kvm(
    case: &Case,
    trace: &[CpuState],
    real: &UserOutcome,
    soft: &UserOutcome,
) -> Option<&'static str> {
    use Mnemonic::{Fxrstor, Fxrstor64, Fxsave, Fxsave64};
    let vectors = (real.exception.vector, soft.exception.vector);
    let same_place = real.rip == soft.rip && real.gpr == soft.gpr;
    if trace.iter().any(|state| !is_canonical(state.gpr[RSP])) {
        return Some(
            "pagetable-based KVM: what runs under a non-canonical RSP is emulated, and wrongly",
        );
    }
    let makes_stack_faults = |(instruction, bytes): (Instruction, &[u8])| {
        let aligned_only = instruction.memory_size().size() == 16;
        instruction.ip() == real.rip && (has_prefix(bytes, SS_PREFIX) || aligned_only)
    };
    let upper_half = real.exception.cr2.is_some_and(|address| address >> 63 != 0);
    if vectors == (PF, PF) && upper_half && real.exception.cr2 == soft.exception.cr2 && same_place {
        return Some("pagetable-based KVM: it has pages of its own in the upper half of addresses");
    }
    let (last, bytes) = trace.iter().rev().find_map(|state| executed(case, state))?;
    if vectors == (GP, UD) && same_place && last.is_invalid() && is_far_pointer(bytes) {
        return Some(
            "pagetable-based KVM: a far pointer that is none makes an instruction too long",
        );
    }
    const INT: u8 = 0xcd;
    let opcode = bytes.iter().find(|byte| !is_prefix(byte));
    if vectors == (GP, UD) && same_place && has_prefix(bytes, LOCK) && opcode == Some(&INT) {
        return Some("pagetable-based KVM: INT with a LOCK prefix is an INT");
    }
    let mut instructions = trace.iter().filter_map(|state| executed(case, state));
    if vectors == (SS, GP) && instructions.any(makes_stack_faults) {
        return Some("pagetable-based KVM: a #GP becomes #SS when the instruction is emulated");
    }
    const TOP: u16 = 7 << 11;
    let in_mmx = |fpu: &FpuState| fpu.ftw == u8::MAX && fpu.fsw & TOP == 0;
    let enters_mmx = in_mmx(&real.fpu) && !in_mmx(&soft.fpu);
    if vectors == (GP, GP) && enters_mmx && real.gpr == soft.gpr {
        return Some("pagetable-based KVM: MMX state is entered when a #GP is emulated");
    }
    if vectors == (UD, GP) && same_place {
        return Some("pagetable-based KVM: #GP of what cannot be emulated becomes #UD");
    }
    let saves_all = matches!(last.mnemonic(), Fxsave | Fxsave64 | Fxrstor | Fxrstor64);
    (saves_all && soft.exception.vector == GP)
        .then_some("pagetable-based KVM: an FXSAVE or FXRSTOR that faults is emulated, and wrongly")
}

/// The same for what the instruction that ended the sequence did.
fn of_the_last(
    instruction: &Instruction,
    state: &CpuState,
    real: &UserOutcome,
    soft: &UserOutcome,
) -> Option<&'static str> {
    use Mnemonic::{
        Cmpsb, Cmpsd, Cmpsq, Cmpsw, Fldenv, Fnsave, Fnstenv, Frstor, Fxrstor, Fxrstor64, Fxsave,
        Fxsave64,
    };
    let mnemonic = instruction.mnemonic();
    let both_at_once = real.rip == soft.rip && real.gpr == soft.gpr;
    let (real, soft) = (&real.exception, &soft.exception);
    if both_at_once
        && soft.vector == GP
        && real.vector == PF
        && straddles_the_hole(instruction, state)
    {
        return Some(
            "an access that only ends beyond the canonical addresses may page-fault first",
        );
    }
    let memory_fault = |vector| matches!(vector, SS | GP | PF | AC);
    if both_at_once
        && matches!(mnemonic, Cmpsb | Cmpsw | Cmpsd | Cmpsq)
        && memory_fault(real.vector)
        && memory_fault(soft.vector)
    {
        return Some(
            "CMPS may read either operand first, and AMD heeds an SS prefix for #SS there",
        );
    }
    if both_at_once
        && instruction.flow_control() == FlowControl::IndirectCall
        && memory_fault(real.vector)
        && memory_fault(soft.vector)
    {
        return Some("CALL to a non-canonical address may fault for it or for its push first");
    }
    // Of one access, or of an access and the computation after it.
    let several = |one: u8, other: u8| one == AC && matches!(other, DE | SS | GP | PF);
    if both_at_once && (several(real.vector, soft.vector) || several(soft.vector, real.vector)) {
        return Some(
            "an alignment check's place among the faults of one instruction is the CPU's own",
        );
    }
    if both_at_once
        && matches!(
            mnemonic,
            Fldenv | Frstor | Fnstenv | Fnsave | Fxsave | Fxsave64 | Fxrstor | Fxrstor64
        )
        && (real.vector, soft.vector) == (PF, PF)
    {
        return Some("CPUs touch the many parts of a large operand in their own order");
    }
    None
}

fn is_canonical(address: u64) -> bool {
    ((address << 16) as i64 >> 16) as u64 == address
}

/// Whether the memory operand begins at a canonical address and ends at none.
fn straddles_the_hole(instruction: &Instruction, state: &CpuState) -> bool {
    let size = instruction.memory_size().size() as u64;
    (0..instruction.op_count())
        .filter(|&operand| instruction.op_kind(operand) != OpKind::Register)
        .filter_map(|operand| memory_address(instruction, operand, state))
        .any(|address| is_canonical(address) && !is_canonical(address.wrapping_add(size - 1)))
}

/// The instruction that a state is about to execute and its bytes, if it lies in the code.
pub(crate) fn executed<'a>(case: &'a Case, state: &CpuState) -> Option<(Instruction, &'a [u8])> {
    let offset = state.rip.checked_sub(CODE_ADDRESS)? as usize;
    let bytes = case.input.code.get(offset..).filter(|bytes| !bytes.is_empty())?;
    // Behind the code there is INT3.
    let mut padded = bytes.to_vec();
    padded.extend([0xcc; 15]);
    let instruction = Decoder::with_ip(64, &padded, state.rip, DECODER).decode();
    Some((instruction, bytes))
}

const LEGACY_PREFIXES: [u8; 11] =
    [0x66, 0x67, 0xf0, 0xf2, 0xf3, 0x2e, 0x36, 0x3e, 0x26, 0x64, 0x65];

const SS_PREFIX: u8 = 0x36;
const LOCK: u8 = 0xf0;
/// The first of the sixteen REX prefixes.
const REX: u8 = 0x40;
/// In a REX prefix: the operand's register is one of the upper eight.
const REX_B: u8 = 1;

fn has_prefix(bytes: &[u8], prefix: u8) -> bool {
    bytes.iter().take_while(|byte| is_prefix(byte)).any(|byte| *byte == prefix)
}

fn is_prefix(byte: &u8) -> bool {
    LEGACY_PREFIXES.contains(byte) || byte & 0xf0 == REX
}

/// CALL and JMP to a far pointer, which are not there in 64-bit mode.
fn is_far_pointer(bytes: &[u8]) -> bool {
    let opcode = bytes.iter().find(|byte| !is_prefix(byte));
    matches!(opcode, Some(0x9a | 0xea))
}

/// BSF and BSR with a prefix that makes them TZCNT and LZCNT on later CPUs.
fn is_counting(instruction: &Instruction, bytes: &[u8]) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Bsf | Mnemonic::Bsr) && has_prefix(bytes, 0xf3)
}

/// Whether the code has a near branch with a 66 prefix, which leads elsewhere on AMD.
pub(crate) fn branches_narrowly(case: &Case) -> bool {
    case.instructions().iter().any(|instruction| {
        let start = (instruction.ip() - CODE_ADDRESS) as usize;
        is_narrow_branch(instruction, &case.input.code[start..])
    })
}

/// Why a LOOPE or LOOPNE may end elsewhere.
pub(crate) const LOOP_BY_PREFIX: &str =
    "AMD heeds REP and REPNE on LOOPE and LOOPNE, Intel and the model do not";

/// Whether a case has a LOOPE or LOOPNE whose REP or REPNE prefix AMD heeds, which may make or spare an
/// endless loop.
pub(crate) fn loops_by_prefix(case: &Case) -> bool {
    case.instructions().iter().any(|instruction| {
        let start = (instruction.ip() - CODE_ADDRESS) as usize;
        is_loop_by_prefix(instruction, &case.input.code[start..])
    })
}

fn is_loop_by_prefix(instruction: &Instruction, bytes: &[u8]) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Loope | Mnemonic::Loopne)
        && (has_prefix(bytes, 0xf2) || has_prefix(bytes, 0xf3))
}

fn is_narrow_branch(instruction: &Instruction, bytes: &[u8]) -> bool {
    let branches = !matches!(
        instruction.flow_control(),
        FlowControl::Next | FlowControl::Exception | FlowControl::Interrupt
    );
    has_prefix(bytes, 0x66) && branches
}

/// The address of an instruction's memory operand.
pub(crate) fn memory_address(
    instruction: &Instruction,
    operand: u32,
    state: &CpuState,
) -> Option<u64> {
    instruction.virtual_address(operand, 0, |register, _, _| {
        if register.is_segment_register() {
            return Some(0);
        }
        let value = state.gpr[register.full_register().number()];
        Some(if register.size() == 4 { value & 0xffff_ffff } else { value })
    })
}

#[test]
fn the_excuses_of_pagetable_based_kvm_count_only_there() {
    let case = crate::generate::case(0);
    let mut soft = crate::soft::Soft::new(reprise_cpu::translate::Translation::Never);
    let trace = soft.trace(&case.input);
    let mut faults = soft.run(&case.input).expect("a case that ends");
    faults.exception.vector = GP;
    let mut real = faults.clone();
    real.exception.vector = UD;
    let reason = |kvm| reason(&case, &trace, &real, &faults, kvm);
    assert!(reason(KvmKind::PagetableBased).is_some_and(|reason| reason.contains("#UD")));
    for kvm in [KvmKind::Vmx, KvmKind::Svm, KvmKind::Unknown] {
        assert_eq!(reason(kvm), None, "{kvm:?}");
    }
}
