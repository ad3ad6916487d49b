//! What kind of work an instruction does, in the classes in which instruction mixes are told.

use iced_x86::{CpuidFeature, Instruction, Mnemonic};
use serde::Serialize;

use crate::instruction::Branch;

/// A class of instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Moves data: MOV, LEA, CMOV, SETcc, conversions of width.
    Move,
    /// Integer arithmetic.
    Arithmetic,
    /// Bitwise logic, shifts, bit scans.
    Logic,
    /// Compares and tests: only flags are written.
    Compare,
    /// Jumps, calls, returns.
    Branch,
    /// PUSH, POP and their like.
    Stack,
    /// String instructions, repeated or not.
    String,
    /// Locked or exchanging: synchronises.
    Atomic,
    /// x87, MMX, SSE and later.
    Vector,
    /// System calls, privileged instructions, port I/O, CPUID, fences.
    System,
    /// Does nothing: NOP, ENDBR, PAUSE, prefetches.
    Nothing,
    /// All others.
    Other,
}

impl Kind {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Move => "data movement",
            Self::Arithmetic => "integer arithmetic",
            Self::Logic => "logic and shifts",
            Self::Compare => "compare and test",
            Self::Branch => "control flow",
            Self::Stack => "stack",
            Self::String => "string",
            Self::Atomic => "atomic",
            Self::Vector => "floating point and vector",
            Self::System => "system",
            Self::Nothing => "no operation",
            Self::Other => "other",
        }
    }

    /// The class of an instruction that moves control so.
    pub(crate) fn of(instruction: &Instruction, branch: Branch) -> Self {
        match branch {
            Branch::None => {}
            Branch::SystemCall | Branch::SystemReturn => return Self::System,
            _ => return Self::Branch,
        }
        if instruction.is_privileged() {
            Self::System
        } else if instruction.has_lock_prefix() {
            Self::Atomic
        } else if is_vector(instruction) {
            Self::Vector
        } else if instruction.is_string_instruction() {
            Self::String
        } else if instruction.is_stack_instruction() {
            Self::Stack
        } else {
            Self::of_name(instruction.mnemonic())
        }
    }

    fn of_name(mnemonic: Mnemonic) -> Self {
        use Mnemonic as M;
        match mnemonic {
            M::Mov | M::Movzx | M::Movsx | M::Movsxd | M::Movbe | M::Lea | M::Bswap => Self::Move,
            M::Cbw | M::Cwde | M::Cdqe | M::Cwd | M::Cdq | M::Cqo | M::Lahf | M::Sahf => Self::Move,
            M::Cmova | M::Cmovae | M::Cmovb | M::Cmovbe | M::Cmove | M::Cmovg => Self::Move,
            M::Cmovge | M::Cmovl | M::Cmovle | M::Cmovne | M::Cmovno | M::Cmovnp => Self::Move,
            M::Cmovns | M::Cmovo | M::Cmovp | M::Cmovs => Self::Move,
            M::Seta | M::Setae | M::Setb | M::Setbe | M::Sete | M::Setg => Self::Move,
            M::Setge | M::Setl | M::Setle | M::Setne | M::Setno | M::Setnp => Self::Move,
            M::Setns | M::Seto | M::Setp | M::Sets | M::Xlatb => Self::Move,
            M::Add | M::Adc | M::Sub | M::Sbb | M::Inc | M::Dec | M::Neg => Self::Arithmetic,
            M::Mul | M::Imul | M::Div | M::Idiv | M::Mulx | M::Adcx | M::Adox => Self::Arithmetic,
            M::Daa | M::Das | M::Aaa | M::Aas | M::Aam | M::Aad | M::Crc32 => Self::Arithmetic,
            M::And | M::Or | M::Xor | M::Not | M::Andn | M::Popcnt | M::Lzcnt => Self::Logic,
            M::Shl | M::Shr | M::Sal | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr => Self::Logic,
            M::Shld | M::Shrd | M::Shlx | M::Shrx | M::Sarx | M::Rorx | M::Tzcnt => Self::Logic,
            M::Bsf | M::Bsr | M::Bts | M::Btr | M::Btc | M::Blsi | M::Blsr => Self::Logic,
            M::Blsmsk | M::Bextr | M::Bzhi | M::Pdep | M::Pext => Self::Logic,
            M::Stc | M::Clc | M::Cmc | M::Std | M::Cld => Self::Logic,
            M::Cmp | M::Test | M::Bt => Self::Compare,
            M::Xchg | M::Xadd | M::Cmpxchg | M::Cmpxchg8b | M::Cmpxchg16b => Self::Atomic,
            M::In | M::Out | M::Cli | M::Sti | M::Cpuid | M::Rdtsc | M::Rdtscp => Self::System,
            M::Lfence | M::Mfence | M::Sfence | M::Clflush | M::Clflushopt => Self::System,
            M::Swapgs | M::Rdpmc | M::Rdrand | M::Rdseed | M::Clac | M::Stac => Self::System,
            M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw | M::Verr | M::Verw => Self::System,
            M::Nop | M::Pause | M::Endbr64 | M::Endbr32 | M::Reservednop => Self::Nothing,
            M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 | M::Prefetchnta => Self::Nothing,
            M::Prefetchw => Self::Nothing,
            _ => Self::Other,
        }
    }
}

/// Whether it belongs to x87, MMX or a vector extension, apart from what is about other things.
fn is_vector(instruction: &Instruction) -> bool {
    let about_others = [
        Mnemonic::Prefetcht0,
        Mnemonic::Prefetcht1,
        Mnemonic::Prefetcht2,
        Mnemonic::Prefetchnta,
        Mnemonic::Pause,
        Mnemonic::Lfence,
        Mnemonic::Mfence,
        Mnemonic::Sfence,
        Mnemonic::Crc32,
        Mnemonic::Popcnt,
    ];
    let is_extension = |feature: &CpuidFeature| {
        matches!(
            feature,
            CpuidFeature::FPU
                | CpuidFeature::FPU287
                | CpuidFeature::FPU387
                | CpuidFeature::FXSR
                | CpuidFeature::MMX
                | CpuidFeature::SSE
                | CpuidFeature::SSE2
                | CpuidFeature::SSE3
                | CpuidFeature::SSSE3
                | CpuidFeature::SSE4_1
                | CpuidFeature::SSE4_2
                | CpuidFeature::AES
                | CpuidFeature::PCLMULQDQ
                | CpuidFeature::AVX
                | CpuidFeature::AVX2
                | CpuidFeature::FMA
                | CpuidFeature::AVX512F
        )
    };
    instruction.cpuid_features().iter().any(is_extension)
        && !about_others.contains(&instruction.mnemonic())
}
