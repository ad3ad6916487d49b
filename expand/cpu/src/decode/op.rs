//! A pre-decoded operation: one guest instruction, ready to run.

use std::ops::Deref;

use iced_x86::{Instruction, OpKind, Register};

use crate::cpu::{BLOCK_RIP, Cpu, NO_SEGMENT, ZERO};
use crate::fault::Flow;
use crate::ops::raise_ud;

/// What runs an operation. Native sequences that need no memory operand have this very signature,
/// so that the block loop calls them without a detour.
pub(crate) type Handler = unsafe extern "sysv64" fn(&mut Cpu, &Op) -> Flow;

/// A native sequence with a memory operand: the CPU and the operand's host address.
pub(crate) type NativeWithMemory = unsafe extern "sysv64" fn(&mut Cpu, *mut u8) -> Flow;

/// One guest instruction, pre-decoded. Fields mean what their handler says they mean.
#[derive(Debug)]
#[repr(align(64))]
pub(crate) struct Op {
    pub(crate) handler: Handler,
    /// The native sequence, for handlers that bring a memory operand to one.
    pub(crate) native: Option<NativeWithMemory>,
    /// Memory operand: displacement, which for RIP-relative operands counts from the block's start.
    pub(crate) displacement: u64,
    /// Memory operand: what base + index + displacement is cut to.
    pub(crate) address_mask: u64,
    /// Immediate, sign-extended as the instruction has it; for relative branches, the target's
    /// distance from the block's start.
    pub(crate) immediate: u64,
    /// Memory operand: base and index as indices into the general registers.
    pub(crate) base: u8,
    pub(crate) index: u8,
    /// Memory operand: the index is shifted left by this.
    pub(crate) scale: u8,
    /// Memory operand: segment, as an index into the segment bases ([`NO_SEGMENT`] for none).
    pub(crate) segment: u8,
    /// Register operands, as indices into the general registers.
    pub(crate) a: u8,
    pub(crate) b: u8,
    /// Operand size in bytes.
    pub(crate) size: u8,
    /// Memory operand of a native sequence: bytes.
    pub(crate) operand_bytes: u16,
    /// The memory operand is read, written.
    pub(crate) reads: bool,
    pub(crate) writes: bool,
    /// Bytes from the block's start to this instruction.
    pub(crate) offset: u16,
    /// Which instruction of the block this is.
    pub(crate) number: u16,
    /// Bytes of the instruction.
    pub(crate) length: u8,
    /// What handlers need seldom.
    pub(crate) instruction: Box<Decoded>,
}

/// The whole decoded instruction, for handlers that need more than an operation's own fields.
#[derive(Debug)]
pub(crate) struct Decoded {
    instruction: Instruction,
    /// In a segmented mode, what runs after the segment's limit and rights are checked.
    pub(crate) inner: Handler,
    /// What runs before undefined flags become another maker's (`other_maker.rs`), where they do.
    pub(crate) own: Option<Handler>,
    /// The instruction does nothing but what the host's same instruction does to registers, flags and
    /// its memory operand: translated code may hold it as it is.
    pub(crate) inline: bool,
}

impl Deref for Decoded {
    type Target = Instruction;

    fn deref(&self) -> &Instruction {
        &self.instruction
    }
}

/// An operation fills one cache line: the block loop reads them in order.
const _: () = assert!(size_of::<Op>() == 64);

impl Op {
    /// An operation that raises #UD until handler and fields are chosen. `offset` counts from the
    /// block's start in bytes, `number` in instructions.
    pub(crate) fn new(instruction: Instruction, offset: usize, number: usize) -> Self {
        Self {
            handler: raise_ud,
            native: None,
            displacement: 0,
            address_mask: u64::MAX,
            immediate: 0,
            base: ZERO,
            index: ZERO,
            scale: 0,
            segment: NO_SEGMENT,
            a: 0,
            b: 0,
            size: 0,
            operand_bytes: 0,
            reads: false,
            writes: false,
            offset: offset as u16,
            number: number as u16,
            length: instruction.len() as u8,
            instruction: Box::new(Decoded {
                instruction,
                inner: raise_ud,
                own: None,
                inline: false,
            }),
        }
    }

    /// The memory operand's offset in its segment.
    #[inline(always)]
    pub(crate) fn effective_address(&self, cpu: &Cpu) -> u64 {
        let base = cpu.registers.general(self.base);
        let index = cpu.registers.general(self.index);
        base.wrapping_add(index << self.scale).wrapping_add(self.displacement) & self.address_mask
    }

    /// The memory operand's linear address.
    #[inline(always)]
    pub(crate) fn linear_address(&self, cpu: &Cpu) -> u64 {
        let base = cpu.registers.segment_base[usize::from(self.segment & 7)];
        cpu.wrap(base.wrapping_add(self.effective_address(cpu)))
    }

    /// The address of the instruction, as an offset in CS.
    #[inline]
    pub(crate) fn rip(&self, cpu: &Cpu) -> u64 {
        let block = cpu.registers.gpr[usize::from(BLOCK_RIP)];
        block.wrapping_add(u64::from(self.offset)) & cpu.mode.rip_mask()
    }

    /// The address of the instruction that follows, as an offset in CS.
    #[inline(always)]
    pub(crate) fn next_rip(&self, cpu: &Cpu) -> u64 {
        let block = cpu.registers.gpr[usize::from(BLOCK_RIP)];
        let next = block.wrapping_add(u64::from(self.offset) + u64::from(self.length));
        next & cpu.mode.rip_mask()
    }

    /// The relative branch's target, as an offset in CS (cut to the operand size by the handler).
    #[inline(always)]
    pub(crate) fn branch_target(&self, cpu: &Cpu) -> u64 {
        let block = cpu.registers.gpr[usize::from(BLOCK_RIP)];
        block.wrapping_add(self.immediate) & cpu.mode.rip_mask()
    }

    /// Fills the memory-operand fields from a decoded instruction at `offset` in its block.
    pub(crate) fn set_memory_operand(&mut self, instruction: &Instruction, address_bits: u32) {
        self.base = ZERO;
        self.index = ZERO;
        self.segment = NO_SEGMENT;
        self.address_mask = match address_bits {
            64 => u64::MAX,
            32 => 0xffff_ffff,
            _ => 0xffff,
        };
        let has_memory = (0..instruction.op_count())
            .any(|operand| instruction.op_kind(operand) == OpKind::Memory);
        if !has_memory {
            return;
        }
        self.displacement = instruction.memory_displacement64();
        self.segment = segment_index(instruction.memory_segment());
        self.scale = instruction.memory_index_scale().trailing_zeros() as u8;
        if instruction.memory_index() != Register::None {
            self.index = instruction.memory_index().number() as u8;
        }
        match instruction.memory_base() {
            Register::None => {}
            Register::RIP | Register::EIP => {
                // The decoder gives the absolute address as if the block began at address 0.
                self.base = BLOCK_RIP;
                self.displacement = instruction.memory_displacement64();
            }
            register => self.base = register.number() as u8,
        }
    }
}

/// A segment register as an index into the segment bases.
pub(crate) fn segment_index(register: Register) -> u8 {
    match register {
        Register::ES => 0,
        Register::CS => 1,
        Register::SS => 2,
        Register::DS => 3,
        Register::FS => 4,
        Register::GS => 5,
        _ => NO_SEGMENT,
    }
}
