//! Every instruction of the CPU model is either written by hand or runs natively.

use reprise_random::Random;
use std::collections::BTreeSet;

use iced_x86::{Code, EncodingKind, Instruction, MemoryOperand, Register};

use super::testing::Machine;
use super::{BY_HAND, undefined};
use crate::decode::op::Op;
use crate::native;
use crate::native::forms::build;

/// Visits every instruction form that the model has in a code segment of 32 or 64 bits.
fn visit_forms(bits: u32, mut visit: impl FnMut(&mut Machine, Instruction)) {
    let seed = 0x5eed;
    let mut random = Random::new(seed);
    let mut machine = if bits == 64 { Machine::long_64(&[]) } else { Machine::flat_32(&[]) };
    let base = if bits == 64 { Register::RBX } else { Register::EBX };
    let operand = MemoryOperand::with_base_displ_size(base, 0x40, 1);
    for code in Code::values() {
        let op_code = code.op_code();
        let exists = if bits == 64 { op_code.mode64() } else { op_code.mode32() };
        if op_code.encoding() != EncodingKind::Legacy || !op_code.is_instruction() || !exists {
            continue;
        }
        // Several choices of registers: some cannot be renamed, some forbid a REX prefix.
        for memory in [None, Some(&operand)].repeat(16) {
            if let Some((instruction, _)) = build(code, bits, memory, &mut random)
                && !undefined(&instruction)
            {
                visit(&mut machine, instruction);
            }
        }
    }
}

#[test]
fn every_instruction_of_the_model_has_exactly_one_implementation() {
    let mut neither = BTreeSet::new();
    let mut seen = 0;
    let mut twice = BTreeSet::new();
    for bits in [32, 64] {
        visit_forms(bits, |machine, instruction| {
            seen += 1;
            let cpu = &mut *machine.cpu;
            let takers = BY_HAND
                .iter()
                .filter(|by_hand| by_hand(&mut Op::new(instruction, 0, 0), cpu.mode).is_some())
                .count();
            if takers > 1 {
                twice.insert(format!("{:?}", instruction.code()));
            }
            let mut op = Op::new(instruction, 0, 0);
            if takers == 0 && native::select(cpu, &mut op).is_none() {
                neither.insert(format!("{:?}", instruction.code()));
            }
        });
    }
    assert!(twice.is_empty(), "written by hand more than once: {twice:?}");
    assert!(seen > 40_000, "only {seen} forms were built");
    assert!(neither.is_empty(), "no implementation: {neither:?}");
}
