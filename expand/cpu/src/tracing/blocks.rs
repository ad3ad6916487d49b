//! Blocks as a trace describes them, and their numbers.

use std::cell::Cell;
use std::collections::HashMap;

use iced_x86::FlowControl;
use reprise_trace::instructions::{
    BlockDefinition, BlockEnd, CodeWidth, Definition, InstructionDefinition, Mode as TraceMode,
};

use super::accesses::{self, OpAccesses};
use super::registers::OpRegisters;
use crate::cpu::Cpu;
use crate::decode::block_cache::Block;
use crate::decode::op::Op;
use crate::integer_hash::IntegerHash;
use crate::memory::physical::PAGE_BYTES;
use crate::mode::Mode;

/// What a trace knows of a block's operations.
#[derive(Debug)]
pub(crate) struct BlockTrace {
    operations: Box<[OpAccesses]>,
    /// Its code: a block that overwrites itself is still what it was until it ends.
    bytes: Box<[u8]>,
}

/// The number of a block at one linear address and privilege level.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TraceId {
    linear: u64,
    cpl: u8,
    /// The [`Cpu::trace_generation`] in which it was given; 0 for none.
    generation: u32,
    id: u32,
}

impl Block {
    /// What the operation accesses. A run of the block has begun.
    #[inline(always)]
    pub(crate) fn trace_of(&self, op: &Op) -> &OpAccesses {
        let trace = self.trace.get().expect("a block is described before it runs");
        &trace.operations[usize::from(op.number)]
    }
}

/// Numbers of blocks, given in the order in which they are met. The same code at the same place has the
/// same number however often it was decoded, so that numbers are a function of the execution alone.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    /// By a hash of the definition: those that have it.
    known: HashMap<u64, Vec<(u32, BlockDefinition)>, IntegerHash>,
    /// By number, the hash.
    places: Vec<u64>,
}

impl Numbers {
    pub(super) fn count(&self) -> usize {
        self.places.len()
    }

    pub(super) fn restart(&mut self) {
        self.known.clear();
        self.places.clear();
    }

    /// The number of a definition, and whether it is new.
    pub(super) fn of(&mut self, definition: &BlockDefinition) -> (u32, bool) {
        let place = definition.linear ^ definition.physical.rotate_left(20);
        let same_place = self.known.entry(place).or_default();
        if let Some((id, _)) = same_place.iter().find(|(_, other)| other == definition) {
            return (*id, false);
        }
        let id = self.places.len() as u32;
        self.places.push(place);
        same_place.push((id, definition.clone()));
        (id, true)
    }

    /// The definition that has a number.
    pub(super) fn definition(&self, id: u32) -> Option<&BlockDefinition> {
        let same_place = self.known.get(self.places.get(id as usize)?)?;
        same_place.iter().find(|(other, _)| *other == id).map(|(_, definition)| definition)
    }
}

impl Cpu {
    /// The number of `block` at `linear`, which the trace has from now on.
    pub(crate) fn trace_id(&mut self, block: &Block, linear: u64) -> u32 {
        let generation = self.trace_generation;
        let held = block.trace_ids.iter().map(Cell::get).find(|held| {
            held.linear == linear && held.cpl == self.cpl && held.generation == generation
        });
        match held {
            Some(held) => held.id,
            None => self.number_block(block, linear, generation),
        }
    }

    #[cold]
    fn number_block(&mut self, block: &Block, linear: u64, generation: u32) -> u32 {
        if block.trace.get().is_none() {
            let physical = self.code_physical(block, linear);
            let bytes = self.code_bytes(block, physical);
            let (mode, tracer) = (self.mode, self.tracer.as_mut().expect("somebody traces"));
            let operations = block.ops.iter().map(|op| {
                let mut operation = accesses::of(op, mode, &mut tracer.info);
                if tracer.contents.registers {
                    let is_last = usize::from(op.number) + 1 == block.ops.len();
                    let branches = is_last && block.ends_in_branch;
                    operation.registers =
                        OpRegisters::of(&op.instruction, branches, &mut tracer.info);
                }
                operation
            });
            let trace = BlockTrace { operations: operations.collect(), bytes };
            block.trace.set(Box::new(trace)).expect("it was not set");
        }
        let id = self.define(block, linear, 0);
        block.trace_ids[1].set(block.trace_ids[0].get());
        block.trace_ids[0].set(TraceId { linear, cpl: self.cpl, generation, id });
        id
    }

    /// The number of the part of `block`, which lies at `linear`, from operation `first` on.
    pub(super) fn trace_rest(&mut self, block: &Block, linear: u64, first: usize) -> u32 {
        self.define(block, linear, first)
    }

    fn define(&mut self, block: &Block, linear: u64, first: usize) -> u32 {
        let definition = self.definition(block, linear, first);
        let tracer = self.tracer.as_mut().expect("somebody traces");
        let (id, is_new) = tracer.numbers.of(&definition);
        if is_new {
            tracer.batch.definitions.push(Definition { id, block: definition });
        }
        id
    }

    /// The guest-physical address of a block's first byte.
    fn code_physical(&mut self, block: &Block, linear: u64) -> u64 {
        block.physical.unwrap_or_else(|| {
            // Decoded from where there is no RAM, just now: the translation is known.
            self.memory.fetch_address(self.wrap(linear)).unwrap_or(linear % PAGE_BYTES)
        })
    }

    /// The part of a block from operation `first` on, as it runs now.
    pub(super) fn definition(
        &mut self,
        block: &Block,
        linear: u64,
        first: usize,
    ) -> BlockDefinition {
        let physical = self.code_physical(block, linear);
        let trace = block.trace.get().expect("a block is described before it is numbered");
        let instructions = block.ops[first..].iter().map(|op| {
            let start = usize::from(op.offset);
            let accesses = &trace.operations[usize::from(op.number)];
            InstructionDefinition {
                bytes: trace.bytes[start..start + usize::from(op.length)].to_vec(),
                accesses: accesses.list.iter().map(|planned| planned.access).collect(),
                repeated: accesses.repeated,
                register_writes: accesses.registers.writes(),
            }
        });
        let offset = u64::from(block.ops[first].offset);
        BlockDefinition {
            linear: linear.wrapping_add(offset),
            physical: physical + offset,
            next_page: block.second_page,
            mode: TraceMode { cpl: self.cpl, width: width(self.mode) },
            end: end(block),
            instructions: instructions.collect(),
        }
    }

    /// The bytes of a block that has just been decoded or is still in the cache: what was overwritten
    /// has been dropped.
    fn code_bytes(&self, block: &Block, physical: u64) -> Box<[u8]> {
        let mut bytes = vec![0xff; usize::from(block.size_bytes)];
        let in_page = (PAGE_BYTES - physical % PAGE_BYTES) as usize;
        let (first, second) = bytes.split_at_mut(in_page.min(usize::from(block.size_bytes)));
        self.memory.physical.read(physical, first);
        if let Some(page) = block.second_page {
            self.memory.physical.read(page, second);
        }
        bytes.into_boxed_slice()
    }
}

pub(super) fn width(mode: Mode) -> CodeWidth {
    match mode.code_bits() {
        64 => CodeWidth::Bits64,
        32 => CodeWidth::Bits32,
        _ => CodeWidth::Bits16,
    }
}

fn end(block: &Block) -> BlockEnd {
    match block.ops.last().map(|op| op.instruction.flow_control()) {
        Some(FlowControl::Call | FlowControl::IndirectCall) => BlockEnd::Call,
        Some(FlowControl::Return) => BlockEnd::Return,
        _ => BlockEnd::Other,
    }
}
