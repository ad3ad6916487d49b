//! Instructions with a REP prefix: how often they made their accesses shows afterwards, and a long one takes
//! several runs.

use std::ops::Range;

use reprise_trace::cpu_state::RCX;
use reprise_trace::instructions::Batch;

use super::accesses::{self, Repeated};
use super::values::Elements;
use super::{LONG_REPETITION, MAX_PIECE, Tracer};
use crate::cpu::Cpu;
use crate::decode::block_cache::Block;
use crate::decode::op::Op;
use crate::fault::Flow;
use crate::memory::Memory;
use crate::memory::physical::PAGE_BYTES;

impl Cpu {
    /// Runs and notes an instruction that repeats its accesses: the counter tells how often it has.
    pub(super) fn run_repeated(&mut self, block: &Block, op: &Op) -> Flow {
        let mut pieces = 0;
        let (made, flow) = loop {
            let (made, flow, goes_on) = self.run_piece(block, op);
            if !goes_on {
                break (made, flow);
            }
            self.trace_piece(block, op, &made);
            pieces += 1;
        };
        let long = pieces > 0 || made.count() > LONG_REPETITION;
        if made.count() > LONG_REPETITION {
            self.trace_long_repetition(block, op, &made, flow.retires());
        } else if let Some(tracer) = &mut self.tracer {
            made.append(0..made.done, tracer, &self.memory);
            if flow.retires() {
                tracer.batch.counts.push(made.done as u32);
            } else {
                tracer.unretired = made.count() as u32;
            }
        }
        // The run ends here, so that its accesses have a bound.
        if long && flow == Flow::NEXT { Flow::END_BLOCK } else { flow }
    }

    /// Runs a repeated instruction, or a piece of it: what it accesses has a bound where values are kept.
    /// Gives whether it goes on.
    fn run_piece(&mut self, block: &Block, op: &Op) -> (Repetition, Flow, bool) {
        let accesses = block.trace_of(op);
        let all = accesses::counter(self, accesses);
        let whole_counter = self.registers.gpr[RCX];
        let left = self.elements_beyond_piece(op, accesses, all);
        let before = all - left;
        if left > 0 {
            accesses::set_counter(self, accesses, before);
        }
        let starts: Vec<Repeated> =
            accesses.list.iter().map(|planned| Repeated::new(self, planned)).collect();
        let rights = self.memory.present_rights();
        let flow = self.run_handler(op);
        let after = accesses::counter(self, accesses);
        if left > 0 && after == before {
            // A fault at once changes nothing, not even beyond the address size.
            self.registers.gpr[RCX] = whole_counter;
        } else if left > 0 {
            accesses::set_counter(self, accesses, after + left);
        }
        let done = before.wrapping_sub(after) as usize;
        let elements = self.elements(&starts, done);
        let goes_on = left > 0 && after == 0 && flow.retires() && self.repeats_on(op);
        (Repetition { starts, rights, done, elements }, flow, goes_on)
    }

    /// Sees to it that the last run is of the block's part that begins with the repetition. Gives that
    /// part's number.
    fn begin_repetition(&mut self, block: &Block, op: &Op) -> u32 {
        let number = usize::from(op.number);
        let linear = self.linear_rip(op.rip(self)).wrapping_sub(u64::from(op.offset));
        let rest = self.trace_rest(block, linear, number);
        let tracer = self.tracer.as_mut().expect("somebody traces");
        if number > tracer.run_start {
            let cut = tracer.batch.cut_last_run((number - tracer.run_start) as u32, 0);
            assert!(cut, "a run has begun");
            tracer.batch.words.push(rest);
            tracer.run_start = number;
        }
        rest
    }

    /// Notes a piece of a repetition that goes on: a run of the block's part that begins with it.
    fn trace_piece(&mut self, block: &Block, op: &Op, made: &Repetition) {
        let rest = self.begin_repetition(block, op);
        let Some(tracer) = &mut self.tracer else { return };
        made.append(0..made.done, tracer, &self.memory);
        tracer.batch.cut_last_run(0, made.count() as u32);
        if tracer.is_due() {
            tracer.hand_over(&self.memory.physical, &self.other_maker.counts, self.tick);
        }
        tracer.batch.words.push(rest);
    }

    /// Notes the accesses of a long repetition: in pieces, each of which is a run of the block's part
    /// that begins with it.
    fn trace_long_repetition(&mut self, block: &Block, op: &Op, made: &Repetition, retires: bool) {
        let rest = self.begin_repetition(block, op);
        let Some(tracer) = &mut self.tracer else { return };
        let per_piece = MAX_PIECE / made.starts.len();
        let mut first = 0;
        while made.done - first > per_piece {
            made.append(first..first + per_piece, tracer, &self.memory);
            let unretired = (per_piece * made.starts.len()) as u32;
            tracer.batch.cut_last_run(0, unretired);
            // A guest may clear all of its memory at once. Numbers stay: `rest` is one of them.
            if tracer.is_due() {
                tracer.hand_over(&self.memory.physical, &self.other_maker.counts, self.tick);
            }
            tracer.batch.words.push(rest);
            first += per_piece;
        }
        made.append(first..made.done, tracer, &self.memory);
        if retires {
            tracer.batch.counts.push((made.done - first) as u32);
        } else {
            tracer.unretired = ((made.done - first) * made.starts.len()) as u32;
        }
    }
}

/// What a repeated instruction did, under which rights, and how often.
struct Repetition {
    starts: Vec<Repeated>,
    rights: usize,
    done: usize,
    /// Their values, if they are traced.
    elements: Option<Elements>,
}

impl Repetition {
    fn count(&self) -> usize {
        self.done * self.starts.len()
    }

    fn append(&self, elements: Range<usize>, tracer: &mut Tracer, memory: &Memory) {
        let Batch { addresses, physical, .. } = &mut tracer.batch;
        addresses.reserve(elements.len() * self.starts.len());
        for element in elements.clone() {
            for repeated in &self.starts {
                addresses.push(repeated.linear(element));
            }
        }
        if let Some(made) = &self.elements {
            let per_element = self.starts.len();
            made.append(elements.start * per_element..elements.end * per_element, tracer);
            return;
        }
        if !tracer.contents.physical {
            return;
        }
        // Neighbours lie in one page mostly.
        let mut pages = vec![(u64::MAX, 0); self.starts.len()];
        for element in elements {
            for (repeated, (page, distance)) in self.starts.iter().zip(&mut pages) {
                let linear = repeated.linear(element);
                if linear / PAGE_BYTES != *page {
                    let seen = memory.seen_address(self.rights, repeated.writes, linear);
                    (*page, *distance) = (linear / PAGE_BYTES, seen.wrapping_sub(linear));
                }
                physical.push(linear.wrapping_add(*distance));
            }
        }
    }
}
