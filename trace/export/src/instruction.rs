//! What exporters want to know of an instruction beyond its bytes: how it moves control, what it is
//! called, and which registers it uses. Decoded once a block.

use std::sync::Arc;

use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic,
    OpAccess, OpKind, Register,
};
use reprise_trace::instructions::{BlockRef, CodeWidth, InstructionRef};

use crate::kind::Kind;

/// How an instruction moves control.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Branch {
    /// It does not.
    None,
    /// A jump to a fixed target.
    DirectJump,
    /// A jump to a computed target.
    IndirectJump,
    /// A conditional jump, LOOP and JRCXZ included.
    Conditional,
    /// A call of a fixed target.
    DirectCall,
    /// A call of a computed target.
    IndirectCall,
    /// A return from a call.
    Return,
    /// SYSCALL, SYSENTER, INT and their like: into the kernel.
    SystemCall,
    /// IRET, SYSRET, SYSEXIT: out of it.
    SystemReturn,
}

/// What exporters know of an instruction.
#[derive(Clone, Copy, Debug)]
pub struct Decoded {
    /// How it moves control.
    pub branch: Branch,
    /// Its name.
    pub mnemonic: Mnemonic,
    /// What kind of work it does.
    pub kind: Kind,
    /// Where it leads, if it is a direct branch.
    pub target: Option<u64>,
    /// Registers that it reads, in full width, none twice.
    pub reads: RegisterList,
    /// Registers that it writes, in full width, none twice.
    pub writes: RegisterList,
    /// It reads arithmetic flags.
    pub reads_flags: bool,
    /// It writes arithmetic flags.
    pub writes_flags: bool,
    /// The bytes are an instruction, and as long as the trace says.
    pub is_valid: bool,
}

/// The most registers kept of one instruction, which is more than any format takes.
const MAX_REGISTERS: usize = 6;

/// A few registers.
#[derive(Clone, Copy, Debug, Default)]
pub struct RegisterList {
    registers: [Register; MAX_REGISTERS],
    count: u8,
}

impl RegisterList {
    fn push(&mut self, register: Register) {
        let count = usize::from(self.count);
        if count < MAX_REGISTERS && !self.as_slice().contains(&register) {
            self.registers[count] = register;
            self.count += 1;
        }
    }

    /// The registers.
    pub fn as_slice(&self) -> &[Register] {
        &self.registers[..usize::from(self.count)]
    }
}

/// The decoder's view of an instruction.
pub(crate) fn decode(instruction: InstructionRef<'_>, width: CodeWidth) -> Instruction {
    let (bytes, linear) = (instruction.bytes(), instruction.linear());
    Decoder::with_ip(width.bits(), bytes, linear, DecoderOptions::NONE).decode()
}

fn branch_of(instruction: &Instruction) -> Branch {
    let is_direct = matches!(
        instruction.op0_kind(),
        OpKind::NearBranch16
            | OpKind::NearBranch32
            | OpKind::NearBranch64
            | OpKind::FarBranch16
            | OpKind::FarBranch32
    );
    match instruction.mnemonic() {
        Mnemonic::Syscall | Mnemonic::Sysenter => return Branch::SystemCall,
        Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq => return Branch::SystemReturn,
        Mnemonic::Sysret | Mnemonic::Sysretq | Mnemonic::Sysexit | Mnemonic::Sysexitq => {
            return Branch::SystemReturn;
        }
        _ => {}
    }
    match instruction.flow_control() {
        FlowControl::UnconditionalBranch if is_direct => Branch::DirectJump,
        FlowControl::UnconditionalBranch | FlowControl::IndirectBranch => Branch::IndirectJump,
        FlowControl::ConditionalBranch => Branch::Conditional,
        FlowControl::Return => Branch::Return,
        FlowControl::Call if is_direct => Branch::DirectCall,
        FlowControl::Call | FlowControl::IndirectCall => Branch::IndirectCall,
        FlowControl::Interrupt => Branch::SystemCall,
        FlowControl::Next | FlowControl::XbeginXabortXend | FlowControl::Exception => Branch::None,
    }
}

impl Decoded {
    fn new(
        instruction: InstructionRef<'_>,
        width: CodeWidth,
        factory: &mut InstructionInfoFactory,
    ) -> Self {
        let decoded = decode(instruction, width);
        let (mut reads, mut writes) = (RegisterList::default(), RegisterList::default());
        for used in factory.info(&decoded).used_registers() {
            let register = used.register().full_register();
            if matches!(
                used.access(),
                OpAccess::Read | OpAccess::CondRead | OpAccess::ReadWrite | OpAccess::ReadCondWrite
            ) {
                reads.push(register);
            }
            if matches!(
                used.access(),
                OpAccess::Write
                    | OpAccess::CondWrite
                    | OpAccess::ReadWrite
                    | OpAccess::ReadCondWrite
            ) {
                writes.push(register);
            }
        }
        let branch = branch_of(&decoded);
        // Where a far branch leads depends on its segment's base.
        let is_near = matches!(
            decoded.op0_kind(),
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
        );
        let target = is_near.then(|| decoded.near_branch_target());
        Self {
            branch,
            mnemonic: decoded.mnemonic(),
            kind: Kind::of(&decoded, branch),
            target,
            reads,
            writes,
            reads_flags: decoded.rflags_read() != 0,
            writes_flags: decoded.rflags_modified() != 0,
            is_valid: decoded.code() != Code::INVALID && decoded.len() == instruction.bytes().len(),
        }
    }
}

/// What is known of the instructions of each block, by the block's number.
pub struct DecodedBlocks {
    factory: InstructionInfoFactory,
    blocks: Vec<Option<Arc<[Decoded]>>>,
}

impl Default for DecodedBlocks {
    fn default() -> Self {
        Self { factory: InstructionInfoFactory::new(), blocks: Vec::new() }
    }
}

impl std::fmt::Debug for DecodedBlocks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DecodedBlocks").field("blocks", &self.blocks.len()).finish_non_exhaustive()
    }
}

impl DecodedBlocks {
    /// Forgets all: numbers mean other blocks from here on.
    pub fn clear(&mut self) {
        self.blocks.clear();
    }

    /// The instructions of the block of this number, as many as it has.
    pub fn get(&mut self, id: u32, block: BlockRef<'_>) -> Arc<[Decoded]> {
        let index = id as usize;
        if index >= self.blocks.len() {
            self.blocks.resize_with(index + 1, || None);
        }
        let factory = &mut self.factory;
        let decoded = self.blocks[index].get_or_insert_with(|| {
            let width = block.mode().width;
            block.instructions().map(|one| Decoded::new(one, width, factory)).collect()
        });
        Arc::clone(decoded)
    }
}
