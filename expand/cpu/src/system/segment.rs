//! Segment descriptors, the checks of loading them into segment registers, and the checks of
//! accesses through them (Intel SDM volume 3A, chapters 3 and 5).
#![allow(unsafe_code)]

use iced_x86::{InstructionInfoFactory, OpAccess};
use reprise_trace::cpu_state::{CS, DS, ES, FS, GS, SS, Segment};

use crate::cpu::{CR0_PE, Cpu, NO_SEGMENT};
use crate::decode::op::Op;
use crate::fault::{Fault, Flow, Stop, vector};

/// System descriptor type: local descriptor table.
pub(crate) const LOCAL_TABLE: u16 = 2;
/// System descriptor type: available 32-bit TSS, or 64-bit TSS in long mode.
pub(crate) const TSS_AVAILABLE: u16 = 9;
/// The type bit that makes a TSS busy.
pub(crate) const TSS_BUSY_BIT: u16 = 2;
/// The type bit that says that a code or data segment has been loaded.
const ACCESSED: u16 = 1;
/// The type bit of writable data and of readable code.
const WRITABLE_OR_READABLE: u16 = 2;
/// The type bit of expand-down data and of conforming code.
const DOWN_OR_CONFORMING: u16 = 4;
/// The type bit of code.
const CODE: u16 = 8;
/// Code or data, as opposed to a system descriptor.
const NOT_SYSTEM: u16 = 1 << 4;
/// The attributes that [`Segment::attributes`] keeps: all but the limit's bits 16-19.
const ATTRIBUTES: u16 = 0xf0ff;

/// A selector as error codes have it: without its RPL.
pub(crate) fn selector_code(selector: u16) -> u32 {
    u32::from(selector & !3)
}

/// Whether a selector is null, whatever its RPL.
pub(crate) fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

/// A selector's requested privilege level.
pub(crate) fn rpl(selector: u16) -> u8 {
    (selector & 3) as u8
}

/// A segment descriptor in its table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    pub(crate) selector: u16,
    /// Linear address of its eight bytes.
    pub(crate) address: u64,
    pub(crate) raw: u64,
}

impl Descriptor {
    pub(crate) fn attributes(&self) -> u16 {
        (self.raw >> 40) as u16 & ATTRIBUTES
    }

    pub(crate) fn dpl(&self) -> u8 {
        (self.raw >> 45 & 3) as u8
    }

    pub(crate) fn present(&self) -> bool {
        self.raw >> 47 & 1 != 0
    }

    pub(crate) fn is_system(&self) -> bool {
        self.attributes() & NOT_SYSTEM == 0
    }

    /// The four type bits.
    pub(crate) fn kind(&self) -> u16 {
        self.attributes() & 0xf
    }

    pub(crate) fn is_code(&self) -> bool {
        !self.is_system() && self.kind() & CODE != 0
    }

    pub(crate) fn is_conforming(&self) -> bool {
        self.is_code() && self.kind() & DOWN_OR_CONFORMING != 0
    }

    pub(crate) fn is_readable(&self) -> bool {
        !self.is_system() && (!self.is_code() || self.kind() & WRITABLE_OR_READABLE != 0)
    }

    pub(crate) fn is_writable(&self) -> bool {
        !self.is_system() && !self.is_code() && self.kind() & WRITABLE_OR_READABLE != 0
    }

    /// The L bit: 64-bit code.
    pub(crate) fn is_long(&self) -> bool {
        self.raw >> 53 & 1 != 0
    }

    /// The D/B bit.
    pub(crate) fn default_32(&self) -> bool {
        self.raw >> 54 & 1 != 0
    }

    pub(crate) fn base(&self) -> u64 {
        self.raw >> 16 & 0xff_ffff | self.raw >> 32 & 0xff00_0000
    }

    /// The last valid offset, granularity applied.
    pub(crate) fn limit(&self) -> u32 {
        let limit = (self.raw & 0xffff | self.raw >> 32 & 0xf_0000) as u32;
        if self.raw >> 55 & 1 != 0 { limit << 12 | 0xfff } else { limit }
    }

    /// The segment register that this descriptor gives, with a selector of privilege level `cpl`.
    pub(crate) fn segment(&self, cpl: u8) -> Segment {
        let accessed = if self.is_system() { 0 } else { ACCESSED };
        Segment {
            selector: self.selector & !3 | u16::from(cpl),
            attributes: self.attributes() | accessed,
            limit: self.limit(),
            base: self.base(),
        }
    }
}

/// What a null selector leaves in a segment register; `base` counts for FS and GS only.
pub(crate) fn null_segment(selector: u16) -> Segment {
    Segment { selector, ..Segment::default() }
}

/// SS as a change to privilege level `cpl` in long mode leaves it: null, but still telling the level.
pub(crate) fn null_stack(selector: u16, cpl: u8) -> Segment {
    Segment { selector, attributes: u16::from(cpl) << 5, ..Segment::default() }
}

/// Whether `size_bytes` (at least one) at `offset` lie within a segment's limit.
pub(crate) fn within_limit(segment: &Segment, offset: u64, size_bytes: u64) -> bool {
    let last = offset + (size_bytes - 1);
    let limit = u64::from(segment.limit);
    let expands_down = segment.attributes & (NOT_SYSTEM | CODE | DOWN_OR_CONFORMING)
        == NOT_SYSTEM | DOWN_OR_CONFORMING;
    if expands_down {
        let top = if segment.default_32() { 0xffff_ffff } else { 0xffff };
        offset > limit && last <= top
    } else {
        last <= limit
    }
}

impl Cpu {
    /// Raises a fault whose error code is a selector.
    pub(crate) fn selector_fault<T>(&mut self, vector: u8, selector: u16) -> Result<T, Stop> {
        self.fault(Fault::with_code(vector, selector_code(selector)))
    }

    /// Protected mode, that is not real mode.
    pub(crate) fn protected(&self) -> bool {
        self.system.cr0 & CR0_PE != 0
    }

    /// Reads the descriptor that a selector which is not null names.
    ///
    /// # Errors
    /// `vector` with the selector if it lies outside its table.
    pub(crate) fn descriptor(&mut self, selector: u16, vector: u8) -> Result<Descriptor, Stop> {
        self.descriptor_of_size(selector, vector, 8)
    }

    pub(crate) fn descriptor_of_size(
        &mut self,
        selector: u16,
        vector: u8,
        size_bytes: u64,
    ) -> Result<Descriptor, Stop> {
        let (base, limit, there) = if selector & 4 == 0 {
            let table = &self.system.gdtr;
            (table.base, u64::from(table.limit), true)
        } else {
            let table = &self.system.ldtr;
            (table.base, u64::from(table.limit), table.present())
        };
        let offset = u64::from(selector & !7);
        if !there || offset + size_bytes - 1 > limit {
            return self.selector_fault(vector, selector);
        }
        let address = self.wrap(base.wrapping_add(offset));
        let raw = self.load_system(address)?;
        Ok(Descriptor { selector, address, raw })
    }

    /// Sets a code or data descriptor's accessed bit in memory, as loading it does.
    pub(crate) fn mark_accessed(&mut self, descriptor: &Descriptor) -> Result<(), Stop> {
        if descriptor.kind() & ACCESSED != 0 {
            return Ok(());
        }
        let type_byte = (descriptor.raw >> 40) as u8 | ACCESSED as u8;
        self.store_system(self.wrap(descriptor.address.wrapping_add(5)), type_byte)
    }

    /// What loading `selector` into segment register `index` (any but CS) makes of it, all checks
    /// done. Nothing is loaded yet.
    pub(crate) fn prepare_segment(&mut self, index: usize, selector: u16) -> Result<Segment, Stop> {
        if !self.protected() {
            return Ok(self.real_mode_segment(index, selector));
        }
        if index == SS {
            return self.prepare_moved_stack(selector);
        }
        if is_null(selector) {
            return Ok(null_segment(selector));
        }
        let descriptor = self.descriptor(selector, vector::GP)?;
        let privileged = !descriptor.is_conforming()
            && (rpl(selector) > descriptor.dpl() || self.cpl > descriptor.dpl());
        if !descriptor.is_readable() || privileged {
            return self.selector_fault(vector::GP, selector);
        }
        if !descriptor.present() {
            return self.selector_fault(vector::NP, selector);
        }
        self.mark_accessed(&descriptor)?;
        Ok(descriptor.segment(rpl(selector)))
    }

    /// In real mode a selector is the base in paragraphs; the limit stays as it was.
    pub(crate) fn real_mode_segment(&self, index: usize, selector: u16) -> Segment {
        const PRESENT_WRITABLE_DATA: u16 = 0x93;
        let before = &self.system.segments[index];
        Segment {
            selector,
            attributes: before.attributes & 0xf000 | PRESENT_WRITABLE_DATA,
            limit: before.limit,
            base: u64::from(selector) << 4,
        }
    }

    fn prepare_moved_stack(&mut self, selector: u16) -> Result<Segment, Stop> {
        let cpl = self.cpl;
        if is_null(selector) {
            let allowed = self.mode_64() && cpl < 3 && rpl(selector) == cpl;
            return if allowed { Ok(null_stack(selector, cpl)) } else { self.fault(Fault::GP0) };
        }
        let descriptor = self.stack_descriptor(selector, cpl, vector::GP)?;
        self.mark_accessed(&descriptor)?;
        Ok(descriptor.segment(cpl))
    }

    /// Reads the descriptor of a stack segment for privilege level `cpl`.
    ///
    /// # Errors
    /// `vector` with the selector for a segment that is none, #SS if it is not present.
    pub(crate) fn stack_descriptor(
        &mut self,
        selector: u16,
        cpl: u8,
        vector: u8,
    ) -> Result<Descriptor, Stop> {
        let descriptor = self.descriptor(selector, vector)?;
        if rpl(selector) != cpl || !descriptor.is_writable() || descriptor.dpl() != cpl {
            return self.selector_fault(vector, selector);
        }
        if !descriptor.present() {
            return self.selector_fault(vector::SS, selector);
        }
        Ok(descriptor)
    }

    /// Reads the descriptor of a code segment. Privileges and presence are the caller's to check.
    ///
    /// # Errors
    /// #GP for a null selector or anything but code.
    pub(crate) fn code_descriptor(&mut self, selector: u16) -> Result<Descriptor, Stop> {
        if is_null(selector) {
            return self.fault(Fault::GP0);
        }
        let descriptor = self.descriptor(selector, vector::GP)?;
        let ambiguous = self.long_mode() && descriptor.is_long() && descriptor.default_32();
        if !descriptor.is_code() || ambiguous {
            return self.selector_fault(vector::GP, selector);
        }
        Ok(descriptor)
    }

    /// Drops the data segments that a return to a less privileged level must not leave usable.
    pub(crate) fn drop_privileged_segments(&mut self) {
        for index in [ES, DS, FS, GS] {
            let segment = &mut self.system.segments[index];
            let conforming_code =
                segment.attributes & (CODE | DOWN_OR_CONFORMING) == CODE | DOWN_OR_CONFORMING;
            if segment.present() && !conforming_code && segment.dpl() < self.cpl {
                let base = if matches!(index, FS | GS) { segment.base } else { 0 };
                *segment = Segment { base, ..Segment::default() };
            }
        }
    }

    /// Loads a segment register with what [`Cpu::prepare_segment`] gave.
    pub(crate) fn set_segment(&mut self, index: usize, segment: Segment) {
        self.system.segments[index] = segment;
        self.update_mode();
    }

    /// The linear address of `size_bytes` at `offset` in a segment, its limit and rights checked
    /// where the mode has any.
    #[inline(always)]
    pub(crate) fn segment_address(
        &mut self,
        segment: u8,
        offset: u64,
        size_bytes: u64,
        write: bool,
    ) -> Result<u64, Stop> {
        if self.mode.checks(segment) {
            self.check_segment(segment, offset, size_bytes, write)?;
        }
        let base = self.registers.segment_base[usize::from(segment & 7)];
        Ok(self.wrap(base.wrapping_add(offset)))
    }

    /// Checks an access against its segment's limit and rights.
    #[cold]
    #[inline(never)]
    pub(crate) fn check_segment(
        &mut self,
        index: u8,
        offset: u64,
        size_bytes: u64,
        write: bool,
    ) -> Result<(), Stop> {
        if index >= NO_SEGMENT || size_bytes == 0 {
            return Ok(());
        }
        let index = usize::from(index);
        let segment = &self.system.segments[index];
        let rights = segment.attributes & (CODE | WRITABLE_OR_READABLE);
        let right = if write { rights == WRITABLE_OR_READABLE } else { rights != CODE };
        let usable = !self.protected() || segment.present() && right;
        if usable && within_limit(segment, offset, size_bytes) {
            return Ok(());
        }
        self.fault(if index == SS { Fault::SS0 } else { Fault::GP0 })
    }

    /// Whether an offset may be executed in a code segment that is about to be loaded.
    pub(crate) fn check_code_offset(&mut self, code: &Segment, rip: u64) -> Result<(), Stop> {
        let fits = if self.long_mode() && code.long() {
            crate::memory::walk::canonical(rip)
        } else {
            rip <= u64::from(code.limit)
        };
        if fits { Ok(()) } else { self.fault(Fault::GP0) }
    }

    /// Goes on at `rip` in `code` at privilege level `cpl`; `stack` is the new SS, if it changes.
    pub(crate) fn enter_code(&mut self, code: Segment, rip: u64, cpl: u8, stack: Option<Segment>) {
        self.system.segments[CS] = code;
        if let Some(stack) = stack {
            self.system.segments[SS] = stack;
        }
        self.cpl = cpl;
        self.update_mode();
        self.rip = rip;
    }
}

/// In a segmented mode: checks the memory operand against its segment, then runs the operation's inner handler.
pub(crate) extern "sysv64" fn checked(cpu: &mut Cpu, op: &Op) -> Flow {
    if let Err(stop) = check_operand(cpu, op) {
        return Flow::from(Err(stop));
    }
    // SAFETY: `inner` is the handler that `ops::select` chose for this very operation.
    unsafe { (op.instruction.inner)(cpu, op) }
}

fn check_operand(cpu: &mut Cpu, op: &Op) -> Result<(), Stop> {
    let size_bytes = match op.operand_bytes {
        0 => op.instruction.memory_size().size() as u64,
        operand_bytes => u64::from(operand_bytes),
    };
    let (reads, writes) = match (op.reads, op.writes) {
        (false, false) => accesses(op),
        known => known,
    };
    let offset = op.effective_address(cpu);
    if reads || writes { cpu.check_segment(op.segment, offset, size_bytes, writes) } else { Ok(()) }
}

/// Whether the instruction reads and writes its memory operand.
fn accesses(op: &Op) -> (bool, bool) {
    let mut factory = InstructionInfoFactory::new();
    let mut reads = false;
    let mut writes = false;
    for memory in factory.info(&op.instruction).used_memory() {
        match memory.access() {
            OpAccess::Read | OpAccess::CondRead => reads = true,
            OpAccess::Write | OpAccess::CondWrite => writes = true,
            OpAccess::ReadWrite | OpAccess::ReadCondWrite => (reads, writes) = (true, true),
            OpAccess::None | OpAccess::NoMemAccess => {}
        }
    }
    (reads, writes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::Machine;

    #[test]
    fn null_segments_leave_everything_else_unchecked() {
        let mut machine = Machine::flat_32(&[]);
        assert!((0..6).all(|segment| !machine.cpu.mode.checks(segment)));
        for index in [ES, DS, FS, GS] {
            let before = machine.cpu.system.segments[index];
            machine.cpu.set_segment(index, null_segment(0));
            for other in 0..6 {
                assert_eq!(machine.cpu.mode.checks(other as u8), other == index, "{index} {other}");
            }
            machine.cpu.set_segment(index, before);
        }
        machine.cpu.set_segment(GS, Segment { limit: 0xfff, ..machine.cpu.system.segments[DS] });
        assert!((0..6).all(|segment| machine.cpu.mode.checks(segment)));
    }
}
