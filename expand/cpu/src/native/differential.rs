//! Every native form against the very instruction executed by the host directly, on random input.
//!
//! The guest's page tables map a buffer of the test's own address to guest RAM, so that the same
//! bytes with the same registers run in both places.

use reprise_random::Random;
use std::collections::{BTreeMap, BTreeSet};

use iced_x86::{Code, CpuidFeature, EncodingKind, Instruction, MemoryOperand, Mnemonic, Register};
use reprise_trace::cpu_state::{CpuState, FpuState};

use super::direct::{BUFFER, GUARD, Host};
use super::forms::{build, integer};
use super::host_fpu::{Area, fxsave};
use crate::fault::{Fault, vector};
use crate::flags::ARITHMETIC;
use crate::ops::testing::{DATA, Machine};

/// The operand's page: what surrounds its end is compared.
const PAGE: u64 = BUFFER + 0x8000;
/// Bytes compared on either side of the boundary after the operand's page.
const WINDOW_BYTES: usize = 128;
/// Where RSP points.
const STACK: u64 = BUFFER + 0x10_0000;
/// Inputs for each form with and without memory operand.
const INPUTS: usize = 24;

/// A floating-point or integer lane that is often an edge.
fn lane(random: &mut Random, bits: u32) -> u128 {
    let (exponent_bits, fraction_bits) = if bits == 64 { (11, 52) } else { (8, 23) };
    let sign = u128::from(random.below(2)) << (bits - 1);
    let fraction = u128::from(random.next()) & ((1 << fraction_bits) - 1);
    let ones = (1u128 << exponent_bits) - 1;
    match random.below(8) {
        0 => sign,
        1 => sign | fraction,
        2 => sign | ones << fraction_bits,
        3 => sign | ones << fraction_bits | fraction,
        4 | 5 => {
            let exponent = ones / 2 - 3 + u128::from(random.below(12));
            sign | exponent << fraction_bits | fraction
        }
        _ => u128::from(integer(random)) & ((1 << bits) - 1),
    }
}

fn vector(random: &mut Random) -> u128 {
    let bits = if random.below(2) == 0 { 32 } else { 64 };
    (0..128 / bits).fold(0, |value, index| value | lane(random, bits) << (index * bits))
}

/// An x87 register: any class of number, the unsupported ones too.
fn extended(random: &mut Random) -> [u8; 10] {
    let (exponent, significand) = match random.below(10) {
        0 => (0, 0),
        1 => (0, random.next()),
        2 => (0x7fff, 1 << 63),
        3 => (0x7fff, random.next()),
        4 => (random.below(0x8000), random.next()),
        5 => (0x3fff, 1 << 63),
        6 => (0x3ffe + random.below(70), random.next() | 1 << 63),
        _ => (0x3ff0 + random.below(32), random.next() | 1 << 63),
    };
    let sign = random.below(2) << 15;
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&significand.to_le_bytes());
    bytes[8..].copy_from_slice(&((exponent | sign) as u16).to_le_bytes());
    bytes
}

/// Which unit has exceptions unmasked, at random.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Unmasked {
    Neither,
    X87,
    Sse,
}

/// Random x87 and SSE state, without a pending exception.
fn fpu_state(random: &mut Random, unmasked: Unmasked) -> FpuState {
    let x87_masks = if unmasked == Unmasked::X87 { random.below(0x40) as u16 } else { 0x3f };
    let sse_masks = if unmasked == Unmasked::Sse { random.below(0x40) as u32 } else { 0x3f };
    let precision = [0x000, 0x200, 0x300][random.below(3) as usize];
    let rounding = (random.below(4) as u16) << 10;
    let conditions = random.next() as u16 & 0x4700;
    let top = random.below(8) as u16;
    let tags = [0, 0xff, random.next() as u8, random.next() as u8][random.below(4) as usize];
    let daz_and_ftz = if random.below(4) == 0 { random.next() as u32 & 0x8040 } else { 0 };
    let sse_flags = random.below(0x40) as u32;
    FpuState {
        fcw: 0x40 | x87_masks | precision | rounding,
        fsw: top << 11 | conditions | random.next() as u16 & (0x40 | x87_masks),
        ftw: tags,
        fop: 0,
        fip: 0,
        fdp: 0,
        st: std::array::from_fn(|_| extended(random)),
        mxcsr: sse_masks << 7 | (random.below(4) as u32) << 13 | daz_and_ftz | sse_flags,
        xmm: std::array::from_fn(|_| vector(random)),
    }
}

/// What both executions start from or end in.
#[derive(Clone, PartialEq, Eq)]
struct Outcome {
    gpr: [u64; 16],
    flags: u64,
    fpu: FpuState,
    memory: [u8; 2 * WINDOW_BYTES],
    faulted: bool,
}

impl Outcome {
    /// Everything, named.
    fn fields(&self) -> Vec<(String, String)> {
        let fpu = &self.fpu;
        let mut fields = vec![
            ("faulted".into(), format!("{}", self.faulted)),
            ("flags".into(), format!("{:03x}", self.flags)),
            ("fcw".into(), format!("{:04x}", fpu.fcw)),
            ("fsw".into(), format!("{:04x}", fpu.fsw)),
            ("ftw".into(), format!("{:02x}", fpu.ftw)),
            ("mxcsr".into(), format!("{:04x}", fpu.mxcsr)),
        ];
        for number in 0..16 {
            fields.push((format!("gpr{number}"), format!("{:016x}", self.gpr[number])));
            fields.push((format!("xmm{number}"), format!("{:032x}", fpu.xmm[number])));
        }
        for (number, register) in fpu.st.iter().enumerate() {
            fields.push((format!("st{number}"), format!("{register:02x?}")));
        }
        for (index, bytes) in self.memory.chunks(16).enumerate() {
            fields.push((format!("memory {:+}", index as i64 * 16 - 128), format!("{bytes:02x?}")));
        }
        fields
    }
}

/// One run that differs, a line for each field that does.
fn describe(bytes: &[u8], before: &Outcome, host: &Outcome, guest: &Outcome) -> String {
    let mut text = format!("{bytes:02x?}, fcw {:04x} fsw {:04x}", before.fpu.fcw, before.fpu.fsw);
    let fields = before.fields().into_iter().zip(host.fields()).zip(guest.fields());
    for (((name, before), (_, host)), (_, guest)) in fields {
        if host != guest {
            text += &format!("\n  {name}: {before} -> host {host}, guest {guest}");
        }
    }
    text
}

fn window_start() -> u64 {
    PAGE + 0x1000 - WINDOW_BYTES as u64
}

fn on_host(host: &mut Host, instruction: &[u8], before: &Outcome) -> Outcome {
    host.write(window_start(), &before.memory);
    let machinery = host.machinery();
    machinery.gpr = before.gpr;
    machinery.rflags = before.flags | 2;
    let fpu = &before.fpu;
    machinery.fpu = Area::zeroed();
    machinery.fpu.set(fxsave::FCW, &fpu.fcw.to_le_bytes());
    machinery.fpu.set(fxsave::FSW, &fpu.fsw.to_le_bytes());
    machinery.fpu.0[fxsave::FTW] = fpu.ftw;
    machinery.fpu.set(fxsave::MXCSR, &fpu.mxcsr.to_le_bytes());
    for index in 0..8 {
        machinery.fpu.set(fxsave::ST + index * 16, &fpu.st[index]);
    }
    for index in 0..16 {
        machinery.fpu.set(fxsave::XMM + index * 16, &fpu.xmm[index].to_le_bytes());
    }
    let faulted = host.execute(instruction);
    let machinery = host.machinery();
    let area = &machinery.fpu;
    Outcome {
        gpr: machinery.gpr,
        flags: machinery.rflags & ARITHMETIC,
        fpu: FpuState {
            fcw: area.u16(fxsave::FCW),
            fsw: area.u16(fxsave::FSW),
            ftw: area.0[fxsave::FTW],
            fop: 0,
            fip: 0,
            fdp: 0,
            st: std::array::from_fn(|index| area.bytes(fxsave::ST + index * 16)),
            mxcsr: area.u32(fxsave::MXCSR),
            xmm: std::array::from_fn(|index| {
                u128::from_le_bytes(area.bytes(fxsave::XMM + index * 16))
            }),
        },
        memory: host.read(window_start()),
        faulted,
    }
}

fn in_guest(machine: &mut Machine, base: &CpuState, code: &[u8], before: &Outcome) -> Outcome {
    let window = DATA + (window_start() - BUFFER);
    machine.write(window, &before.memory);
    machine.replace_code(code);
    machine.cpu.set_state(&CpuState {
        gpr: before.gpr,
        rflags: base.rflags & !ARITHMETIC | before.flags,
        fpu: before.fpu.clone(),
        ..base.clone()
    });
    let result = machine.step();
    assert!(
        matches!(result, Ok(()) | Err(Fault { vector: vector::XM | vector::DE, .. })),
        "{result:?}"
    );
    let state = machine.cpu.state();
    Outcome {
        gpr: state.gpr,
        flags: state.rflags & ARITHMETIC,
        fpu: FpuState { fop: 0, fip: 0, fdp: 0, ..state.fpu },
        memory: machine.read(window),
        faulted: result.is_err(),
    }
}

/// A machine whose linear [`BUFFER`] is at [`DATA`].
fn machine() -> Machine {
    let machine = Machine::long_64(&[]);
    machine.write(0x3000 + (BUFFER >> 21) * 8, &(DATA | 0x87).to_le_bytes());
    machine
}

/// Bytes of the memory operand; 0 if there is none.
fn operand_bytes(instruction: &Instruction) -> u64 {
    let has_operand = (0..instruction.op_count())
        .any(|operand| instruction.op_kind(operand) == iced_x86::OpKind::Memory);
    if has_operand { instruction.memory_size().size() as u64 } else { 0 }
}

/// Gives the memory operand's registers values that make its address.
fn set_address(gpr: &mut [u64; 16], instruction: &Instruction, address: u64, index: u64) {
    let base = instruction.memory_base().number();
    gpr[base] = address.wrapping_sub(instruction.memory_displacement64());
    if instruction.memory_index() != Register::None {
        gpr[instruction.memory_index().number()] = index;
        let scaled = index * u64::from(instruction.memory_index_scale());
        gpr[base] = gpr[base].wrapping_sub(scaled);
    }
}

fn input(random: &mut Random, instruction: &Instruction, unmasked: Unmasked) -> Outcome {
    let mut gpr: [u64; 16] = std::array::from_fn(|_| integer(random));
    gpr[Register::RSP.number()] = STACK;
    let size = operand_bytes(instruction);
    if size != 0 {
        // Before the page's end, up to it, or across it, as far as alignment lets.
        let end = PAGE + 0x1000;
        let address = if super::operand::needs_alignment(instruction) {
            [end - 16, end, end - 64][random.below(3) as usize]
        } else {
            end - random.below(size + 17).min(WINDOW_BYTES as u64)
        };
        let index = random.below(64);
        set_address(&mut gpr, instruction, address, index);
    }
    let mut memory = [0; 2 * WINDOW_BYTES];
    for bytes in memory.chunks_mut(16) {
        let value = match random.below(4) {
            0 => u128::from_le_bytes({
                let mut bytes = [0; 16];
                bytes[..10].copy_from_slice(&extended(random));
                bytes
            }),
            _ => vector(random),
        };
        bytes.copy_from_slice(&value.to_le_bytes());
    }
    Outcome {
        gpr,
        flags: random.next() & ARITHMETIC,
        fpu: fpu_state(random, unmasked),
        memory,
        faulted: false,
    }
}

/// Forms with a sequence, with or without memory operand, that `wanted` lets through.
fn visit_native_forms(
    random: &mut Random,
    wanted: impl Fn(&Instruction) -> bool,
    mut visit: impl FnMut(&mut Random, Instruction, &[u8]),
) {
    let mut cpu = machine().cpu;
    for code in Code::values() {
        let op_code = code.op_code();
        let legacy = op_code.encoding() == EncodingKind::Legacy && op_code.is_instruction();
        if !legacy || !op_code.mode64() {
            continue;
        }
        for memory in [false, true] {
            for _ in 0..INPUTS {
                let operand = memory.then(|| memory_operand(random));
                let Some((instruction, bytes)) = build(code, 64, operand.as_ref(), random) else {
                    break;
                };
                if crate::ops::runs_natively(&mut cpu, &instruction) && wanted(&instruction) {
                    visit(random, instruction, &bytes);
                }
            }
        }
    }
}

fn memory_operand(random: &mut Random) -> MemoryOperand {
    let general = |random: &mut Random| {
        let number = random.below(15) as u32;
        Register::RAX + if number < 4 { number } else { number + 1 }
    };
    let base = general(random);
    let index = general(random);
    let displacement = random.below(0x200) as i64 - 0x100;
    if random.below(2) == 0 || index == base {
        MemoryOperand::with_base_displ(base, displacement)
    } else {
        let scale = 1 << random.below(4);
        MemoryOperand::with_base_index_scale_displ_size(base, index, scale, displacement, 1)
    }
}

/// Runs forms in both places; how many runs there were, and of the differences one for each form.
fn compare(
    seed: u64,
    unmasked: Unmasked,
    wanted: impl Fn(&Instruction) -> bool,
) -> (usize, BTreeMap<String, String>) {
    let mut host = Host::new();
    let mut machine = machine();
    let base = machine.cpu.state();
    let mut runs = 0;
    let mut differences = BTreeMap::new();
    visit_native_forms(&mut Random::new(seed), wanted, |random, instruction, bytes| {
        let before = input(random, &instruction, unmasked);
        let expected = on_host(&mut host, bytes, &before);
        let actual = in_guest(&mut machine, &base, bytes, &before);
        runs += 1;
        if expected != actual {
            differences
                .entry(format!("{:?}", instruction.code()))
                .or_insert_with(|| describe(bytes, &before, &expected, &actual));
        }
    });
    (runs, differences)
}

fn report(seed: u64, differences: &BTreeMap<String, String>) {
    let texts: Vec<_> =
        differences.iter().map(|(name, text)| format!("{name} {text}")).take(20).collect();
    let number = differences.len();
    assert!(number == 0, "seed {seed:#x}: {number} forms differ:\n{}", texts.join("\n"));
}

/// Instructions whose result is a function of registers and the memory that [`input`] sets up.
fn computes(instruction: &Instruction) -> bool {
    // Its sequence is a plain move, since CPUs differ.
    let narrow_sign_extension = instruction.code() == Code::Movsxd_r16_rm16;
    let absolute =
        instruction.memory_displ_size() == 8 && instruction.memory_base() == Register::None;
    instruction.mnemonic() != Mnemonic::Rdpmc
        && !absolute
        && !narrow_sign_extension
        && !instruction.cpuid_features().contains(&CpuidFeature::TSC)
}

fn is_x87(instruction: &Instruction) -> bool {
    use CpuidFeature::{FPU, FPU287, FPU387};
    instruction.cpuid_features().iter().any(|feature| [FPU, FPU287, FPU387].contains(feature))
}

fn is_sse(instruction: &Instruction) -> bool {
    (0..instruction.op_count()).any(|operand| instruction.op_register(operand).is_xmm())
}

/// All forms with every exception masked, then those that can raise one with some unmasked.
#[test]
fn native_sequences_do_what_the_host_does() {
    let seed = 0x5eed_0001;
    let (runs, differences) = compare(seed, Unmasked::Neither, computes);
    report(seed, &differences);
    assert!(runs > 20_000, "only {runs} runs");
    let (runs, differences) = compare(seed, Unmasked::X87, is_x87);
    report(seed, &differences);
    assert!(runs > 2_000, "only {runs} runs under unmasked x87 exceptions");
    let (runs, differences) = compare(seed, Unmasked::Sse, is_sse);
    report(seed, &differences);
    assert!(runs > 2_000, "only {runs} runs under unmasked SSE exceptions");
}

/// The operand's size decides which pages an instruction may touch, and its alignment may be asked
/// for: both decide which faults it raises.
#[test]
fn operands_have_the_size_and_alignment_of_the_host() {
    let seed = 0x5eed_0002;
    let mut host = Host::new();
    let mut checked = 0;
    let mut wrong = BTreeSet::new();
    visit_native_forms(&mut Random::new(seed), computes, |random, instruction, bytes| {
        let size = operand_bytes(&instruction);
        if size == 0 {
            return;
        }
        let mut before = input(random, &instruction, Unmasked::Neither);
        let mut faults = |address: u64| {
            set_address(&mut before.gpr, &instruction, address, 3);
            on_host(&mut host, bytes, &before).faulted
        };
        let division = matches!(instruction.mnemonic(), Mnemonic::Div | Mnemonic::Idiv);
        let code = instruction.code();
        if !division && faults(GUARD - size) {
            wrong.insert(format!("{code:?} accesses more"));
        }
        let aligned = super::operand::needs_alignment(&instruction);
        if !aligned && size > 1 && !faults(GUARD - size + 1) {
            wrong.insert(format!("{code:?} accesses less"));
        }
        if !division && faults(PAGE + 1) != aligned {
            wrong.insert(format!("{code:?} as to alignment"));
        }
        checked += 1;
    });
    assert!(wrong.is_empty(), "seed {seed:#x}: {wrong:?}");
    assert!(checked > 1000, "only {checked} operands");
}
