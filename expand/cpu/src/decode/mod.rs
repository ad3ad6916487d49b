//! From guest bytes to blocks of pre-decoded operations.

pub(crate) mod block_cache;
pub(crate) mod op;

use std::ptr::NonNull;

use iced_x86::{Decoder, DecoderOptions, Instruction};

use crate::cpu::{Cpu, NO_SEGMENT};
use crate::fault::{Fault, Stop, vector};
use crate::memory::physical::PAGE_BYTES;
use crate::memory::walk::canonical;
use crate::mode::Mode;
use crate::ops::{self, BlockEnd};
use crate::system;
use block_cache::Block;
use op::Op;

/// Instructions of a block, at most.
const MAX_BLOCK_OPS: usize = 64;
/// An instruction's bytes, at most.
const MAX_INSTRUCTION_BYTES: usize = 15;
/// Encodings that the CPU model decodes as its time did: no LZCNT, TZCNT or WBNOINVD.
pub(crate) const OPTIONS: u32 =
    DecoderOptions::NO_MPFX_0FBC | DecoderOptions::NO_MPFX_0FBD | DecoderOptions::NO_WBNOINVD;

impl Cpu {
    /// The block at the current RIP, decoded if need be. It lives until the block cache next drops
    /// blocks, or another transient block comes: never while it runs.
    #[inline(always)]
    pub(crate) fn current_block(&mut self) -> Result<NonNull<Block>, Stop> {
        let linear = self.code_address();
        match self.blocks.by_address(linear, self.mode) {
            Some(block) => Ok(block),
            None => self.find_block(linear),
        }
    }

    /// The linear address of the current RIP.
    #[inline(always)]
    fn code_address(&self) -> u64 {
        let base = self.registers.segment_base[reprise_trace::cpu_state::CS];
        self.wrap(base.wrapping_add(self.rip))
    }

    #[cold]
    #[inline(never)]
    fn find_block(&mut self, linear: u64) -> Result<NonNull<Block>, Stop> {
        if !canonical(linear) {
            return self.fault(Fault::GP0);
        }
        if self.rip > u64::from(self.system.segments[reprise_trace::cpu_state::CS].limit)
            && !self.mode_64()
        {
            return self.fault(Fault::GP0);
        }
        let address = match self.memory.fetch_address(linear) {
            Ok(address) => address,
            Err(fault) => return self.fault(fault),
        };
        let mode = Mode(self.mode.0 & !Mode::USER);
        if let Some(block) = self.blocks.by_physical(address, mode) {
            self.blocks.remember_address(linear, self.mode, block);
            return Ok(block);
        }
        if self.blocks.is_full() {
            for page in self.blocks.clear() {
                self.memory.physical.set_code(page, 0);
            }
        }
        let block = Box::new(self.decode_block(linear, address)?);
        if block.transient {
            return Ok(self.blocks.keep_transient(block));
        }
        self.memory.mark_code(address, u64::from(block.size_bytes));
        let block = self.blocks.insert(address, mode, block);
        self.blocks.remember_address(linear, self.mode, block);
        Ok(block)
    }

    fn decode_block(&mut self, linear: u64, address: u64) -> Result<Block, Stop> {
        let in_page = (PAGE_BYTES - address % PAGE_BYTES) as usize;
        let mut bytes = [0; PAGE_BYTES as usize + MAX_INSTRUCTION_BYTES];
        if !self.memory.physical.read(address, &mut bytes[..in_page]) {
            // Code from device space: nothing answers there, and all ones is no instruction.
            bytes[..in_page].fill(0xff);
        }
        let mut block = self.decode_bytes(&bytes[..in_page]);
        if block.ops.is_empty() {
            // The first instruction straddles the page's end: its rest comes from the next page.
            let next = self.wrap(linear.wrapping_add(in_page as u64));
            let rest = match self.memory.fetch_address(next) {
                Ok(address) => address,
                Err(fault) => return self.fault(fault),
            };
            let tail = &mut bytes[in_page..in_page + MAX_INSTRUCTION_BYTES];
            if !self.memory.physical.read(rest, tail) {
                tail.fill(0xff);
            }
            block = self.decode_bytes(&bytes[..in_page + MAX_INSTRUCTION_BYTES]);
            block.ops = std::mem::take(&mut block.ops).into_vec().into_iter().take(1).collect();
            block.transient = true;
            if block.ops.is_empty() {
                return self.fault(Fault::with_code(vector::GP, 0)); // More than 15 bytes.
            }
            let ends = block.ends_in_branch;
            block.ends_in_branch = ends && block.size_bytes == u16::from(block.ops[0].length);
            block.size_bytes = u16::from(block.ops[0].length);
        }
        Ok(block)
    }

    /// Decodes up to the block's end or the last whole instruction in `bytes`.
    fn decode_bytes(&mut self, bytes: &[u8]) -> Block {
        let mut decoder = Decoder::with_ip(self.mode.code_bits(), bytes, 0, OPTIONS);
        let mut ops = Vec::new();
        let mut size_bytes = 0;
        let mut ends_in_branch = false;
        while ops.len() < MAX_BLOCK_OPS && decoder.can_decode() {
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
        Block {
            ops: ops.into_boxed_slice(),
            size_bytes: size_bytes as u16,
            ends_in_branch,
            transient: false,
        }
    }

    fn decode_op(
        &mut self,
        instruction: Instruction,
        offset: usize,
        number: usize,
    ) -> (Op, BlockEnd) {
        let mut op = Op::new(instruction, offset, number);
        op.set_memory_operand(&instruction, self.address_bits(&instruction));
        let end = ops::select(self, &mut op);
        if self.mode.has(Mode::SEGMENTED) && op.segment != NO_SEGMENT {
            op.inner = op.handler;
            op.handler = system::segment::checked;
        }
        (op, end)
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
