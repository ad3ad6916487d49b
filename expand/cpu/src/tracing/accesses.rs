//! Which memory an instruction accesses as its operands: described once, when its block first runs, and
//! computed from the registers each time before it runs.

use iced_x86::{
    Code, CodeSize, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register,
    UsedMemory,
};
use reprise_trace::cpu_state::{RCX, RSP};
use reprise_trace::instructions::{AccessKind, MAX_ACCESS_BYTES, NO_BASE, StaticAccess};

use super::registers::OpRegisters;
use crate::cpu::{Cpu, ZERO};
use crate::decode::op::{Op, segment_index};
use crate::flags;
use crate::mode::Mode;

/// An access, and how its linear address is made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Planned {
    pub(crate) access: StaticAccess,
    address: Address,
    displacement: u64,
    mask: u64,
    segment: u8,
    base: u8,
    index: u8,
    scale: u8,
}

/// What an address has beside base, index and displacement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Address {
    Plain,
    /// The index is a byte register: XLAT's AL.
    ByteIndex,
    /// The bit that `register` numbers lies in another operand of `size_bytes`.
    Bit {
        register: u8,
        size_bytes: u8,
    },
}

/// The accesses of one instruction, and the registers that it writes.
#[derive(Clone, Debug, Default)]
pub(crate) struct OpAccesses {
    pub(crate) list: Box<[Planned]>,
    /// They are made as often as the instruction repeats.
    pub(crate) repeated: bool,
    /// More may be made: see `far.rs`.
    pub(crate) far: bool,
    /// Nothing unless the trace has them.
    pub(crate) registers: OpRegisters,
}

impl Planned {
    /// The linear address, before the instruction has run.
    #[inline(always)]
    pub(crate) fn linear(&self, cpu: &Cpu) -> u64 {
        cpu.wrap(self.segment_base(cpu).wrapping_add(self.offset(cpu)))
    }

    #[inline(always)]
    fn segment_base(&self, cpu: &Cpu) -> u64 {
        cpu.registers.segment_base[usize::from(self.segment & 7)]
    }

    #[inline(always)]
    fn offset(&self, cpu: &Cpu) -> u64 {
        let base = cpu.registers.general(self.base);
        let mut index = cpu.registers.general(self.index);
        let mut offset = base.wrapping_add(self.displacement);
        match self.address {
            Address::Plain => {}
            Address::ByteIndex => index &= 0xff,
            Address::Bit { register, size_bytes } => {
                let bits = u32::from(size_bytes) * 8;
                let unused = 64 - bits;
                let number = (cpu.registers.general(register) << unused) as i64 >> unused;
                let away = (number >> bits.trailing_zeros()) * i64::from(size_bytes);
                offset = offset.wrapping_add(away as u64);
            }
        }
        offset.wrapping_add(index << self.scale) & self.mask
    }
}

/// An access of a repeated instruction: where it begins, and how far it moves from element to element.
pub(super) struct Repeated {
    segment_base: u64,
    linear_mask: u64,
    offset: u64,
    /// Offsets wrap where the address's width ends.
    mask: u64,
    stride: u64,
    pub(super) writes: bool,
    pub(super) size_bytes: u16,
}

impl Repeated {
    /// Before the instruction has run.
    pub(super) fn new(cpu: &Cpu, planned: &Planned) -> Self {
        Self {
            segment_base: planned.segment_base(cpu),
            linear_mask: cpu.registers.linear_mask,
            offset: planned.offset(cpu),
            mask: planned.mask,
            stride: stride(cpu, &planned.access),
            writes: planned.access.kind.writes(),
            size_bytes: planned.access.size_bytes,
        }
    }

    pub(super) fn linear(&self, element: usize) -> u64 {
        let moved = self.stride.wrapping_mul(element as u64);
        let offset = self.offset.wrapping_add(moved) & self.mask;
        self.segment_base.wrapping_add(offset) & self.linear_mask
    }
}

/// What a repeated instruction counts down, as wide as its addresses.
pub(crate) fn counter(cpu: &Cpu, accesses: &OpAccesses) -> u64 {
    let mask = accesses.list.first().map_or(u64::MAX, |access| access.mask);
    cpu.registers.gpr[RCX] & mask
}

/// Sets what a repeated instruction counts down.
pub(crate) fn set_counter(cpu: &mut Cpu, accesses: &OpAccesses, count: u64) {
    let mask = accesses.list.first().map_or(u64::MAX, |access| access.mask);
    let register = &mut cpu.registers.gpr[RCX];
    *register = if mask == 0xffff { *register & !mask | count } else { count };
}

/// How far a string instruction's addresses move from one element to the next.
fn stride(cpu: &Cpu, access: &StaticAccess) -> u64 {
    let bytes = u64::from(access.size_bytes);
    if cpu.rflags_rest & flags::DF != 0 { bytes.wrapping_neg() } else { bytes }
}

/// The accesses that an instruction makes, in the order in which a trace has them: what it reads first.
pub(crate) fn of(op: &Op, mode: Mode, info: &mut InstructionInfoFactory) -> OpAccesses {
    let instruction: &Instruction = &op.instruction;
    if let Some(frame_bytes) = returned_frame(instruction) {
        let slots = if mode.has(Mode::CODE_64) { 5 } else { 3 };
        let list = (0..slots).map(|slot| returned_slot(slot * frame_bytes, frame_bytes, mode));
        // IRET of 64-bit code pops the stack pointer at any rate.
        let far = !mode.has(Mode::CODE_64);
        return OpAccesses { list: list.collect(), far, ..OpAccesses::default() };
    }
    if let Some(kind) = names_only(instruction.mnemonic()) {
        let list = Box::new([named(op, kind)]);
        return OpAccesses { list, ..OpAccesses::default() };
    }
    let step = instruction.stack_pointer_increment() as i16;
    let has_operand =
        (0..instruction.op_count()).any(|operand| instruction.op_kind(operand) == OpKind::Memory);
    // Of a repeated instruction the decoder knows no sizes.
    let mut once = *instruction;
    once.set_has_rep_prefix(false);
    once.set_has_repne_prefix(false);
    let used = info.info(&once);
    let mut list: Vec<Planned> = used
        .used_memory()
        .iter()
        .enumerate()
        // The memory operand comes first, what the instruction accesses by itself behind it.
        .filter_map(|(number, memory)| planned(op, memory, has_operand && number == 0, mode, step))
        .collect();
    list.sort_by_key(|planned| planned.access.kind == AccessKind::Write);
    let (repeated, far) = (repeats(instruction), is_far(instruction.code()));
    OpAccesses { list: list.into_boxed_slice(), repeated, far, registers: OpRegisters::default() }
}

/// Whether an instruction's accesses are made as often as its counter says.
fn repeats(instruction: &Instruction) -> bool {
    instruction.is_string_instruction()
        && (instruction.has_rep_prefix() || instruction.has_repne_prefix())
}

/// Whether an instruction may take up another stack: a far call or return.
fn is_far(code: Code) -> bool {
    use Code::{Retfd, Retfd_imm16, Retfq, Retfq_imm16, Retfw, Retfw_imm16};
    let returns = matches!(code, Retfd | Retfd_imm16 | Retfq | Retfq_imm16 | Retfw | Retfw_imm16);
    returns || code.is_call_far() || code.is_call_far_indirect()
}

/// Bytes of each value that IRET pops.
fn returned_frame(instruction: &Instruction) -> Option<u64> {
    match instruction.code() {
        Code::Iretq => Some(8),
        Code::Iretd => Some(4),
        Code::Iretw => Some(2),
        _ => None,
    }
}

fn returned_slot(displacement: u64, size_bytes: u64, mode: Mode) -> Planned {
    Planned {
        access: StaticAccess {
            kind: AccessKind::Read,
            size_bytes: size_bytes as u16,
            base: RSP as u8,
            displacement: displacement as i32,
            step: 0,
        },
        address: Address::Plain,
        displacement,
        mask: mode.stack_mask(),
        segment: reprise_trace::cpu_state::SS as u8,
        base: RSP as u8,
        index: ZERO,
        scale: 0,
    }
}

/// One access of an instruction as the decoder lists it; `None` if it accesses nothing. `explicit` says
/// that it is the instruction's memory operand.
fn planned(
    op: &Op,
    memory: &UsedMemory,
    explicit: bool,
    mode: Mode,
    stack_step: i16,
) -> Option<Planned> {
    let kind = match memory.access() {
        OpAccess::Read | OpAccess::CondRead => AccessKind::Read,
        OpAccess::Write | OpAccess::CondWrite => AccessKind::Write,
        OpAccess::ReadWrite | OpAccess::ReadCondWrite => AccessKind::ReadWrite,
        OpAccess::None | OpAccess::NoMemAccess => return None,
    };
    let instruction: &Instruction = &op.instruction;
    let size = memory.memory_size().size() as u16;
    let size_bytes = if explicit && op.operand_bytes != 0 {
        op.operand_bytes
    } else if pushes_selector_32(instruction.code()) {
        2
    } else {
        size
    };
    if !(1..=MAX_ACCESS_BYTES).contains(&size_bytes) {
        return None;
    }
    let base = number(memory.base());
    let access = StaticAccess {
        kind,
        size_bytes,
        base: if usize::from(base) < 16 { base } else { NO_BASE },
        displacement: if explicit { memory.displacement() } else { displacement(memory) } as i32,
        step: step(instruction, base, size_bytes, stack_step),
    };
    if explicit && instruction.mnemonic() != Mnemonic::Xlatb {
        // POP into [RSP+8] addresses by RSP as it is afterwards.
        let moved = memory.displacement().wrapping_sub(instruction.memory_displacement64());
        return Some(Planned {
            access,
            address: bit_address(op),
            displacement: op.displacement.wrapping_add(moved),
            mask: op.address_mask,
            segment: segment_index(memory.segment()),
            base: op.base,
            index: op.index,
            scale: op.scale,
        });
    }
    let on_stack = usize::from(base) == RSP;
    Some(Planned {
        access,
        address: match memory.index() {
            Register::AL => Address::ByteIndex,
            _ => Address::Plain,
        },
        displacement: displacement(memory),
        mask: match memory.address_size() {
            _ if on_stack => mode.stack_mask(),
            CodeSize::Code16 => 0xffff,
            CodeSize::Code32 => 0xffff_ffff,
            CodeSize::Code64 | CodeSize::Unknown => u64::MAX,
        },
        segment: segment_index(memory.segment()),
        base,
        index: number(memory.index()),
        scale: memory.scale().trailing_zeros() as u8,
    })
}

/// What an instruction does that names an address and accesses nothing there.
fn names_only(mnemonic: Mnemonic) -> Option<AccessKind> {
    use Mnemonic::{Invlpg, Prefetchw, Prefetchwt1};
    use Mnemonic::{Prefetch, Prefetchnta, Prefetcht0, Prefetcht1, Prefetcht2};
    match mnemonic {
        Prefetch | Prefetchnta | Prefetcht0 | Prefetcht1 | Prefetcht2 | Prefetchw | Prefetchwt1 => {
            Some(AccessKind::Prefetch)
        }
        Invlpg => Some(AccessKind::Invalidate),
        _ => None,
    }
}

/// The memory operand of an instruction that accesses nothing there, of which the decoder says nothing.
fn named(op: &Op, kind: AccessKind) -> Planned {
    let instruction: &Instruction = &op.instruction;
    let base = number(instruction.memory_base());
    Planned {
        access: StaticAccess {
            base: if usize::from(base) < 16 { base } else { NO_BASE },
            displacement: instruction.memory_displacement64() as i32,
            ..StaticAccess::plain(kind, 1)
        },
        address: Address::Plain,
        displacement: op.displacement,
        mask: op.address_mask,
        segment: segment_index(instruction.memory_segment()),
        base: op.base,
        index: op.index,
        scale: op.scale,
    }
}

/// The displacement of an access that is no operand, with its sign: the decoder cuts it to the code's
/// width, and a stack may be wider.
fn displacement(memory: &UsedMemory) -> u64 {
    match memory.address_size() {
        CodeSize::Code16 => memory.displacement() as i16 as u64,
        CodeSize::Code32 => memory.displacement() as i32 as u64,
        CodeSize::Code64 | CodeSize::Unknown => memory.displacement(),
    }
}

/// Whether a PUSH moves the stack by four bytes and writes a selector's two.
fn pushes_selector_32(code: Code) -> bool {
    use Code::{Pushd_CS, Pushd_DS, Pushd_ES, Pushd_FS, Pushd_GS, Pushd_SS};
    matches!(code, Pushd_CS | Pushd_DS | Pushd_ES | Pushd_FS | Pushd_GS | Pushd_SS)
}

fn bit_address(op: &Op) -> Address {
    let instruction: &Instruction = &op.instruction;
    match instruction.mnemonic() {
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
            if instruction.op1_kind() == OpKind::Register =>
        {
            Address::Bit { register: op.a, size_bytes: op.size }
        }
        _ => Address::Plain,
    }
}

/// By how much an instruction moves the register that it addresses by.
fn step(instruction: &Instruction, base: u8, size_bytes: u16, stack_step: i16) -> i16 {
    if usize::from(base) == RSP {
        stack_step
    } else if instruction.is_string_instruction() {
        size_bytes as i16
    } else {
        0
    }
}

/// A general register's slot.
fn number(register: Register) -> u8 {
    match register {
        Register::None | Register::RIP | Register::EIP => ZERO,
        register => register.full_register().number() as u8,
    }
}
