//! From guest bytes to blocks of pre-decoded operations.

pub(crate) mod block_cache;
pub(crate) mod op;

use std::ptr::NonNull;

use iced_x86::{Decoder, DecoderOptions, Instruction};

use reprise_trace::cpu_state::CS;

use crate::cpu::{Cpu, NO_SEGMENT};
use crate::fault::{Fault, Stop};
use crate::memory::physical::PAGE_BYTES;
use crate::memory::walk::canonical;
use crate::ops::{self, BlockEnd};
use crate::system;
use block_cache::Block;
use op::Op;

/// Instructions of a block, at most.
const MAX_BLOCK_OPS: usize = 64;
/// An instruction's bytes, at most.
const MAX_INSTRUCTION_BYTES: usize = 15;
/// Bytes of a block, at most: what is fetched at once.
const MAX_BLOCK_BYTES: usize = MAX_BLOCK_OPS * MAX_INSTRUCTION_BYTES;
/// Encodings that the CPU model decodes as its time did: no LZCNT, TZCNT or WBNOINVD.
pub(crate) const OPTIONS: u32 =
    DecoderOptions::NO_MPFX_0FBC | DecoderOptions::NO_MPFX_0FBD | DecoderOptions::NO_WBNOINVD;

impl Cpu {
    /// The linear address of the current RIP.
    #[inline(always)]
    pub(crate) fn code_address(&self) -> u64 {
        let base = self.registers.segment_base[CS];
        self.wrap(base.wrapping_add(self.rip))
    }

    /// The block at `linear`, the current RIP's address, decoded if need be. It lives until the block
    /// cache next drops blocks: while it runs, and while the cache's epoch stays.
    #[inline]
    pub(crate) fn current_block(&mut self, linear: u64) -> Result<NonNull<Block>, Stop> {
        match self.blocks.by_address(linear, self.mode) {
            Some(block) => Ok(block),
            None => self.find_block(linear),
        }
    }

    #[cold]
    #[inline(never)]
    fn find_block(&mut self, linear: u64) -> Result<NonNull<Block>, Stop> {
        self.count(|profile| profile.blocks_searched += 1);
        let limit = u64::from(self.system.segments[CS].limit);
        if !canonical(linear) || self.rip > limit && !self.mode_64() {
            return self.fault(Fault::GP0);
        }
        let address = self.fetch_page(linear)?;
        let mode = self.mode.of_decoding();
        if let Some(block) = self.blocks.by_physical(address, mode) {
            let second = self.blocks.second_page(address, mode);
            if second.is_none() || second == Some(self.fetch_page(next_page(linear))?) {
                self.blocks.remember_address(linear, self.mode, block);
                return Ok(block);
            }
        }
        if self.blocks.is_full() {
            self.forget_code();
        }
        let block = Box::new(self.decode_block(linear, address)?);
        self.note_latitude(&block, linear);
        if !self.memory.physical.is_ram(address) {
            return Ok(self.blocks.keep_transient(block));
        }
        let in_page = PAGE_BYTES - address % PAGE_BYTES;
        let size_bytes = u64::from(block.size_bytes);
        self.memory.mark_code(address, size_bytes.min(in_page));
        if let Some(second) = block.second_page {
            if !self.memory.physical.is_ram(second) {
                return Ok(self.blocks.keep_transient(block));
            }
            self.memory.mark_code(second, size_bytes - in_page);
        }
        let block = self.blocks.insert(address, mode, block);
        self.blocks.remember_address(linear, self.mode, block);
        Ok(block)
    }

    /// Drops every block and every translation.
    pub(crate) fn forget_code(&mut self) {
        for page in self.blocks.clear() {
            self.memory.physical.set_code(page, 0);
        }
        if let Some(translator) = &mut self.translator {
            translator.clear();
        }
    }

    /// The guest-physical address of the code byte at `linear`.
    fn fetch_page(&mut self, linear: u64) -> Result<u64, Stop> {
        match self.memory.fetch_address(self.wrap(linear)) {
            Ok(address) => Ok(address),
            Err(fault) => self.fault(fault),
        }
    }

    fn decode_block(&mut self, linear: u64, address: u64) -> Result<Block, Stop> {
        let in_page = (PAGE_BYTES - address % PAGE_BYTES) as usize;
        let mut bytes = [0xff; MAX_BLOCK_BYTES];
        let first = in_page.min(MAX_BLOCK_BYTES);
        // Where there is no RAM nothing answers, and all ones is no instruction.
        self.memory.physical.read(address, &mut bytes[..first]);
        let block = self.decode_bytes(&bytes[..first], MAX_BLOCK_OPS);
        if !block.ops.is_empty() {
            return Ok(block);
        }
        // The first instruction straddles the page's end: its rest comes from the next page.
        let second = self.fetch_page(next_page(linear))?;
        let whole = in_page + MAX_INSTRUCTION_BYTES;
        self.memory.physical.read(second, &mut bytes[in_page..whole]);
        let mut block = self.decode_bytes(&bytes[..whole], 1);
        if block.ops.is_empty() {
            return self.fault(Fault::GP0); // More than 15 bytes.
        }
        block.second_page = Some(second);
        Ok(block)
    }

    /// Decodes up to the block's end, `max_ops` or the last whole instruction in `bytes`.
    fn decode_bytes(&mut self, bytes: &[u8], max_ops: usize) -> Block {
        let mut decoder = Decoder::with_ip(self.mode.code_bits(), bytes, 0, OPTIONS);
        let mut ops = Vec::new();
        let mut size_bytes = 0;
        let mut ends_in_branch = false;
        while ops.len() < max_ops && decoder.can_decode() {
            let instruction = decoder.decode();
            if decoder.last_error() == iced_x86::DecoderError::NoMoreBytes {
                break;
            }
            let (op, end) = self.decode_op(instruction, size_bytes, ops.len());
            size_bytes += instruction.len();
            ops.push(op);
            if end != BlockEnd::Continue {
                ends_in_branch = end == BlockEnd::Branch;
                break;
            }
        }
        Block::new(ops, size_bytes as u16, ends_in_branch)
    }

    fn decode_op(
        &mut self,
        instruction: Instruction,
        offset: usize,
        number: usize,
    ) -> (Op, BlockEnd) {
        let instruction = self.without_ignored_segment(instruction);
        let mut op = Op::new(instruction, offset, number);
        op.set_memory_operand(&instruction, self.address_bits(&instruction));
        let end = ops::select(self, &mut op);
        if op.segment != NO_SEGMENT && self.mode.checks(op.segment) {
            op.instruction.inner = op.handler;
            op.handler = system::segment::checked;
        }
        (op, end)
    }

    /// In 64-bit mode prefixes for ES, CS, SS and DS mean nothing, not even for whether a bad
    /// address is #SS or #GP.
    fn without_ignored_segment(&self, mut instruction: Instruction) -> Instruction {
        use iced_x86::Register::{CS, DS, ES, None, SS};
        if self.mode_64() && matches!(instruction.segment_prefix(), ES | CS | SS | DS) {
            instruction.set_segment_prefix(None);
        }
        instruction
    }

    /// Bits of an instruction's memory-operand addresses.
    fn address_bits(&self, instruction: &Instruction) -> u32 {
        use iced_x86::Register;
        let sized = |register: Register| match register.size() {
            _ if register == Register::None => None,
            _ if register == Register::EIP => Some(32),
            _ if register == Register::RIP => Some(64),
            size => Some(size as u32 * 8),
        };
        sized(instruction.memory_base())
            .or_else(|| sized(instruction.memory_index()))
            .or(match instruction.memory_displ_size() {
                0 => None,
                // Without registers a 64-bit address has a sign-extended 32-bit displacement; the
                // decoder has extended it as the address size asks.
                2 => Some(16),
                4 if self.mode.code_bits() != 64 => Some(32),
                _ => Some(64),
            })
            .unwrap_or(self.mode.code_bits())
    }
}

/// The first address of the page after `linear`'s.
fn next_page(linear: u64) -> u64 {
    (linear & !(PAGE_BYTES - 1)).wrapping_add(PAGE_BYTES)
}
