//! MXCSR and unmasked SSE exceptions, by small programs.

use super::testing::{DATA, Machine};
use crate::cpu::CR4_OSXMMEXCPT;
use crate::fault::{Fault, vector};

const XM: Fault = Fault::plain(vector::XM);

fn machine(code: &[u8], mxcsr: u32, xmm: [u128; 2]) -> Machine {
    let mut machine = Machine::long_64(code);
    let mut state = machine.cpu.state();
    state.gpr[3] = DATA;
    state.fpu.mxcsr = mxcsr;
    state.fpu.xmm[..2].copy_from_slice(&xmm);
    machine.cpu.set_state(&state);
    machine
}

fn single(value: f32) -> u128 {
    value.to_bits().into()
}

/// Masks but for one.
fn unmasked(bit: u32) -> u32 {
    0x1f80 & !(1 << (bit + 7))
}

const INVALID: u32 = 0;
const ZERO_DIVIDE: u32 = 2;
const UNDERFLOW: u32 = 4;
const PRECISION: u32 = 5;

#[test]
fn flags_of_native_instructions_show_in_mxcsr() {
    // divss xmm0, xmm1; stmxcsr [rbx]; ldmxcsr [rbx + 4]; stmxcsr [rbx]
    let code = [0xf3, 0x0f, 0x5e, 0xc1, 0x0f, 0xae, 0x1b, 0x0f, 0xae, 0x53, 4, 0x0f, 0xae, 0x1b];
    let mut machine = machine(&code, 0x1f80, [single(1.0), single(3.0)]);
    machine.write(DATA + 4, &0x9fc0u32.to_le_bytes());
    machine.steps(2);
    assert_eq!(machine.read(DATA), 0x1fa0u32.to_le_bytes());
    machine.steps(2);
    assert_eq!(machine.read(DATA), 0x9fc0u32.to_le_bytes());
}

#[test]
fn reserved_bits_of_mxcsr_are_refused() {
    let mut machine = machine(&[0x0f, 0xae, 0x13], 0x1f80, [0; 2]);
    machine.write(DATA, &0x1_1f80u32.to_le_bytes());
    assert_eq!(machine.step(), Err(Fault::GP0));
}

#[test]
fn an_unmasked_exception_faults_and_leaves_the_destination() {
    let code = [0xf3, 0x0f, 0x5e, 0xc1]; // divss xmm0, xmm1
    let mut machine = machine(&code, unmasked(ZERO_DIVIDE), [single(1.0), 0]);
    assert_eq!(machine.step(), Err(XM));
    let fpu = machine.cpu.state().fpu;
    assert_eq!(fpu.xmm[0], single(1.0));
    assert_eq!(fpu.mxcsr, unmasked(ZERO_DIVIDE) | 1 << ZERO_DIVIDE);
    machine.cpu.system.cr4 &= !CR4_OSXMMEXCPT;
    assert_eq!(machine.step(), Err(Fault::UD));
}

#[test]
fn a_flag_from_before_does_not_fault() {
    let code = [0xf3, 0x0f, 0x5e, 0xc1];
    let mxcsr = unmasked(ZERO_DIVIDE) | 1 << ZERO_DIVIDE;
    let mut machine = machine(&code, mxcsr, [single(1.0), single(3.0)]);
    assert_eq!(machine.step(), Ok(()));
    assert_eq!(machine.cpu.state().fpu.mxcsr, mxcsr | 1 << PRECISION);
}

#[test]
fn a_fault_before_computation_hides_what_other_lanes_compute() {
    let code = [0x0f, 0x5e, 0xc1]; // divps xmm0, xmm1
    let lanes =
        |low, high| single(low) | single(high) << 32 | single(1.0) << 64 | single(1.0) << 96;
    let operands = [lanes(1.0, 1.0), lanes(0.0, 3.0)];
    let mut machine = machine(&code, unmasked(ZERO_DIVIDE), operands);
    assert_eq!(machine.step(), Err(XM));
    assert_eq!(machine.cpu.state().fpu.mxcsr & 0x3f, 1 << ZERO_DIVIDE);
}

#[test]
fn an_exact_tiny_result_underflows_only_unmasked() {
    let code = [0xf3, 0x0f, 0x59, 0xc1]; // mulss xmm0, xmm1
    let operands = [single(f32::MIN_POSITIVE), single(0.5)];
    let mut masked = machine(&code, 0x1f80, operands);
    assert_eq!(masked.step(), Ok(()));
    assert_eq!(masked.cpu.state().fpu.mxcsr, 0x1f80);
    let flushing = 1 << 15;
    for mxcsr in [unmasked(UNDERFLOW), unmasked(UNDERFLOW) | flushing] {
        let mut machine = machine(&code, mxcsr, operands);
        assert_eq!(machine.step(), Err(XM));
        assert_eq!(machine.cpu.state().fpu.mxcsr, mxcsr | 1 << UNDERFLOW);
    }
}

#[test]
fn a_faulting_comparison_leaves_the_flags() {
    let code = [0x0f, 0x2f, 0xc1]; // comiss xmm0, xmm1
    let mut machine = machine(&code, unmasked(INVALID), [single(f32::NAN), single(1.0)]);
    let before = machine.cpu.state().rflags;
    assert_eq!(machine.step(), Err(XM));
    assert_eq!(machine.cpu.state().rflags, before);
}

#[test]
fn loading_mxcsr_changes_what_the_next_instruction_raises() {
    // ldmxcsr [rbx]; divss xmm0, xmm1, in one block
    let code = [0x0f, 0xae, 0x13, 0xf3, 0x0f, 0x5e, 0xc1];
    let mut machine = machine(&code, 0x1f80, [single(1.0), 0]);
    machine.write(DATA, &unmasked(ZERO_DIVIDE).to_le_bytes());
    assert_eq!(machine.step(), Ok(()));
    assert_eq!(machine.step(), Err(XM));
}

#[test]
fn hints_do_nothing_whatever_they_point_to() {
    for code in [
        &[0x90][..],
        &[0xf3, 0x90],                         // pause
        &[0x0f, 0x1f, 0x04, 0x25, 0, 0, 0, 0], // nop [0]
        &[0x0f, 0x18, 0x0c, 0x25, 0, 0, 0, 0], // prefetcht0 [0]
        &[0x0f, 0x0d, 0x0c, 0x25, 0, 0, 0, 0], // prefetchw [0]
        &[0xf3, 0x0f, 0x1e, 0xfa],             // endbr64
        &[0xf3, 0x48, 0x0f, 0x1e, 0xc8],       // rdsspq rax
        &[0xf3, 0x0f, 0x1a, 0xc8],             // bndcl bnd1, rax
        &[0x0f, 0xae, 0xe8],                   // lfence
        &[0x0f, 0xae, 0xf0],                   // mfence
        &[0x0f, 0xae, 0xf8],                   // sfence
    ] {
        let mut machine = machine(code, 0x1f80, [0; 2]);
        let before = machine.cpu.state();
        assert_eq!(machine.step(), Ok(()), "{code:02x?}");
        let mut after = machine.cpu.state();
        assert_eq!(after.rip, before.rip + code.len() as u64, "{code:02x?}");
        after.rip = before.rip;
        assert_eq!(after, before, "{code:02x?}");
    }
    // What CET and TSX added beyond hints is undefined.
    for code in [&[0xf3, 0x0f, 0x01, 0xe8][..], &[0x0f, 0x01, 0xd6]] {
        assert_eq!(machine(code, 0x1f80, [0; 2]).step(), Err(Fault::UD), "{code:02x?}");
    }
}

#[test]
fn flushing_a_line_needs_it_mapped() {
    let code = [0x0f, 0xae, 0x3c, 0x25, 0, 0, 0, 0]; // clflush [0]
    let fault = machine(&code, 0x1f80, [0; 2]).step();
    assert!(matches!(fault, Err(Fault { vector: vector::PF, .. })), "{fault:?}");
    assert_eq!(machine(&[0x0f, 0xae, 0x3b], 0x1f80, [0; 2]).step(), Ok(()));
}
