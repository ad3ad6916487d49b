//! Computational instructions: the very instruction, its registers renamed, its memory operand
//! translated.

use iced_x86::{Code, Instruction, InstructionInfoFactory, OpCodeOperandKind, OpKind, Register};

use super::assembler::{Host, indexed};
use super::emission::{Emission, addressable};
use super::registers::{ADDEND, ADDRESS, Home, SCRATCH, home};
use crate::decode::op::Op;
use crate::native::{self, MemoryUse, is_high_byte, resized};

/// The longest instruction, with a LEA before it.
const INSTRUCTION_BYTES: usize = 20;
/// The longest move of a register from or to where it is kept.
const MOVE_BYTES: usize = 9;

/// A guest general register that an instruction uses.
#[derive(Clone, Copy)]
struct General {
    guest: u8,
    host: Host,
    load: bool,
    store: bool,
}

/// An instruction in the host's terms.
struct Plan {
    body: Instruction,
    memory: Option<MemoryUse>,
    /// Registers whose values are elsewhere, to be brought and taken away.
    moved: Vec<General>,
    /// It uses XMM registers, which are the host's of the same names.
    uses_vectors: bool,
}

/// Emits a computational instruction; `None`, with nothing emitted, if it cannot be inline.
pub(super) fn emit(emission: &mut Emission<'_>, op: &Op) -> Option<()> {
    let plan = plan(&op.instruction, emission.info)?;
    if plan.memory.is_some() && !addressable(op) {
        return None;
    }
    let mut body = plan.body;
    let one_register = plan.moved.iter().any(|general| general.host == ADDEND);
    if plan.memory.is_some() {
        body.set_memory_base(ADDRESS.register());
        body.set_memory_index(if one_register { Register::None } else { ADDEND.register() });
    }
    let body = emission.code.encode(&body)?;
    if plan.uses_vectors {
        emission.need_vectors();
    }
    if let Some(MemoryUse { size_bytes, writes, .. }) = plan.memory {
        emission.linear_address(op);
        if native::needs_alignment(&op.instruction) {
            emission.require_alignment();
        }
        emission.translate(writes, u64::from(size_bytes));
        if one_register {
            emission.code.lea(ADDRESS, indexed(ADDRESS, ADDEND, 0, 0));
        }
    }
    emission.settle(INSTRUCTION_BYTES + MOVE_BYTES * 2 * plan.moved.len());
    bring(emission, &plan);
    emission.code.bytes(&body);
    take_away(emission, &plan);
    Some(())
}

/// Loads what the instruction reads of registers that have no host register.
fn bring(emission: &mut Emission<'_>, plan: &Plan) {
    for general in plan.moved.iter().filter(|general| general.load) {
        match home(general.guest) {
            Home::Host(host) => emission.code.copy(general.host, host),
            Home::Memory(place) => emission.code.load(general.host, place),
        }
    }
}

/// Stores what it wrote.
fn take_away(emission: &mut Emission<'_>, plan: &Plan) {
    for general in plan.moved.iter().filter(|general| general.store) {
        match home(general.guest) {
            Home::Host(host) => emission.code.copy(host, general.host),
            Home::Memory(place) => emission.code.store(place, general.host),
        }
    }
}

/// LEA with a 64-bit or 32-bit result.
pub(super) fn emit_lea(emission: &mut Emission<'_>, op: &Op) -> Option<()> {
    if !matches!(op.instruction.code(), Code::Lea_r64_m | Code::Lea_r32_m) {
        return None;
    }
    if !addressable(op) {
        return None;
    }
    emission.effective_address(op);
    emission.settle(INSTRUCTION_BYTES);
    if op.instruction.code() == Code::Lea_r32_m {
        emission.code.zero_extend_32(ADDRESS, ADDRESS);
    }
    match home(op.a) {
        Home::Host(host) => emission.code.copy(host, ADDRESS),
        Home::Memory(place) => emission.code.store(place, ADDRESS),
    }
    Some(())
}

fn plan(instruction: &Instruction, info: &mut InstructionInfoFactory) -> Option<Plan> {
    let (normal, memory) = native::normalise(instruction, info)?;
    let fixed = fixed_operands(&normal);
    let explicit: Vec<(u32, Register)> = (0..normal.op_count())
        .filter(|&operand| normal.op_kind(operand) == OpKind::Register)
        .map(|operand| (operand, normal.op_register(operand)))
        .collect();
    let high_bytes = explicit.iter().any(|(_, register)| is_high_byte(*register));
    if high_bytes && memory.is_some() {
        return None; // Its address needs a REX prefix, which a high byte forbids.
    }
    let mut general: Vec<(u8, bool, bool)> = Vec::new();
    let mut uses_vectors = false;
    for used in info.info(&normal).used_registers() {
        let (register, access) = (used.register(), used.access());
        let (reads, writes) = native::directions(access);
        if register.is_gpr() {
            let full = register.full_register();
            let named = explicit
                .iter()
                .any(|(_, register)| register.is_gpr() && register.full_register() == full);
            if full == native::MEMORY && memory.is_some() && !named {
                continue;
            }
            // What is not written whole must be there to be kept.
            let load = reads || register.size() < 4 || native::conditional(access);
            merge(&mut general, full.number() as u8, load, writes);
        } else if register.is_xmm() {
            uses_vectors = true;
        } else if register != Register::None {
            return None;
        }
    }
    let named = |guest: u8, by_opcode: bool| {
        explicit.iter().any(|&(operand, register)| {
            register.is_gpr()
                && register.full_register().number() == usize::from(guest)
                && fixed.contains(&operand) == by_opcode
        })
    };
    let mut free = vec![SCRATCH, ADDEND];
    if memory.is_none() {
        free.push(ADDRESS);
    }
    let mut hosts: Vec<(u8, Host)> = Vec::new();
    let mut moved = Vec::new();
    for &(guest, load, store) in &general {
        let keeps_its_name = high_bytes || named(guest, true) || !named(guest, false);
        let host = match home(guest) {
            Home::Host(host) if !keeps_its_name || host.0 == guest => host,
            _ if keeps_its_name && guest == SCRATCH.0 => SCRATCH,
            _ if keeps_its_name => return None,
            _ => Host(u8::MAX), // Chosen below, when the fixed ones are known.
        };
        if host == SCRATCH {
            free.retain(|register| *register != SCRATCH);
            moved.push(General { guest, host, load, store });
        }
        hosts.push((guest, host));
    }
    for (index, &(guest, load, store)) in general.iter().enumerate() {
        if hosts[index].1 == Host(u8::MAX) {
            let host = free.first().copied()?;
            free.remove(0);
            hosts[index].1 = host;
            moved.push(General { guest, host, load, store });
        }
    }
    let mut body = normal;
    for &(operand, register) in &explicit {
        if !register.is_gpr() || is_high_byte(register) || fixed.contains(&operand) {
            continue;
        }
        let guest = register.full_register().number() as u8;
        let (_, host) = hosts.iter().find(|(number, _)| *number == guest)?;
        body.set_op_register(operand, resized(host.register(), register.size()));
    }
    Some(Plan { body, memory, moved, uses_vectors })
}

/// Operands whose register the opcode fixes.
fn fixed_operands(instruction: &Instruction) -> Vec<u32> {
    use OpCodeOperandKind::{al, ax, cl, dx, eax, rax};
    let kinds = instruction.op_code().op_kinds();
    (0..instruction.op_count())
        .filter(|&operand| matches!(kinds[operand as usize], al | ax | cl | dx | eax | rax))
        .collect()
}

fn merge(used: &mut Vec<(u8, bool, bool)>, number: u8, load: bool, store: bool) {
    match used.iter_mut().find(|(other, _, _)| *other == number) {
        Some(entry) => *entry = (number, entry.1 || load, entry.2 || store),
        None => used.push((number, load, store)),
    }
}
