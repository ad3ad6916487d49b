//! What makes an instruction interesting: registers, memory and stack arranged for it before the
//! sequence starts, and memory operands steered to places that matter.

use iced_x86::{Code, Instruction, MemorySize, Mnemonic, OpCodeOperandKind, OpKind, Register};
use reprise_kvm::user_oracle::{
    CODE_ADDRESS, DATA_ADDRESS, DATA_BYTES, READ_ONLY_ADDRESS, SUPERVISOR_ADDRESS,
};
use reprise_trace::cpu_state::{RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP};

use crate::generate::{Builder, is_absolute};
use crate::values;

/// RFLAGS that POPF may bring, TF apart: status flags, DF, NT, AC, ID.
const POPPED_FLAGS: u64 = 0x24_4cd5;

/// Whether nothing may follow: the instruction stores pointers that CPUs keep differently, which no
/// other may read.
pub(crate) fn must_end(instruction: &Instruction) -> bool {
    stores_pointers(instruction.mnemonic())
}

/// Instructions that store the x87 pointers.
pub(crate) fn stores_pointers(mnemonic: Mnemonic) -> bool {
    use Mnemonic::{Fnsave, Fnstenv, Fsave, Fstenv, Fxsave, Fxsave64};
    matches!(mnemonic, Fnstenv | Fstenv | Fnsave | Fsave | Fxsave | Fxsave64)
}

/// Arranges registers that the instruction uses implicitly or in a way of its own.
pub(crate) fn registers(builder: &mut Builder, instruction: &Instruction) {
    use Mnemonic::*;
    match instruction.mnemonic() {
        Div | Idiv => dividend(builder),
        Rcl | Rcr | Rol | Ror | Sal | Sar | Shl | Shr | Shld | Shrd => {
            let count = builder.random.below(256);
            builder.arrange(RCX, count);
        }
        Bt | Bts | Btr | Btc if instruction.op1_kind() == OpKind::Register => {
            let register = instruction.op1_register().full_register().number();
            let number = builder.random.below(0x8000).wrapping_sub(0x4000);
            if builder.random.percent(90) {
                builder.arrange(register, number);
            }
        }
        Loop | Loope | Loopne | Jcxz | Jecxz | Jrcxz => {
            let count = builder.random.below(4);
            builder.arrange(RCX, count);
        }
        Jmp | Call if instruction.op0_kind() == OpKind::Register => {
            let register = instruction.op0_register().full_register().number();
            let target = code_address(builder);
            builder.arrange(register, target);
        }
        Pcmpestri | Pcmpestrm | Pcmpestri64 | Pcmpestrm64 => {
            for register in [RAX, RDX] {
                let length = builder.random.below(40).wrapping_sub(20);
                builder.arrange(register, length);
            }
        }
        Leave => point_to_data(builder, RBP),
        Maskmovq | Maskmovdqu => point_to_data(builder, RDI),
        _ if instruction.is_string_instruction() => {
            point_to_data(builder, RSI);
            point_to_data(builder, RDI);
            if builder.random.percent(90) {
                let count = builder.random.below(24);
                builder.arrange(RCX, count);
            }
        }
        _ => {}
    }
}

/// A dividend whose quotient is about to overflow, as often as not.
fn dividend(builder: &mut Builder) {
    let high = match builder.random.below(4) {
        0 | 1 => 0,
        2 => u64::MAX,
        _ => builder.random.below(256),
    };
    if builder.random.percent(80) {
        builder.arrange(RDX, high);
    }
    if builder.random.percent(50) {
        let low = values::integer(&mut builder.random) as u16 & 0x1ff;
        builder.arrange(RAX, u64::from(low));
    }
}

fn point_to_data(builder: &mut Builder, register: usize) {
    let address = DATA_ADDRESS + 0x200 + builder.random.below(DATA_BYTES as u64 - 0x400);
    let aligned = if builder.random.percent(50) { address & !0xf } else { address };
    if builder.random.percent(92) {
        builder.arrange(register, aligned);
    }
}

/// Where an indirect branch leads: past the sequence, where INT3 stands, or to where none may go.
fn code_address(builder: &mut Builder) -> u64 {
    if builder.random.percent(90) {
        CODE_ADDRESS + 0x200 + builder.random.below(0xd00)
    } else {
        values::integer(&mut builder.random)
    }
}

/// Arranges the data at an instruction's memory operand.
pub(crate) fn memory(builder: &mut Builder, instruction: &Instruction, target: u64) {
    use Mnemonic::*;
    if !builder.random.percent(75) {
        return;
    }
    let random = &mut builder.random;
    match instruction.mnemonic() {
        Jmp | Call => {
            let to = code_address(builder);
            builder.put(target, &to.to_le_bytes());
        }
        Fldcw => {
            let control = values::x87_control(random);
            builder.put(target, &control.to_le_bytes());
        }
        Ldmxcsr => {
            let mxcsr = values::mxcsr(random);
            builder.put(target, &mxcsr.to_le_bytes());
        }
        Fxrstor | Fxrstor64 => {
            let image = fxsave_image(builder);
            builder.put(target, &image);
        }
        Fldenv | Frstor => {
            let fpu = values::fpu(random);
            let words = [fpu.fcw, fpu.fsw, random.next() as u16];
            let stride = if instruction.memory_size() == MemorySize::FpuEnv14 { 2 } else { 4 };
            let narrow = matches!(instruction.code(), Code::Frstor_m94byte);
            let stride = if narrow { 2 } else { stride };
            for (index, word) in words.iter().enumerate() {
                builder.put(target + index as u64 * stride, &word.to_le_bytes());
            }
        }
        Cmpxchg | Cmpxchg8b | Cmpxchg16b => {
            let equal = builder.random.percent(60);
            let low = builder.peek(target);
            let high = builder.peek(target.wrapping_add(if instruction.mnemonic() == Cmpxchg8b {
                4
            } else {
                8
            }));
            if let (true, Some(low), Some(high)) = (equal, low, high) {
                builder.arrange(RAX, low);
                builder.arrange(RDX, high);
            }
        }
        _ => {}
    }
}

/// An image that FXRSTOR takes, mostly.
fn fxsave_image(builder: &mut Builder) -> [u8; 416] {
    let fpu = values::fpu(&mut builder.random);
    let mut image = [0; 416];
    image[0..2].copy_from_slice(&fpu.fcw.to_le_bytes());
    image[2..4].copy_from_slice(&fpu.fsw.to_le_bytes());
    image[4] = fpu.ftw;
    image[24..28].copy_from_slice(&fpu.mxcsr.to_le_bytes());
    for (index, register) in fpu.st.iter().enumerate() {
        image[32 + 16 * index..][..10].copy_from_slice(register);
    }
    for (index, register) in fpu.xmm.iter().enumerate() {
        image[160 + 16 * index..][..16].copy_from_slice(&register.to_le_bytes());
    }
    image
}

/// Arranges the top of the stack for what an instruction pops.
pub(crate) fn stack(builder: &mut Builder, instruction: &Instruction) {
    let Some(top) = builder.known(RSP) else { return };
    if builder.is_used(RSP) || !builder.random.percent(85) {
        return;
    }
    let value = match instruction.mnemonic() {
        Mnemonic::Ret => code_address(builder),
        Mnemonic::Popf | Mnemonic::Popfq | Mnemonic::Popfd => {
            builder.random.next() & POPPED_FLAGS | 0x202
        }
        _ => return,
    };
    builder.put(top, &value.to_le_bytes());
}

impl Builder {
    /// Draws a memory operand's address and the form that gives it; where it leads.
    pub(crate) fn memory_operand(
        &mut self,
        instruction: &mut Instruction,
        kind: OpCodeOperandKind,
    ) -> u64 {
        let size = operand_bytes(instruction);
        let target = self.target(size);
        if kind == OpCodeOperandKind::seg_rBX_al {
            instruction.set_memory_base(Register::RBX);
            instruction.set_memory_index(Register::AL);
            point_to_data(self, RBX);
            return target;
        }
        if is_absolute(instruction.code()) {
            instruction.set_memory_displ_size(8);
            instruction.set_memory_displacement64(target);
            return target;
        }
        match self.random.below(100) {
            0..=64 => self.by_registers(instruction, target),
            65..=76 => self.relative(instruction, target),
            77..=82 => self.displacement_only(instruction, target),
            _ => self.by_narrow_registers(instruction, target),
        }
        target
    }

    /// An address for an operand of `size` bytes: mostly in the data, aligned as it should be.
    fn target(&mut self, size: u64) -> u64 {
        let room = (DATA_BYTES as u64).saturating_sub(size);
        let data = DATA_ADDRESS + self.random.below(room + 1);
        let aligned = data & !(size.next_power_of_two().min(16) - 1);
        let middle = DATA_ADDRESS + DATA_BYTES as u64 / 2;
        let end = DATA_ADDRESS + DATA_BYTES as u64;
        let before = |random: &mut reprise_random::Random, edge: u64| {
            edge - random.below(size.clamp(1, 64) + 1)
        };
        match self.random.below(100) {
            0..=9 => data,
            10..=15 => before(&mut self.random, middle),
            16..=18 => before(&mut self.random, end),
            19 => before(&mut self.random, DATA_ADDRESS),
            20..=22 => (READ_ONLY_ADDRESS + self.random.below(0xf00)) & !0xf,
            23 => SUPERVISOR_ADDRESS + self.random.below(0x1000),
            24 => CODE_ADDRESS + self.random.below(0x1000),
            25 => values::integer(&mut self.random),
            _ => aligned,
        }
    }

    /// Base, index, scale and displacement in 64-bit registers.
    fn by_registers(&mut self, instruction: &mut Instruction, target: u64) {
        let (base, index) = (self.random.below(16) as usize, self.random.below(16) as usize);
        let scale = 1u32 << self.random.below(4);
        let indexed = self.random.percent(45) && index != RSP && index != base;
        let (Some(mut base_value), Some(_)) = (self.known(base), self.known(index)) else {
            return self.relative(instruction, target);
        };
        let mut sum = 0u64;
        if indexed {
            let value = match self.random.below(3) {
                0 => self.random.below(64),
                1 => self.random.below(64).wrapping_sub(32),
                _ => self.random.below(0x2000).wrapping_sub(0x1000),
            };
            self.arrange(index, value);
            sum = self.input.gpr[index].wrapping_mul(u64::from(scale));
        }
        let wanted: i32 = match self.random.below(4) {
            0 => 0,
            1 | 2 => i32::from(self.random.next() as i8),
            _ => self.random.next() as i32 >> self.random.below(24),
        };
        if self.arrange(base, target.wrapping_sub(sum).wrapping_sub(wanted as u64)) {
            base_value = self.input.gpr[base];
        }
        let displacement = target.wrapping_sub(base_value).wrapping_sub(sum) as i64;
        let Ok(displacement) = i32::try_from(displacement) else {
            return self.relative(instruction, target);
        };
        instruction.set_memory_base(Register::RAX + base as u32);
        if indexed {
            instruction.set_memory_index(Register::RAX + index as u32);
            instruction.set_memory_index_scale(scale);
        }
        instruction.set_memory_displacement64(displacement as u64);
        instruction.set_memory_displ_size(match displacement {
            0 => 0,
            -128..=127 => 1,
            _ => 8,
        });
    }

    /// Relative to RIP, or wherever that reaches.
    fn relative(&mut self, instruction: &mut Instruction, target: u64) {
        let reachable = i32::try_from(target.wrapping_sub(CODE_ADDRESS) as i64).is_ok();
        let target = if reachable { target } else { DATA_ADDRESS };
        instruction.set_memory_base(Register::RIP);
        instruction.set_memory_displacement64(target);
        instruction.set_memory_displ_size(8);
    }

    fn displacement_only(&mut self, instruction: &mut Instruction, target: u64) {
        let displacement = i64::from(target as i32);
        instruction.set_memory_displacement64(displacement as u64);
        instruction.set_memory_displ_size(8);
    }

    /// The same in 32-bit registers, where every sum wraps.
    fn by_narrow_registers(&mut self, instruction: &mut Instruction, target: u64) {
        let (base, index) = (self.random.below(16) as usize, self.random.below(16) as usize);
        let indexed = self.random.percent(40) && index != RSP;
        let (Some(base_value), Some(index_value)) = (self.known(base), self.known(index)) else {
            return self.displacement_only(instruction, target);
        };
        let scale = 1u32 << self.random.below(4);
        let mut displacement = target.wrapping_sub(base_value);
        instruction.set_memory_base(Register::EAX + base as u32);
        if indexed {
            instruction.set_memory_index(Register::EAX + index as u32);
            instruction.set_memory_index_scale(scale);
            displacement = displacement.wrapping_sub(index_value.wrapping_mul(u64::from(scale)));
        }
        instruction.set_memory_displacement64(u64::from(displacement as u32));
        instruction.set_memory_displ_size(4);
    }
}

/// Bytes of the memory operand.
fn operand_bytes(instruction: &Instruction) -> u64 {
    (instruction.memory_size().size() as u64).max(1)
}
