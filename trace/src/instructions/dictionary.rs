//! Block definitions inside a segment: how they are stored and read back.

use super::block::{
    AccessKind, BlockDefinition, BlockEnd, BlockRef, InstructionDefinition, Mode, PAGE_BYTES,
    RegisterWrite, StaticAccess,
};
use super::columns::{Column, Columns};
use crate::varint::{TakeError, Taker, put, put_difference};

/// Bit of an instruction's first byte: its accesses are repeated.
const REPEATED: u8 = 1 << 4;
/// Bit of an instruction's first byte: it makes accesses.
const ACCESSES: u8 = 1 << 5;
/// Bit of an instruction's first byte: it writes registers.
const REGISTERS: u8 = 1 << 6;
/// The bits of its length.
const LENGTH: u8 = 0x0f;
/// Bit of an access's first byte: it has hints.
const HINTS: u8 = 1 << 2;
/// Bits of an access's first byte: its kind, the lower two and the upper one.
const KIND_LOW: u8 = 3;
const KIND_HIGH: u8 = 1 << 3;
/// Bit of a block's first byte: its bytes reach into a next page.
const NEXT_PAGE: u8 = 1 << 6;

/// What the block before left behind: blocks are stored as differences to it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Previous {
    /// Linear address behind its last byte.
    linear: u64,
    /// What was to be added to its linear page to get the physical one.
    distance: u64,
}

impl Previous {
    fn after(linear: u64, physical: u64, code_bytes: usize) -> Self {
        Self {
            linear: linear.wrapping_add(code_bytes as u64),
            distance: (physical / PAGE_BYTES).wrapping_sub(linear / PAGE_BYTES),
        }
    }
}

/// Appends a block's definition.
pub(super) fn put_block(columns: &mut Columns, previous: &mut Previous, block: BlockRef<'_>) {
    let next_page = block.next_page();
    let flag = if next_page.is_some() { NEXT_PAGE } else { 0 };
    let (linear, physical) = (block.linear(), block.physical());
    let distance = (physical / PAGE_BYTES).wrapping_sub(linear / PAGE_BYTES);
    let out = columns.get(Column::Blocks);
    out.push(block.mode().to_byte() | (block.end() as u8) << 4 | flag);
    put_difference(out, previous.linear, linear);
    put_difference(out, previous.distance, distance);
    put(out, block.instruction_count() as u64);
    if let Some(page) = next_page {
        put_difference(out, physical / PAGE_BYTES, page / PAGE_BYTES);
    }
    *previous = Previous::after(linear, physical, block.bytes().len());
    columns.get(Column::Code).extend_from_slice(block.bytes());
    for instruction in block.instructions() {
        let (accesses, writes) = (instruction.accesses(), instruction.register_writes());
        let flag = |set: bool, bit: u8| if set { bit } else { 0 };
        let out = columns.get(Column::Instructions);
        out.push(
            instruction.bytes().len() as u8
                | flag(instruction.is_repeated(), REPEATED)
                | flag(!accesses.is_empty(), ACCESSES)
                | flag(!writes.is_empty(), REGISTERS),
        );
        if !accesses.is_empty() {
            out.push(accesses.len() as u8);
        }
        if !writes.is_empty() {
            out.push(writes.len() as u8);
        }
        accesses.iter().for_each(|access| put_access(columns.get(Column::StaticAccesses), access));
        let out = columns.get(Column::RegisterWrites);
        writes.iter().for_each(|write| out.extend([write.register, write.words]));
    }
}

fn put_access(out: &mut Vec<u8>, access: &StaticAccess) {
    let plain = StaticAccess::plain(access.kind, access.size_bytes);
    let hints = *access != plain;
    let kind = access.kind as u8;
    let (low, high) = (kind & KIND_LOW, if kind > KIND_LOW { KIND_HIGH } else { 0 });
    out.push(low | high | if hints { HINTS } else { 0 });
    put(out, u64::from(access.size_bytes));
    if hints {
        out.push(access.base);
        put_difference(out, 0, i64::from(access.displacement) as u64);
        put_difference(out, 0, i64::from(access.step) as u64);
    }
}

/// Takes the definitions of a segment one by one.
pub(super) struct DefinitionTaker<'a> {
    blocks: Taker<'a>,
    instructions: Taker<'a>,
    accesses: Taker<'a>,
    register_writes: Taker<'a>,
    code: Taker<'a>,
    previous: Previous,
}

impl<'a> DefinitionTaker<'a> {
    pub(super) fn new(column: impl Fn(Column) -> &'a [u8]) -> Self {
        let taker = |which| Taker::new(column(which));
        Self {
            blocks: taker(Column::Blocks),
            instructions: taker(Column::Instructions),
            accesses: taker(Column::StaticAccesses),
            register_writes: taker(Column::RegisterWrites),
            code: taker(Column::Code),
            previous: Previous::default(),
        }
    }

    /// Whether every byte was used.
    pub(super) fn is_at_end(&self) -> bool {
        let takers =
            [self.blocks, self.instructions, self.accesses, self.register_writes, self.code];
        takers.iter().all(|taker| taker.remaining() == 0)
    }

    /// The next block; `None` if the bytes are none. Its lengths are bounded by the columns' own, and
    /// [`super::Blocks::define`] checks the rest.
    pub(super) fn block(&mut self) -> Result<Option<BlockDefinition>, TakeError> {
        let first = self.blocks.byte()?;
        let linear = self.blocks.difference(self.previous.linear)?;
        let distance = self.blocks.difference(self.previous.distance)?;
        let physical_page = (linear / PAGE_BYTES).wrapping_add(distance);
        let physical = physical_page.wrapping_mul(PAGE_BYTES) | (linear % PAGE_BYTES);
        let count = self.blocks.varint()?;
        let next_page = if first & NEXT_PAGE != 0 {
            Some(self.blocks.difference(physical_page)?.wrapping_mul(PAGE_BYTES))
        } else {
            None
        };
        let (Some(mode), Some(end)) =
            (Mode::from_byte(first & 0x0f), BlockEnd::from_byte(first >> 4 & 3))
        else {
            return Ok(None);
        };
        if first >> 7 != 0 || count > super::block::MAX_BLOCK_INSTRUCTIONS as u64 {
            return Ok(None);
        }
        let mut instructions = Vec::with_capacity(count as usize);
        for _ in 0..count {
            let Some(instruction) = self.instruction()? else { return Ok(None) };
            instructions.push(instruction);
        }
        let code_bytes = instructions.iter().map(|one| one.bytes.len()).sum();
        self.previous = Previous::after(linear, physical, code_bytes);
        Ok(Some(BlockDefinition { linear, physical, next_page, mode, end, instructions }))
    }

    fn instruction(&mut self) -> Result<Option<InstructionDefinition>, TakeError> {
        let first = self.instructions.byte()?;
        let mut count = |bit| if first & bit != 0 { self.instructions.byte() } else { Ok(0) };
        let (access_count, write_count) = (count(ACCESSES)?, count(REGISTERS)?);
        let mut accesses = Vec::with_capacity(usize::from(access_count));
        for _ in 0..access_count {
            let Some(access) = self.access()? else { return Ok(None) };
            accesses.push(access);
        }
        let mut register_writes = Vec::with_capacity(usize::from(write_count));
        for _ in 0..write_count {
            let [register, words] = self.register_writes.array()?;
            register_writes.push(RegisterWrite { register, words });
        }
        let bytes = self.code.bytes(u64::from(first & LENGTH))?.to_vec();
        let repeated = first & REPEATED != 0;
        let sound = first >> 7 == 0;
        let instruction = InstructionDefinition { bytes, accesses, repeated, register_writes };
        Ok(sound.then_some(instruction))
    }

    fn access(&mut self) -> Result<Option<StaticAccess>, TakeError> {
        let first = self.accesses.byte()?;
        let size = self.accesses.varint()?;
        let kind = first & KIND_LOW | if first & KIND_HIGH != 0 { KIND_LOW + 1 } else { 0 };
        let (Some(kind), Ok(size_bytes)) = (AccessKind::from_byte(kind), u16::try_from(size))
        else {
            return Ok(None);
        };
        if first & !(KIND_LOW | KIND_HIGH | HINTS) != 0 {
            return Ok(None);
        }
        let mut access = StaticAccess::plain(kind, size_bytes);
        if first & HINTS != 0 {
            access.base = self.accesses.byte()?;
            let displacement = i32::try_from(self.accesses.difference(0)? as i64);
            let step = i16::try_from(self.accesses.difference(0)? as i64);
            let (Ok(displacement), Ok(step)) = (displacement, step) else { return Ok(None) };
            (access.displacement, access.step) = (displacement, step);
        }
        Ok(Some(access))
    }
}
