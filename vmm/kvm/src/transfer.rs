//! What the step clock does in KVM's place: the way of an interrupt or exception through the IDT, and
//! IRETQ's way back, between 64-bit code at CPL0 or CPL3 and 64-bit code.
//!
//! KVM delivers an interrupt together with the handler's first instruction, and some KVMs retire IRETQ
//! together with the instruction behind it; done here, each is one step of its own. Only the clean
//! path is here: a transfer that would fault changes nothing but accessed bits and gives `None`, and
//! KVM is left to do it, or the run ends with a reason.
//!
//! AMD64 APM volume 2, "Long-Mode Interrupt Control Transfers", and volume 3, "IRET".

use reprise_branch_clock::guest_code::segment_of;
use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::{CS, CpuState, DS, ES, FS, GS, RSP, SS, Segment};

use reprise_machine::paging::{Mapping, Paging, is_ram, write_ram};
use reprise_trace::register_bits::{
    CR4_SMAP, EFER_LMA, RFLAGS_IF, RFLAGS_NT, RFLAGS_RF, RFLAGS_TF, RFLAGS_VM,
};

/// What IRETQ at CPL0 loads: CF, PF, AF, ZF, SF, TF, IF, DF, OF, IOPL, NT, RF, AC, VIF, VIP, ID.
const IRETQ_FLAGS: u64 = 0x003d_7fd5;

/// Segment attributes, as in [`Segment::attributes`].
const ACCESSED: u16 = 1;
const WRITABLE: u16 = 1 << 1;
const CONFORMING: u16 = 1 << 2;
const CODE: u16 = 1 << 3;
const CODE_OR_DATA: u16 = 1 << 4;
const LONG: u16 = 1 << 13;
const DEFAULT_32: u16 = 1 << 14;

/// What IRETQ pops.
const FRAME_BYTES: usize = 40;

/// General protection.
pub(crate) const GENERAL_PROTECTION: u8 = 13;

/// An error code's bit that says that its index is a vector.
const IN_IDT: u32 = 2;

/// What goes through the IDT.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Event {
    vector: u8,
    error_code: Option<u32>,
    return_rip: u64,
    /// RFLAGS in the frame.
    rflags: u64,
}

impl Event {
    /// An interrupt from the board.
    pub(crate) fn interrupt(state: &CpuState, vector: u8) -> Self {
        Self { vector, error_code: None, return_rip: state.rip, rflags: state.rflags }
    }

    /// INT n and the like, which has retired when its handler begins.
    pub(crate) fn software(state: &CpuState, vector: u8, next_rip: u64) -> Self {
        let rflags = state.rflags & !RFLAGS_RF;
        Self { vector, error_code: None, return_rip: next_rip, rflags }
    }

    /// A fault: the instruction starts again after it, without breakpoints.
    pub(crate) fn fault(state: &CpuState, vector: u8, error_code: Option<u32>) -> Self {
        let rflags = state.rflags | RFLAGS_RF;
        Self { vector, error_code, return_rip: state.rip, rflags }
    }
}

/// A gate of the IDT.
struct Gate {
    handler: u64,
    selector: u16,
    interrupt_stack: u8,
    dpl: u8,
    /// Present, and an interrupt gate or a trap gate.
    usable: bool,
    masks_interrupts: bool,
}

/// A descriptor read from the GDT, and where its type byte lies.
struct Descriptor {
    segment: Segment,
    type_byte: Mapping,
}

/// Offset of the type in a descriptor.
const TYPE_BYTE: u64 = 5;

/// 64-bit code at CPL0 or CPL3, which is all that is handled here.
fn is_64_bit(state: &CpuState) -> bool {
    state.efer & EFER_LMA != 0 && state.segments[CS].long() && matches!(state.cpl(), 0 | 3)
}

/// Executes INT n or INT3 in user code: through its gate, or the fault that the gate's privilege level
/// makes of it. Whether the instruction has retired, and the state after it.
pub(crate) fn software_interrupt(
    ram: &GuestRam,
    state: &CpuState,
    vector: u8,
    next_rip: u64,
) -> Option<(bool, CpuState)> {
    let in_table = 16 * u64::from(vector) + 15 <= u64::from(state.idtr.limit);
    let gate = read_gate(ram, state, vector);
    if in_table && gate.as_ref()?.dpl >= state.cpl() {
        let event = Event::software(state, vector, next_rip);
        return Some((true, deliver(ram, state, &event)?));
    }
    let error_code = u32::from(vector) << 3 | IN_IDT;
    let event = Event::fault(state, GENERAL_PROTECTION, Some(error_code));
    Some((false, deliver(ram, state, &event)?))
}

/// Delivers an interrupt or exception.
pub(crate) fn deliver(ram: &GuestRam, state: &CpuState, event: &Event) -> Option<CpuState> {
    if !is_64_bit(state) {
        return None;
    }
    let gate = read_gate(ram, state, event.vector).filter(|gate| gate.usable)?;
    let code = read_descriptor(ram, state, gate.selector)?;
    if !is_long_code(&code.segment) || code.segment.dpl() != 0 {
        return None;
    }
    let inner = state.cpl() != 0;
    if inner && code.segment.attributes & CONFORMING != 0 {
        return None;
    }
    let stack = stack_for(ram, state, gate.interrupt_stack)? & !0xf;
    let frame = [
        u64::from(event.error_code.unwrap_or(0)),
        event.return_rip,
        u64::from(state.segments[CS].selector),
        event.rflags,
        state.gpr[RSP],
        u64::from(state.segments[SS].selector),
    ];
    let frame = &frame[usize::from(event.error_code.is_none())..];
    let top = stack.wrapping_sub(8 * frame.len() as u64);
    push_frame(ram, state, top, frame)?;
    mark_descriptor(ram, &Paging::from(state), &code);
    let mut after = state.clone();
    after.segments[CS] = Segment { selector: gate.selector, ..accessed(code.segment) };
    if inner {
        after.segments[SS] = Segment::default();
    }
    after.gpr[RSP] = top;
    after.rip = gate.handler;
    after.rflags &= !(RFLAGS_TF | RFLAGS_NT | RFLAGS_RF | RFLAGS_VM);
    if gate.masks_interrupts {
        after.rflags &= !RFLAGS_IF;
    }
    after.interrupt_shadow = false;
    Some(after)
}

/// The gate of a vector, if the table has it.
fn read_gate(ram: &GuestRam, state: &CpuState, vector: u8) -> Option<Gate> {
    let offset = 16 * u64::from(vector);
    if offset + 15 > u64::from(state.idtr.limit) {
        return None;
    }
    let gate: [u8; 16] = read_system(ram, state, state.idtr.base.wrapping_add(offset))?;
    let half = |at: usize| u16::from_le_bytes([gate[at], gate[at + 1]]);
    let high = u64::from(u32::from_le_bytes([gate[8], gate[9], gate[10], gate[11]]));
    let handler = u64::from(half(0)) | u64::from(half(6)) << 16 | high << 32;
    // An interrupt gate (0xe) or a trap gate (0xf).
    let (present, kind) = (gate[5] & 0x80 != 0, gate[5] & 0x1f);
    Some(Gate {
        handler,
        selector: half(2) & !3,
        interrupt_stack: gate[4] & 7,
        dpl: gate[5] >> 5 & 3,
        usable: present && kind & !1 == 0xe && is_canonical(handler),
        masks_interrupts: kind == 0xe,
    })
}

/// Reads a system structure, as the CPU does: its pages count as accessed.
fn read_system<const BYTES: usize>(
    ram: &GuestRam,
    state: &CpuState,
    address: u64,
) -> Option<[u8; BYTES]> {
    let paging = Paging::from(state);
    let mut bytes = [0; BYTES];
    if !paging.read(ram, address, &mut bytes) {
        return None;
    }
    for end in [address, address.wrapping_add(BYTES as u64 - 1)] {
        paging.mark_used(ram, &paging.walk(ram, end)?, false);
    }
    Some(bytes)
}

fn is_long_code(segment: &Segment) -> bool {
    segment.attributes & (CODE | LONG | DEFAULT_32) == CODE | LONG
}

/// Executes IRETQ at CPL0.
pub(crate) fn iretq(ram: &GuestRam, state: &CpuState) -> Option<CpuState> {
    if !is_64_bit(state) || state.cpl() != 0 || state.rflags & RFLAGS_NT != 0 {
        return None;
    }
    let paging = Paging::from(state);
    let top = state.gpr[RSP];
    let mut bytes = [0; FRAME_BYTES];
    let mappings = frame_mappings(ram, state, top, FRAME_BYTES)?;
    if !paging.read(ram, top, &mut bytes) {
        return None;
    }
    let word = |index: usize| {
        u64::from_le_bytes(*bytes[8 * index..].first_chunk().expect("inside the frame"))
    };
    let [rip, cs, rflags, rsp, ss] = std::array::from_fn(word);
    let (cs, ss) = (cs as u16, ss as u16);
    // A guest that steps itself: KVM's own stepping hides its TF.
    if !is_canonical(rip) || rflags & RFLAGS_TF != 0 {
        return None;
    }
    let code = read_descriptor(ram, state, cs)?;
    let level = (cs & 3) as u8;
    let conforms = code.segment.attributes & CONFORMING != 0;
    if !matches!(level, 0 | 3) || !is_long_code(&code.segment) {
        return None;
    }
    if code.segment.dpl() != level || (conforms && level == 3) {
        return None;
    }
    let mut after = state.clone();
    after.segments[SS] = load_stack_segment(ram, state, ss, level)?;
    for mapping in mappings {
        paging.mark_used(ram, &mapping, false);
    }
    mark_descriptor(ram, &paging, &code);
    after.segments[CS] = Segment { selector: cs, ..accessed(code.segment) };
    after.rip = rip;
    after.gpr[RSP] = rsp;
    after.rflags = state.rflags & !IRETQ_FLAGS | rflags & IRETQ_FLAGS;
    after.interrupt_shadow = false;
    if level == 3 {
        drop_privileged_segments(&mut after);
    }
    Some(after)
}

/// Nulls the data segments that user code may not have; FS and GS keep their bases.
fn drop_privileged_segments(after: &mut CpuState) {
    for index in [ES, DS, FS, GS] {
        let segment = &mut after.segments[index];
        let conforms = segment.attributes & (CODE | CONFORMING) == CODE | CONFORMING;
        if segment.present() && !conforms && segment.dpl() < 3 {
            let base = if matches!(index, FS | GS) { segment.base } else { 0 };
            *segment = Segment { base, ..Segment::default() };
        }
    }
}

/// SS for a privilege level: writable data of it, or at CPL0 null.
fn load_stack_segment(
    ram: &GuestRam,
    state: &CpuState,
    selector: u16,
    level: u8,
) -> Option<Segment> {
    if selector & !3 == 0 {
        return (selector == 0 && level == 0).then(Segment::default);
    }
    let stack = read_descriptor(ram, state, selector)?;
    let attributes = stack.segment.attributes;
    let levels = [stack.segment.dpl(), (selector & 3) as u8];
    if attributes & (CODE | WRITABLE) != WRITABLE || levels != [level; 2] {
        return None;
    }
    mark_descriptor(ram, &Paging::from(state), &stack);
    Some(Segment { selector, ..accessed(stack.segment) })
}

/// The present code or data descriptor of a GDT selector.
fn read_descriptor(ram: &GuestRam, state: &CpuState, selector: u16) -> Option<Descriptor> {
    let offset = u64::from(selector & !7);
    let in_ldt = selector & 4 != 0;
    if offset == 0 || in_ldt || offset + 7 > u64::from(state.gdtr.limit) {
        return None;
    }
    let address = state.gdtr.base.wrapping_add(offset);
    let raw = u64::from_le_bytes(read_system(ram, state, address)?);
    let segment = segment_of(selector, raw);
    let attributes = segment.attributes;
    let usable = segment.present() && attributes & CODE_OR_DATA != 0;
    // A descriptor may lie in two pages.
    let paging = Paging::from(state);
    let type_byte = paging.walk(ram, address.wrapping_add(TYPE_BYTE))?;
    let may_mark = attributes & ACCESSED != 0 || paging.supervisor_may_write(&type_byte);
    (usable && may_mark).then_some(Descriptor { segment, type_byte })
}

fn accessed(segment: Segment) -> Segment {
    Segment { attributes: segment.attributes | ACCESSED, ..segment }
}

/// Sets a descriptor's accessed bit in memory where it is clear.
fn mark_descriptor(ram: &GuestRam, paging: &Paging, descriptor: &Descriptor) {
    let attributes = descriptor.segment.attributes;
    let written = attributes & ACCESSED == 0;
    if written {
        write_ram(ram, descriptor.type_byte.physical, &[attributes as u8 | ACCESSED as u8]);
    }
    paging.mark_used(ram, &descriptor.type_byte, written);
}

/// The stack that a handler starts on: the current one, or one that the TSS names, for CPL0 or by its
/// number among the seven.
fn stack_for(ram: &GuestRam, state: &CpuState, interrupt_stack: u8) -> Option<u64> {
    let offset = match interrupt_stack {
        0 if state.cpl() == 0 => return Some(state.gpr[RSP]),
        0 => 4,
        number => 0x24 + 8 * (u64::from(number) - 1),
    };
    if offset + 7 > u64::from(state.tr.limit) {
        return None;
    }
    let stack = read_system(ram, state, state.tr.base.wrapping_add(offset))?;
    Some(u64::from_le_bytes(stack)).filter(|stack| is_canonical(*stack))
}

/// Clears TF in the frame that the handler of a fault at `rip` has found; whether it was set. `state` is
/// the one before the fault, but for what a handler may change. `None` where no such frame is found.
pub(crate) fn hide_trap_flag(
    ram: &GuestRam,
    state: &CpuState,
    vector: u8,
    rip: u64,
) -> Option<bool> {
    if !is_64_bit(state) || state.cpl() != 0 {
        return None;
    }
    let gate = read_gate(ram, state, vector)?;
    let stack = stack_for(ram, state, gate.interrupt_stack)? & !0xf;
    let paging = Paging::from(state);
    let word = |address: u64| {
        let mut bytes = [0; 8];
        paging.read(ram, address, &mut bytes).then(|| u64::from_le_bytes(bytes))
    };
    let place = stack.wrapping_sub(24);
    let rflags = word(place)?;
    if word(stack.wrapping_sub(40))? != rip || word(stack.wrapping_sub(16))? != state.gpr[RSP] {
        return None;
    }
    if rflags & RFLAGS_TF == 0 {
        return Some(false);
    }
    let physical = paging.walk(ram, place)?.physical;
    write_ram(ram, physical, &(rflags & !RFLAGS_TF).to_le_bytes());
    Some(true)
}

/// The mappings of a frame's first and last byte, which are two pages at most.
fn frame_mappings(
    ram: &GuestRam,
    state: &CpuState,
    top: u64,
    bytes: usize,
) -> Option<[Mapping; 2]> {
    let paging = Paging::from(state);
    let last = top.wrapping_add(bytes as u64 - 1);
    let mappings = [paging.walk(ram, top)?, paging.walk(ram, last)?];
    let forbidden = |mapping: &Mapping| mapping.user && state.cr4 & CR4_SMAP != 0;
    let in_ram = mappings.iter().all(|mapping| is_ram(ram, mapping.physical, 1));
    (in_ram && !mappings.iter().any(forbidden) && is_canonical(top)).then_some(mappings)
}

/// Writes a frame at `top`, lowest word first; nothing if any of it cannot be written.
fn push_frame(ram: &GuestRam, state: &CpuState, top: u64, frame: &[u64]) -> Option<()> {
    let paging = Paging::from(state);
    let mappings = frame_mappings(ram, state, top, 8 * frame.len())?;
    if !mappings.iter().all(|mapping| paging.supervisor_may_write(mapping)) {
        return None;
    }
    for mapping in &mappings {
        paging.mark_used(ram, mapping, true);
    }
    // The top is aligned to 8, so a word does not cross pages.
    for (index, word) in frame.iter().enumerate() {
        let mapping = paging.walk(ram, top.wrapping_add(8 * index as u64))?;
        write_ram(ram, mapping.physical, &word.to_le_bytes());
    }
    Some(())
}

/// Whether bits 47 to 63 of a linear address are alike.
pub(crate) fn is_canonical(address: u64) -> bool {
    let sign_extended = ((address << 16) as i64 >> 16) as u64;
    sign_extended == address
}

#[cfg(test)]
mod tests {
    use super::{Event, deliver};
    use crate::testing::*;
    use reprise_machine::ram::GuestRam;
    use reprise_trace::cpu_state::CpuState;

    /// A code segment's descriptor across two pages, which are not neighbours in RAM: its low half at
    /// the end of the last page below the hole of video memory.
    const ACROSS: u64 = 0x20_0ffc;
    const SECOND_PAGE: u64 = 0x4_0000;

    fn split_descriptor(table_flags: u64) -> (GuestRam, CpuState) {
        const TABLE: u64 = 0x3_0000;
        let ram = ram_with(&[]);
        let raw = 0x00af_9a00_0000_ffffu64.to_le_bytes();
        put(&ram, 0x9_fffc, &raw[..4]);
        put(&ram, SECOND_PAGE, &raw[4..]);
        put(&ram, 0x3008, &(TABLE | 3).to_le_bytes());
        put(&ram, TABLE, &0x9_f003u64.to_le_bytes());
        put(&ram, TABLE + 8, &(SECOND_PAGE | table_flags).to_le_bytes());
        put_gate(&ram, 0x40, CODE + 0x800);
        let mut state = long_mode();
        state.gdtr.base = ACROSS - u64::from(CODE_SELECTOR);
        (ram, state)
    }

    #[test]
    fn a_descriptor_across_pages_is_marked_where_its_type_lies() {
        let (ram, state) = split_descriptor(3);
        let after =
            deliver(&ram, &state, &Event::interrupt(&state, 0x40)).expect("it can be delivered");
        assert_eq!(after.rip, CODE + 0x800);
        let mut type_byte = [0];
        ram.read(SECOND_PAGE + 1, &mut type_byte);
        assert_eq!(type_byte, [0x9b]);
    }

    #[test]
    fn a_descriptor_that_cannot_be_marked_is_left_to_kvm() {
        let (ram, mut state) = split_descriptor(1);
        state.cr0 |= 1 << 16;
        assert_eq!(deliver(&ram, &state, &Event::interrupt(&state, 0x40)), None);
        state.cr0 &= !(1 << 16);
        assert!(deliver(&ram, &state, &Event::interrupt(&state, 0x40)).is_some());
    }
}
