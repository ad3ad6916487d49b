//! Debug registers, breakpoints, the trap flag and the resume flag (Intel SDM volume 3B, chapter
//! 17). All of it runs in careful mode only: one instruction at a time.

use iced_x86::{Mnemonic, Register};
use reprise_trace::cpu_state::CS;
use serde::{Deserialize, Serialize};

use crate::cpu::{CR4_DE, Cpu};
use crate::decode::op::{Handler, Op};
use crate::execute::TripleFault;
use crate::fault::{Fault, Stop, vector};
use crate::flags;
use crate::mode::Mode;
use crate::ops::{BlockEnd, handler, raise_ud};

/// DR6: a debug register was accessed while DR7.GD was set.
const GENERAL_DETECT: u64 = 1 << 13;
/// DR6: a single step.
pub(super) const SINGLE_STEP: u64 = 1 << 14;
/// DR6: which breakpoints hit.
const HITS: u64 = 0xf;
/// DR6: the bits that software may write.
const DR6_WRITABLE: u64 = 0xe00f;
/// DR6: the bits that are always set.
const DR6_FIXED: u64 = 0xffff_0ff0;
/// DR7: the bits that exist.
const DR7_WRITABLE: u64 = 0xffff_23ff;
/// DR7: the bit that is always set.
const DR7_FIXED: u64 = 0x400;
/// DR7: accesses to debug registers raise #DB.
const DR7_GENERAL_DETECT: u64 = 1 << 13;

/// What the CPU keeps about debugging besides the debug registers.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct DebugState {
    /// Data and I/O breakpoints that the instruction in progress has hit, as in DR6.
    hits: u64,
    /// The boundary after the last MOV SS or POP SS, in ticks.
    stack_switch: u64,
    /// The boundary after the last instruction whose trap flag counts as it is after it, in ticks.
    trap_flag_changed: u64,
}

impl Default for DebugState {
    fn default() -> Self {
        Self { hits: 0, stack_switch: u64::MAX, trap_flag_changed: u64::MAX }
    }
}

impl DebugState {
    /// SS was loaded: at the boundary `tick` no debug exception is delivered.
    pub(super) fn note_stack_switch(&mut self, tick: u64) {
        self.stack_switch = tick;
    }

    /// Whether the instruction that led to the boundary `tick` loaded SS.
    pub(crate) fn is_behind_stack_switch(&self, tick: u64) -> bool {
        self.stack_switch == tick
    }

    /// An event or system call has set TF aside: no single step is reported at the boundary `tick`.
    pub(super) fn note_trap_flag_changed(&mut self, tick: u64) {
        self.trap_flag_changed = tick;
    }
}

/// What a breakpoint waits for, as DR7 encodes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Condition {
    Execute,
    Write,
    Port,
    ReadOrWrite,
}

/// One of the four breakpoints.
#[derive(Clone, Copy, Debug)]
struct Breakpoint {
    number: usize,
    address: u64,
    condition: Condition,
    size_bytes: u64,
}

impl Breakpoint {
    fn overlaps(&self, start: u64, size_bytes: u64) -> bool {
        let first = self.address & !(self.size_bytes - 1);
        let last = first.wrapping_add(self.size_bytes - 1);
        start <= last && start.wrapping_add(size_bytes - 1) >= first
    }
}

impl Cpu {
    fn breakpoints(&self) -> impl Iterator<Item = Breakpoint> + use<> {
        let (addresses, control) = (self.system.dr, self.system.dr7);
        (0..4).filter(move |number| control >> (2 * number) & 3 != 0).map(move |number| {
            let fields = control >> (16 + 4 * number);
            Breakpoint {
                number,
                address: addresses[number],
                condition: match fields & 3 {
                    0 => Condition::Execute,
                    1 => Condition::Write,
                    2 => Condition::Port,
                    _ => Condition::ReadOrWrite,
                },
                size_bytes: [1, 2, 8, 4][(fields >> 2 & 3) as usize],
            }
        })
    }

    /// Raises #DB if an instruction breakpoint lies at RIP. `shadow`: the instruction before was
    /// one that holds off interrupts.
    pub(crate) fn check_instruction_breakpoint(&mut self, shadow: bool) -> Result<(), Stop> {
        if shadow && self.tick == self.debug.stack_switch {
            return Ok(()); // Hits of the MOV SS itself are still to be reported.
        }
        self.debug.hits = 0;
        if self.system.dr7 & 0xff == 0 || self.rflags_rest & flags::RF != 0 {
            return Ok(());
        }
        let linear = self.wrap(self.registers.segment_base[CS].wrapping_add(self.rip));
        let hits = self
            .breakpoints()
            .filter(|point| point.condition == Condition::Execute && point.address == linear)
            .fold(0, |hits, point| hits | 1 << point.number);
        if hits == 0 {
            return Ok(());
        }
        self.report(hits);
        self.fault(Fault::plain(vector::DB))
    }

    /// Clears RF after an instruction that ran with it set, unless the instruction itself set it.
    pub(crate) fn clear_resume_flag(&mut self, op: &Op) {
        let sets =
            matches!(op.instruction.mnemonic(), Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq);
        if !sets {
            self.rflags_rest &= !flags::RF;
            self.update_careful();
        }
    }

    /// Delivers the debug trap that the instruction just retired has earned. `trap`: TF was set
    /// before it.
    pub(crate) fn after_instruction(&mut self, trap: bool) -> Result<(), TripleFault> {
        if self.tick == self.debug.stack_switch {
            return Ok(());
        }
        let mut causes = std::mem::take(&mut self.debug.hits);
        if trap && self.tick != self.debug.trap_flag_changed {
            causes |= SINGLE_STEP;
        }
        self.deliver_trap(causes)
    }

    /// The same after one element of a repeated instruction that has more to do.
    ///
    /// A data breakpoint sets RF in the frame (Intel SDM volume 3B, 18.3.1.1): the instruction goes on
    /// from its start, and an instruction breakpoint there has been taken already. The manual has it so
    /// for single steps too, but AMD's CPUs leave RF clear then.
    pub(crate) fn after_repetition(&mut self, trap: bool) -> Result<(), TripleFault> {
        let hits = std::mem::take(&mut self.debug.hits);
        if hits != 0 {
            self.rflags_rest |= flags::RF; // Delivery clears it again.
        }
        self.deliver_trap(hits | if trap { SINGLE_STEP } else { 0 })
    }

    fn deliver_trap(&mut self, causes: u64) -> Result<(), TripleFault> {
        if causes == 0 {
            return Ok(());
        }
        self.report(causes);
        self.deliver_exception(Fault::plain(vector::DB))
    }

    /// Ends one element of a repeated instruction, `left` of which remain: a debug trap comes between
    /// the elements, not after the last only.
    #[inline(always)]
    pub(crate) fn between_elements(&self, left: u64) -> Result<(), Stop> {
        let trap = self.rflags_rest & flags::TF != 0 || self.debug.hits != 0;
        let stops = trap || self.stops_between_elements;
        if stops && left != 0 { Err(Stop::Repeats) } else { Ok(()) }
    }

    /// Sets DR6: earlier breakpoints go, its other causes stay until software clears them.
    pub(super) fn report(&mut self, causes: u64) {
        self.system.dr6 = self.system.dr6 & !HITS | causes;
    }

    /// Notes which data breakpoints an access hits; the trap comes after the instruction.
    pub(crate) fn note_data_breakpoints(&mut self, linear: u64, size_bytes: u64, write: bool) {
        for point in self.breakpoints() {
            let wanted = match point.condition {
                Condition::ReadOrWrite => true,
                Condition::Write => write,
                Condition::Execute | Condition::Port => false,
            };
            if wanted && point.overlaps(linear, size_bytes) {
                self.debug.hits |= 1 << point.number;
            }
        }
    }

    /// Notes which I/O breakpoints an access to ports hits.
    pub(super) fn note_port_breakpoints(&mut self, port: u16, size_bytes: u8) {
        if self.system.dr7 & 0xff == 0 || self.system.cr4 & CR4_DE == 0 {
            return;
        }
        for point in self.breakpoints() {
            let here = point.overlaps(u64::from(port), u64::from(size_bytes));
            if point.condition == Condition::Port && here {
                self.debug.hits |= 1 << point.number;
            }
        }
    }

    /// Entering the debug handler switches DR7.GD off, so that it may look.
    pub(super) fn disable_general_detect(&mut self) {
        self.system.dr7 &= !DR7_GENERAL_DETECT;
    }

    /// Checks that debug register `number` may be accessed; which one that is.
    fn check_debug_register(&mut self, number: usize) -> Result<usize, Stop> {
        if matches!(number, 4 | 5) && self.system.cr4 & CR4_DE != 0 {
            return self.fault(Fault::UD);
        }
        self.require_level_0()?;
        if self.system.dr7 & DR7_GENERAL_DETECT != 0 {
            self.report(GENERAL_DETECT);
            // In the frame, as every fault but an instruction breakpoint has it; delivery clears it.
            self.rflags_rest |= flags::RF;
            return self.fault(Fault::plain(vector::DB));
        }
        Ok(if matches!(number, 4 | 5) { number + 2 } else { number })
    }
}

pub(super) fn select(op: &mut Op, _mode: Mode) -> Option<BlockEnd> {
    let instruction = &*op.instruction;
    if instruction.mnemonic() != Mnemonic::Mov {
        return None;
    }
    let (handler, register, end): (Handler, Register, BlockEnd) =
        if instruction.op0_register().is_dr() {
            (write_debug, instruction.op0_register(), BlockEnd::After)
        } else if instruction.op1_register().is_dr() {
            (read_debug, instruction.op1_register(), BlockEnd::Continue)
        } else {
            return None;
        };
    op.a = register.number() as u8;
    op.handler = if op.a < 8 { handler } else { raise_ud };
    Some(end)
}

handler!(read_debug(cpu, op) {
    let value = match cpu.check_debug_register(usize::from(op.a))? {
        6 => cpu.system.dr6,
        7 => cpu.system.dr7,
        number => cpu.system.dr[number & 3],
    };
    let size = if cpu.mode_64() { 8 } else { 4 };
    cpu.set_general(op.instruction.op0_register().number(), value, size);
    Ok(())
});
handler!(write_debug(cpu, op) {
    let number = cpu.check_debug_register(usize::from(op.a))?;
    let mut value = cpu.registers.gpr[op.instruction.op1_register().number()];
    if !cpu.mode_64() {
        value &= 0xffff_ffff;
    }
    if number >= 6 && value >> 32 != 0 {
        return cpu.fault(Fault::GP0);
    }
    match number {
        6 => cpu.system.dr6 = value & DR6_WRITABLE | DR6_FIXED,
        7 => cpu.system.dr7 = value & DR7_WRITABLE | DR7_FIXED,
        number => cpu.system.dr[number & 3] = value,
    }
    cpu.update_careful();
    Ok(())
});
