//! What the step clock does in KVM's place: an interrupt's way in through the IDT and IRETQ's way
//! back, from 64-bit code at CPL0 to the same.
//!
//! KVM delivers an interrupt together with the handler's first instruction, and some KVMs retire IRETQ
//! together with the instruction behind it; done here, each is one step of its own. Only the clean
//! path is here: a transfer that would fault, or change the privilege level, changes nothing and gives
//! `None`, and KVM is left to do it.
//!
//! AMD64 APM volume 2, "Long-Mode Interrupt Control Transfers", and volume 3, "IRET".

use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::{CS, CpuState, RSP, SS, Segment};

use reprise_machine::paging::{Mapping, Paging, is_ram, write_ram};
use reprise_trace::register_bits::{
    CR4_SMAP, EFER_LMA, RFLAGS_IF, RFLAGS_NT, RFLAGS_RF, RFLAGS_TF, RFLAGS_VM,
};

/// What IRETQ at CPL0 loads: CF, PF, AF, ZF, SF, TF, IF, DF, OF, IOPL, NT, RF, AC, VIF, VIP, ID.
const IRETQ_FLAGS: u64 = 0x003d_7fd5;

/// Segment attributes, as in [`Segment::attributes`].
const ACCESSED: u16 = 1;
const WRITABLE: u16 = 1 << 1;
const CODE: u16 = 1 << 3;
const CODE_OR_DATA: u16 = 1 << 4;
const LONG: u16 = 1 << 13;
const DEFAULT_32: u16 = 1 << 14;
const GRANULARITY: u16 = 1 << 15;

const FRAME_BYTES: usize = 40;

/// A descriptor read from the GDT, and where its type byte lies.
struct Descriptor {
    segment: Segment,
    type_byte: Mapping,
}

/// Offset of the type in a descriptor.
const TYPE_BYTE: u64 = 5;

/// 64-bit code at CPL0, which is all that is handled here.
fn is_64_bit_kernel(state: &CpuState) -> bool {
    state.efer & EFER_LMA != 0 && state.segments[CS].long() && state.cpl() == 0
}

/// Delivers interrupt `vector` with `return_rip` as the address that is saved.
pub(crate) fn deliver(
    ram: &GuestRam,
    state: &CpuState,
    vector: u8,
    return_rip: u64,
) -> Option<CpuState> {
    if !is_64_bit_kernel(state) {
        return None;
    }
    let paging = Paging::from(state);
    let offset = 16 * u64::from(vector);
    if offset + 15 > u64::from(state.idtr.limit) {
        return None;
    }
    let mut gate = [0; 16];
    if !paging.read(ram, state.idtr.base.wrapping_add(offset), &mut gate) {
        return None;
    }
    let half = |at: usize| u16::from_le_bytes([gate[at], gate[at + 1]]);
    let high = u64::from(u32::from_le_bytes([gate[8], gate[9], gate[10], gate[11]]));
    let handler = u64::from(half(0)) | u64::from(half(6)) << 16 | high << 32;
    // Present; an interrupt gate (0xe) or a trap gate (0xf).
    let (present, kind) = (gate[5] & 0x80 != 0, gate[5] & 0x1f);
    if !present || kind & !1 != 0xe || !is_canonical(handler) {
        return None;
    }
    let selector = half(2) & !3;
    let code = read_descriptor(ram, state, selector)?;
    let attributes = code.segment.attributes;
    let is_long_code = attributes & (CODE | LONG | DEFAULT_32) == CODE | LONG;
    if !is_long_code || code.segment.dpl() != 0 {
        return None;
    }
    let stack = stack_for(ram, state, gate[4] & 7)? & !0xf;
    let frame = [
        return_rip,
        u64::from(state.segments[CS].selector),
        state.rflags,
        state.gpr[RSP],
        u64::from(state.segments[SS].selector),
    ];
    let top = stack.wrapping_sub(FRAME_BYTES as u64);
    push_frame(ram, state, top, &frame)?;
    mark_descriptor(ram, &paging, &code);
    let mut after = state.clone();
    after.segments[CS] = Segment { selector, ..accessed(code.segment) };
    after.gpr[RSP] = top;
    after.rip = handler;
    after.rflags &= !(RFLAGS_TF | RFLAGS_NT | RFLAGS_RF | RFLAGS_VM);
    if kind == 0xe {
        after.rflags &= !RFLAGS_IF;
    }
    after.interrupt_shadow = false;
    Some(after)
}

/// Executes IRETQ.
pub(crate) fn iretq(ram: &GuestRam, state: &CpuState) -> Option<CpuState> {
    if !is_64_bit_kernel(state) || state.rflags & RFLAGS_NT != 0 {
        return None;
    }
    let paging = Paging::from(state);
    let top = state.gpr[RSP];
    let mut bytes = [0; FRAME_BYTES];
    let mappings = frame_mappings(ram, state, top)?;
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
    let attributes = code.segment.attributes;
    let is_long_code = attributes & (CODE | LONG | DEFAULT_32) == CODE | LONG;
    if cs & 3 != 0 || !is_long_code || code.segment.dpl() != 0 {
        return None;
    }
    let mut after = state.clone();
    after.segments[SS] = load_stack_segment(ram, state, ss)?;
    for mapping in mappings {
        paging.mark_used(ram, &mapping, false);
    }
    mark_descriptor(ram, &paging, &code);
    after.segments[CS] = Segment { selector: cs, ..accessed(code.segment) };
    after.rip = rip;
    after.gpr[RSP] = rsp;
    after.rflags = state.rflags & !IRETQ_FLAGS | rflags & IRETQ_FLAGS;
    after.interrupt_shadow = false;
    Some(after)
}

/// SS for CPL0: null, or writable data of DPL 0.
fn load_stack_segment(ram: &GuestRam, state: &CpuState, selector: u16) -> Option<Segment> {
    if selector & !3 == 0 {
        return (selector == 0).then(Segment::default);
    }
    let stack = read_descriptor(ram, state, selector)?;
    let attributes = stack.segment.attributes;
    if attributes & (CODE | WRITABLE) != WRITABLE || stack.segment.dpl() != 0 || selector & 3 != 0 {
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
    let paging = Paging::from(state);
    let mut bytes = [0; 8];
    if !paging.read(ram, address, &mut bytes) {
        return None;
    }
    let raw = u64::from_le_bytes(bytes);
    let attributes = (raw >> 40 & 0xf0ff) as u16;
    let limit = (raw & 0xffff | raw >> 32 & 0xf_0000) as u32;
    let limit = if attributes & GRANULARITY != 0 { limit << 12 | 0xfff } else { limit };
    let base = raw >> 16 & 0xff_ffff | raw >> 32 & 0xff00_0000;
    let segment = Segment { selector, attributes, limit, base };
    let usable = segment.present() && attributes & CODE_OR_DATA != 0;
    // A descriptor may lie in two pages.
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

/// The stack that a handler starts on: the current one, or one of the TSS's seven.
fn stack_for(ram: &GuestRam, state: &CpuState, interrupt_stack: u8) -> Option<u64> {
    if interrupt_stack == 0 {
        return Some(state.gpr[RSP]);
    }
    let offset = 0x24 + 8 * (u64::from(interrupt_stack) - 1);
    if offset + 7 > u64::from(state.tr.limit) {
        return None;
    }
    let mut stack = [0; 8];
    let address = state.tr.base.wrapping_add(offset);
    Paging::from(state)
        .read(ram, address, &mut stack)
        .then(|| u64::from_le_bytes(stack))
        .filter(|stack| is_canonical(*stack))
}

/// The mappings of a frame's first and last byte, which are two pages at most.
fn frame_mappings(ram: &GuestRam, state: &CpuState, top: u64) -> Option<[Mapping; 2]> {
    let paging = Paging::from(state);
    let last = top.wrapping_add(FRAME_BYTES as u64 - 1);
    let mappings = [paging.walk(ram, top)?, paging.walk(ram, last)?];
    let forbidden = |mapping: &Mapping| mapping.user && state.cr4 & CR4_SMAP != 0;
    let in_ram = mappings.iter().all(|mapping| is_ram(ram, mapping.physical, 1));
    (in_ram && !mappings.iter().any(forbidden) && is_canonical(top)).then_some(mappings)
}

/// Writes a frame at `top`, lowest word first; nothing if any of it cannot be written.
fn push_frame(ram: &GuestRam, state: &CpuState, top: u64, frame: &[u64; 5]) -> Option<()> {
    let paging = Paging::from(state);
    let mappings = frame_mappings(ram, state, top)?;
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

fn is_canonical(address: u64) -> bool {
    let sign_extended = ((address << 16) as i64 >> 16) as u64;
    sign_extended == address
}

#[cfg(test)]
mod tests {
    use super::deliver;
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
        let after = deliver(&ram, &state, 0x40, CODE).expect("it can be delivered");
        assert_eq!(after.rip, CODE + 0x800);
        let mut type_byte = [0];
        ram.read(SECOND_PAGE + 1, &mut type_byte);
        assert_eq!(type_byte, [0x9b]);
    }

    #[test]
    fn a_descriptor_that_cannot_be_marked_is_left_to_kvm() {
        let (ram, mut state) = split_descriptor(1);
        state.cr0 |= 1 << 16;
        assert_eq!(deliver(&ram, &state, 0x40, CODE), None);
        state.cr0 &= !(1 << 16);
        assert!(deliver(&ram, &state, 0x40, CODE).is_some());
    }
}
