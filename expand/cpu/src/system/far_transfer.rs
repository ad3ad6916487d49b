//! Far JMP, CALL and RET, direct and through call gates (Intel SDM volume 3A, 5.8).
//!
//! Task switches in hardware are not part of this machine: a far transfer to a TSS or a task gate ends
//! the run with a reason. (In long mode it raises #GP with the selector, on every CPU.)

use iced_x86::{Code, Instruction, OpKind};
use reprise_trace::cpu_state::{CS, RSP, SS};

use super::deliver::{Frame, Stack};
use super::segment::{Descriptor, TSS_AVAILABLE, is_null, rpl};
use crate::cpu::Cpu;
use crate::decode::op::{Handler, Op};
use crate::fault::{Fault, Stop, vector};
use crate::mode::Mode;
use crate::ops::{BlockEnd, handler};

/// System descriptor type: 16-bit call gate.
const CALL_GATE_16: u16 = 4;
/// System descriptor type: task gate.
const TASK_GATE: u16 = 5;
/// System descriptor type: available 16-bit TSS.
const TSS_16_AVAILABLE: u16 = 1;
/// System descriptor type: 32-bit call gate, or 64-bit call gate in long mode.
const CALL_GATE: u16 = 12;

pub(super) fn select(op: &mut Op, _mode: Mode) -> Option<BlockEnd> {
    let instruction = &*op.instruction;
    let (handler, size): (Handler, u8) = match instruction.code() {
        code if code.is_jmp_far() || code.is_jmp_far_indirect() => {
            (jump_far, offset_bytes(instruction))
        }
        code if code.is_call_far() || code.is_call_far_indirect() => {
            (call_far, offset_bytes(instruction))
        }
        Code::Retfq | Code::Retfq_imm16 => (return_far, 8),
        Code::Retfd | Code::Retfd_imm16 => (return_far, 4),
        Code::Retfw | Code::Retfw_imm16 => (return_far, 2),
        _ => return None,
    };
    op.size = size;
    op.handler = handler;
    Some(BlockEnd::Branch)
}

/// Bytes of a far pointer's offset.
fn offset_bytes(instruction: &Instruction) -> u8 {
    match instruction.op0_kind() {
        OpKind::FarBranch16 => 2,
        OpKind::FarBranch32 => 4,
        _ => instruction.memory_size().size() as u8 - 2,
    }
}

/// Where a far pointer points.
struct FarPointer {
    selector: u16,
    offset: u64,
}

fn far_pointer(cpu: &mut Cpu, op: &Op) -> Result<FarPointer, Stop> {
    let instruction = &op.instruction;
    let (selector, offset) = match instruction.op0_kind() {
        OpKind::FarBranch16 => {
            (instruction.far_branch_selector(), u64::from(instruction.far_branch16()))
        }
        OpKind::FarBranch32 => {
            (instruction.far_branch_selector(), u64::from(instruction.far_branch32()))
        }
        _ => {
            let size = u64::from(op.size);
            let linear = op.linear_address(cpu);
            let offset = cpu.load_sized(linear, op.segment, size)?;
            (cpu.load(cpu.wrap(linear.wrapping_add(size)), op.segment)?, offset)
        }
    };
    Ok(FarPointer { selector, offset })
}

handler!(jump_far(cpu, op) {
    let FarPointer { selector, offset } = far_pointer(cpu, op)?;
    if !cpu.protected() {
        let code = cpu.real_mode_segment(CS, selector);
        cpu.check_code_offset(&code, offset)?;
        cpu.enter_code(code, offset, 0, None);
        return Ok(());
    }
    let descriptor = cpu.far_descriptor(selector)?;
    let (code, offset) = if descriptor.is_code() {
        cpu.check_direct_target(&descriptor)?;
        (descriptor, offset)
    } else {
        let gate = cpu.call_gate(&descriptor)?;
        if !gate.code.is_conforming() && gate.code.dpl() != cpu.cpl {
            return cpu.selector_fault(vector::GP, gate.code.selector);
        }
        (gate.code, gate.offset)
    };
    let target = code.segment(cpu.cpl);
    cpu.check_code_offset(&target, offset)?;
    cpu.mark_accessed(&code)?;
    cpu.enter_code(target, offset, cpu.cpl, None);
    Ok(())
});

handler!(call_far(cpu, op) {
    let FarPointer { selector, offset } = far_pointer(cpu, op)?;
    let size = u64::from(op.size);
    let return_rip = op.next_rip(cpu);
    if !cpu.protected() {
        let code = cpu.real_mode_segment(CS, selector);
        cpu.check_code_offset(&code, offset)?;
        let pointer = cpu.push_return(return_rip, size, cpu.present_stack(false))?;
        cpu.enter_code(code, offset, 0, None);
        cpu.registers.gpr[RSP] = pointer;
        return cpu.stored();
    }
    let descriptor = cpu.far_descriptor(selector)?;
    if !descriptor.is_code() {
        let gate = cpu.call_gate(&descriptor)?;
        cpu.call_through(&gate, return_rip)?;
        return cpu.stored();
    }
    cpu.check_direct_target(&descriptor)?;
    let target = descriptor.segment(cpu.cpl);
    cpu.check_code_offset(&target, offset)?;
    cpu.mark_accessed(&descriptor)?;
    let pointer = cpu.push_return(return_rip, size, cpu.present_stack(cpu.mode_64()))?;
    cpu.enter_code(target, offset, cpu.cpl, None);
    cpu.registers.gpr[RSP] = pointer;
    cpu.stored()
});

handler!(return_far(cpu, op) {
    let size = u64::from(op.size);
    let released = match op.instruction.op_count() {
        0 => 0,
        _ => u64::from(op.instruction.immediate16()),
    };
    let rip = cpu.peek_far(0, size)?;
    let selector = cpu.peek_far(size, size)? as u16;
    if !cpu.protected() {
        let code = cpu.real_mode_segment(CS, selector);
        cpu.check_code_offset(&code, rip)?;
        cpu.drop_stack(2 * size + released);
        cpu.enter_code(code, rip, 0, None);
        return Ok(());
    }
    let code = cpu.return_code(selector)?;
    let target = code.segment(rpl(selector));
    let stack = if rpl(selector) > cpu.cpl {
        let pointer = cpu.peek_far(2 * size + released, size)?;
        let stack = cpu.peek_far(3 * size + released, size)? as u16;
        Some(cpu.return_stack(stack, pointer.wrapping_add(released), &target)?)
    } else {
        None
    };
    cpu.check_code_offset(&target, rip)?;
    cpu.mark_accessed(&code)?;
    cpu.finish_return(target, rip, stack, 2 * size + released);
    Ok(())
});

/// A call gate and the code segment behind it.
struct CallGate {
    code: Descriptor,
    offset: u64,
    /// Bytes of each value pushed.
    push_bytes: u64,
    /// Values that an inner call copies from the caller's stack.
    parameters: u64,
}

impl Cpu {
    fn far_descriptor(&mut self, selector: u16) -> Result<Descriptor, Stop> {
        if is_null(selector) {
            return self.fault(Fault::GP0);
        }
        let descriptor = self.descriptor(selector, vector::GP)?;
        let ambiguous = self.long_mode() && descriptor.is_long() && descriptor.default_32();
        if descriptor.is_code() && ambiguous {
            return self.selector_fault(vector::GP, selector);
        }
        Ok(descriptor)
    }

    /// Checks the code segment of a direct far jump or call.
    fn check_direct_target(&mut self, code: &Descriptor) -> Result<(), Stop> {
        let allowed = if code.is_conforming() {
            code.dpl() <= self.cpl
        } else {
            rpl(code.selector) <= self.cpl && code.dpl() == self.cpl
        };
        if !allowed {
            return self.selector_fault(vector::GP, code.selector);
        }
        if !code.present() {
            return self.selector_fault(vector::NP, code.selector);
        }
        Ok(())
    }

    /// Reads a call gate, all checks done but those on the privilege change.
    fn call_gate(&mut self, gate: &Descriptor) -> Result<CallGate, Stop> {
        let long = self.long_mode();
        let selector = gate.selector;
        let push_bytes = match gate.kind() {
            CALL_GATE if gate.is_system() => {
                if long {
                    8
                } else {
                    4
                }
            }
            CALL_GATE_16 if gate.is_system() && !long => 2,
            TASK_GATE | TSS_AVAILABLE | TSS_16_AVAILABLE if gate.is_system() && !long => 0,
            _ => return self.selector_fault(vector::GP, selector),
        };
        if gate.dpl() < self.cpl || gate.dpl() < rpl(selector) {
            return self.selector_fault(vector::GP, selector);
        }
        if !gate.present() {
            return self.selector_fault(vector::NP, selector);
        }
        if push_bytes == 0 {
            return self.unsupported("a task switch in hardware (a far jump or call to a task)");
        }
        let mut offset = gate.raw & 0xffff | gate.raw >> 32 & 0xffff_0000;
        let mut parameters = gate.raw >> 32 & 0x1f;
        if long {
            self.descriptor_of_size(selector, vector::GP, 16)?;
            let upper: u64 = self.load_system(self.wrap(gate.address.wrapping_add(8)))?;
            if upper >> 40 & 0x1f != 0 {
                return self.selector_fault(vector::GP, selector);
            }
            offset |= upper << 32;
            parameters = 0;
        } else if push_bytes == 2 {
            offset &= 0xffff;
        }
        let code = self.code_descriptor((gate.raw >> 16) as u16)?;
        if code.dpl() > self.cpl || long && !code.is_long() {
            return self.selector_fault(vector::GP, code.selector);
        }
        if !code.present() {
            return self.selector_fault(vector::NP, code.selector);
        }
        Ok(CallGate { code, offset, push_bytes, parameters })
    }

    /// Calls through a gate, to a more privileged level if its code segment is that.
    fn call_through(&mut self, gate: &CallGate, return_rip: u64) -> Result<(), Stop> {
        let cpl = if gate.code.is_conforming() { self.cpl } else { gate.code.dpl() };
        let target = gate.code.segment(cpl);
        self.check_code_offset(&target, gate.offset)?;
        if cpl == self.cpl {
            let stack = self.present_stack(self.long_mode());
            let pointer = self.push_return(return_rip, gate.push_bytes, stack)?;
            self.mark_accessed(&gate.code)?;
            self.enter_code(target, gate.offset, cpl, None);
            self.registers.gpr[RSP] = pointer;
            return Ok(());
        }
        let stack = self.inner_stack(cpl)?;
        let mut frame = Frame::new();
        frame.push(u64::from(self.system.segments[SS].selector));
        frame.push(self.registers.gpr[RSP]);
        for parameter in (0..gate.parameters).rev() {
            frame.push(self.peek_far(parameter * gate.push_bytes, gate.push_bytes)?);
        }
        frame.push(u64::from(self.system.segments[CS].selector));
        frame.push(return_rip);
        let pointer = self.write_frame(&stack, &frame, gate.push_bytes, cpl)?;
        self.mark_accessed(&gate.code)?;
        self.enter_code(target, gate.offset, cpl, Some(stack.segment));
        self.registers.gpr[RSP] = pointer;
        Ok(())
    }

    /// The stack in use; `wide` if its segment's base and limit do not count.
    fn present_stack(&self, wide: bool) -> Stack {
        let pointer = self.registers.gpr[RSP];
        Stack { segment: self.system.segments[SS], pointer, switched: false, wide }
    }

    /// Writes CS and the return address below the top of `stack`; RSP after it.
    fn push_return(&mut self, rip: u64, size_bytes: u64, stack: Stack) -> Result<u64, Stop> {
        let mut frame = Frame::new();
        frame.push(u64::from(self.system.segments[CS].selector));
        frame.push(rip);
        self.write_frame(&stack, &frame, size_bytes, self.cpl)
    }
}
