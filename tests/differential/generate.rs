//! From a seed to a case.

use iced_x86::{Code, Instruction, InstructionInfoFactory, OpCodeOperandKind, OpKind, Register};
use reprise_kvm::user_oracle::{
    CODE_ADDRESS, DATA_ADDRESS, DATA_BYTES, INPUT_FLAGS, READ_ONLY_BYTES, UserInput,
};
use reprise_trace::cpu_state::RSP;

use crate::case::{Case, Piece, encode};
use crate::opcodes::{self, Kind};
use crate::preparation;
use crate::{raw_bytes, values};
use reprise_random::Random;

/// Instructions of a sequence, at most.
const MAX_INSTRUCTIONS: u64 = 8;
const TF: u64 = 1 << 8;
const DF: u64 = 1 << 10;
const AC: u64 = 1 << 18;

/// A case in the making. A register or a piece of memory that no instruction has used yet can still
/// be given any value, so each instruction arranges what makes it interesting.
pub(crate) struct Builder {
    pub(crate) random: Random,
    pub(crate) input: UserInput,
    /// Registers that an instruction has used: their values stand.
    used: [bool; 16],
    /// Registers that an instruction has written: their values are not known.
    written: [bool; 16],
    info: InstructionInfoFactory,
}

/// The case of a seed.
pub(crate) fn case(seed: u64) -> Case {
    let mut random = Random::new(seed);
    if random.percent(3) {
        return raw_bytes::case(seed, random);
    }
    let input = state(&mut random);
    let mut builder = Builder {
        random,
        input,
        used: [false; 16],
        written: [false; 16],
        info: InstructionInfoFactory::new(),
    };
    let count = 1 + builder.random.below(MAX_INSTRUCTIONS) as usize;
    let mut pieces = Vec::new();
    while pieces.len() < count {
        let Some((mut instruction, branches)) = builder.instruction() else { continue };
        instruction.set_len(0);
        let label = branches.then(|| {
            let further = builder.random.below((count - pieces.len()) as u64) as usize;
            pieces.len() + 1 + further
        });
        let ends = preparation::must_end(&instruction);
        pieces.push(Piece::Instruction(instruction, label));
        if ends {
            break;
        }
    }
    let end = pieces.len();
    for piece in &mut pieces {
        if let Piece::Instruction(_, Some(label)) = piece {
            *label = (*label).min(end);
        }
    }
    let mut case = Case { seed, pieces, input: builder.input };
    case.assemble().expect("each instruction was encoded before");
    case
}

/// A random state, with pointers where programs have them.
pub(crate) fn state(random: &mut Random) -> UserInput {
    let mut gpr = std::array::from_fn(|_| values::integer(random));
    for register in &mut gpr {
        if random.percent(30) {
            *register = values::address(random);
        }
    }
    if !random.percent(4) {
        gpr[RSP] = (DATA_ADDRESS + 0x400 + random.below(0x1800)) & !7;
    }
    let mut rflags = random.next() & INPUT_FLAGS;
    for (flag, share) in [(TF, 2), (AC, 5), (DF, 40)] {
        if !random.percent(share) {
            rflags &= !flag;
        }
    }
    UserInput {
        gpr,
        rflags,
        fpu: values::fpu(random),
        code: Vec::new(),
        data: values::memory(random, DATA_BYTES),
        read_only: values::memory(random, READ_ONLY_BYTES),
    }
}

impl Builder {
    /// Gives a register a value, if nothing has used it yet.
    pub(crate) fn arrange(&mut self, register: usize, value: u64) -> bool {
        if !self.used[register] {
            self.input.gpr[register] = value;
        }
        !self.used[register]
    }

    /// A register's value, if it is known.
    pub(crate) fn known(&self, register: usize) -> Option<u64> {
        (!self.written[register]).then_some(self.input.gpr[register])
    }

    pub(crate) fn is_used(&self, register: usize) -> bool {
        self.used[register]
    }

    /// Puts bytes into the data, as far as they lie there.
    pub(crate) fn put(&mut self, address: u64, bytes: &[u8]) {
        for (offset, byte) in bytes.iter().enumerate() {
            let index = address.wrapping_add(offset as u64).wrapping_sub(DATA_ADDRESS) as usize;
            if let Some(place) = self.input.data.get_mut(index) {
                *place = *byte;
            }
        }
    }

    /// Eight bytes of the data.
    pub(crate) fn peek(&self, address: u64) -> Option<u64> {
        let index = address.wrapping_sub(DATA_ADDRESS) as usize;
        let bytes = self.input.data.get(index..index.checked_add(8)?)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    }

    /// An instruction, and whether it branches to a label; `None` where the draw was bad.
    fn instruction(&mut self) -> Option<(Instruction, bool)> {
        let kind = self.random.weighted(&opcodes::SHARES);
        let code = self.random.pick(opcodes::of_kind(kind));
        let mut instruction = Instruction::default();
        instruction.set_code(code);
        let mut memory_operand = None;
        let mut branches = false;
        for operand in 0..code.op_code().op_count() {
            let kind = code.op_code().op_kind(operand);
            match register_kind(kind, &mut self.random) {
                Some(register) => {
                    instruction.set_op_kind(operand, OpKind::Register);
                    instruction.set_op_register(operand, register);
                }
                None if is_memory(kind) => {
                    instruction.set_op_kind(operand, OpKind::Memory);
                    memory_operand = Some(kind);
                }
                None => branches |= self.other_operand(&mut instruction, operand, kind),
            }
        }
        self.add_prefixes(&mut instruction, kind);
        preparation::registers(self, &instruction);
        let target = memory_operand.map(|kind| self.memory_operand(&mut instruction, kind));
        if branches {
            instruction.set_near_branch64(CODE_ADDRESS);
        }
        encode(&instruction, CODE_ADDRESS).ok()?;
        if let Some(target) = target {
            preparation::memory(self, &instruction, target);
        }
        preparation::stack(self, &instruction);
        self.note_use(&instruction);
        Some((instruction, branches))
    }

    /// Immediates and implicit operands; whether it is a branch's target.
    fn other_operand(
        &mut self,
        instruction: &mut Instruction,
        operand: u32,
        kind: OpCodeOperandKind,
    ) -> bool {
        use OpCodeOperandKind::*;
        let value = values::integer(&mut self.random);
        let address_32 = self.random.percent(10);
        let by_size = |wide, narrow| if address_32 { narrow } else { wide };
        let op_kind = match kind {
            imm8 if operand == 1 && instruction.op0_kind() == OpKind::Immediate16 => {
                OpKind::Immediate8_2nd
            }
            imm8 | imm8_const_1 => OpKind::Immediate8,
            imm8sex16 => OpKind::Immediate8to16,
            imm8sex32 => OpKind::Immediate8to32,
            imm8sex64 => OpKind::Immediate8to64,
            imm16 => OpKind::Immediate16,
            imm32 => OpKind::Immediate32,
            imm32sex64 => OpKind::Immediate32to64,
            imm64 => OpKind::Immediate64,
            seg_rSI => by_size(OpKind::MemorySegRSI, OpKind::MemorySegESI),
            es_rDI => by_size(OpKind::MemoryESRDI, OpKind::MemoryESEDI),
            seg_rDI => by_size(OpKind::MemorySegRDI, OpKind::MemorySegEDI),
            _ => OpKind::NearBranch64,
        };
        instruction.set_op_kind(operand, op_kind);
        match op_kind {
            OpKind::Immediate8 if kind == imm8_const_1 => instruction.set_immediate8(1),
            OpKind::Immediate8 => instruction.set_immediate8(value as u8),
            OpKind::Immediate8_2nd => instruction.set_immediate8_2nd(value as u8 & 0x1f),
            OpKind::Immediate8to16 => instruction.set_immediate8to16(i16::from(value as i8)),
            OpKind::Immediate8to32 => instruction.set_immediate8to32(i32::from(value as i8)),
            OpKind::Immediate8to64 => instruction.set_immediate8to64(i64::from(value as i8)),
            OpKind::Immediate16 => instruction.set_immediate16(value as u16),
            OpKind::Immediate32 => instruction.set_immediate32(value as u32),
            OpKind::Immediate32to64 => instruction.set_immediate32to64(i64::from(value as i32)),
            OpKind::Immediate64 => instruction.set_immediate64(value),
            OpKind::NearBranch64 => return true,
            _ => {}
        }
        false
    }

    fn add_prefixes(&mut self, instruction: &mut Instruction, kind: Kind) {
        let random = &mut self.random;
        let op_code = instruction.code().op_code();
        let locks = op_code.can_use_lock_prefix() && instruction.op0_kind() == OpKind::Memory;
        if random.percent(if locks { 25 } else { 1 }) {
            instruction.set_has_lock_prefix(true);
        }
        if kind == Kind::String {
            match random.below(4) {
                0 => instruction.set_has_rep_prefix(true),
                1 => instruction.set_has_repne_prefix(true),
                2 => instruction.set_has_repe_prefix(true),
                _ => {}
            }
        }
        const SEGMENTS: [Register; 6] =
            [Register::ES, Register::CS, Register::SS, Register::DS, Register::FS, Register::GS];
        if random.percent(8) {
            let segment = random.pick(&SEGMENTS);
            instruction.set_segment_prefix(segment);
        }
    }

    /// Remembers which registers an instruction uses.
    fn note_use(&mut self, instruction: &Instruction) {
        for register in self.info.info(instruction).used_registers() {
            if !register.register().is_gpr() {
                continue;
            }
            let number = register.register().full_register().number();
            self.used[number] = true;
            use iced_x86::OpAccess::{CondRead, Read};
            self.written[number] |= !matches!(register.access(), Read | CondRead);
        }
    }
}

/// Operand kinds that are, or may be, in memory.
pub(crate) fn is_memory(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind::*;
    matches!(
        kind,
        mem | mem_offs
            | r8_or_mem
            | r16_or_mem
            | r32_or_mem
            | r64_or_mem
            | mm_or_mem
            | xmm_or_mem
            | seg_rBX_al
    )
}

/// A register for an operand, if it is to be one.
fn register_kind(kind: OpCodeOperandKind, random: &mut Random) -> Option<Register> {
    use OpCodeOperandKind::*;
    let memory_too =
        matches!(kind, r8_or_mem | r16_or_mem | r32_or_mem | r64_or_mem | mm_or_mem | xmm_or_mem);
    if memory_too && random.percent(50) {
        return Option::None;
    }
    let number = random.below(16) as u32;
    Some(match kind {
        // AL to BH, SPL to R15L.
        r8_or_mem | r8_reg | r8_opcode => Register::AL + random.below(20) as u32,
        r16_or_mem | r16_reg | r16_rm | r16_opcode => Register::AX + number,
        r32_or_mem | r32_reg | r32_rm | r32_opcode => Register::EAX + number,
        r64_or_mem | r64_reg | r64_rm | r64_opcode => Register::RAX + number,
        mm_or_mem | mm_reg | mm_rm => Register::MM0 + number % 8,
        xmm_or_mem | xmm_reg | xmm_rm => Register::XMM0 + number,
        al => Register::AL,
        cl => Register::CL,
        ax => Register::AX,
        dx => Register::DX,
        eax => Register::EAX,
        rax => Register::RAX,
        st0 => Register::ST0,
        sti_opcode => Register::ST0 + number % 8,
        _ => return Option::None,
    })
}

/// Whether an instruction form has a memory operand whose address is an immediate.
pub(crate) fn is_absolute(code: Code) -> bool {
    let operands = code.op_code();
    (0..operands.op_count()).any(|operand| operands.op_kind(operand) == OpCodeOperandKind::mem_offs)
}
