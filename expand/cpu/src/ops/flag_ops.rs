//! Instructions that only touch flags.

use iced_x86::Mnemonic;
use reprise_trace::cpu_state::RAX;

use super::{BlockEnd, handler};
use crate::cpu::{Cpu, SHADOWED};
use crate::decode::op::{Handler, Op};
use crate::fault::{Fault, Stop};
use crate::flags::{self, Arithmetic};
use crate::mode::Mode;

pub(super) fn select(op: &mut Op, _mode: Mode) -> Option<BlockEnd> {
    let (handler, end): (Handler, BlockEnd) = match op.instruction.mnemonic() {
        Mnemonic::Cli => (cli, BlockEnd::Continue),
        Mnemonic::Sti => (sti, BlockEnd::After),
        Mnemonic::Cld => (cld, BlockEnd::After),
        Mnemonic::Std => (std, BlockEnd::After),
        Mnemonic::Clc => (clc, BlockEnd::Continue),
        Mnemonic::Stc => (stc, BlockEnd::Continue),
        Mnemonic::Cmc => (cmc, BlockEnd::Continue),
        Mnemonic::Lahf => (lahf, BlockEnd::Continue),
        Mnemonic::Sahf => (sahf, BlockEnd::Continue),
        _ => return None,
    };
    op.handler = handler;
    Some(end)
}

fn check_iopl(cpu: &mut Cpu) -> Result<(), Stop> {
    if u64::from(cpu.cpl) > (cpu.rflags_rest & flags::IOPL) >> 12 {
        return cpu.fault(Fault::GP0);
    }
    Ok(())
}

handler!(cli(cpu, _op) {
    check_iopl(cpu)?;
    cpu.rflags_rest &= !flags::IF;
    Ok(())
});
handler!(sti(cpu, _op) {
    check_iopl(cpu)?;
    let opens = cpu.rflags_rest & flags::IF == 0;
    cpu.registers.gpr[usize::from(SHADOWED)] = u64::from(opens);
    cpu.rflags_rest |= flags::IF;
    cpu.interrupt_shadow |= opens;
    Ok(())
});
handler!(cld(cpu, _op) {
    cpu.rflags_rest &= !flags::DF;
    cpu.update_direction();
    Ok(())
});
handler!(std(cpu, _op) {
    cpu.rflags_rest |= flags::DF;
    cpu.update_direction();
    Ok(())
});
handler!(clc(cpu, _op) {
    cpu.registers.arithmetic.0 &= !0x100;
    Ok(())
});
handler!(stc(cpu, _op) {
    cpu.registers.arithmetic.0 |= 0x100;
    Ok(())
});
handler!(cmc(cpu, _op) {
    cpu.registers.arithmetic.0 ^= 0x100;
    Ok(())
});
handler!(lahf(cpu, _op) {
    let low = cpu.registers.arithmetic.to_rflags() & 0xff | 2;
    let rax = &mut cpu.registers.gpr[RAX];
    *rax = *rax & !0xff00 | low << 8;
    Ok(())
});
handler!(sahf(cpu, _op) {
    let high = cpu.registers.gpr[RAX] >> 8 & 0xff;
    let overflow = cpu.registers.arithmetic.to_rflags() & flags::OF;
    cpu.registers.arithmetic = Arithmetic::from_rflags(high | overflow);
    Ok(())
});
