//! IRET, IRETD and IRETQ.

use iced_x86::Code;
use reprise_trace::cpu_state::{CS, RSP, Segment};

use super::segment::{Descriptor, is_null, null_stack, rpl};
use crate::cpu::Cpu;
use crate::decode::op::Op;
use crate::fault::{Fault, Stop, vector};
use crate::flags;
use crate::mode::Mode;
use crate::ops::{BlockEnd, handler};

pub(super) fn select(op: &mut Op, _mode: Mode) -> Option<BlockEnd> {
    op.size = match op.instruction.code() {
        Code::Iretq => 8,
        Code::Iretd => 4,
        Code::Iretw => 2,
        _ => return None,
    };
    op.handler = interrupt_return;
    Some(BlockEnd::Branch)
}

/// The stack that a return to an outer level takes up.
pub(super) struct ReturnStack {
    pub(super) segment: Segment,
    pub(super) pointer: u64,
}

handler!(interrupt_return(cpu, op) {
    let size = u64::from(op.size);
    if cpu.protected() && cpu.rflags_rest & flags::NT != 0 {
        if cpu.long_mode() {
            return cpu.fault(Fault::GP0);
        }
        return cpu.unsupported("a return to another task in hardware (IRET with NT set)");
    }
    let rip = cpu.peek_far(0, size)?;
    let selector = cpu.peek_far(size, size)? as u16;
    let image = cpu.peek_far(2 * size, size)?;
    if !cpu.protected() {
        return cpu.return_in_real_mode(rip, selector, image, size);
    }
    if image & flags::VM != 0 && size == 4 && cpu.cpl == 0 && !cpu.long_mode() {
        return cpu.unsupported("virtual-8086 mode");
    }
    let writable = cpu.returned_flags(size);
    let code = cpu.return_code(selector)?;
    let target = code.segment(rpl(selector));
    let outer = rpl(selector) > cpu.cpl;
    let stack = if outer || cpu.mode_64() {
        let pointer = cpu.peek_far(3 * size, size)?;
        let stack = cpu.peek_far(4 * size, size)? as u16;
        Some(cpu.return_stack(stack, pointer, &target)?)
    } else {
        None
    };
    cpu.check_code_offset(&target, rip)?;
    cpu.mark_accessed(&code)?;
    cpu.finish_return(target, rip, stack, 3 * size);
    cpu.set_rflags(cpu.rflags() & !writable | image & writable);
    cpu.trace_return();
    Ok(())
});

impl Cpu {
    /// The flags that IRET takes from its image at the current privilege level.
    fn returned_flags(&self, size_bytes: u64) -> u64 {
        let mut writable = flags::ARITHMETIC | flags::TF | flags::DF | flags::NT;
        if size_bytes > 2 {
            writable |= flags::RF | flags::AC | flags::ID;
        }
        let iopl = (self.rflags_rest & flags::IOPL) >> 12;
        if u64::from(self.cpl) <= iopl {
            writable |= flags::IF;
        }
        if self.cpl == 0 {
            writable |= flags::IOPL;
        }
        writable
    }

    /// Reads and checks the code segment that a far return goes to.
    pub(super) fn return_code(&mut self, selector: u16) -> Result<Descriptor, Stop> {
        let code = self.code_descriptor(selector)?;
        let level = rpl(selector);
        let wrong_level =
            if code.is_conforming() { code.dpl() > level } else { code.dpl() != level };
        if level < self.cpl || wrong_level {
            return self.selector_fault(vector::GP, selector);
        }
        if !code.present() {
            return self.selector_fault(vector::NP, selector);
        }
        Ok(code)
    }

    /// Reads and checks the stack segment that a far return to `target` takes up.
    pub(super) fn return_stack(
        &mut self,
        selector: u16,
        pointer: u64,
        target: &Segment,
    ) -> Result<ReturnStack, Stop> {
        let level = rpl(target.selector);
        if is_null(selector) {
            let to_64 = self.long_mode() && target.long();
            if !to_64 || level == 3 || rpl(selector) != level {
                return self.fault(Fault::GP0);
            }
            return Ok(ReturnStack { segment: null_stack(selector, level), pointer });
        }
        let descriptor = self.stack_descriptor(selector, level, vector::GP)?;
        self.mark_accessed(&descriptor)?;
        Ok(ReturnStack { segment: descriptor.segment(level), pointer })
    }

    /// Goes on in `target`, all checks done: on `stack`, or on the present one with `popped` bytes
    /// less.
    pub(super) fn finish_return(
        &mut self,
        target: Segment,
        rip: u64,
        stack: Option<ReturnStack>,
        popped: u64,
    ) {
        let level = rpl(target.selector);
        let outer = level > self.cpl;
        match stack {
            None => {
                self.drop_stack(popped);
                self.enter_code(target, rip, level, None);
            }
            Some(ReturnStack { segment, pointer }) => {
                // 64-bit code pops a whole RSP whatever the new stack's width.
                let whole = self.mode_64() || segment.default_32();
                let pointer = if self.mode_64() { pointer } else { pointer & 0xffff_ffff };
                self.enter_code(target, rip, level, Some(segment));
                let rsp = &mut self.registers.gpr[RSP];
                *rsp = if whole { pointer } else { *rsp & !0xffff | pointer & 0xffff };
            }
        }
        if outer {
            self.drop_privileged_segments();
            self.update_mode();
        }
    }

    fn return_in_real_mode(
        &mut self,
        rip: u64,
        selector: u16,
        image: u64,
        size_bytes: u64,
    ) -> Result<(), Stop> {
        let code = self.real_mode_segment(CS, selector);
        self.check_code_offset(&code, rip)?;
        self.drop_stack(3 * size_bytes);
        self.enter_code(code, rip, 0, None);
        let mut writable =
            flags::ARITHMETIC | flags::TF | flags::DF | flags::NT | flags::IF | flags::IOPL;
        if size_bytes == 4 {
            writable |= flags::RF | flags::AC | flags::ID;
        }
        self.set_rflags(self.rflags() & !writable | image & writable);
        self.trace_return();
        Ok(())
    }
}
