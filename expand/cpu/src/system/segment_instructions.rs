//! MOV, PUSH and POP of segment registers, and LDS, LES, LFS, LGS, LSS.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};
use reprise_trace::cpu_state::{CS, SS};

use crate::cpu::Cpu;
use crate::decode::op::{Handler, Op, segment_index};
use crate::fault::Stop;
use crate::mode::Mode;
use crate::ops::{BlockEnd, handler, raise_ud};

pub(super) fn select(op: &mut Op, _mode: Mode) -> Option<BlockEnd> {
    let instruction = &*op.instruction;
    let (handler, register, size, end): (Handler, Register, u8, BlockEnd) =
        match (instruction.code(), instruction.mnemonic()) {
            (Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg, _) => {
                let size = match instruction.op0_kind() {
                    OpKind::Register => instruction.op0_register().size() as u8,
                    _ => 2,
                };
                (store_selector, instruction.op1_register(), size, BlockEnd::Continue)
            }
            (Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16, _) => {
                (load_selector, instruction.op0_register(), 2, BlockEnd::After)
            }
            (code, Mnemonic::Push) => {
                (push_selector, instruction.op0_register(), stack_bytes(code)?, BlockEnd::Continue)
            }
            (code, Mnemonic::Pop) => {
                (pop_selector, instruction.op0_register(), stack_bytes(code)?, BlockEnd::After)
            }
            _ => {
                let size = instruction.op0_register().size() as u8;
                (load_far_pointer, far_pointer_segment(instruction)?, size, BlockEnd::After)
            }
        };
    op.a = segment_index(register);
    op.size = size;
    op.handler = handler;
    if end == BlockEnd::After && usize::from(op.a) == CS {
        op.handler = raise_ud; // CS is loaded by far transfers only.
    }
    Some(end)
}

/// Bytes that PUSH and POP of a segment register move RSP by; `None` for any other operand.
fn stack_bytes(code: Code) -> Option<u8> {
    Some(match code {
        Code::Pushw_ES | Code::Pushw_CS | Code::Pushw_SS | Code::Pushw_DS => 2,
        Code::Pushw_FS | Code::Pushw_GS | Code::Popw_ES | Code::Popw_CS => 2,
        Code::Popw_SS | Code::Popw_DS | Code::Popw_FS | Code::Popw_GS => 2,
        Code::Pushd_ES | Code::Pushd_CS | Code::Pushd_SS | Code::Pushd_DS => 4,
        Code::Pushd_FS | Code::Pushd_GS | Code::Popd_ES | Code::Popd_SS => 4,
        Code::Popd_DS | Code::Popd_FS | Code::Popd_GS => 4,
        Code::Pushq_FS | Code::Pushq_GS | Code::Popq_FS | Code::Popq_GS => 8,
        _ => return None,
    })
}

fn far_pointer_segment(instruction: &Instruction) -> Option<Register> {
    Some(match instruction.mnemonic() {
        Mnemonic::Les => Register::ES,
        Mnemonic::Lds => Register::DS,
        Mnemonic::Lss => Register::SS,
        Mnemonic::Lfs => Register::FS,
        Mnemonic::Lgs => Register::GS,
        _ => return None,
    })
}

impl Cpu {
    /// MOV and POP of a segment register; for SS, `op`'s next boundary takes neither an interrupt
    /// nor a debug trap, so that the stack pointer can follow.
    fn load_segment(&mut self, op: &Op, index: usize, selector: u16) -> Result<(), Stop> {
        let segment = self.prepare_segment(index, selector)?;
        self.set_segment(index, segment);
        if index == SS {
            self.interrupt_shadow = true;
            self.debug.note_stack_switch(self.tick + u64::from(op.number) + 1);
        }
        Ok(())
    }
}

handler!(store_selector(cpu, op) {
    let selector = cpu.system.segments[usize::from(op.a)].selector;
    cpu.store_low(op, u64::from(selector))
});
handler!(load_selector(cpu, op) {
    let selector = cpu.word_operand(op, 1)?;
    cpu.load_segment(op, usize::from(op.a), selector)
});
handler!(push_selector(cpu, op) {
    let selector = cpu.system.segments[usize::from(op.a)].selector;
    let size = u64::from(op.size);
    if size != 4 {
        cpu.push(u64::from(selector), size)?;
        return cpu.stored();
    }
    // A 32-bit push writes the selector's 16 bits only.
    let pointer = cpu.registers.gpr[reprise_trace::cpu_state::RSP].wrapping_sub(size);
    let linear = cpu.stack_address(pointer, size, true)?;
    cpu.store(linear, SS as u8, selector)?;
    cpu.set_stack_pointer(pointer);
    cpu.stored()
});
handler!(pop_selector(cpu, op) {
    let size = u64::from(op.size);
    // The stack's width before SS changes is what counts.
    let before = cpu.registers.gpr[reprise_trace::cpu_state::RSP];
    let selector = cpu.peek(0, size)? as u16;
    cpu.drop_stack(size);
    let loaded = cpu.load_segment(op, usize::from(op.a), selector);
    if loaded.is_err() {
        cpu.registers.gpr[reprise_trace::cpu_state::RSP] = before;
    }
    loaded
});
handler!(load_far_pointer(cpu, op) {
    let size = u64::from(op.size);
    let linear = op.linear_address(cpu);
    let offset = cpu.load_sized(linear, op.segment, size)?;
    let selector: u16 = cpu.load(cpu.wrap(linear.wrapping_add(size)), op.segment)?;
    // LSS loads the stack pointer itself and holds nothing off.
    let segment = cpu.prepare_segment(usize::from(op.a), selector)?;
    cpu.set_segment(usize::from(op.a), segment);
    cpu.set_general(op.instruction.op0_register().number(), offset, size);
    Ok(())
});
