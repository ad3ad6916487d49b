//! Which instructions take part, and in what proportion. Features and mnemonics are named here
//! independently of the engine's tables, on purpose: what the engine forgets is still tried.

use std::sync::LazyLock;

use iced_x86::{
    Code, CpuidFeature, EncodingKind, FlowControl, Instruction, Mnemonic, OpCodeOperandKind,
};

use crate::generate::is_memory;

/// The CPU model's features, as the decoder names them.
const MODEL_FEATURES: &[CpuidFeature] = &[
    CpuidFeature::INTEL8086,
    CpuidFeature::INTEL186,
    CpuidFeature::INTEL286,
    CpuidFeature::INTEL386,
    CpuidFeature::INTEL486,
    CpuidFeature::X64,
    CpuidFeature::CLFSH,
    CpuidFeature::CMOV,
    CpuidFeature::CMPXCHG16B,
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
    CpuidFeature::SSE,
    CpuidFeature::SSE2,
    CpuidFeature::SSE3,
    CpuidFeature::SSE4_1,
    CpuidFeature::SSE4_2,
    CpuidFeature::SSSE3,
];

/// Instructions whose outcome at CPL3 is the machine's around the CPU, and depends on the kind of
/// KVM (see the oracle), or which name a time.
pub(crate) fn shows_the_host(instruction: &Instruction) -> bool {
    use Mnemonic::{
        Cpuid, Fndisi, Fneni, Fnsetpm, In, Insb, Insd, Insw, Int, Int1, Into, Lar, Lds, Les, Lfs,
        Lgs, Lsl, Lss, Out, Outsb, Outsd, Outsw, Rdpmc, Rdtsc, Rdtscp, Sgdt, Sidt, Sldt, Smsw, Str,
        Syscall, Sysenter, Sysexit, Sysexitq, Sysret, Sysretq, Ud0, Ud1, Ud2, Verr, Verw,
    };
    let mnemonic = instruction.mnemonic();
    let machine = matches!(
        mnemonic,
        Cpuid | Rdtsc | Rdtscp | Rdpmc | Sgdt | Sidt | Sldt | Str | Smsw | Lar | Lsl | Verr | Verw
    );
    let gate = matches!(
        mnemonic,
        Int | Int1 | Into | Syscall | Sysenter | Sysexit | Sysexitq | Sysret | Sysretq
    );
    let port = matches!(mnemonic, In | Out | Insb | Insw | Insd | Outsb | Outsw | Outsd);
    let far_load = matches!(mnemonic, Lds | Les | Lss | Lfs | Lgs);
    // The decoder and the host disagree on the length of UD0; the others are just #UD.
    let undefined = matches!(mnemonic, Ud0 | Ud1 | Ud2);
    let obsolete = matches!(mnemonic, Fneni | Fndisi | Fnsetpm);
    let segment = instruction.op_count() > 0
        && (0..instruction.op_count()).any(|operand| {
            instruction.op_kind(operand) == iced_x86::OpKind::Register
                && instruction.op_register(operand).is_segment_register()
        });
    let code = instruction.code().op_code();
    let far = (0..code.op_count()).any(|operand| {
        use OpCodeOperandKind::{cr_reg, dr_reg, farbr2_2, farbr4_2, seg_reg, tr_reg};
        matches!(code.op_kind(operand), farbr2_2 | farbr4_2 | seg_reg | cr_reg | dr_reg | tr_reg)
    }) || matches!(
        mnemonic,
        Mnemonic::Retf | Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq
    ) || instruction.is_jmp_far_indirect()
        || instruction.is_call_far_indirect();
    machine || gate || port || far_load || undefined || obsolete || segment || far
}

/// Whether the CPU model lacks the instruction though the host may have it.
pub(crate) fn beyond_the_model(instruction: &Instruction) -> bool {
    instruction.encoding() != EncodingKind::Legacy
        || instruction.cpuid_features().iter().any(|feature| !MODEL_FEATURES.contains(feature))
}

/// Kinds of instructions, so that each gets its share whatever the number of its forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Integer,
    Divide,
    Shift,
    Bit,
    Stack,
    Branch,
    String,
    X87,
    X87State,
    Mmx,
    Sse,
    SseFloat,
    Privileged,
}

/// The share of each kind.
pub(crate) const SHARES: [(u64, Kind); 13] = [
    (26, Kind::Integer),
    (4, Kind::Divide),
    (8, Kind::Shift),
    (6, Kind::Bit),
    (7, Kind::Stack),
    (5, Kind::Branch),
    (6, Kind::String),
    (14, Kind::X87),
    (2, Kind::X87State),
    (5, Kind::Mmx),
    (9, Kind::Sse),
    (11, Kind::SseFloat),
    (1, Kind::Privileged),
];

fn kind(code: Code) -> Kind {
    use Mnemonic::{
        Bsf, Bsr, Bt, Btc, Btr, Bts, Div, Emms, Fclex, Finit, Fldcw, Fldenv, Fnclex, Fninit,
        Fnsave, Fnstcw, Fnstenv, Fnstsw, Frstor, Fsave, Fstcw, Fstenv, Fstsw, Fxrstor, Fxrstor64,
        Fxsave, Fxsave64, Idiv, Ldmxcsr, Popcnt, Rcl, Rcr, Rol, Ror, Sal, Sar, Shl, Shld, Shr,
        Shrd, Stmxcsr, Wait,
    };
    let mut instruction = Instruction::default();
    instruction.set_code(code);
    let features = code.cpuid_features();
    let has = |feature| features.contains(&feature);
    let operands = code.op_code();
    let mmx_operand = (0..operands.op_count()).any(|operand| {
        use OpCodeOperandKind::{mm_or_mem, mm_reg, mm_rm};
        matches!(operands.op_kind(operand), mm_or_mem | mm_reg | mm_rm)
    });
    match code.mnemonic() {
        _ if instruction.is_privileged() || !operands.cpl3() => Kind::Privileged,
        Div | Idiv => Kind::Divide,
        Rcl | Rcr | Rol | Ror | Sal | Sar | Shl | Shld | Shr | Shrd => Kind::Shift,
        Bsf | Bsr | Bt | Btc | Btr | Bts | Popcnt => Kind::Bit,
        Fldcw | Fldenv | Fnclex | Fclex | Fninit | Finit | Fsave | Fstenv | Fstcw | Fstsw
        | Fnsave | Fnstcw | Fnstenv | Fnstsw | Frstor | Fxrstor | Fxrstor64 | Fxsave | Fxsave64
        | Ldmxcsr | Stmxcsr | Wait => Kind::X87State,
        Emms => Kind::Mmx,
        _ if has(CpuidFeature::FPU) || has(CpuidFeature::FPU387) => Kind::X87,
        _ if mmx_operand => Kind::Mmx,
        _ if code.flow_control() != FlowControl::Next => Kind::Branch,
        _ if instruction.is_string_instruction() => Kind::String,
        _ if code.is_stack_instruction() || is_flags_transfer(code) => Kind::Stack,
        mnemonic if is_float(mnemonic) => Kind::SseFloat,
        _ if features.iter().any(|feature| {
            use CpuidFeature::{SSE, SSE2, SSE3, SSE4_1, SSSE3};
            [SSE, SSE2, SSE3, SSSE3, SSE4_1].contains(feature)
        }) || has(CpuidFeature::SSE4_2) =>
        {
            Kind::Sse
        }
        _ => Kind::Integer,
    }
}

fn is_flags_transfer(code: Code) -> bool {
    matches!(code.mnemonic(), Mnemonic::Lahf | Mnemonic::Sahf)
}

/// SSE instructions that compute on floating-point numbers.
fn is_float(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
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
            | Minss
            | Minps
            | Minsd
            | Minpd
            | Maxss
            | Maxps
            | Maxsd
            | Maxpd
            | Cmpss
            | Cmpps
            | Cmppd
            | Comiss
            | Comisd
            | Ucomiss
            | Ucomisd
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
            | Cvtdq2pd
            | Cvtps2dq
            | Cvttps2dq
            | Cvtpd2dq
            | Cvttpd2dq
            | Addsubps
            | Addsubpd
            | Haddps
            | Haddpd
            | Hsubps
            | Hsubpd
            | Dpps
            | Dppd
            | Roundss
            | Roundps
            | Roundsd
            | Roundpd
            | Rcpps
            | Rcpss
            | Rsqrtps
            | Rsqrtss
    )
}

/// The instruction forms of one kind.
pub(crate) fn of_kind(kind: Kind) -> &'static [Code] {
    &FORMS.iter().find(|(other, _)| *other == kind).expect("every kind has forms").1
}

static FORMS: LazyLock<Vec<(Kind, Vec<Code>)>> = LazyLock::new(|| {
    let all: Vec<(Kind, Code)> =
        Code::values().filter(|code| takes_part(*code)).map(|code| (kind(code), code)).collect();
    SHARES
        .iter()
        .map(|(_, kind)| {
            let of_kind = |(other, code): &(Kind, Code)| (other == kind).then_some(*code);
            (*kind, all.iter().filter_map(of_kind).collect())
        })
        .collect()
});

fn takes_part(code: Code) -> bool {
    let operands = code.op_code();
    let mut instruction = Instruction::default();
    instruction.set_code(code);
    operands.is_instruction()
        && operands.mode64()
        && !beyond_the_model(&instruction)
        && !shows_the_host(&instruction)
        && !matches!(code, Code::Int3)
        // Real hardware gives these forms other lengths, or other meanings, than the decoder.
        && !matches!(code.flow_control(), FlowControl::XbeginXabortXend)
        && (0..operands.op_count()).all(|operand| has_operands(operands.op_kind(operand)))
}

/// Operand kinds that the generator can make.
fn has_operands(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind::*;
    let elsewhere = matches!(
        kind,
        r8_reg
            | r8_opcode
            | r16_reg
            | r16_rm
            | r16_opcode
            | r32_reg
            | r32_rm
            | r32_opcode
            | r64_reg
            | r64_rm
            | r64_opcode
            | mm_reg
            | mm_rm
            | xmm_reg
            | xmm_rm
            | al
            | cl
            | ax
            | dx
            | eax
            | rax
            | st0
            | sti_opcode
            | imm8
            | imm8_const_1
            | imm8sex16
            | imm8sex32
            | imm8sex64
            | imm16
            | imm32
            | imm32sex64
            | imm64
            | seg_rSI
            | es_rDI
            | seg_rDI
            | br64_1
            | br64_4
    );
    is_memory(kind) || elsewhere
}
