//! From a guest instruction to a native sequence that does the same to the CPU's stored registers.
//!
//! A sequence loads the guest registers and flags that the instruction reads into host registers,
//! executes the very instruction (its registers renamed where that is possible, its memory operand
//! at a host address), and stores what it wrote. Host registers: RDI holds the CPU, RSI the memory
//! operand; the guest's registers go through those that the calling convention leaves free. The
//! guest's RSP never is the host's.

use std::mem::offset_of;

use iced_x86::{
    Code, CodeSize, Encoder, FlowControl, Instruction, InstructionInfoFactory, MemoryOperand,
    OpAccess, OpKind, Register,
};

use super::MemoryUse;
use crate::cpu::{Cpu, Registers};
use crate::flags::Arithmetic;

const STATE: Register = Register::RDI;
/// The base of a normalised instruction's memory operand.
pub(crate) const MEMORY: Register = Register::RSI;
/// Host registers that guest registers may go through, best first. RBX must be saved.
const POOL: [Register; 8] = [
    Register::RAX,
    Register::RCX,
    Register::RDX,
    Register::R8,
    Register::R9,
    Register::R10,
    Register::R11,
    Register::RBX,
];
/// The same for an instruction that cannot have a REX prefix.
const POOL_WITHOUT_REX: [Register; 4] =
    [Register::RAX, Register::RCX, Register::RDX, Register::RBX];
/// Guest registers that stand for themselves: free in the calling convention, and those of them that
/// opcodes use implicitly (`mul rdx`, `cmpxchg`, `shl r, cl`) are right without a look.
const KEEP_THEIR_NAMES: [Register; 7] = [
    Register::RAX,
    Register::RCX,
    Register::RDX,
    Register::R8,
    Register::R9,
    Register::R10,
    Register::R11,
];
/// All six arithmetic flags, as iced's `RflagsBits` has them.
const ALL_FLAGS: u32 = iced_x86::RflagsBits::OF
    | iced_x86::RflagsBits::SF
    | iced_x86::RflagsBits::ZF
    | iced_x86::RflagsBits::AF
    | iced_x86::RflagsBits::CF
    | iced_x86::RflagsBits::PF;

/// Turns an instruction into the form that its sequence is made for and found by: 64-bit encodable,
/// without LOCK (there is one CPU), its memory operand at `[rsi]`.
pub(crate) fn normalise(
    instruction: &Instruction,
    info: &mut InstructionInfoFactory,
) -> Option<(Instruction, Option<MemoryUse>)> {
    // Whatever touches more than registers, flags and one operand is not for the host.
    if instruction.flow_control() != FlowControl::Next
        || instruction.is_privileged()
        || instruction.is_stack_instruction()
        || instruction.is_string_instruction()
    {
        return None;
    }
    let mut normal = *instruction;
    normal.set_has_lock_prefix(false);
    normal.set_has_xacquire_prefix(false);
    normal.set_has_xrelease_prefix(false);
    normal.set_has_rep_prefix(false);
    normal.set_has_repne_prefix(false);
    normal.set_segment_prefix(Register::None);
    normal.set_code_size(CodeSize::Code64);
    normal.set_len(0);
    normal.set_ip(0);
    normal.set_next_ip(0);
    normal.set_code(encodable_in_64_bit(normal.code()));
    let mut memory = None;
    for operand in 0..normal.op_count() {
        if normal.op_kind(operand) != OpKind::Memory {
            continue;
        }
        let access = info.info(instruction).op_access(operand);
        let size_bytes = instruction.memory_size().size() as u16;
        memory = match access {
            OpAccess::NoMemAccess | OpAccess::None => None,
            _ => Some(MemoryUse {
                size_bytes,
                reads: matches!(
                    access,
                    OpAccess::Read
                        | OpAccess::CondRead
                        | OpAccess::ReadWrite
                        | OpAccess::ReadCondWrite
                        | OpAccess::CondWrite
                ),
                writes: matches!(
                    access,
                    OpAccess::Write
                        | OpAccess::CondWrite
                        | OpAccess::ReadWrite
                        | OpAccess::ReadCondWrite
                ),
            }),
        };
        memory?; // LEA and its like need the address itself.
        normal.set_memory_base(MEMORY);
        normal.set_memory_index(Register::None);
        normal.set_memory_index_scale(1);
        normal.set_memory_displacement64(0);
        normal.set_memory_displ_size(0);
    }
    Some((normal, memory))
}

/// Encodings that 64-bit mode does not have, and their twins that it has.
fn encodable_in_64_bit(code: Code) -> Code {
    match code {
        Code::Inc_r16 => Code::Inc_rm16,
        Code::Inc_r32 => Code::Inc_rm32,
        Code::Dec_r16 => Code::Dec_rm16,
        Code::Dec_r32 => Code::Dec_rm32,
        Code::Add_rm8_imm8_82 => Code::Add_rm8_imm8,
        Code::Or_rm8_imm8_82 => Code::Or_rm8_imm8,
        Code::Adc_rm8_imm8_82 => Code::Adc_rm8_imm8,
        Code::Sbb_rm8_imm8_82 => Code::Sbb_rm8_imm8,
        Code::And_rm8_imm8_82 => Code::And_rm8_imm8,
        Code::Sub_rm8_imm8_82 => Code::Sub_rm8_imm8,
        Code::Xor_rm8_imm8_82 => Code::Xor_rm8_imm8,
        Code::Cmp_rm8_imm8_82 => Code::Cmp_rm8_imm8,
        Code::Mov_AL_moffs8 => Code::Mov_r8_rm8,
        Code::Mov_AX_moffs16 => Code::Mov_r16_rm16,
        Code::Mov_EAX_moffs32 => Code::Mov_r32_rm32,
        Code::Mov_RAX_moffs64 => Code::Mov_r64_rm64,
        Code::Mov_moffs8_AL => Code::Mov_rm8_r8,
        Code::Mov_moffs16_AX => Code::Mov_rm16_r16,
        Code::Mov_moffs32_EAX => Code::Mov_rm32_r32,
        Code::Mov_moffs64_RAX => Code::Mov_rm64_r64,
        // CPUs differ in how many bytes this reads: Intel's two, AMD's four.
        Code::Movsxd_r16_rm16 => Code::Mov_r16_rm16,
        other => other,
    }
}

/// A guest register that an instruction uses, and the host register that stands for it.
#[derive(Clone, Copy)]
struct Binding {
    guest: Register,
    host: Register,
    load: bool,
    store: bool,
}

/// Everything that surrounds the instruction in its sequence.
struct Plan {
    body: Instruction,
    general: Vec<Binding>,
    vector: Vec<Binding>,
    flags_in: bool,
    flags_out: bool,
}

/// The machine code of a normalised instruction's sequence; `None` if it cannot be one.
pub(super) fn emit(normal: &Instruction, info: &mut InstructionInfoFactory) -> Option<Vec<u8>> {
    let plan = plan(normal, info)?;
    let mut out = Sequence { encoder: Encoder::new(64) };
    let saves_rbx = plan.general.iter().any(|binding| binding.host == Register::RBX);
    if saves_rbx {
        out.push(Instruction::with1(Code::Push_r64, Register::RBX))?;
    }
    if plan.flags_in {
        out.load_flags()?;
    }
    for binding in plan.general.iter().filter(|binding| binding.load) {
        let slot = slot(offset_of!(Registers, gpr) + binding.guest.number() * 8);
        out.push(Instruction::with2(Code::Mov_r64_rm64, binding.host, slot))?;
    }
    for binding in plan.vector.iter().filter(|binding| binding.load) {
        let slot = slot(offset_of!(Registers, xmm) + binding.guest.number() * 16);
        out.push(Instruction::with2(Code::Movaps_xmm_xmmm128, binding.host, slot))?;
    }
    out.push(Ok(plan.body))?;
    for binding in plan.general.iter().filter(|binding| binding.store) {
        let slot = slot(offset_of!(Registers, gpr) + binding.guest.number() * 8);
        out.push(Instruction::with2(Code::Mov_rm64_r64, slot, binding.host))?;
    }
    for binding in plan.vector.iter().filter(|binding| binding.store) {
        let slot = slot(offset_of!(Registers, xmm) + binding.guest.number() * 16);
        out.push(Instruction::with2(Code::Movaps_xmmm128_xmm, slot, binding.host))?;
    }
    if plan.flags_out {
        out.save_flags()?;
    }
    if saves_rbx {
        out.push(Instruction::with1(Code::Pop_r64, Register::RBX))?;
    }
    out.push(Instruction::with2(Code::Xor_r32_rm32, Register::EAX, Register::EAX))?;
    out.push(Ok(Instruction::with(Code::Retnq)))?;
    Some(out.encoder.take_buffer())
}

/// A field of the CPU's registers, which come first in it.
fn slot(offset: usize) -> MemoryOperand {
    const { assert!(offset_of!(Cpu, registers) == 0) };
    MemoryOperand::with_base_displ(STATE, offset as i64)
}

struct Sequence {
    encoder: Encoder,
}

impl Sequence {
    fn push(&mut self, instruction: Result<Instruction, iced_x86::IcedError>) -> Option<()> {
        self.encoder.encode(&instruction.ok()?, 0).ok().map(|_| ())
    }

    /// Host flags from the stored form: adding 0x7f to AL overflows just when OF is to be set, and
    /// SAHF sets the rest from AH.
    fn load_flags(&mut self) -> Option<()> {
        let flags = slot(offset_of!(Registers, arithmetic));
        const { assert!(size_of::<Arithmetic>() == 2) };
        self.push(Instruction::with2(Code::Movzx_r32_rm16, Register::EAX, flags))?;
        self.push(Instruction::with2(Code::Add_AL_imm8, Register::AL, 0x7f))?;
        self.push(Ok(Instruction::with(Code::Sahf)))
    }

    /// The stored form from host flags; RAX is free by then.
    fn save_flags(&mut self) -> Option<()> {
        let flags = slot(offset_of!(Registers, arithmetic));
        self.push(Ok(Instruction::with(Code::Lahf)))?;
        self.push(Instruction::with1(Code::Seto_rm8, Register::AL))?;
        self.push(Instruction::with2(Code::Mov_rm16_r16, flags, Register::AX))
    }
}

fn plan(normal: &Instruction, info: &mut InstructionInfoFactory) -> Option<Plan> {
    let mut body = *normal;
    let used: Vec<_> = info.info(normal).used_registers().to_vec();
    let explicit: Vec<Register> = (0..normal.op_count())
        .filter(|&operand| normal.op_kind(operand) == OpKind::Register)
        .map(|operand| normal.op_register(operand))
        .collect();
    let high_bytes = explicit.iter().any(|register| is_high_byte(*register));

    let mut general: Vec<Binding> = Vec::new();
    let mut vector: Vec<Binding> = Vec::new();
    for use_ in &used {
        let register = use_.register();
        let (reads, writes) = directions(use_.access());
        if register.is_gpr() {
            let guest = register.full_register();
            if guest == MEMORY && is_memory_base(normal) && !explicit_uses(&explicit, guest) {
                continue;
            }
            let partial = register.size() < 4;
            let load = reads || partial || conditional(use_.access());
            merge(&mut general, guest, load, writes);
        } else if register.is_xmm() {
            // Where a part of the register is kept, the information calls it read.
            merge(&mut vector, register, reads, writes);
        } else if register.is_mm() || register.is_st() {
            // They live in the host's own registers.
        } else if !matches!(register, Register::None) {
            return None;
        }
    }
    // Registers that an opcode may use without naming them keep their names; the others are renamed
    // into the pool. A high-byte register forbids a REX prefix, and keeps its own name.
    let pool = if high_bytes { &POOL_WITHOUT_REX[..] } else { &POOL };
    let mut taken: Vec<Register> = Vec::new();
    for binding in &mut general {
        let renamed = explicit_uses(&explicit, binding.guest)
            && !KEEP_THEIR_NAMES.contains(&binding.guest)
            && !(high_bytes && POOL_WITHOUT_REX.contains(&binding.guest));
        if !renamed {
            binding.host = binding.guest;
            taken.push(binding.guest);
        }
    }
    if taken.iter().any(|host| !POOL.contains(host)) {
        return None;
    }
    for binding in general.iter_mut().filter(|binding| binding.host == Register::None) {
        let host = pool.iter().copied().find(|host| !taken.contains(host))?;
        binding.host = host;
        taken.push(host);
    }
    for operand in 0..normal.op_count() {
        if normal.op_kind(operand) == OpKind::Register {
            let register = normal.op_register(operand);
            if register.is_gpr() && !is_high_byte(register) {
                let binding =
                    general.iter().find(|binding| binding.guest == register.full_register())?;
                body.set_op_register(operand, resized(binding.host, register.size()));
            }
        }
    }
    for binding in &mut vector {
        binding.host = binding.guest;
    }
    let modified = modified_flags(normal);
    let sets_all = modified == ALL_FLAGS && leaves_no_flag_to_chance(normal);
    let flags_in = normal.rflags_read() & ALL_FLAGS != 0 || modified != 0 && !sets_all;
    Some(Plan { body, general, vector, flags_in, flags_out: modified != 0 })
}

/// The arithmetic flags that may change. A rotation of all bits and the carry by its own width leaves
/// no bit elsewhere, but OF undefined: the decoder's tables call it unmodified.
fn modified_flags(instruction: &Instruction) -> u32 {
    use iced_x86::{Mnemonic, RflagsBits};
    match instruction.mnemonic() {
        Mnemonic::Rcl | Mnemonic::Rcr => RflagsBits::CF | RflagsBits::OF,
        _ => instruction.rflags_modified() & ALL_FLAGS,
    }
}

/// Whether the host's result flags do not depend on the flags before. True where every flag is
/// defined, and for the logical instructions, which leave AF undefined in the manuals and clear it
/// in every CPU there is.
fn leaves_no_flag_to_chance(instruction: &Instruction) -> bool {
    use iced_x86::Mnemonic::{And, Or, Test, Xor};
    instruction.rflags_undefined() & ALL_FLAGS == 0
        || matches!(instruction.mnemonic(), And | Or | Xor | Test)
}

fn merge(bindings: &mut Vec<Binding>, guest: Register, load: bool, store: bool) {
    if let Some(binding) = bindings.iter_mut().find(|binding| binding.guest == guest) {
        binding.load |= load;
        binding.store |= store;
    } else {
        bindings.push(Binding { guest, host: Register::None, load, store });
    }
}

/// Whether an access reads, and whether it writes.
pub(crate) fn directions(access: OpAccess) -> (bool, bool) {
    let reads = matches!(
        access,
        OpAccess::Read | OpAccess::CondRead | OpAccess::ReadWrite | OpAccess::ReadCondWrite
    );
    let writes = matches!(
        access,
        OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
    );
    (reads, writes)
}

/// A write that may not happen leaves the old value, which must then be there to be stored back.
pub(crate) fn conditional(access: OpAccess) -> bool {
    matches!(access, OpAccess::CondWrite | OpAccess::ReadCondWrite)
}

fn is_memory_base(instruction: &Instruction) -> bool {
    (0..instruction.op_count()).any(|operand| instruction.op_kind(operand) == OpKind::Memory)
}

fn explicit_uses(explicit: &[Register], guest: Register) -> bool {
    explicit.iter().any(|register| register.is_gpr() && register.full_register() == guest)
}

pub(crate) fn is_high_byte(register: Register) -> bool {
    matches!(register, Register::AH | Register::CH | Register::DH | Register::BH)
}

/// The part of a full register that has `size_bytes`.
pub(crate) fn resized(full: Register, size_bytes: usize) -> Register {
    let base = match size_bytes {
        1 => {
            return match full.number() {
                0..=3 => Register::AL + full.number() as u32,
                number => Register::SPL + (number as u32 - 4),
            };
        }
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    base + full.number() as u32
}
