//! The judge judged, by sequences whose outcome the manual gives.

use reprise_trace::cpu_state::*;

use super::*;
use crate::testing::require_kvm;

const ONES: u128 = 0x3f80_0000_3f80_0000_3f80_0000_3f80_0000;
const TWOS: u128 = 0x4000_0000_4000_0000_4000_0000_4000_0000;

fn input(code: &[u8]) -> UserInput {
    UserInput { code: code.to_vec(), ..UserInput::default() }
}

fn run(input: &UserInput) -> UserOutcome {
    UserOracle::new().expect("KVM").run(input).expect("an outcome")
}

const fn exception(vector: u8, error_code: Option<u32>, cr2: Option<u64>) -> UserException {
    UserException { vector, error_code, cr2 }
}

#[test]
fn the_end_of_a_sequence_is_int3() {
    require_kvm!();
    let start = UserInput { rflags: 0x8d5, ..input(&[]) };
    let outcome = run(&start);
    assert_eq!(outcome.gpr, start.gpr);
    assert_eq!(outcome.fpu, start.fpu);
    assert_eq!(outcome.rflags, 0x8d5 | 0x202);
    assert_eq!(outcome.rip, CODE_ADDRESS + 1);
    assert_eq!(outcome.exception, exception(3, None, None));
    assert!(outcome.data.iter().all(|byte| *byte == 0));
}

#[test]
fn registers_flags_and_memory_come_back() {
    require_kvm!();
    // add rax, rbx; mov [rsi], rax; push rdi; adc r15, 0
    let mut start = input(&[0x48, 0x01, 0xd8, 0x48, 0x89, 0x06, 0x57, 0x49, 0x83, 0xd7, 0x00]);
    start.gpr[RAX] = u64::MAX;
    start.gpr[RBX] = 2;
    start.gpr[RSI] = DATA_ADDRESS + 0x100;
    start.gpr[RDI] = 0x1122_3344_5566_7788;
    start.gpr[15] = 7;
    start.data = vec![9; 0x101];
    let outcome = run(&start);
    let mut expected = start.gpr;
    (expected[RAX], expected[15], expected[RSP]) = (1, 8, start.gpr[RSP] - 8);
    assert_eq!(outcome.gpr, expected);
    assert_eq!(outcome.rflags, 0x202);
    assert_eq!(outcome.data[0xff..0x10a], [9, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let pushed = DATA_BYTES / 2 - 8;
    assert_eq!(outcome.data[pushed..pushed + 8], start.gpr[RDI].to_le_bytes());
}

#[test]
fn sse_and_x87_state_goes_in_and_comes_out() {
    require_kvm!();
    // addps xmm0, xmm15; fld1; faddp
    let mut start = input(&[0x41, 0x0f, 0x58, 0xc7, 0xd9, 0xe8, 0xde, 0xc1]);
    start.fpu.xmm[0] = ONES;
    start.fpu.xmm[15] = ONES;
    // ST(0) = 1, in physical register 7.
    start.fpu.fsw = 7 << 11;
    start.fpu.ftw = 0x80;
    start.fpu.st[0] = [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f];
    let outcome = run(&start);
    assert_eq!(outcome.fpu.xmm[0], TWOS);
    assert_eq!(outcome.fpu.xmm[15], ONES);
    assert_eq!(outcome.fpu.st[0], [0, 0, 0, 0, 0, 0, 0, 0x80, 0x00, 0x40]);
    assert_eq!((outcome.fpu.fsw & 0x3800, outcome.fpu.ftw), (7 << 11, 0x80));
}

#[test]
fn every_kind_of_fault_is_told_apart() {
    require_kvm!();
    let supervisor = SUPERVISOR_ADDRESS;
    let past_data = DATA_ADDRESS + DATA_BYTES as u64;
    let non_canonical = 0x8000_0000_0000_0000;
    // Code, RBX, what ends it, and at which offset.
    let cases: [(&[u8], u64, UserException, u64); 11] = [
        // ud2
        (&[0x0f, 0x0b], 0, exception(6, None, None), 0),
        // hlt
        (&[0x90, 0xf4], 0, exception(13, Some(0), None), 1),
        // div bl
        (&[0xf6, 0xf3], 0, exception(0, None, None), 0),
        // mov eax, [rbx]
        (&[0x8b, 0x03], past_data, exception(14, Some(4), Some(past_data)), 0),
        (&[0x8b, 0x03], supervisor, exception(14, Some(5), Some(supervisor)), 0),
        (&[0x8b, 0x03], non_canonical, exception(13, Some(0), None), 0),
        // mov [rbx], eax
        (&[0x89, 0x03], past_data - 2, exception(14, Some(6), Some(past_data)), 0),
        (&[0x89, 0x03], READ_ONLY_ADDRESS, exception(14, Some(7), Some(READ_ONLY_ADDRESS)), 0),
        // push rbx; ret, to a page that is not executable
        (
            &[0x53, 0xc3],
            DATA_ADDRESS,
            exception(14, Some(0x15), Some(DATA_ADDRESS)),
            DATA_ADDRESS - CODE_ADDRESS,
        ),
        // int 4
        (&[0xcd, 4], 0, exception(4, None, None), 2),
        // movaps xmm0, [rbx]
        (&[0x0f, 0x28, 0x03], DATA_ADDRESS + 8, exception(13, Some(0), None), 0),
    ];
    let mut oracle = UserOracle::new().unwrap();
    for (code, rbx, expected, offset) in cases {
        let mut start = input(code);
        start.gpr[RBX] = rbx;
        let outcome = oracle.run(&start).unwrap();
        assert_eq!(outcome.exception, expected, "{code:x?} rbx {rbx:#x}");
        assert_eq!(outcome.rip, CODE_ADDRESS + offset, "{code:x?} rbx {rbx:#x}");
    }
}

#[test]
fn unmasked_floating_point_exceptions_arrive() {
    require_kvm!();
    let mut oracle = UserOracle::new().unwrap();
    // divps xmm0, xmm1 by zero, unmasked
    let mut start = input(&[0x0f, 0x5e, 0xc1]);
    start.fpu.xmm[0] = ONES;
    start.fpu.mxcsr = 0x1f80 & !0x200;
    let outcome = oracle.run(&start).unwrap();
    assert_eq!(outcome.exception, exception(19, None, None));
    assert_eq!(outcome.fpu.mxcsr & 0x3f, 4);
    // fld1; fldz; fdivp; fwait, unmasked
    let mut start = input(&[0xd9, 0xe8, 0xd9, 0xee, 0xde, 0xf9, 0x9b]);
    start.fpu.fcw = 0x37f & !4;
    let outcome = oracle.run(&start).unwrap();
    assert_eq!((outcome.exception, outcome.rip), (exception(16, None, None), CODE_ADDRESS + 6));
}

#[test]
fn a_run_leaves_nothing_behind() {
    require_kvm!();
    let mut oracle = UserOracle::new().unwrap();
    // Code, data and registers of one run, which the next must not see.
    let mut first = input(&[0x0f, 0x28, 0xc1, 0x48, 0x89, 0x03, 0xd9, 0xe8, 0xfd]);
    first.gpr = std::array::from_fn(|index| index as u64 + 0x1000);
    first.gpr[RBX] = DATA_ADDRESS;
    first.data = vec![0x5a; DATA_BYTES];
    first.fpu.xmm = [ONES; 16];
    let one = oracle.run(&first).unwrap();
    let second = input(&[0x90]);
    let outcome = oracle.run(&second).unwrap();
    assert_eq!((outcome.gpr, &outcome.fpu), (second.gpr, &second.fpu));
    assert_eq!(outcome.rip, CODE_ADDRESS + 2);
    assert_eq!(outcome.rflags, 0x202);
    assert!(outcome.data.iter().all(|byte| *byte == 0));
    assert_eq!(oracle.run(&first).unwrap(), one);
}

#[test]
fn an_endless_sequence_is_given_up() {
    require_kvm!();
    let mut oracle = UserOracle::new().unwrap();
    assert!(matches!(oracle.run(&input(&[0xeb, 0xfe])), Err(OracleError::TimedOut)));
    assert_eq!(oracle.run(&input(&[])).unwrap().exception.vector, 3);
}

#[test]
fn too_long_a_sequence_is_refused() {
    require_kvm!();
    let mut oracle = UserOracle::new().unwrap();
    let start = input(&[0x90; MAX_CODE_BYTES + 1]);
    assert!(matches!(oracle.run(&start), Err(OracleError::TooLong(_))));
    assert_eq!(oracle.run(&input(&[0x90; MAX_CODE_BYTES])).unwrap().exception.vector, 3);
}

#[test]
fn runs_are_fast_enough_for_a_million_a_night() {
    require_kvm!();
    let mut oracle = UserOracle::new().unwrap();
    let start = input(&[0x48, 0x01, 0xd8]);
    let began = std::time::Instant::now();
    const RUNS: u32 = 2000;
    for _ in 0..RUNS {
        oracle.run(&start).unwrap();
    }
    let each = began.elapsed() / RUNS;
    eprintln!("{each:?} a run");
    assert!(each < Duration::from_millis(20), "{each:?} a run");
}
