//! Far transfers: how much of which stack they access, only the transfer itself finds out.
//!
//! A far call, return or IRET is described as one that stays at its privilege level. One that leaves it
//! accesses more, and another stack: the transfer notes what it does, and if that is not what its
//! description says, its run is that of a block of its own, with the same code and just these accesses.

use iced_x86::OpKind;
use reprise_trace::instructions::{
    AccessKind, CUT, Definition, EVENT, Mode as TraceMode, StaticAccess,
};

use super::blocks::width;
use crate::cpu::Cpu;
use crate::decode::block_cache::Block;
use crate::decode::op::Op;
use crate::fault::{Flow, Stop};

/// An access to a stack, as it was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Made {
    kind: AccessKind,
    linear: u64,
    size_bytes: u64,
}

/// Bytes of what is read and of what is written.
fn bytes(all: impl Iterator<Item = (AccessKind, u64)>) -> (u64, u64) {
    all.fold((0, 0), |(read, written), (kind, bytes)| match kind.writes() {
        true => (read, written + bytes),
        false => (read + bytes, written),
    })
}

impl Cpu {
    /// [`Cpu::peek`] by a far transfer.
    pub(crate) fn peek_far(&mut self, above: u64, size_bytes: u64) -> Result<u64, Stop> {
        let value = self.peek(above, size_bytes)?;
        if self.tracer.is_some() {
            let linear = self.peeked_address(above, size_bytes)?;
            self.note_far(AccessKind::Read, linear, size_bytes);
        }
        Ok(value)
    }

    /// Notes that a frame of so many values was pushed, the last of them at `linear`.
    pub(crate) fn note_frame(&mut self, linear: u64, values: usize, size_bytes: u64) {
        for place in (0..values as u64).rev() {
            let at = self.wrap(linear.wrapping_add(place * size_bytes));
            self.note_far(AccessKind::Write, at, size_bytes);
        }
    }

    fn note_far(&mut self, kind: AccessKind, linear: u64, size_bytes: u64) {
        if let Some(made) = self.tracer.as_mut().and_then(|tracer| tracer.far.as_mut()) {
            made.push(Made { kind, linear, size_bytes });
        }
    }

    /// As `run_traced`, for a far transfer.
    pub(super) fn run_far(&mut self, block: &Block, op: &Op) -> Flow {
        let described = &block.trace_of(op).list;
        let linear: Vec<u64> = described.iter().map(|planned| planned.linear(self)).collect();
        let rights = self.memory.present_rights();
        let start = self.linear_rip(op.rip(self)).wrapping_sub(u64::from(op.offset));
        let mode = TraceMode { cpl: self.cpl, width: width(self.mode) };
        if let Some(tracer) = &mut self.tracer {
            tracer.far = Some(Vec::new());
        }
        let flow = self.run_handler(op);
        let made = self.tracer.as_mut().and_then(|tracer| tracer.far.take()).unwrap_or_default();
        if !flow.retires() {
            self.trace_writes_between();
            return flow;
        }
        // A far pointer in memory is no part of the stack.
        let instruction = &op.instruction;
        let reads_pointer = instruction.op_count() > 0 && instruction.op0_kind() == OpKind::Memory;
        let (operand, stack) = described.split_at(usize::from(reads_pointer));
        let sizes = stack.iter().map(|one| (one.access.kind, u64::from(one.access.size_bytes)));
        let as_described = bytes(sizes) == bytes(made.iter().map(|one| (one.kind, one.size_bytes)));
        let accesses: Vec<(StaticAccess, u64)> = if as_described {
            described.iter().zip(linear).map(|(one, linear)| (one.access, linear)).collect()
        } else {
            let accesses = operand.iter().map(|one| one.access);
            let stack = made.iter().map(|one| StaticAccess::plain(one.kind, one.size_bytes as u16));
            self.replace_run(block, op, (start, mode), accesses.chain(stack.clone()).collect());
            let operand = operand.iter().zip(linear).map(|(one, at)| (one.access, at));
            operand.chain(stack.zip(made.iter().map(|one| one.linear))).collect()
        };
        self.note_far_accesses(&accesses, rights);
        flow
    }

    fn note_far_accesses(&mut self, accesses: &[(StaticAccess, u64)], rights: usize) {
        let Some(tracer) = &mut self.tracer else { return };
        let first = tracer.batch.addresses.len();
        tracer.batch.addresses.extend(accesses.iter().map(|(_, linear)| linear));
        let has_physical = tracer.contents.physical;
        let kinds: Vec<StaticAccess> = accesses.iter().map(|(access, _)| *access).collect();
        if self.note_values(&kinds, first, rights) || !has_physical {
            return;
        }
        let Some(tracer) = &mut self.tracer else { return };
        for (access, linear) in accesses {
            let place = self.memory.seen_address(rights, access.kind.writes(), *linear);
            tracer.batch.physical.push(place);
        }
    }

    /// The block's last operation has a run of its own, with these accesses. The block lies at a linear
    /// address and ran in a mode.
    fn replace_run(
        &mut self,
        block: &Block,
        op: &Op,
        (linear, mode): (u64, TraceMode),
        accesses: Vec<StaticAccess>,
    ) {
        let number = usize::from(op.number);
        let mut definition = self.definition(block, linear, number);
        definition.mode = mode;
        definition.instructions[0].accesses = accesses;
        let Some(tracer) = &mut self.tracer else { return };
        let (id, is_new) = tracer.numbers.of(&definition);
        if is_new {
            tracer.batch.definitions.push(Definition { id, block: definition });
        }
        let words = &mut tracer.batch.words;
        let run = words.iter().rposition(|word| *word != EVENT).expect("a run has begun");
        // What happened in the run stands behind it.
        let events = words.split_off(run + 1);
        // It ends its block, so nothing asks any more where the run began.
        match number - std::mem::take(&mut tracer.run_start) {
            0 => drop(words.pop()),
            before => words.extend([CUT | before as u32, 0]),
        }
        words.push(id);
        words.extend(events);
    }
}
