//! Exceptions and interrupts through the IDT (Intel SDM volume 3A, chapter 6).
//!
//! Delivery is atomic: everything that can fault comes before the first register changes. A fault
//! amid a delivery becomes the next event, or a double fault, or ends the machine.

use reprise_trace::cpu_state::{CS, RSP, SS, Segment};
use reprise_trace::instructions::Delivery;
use reprise_trace::instructions::SystemAccessKind::FrameWrite;
use serde::{Deserialize, Serialize};

use super::segment::{Descriptor, is_null, null_stack, selector_code, within_limit};
use crate::cpu::Cpu;
use crate::execute::TripleFault;
use crate::fault::{Fault, Stop, vector};
use crate::flags;
use crate::memory::Page;
use crate::memory::physical::PAGE_BYTES;
use crate::memory::walk::canonical;

/// Where an event comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// An interrupt from the board.
    External,
    /// A fault or trap that the CPU itself raised, or INT1.
    Exception,
    /// INT n, INT3 or INTO: the gate's DPL is checked.
    Software,
}

/// Something to be delivered through the IDT.
#[derive(Clone, Copy, Debug)]
pub(super) struct Event {
    pub(super) vector: u8,
    pub(super) error_code: Option<u32>,
    pub(super) source: Source,
    /// The RIP that the handler returns to.
    pub(super) return_rip: u64,
    /// RFLAGS as the handler finds it on its stack.
    pub(super) rflags: u64,
}

impl Event {
    /// What a trace calls it.
    fn kind(&self) -> Delivery {
        match self.source {
            Source::External if self.vector == vector::NMI => Delivery::NonMaskable,
            Source::External => Delivery::Interrupt,
            Source::Exception => Delivery::Exception,
            Source::Software => Delivery::Software,
        }
    }
}

/// An error code's bit that says that the event was not caused by the program.
const EXTERNAL: u32 = 1;
/// An error code's bit that says that its index is a vector.
const IN_IDT: u32 = 2;

/// A gate of the IDT, and the code segment behind it.
struct Gate {
    code: Descriptor,
    offset: u64,
    /// An interrupt gate: it clears IF.
    masks_interrupts: bool,
    /// Which of the TSS's interrupt stacks to use; zero for none.
    interrupt_stack: u8,
    /// Bytes of each value pushed.
    push_bytes: u64,
    /// The privilege level that the handler runs at.
    cpl: u8,
}

/// Exceptions in a row, and the tick at which they came: a fault retires nothing.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct ExceptionRun {
    tick: u64,
    count: u32,
}

impl ExceptionRun {
    pub(crate) const NONE: Self = Self { tick: u64::MAX, count: 0 };
    /// A guest whose handlers only fault again never gets further, and its time stands still. Real
    /// ones need a handful; this many take a fraction of a second.
    const MAX: u32 = 1 << 20;
}

/// Where a handler's frame goes.
pub(super) struct Stack {
    pub(super) segment: Segment,
    pub(super) pointer: u64,
    /// The stack is another than the interrupted code's.
    pub(super) switched: bool,
    /// 64-bit: the segment's base and limit do not count.
    pub(super) wide: bool,
}

impl Cpu {
    /// Delivers a fault, or a trap whose instruction has retired; RIP is what the handler returns to.
    ///
    /// # Errors
    /// If delivery ends in a triple fault. The state is then that of the first event.
    pub(crate) fn deliver_exception(&mut self, fault: Fault) -> Result<(), TripleFault> {
        let before = self.exceptions;
        let count = if before.tick == self.tick { before.count + 1 } else { 1 };
        if count > ExceptionRun::MAX {
            let what = "exceptions whose handlers only raise more of them, without end";
            let _: Result<(), Stop> = self.unsupported(what);
            return Err(TripleFault);
        }
        self.exceptions = ExceptionRun { tick: self.tick, count };
        let event = self.exception(fault);
        self.deliver(event)
    }

    /// Whether an exception has been taken and nothing has retired since: another run that stops at
    /// this tick may stand before it.
    #[inline(always)]
    pub(crate) fn amid_exceptions(&self) -> bool {
        self.exceptions.tick == self.tick
    }

    /// Delivers an interrupt from the board.
    ///
    /// # Errors
    /// If delivery ends in a triple fault.
    pub(crate) fn deliver_interrupt(&mut self, vector: u8) -> Result<(), TripleFault> {
        let delivered = self.deliver(Event {
            vector,
            error_code: None,
            source: Source::External,
            return_rip: self.rip,
            rflags: self.rflags(),
        });
        if self.memory.physical.code_was_written() {
            self.drop_overwritten_code();
        }
        delivered
    }

    /// The event that a fault is. Faults set RF in the image, so that a breakpoint on the
    /// instruction does not hit again when it restarts; the debug exception leaves that to its
    /// handler, and what has no way back (#DF) and what is a trap leaves it alone.
    fn exception(&mut self, fault: Fault) -> Event {
        if let Some(address) = fault.page_fault_address {
            self.system.cr2 = address;
        }
        let restarts = !matches!(fault.vector, vector::DB | vector::DF | vector::BP | vector::OF);
        Event {
            vector: fault.vector,
            error_code: fault.error_code,
            source: Source::Exception,
            return_rip: self.rip,
            rflags: self.rflags() | if restarts { flags::RF } else { 0 },
        }
    }

    /// Does to memory what delivering `fault` to its handler does, and nothing to the registers.
    ///
    /// # Errors
    /// What delivering it would raise.
    pub(super) fn leave_frame_of(&mut self, fault: Fault) -> Result<(), Stop> {
        let event = self.exception(fault);
        let gate = self.read_gate(&event)?;
        let stack = self.handler_stack(&gate)?;
        let frame = self.frame_of(&event, &stack);
        self.write_frame(&stack, &frame, gate.push_bytes, gate.cpl)?;
        self.mark_accessed(&gate.code)
    }

    /// What the handler of `event` finds on its stack.
    fn frame_of(&self, event: &Event, stack: &Stack) -> Frame {
        let mut frame = Frame::new();
        if stack.switched || self.long_mode() {
            frame.push(u64::from(self.system.segments[SS].selector));
            frame.push(self.registers.gpr[RSP]);
        }
        frame.push(event.rflags);
        frame.push(u64::from(self.system.segments[CS].selector));
        frame.push(event.return_rip);
        if let Some(error_code) = event.error_code {
            frame.push(u64::from(error_code));
        }
        frame
    }

    fn deliver(&mut self, mut event: Event) -> Result<(), TripleFault> {
        while let Err(stop) = self.deliver_event(&event) {
            if stop == Stop::Exit {
                // There is a reason why the event cannot be delivered: whoever sees the machine end
                // finds it in `pending_exit`.
                return Err(TripleFault);
            }
            let fault = self.pending_fault;
            let next = self.exception(fault);
            event = match (class(&event), class(&next)) {
                (Class::DoubleFault, _) => return Err(TripleFault),
                (Class::Contributory, Class::Contributory)
                | (Class::PageFault, Class::Contributory | Class::PageFault) => {
                    self.exception(Fault::with_code(vector::DF, 0))
                }
                _ => next,
            };
        }
        Ok(())
    }

    /// Delivers one event, or raises the fault that this leads to and changes nothing.
    pub(super) fn deliver_event(&mut self, event: &Event) -> Result<(), Stop> {
        let returns_to = self.linear_rip(event.return_rip);
        let delivered = if self.protected() {
            self.deliver_protected(event)
        } else {
            self.deliver_real_mode(event)
        };
        if delivered.is_ok() {
            let debug = event.vector == vector::DB && event.source == Source::Exception;
            self.debug_exceptions += u64::from(debug);
            self.trace_delivery(event.kind(), (event.vector, event.error_code), returns_to);
        }
        if delivered == Err(Stop::Fault) && event.source != Source::Software {
            self.mark_external();
        }
        delivered
    }

    /// Sets EXT in the pending fault's error code, where it has a selector or vector.
    fn mark_external(&mut self) {
        use vector::{GP, NP, SS, TS};
        if let Fault { vector: TS | NP | SS | GP, error_code: Some(code), .. } =
            &mut self.pending_fault
        {
            *code |= EXTERNAL;
        }
    }

    fn deliver_protected(&mut self, event: &Event) -> Result<(), Stop> {
        let gate = self.read_gate(event)?;
        let code = gate.code.segment(gate.cpl);
        self.check_code_offset(&code, gate.offset)?;
        let stack = self.handler_stack(&gate)?;
        let frame = self.frame_of(event, &stack);
        let pointer = self.write_frame(&stack, &frame, gate.push_bytes, gate.cpl)?;
        self.mark_accessed(&gate.code)?;

        let mut cleared = flags::TF | flags::NT | flags::RF | flags::VM;
        if gate.masks_interrupts {
            cleared |= flags::IF;
        }
        if event.vector == vector::DB && event.source == Source::Exception {
            self.disable_general_detect();
        }
        self.interrupt_shadow = false;
        self.enter_code(code, gate.offset, gate.cpl, stack.switched.then_some(stack.segment));
        self.registers.gpr[RSP] = pointer;
        self.set_rflags(self.rflags() & !cleared);
        Ok(())
    }

    /// Reads the event's gate and the code segment that it names, all privileges checked.
    fn read_gate(&mut self, event: &Event) -> Result<Gate, Stop> {
        const TASK: u64 = 0x5;
        const INTERRUPT_16: u64 = 0x6;
        const TRAP_16: u64 = 0x7;
        const INTERRUPT: u64 = 0xe;
        const TRAP: u64 = 0xf;
        let gate_code = u32::from(event.vector) << 3 | IN_IDT;
        let entry_bytes = if self.long_mode() { 16 } else { 8 };
        let offset = u64::from(event.vector) * entry_bytes;
        let table = self.system.idtr;
        if offset + entry_bytes - 1 > u64::from(table.limit) {
            return self.fault(Fault::with_code(vector::GP, gate_code));
        }
        let address = self.wrap(table.base.wrapping_add(offset));
        let raw: u64 = self.load_system(address)?;
        let kind = raw >> 40 & 0x1f;
        let push_bytes = match kind {
            INTERRUPT | TRAP if self.long_mode() => 8,
            INTERRUPT | TRAP => 4,
            INTERRUPT_16 | TRAP_16 if !self.long_mode() => 2,
            TASK if !self.long_mode() => 0,
            _ => return self.fault(Fault::with_code(vector::GP, gate_code)),
        };
        let dpl = (raw >> 45 & 3) as u8;
        if event.source == Source::Software && self.cpl > dpl {
            return self.fault(Fault::with_code(vector::GP, gate_code));
        }
        if raw >> 47 & 1 == 0 {
            return self.fault(Fault::with_code(vector::NP, gate_code));
        }
        if kind == TASK {
            return self.unsupported("a task switch in hardware (a task gate in the IDT)");
        }
        let mut offset = raw & 0xffff | raw >> 32 & 0xffff_0000;
        if push_bytes == 2 {
            offset &= 0xffff;
        }
        if self.long_mode() {
            let upper: u64 = self.load_system(self.wrap(address.wrapping_add(8)))?;
            offset |= upper << 32;
        }
        let (code, cpl) = self.handler_code((raw >> 16) as u16)?;
        Ok(Gate {
            code,
            offset,
            masks_interrupts: matches!(kind, INTERRUPT | INTERRUPT_16),
            interrupt_stack: if self.long_mode() { (raw >> 32 & 7) as u8 } else { 0 },
            push_bytes,
            cpl,
        })
    }

    /// The code segment behind a gate, and the privilege level that it runs at.
    fn handler_code(&mut self, selector: u16) -> Result<(Descriptor, u8), Stop> {
        let code = self.code_descriptor(selector)?;
        let wrong_size = self.long_mode() && !code.is_long();
        if code.dpl() > self.cpl || wrong_size {
            return self.selector_fault(vector::GP, selector);
        }
        if !code.present() {
            return self.selector_fault(vector::NP, selector);
        }
        let cpl = if code.is_conforming() { self.cpl } else { code.dpl() };
        Ok((code, cpl))
    }

    fn handler_stack(&mut self, gate: &Gate) -> Result<Stack, Stop> {
        let inner = gate.cpl != self.cpl;
        let mut stack = if gate.interrupt_stack != 0 {
            let pointer = self.task_stack_64(0x24 + 8 * (u64::from(gate.interrupt_stack) - 1))?;
            let segment = if inner {
                null_stack(u16::from(gate.cpl), gate.cpl)
            } else {
                self.system.segments[SS]
            };
            Stack { segment, pointer, switched: inner, wide: true }
        } else if inner {
            self.inner_stack(gate.cpl)?
        } else {
            let pointer = self.registers.gpr[RSP];
            Stack {
                segment: self.system.segments[SS],
                pointer,
                switched: false,
                wide: self.long_mode(),
            }
        };
        if self.long_mode() {
            stack.pointer &= !0xf;
        }
        Ok(stack)
    }

    /// The stack that the TSS names for a more privileged level.
    pub(super) fn inner_stack(&mut self, cpl: u8) -> Result<Stack, Stop> {
        if self.long_mode() {
            let pointer = self.task_stack_64(4 + 8 * u64::from(cpl))?;
            let segment = null_stack(u16::from(cpl), cpl);
            return Ok(Stack { segment, pointer, switched: true, wide: true });
        }
        let large = self.system.tr.attributes & 8 != 0;
        let (pointer, selector) = if large {
            let at = 4 + 8 * u64::from(cpl);
            (u64::from(self.load_task::<u32>(at)?), self.load_task::<u16>(at + 4)?)
        } else {
            let at = 2 + 4 * u64::from(cpl);
            (u64::from(self.load_task::<u16>(at)?), self.load_task::<u16>(at + 2)?)
        };
        if is_null(selector) {
            return self.fault(Fault::with_code(vector::TS, 0));
        }
        let descriptor = self.stack_descriptor(selector, cpl, vector::TS)?;
        self.mark_accessed(&descriptor)?;
        Ok(Stack { segment: descriptor.segment(cpl), pointer, switched: true, wide: false })
    }

    /// A stack pointer of the 64-bit TSS.
    fn task_stack_64(&mut self, offset: u64) -> Result<u64, Stop> {
        let pointer = self.load_task(offset)?;
        if canonical(pointer) { Ok(pointer) } else { self.fault(Fault::SS0) }
    }

    /// Reads a field of the TSS.
    fn load_task<T: crate::memory::access::Scalar>(&mut self, offset: u64) -> Result<T, Stop> {
        let task = self.system.tr;
        if !task.present() || offset + T::BYTES - 1 > u64::from(task.limit) {
            return self.selector_fault(vector::TS, task.selector);
        }
        self.load_system(self.wrap(task.base.wrapping_add(offset)))
    }

    /// Writes a frame below `stack.pointer` with the rights of privilege level `cpl`; RSP after it.
    pub(super) fn write_frame(
        &mut self,
        stack: &Stack,
        frame: &Frame,
        push_bytes: u64,
        cpl: u8,
    ) -> Result<u64, Stop> {
        let frame_bytes = push_bytes * frame.len as u64;
        let full = stack.pointer.wrapping_sub(frame_bytes);
        let long = stack.wide;
        let (lowest, pointer) = if long {
            (full, full)
        } else if stack.segment.default_32() {
            (full & 0xffff_ffff, full & 0xffff_ffff)
        } else {
            let old = if stack.switched { stack.pointer } else { self.registers.gpr[RSP] };
            (full & 0xffff, old & !0xffff | full & 0xffff)
        };
        let fits = if long {
            canonical(lowest) && canonical(lowest.wrapping_add(frame_bytes - 1))
        } else {
            stack.segment.present() && within_limit(&stack.segment, lowest, frame_bytes)
        };
        if !fits {
            let switched = stack.switched && !long;
            let code = if switched { selector_code(stack.segment.selector) } else { 0 };
            return self.fault(Fault::with_code(vector::SS, code));
        }
        let base = if long { 0 } else { stack.segment.base };
        let linear = self.wrap(base.wrapping_add(lowest));
        let mut bytes = [0; Frame::MAX_BYTES];
        for (place, value) in frame.values[..frame.len].iter().rev().enumerate() {
            let at = place * push_bytes as usize;
            let value = &value.to_le_bytes()[..push_bytes as usize];
            bytes[at..at + value.len()].copy_from_slice(value);
        }
        self.memory.set_rights(cpl == 3, self.rflags_rest & flags::AC != 0);
        let written = self.write_pages(linear, &bytes[..frame_bytes as usize]);
        self.update_memory_mode();
        written?;
        self.note_frame(linear, frame.len, push_bytes);
        Ok(pointer)
    }

    /// Writes bytes that lie in at most two pages, both translated before either is written. A
    /// stack in device space swallows them: delivery cannot wait for the board.
    fn write_pages(&mut self, linear: u64, bytes: &[u8]) -> Result<(), Stop> {
        let in_first = bytes.len().min((PAGE_BYTES - linear % PAGE_BYTES) as usize);
        let (first, second) = bytes.split_at(in_first);
        let next = self.wrap(linear.wrapping_add(in_first as u64));
        let first_page = self.data_page(linear, true)?;
        if !second.is_empty()
            && let Page::Ram { physical, .. } = self.data_page(next, true)?
        {
            self.memory.physical.write_for(FrameWrite, Some(next), physical, second);
        }
        if let Page::Ram { physical, .. } = first_page {
            let address = physical + linear % PAGE_BYTES;
            self.memory.physical.write_for(FrameWrite, Some(linear), address, first);
        }
        Ok(())
    }

    /// Real mode's vector table: four bytes an entry, 16-bit frames, no error codes.
    fn deliver_real_mode(&mut self, event: &Event) -> Result<(), Stop> {
        let offset = u64::from(event.vector) * 4;
        if offset + 3 > u64::from(self.system.idtr.limit) {
            return self.fault(Fault::GP0);
        }
        let entry: u32 = self.load_system(self.wrap(self.system.idtr.base.wrapping_add(offset)))?;
        let mut frame = Frame::new();
        frame.push(event.rflags);
        frame.push(u64::from(self.system.segments[CS].selector));
        frame.push(event.return_rip);
        let stack = Stack {
            segment: self.system.segments[SS],
            pointer: self.registers.gpr[RSP],
            switched: false,
            wide: false,
        };
        let pointer = self.write_frame(&stack, &frame, 2, 0)?;
        let code = self.real_mode_segment(CS, (entry >> 16) as u16);
        self.interrupt_shadow = false;
        self.enter_code(code, u64::from(entry & 0xffff), 0, None);
        self.registers.gpr[RSP] = pointer;
        self.set_rflags(self.rflags() & !(flags::IF | flags::TF | flags::RF | flags::AC));
        Ok(())
    }
}

/// Values to be pushed, in the order of pushing.
pub(super) struct Frame {
    values: [u64; 4 + Frame::MAX_PARAMETERS],
    len: usize,
}

impl Frame {
    /// Parameters that a call gate copies, at most.
    const MAX_PARAMETERS: usize = 31;
    const MAX_BYTES: usize = (4 + Self::MAX_PARAMETERS) * 8;

    pub(super) fn new() -> Self {
        Self { values: [0; 4 + Self::MAX_PARAMETERS], len: 0 }
    }

    pub(super) fn push(&mut self, value: u64) {
        self.values[self.len] = value;
        self.len += 1;
    }
}

/// How an exception behaves when another follows amid its delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

fn class(event: &Event) -> Class {
    use vector::{DE, DF, GP, NP, PF, SS, TS};
    if event.source != Source::Exception {
        return Class::Benign;
    }
    match event.vector {
        DE | TS | NP | SS | GP => Class::Contributory,
        PF => Class::PageFault,
        DF => Class::DoubleFault,
        _ => Class::Benign,
    }
}
