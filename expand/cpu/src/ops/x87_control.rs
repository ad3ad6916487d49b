//! x87 control and state instructions: those that show or change control, status and tag words,
//! pointers, or everything at once.

use iced_x86::{Code, Instruction, Mnemonic};

use super::{BlockEnd, handler, nothing, raise_nm, x87_exceptions};
use crate::cpu::{CR0_NE, Cpu};
use crate::decode::op::{Handler, Op};
use crate::fault::{Fault, Stop, vector};
use crate::memory::access::Scalar;
use crate::mode::Mode;
use crate::native::host_fpu::{Area, MXCSR_MASK, fxsave, host};

/// CR0.MP: WAIT heeds CR0.TS.
const CR0_MP: u64 = 1 << 1;
/// CR0.TS.
const CR0_TS: u64 = 1 << 3;

pub(super) fn select(op: &mut Op, mode: Mode) -> Option<BlockEnd> {
    let (handler, reads, writes): (Handler, bool, bool) = match op.instruction.code() {
        Code::Wait => (wait, false, false),
        // The 8087 and the 80287 had these; since then they do nothing.
        Code::Fneni | Code::Fndisi | Code::Fnsetpm => (nothing, false, false),
        Code::Fninit => (fninit, false, false),
        Code::Fnclex => (fnclex, false, false),
        Code::Fldcw_m2byte => (fldcw, true, false),
        Code::Fnstcw_m2byte => (fnstcw, false, true),
        Code::Fnstsw_AX => (fnstsw_ax, false, false),
        Code::Fnstsw_m2byte => (fnstsw, false, true),
        Code::Fnstenv_m14byte => (fnstenv::<14>, false, true),
        Code::Fnstenv_m28byte => (fnstenv::<28>, false, true),
        Code::Fldenv_m14byte => (fldenv::<14>, true, false),
        Code::Fldenv_m28byte => (fldenv::<28>, true, false),
        Code::Fnsave_m94byte => (fnsave::<94>, false, true),
        Code::Fnsave_m108byte => (fnsave::<108>, false, true),
        Code::Frstor_m94byte => (frstor::<94>, true, false),
        Code::Frstor_m108byte => (frstor::<108>, true, false),
        Code::Fxsave_m512byte | Code::Fxsave64_m512byte => (fxsave_handler(op), false, true),
        Code::Fxrstor_m512byte | Code::Fxrstor64_m512byte => (fxrstor_handler(op), true, false),
        _ => return None,
    };
    op.handler = handler;
    op.reads = reads;
    op.writes = writes;
    op.operand_bytes = op.instruction.memory_size().size() as u16;
    let fx = matches!(op.instruction.mnemonic(), Mnemonic::Fxsave | Mnemonic::Fxsave64)
        || matches!(op.instruction.mnemonic(), Mnemonic::Fxrstor | Mnemonic::Fxrstor64);
    if fx && mode.has(Mode::X87_TRAPS) {
        op.handler = raise_nm;
        return Some(BlockEnd::Branch);
    }
    Some(BlockEnd::Continue)
}

/// Wraps a native x87 or MMX instruction in what its sequence does not do; see [`x87_exceptions`].
pub(super) fn wrap_native(op: &mut Op, mode: Mode) {
    x87_exceptions::wrap_native(op, mode);
}

/// Whether CR0.EM and CR0.TS apply as they do to x87 instructions.
pub(super) fn is_x87_state(instruction: &Instruction) -> bool {
    use iced_x86::CpuidFeature::{FPU, FPU287, FPU387};
    instruction.cpuid_features().iter().any(|feature| [FPU, FPU287, FPU387].contains(feature))
}

impl Cpu {
    /// What a waiting x87 or MMX instruction begins with. Where CR0.NE is clear a pending exception
    /// is for an external interrupt that this machine does not wire; the instruction then goes on as
    /// if IGNNE# were asserted.
    #[inline(always)]
    pub(super) fn wait_for_x87(&mut self) -> Result<(), Stop> {
        if self.mode.has(Mode::X87_UNMASKED)
            && self.system.cr0 & CR0_NE != 0
            && self.fpu.live_pending()
        {
            return self.fault(Fault::plain(vector::MF));
        }
        Ok(())
    }

    /// What an instruction that may have unmasked or masked exceptions ends with.
    pub(super) fn masks_changed(&mut self) -> Result<(), Stop> {
        let stale = self.mode.has(Mode::X87_UNMASKED) != self.fpu.x87_unmasked()
            || self.mode.has(Mode::SSE_UNMASKED) != self.fpu.sse_unmasked();
        if stale {
            self.update_mode();
            return Err(Stop::EndBlock);
        }
        self.stored()
    }

    fn load_operand<T: Scalar>(&mut self, op: &Op) -> Result<T, Stop> {
        let linear = op.linear_address(self);
        self.load(linear, op.segment)
    }

    fn store_operand<T: Scalar>(&mut self, op: &Op, value: T) -> Result<(), Stop> {
        let linear = op.linear_address(self);
        self.store(linear, op.segment, value)
    }
}

handler!(
    /// WAIT.
    wait(cpu, _op) {
        if cpu.system.cr0 & (CR0_MP | CR0_TS) == CR0_MP | CR0_TS {
            return cpu.fault(Fault::NM);
        }
        cpu.wait_for_x87()
    }
);

handler!(
    /// FNINIT.
    fninit(cpu, _op) {
        cpu.fpu.live_init();
        cpu.masks_changed()
    }
);

handler!(
    /// FNCLEX.
    fnclex(_cpu, _op) {
        host::clear_exceptions();
        Ok(())
    }
);

handler!(
    /// FLDCW.
    fldcw(cpu, op) {
        cpu.wait_for_x87()?;
        let control: u16 = cpu.load_operand(op)?;
        cpu.fpu.set_live_control(control);
        cpu.masks_changed()
    }
);

handler!(
    /// FNSTCW.
    fnstcw(cpu, op) {
        let control = cpu.fpu.control();
        cpu.store_operand(op, control)?;
        cpu.stored()
    }
);

handler!(
    /// FNSTSW AX.
    fnstsw_ax(cpu, _op) {
        let status = u64::from(cpu.fpu.live_status());
        let rax = &mut cpu.registers.gpr[0];
        *rax = *rax & !0xffff | status;
        Ok(())
    }
);

handler!(
    /// FNSTSW to memory.
    fnstsw(cpu, op) {
        let status = cpu.fpu.live_status();
        cpu.store_operand(op, status)?;
        cpu.stored()
    }
);

handler!(
    /// FNSTENV: afterwards every exception is masked.
    fnstenv<const BYTES: usize>(cpu, op) {
        let mut environment = cpu.fpu.live_environment();
        if !cpu.protected() {
            to_real_format(&mut environment);
        }
        let linear = op.linear_address(cpu);
        if BYTES == 14 {
            cpu.store_slow(linear, op.segment, &narrow_environment(&environment))?;
        } else {
            cpu.store_slow(linear, op.segment, &environment)?;
        }
        let masked = cpu.fpu.control() | crate::native::host_fpu::EXCEPTIONS;
        cpu.fpu.set_live_control(masked);
        cpu.masks_changed()
    }
);

handler!(
    /// FLDENV.
    fldenv<const BYTES: usize>(cpu, op) {
        cpu.wait_for_x87()?;
        let linear = op.linear_address(cpu);
        let mut bytes = [0; 28];
        cpu.load_slow(linear, op.segment, &mut bytes[..BYTES])?;
        if BYTES == 14 {
            bytes = wide_environment(&bytes);
        }
        if !cpu.protected() {
            from_real_format(&mut bytes);
        }
        cpu.fpu.set_live_environment(bytes);
        cpu.masks_changed()
    }
);

handler!(
    /// FNSAVE: stores all, then initialises.
    fnsave<const BYTES: usize>(cpu, op) {
        let mut all = cpu.fpu.live_save();
        if !cpu.protected() {
            to_real_format(&mut all);
        }
        let linear = op.linear_address(cpu);
        if BYTES == 94 {
            let (environment, registers) = all.split_at(28);
            let environment = environment.try_into().expect("28 bytes");
            let mut narrow = [0; 94];
            narrow[..14].copy_from_slice(&narrow_environment(environment));
            narrow[14..].copy_from_slice(registers);
            cpu.store_slow(linear, op.segment, &narrow)?;
        } else {
            cpu.store_slow(linear, op.segment, &all)?;
        }
        cpu.fpu.live_init();
        cpu.masks_changed()
    }
);

handler!(
    /// FRSTOR.
    frstor<const BYTES: usize>(cpu, op) {
        cpu.wait_for_x87()?;
        let linear = op.linear_address(cpu);
        let mut bytes = [0; 108];
        cpu.load_slow(linear, op.segment, &mut bytes[..BYTES])?;
        if BYTES == 94 {
            bytes.copy_within(14..94, 28);
            let narrow = bytes.first_chunk().expect("longer than an environment");
            let environment = wide_environment(narrow);
            bytes[..28].copy_from_slice(&environment);
        }
        if !cpu.protected() {
            from_real_format(&mut bytes);
        }
        cpu.fpu.set_live_save(bytes);
        cpu.masks_changed()
    }
);

/// Where FNSTENV's 16-bit format has the seven words of the 32-bit one.
const NARROW_WORDS: [usize; 7] = [0, 4, 8, 12, 16, 20, 24];

/// The 16-bit format of an environment in the 32-bit one. The opcode is not in it.
fn narrow_environment(environment: &[u8; 28]) -> [u8; 14] {
    std::array::from_fn(|index| environment[NARROW_WORDS[index / 2] + index % 2])
}

/// The 32-bit format of an environment of which the first 14 bytes are the 16-bit one.
fn wide_environment(narrow: &[u8; 28]) -> [u8; 28] {
    let mut environment = [0; 28];
    for index in 0..14 {
        environment[NARROW_WORDS[index / 2] + index % 2] = narrow[index];
    }
    environment
}

// In real mode an environment has linear addresses instead of selectors and offsets, split in two
// (Intel SDM volume 1, figures 8-10 and 8-12): bits 0-15 where protected mode has the offset, the others
// from bit 12 of the word behind it on, which has the opcode in its low bits. Selectors being zeros, the
// addresses are the offsets. The 16-bit format is the low halves of the 32-bit one's words here too.

/// Rearranges the 32-bit format of protected mode into that of real mode.
fn to_real_format(environment: &mut [u8]) {
    const RESERVED: u32 = 0xffff_0000;
    let (fip, fop) = (word_32(environment, 12), word_32(environment, 16) >> 16);
    let fdp = word_32(environment, 20);
    let words = [RESERVED | fip, fip >> 16 << 12 | fop, RESERVED | fdp, fdp >> 16 << 12];
    set_pointers(environment, words);
}

/// Rearranges the 32-bit format of real mode into that of protected mode.
fn from_real_format(environment: &mut [u8]) {
    let word = |index: usize| word_32(environment, 12 + 4 * index);
    let address = |low: u32, high: u32| low & 0xffff | (high >> 12) << 16;
    let fop = word(1) & 0x7ff;
    set_pointers(environment, [address(word(0), word(1)), fop << 16, address(word(2), word(3)), 0]);
}

fn word_32(environment: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|index| environment[offset + index]))
}

/// Sets the four words of an environment's 32-bit format behind its control, status and tag words.
fn set_pointers(environment: &mut [u8], words: [u32; 4]) {
    for (bytes, word) in environment[12..28].chunks_exact_mut(4).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
}

/// FXSAVE with 64-bit pointers.
const WIDE: u8 = 1;

fn fxsave_handler(op: &mut Op) -> Handler {
    op.a = u8::from(op.instruction.code() == Code::Fxsave64_m512byte) * WIDE;
    fxsave
}

fn fxrstor_handler(op: &mut Op) -> Handler {
    op.a = u8::from(op.instruction.code() == Code::Fxrstor64_m512byte) * WIDE;
    fxrstor
}

/// How many XMM registers FXSAVE and FXRSTOR move.
fn xmm_count(cpu: &Cpu) -> usize {
    if cpu.mode_64() { 16 } else { 8 }
}

/// The linear address of FXSAVE's or FXRSTOR's operand, which must be aligned.
fn aligned_operand(cpu: &mut Cpu, op: &Op) -> Result<u64, Stop> {
    let linear = op.linear_address(cpu);
    if linear.is_multiple_of(16) { Ok(linear) } else { cpu.fault(Fault::GP0) }
}

handler!(
    /// FXSAVE. What lies behind the XMM registers is not written.
    fxsave(cpu, op) {
        let linear = aligned_operand(cpu, op)?;
        let mut area = cpu.fpu.live_area();
        if op.a != WIDE {
            // 32-bit pointers with selectors, which read as zeros.
            area.set(fxsave::FIP + 4, &[0; 4]);
            area.set(fxsave::FDP + 4, &[0; 4]);
        }
        let count = xmm_count(cpu);
        for (index, register) in cpu.registers.xmm[..count].iter().enumerate() {
            area.set(fxsave::XMM + index * 16, &register.to_le_bytes());
        }
        cpu.check_store(linear, op.segment, fxsave::BYTES as u64)?;
        cpu.store_slow(linear, op.segment, &area.0[..fxsave::XMM + count * 16])?;
        cpu.stored()
    }
);

handler!(
    /// FXRSTOR.
    fxrstor(cpu, op) {
        let linear = aligned_operand(cpu, op)?;
        let mut area = Area::zeroed();
        cpu.load_slow(linear, op.segment, &mut area.0)?;
        if area.u32(fxsave::MXCSR) & !MXCSR_MASK != 0 {
            return cpu.fault(Fault::GP0);
        }
        if op.a != WIDE {
            area.set(fxsave::FIP + 4, &[0; 4]);
            area.set(fxsave::FDP + 4, &[0; 4]);
        }
        for index in 0..xmm_count(cpu) {
            cpu.registers.xmm[index] = u128::from_le_bytes(area.bytes(fxsave::XMM + index * 16));
        }
        cpu.fpu.set_live_area(area);
        cpu.masks_changed()
    }
);
