//! The instruction at RIP, decoded before it executes: what it is, and where it may lead.

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, OpKind, Register};
use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::{CS, CpuState, ES, RCX, RSP, SS, Segment};

use crate::retired::segment;
use reprise_machine::paging::Paging;
use reprise_trace::register_bits::{CR0_PE, CR4_TSD, EFER_LMA};

/// The longest instruction, in bytes.
pub const MAX_BYTES: usize = 15;

/// Where RIP may stand after an instruction has retired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Successors {
    /// One of these (twice the same where there is one).
    These([u64; 2]),
    /// Nowhere: it always faults, or an event comes first.
    None,
    /// Not worked out.
    Any,
}

impl Successors {
    /// Whether `rip` may follow.
    pub fn contain(self, rip: u64) -> bool {
        match self {
            Self::These(all) => all.contains(&rip),
            Self::None => false,
            Self::Any => true,
        }
    }

    /// One only.
    pub fn one(rip: u64) -> Self {
        Self::These([rip; 2])
    }
}

/// Operand size of the code that the guest is in: 16, 32 or 64.
pub fn bitness(state: &CpuState) -> u32 {
    let cs = &state.segments[CS];
    match (state.efer & EFER_LMA != 0 && cs.long(), cs.default_32()) {
        (true, _) => 64,
        (false, true) => 32,
        (false, false) => 16,
    }
}

/// Whether RDTSC faults in this state.
pub fn refuses_time_stamps(state: &CpuState) -> bool {
    const USER: u16 = 3;
    // Of the stack's selector, the privilege is the CPU's.
    state.cr4 & CR4_TSD != 0 && state.cr0 & CR0_PE != 0 && state.segments[SS].selector & USER != 0
}

/// The linear address of offset `rip` of the code segment.
pub fn linear_of(state: &CpuState, rip: u64) -> u64 {
    let bitness = bitness(state);
    let base = if bitness == 64 { 0 } else { state.segments[CS].base };
    linear_address(bitness, base.wrapping_add(rip))
}

/// Decodes what stands at offset `rip` of the code segment; `None` where it cannot be fetched or is
/// no instruction, which is to say that it faults.
pub fn decode_at(ram: &GuestRam, state: &CpuState, rip: u64) -> Option<Instruction> {
    let bitness = bitness(state);
    let mut bytes = [0; MAX_BYTES];
    let linear = linear_of(state, rip);
    let count = Paging::from(state).read_prefix(ram, linear, &mut bytes);
    let mut decoder = Decoder::with_ip(bitness, &bytes[..count], rip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    (!instruction.is_invalid()).then_some(instruction)
}

/// Whether it is one that RIP stays at until RCX has run out.
pub fn repeats(instruction: &Instruction) -> bool {
    let prefixed = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    prefixed && instruction.is_string_instruction()
}

/// Where `instruction`, about to execute in `state`, leads if it does not fault.
pub fn successors(ram: &GuestRam, state: &CpuState, instruction: &Instruction) -> Successors {
    let mask = match bitness(state) {
        64 => u64::MAX,
        32 => 0xffff_ffff,
        _ => 0xffff,
    };
    let next = instruction.next_ip() & mask;
    match (instruction.code(), bitness(state)) {
        (Code::Syscall, 64) => return Successors::one(state.lstar),
        (Code::Sysretq, 64) => return Successors::one(state.gpr[RCX]),
        (Code::Int_imm8 | Code::Int3, _) => {
            let vector =
                if instruction.code() == Code::Int3 { 3 } else { instruction.immediate8() };
            return handler_of(ram, state, vector).map_or(Successors::None, Successors::one);
        }
        _ => {}
    }
    match instruction.flow_control() {
        FlowControl::Next if repeats(instruction) => {
            Successors::These([next, instruction.ip() & mask])
        }
        FlowControl::Next => Successors::one(next),
        FlowControl::ConditionalBranch => {
            Successors::These([next, instruction.near_branch_target() & mask])
        }
        FlowControl::UnconditionalBranch | FlowControl::Call if is_near_direct(instruction) => {
            Successors::one(instruction.near_branch_target() & mask)
        }
        FlowControl::IndirectBranch | FlowControl::IndirectCall => {
            indirect_target(ram, state, instruction)
        }
        FlowControl::Return => return_target(ram, state, instruction),
        FlowControl::Exception => Successors::None,
        _ => Successors::Any,
    }
}

fn is_near_direct(instruction: &Instruction) -> bool {
    matches!(
        instruction.op0_kind(),
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
    )
}

fn indirect_target(ram: &GuestRam, state: &CpuState, instruction: &Instruction) -> Successors {
    if instruction.op0_kind() == OpKind::Register {
        return match register(state, instruction.op0_register()) {
            Some(target) => Successors::one(target),
            None => Successors::Any,
        };
    }
    let bytes = match instruction.code() {
        Code::Jmp_rm16 | Code::Call_rm16 => 2,
        Code::Jmp_rm32 | Code::Call_rm32 => 4,
        Code::Jmp_rm64 | Code::Call_rm64 => 8,
        _ => return Successors::Any,
    };
    let address = instruction.virtual_address(0, 0, |name, _, _| register(state, name));
    target_in_memory(ram, state, address, bytes)
}

fn return_target(ram: &GuestRam, state: &CpuState, instruction: &Instruction) -> Successors {
    let bytes = match instruction.code() {
        Code::Retnw | Code::Retnw_imm16 | Code::Iretw => 2,
        Code::Retnd | Code::Retnd_imm16 | Code::Iretd => 4,
        Code::Retnq | Code::Retnq_imm16 | Code::Iretq => 8,
        _ => return Successors::Any,
    };
    match stack_word(ram, state, 0, bytes) {
        Some(target) => Successors::one(target),
        None => Successors::Any,
    }
}

/// The word of `bytes` bytes at `offset` from the top of the stack; `None` where that is not RAM.
pub fn stack_word(ram: &GuestRam, state: &CpuState, offset: u64, bytes: usize) -> Option<u64> {
    let bitness = bitness(state);
    let pointer = state.gpr[RSP].wrapping_add(offset);
    let stack = &state.segments[SS];
    let top = match (bitness, stack.default_32()) {
        (64, _) => pointer,
        (_, true) => stack.base.wrapping_add(pointer & 0xffff_ffff),
        (_, false) => stack.base.wrapping_add(pointer & 0xffff),
    };
    let mut word = [0; 8];
    let linear = linear_address(bitness, top);
    let read = Paging::from(state).read(ram, linear, &mut word[..bytes]);
    read.then(|| u64::from_le_bytes(word))
}

/// A target that cannot be read makes the instruction fault.
fn target_in_memory(
    ram: &GuestRam,
    state: &CpuState,
    address: Option<u64>,
    bytes: usize,
) -> Successors {
    let Some(address) = address else { return Successors::Any };
    let mut target = [0; 8];
    let linear = linear_address(bitness(state), address);
    match Paging::from(state).read(ram, linear, &mut target[..bytes]) {
        true => Successors::one(u64::from_le_bytes(target)),
        // It may also come from MMIO.
        false => Successors::Any,
    }
}

fn linear_address(bitness: u32, address: u64) -> u64 {
    if bitness == 64 { address } else { address & 0xffff_ffff }
}

/// A register's value, or a segment's base, as an address is computed from it.
fn register(state: &CpuState, name: Register) -> Option<u64> {
    if name.is_segment_register() {
        let index = name as usize - Register::ES as usize + ES;
        let flat = bitness(state) == 64 && index < 4;
        return Some(if flat { 0 } else { state.segments[index].base });
    }
    let full = name.full_register();
    if !full.is_gpr64() {
        return None;
    }
    let value = state.gpr[full as usize - Register::RAX as usize];
    match name.size() {
        8 => Some(value),
        4 => Some(value & 0xffff_ffff),
        2 => Some(value & 0xffff),
        _ => None,
    }
}

/// What a segment register holds once it has loaded a code or data descriptor.
pub fn segment_of(selector: u16, descriptor: u64) -> Segment {
    const GRANULARITY: u16 = 1 << 15;
    let attributes = (descriptor >> 40) as u16 & 0xf0ff;
    let limit = (descriptor & 0xffff | descriptor >> 32 & 0xf_0000) as u32;
    let limit = if attributes & GRANULARITY != 0 { limit << 12 | 0xfff } else { limit };
    let base = descriptor >> 16 & 0xff_ffff | descriptor >> 32 & 0xff00_0000;
    Segment { selector, attributes, limit, base }
}

/// An entry of the IDT, or of the table of vectors in real mode.
struct Gate {
    offset: u64,
    selector: u16,
    attributes: u8,
}

fn gate_of(ram: &GuestRam, state: &CpuState, vector: u8) -> Option<Gate> {
    let entry_bytes: u64 = match (state.efer & EFER_LMA != 0, state.cr0 & CR0_PE != 0) {
        (true, _) => 16,
        (false, true) => 8,
        (false, false) => 4,
    };
    let offset = u64::from(vector) * entry_bytes;
    if offset + entry_bytes - 1 > u64::from(state.idtr.limit) {
        return None;
    }
    let mut entry = [0; 16];
    let bytes = &mut entry[..entry_bytes as usize];
    if !Paging::from(state).read(ram, state.idtr.base.wrapping_add(offset), bytes) {
        return None;
    }
    let half = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
    let high = u64::from(u32::from_le_bytes([entry[8], entry[9], entry[10], entry[11]]));
    let offset = match entry_bytes {
        4 => u64::from(half(0)),
        _ => u64::from(half(0)) | u64::from(half(6)) << 16 | high << 32,
    };
    Some(Gate { offset, selector: half(2), attributes: entry[5] })
}

/// The handler's offset in the gate of `vector`; `None` where there is none.
pub fn handler_of(ram: &GuestRam, state: &CpuState, vector: u8) -> Option<u64> {
    gate_of(ram, state, vector).map(|gate| gate.offset)
}

/// The handler's linear address, whatever code the guest is in now; `None` where no handler is known.
pub fn handler_address(ram: &GuestRam, state: &CpuState, vector: u8) -> Option<u64> {
    const TYPE: u8 = 0x1f;
    const TASK: u8 = 5;
    const SMALL: [u8; 2] = [6, 7];
    let gate = gate_of(ram, state, vector)?;
    if state.efer & EFER_LMA != 0 {
        return Some(gate.offset);
    }
    let base = match (state.cr0 & CR0_PE != 0, gate.attributes & TYPE) {
        (false, _) => u64::from(gate.selector) << 4,
        (true, TASK) => return None,
        (true, _) => segment(ram, state, gate.selector)?.base,
    };
    let small = state.cr0 & CR0_PE != 0 && SMALL.contains(&(gate.attributes & TYPE));
    let offset = if small { gate.offset & 0xffff } else { gate.offset };
    Some(base.wrapping_add(offset) & 0xffff_ffff)
}
