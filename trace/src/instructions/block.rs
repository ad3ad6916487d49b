//! Blocks: runs of instructions that a trace describes once and then names by number.

use super::TraceError;

/// The longest x86 instruction, in bytes (Intel SDM volume 2, section 2.3.11).
pub const MAX_INSTRUCTION_BYTES: usize = 15;
/// The most instructions of one block: a page of one-byte instructions.
pub const MAX_BLOCK_INSTRUCTIONS: usize = 4096;
/// The most accesses that one instruction's definition lists.
pub const MAX_STATIC_ACCESSES: usize = 64;
/// The most accesses and register writes that the definitions of one block list together.
pub const MAX_BLOCK_ACCESSES: usize = 16_384;
/// The most bytes of one access. The largest state that XSAVE stores today has 11 KiB.
pub const MAX_ACCESS_BYTES: u16 = 1 << 14;
/// The most register writes that one instruction's definition lists, and eight-byte words of one.
pub const MAX_REGISTER_WRITES: usize = 64;
/// Guest pages, in bytes.
pub(crate) const PAGE_BYTES: u64 = 4096;

/// How wide the operands and addresses of code are by default.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CodeWidth {
    /// 16-bit code: real mode, or a 16-bit segment.
    Bits16,
    /// 32-bit code.
    Bits32,
    /// 64-bit code.
    Bits64,
}

const WIDTHS: [CodeWidth; 3] = [CodeWidth::Bits16, CodeWidth::Bits32, CodeWidth::Bits64];

impl CodeWidth {
    /// 16, 32 or 64.
    pub fn bits(self) -> u32 {
        16 << self as u32
    }
}

/// How the CPU runs a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mode {
    /// Current privilege level, 0 to 3.
    pub cpl: u8,
    /// Width of the code segment.
    pub width: CodeWidth,
}

impl Mode {
    /// 64-bit code at CPL 0.
    pub const KERNEL: Self = Self { cpl: 0, width: CodeWidth::Bits64 };
    /// 64-bit code at CPL 3.
    pub const USER: Self = Self { cpl: 3, width: CodeWidth::Bits64 };

    pub(crate) fn to_byte(self) -> u8 {
        self.cpl | (self.width as u8) << 2
    }

    pub(crate) fn from_byte(byte: u8) -> Option<Self> {
        let width = *WIDTHS.get(usize::from(byte >> 2))?;
        Some(Self { cpl: byte & 3, width })
    }
}

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AccessKind {
    /// Reads memory.
    Read,
    /// Writes memory.
    Write,
    /// Reads and then writes the same bytes, as `add [mem], eax` does: one address in a trace.
    ReadWrite,
    /// Accesses nothing: a prefetch names the address, which may lead nowhere.
    Prefetch,
    /// Accesses nothing: INVLPG names the address whose translation it forgets.
    Invalidate,
}

const ACCESS_KINDS: [AccessKind; 5] = [
    AccessKind::Read,
    AccessKind::Write,
    AccessKind::ReadWrite,
    AccessKind::Prefetch,
    AccessKind::Invalidate,
];

/// The guest-physical page that an address has in a batch if it leads nowhere: which only a prefetch's
/// or an INVLPG's may.
pub const NOWHERE_PAGE: u64 = 0x000f_ffff_ffff_f000;

impl AccessKind {
    /// Whether memory is read.
    pub fn reads(self) -> bool {
        matches!(self, Self::Read | Self::ReadWrite)
    }

    /// Whether memory is written.
    pub fn writes(self) -> bool {
        matches!(self, Self::Write | Self::ReadWrite)
    }

    /// Whether memory is accessed at all.
    pub fn touches_memory(self) -> bool {
        self.reads() || self.writes()
    }

    pub(crate) fn from_byte(byte: u8) -> Option<Self> {
        ACCESS_KINDS.get(usize::from(byte)).copied()
    }
}

/// Registers that addresses are made from: the numbers 0 to 15 are RAX to R15 in encoding order.
pub const NO_BASE: u8 = 16;

/// An access that an instruction makes whenever it retires.
///
/// `base`, `displacement` and `step` are hints: they decide how short the addresses are stored,
/// never what a reader gets. An access whose address is `base + displacement` (plus an index, which
/// may be anything) names them; `step` is what the instruction itself then adds to the base
/// register: -8 for PUSH and CALL (whose displacement is -8 too), 8 for POP and RET, the operand's
/// size for string instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StaticAccess {
    /// Read, write, or both.
    pub kind: AccessKind,
    /// Bytes accessed, from 1 to [`MAX_ACCESS_BYTES`].
    pub size_bytes: u16,
    /// The base register, or [`NO_BASE`].
    pub base: u8,
    /// What the instruction adds to it to form the address.
    pub displacement: i32,
    /// By how much the instruction changes the base register.
    pub step: i16,
}

impl StaticAccess {
    /// An access without hints.
    pub fn plain(kind: AccessKind, size_bytes: u16) -> Self {
        Self { kind, size_bytes, base: NO_BASE, displacement: 0, step: 0 }
    }

    /// Eight-byte words that the access takes in [`super::Batch::values`]: a read-write brings what
    /// it read, then what it wrote, and what accesses nothing has no value.
    pub fn value_words(&self) -> usize {
        let words = usize::from(self.size_bytes).div_ceil(8);
        words * (usize::from(self.kind.reads()) + usize::from(self.kind.writes()))
    }
}

/// A register that an instruction writes whenever it retires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegisterWrite {
    /// The register's number, which the producer chooses. 0 to 15 are RAX to R15 in encoding order.
    pub register: u8,
    /// Eight-byte words of its value in [`super::Batch::registers`].
    pub words: u8,
}

/// One instruction of a block, as its producer describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InstructionDefinition {
    /// Its encoding, 1 to [`MAX_INSTRUCTION_BYTES`] bytes.
    pub bytes: Vec<u8>,
    /// The accesses that it makes, in order.
    pub accesses: Vec<StaticAccess>,
    /// The accesses are made any number of times, none included, and a run says how often: an
    /// instruction with a REP prefix, or one that accesses memory only on a condition.
    pub repeated: bool,
    /// The registers that it writes.
    pub register_writes: Vec<RegisterWrite>,
}

/// How a block ends. A hint: it decides how short the next block is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BlockEnd {
    /// In any other way.
    #[default]
    Other,
    /// With a call, near or far.
    Call,
    /// With a return from a call.
    Return,
}

const BLOCK_ENDS: [BlockEnd; 3] = [BlockEnd::Other, BlockEnd::Call, BlockEnd::Return];

impl BlockEnd {
    pub(crate) fn from_byte(byte: u8) -> Option<Self> {
        BLOCK_ENDS.get(usize::from(byte)).copied()
    }
}

/// A block, as its producer describes it: instructions that follow each other in memory and are
/// entered at the first. Control may leave after any of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockDefinition {
    /// Linear address of the first instruction's first byte.
    pub linear: u64,
    /// Its guest-physical address: the same place in its page.
    pub physical: u64,
    /// Guest-physical address of the next page, where the block's bytes reach into one.
    pub next_page: Option<u64>,
    /// How the CPU runs it.
    pub mode: Mode,
    /// How it ends.
    pub end: BlockEnd,
    /// Its instructions.
    pub instructions: Vec<InstructionDefinition>,
}

/// Blocks by number, from 0, in a few flat arrays.
#[derive(Clone, Debug, Default)]
pub struct Blocks {
    blocks: Vec<Block>,
    instructions: Vec<Instruction>,
    accesses: Vec<StaticAccess>,
    register_writes: Vec<RegisterWrite>,
    bytes: Vec<u8>,
}

/// What [`Blocks`] keeps of a block: places in its arrays.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block {
    pub(crate) linear: u64,
    physical: u64,
    next_page: Option<u64>,
    mode: Mode,
    pub(crate) end: BlockEnd,
    /// Some instruction is repeated, so that only a run knows the number of its accesses.
    pub(crate) varies: bool,
    first_instruction: u32,
    pub(crate) instruction_count: u32,
    first_access: u32,
    /// Accesses of one run, if `varies` is not set.
    pub(crate) access_count: u32,
}

#[derive(Clone, Copy, Debug)]
struct Instruction {
    first_byte: u32,
    first_access: u32,
    first_write: u32,
    offset: u16,
    length: u8,
    access_count: u8,
    write_count: u8,
    repeated: bool,
}

impl Blocks {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Forgets all of them; numbers start at 0 again.
    pub fn clear(&mut self) {
        self.blocks.clear();
        self.instructions.clear();
        self.accesses.clear();
        self.register_writes.clear();
        self.bytes.clear();
    }

    /// The block of this number.
    #[inline]
    pub fn get(&self, id: u32) -> Option<BlockRef<'_>> {
        self.blocks.get(id as usize).map(|block| BlockRef { blocks: self, block })
    }

    /// Instructions, then accesses and register writes, of all blocks together.
    pub(crate) fn sizes(&self) -> (usize, usize) {
        (self.instructions.len(), self.accesses.len() + self.register_writes.len())
    }

    /// Adds a block and gives its number.
    ///
    /// # Errors
    /// If the definition is none that a CPU could run, or is larger than a trace stores.
    pub fn define(&mut self, definition: &BlockDefinition) -> Result<u32, TraceError> {
        definition.check()?;
        let position = |length: usize| u32::try_from(length).map_err(|_| TraceError::TooManyBlocks);
        let id = position(self.blocks.len())?;
        position(self.bytes.len() + MAX_BLOCK_INSTRUCTIONS * MAX_INSTRUCTION_BYTES)?;
        position(self.accesses.len() + MAX_BLOCK_ACCESSES)?;
        position(self.register_writes.len() + MAX_BLOCK_ACCESSES)?;
        let block = Block {
            linear: definition.linear,
            physical: definition.physical,
            next_page: definition.next_page,
            mode: definition.mode,
            end: definition.end,
            varies: definition.instructions.iter().any(|one| one.repeated),
            first_instruction: position(self.instructions.len())?,
            instruction_count: position(definition.instructions.len())?,
            first_access: position(self.accesses.len())?,
            access_count: position(definition.access_count())?,
        };
        let mut offset = 0;
        for one in &definition.instructions {
            self.instructions.push(Instruction {
                first_byte: position(self.bytes.len())?,
                first_access: position(self.accesses.len())?,
                first_write: position(self.register_writes.len())?,
                offset,
                // `check` has seen that these fit.
                length: one.bytes.len() as u8,
                access_count: one.accesses.len() as u8,
                write_count: one.register_writes.len() as u8,
                repeated: one.repeated,
            });
            offset += one.bytes.len() as u16;
            self.bytes.extend_from_slice(&one.bytes);
            self.accesses.extend_from_slice(&one.accesses);
            self.register_writes.extend_from_slice(&one.register_writes);
        }
        self.blocks.push(block);
        Ok(id)
    }
}

impl BlockDefinition {
    fn access_count(&self) -> usize {
        self.instructions.iter().map(|one| one.accesses.len()).sum()
    }

    fn write_count(&self) -> usize {
        self.instructions.iter().map(|one| one.register_writes.len()).sum()
    }

    /// Says what of the definition no CPU could run, or no trace stores.
    fn check(&self) -> Result<(), TraceError> {
        let bytes: usize = self.instructions.iter().map(|one| one.bytes.len()).sum();
        let fault = if !(1..=MAX_BLOCK_INSTRUCTIONS).contains(&self.instructions.len()) {
            "a block has no instructions, or more than a page of them"
        } else if self.access_count() + self.write_count() > MAX_BLOCK_ACCESSES {
            "a block has more accesses and register writes than a trace stores"
        } else if self.mode.cpl > 3 {
            "a block's privilege level is none"
        } else if !(self.linear ^ self.physical).is_multiple_of(PAGE_BYTES) {
            "a block's physical address is at another place in its page than the linear one"
        } else if self.next_page.is_some_and(|page| page % PAGE_BYTES != 0) {
            "a block's next page is no page"
        } else if self.next_page.is_some() != self.crosses_page(bytes) {
            "a block that reaches into a second page names that page, and no other does"
        } else {
            return self.instructions.iter().try_for_each(InstructionDefinition::check);
        };
        Err(TraceError::Definition(fault))
    }

    fn crosses_page(&self, bytes: usize) -> bool {
        self.linear % PAGE_BYTES + bytes as u64 > PAGE_BYTES
    }
}

impl InstructionDefinition {
    fn check(&self) -> Result<(), TraceError> {
        let sound = |access: &StaticAccess| {
            (1..=MAX_ACCESS_BYTES).contains(&access.size_bytes) && access.base <= NO_BASE
        };
        let fault = if !(1..=MAX_INSTRUCTION_BYTES).contains(&self.bytes.len()) {
            "an instruction has from 1 to 15 bytes"
        } else if self.accesses.len() > MAX_STATIC_ACCESSES {
            "an instruction has more accesses than a trace stores"
        } else if !self.accesses.iter().all(sound) {
            "an access has no size, too large a size, or a base register that is none"
        } else if self.register_writes.len() > MAX_REGISTER_WRITES
            || self
                .register_writes
                .iter()
                .any(|write| usize::from(write.words) > MAX_REGISTER_WRITES)
        {
            "an instruction writes more registers than a trace stores"
        } else {
            return Ok(());
        };
        Err(TraceError::Definition(fault))
    }
}

/// A block, for looking at.
#[derive(Clone, Copy, Debug)]
pub struct BlockRef<'a> {
    blocks: &'a Blocks,
    block: &'a Block,
}

impl<'a> BlockRef<'a> {
    /// Linear address of its first byte.
    #[inline]
    pub fn linear(&self) -> u64 {
        self.block.linear
    }

    /// Guest-physical address of its first byte.
    #[inline]
    pub fn physical(&self) -> u64 {
        self.block.physical
    }

    /// Guest-physical address of the page that its bytes reach into behind the first.
    pub fn next_page(&self) -> Option<u64> {
        self.block.next_page
    }

    /// Guest-physical address of the byte at this offset from the first.
    pub fn physical_at(&self, offset: usize) -> u64 {
        let address = self.block.physical + offset as u64;
        match self.block.next_page {
            Some(page) if address / PAGE_BYTES != self.block.physical / PAGE_BYTES => {
                page + address % PAGE_BYTES
            }
            _ => address,
        }
    }

    /// How the CPU runs it.
    #[inline]
    pub fn mode(&self) -> Mode {
        self.block.mode
    }

    /// How it ends, as far as its producer said.
    pub fn end(&self) -> BlockEnd {
        self.block.end
    }

    /// How many instructions it has: at least one.
    #[inline]
    pub fn instruction_count(&self) -> usize {
        self.block.instruction_count as usize
    }

    /// All accesses of its instructions, each once, in order.
    #[inline]
    pub fn static_accesses(&self) -> &'a [StaticAccess] {
        let first = self.block.first_access as usize;
        &self.blocks.accesses[first..first + self.block.access_count as usize]
    }

    /// The instruction of this number.
    #[inline]
    pub fn instruction(&self, index: usize) -> Option<InstructionRef<'a>> {
        self.raw_instructions().get(index).map(|instruction| self.show(instruction))
    }

    /// Its instructions.
    pub fn instructions(&self) -> impl ExactSizeIterator<Item = InstructionRef<'a>> + use<'a> {
        let block = *self;
        self.raw_instructions().iter().map(move |instruction| block.show(instruction))
    }

    /// All of its bytes.
    #[inline]
    pub fn bytes(&self) -> &'a [u8] {
        match self.raw_instructions() {
            [first, .., last] => {
                let end = last.first_byte as usize + usize::from(last.length);
                &self.blocks.bytes[first.first_byte as usize..end]
            }
            [only] => self.show(only).bytes(),
            [] => &[],
        }
    }

    /// The definition that would make this block.
    pub fn to_definition(&self) -> BlockDefinition {
        BlockDefinition {
            linear: self.linear(),
            physical: self.physical(),
            next_page: self.next_page(),
            mode: self.mode(),
            end: self.end(),
            instructions: self.instructions().map(|one| one.to_definition()).collect(),
        }
    }

    #[inline(always)]
    pub(super) fn raw(&self) -> &'a Block {
        self.block
    }

    fn raw_instructions(&self) -> &'a [Instruction] {
        let first = self.block.first_instruction as usize;
        &self.blocks.instructions[first..first + self.block.instruction_count as usize]
    }

    fn show(&self, instruction: &'a Instruction) -> InstructionRef<'a> {
        InstructionRef { blocks: self.blocks, linear: self.block.linear, instruction }
    }
}

/// An instruction of a block, for looking at.
#[derive(Clone, Copy, Debug)]
pub struct InstructionRef<'a> {
    blocks: &'a Blocks,
    linear: u64,
    instruction: &'a Instruction,
}

impl<'a> InstructionRef<'a> {
    /// Linear address of its first byte.
    #[inline]
    pub fn linear(&self) -> u64 {
        self.linear.wrapping_add(u64::from(self.instruction.offset))
    }

    /// Bytes from the block's first one.
    #[inline]
    pub fn offset(&self) -> usize {
        usize::from(self.instruction.offset)
    }

    /// Its encoding.
    #[inline]
    pub fn bytes(&self) -> &'a [u8] {
        let first = self.instruction.first_byte as usize;
        &self.blocks.bytes[first..first + usize::from(self.instruction.length)]
    }

    /// Linear address of the byte behind it.
    #[inline]
    pub fn next_linear(&self) -> u64 {
        self.linear().wrapping_add(u64::from(self.instruction.length))
    }

    /// The accesses that it makes, in order.
    #[inline]
    pub fn accesses(&self) -> &'a [StaticAccess] {
        let first = self.instruction.first_access as usize;
        &self.blocks.accesses[first..first + usize::from(self.instruction.access_count)]
    }

    /// A run says how often the accesses are made.
    #[inline]
    pub fn is_repeated(&self) -> bool {
        self.instruction.repeated
    }

    /// The registers that it writes.
    pub fn register_writes(&self) -> &'a [RegisterWrite] {
        let first = self.instruction.first_write as usize;
        &self.blocks.register_writes[first..first + usize::from(self.instruction.write_count)]
    }

    fn to_definition(self) -> InstructionDefinition {
        InstructionDefinition {
            bytes: self.bytes().to_vec(),
            accesses: self.accesses().to_vec(),
            repeated: self.is_repeated(),
            register_writes: self.register_writes().to_vec(),
        }
    }
}
