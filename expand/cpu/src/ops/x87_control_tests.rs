//! x87 control and state instructions, and unmasked x87 exceptions, by small programs.

use reprise_machine::engine::{Access, Exit};
use reprise_trace::cpu_state::FpuState;

use super::testing::{CODE, DATA, DEVICE, Machine};
use crate::cpu::{AnsweredAccess, CR0_NE};
use crate::fault::{Fault, Flow, vector};
use crate::native::host_fpu::with_guest_fpu;

const MF: Fault = Fault::plain(vector::MF);

/// In 64-bit mode: RBX points to [`DATA`].
fn machine(code: &[u8]) -> Machine {
    let mut machine = Machine::long_64(code);
    machine.cpu.registers.gpr[3] = DATA;
    machine
}

/// fldz; fldz; fdivp: an invalid operation.
const ZERO_BY_ZERO: [u8; 6] = [0xd9, 0xee, 0xd9, 0xee, 0xde, 0xf9];

#[test]
fn state_survives_between_runs_and_the_host_keeps_its_own() {
    // fninit; fldpi; fld1; fstp tbyte [rbx]; fstp tbyte [rbx + 16]
    let code = [0xdb, 0xe3, 0xd9, 0xeb, 0xd9, 0xe8, 0xdb, 0x3b, 0xdb, 0x7b, 16];
    let mut machine = machine(&code);
    let sum_before: f64 = std::hint::black_box(0.1) + std::hint::black_box(0.2);
    machine.steps(5);
    assert_eq!(machine.read::<10>(DATA), [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f]);
    let pi = [0x35, 0xc2, 0x68, 0x21, 0xa2, 0xda, 0x0f, 0xc9, 0x00, 0x40];
    assert_eq!(machine.read::<10>(DATA + 16), pi);
    assert_eq!(sum_before, std::hint::black_box(0.1) + std::hint::black_box(0.2));
    assert_eq!(machine.cpu.state().fpu.ftw, 0);
}

#[test]
fn the_host_has_its_control_words_back_even_after_a_panic() {
    let mut machine = machine(&[]);
    let rounding_up = FpuState { fcw: 0xb7f, mxcsr: 0x5f80, ..FpuState::default() };
    let mut state = machine.cpu.state();
    state.fpu = rounding_up;
    machine.cpu.set_state(&state);
    let third = || std::hint::black_box(1.0f64) / std::hint::black_box(3.0);
    let before = third();
    let mut inside = 0.0;
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        with_guest_fpu(&mut machine.cpu, |_| {
            inside = third();
            panic!("as a bug might");
        })
    }));
    assert!(panicked.is_err());
    assert_ne!(inside, before, "the guest's rounding was in force");
    assert_eq!(third(), before);
}

#[test]
fn every_stored_state_comes_back() {
    let mut machine = machine(&[]);
    let mut state = machine.cpu.state();
    state.fpu = FpuState {
        fcw: 0x0b40,
        // TOP 3, all condition codes, stack fault, precision and denormal flags; with the masks
        // above, an exception is pending.
        fsw: 0xdfe2,
        ftw: 0x5a,
        fop: 0x5a5,
        fip: 0x1234_5678_9abc,
        fdp: 0xffff_8000_0000_1234,
        st: std::array::from_fn(|index| [index as u8 + 1; 10]),
        mxcsr: 0xffff,
        xmm: std::array::from_fn(|index| index as u128 + 7),
    };
    machine.cpu.set_state(&state);
    assert_eq!(machine.cpu.state().fpu, state.fpu);
    with_guest_fpu(&mut machine.cpu, |_| ());
    assert_eq!(machine.cpu.state().fpu, state.fpu);
}

#[test]
fn a_pending_exception_is_raised_by_the_next_waiting_instruction() {
    // ...; fldcw [rbx]; fnstsw ax; and then
    let before = [&ZERO_BY_ZERO[..], &[0xd9, 0x2b, 0xdf, 0xe0]].concat();
    for (next, waits) in [
        (vec![0xd9, 0xe8], true),        // fld1
        (vec![0x9b], true),              // wait
        (vec![0xd9, 0x2b], true),        // fldcw [rbx]
        (vec![0xd9, 0x23], true),        // fldenv [rbx]
        (vec![0xdd, 0x23], true),        // frstor [rbx]
        (vec![0x0f, 0x77], true),        // emms
        (vec![0x0f, 0xef, 0xc0], true),  // pxor mm0, mm0
        (vec![0x0f, 0x6f, 0x03], true),  // movq mm0, [rbx]
        (vec![0x0f, 0xf7, 0xc1], true),  // maskmovq mm0, mm1
        (vec![0x0f, 0x2d, 0xc0], true),  // cvtps2pi mm0, xmm0
        (vec![0xdb, 0xe3], false),       // fninit
        (vec![0xdb, 0xe2], false),       // fnclex
        (vec![0xd9, 0x3b], false),       // fnstcw [rbx]
        (vec![0xdd, 0x3b], false),       // fnstsw [rbx]
        (vec![0xd9, 0x33], false),       // fnstenv [rbx]
        (vec![0xdd, 0x33], false),       // fnsave [rbx]
        (vec![0x0f, 0xae, 0x03], false), // fxsave [rbx]
        (vec![0x0f, 0xae, 0x0b], false), // fxrstor [rbx]
        (vec![0x0f, 0x58, 0xc0], false), // addps xmm0, xmm0
    ] {
        let mut machine = machine(&[&before[..], &next].concat());
        machine.write(DATA, &0x340u16.to_le_bytes());
        machine.steps(5);
        let status = machine.cpu.registers.gpr[0] as u16;
        assert_eq!(status & 0x80ff, 0x8081, "ES, B and the invalid flag");
        let expected = if waits { Err(MF) } else { Ok(()) };
        assert_eq!(machine.step(), expected, "{next:02x?}");
    }
}

#[test]
fn without_native_error_reporting_a_pending_exception_is_ignored() {
    let mut code = ZERO_BY_ZERO.to_vec();
    code.extend([0xd9, 0x2b, 0xd9, 0xe8]); // fldcw [rbx]; fld1
    let mut machine = machine(&code);
    machine.cpu.system.cr0 &= !CR0_NE;
    machine.write(DATA, &0x340u16.to_le_bytes());
    machine.steps(5);
}

#[test]
fn an_unmasked_store_keeps_memory_and_stack_and_notes_the_opcode() {
    // fldcw [rbx]; fld tbyte [rbx]; fistp dword [rbx + 0x40]; wait
    let code = [0xd9, 0x2b, 0xdb, 0x2b, 0xdb, 0x5b, 0x40, 0x9b];
    let mut machine = machine(&code);
    machine.write(DATA, &[0x40, 0x03, 0, 0, 0, 0, 0, 0x80, 0x5e, 0x40]); // About 2^95.
    machine.write(DATA + 0x40, &[0xaa; 4]);
    machine.steps(3);
    assert_eq!(machine.read::<4>(DATA + 0x40), [0xaa; 4]);
    let fpu = machine.cpu.state().fpu;
    assert_eq!(fpu.ftw, 0x80, "nothing was popped");
    assert_eq!((fpu.fip, fpu.fdp), (CODE + 4, DATA + 0x40));
    assert_eq!(fpu.fop, 0x35b);
    assert_eq!(machine.step(), Err(MF));
}

#[test]
fn environment_in_both_sizes() {
    // fld dword [rbx + 0x80]; fnstenv [rbx]; fnstenv16 [rbx + 0x20]; fninit; fldenv [rbx];
    // fnstenv [rbx + 0x40]; fninit; fldenv16 [rbx + 0x20]; fnstenv [rbx + 0x60]
    let code = [
        0xd9, 0x83, 0x80, 0, 0, 0, 0xd9, 0x33, 0x66, 0xd9, 0x73, 0x20, 0xdb, 0xe3, 0xd9, 0x23,
        0xd9, 0x73, 0x40, 0xdb, 0xe3, 0x66, 0xd9, 0x63, 0x20, 0xd9, 0x73, 0x60,
    ];
    let mut machine = machine(&code);
    machine.steps(9);
    let words = |address| -> [u16; 14] {
        let bytes: [u8; 28] = machine.read(address);
        std::array::from_fn(|index| u16::from_le_bytes([bytes[index * 2], bytes[index * 2 + 1]]))
    };
    // Physical register 7 holds +0 (tag 1), the others are empty (tag 3).
    let (fip, fdp) = (CODE, DATA + 0x80);
    let expected = [
        0x37f,
        0xffff,
        0x3800,
        0xffff,
        0x7fff,
        0xffff,
        fip as u16,
        (fip >> 16) as u16,
        0,
        0,
        fdp as u16,
        (fdp >> 16) as u16,
        0,
        0xffff,
    ];
    assert_eq!(words(DATA), expected);
    assert_eq!(words(DATA + 0x40), expected);
    let narrow = [0x37f, 0x3800, 0x7fff, fip as u16, 0, fdp as u16, 0];
    assert_eq!(words(DATA + 0x20)[..7], narrow);
    let low = words(DATA + 0x60);
    assert_eq!((low[6], low[7], low[10], low[11]), (fip as u16, 0, fdp as u16, 0));
    assert_eq!(low[4], 0x7fff);
}

#[test]
fn save_and_restore_in_both_sizes() {
    for prefix in [&[][..], &[0x66]] {
        // fld1; fldpi; fnsave [rbx]; fnstsw ax; frstor [rbx]; fstp tbyte [rbx + 0x100]
        let code = [
            &[0xd9, 0xe8, 0xd9, 0xeb],
            prefix,
            &[0xdd, 0x33, 0xdf, 0xe0],
            prefix,
            &[0xdd, 0x23, 0xdb, 0xbb, 0, 1, 0, 0],
        ];
        let mut machine = machine(&code.concat());
        machine.steps(3);
        let fpu = machine.cpu.state().fpu;
        assert_eq!((fpu.fcw, fpu.fsw, fpu.ftw, fpu.fip), (0x37f, 0, 0, 0));
        machine.steps(3);
        assert_eq!(machine.read::<10>(DATA + 0x100)[8..], [0x00, 0x40]);
        let fpu = machine.cpu.state().fpu;
        assert_eq!((fpu.fsw, fpu.ftw), (0x3800, 0x80));
        assert_eq!(fpu.st[0], [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f]);
    }
}

#[test]
fn storing_the_environment_masks_every_exception() {
    // fldcw [rbx]; fnstenv [rbx + 0x40]; fnstcw [rbx]
    let mut machine = machine(&[0xd9, 0x2b, 0xd9, 0x73, 0x40, 0xd9, 0x3b]);
    machine.write(DATA, &0x340u16.to_le_bytes());
    machine.steps(3);
    assert_eq!(machine.read::<2>(DATA + 0x40), 0x340u16.to_le_bytes());
    assert_eq!(machine.read::<2>(DATA), 0x37fu16.to_le_bytes());
}

#[test]
fn control_words_hold_what_the_host_would_hold() {
    for value in [0, 0x0001, 0x1fff, 0xffff, 0x0040, 0x037f, 0xe0c0] {
        let mut machine = machine(&[0xd9, 0x2b, 0xd9, 0x7b, 2]); // fldcw [rbx]; fnstcw [rbx + 2]
        machine.write(DATA, &u16::to_le_bytes(value));
        machine.steps(2);
        let held = u16::from_le_bytes(machine.read(DATA + 2));
        assert_eq!(held, value & 0x1f3f | 0x40, "{value:04x}");
    }
}

#[test]
fn wait_heeds_task_switched_only_with_monitor_coprocessor() {
    const MP: u64 = 1 << 1;
    const EM: u64 = 1 << 2;
    const TS: u64 = 1 << 3;
    for (cr0, result) in
        [(0, Ok(())), (EM, Ok(())), (TS, Ok(())), (MP, Ok(())), (MP | TS, Err(Fault::NM))]
    {
        let mut machine = machine(&[0x9b]);
        machine.cpu.system.cr0 |= cr0;
        machine.cpu.update_mode();
        assert_eq!(machine.step(), result, "{cr0:x}");
    }
}

#[test]
fn a_switched_off_unit_traps() {
    const EM: u64 = 1 << 2;
    const TS: u64 = 1 << 3;
    let traps = |code: &[u8], cr0: u64| {
        let mut machine = machine(code);
        machine.cpu.system.cr0 |= cr0;
        machine.cpu.update_mode();
        machine.step()
    };
    for (code, emulated) in [
        (&[0xd9, 0xe8][..], Fault::NM),   // fld1
        (&[0xdb, 0xe3], Fault::NM),       // fninit
        (&[0xdb, 0x0b], Fault::NM),       // fisttp dword [rbx]
        (&[0x0f, 0xae, 0x03], Fault::NM), // fxsave [rbx]
        (&[0x0f, 0xae, 0x0b], Fault::NM), // fxrstor [rbx]
        (&[0x0f, 0xef, 0xc0], Fault::UD), // pxor mm0, mm0
        (&[0x0f, 0x77], Fault::UD),       // emms
        (&[0x0f, 0x57, 0xc0], Fault::UD), // xorps xmm0, xmm0
        (&[0x0f, 0xae, 0x13], Fault::UD), // ldmxcsr [rbx]
    ] {
        assert_eq!(traps(code, TS), Err(Fault::NM), "{code:02x?}");
        assert_eq!(traps(code, EM), Err(emulated), "{code:02x?}");
        assert_eq!(traps(code, EM | TS), Err(emulated), "{code:02x?}");
    }
    // Neither movnti, nor fences, prefetches and CRC32 use the unit.
    for code in [&[0x0f, 0xc3, 0x03][..], &[0x0f, 0xae, 0xe8], &[0x0f, 0x18, 0x0b]] {
        assert_eq!(traps(code, EM | TS), Ok(()), "{code:02x?}");
    }
}

#[test]
fn fxsave_writes_its_fields_and_no_more() {
    // fld1; fld dword [rbx]; fxsave64 [rbx + 0x200]
    let mut machine = machine(&[0xd9, 0xe8, 0xd9, 0x03, 0x48, 0x0f, 0xae, 0x83, 0, 2, 0, 0]);
    machine.write(DATA, &0x40e0_0000u32.to_le_bytes()); // 7.0
    machine.write(DATA + 0x200, &[0xee; 512]);
    machine.cpu.registers.xmm = std::array::from_fn(|index| 0x1111 * index as u128);
    machine.steps(3);
    let image: [u8; 512] = machine.read(DATA + 0x200);
    let word = |offset: usize| u16::from_le_bytes([image[offset], image[offset + 1]]);
    assert_eq!((word(0), word(2), word(4), word(6)), (0x37f, 0x3000, 0xc0, 0));
    assert_eq!(image[8..16], (CODE + 2).to_le_bytes());
    assert_eq!(image[16..24], DATA.to_le_bytes());
    assert_eq!(image[24..32], [0x80, 0x1f, 0, 0, 0xff, 0xff, 0, 0]);
    assert_eq!(image[32..48], [0, 0, 0, 0, 0, 0, 0, 0xe0, 1, 0x40, 0, 0, 0, 0, 0, 0]);
    for index in 0..16 {
        let at = 160 + index * 16;
        assert_eq!(image[at..at + 16], (0x1111 * index as u128).to_le_bytes());
    }
    assert_eq!(image[416..], [0xee; 96]);
}

#[test]
fn fxrstor_takes_back_what_fxsave_gave() {
    // fld1; fxsave64 [rbx]; fninit; xorps xmm3, xmm3; fxrstor64 [rbx]
    let code =
        [0xd9, 0xe8, 0x48, 0x0f, 0xae, 0x03, 0xdb, 0xe3, 0x0f, 0x57, 0xdb, 0x48, 0x0f, 0xae, 0x0b];
    let mut machine = machine(&code);
    machine.cpu.registers.xmm[3] = 77;
    machine.step().expect("fld1");
    let before = machine.cpu.state().fpu;
    machine.steps(3);
    assert_ne!(machine.cpu.state().fpu, before);
    machine.steps(1);
    assert_eq!(machine.cpu.state().fpu, before);
}

#[test]
fn outside_64_bit_mode_fxsave_leaves_half_of_the_vector_registers_alone() {
    // fxsave [ebx]; fxrstor [ebx]
    let mut machine = Machine::flat_32(&[0x0f, 0xae, 0x03, 0x0f, 0xae, 0x0b]);
    machine.cpu.registers.gpr[3] = DATA;
    machine.write(DATA, &[0xee; 512]);
    machine.cpu.registers.xmm = [5; 16];
    machine.steps(1);
    let image: [u8; 512] = machine.read(DATA);
    assert_eq!(image[160..288], [5u128.to_le_bytes(); 8].concat());
    assert_eq!(image[288..], [0xee; 224]);
    machine.cpu.registers.xmm = [9; 16];
    machine.steps(1);
    assert_eq!(machine.cpu.registers.xmm[..8], [5; 8]);
    assert_eq!(machine.cpu.registers.xmm[8..], [9; 8]);
}

#[test]
fn fxsave_and_fxrstor_refuse_bad_operands() {
    for code in [[0x0f, 0xae, 0x43, 8], [0x0f, 0xae, 0x4b, 8]] {
        assert_eq!(machine(&code).step(), Err(Fault::GP0), "misaligned");
    }
    let mut machine = machine(&[0x0f, 0xae, 0x0b]);
    machine.write(DATA + 24, &0x1_1f80u32.to_le_bytes());
    machine.cpu.registers.xmm[1] = 4;
    let before = machine.cpu.state();
    assert_eq!(machine.step(), Err(Fault::GP0), "reserved bits of MXCSR");
    assert_eq!(machine.cpu.state(), before);
    // The image ends on the first page that is not mapped: the one before is not written either.
    let mut machine = self::machine(&[0x0f, 0xae, 0x03]);
    machine.cpu.registers.gpr[3] = (1 << 30) - 0x100;
    assert!(matches!(machine.step(), Err(Fault { vector: vector::PF, .. })));
}

#[test]
fn a_store_to_a_device_pops_once() {
    let mut machine = machine(&[0xd9, 0xe8, 0xdf, 0x3b]); // fld1; fistp qword [rbx]
    machine.cpu.registers.gpr[3] = DEVICE;
    machine.steps(1);
    let block = machine.block();
    assert_eq!(machine.run(block), Flow::EXIT);
    assert_eq!(machine.cpu.state().fpu.ftw, 0x80);
    let access = Access::MmioWrite { address: DEVICE, size: 8, value: 1 };
    assert_eq!(machine.cpu.pending_exit, Some(Exit::Access(access)));
    machine.cpu.answered.push(AnsweredAccess { access, value: 0 });
    machine.cpu.answered_used = 0;
    assert_eq!(machine.run(block), Flow::NEXT);
    assert_eq!(machine.cpu.state().fpu.ftw, 0);
}

#[test]
fn a_masked_move_stores_chosen_bytes_and_enters_mmx() {
    let mut machine = machine(&[0x0f, 0xf7, 0xc1]); // maskmovq mm0, mm1
    let mut state = machine.cpu.state();
    state.gpr[7] = DATA;
    state.fpu.fsw = 5 << 11; // TOP = 5: MM0 is ST(3), MM1 is ST(4).
    state.fpu.st[3] = [1, 2, 3, 4, 5, 6, 7, 8, 0, 0];
    state.fpu.st[4] = [0x80, 0x7f, 0xff, 0, 0, 0, 0x80, 0, 0, 0];
    machine.cpu.set_state(&state);
    machine.write(DATA, &[0xee; 8]);
    machine.steps(1);
    assert_eq!(machine.read(DATA), [1, 0xee, 3, 0xee, 0xee, 0xee, 7, 0xee]);
    let fpu = machine.cpu.state().fpu;
    assert_eq!((fpu.fsw, fpu.ftw), (0, 0xff));
    assert_eq!(fpu.st[0], [1, 2, 3, 4, 5, 6, 7, 8, 0, 0]);
}

#[test]
fn a_masked_move_faults_for_bytes_that_it_does_not_store() {
    let mut machine = machine(&[0x66, 0x0f, 0xf7, 0xc1]); // maskmovdqu xmm0, xmm1
    machine.cpu.registers.xmm[0] = u128::from_le_bytes([7; 16]);
    machine.cpu.registers.xmm[1] = 0x80 << 64;
    machine.cpu.registers.gpr[7] = 0xff8; // The page at 0 is absent, the one after it there.
    let block = machine.block();
    assert_eq!(machine.run(block), Flow::FAULT);
    assert_eq!(machine.cpu.pending_fault.vector, vector::PF);
    assert_eq!(machine.cpu.pending_fault.page_fault_address, Some(0xff8));
    machine.cpu.registers.gpr[7] = DATA;
    assert_eq!(machine.run(block), Flow::NEXT);
    assert_eq!(machine.read(DATA + 8), [7]);
}
