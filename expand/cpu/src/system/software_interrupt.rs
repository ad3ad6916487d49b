//! INT n, INT3, INT1, INTO and BOUND.

use iced_x86::Mnemonic;
use reprise_machine::engine::Exit;

use super::deliver::{Event, Source};
use crate::cpu::{BreakpointInstructions, Cpu};
use crate::decode::op::{Handler, Op};
use crate::fault::{Fault, Stop, vector};
use crate::flags;
use crate::mode::Mode;
use crate::ops::{BlockEnd, handler};

pub(super) fn select(op: &mut Op, _mode: Mode) -> Option<BlockEnd> {
    let (handler, vector): (Handler, u8) = match op.instruction.mnemonic() {
        Mnemonic::Int => (interrupt, op.instruction.immediate8()),
        Mnemonic::Int3 => (breakpoint, vector::BP),
        Mnemonic::Into => (interrupt_on_overflow, vector::OF),
        Mnemonic::Int1 => (interrupt_debug, vector::DB),
        Mnemonic::Bound => {
            op.size = op.instruction.op0_register().size() as u8;
            op.handler = check_bounds;
            return Some(BlockEnd::Continue);
        }
        _ => return None,
    };
    op.a = vector;
    op.handler = handler;
    Some(BlockEnd::Branch)
}

impl Cpu {
    /// Goes through the IDT and comes back behind `op`. A fault on the way is `op`'s own.
    fn interrupt(&mut self, op: &Op, source: Source) -> Result<(), Stop> {
        let event = Event {
            vector: op.a,
            error_code: None,
            source,
            return_rip: op.next_rip(self),
            rflags: self.rflags() & !flags::RF,
        };
        self.deliver_event(&event)?;
        self.debug.note_trap_flag_changed(self.tick + u64::from(op.number) + 1);
        self.stored()
    }
}

handler!(interrupt(cpu, op) {
    cpu.interrupt(op, Source::Software)
});
handler!(breakpoint(cpu, op) {
    match cpu.breakpoints {
        BreakpointInstructions::Passed => {}
        BreakpointInstructions::PassedOnce => cpu.breakpoints = BreakpointInstructions::Caught,
        BreakpointInstructions::Caught | BreakpointInstructions::Stopped => {
            cpu.breakpoints = BreakpointInstructions::Stopped;
            cpu.pending_exit = Some(Exit::Kicked);
            return Err(Stop::Exit);
        }
    }
    cpu.interrupt(op, Source::Software)
});
handler!(interrupt_debug(cpu, op) {
    cpu.interrupt(op, Source::Exception)
});
handler!(interrupt_on_overflow(cpu, op) {
    if cpu.registers.arithmetic.to_rflags() & flags::OF != 0 {
        return cpu.interrupt(op, Source::Software);
    }
    cpu.rip = op.next_rip(cpu);
    Ok(())
});
handler!(check_bounds(cpu, op) {
    let size = u64::from(op.size);
    let linear = op.linear_address(cpu);
    let second = cpu.wrap(linear.wrapping_add(size));
    let extend = |value: u64| if size == 2 { i64::from(value as i16) } else { i64::from(value as i32) };
    let lower = extend(cpu.load_sized(linear, op.segment, size)?);
    let upper = extend(cpu.load_sized(second, op.segment, size)?);
    let index = extend(cpu.registers.gpr[op.instruction.op0_register().number()]);
    if index < lower || index > upper {
        return cpu.fault(Fault::plain(vector::BR));
    }
    Ok(())
});
