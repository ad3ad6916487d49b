//! User code under the clock `step`: each instruction counted, and what it raises delivered as hardware does.

use reprise_devices::cpu_model::cpuid;
use reprise_machine::clock::TimeBase;
use reprise_machine::engine::{Access, Engine, Exit};
use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::*;

use crate::KvmClock::Step;
use crate::KvmEngine;
use crate::self_test::steps_user_code;
use crate::testing::{put, require_kvm, trace};
use crate::user_oracle::*;

const NOP: u8 = 0x90;
const INT3: u8 = 0xcc;
const UD2: [u8; 2] = [0x0f, 0x0b];
const PUSHF: u8 = 0x9c;
const POPF: u8 = 0x9d;
const IRETQ: [u8; 2] = [0x48, 0xcf];
const TASK_STATE: u64 = 0x5800;
const KERNEL_STACK_TOP: u64 = 0xa000;
const KERNEL_CODE: u64 = 0x08;
const USER_CODE: u64 = 0x23;
const USER_DATA: u64 = 0x1b;
const RF: u64 = 1 << 16;
const TF: u64 = 1 << 8;

macro_rules! require_user_steps {
    () => {
        require_kvm!(Step);
        if !steps_user_code() {
            $crate::testing::skipped("this host's KVM does not step user code");
            return;
        }
    };
}

/// An engine at the start of user code.
fn user(code: &[u8]) -> KvmEngine {
    user_with(code, |_, _| {})
}

fn user_with(code: &[u8], change: impl FnOnce(&GuestRam, &mut CpuState)) -> KvmEngine {
    let ram = GuestRam::new(RAM_MIB).expect("RAM");
    let input = UserInput { code: code.to_vec(), ..UserInput::default() };
    let mut state = build_image(&ram, &input).expect("the code fits");
    change(&ram, &mut state);
    let mut engine = KvmEngine::new(ram, Step).expect("KVM");
    engine.set_cpu_state(&state).expect("a state that KVM takes");
    engine
}

fn at(offset: u64) -> u64 {
    CODE_ADDRESS + offset
}

fn read(engine: &KvmEngine, address: u64) -> u64 {
    let mut bytes = [0; 8];
    engine.read_ram(address, &mut bytes);
    u64::from_le_bytes(bytes)
}

/// The words of the frame on the kernel's stack, lowest first.
fn frame(engine: &KvmEngine, words: u64) -> Vec<u64> {
    (1..=words).rev().map(|word| read(engine, KERNEL_STACK_TOP - 8 * word)).collect()
}

#[track_caller]
fn assert_refused(engine: &mut KvmEngine, why: &str) {
    match engine.run(1000).unwrap() {
        Exit::Unsupported(reason) => assert!(reason.contains(why), "{reason}"),
        exit => panic!("{exit:?}"),
    }
}

#[test]
fn each_instruction_is_a_tick_and_leaves_no_trace() {
    require_user_steps!();
    // 0: inc ebx; 2: jz +0; 4: loop to itself; 6: call next; 11: rep stosb; 13: jmp $
    let code = [0xff, 0xc3, 0x74, 0, 0xe2, 0xfe, 0xe8, 0, 0, 0, 0, 0xf3, 0xaa, 0xeb, 0xfe];
    let mut engine = user_with(&code, |_, state| {
        state.gpr[RCX] = 3;
        state.gpr[RDI] = DATA_ADDRESS;
    });
    let before = engine.cpu_state().unwrap();
    let offsets = [2, 4, 4, 4, 6, 11];
    assert_eq!(trace(&mut engine, 6), offsets.map(at));
    let mut expected = before;
    expected.gpr[RBX] = 1;
    expected.gpr[RCX] = 0;
    expected.gpr[RSP] -= 8;
    expected.rip = at(11);
    let state = engine.cpu_state().unwrap();
    expected.rflags = state.rflags & !TF;
    assert_eq!(state, expected);
    assert_eq!(frame(&engine, 8), [0; 8], "nothing is written to the kernel's stack");
    let mut state = state;
    state.gpr[RCX] = 5000;
    engine.set_cpu_state(&state).unwrap();
    assert_eq!(trace(&mut engine, 4), [13, 13, 13, 13].map(at));
    assert_eq!(engine.moment().unwrap().rcx, 0);
}

#[test]
fn faults_retire_nothing_and_their_frames_show_no_trap_flag() {
    require_user_steps!();
    // Each faults at its second instruction: ud2; hlt; mov eax, [0x300000]; div of zero.
    let cases: [(u8, &[u8], Option<u64>); 4] = [
        (6, &UD2, None),
        (13, &[0xf4], Some(0)),
        (14, &[0x8b, 0x04, 0x25, 0, 0, 0x30, 0], Some(4)),
        (0, &[0x31, 0xc9, 0xf7, 0xf1], None),
    ];
    for (vector, code, error_code) in cases {
        let mut engine = user(&[&[NOP], code].concat());
        let faulting = if vector == 0 { 3 } else { 1 };
        trace(&mut engine, if vector == 0 { 2 } else { 1 });
        let before = engine.cpu_state().unwrap();
        // HLT is the handler's first instruction.
        assert_eq!(engine.run(u64::MAX).unwrap(), Exit::Halt, "vector {vector}");
        let tick = engine.tick();
        let state = engine.cpu_state().unwrap();
        assert_eq!(state.rip, 0x7000 + 16 * u64::from(vector) + 1);
        assert_eq!(tick, if vector == 0 { 3 } else { 2 });
        let flags = before.rflags | RF;
        let rsp = before.gpr[RSP];
        let mut expected = vec![at(faulting), USER_CODE, flags, rsp, USER_DATA];
        expected.splice(0..0, error_code);
        assert_eq!(frame(&engine, expected.len() as u64), expected, "vector {vector}");
        assert_eq!(state.dr6, before.dr6);
        assert_eq!(state.idtr, before.idtr);
        assert_eq!(state.cr2, if vector == 14 { 0x30_0000 } else { 0 });
        assert_eq!((state.cpl(), state.segments[SS]), (0, Segment::default()));
    }
}

#[test]
fn a_fault_amid_a_repeated_instruction_keeps_what_is_done() {
    require_user_steps!();
    // rep stosb over the end of the data
    let mut engine = user_with(&[0xf3, 0xaa], |_, state| {
        state.gpr[RCX] = 100;
        state.gpr[RDI] = DATA_ADDRESS + DATA_BYTES as u64 - 7;
    });
    assert_eq!(engine.run(u64::MAX).unwrap(), Exit::Halt);
    let state = engine.cpu_state().unwrap();
    assert_eq!((engine.tick(), state.gpr[RCX], state.rip), (1, 93, 0x7000 + 14 * 16 + 1));
    assert_eq!(read(&engine, KERNEL_STACK_TOP - 48), 6, "a write by user code to what is absent");
}

#[test]
fn flags_on_the_stack_show_no_trap_flag() {
    require_user_steps!();
    // stc; pushf; pop rax; pushfw; pop cx; push 2; popf; pushf; pop rdx; jmp $
    let code = [0xf9, PUSHF, 0x58, 0x66, PUSHF, 0x66, 0x59, 0x6a, 2, POPF, PUSHF, 0x5a, 0xeb, 0xfe];
    let mut engine = user(&code);
    let offsets = [1, 2, 3, 5, 7, 9, 10, 11, 12, 12, 12];
    assert_eq!(trace(&mut engine, 11), offsets.map(at));
    let state = engine.cpu_state().unwrap();
    assert_eq!([state.gpr[RAX], state.gpr[RCX], state.gpr[RDX]], [0x203, 0x203, 0x202]);
    assert_eq!(state.rflags, 0x202);
}

#[test]
fn software_interrupts_go_through_their_gates_or_fault() {
    require_user_steps!();
    for (code, vector, error_code) in [
        (&[INT3][..], 3, None),
        (&[0xcd, 4], 4, None),
        (&[0xcd, 0x80], 13, Some(0x80 << 3 | 2)),
        (&[0xcd, 1], 13, Some(1 << 3 | 2)),
    ] {
        let mut engine = user(code);
        let before = engine.cpu_state().unwrap();
        assert_eq!(engine.run(u64::MAX).unwrap(), Exit::Halt);
        let state = engine.cpu_state().unwrap();
        assert_eq!(state.rip, 0x7000 + 16 * vector + 1);
        assert_eq!(engine.tick(), if error_code.is_none() { 2 } else { 1 });
        let (rip, flags) = match error_code {
            None => (at(code.len() as u64), before.rflags),
            Some(_) => (at(0), before.rflags | RF),
        };
        let mut expected = vec![rip, USER_CODE, flags, before.gpr[RSP], USER_DATA];
        expected.splice(0..0, error_code);
        assert_eq!(frame(&engine, expected.len() as u64), expected);
    }
}

#[test]
fn system_calls_go_to_the_kernel_and_back() {
    require_user_steps!();
    const ENTRY: u64 = 0x9000;
    // 0: syscall; 2: inc ebx; kernel: nop; sysretq
    let mut engine = user_with(&[0x0f, 0x05, 0xff, 0xc3], |ram, state| {
        put(ram, ENTRY, &[NOP, 0x48, 0x0f, 0x07]);
        state.star = 0x10 << 48 | KERNEL_CODE << 32;
        state.lstar = ENTRY;
        state.sfmask = 0x200;
    });
    let before = engine.cpu_state().unwrap();
    assert_eq!(trace(&mut engine, 1), [ENTRY]);
    let inside = engine.cpu_state().unwrap();
    assert_eq!((inside.cpl(), inside.rflags), (0, 2));
    assert_eq!((inside.gpr[RCX], inside.gpr[11]), (at(2), before.rflags));
    assert_eq!(trace(&mut engine, 3), [ENTRY + 1, at(2), at(4)]);
    let state = engine.cpu_state().unwrap();
    assert_eq!((state.cpl(), state.gpr[RBX], state.rflags), (3, 1, before.rflags));
    assert_eq!(state.segments[CS].selector, 0x23);
    assert_eq!(state.segments[SS].selector, 0x1b);
}

#[test]
fn interrupts_and_their_return_are_exact() {
    require_user_steps!();
    // inc ebx; jmp 0. Handler: inc ecx; iretq
    let mut engine = user_with(&[0xff, 0xc3, 0xeb, 0xfc], |ram, _| {
        put(ram, 0x7000 + 16 * 0x30, &[&[0xff, 0xc1][..], &IRETQ].concat());
    });
    assert_eq!(trace(&mut engine, 3), [2, 0, 2].map(at));
    let before = engine.cpu_state().unwrap();
    assert!(engine.interruptible().unwrap());
    engine.inject(0x30).unwrap();
    assert_eq!(engine.tick(), 3);
    assert_eq!(frame(&engine, 5), [at(2), USER_CODE, before.rflags, before.gpr[RSP], USER_DATA]);
    assert_eq!(trace(&mut engine, 4), [0x7302, at(2), at(0), at(2)]);
    let state = engine.cpu_state().unwrap();
    assert_eq!((state.gpr[RBX], state.gpr[RCX]), (3, 1));
    assert_eq!(state.segments[CS], before.segments[CS]);
    assert_eq!(state.segments[DS], before.segments[DS]);
}

#[test]
fn time_and_identity_are_the_machines() {
    require_user_steps!();
    // rdtsc; mov ebx, eax; xor eax, eax; cpuid
    let code = [0x0f, 0x31, 0x89, 0xc3, 0x31, 0xc0, 0x0f, 0xa2];
    let mut engine = user(&code);
    engine.set_time_base(TimeBase { tick: 0, ns: 7000, ns_per_tick: 100 });
    trace(&mut engine, 2);
    assert_eq!(engine.cpu_state().unwrap().gpr[RBX], 7000);
    trace(&mut engine, 2);
    let gpr = engine.cpu_state().unwrap().gpr;
    assert_eq!([RAX, RBX, RCX, RDX].map(|index| gpr[index] as u32), cpuid(0, 7000));
    // Behind prefixes: rep rdtsc; rex.w rdtsc.
    let mut prefixed = user(&[0xf3, 0x0f, 0x31, 0x48, 0x0f, 0x31]);
    assert_eq!(trace(&mut prefixed, 2), [3, 6].map(at));
    // With TSD it faults.
    let mut engine = user_with(&code, |_, state| state.cr4 |= 4);
    assert_eq!(engine.run(u64::MAX).unwrap(), Exit::Halt);
    assert_eq!(engine.cpu_state().unwrap().rip, 0x7000 + 13 * 16 + 1);
    assert_eq!(engine.tick(), 1);
}

#[test]
fn accesses_of_user_code_are_one_tick_an_instruction() {
    require_user_steps!();
    // in al, dx; out dx, al; mov cl, 3; rep insb; nop
    let code = [0xec, 0xee, 0xb1, 3, 0xf3, 0x6c, NOP];
    let mut engine = user_with(&code, |ram, state| {
        // The bitmap of ports, all allowed, begins where the TSS does.
        put(ram, TASK_STATE + 0x66, &[0, 0]);
        state.gpr[RDX] = 8;
        state.gpr[RDI] = DATA_ADDRESS;
    });
    let until = Exit::Access(Access::PortRead { port: 8, size: 1 });
    assert_eq!(engine.run(u64::MAX).unwrap(), until);
    engine.finish_access(0x77).unwrap();
    assert_eq!((engine.tick(), engine.cpu_state().unwrap().gpr[RAX]), (1, 0x77));
    assert_eq!(trace(&mut engine, 4), [2, 4, 6, 7].map(at));
}

#[test]
fn what_hardware_would_answer_is_refused() {
    require_user_steps!();
    // sgdt [rsp]; rdtscp; mov ds, eax; xgetbv; vzeroupper
    let cases: [&[u8]; 5] = [
        &[0x0f, 0x01, 0x04, 0x24],
        &[0x0f, 0x01, 0xf9],
        &[0x8e, 0xd8],
        &[0x0f, 0x01, 0xd0],
        &[0xc5, 0xf8, 0x77],
    ];
    for code in cases {
        let mut engine = user(&[&[NOP], code].concat());
        assert_refused(&mut engine, "show the host's CPU");
        assert_eq!(engine.tick(), 1);
    }
    // pushf; or word [rsp], 0x100; popf
    let code = [PUSHF, 0x66, 0x81, 0x0c, 0x24, 0x00, 0x01, POPF];
    assert_refused(&mut user(&code), "TF");
    let breakpoints = |_: &GuestRam, state: &mut CpuState| state.dr7 = 0x401;
    assert_refused(&mut user_with(&[NOP], breakpoints), "DR7");
}

#[test]
fn signals_do_not_disturb_the_count() {
    require_user_steps!();
    // inc ebx; jmp 0
    let mut engine = user(&[0xff, 0xc3, 0xeb, 0xfc]);
    // SAFETY: pthread_self has no preconditions.
    let stepping = unsafe { libc::pthread_self() };
    crate::kick::install_handler().unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                // SAFETY: the thread outlives this scope, and the signal has a handler.
                unsafe { libc::pthread_kill(stepping, crate::kick::signal()) };
                std::thread::sleep(std::time::Duration::from_micros(300));
            }
        });
        let exit = engine.run(4000);
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(exit.unwrap(), Exit::TickReached);
    });
    let state = engine.cpu_state().unwrap();
    assert_eq!((state.gpr[RBX], state.rip), (2000, at(0)));
}
