//! The engine under the clock that counts instructions.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reprise_machine::engine::{Access, Engine, Exit};
use reprise_trace::cpu_state::*;

use crate::KvmClock::Step;
use crate::KvmEngine;
use crate::testing::*;

const NOP: u8 = 0x90;
const OUT_AL_DX: u8 = 0xee;
const IN_AL_DX: u8 = 0xec;
const HLT: u8 = 0xf4;
const IRETQ: [u8; 2] = [0x48, 0xcf];
const INC_EBX: [u8; 2] = [0xff, 0xc3];
const HANDLER: u64 = CODE + 0x800;

/// RIP tick by tick, relative to the code.
fn offsets(engine: &mut KvmEngine, ticks: u64) -> Vec<u64> {
    trace(engine, ticks).into_iter().map(|rip| rip.wrapping_sub(CODE)).collect()
}

#[test]
fn each_instruction_is_a_tick_in_every_mode() {
    require_kvm!(Step);
    // inc bx (ebx); jz +0 ; loop -2 (to itself); nop; jmp $
    let code = [0xff, 0xc3, 0x74, 0x00, 0xe2, 0xfe, NOP, 0xeb, 0xfe];
    for state in [long_mode(), protected_mode(), real_mode()] {
        let state = CpuState {
            gpr: {
                let mut gpr = state.gpr;
                gpr[RCX] = 3;
                gpr
            },
            ..state
        };
        let offset = state.rip;
        let mut engine = engine(Step, &state, &code);
        let rips: Vec<u64> =
            offsets(&mut engine, 8).iter().map(|rip| rip.wrapping_add(CODE) - offset).collect();
        assert_eq!(rips, [2, 4, 4, 4, 6, 7, 7, 7]);
        assert_eq!(engine.cpu_state().unwrap().gpr[RBX], 1);
    }
}

#[test]
fn a_jump_to_a_repeated_instruction_and_indirect_branches_are_one_tick_each() {
    require_kvm!(Step);
    // 0: call [rbx]; 2: hlt; 3: jmp rax; 5: rep movsb; 7: ret
    let code = [0xff, 0x13, HLT, 0xff, 0xe0, 0xf3, 0xa4, 0xc3];
    let mut state = long_mode();
    state.gpr[RBX] = 0x9000;
    state.gpr[RAX] = CODE + 5;
    state.gpr[RCX] = 5000;
    state.gpr[RSI] = 0x1_1000;
    state.gpr[RDI] = 0x1_4000;
    let ram = ram_with(&code);
    put(&ram, 0x9000, &(CODE + 3).to_le_bytes());
    let mut engine = engine_on(ram, Step, &state);
    assert_eq!(offsets(&mut engine, 5), [3, 5, 7, 2, 3]);
}

#[test]
fn a_time_stamp_behind_a_prefix_is_as_long_as_it_is() {
    require_kvm!(Step);
    // rex.w rdtsc; rep rdtsc; hlt
    let code = [0x48, 0x0f, 0x31, 0xf3, 0x0f, 0x31, HLT];
    assert_eq!(offsets(&mut engine(Step, &long_mode(), &code), 3), [3, 6, 7]);
}

#[test]
fn a_handler_that_begins_with_hlt_halts() {
    require_kvm!(Step);
    const INVALID_OPCODE: u8 = 6;
    let ram = ram_with(&[NOP, 0x0f, 0x0b]);
    put_gate(&ram, INVALID_OPCODE, 0x9000);
    put(&ram, 0x9000, &[HLT, NOP, NOP]);
    let mut engine = engine_on(ram, Step, &long_mode());
    assert_eq!(run(&mut engine), Exit::Halt);
    let state = engine.cpu_state().unwrap();
    assert_eq!((engine.tick(), state.rip, state.halted), (2, 0x9001, true));
}

#[test]
fn what_is_executed_here_clears_the_resume_flag() {
    require_kvm!(Step);
    const RF: u64 = 1 << 16;
    let ram = ram_with(&[0xcd, 0x40]);
    put_gate(&ram, 0x40, HANDLER);
    put(&ram, HANDLER, &[HLT]);
    let state = CpuState { rflags: RF | 2, ..long_mode() };
    let mut engine = engine_on(ram, Step, &state);
    assert_eq!(run(&mut engine), Exit::Halt);
    let mut pushed = [0; 8];
    engine.read_ram(STACK_TOP - 24, &mut pushed);
    assert_eq!(u64::from_le_bytes(pushed), 2, "INT's frame");
    let mut engine = engine_on(ram_with(&[HLT]), Step, &state);
    assert_eq!(run(&mut engine), Exit::Halt);
    assert_eq!(engine.cpu_state().unwrap().rflags, 2, "HLT");
}

#[test]
fn accesses_are_one_tick_an_instruction() {
    require_kvm!(Step);
    // 0: in al, dx; 1: out dx, al; 2: rep outsb; 4: mov cl, 3; 6: rep insb; 8: mov cl, 0;
    // 10: rep outsb; 12: add word [rbx], 1; 16: hlt
    let code = [
        IN_AL_DX, OUT_AL_DX, 0xf3, 0x6e, 0xb1, 3, 0xf3, 0x6c, 0xb1, 0, 0xf3, 0x6e, 0x66, 0x83,
        0x03, 0x01, HLT,
    ];
    let mut state = long_mode();
    state.gpr[RBX] = 0xb_8000;
    state.gpr[RCX] = 4;
    state.gpr[RSI] = 0x9000;
    state.gpr[RDI] = 0xa000;
    let mut engine = engine(Step, &state, &code);
    assert_eq!(offsets(&mut engine, 9), [1, 2, 4, 6, 8, 10, 12, 16, 17]);
    let mut read = [0; 4];
    engine.read_ram(0xa000, &mut read);
    assert_eq!(read, [0x5a, 0x5a, 0x5a, 0]);
    assert!(engine.cpu_state().unwrap().halted);
}

#[test]
fn an_access_is_not_counted_before_it_is_finished() {
    require_kvm!(Step);
    let mut engine = engine(Step, &long_mode(), &[NOP, OUT_AL_DX, HLT]);
    let write = Exit::Access(Access::PortWrite { port: 0, size: 1, value: 0 });
    assert_eq!(run(&mut engine), write);
    assert_eq!(engine.tick(), 1);
    engine.finish_access(0).unwrap();
    assert_eq!(engine.tick(), 2);
    assert_eq!(run(&mut engine), Exit::Halt);
    assert_eq!(engine.tick(), 3);
    assert_eq!(run(&mut engine), Exit::Halt);
    assert_eq!(engine.tick(), 3);
}

#[test]
fn an_interrupt_is_delivered_between_two_ticks() {
    require_kvm!(Step);
    let ram = ram_with(&[NOP; 8]);
    put(&ram, HANDLER, &[&INC_EBX[..], &IRETQ].concat());
    put_gate(&ram, 0x30, HANDLER);
    let mut state = long_mode();
    state.rflags |= 0x200;
    let mut engine = engine_on(ram, Step, &state);
    offsets(&mut engine, 2);
    let before = engine.cpu_state().unwrap();
    engine.inject(0x30).unwrap();
    assert_eq!(engine.tick(), 2);
    let delivered = engine.cpu_state().unwrap();
    assert_eq!(delivered.rip, HANDLER);
    assert_eq!(delivered.rflags, 2);
    assert_eq!(delivered.gpr[RSP], STACK_TOP - 40);
    let mut frame = [0; 40];
    engine.read_ram(STACK_TOP - 40, &mut frame);
    let words: Vec<u64> =
        frame.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect();
    let (code, data) = (u64::from(CODE_SELECTOR), u64::from(DATA_SELECTOR));
    assert_eq!(words, [CODE + 2, code, before.rflags, STACK_TOP, data]);
    assert_eq!(offsets(&mut engine, 4), [0x802, 2, 3, 4]);
    let mut expected = before;
    expected.gpr[RBX] = 1;
    expected.rip += 2;
    assert_eq!(engine.cpu_state().unwrap(), expected);
}

#[test]
fn kvm_and_the_transfers_made_here_agree() {
    require_kvm!(Step);
    // The same interrupt, delivered by KVM under the clock that counts exits, and by the step clock.
    // handler: out dx, al; iretq. code: sti; nop; out dx, al; mov ax, ss; hlt
    let code = [0xfb, NOP, OUT_AL_DX, 0x66, 0x8c, 0xd0, HLT];
    let mut states = Vec::new();
    for clock in [crate::KvmClock::Sync, Step] {
        let ram = ram_with(&code);
        put(&ram, HANDLER, &[&[OUT_AL_DX][..], &IRETQ].concat());
        put_gate(&ram, 0x41, HANDLER);
        let mut engine = engine_on(ram, clock, &long_mode());
        let mut seen = Vec::new();
        assert!(matches!(run(&mut engine), Exit::Access(_)));
        engine.finish_access(0).unwrap();
        engine.inject(0x41).unwrap();
        assert!(matches!(run(&mut engine), Exit::Access(_)));
        engine.finish_access(0).unwrap();
        seen.push(engine.cpu_state().unwrap());
        assert_eq!(run(&mut engine), Exit::Halt);
        seen.push(engine.cpu_state().unwrap());
        let mut stack = [0; 64];
        engine.read_ram(STACK_TOP - 64, &mut stack);
        states.push((seen, stack));
    }
    assert_eq!(states[0], states[1]);
}

#[test]
fn an_interrupt_in_protected_mode_is_left_to_kvm_and_counts_the_same() {
    require_kvm!(Step);
    // handler: inc ebx; inc ebx
    let ram = ram_with(&[NOP; 4]);
    put(&ram, HANDLER, &[INC_EBX, INC_EBX].concat());
    let gate =
        HANDLER & 0xffff | u64::from(CODE32_SELECTOR) << 16 | 0x8e00 << 32 | (HANDLER >> 16) << 48;
    put(&ram, IDT + 8 * 0x30, &gate.to_le_bytes());
    let mut state = protected_mode();
    state.rflags |= 0x200;
    let mut engine = engine_on(ram, Step, &state);
    offsets(&mut engine, 1);
    engine.inject(0x30).unwrap();
    assert!(!engine.interruptible().unwrap());
    assert_eq!(engine.run(1).unwrap(), Exit::TickReached);
    assert_eq!(offsets(&mut engine, 2), [0x802, 0x804]);
}

#[test]
fn faults_retire_nothing() {
    require_kvm!(Step);
    // 0: nop; 1: mov eax, [rbx] (not mapped); 3: nop. The handler maps nothing but moves RBX.
    let ram = ram_with(&[NOP, 0x8b, 0x03, NOP, NOP]);
    // mov ebx, 0x9000; add rsp, 8; iretq
    let handler = [&[0xbb, 0, 0x90, 0, 0, 0x48, 0x83, 0xc4, 8][..], &IRETQ].concat();
    put(&ram, HANDLER, &handler);
    put_gate(&ram, 14, HANDLER);
    let mut state = long_mode();
    state.gpr[RBX] = 0x4000_0000;
    let mut engine = engine_on(ram, Step, &state);
    assert_eq!(offsets(&mut engine, 6), [1, 0x805, 0x809, 1, 3, 4]);
    assert_eq!(engine.cpu_state().unwrap().cr2, 0x4000_0000);
}

#[test]
fn a_handler_that_begins_with_a_repeated_instruction_counts_it_once() {
    require_kvm!(Step);
    // ud2; handler: rep stosb; nop
    let ram = ram_with(&[0x0f, 0x0b]);
    put(&ram, HANDLER, &[0xf3, 0xaa, NOP]);
    put_gate(&ram, 6, HANDLER);
    let mut state = long_mode();
    state.gpr[RCX] = 5000;
    state.gpr[RDI] = 0x1_4000;
    let mut engine = engine_on(ram, Step, &state);
    assert_eq!(offsets(&mut engine, 2), [0x802, 0x803]);
    assert_eq!(engine.moment().unwrap().rcx, 0);
}

#[test]
fn a_handler_that_is_only_iretq_works_for_interrupts_and_software_interrupts() {
    require_kvm!(Step);
    // 0: int 0x30; 2: int3; 3: nop
    let ram = ram_with(&[0xcd, 0x30, 0xcc, NOP, NOP]);
    put(&ram, HANDLER, &IRETQ);
    put_gate(&ram, 0x30, HANDLER);
    put_gate(&ram, 3, HANDLER);
    let mut state = long_mode();
    state.rflags |= 0x200;
    let mut engine = engine_on(ram, Step, &state);
    assert_eq!(offsets(&mut engine, 4), [0x800, 2, 0x800, 3]);
    engine.inject(0x30).unwrap();
    assert_eq!(offsets(&mut engine, 2), [3, 4]);
}

#[test]
fn a_step_that_never_ends_can_be_kicked() {
    require_kvm!(Step);
    // ud2; its handler is iretq, so that on some KVMs no step is ever done.
    let ram = ram_with(&[0x0f, 0x0b]);
    put(&ram, HANDLER, &IRETQ);
    put_gate(&ram, 6, HANDLER);
    let mut engine = engine_on(ram, Step, &long_mode());
    let kick = engine.kicker();
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(5));
        kick.kick();
    });
    assert_eq!(run(&mut engine), Exit::Kicked);
    thread.join().unwrap();
}

#[test]
fn more_than_one_instruction_in_a_step_is_refused() {
    require_kvm!(Step);
    // 32-bit iret, which only KVM executes, to a few nop.
    let ram = ram_with(&[0xcf, NOP, NOP, NOP]);
    let frame = [CODE as u32 + 1, u32::from(CODE32_SELECTOR), 2];
    for (index, word) in (0u64..).zip(frame) {
        put(&ram, STACK_TOP - 12 + 4 * index, &word.to_le_bytes());
    }
    let mut state = protected_mode();
    state.gpr[RSP] = STACK_TOP - 12;
    let mut engine = engine_on(ram, Step, &state);
    match engine.run(1).unwrap() {
        Exit::Unsupported(reason) => assert!(reason.contains("0x10000"), "{reason}"),
        Exit::TickReached => assert_eq!(engine.moment().unwrap().rip, CODE + 1),
        exit => panic!("{exit:?}"),
    }
}

#[test]
fn the_interrupt_window_opens_after_the_shadow() {
    require_kvm!(Step);
    // cli; sti; nop; nop
    let mut engine = engine(Step, &long_mode(), &[0xfa, 0xfb, NOP, NOP, NOP, NOP]);
    engine.set_interrupt_request(true);
    assert_eq!(run(&mut engine), Exit::InterruptWindow);
    assert_eq!((engine.tick(), engine.moment().unwrap().rip), (3, CODE + 3));
    // Not taken, so it is said again.
    assert_eq!(run(&mut engine), Exit::InterruptWindow);
    engine.set_interrupt_request(false);
    assert_eq!(engine.run(5).unwrap(), Exit::TickReached);
    assert!(engine.interruptible().unwrap());
}

#[test]
fn a_kick_waits_for_the_end_of_a_repeated_instruction() {
    require_kvm!(Step);
    // 0: rep stosb; 2: jmp $
    let code = [0xf3, 0xaa, 0xeb, 0xfe];
    let mut state = long_mode();
    state.gpr[RCX] = 0x10_0000;
    state.gpr[RDI] = 0x10_0000;
    let mut engine = engine(Step, &state, &code);
    let kick = engine.kicker();
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(2));
        kick.kick();
    });
    assert_eq!(run(&mut engine), Exit::Kicked);
    thread.join().unwrap();
    let moment = engine.moment().unwrap();
    assert!(moment.rcx == 0 && moment.rip == CODE + 2, "{moment}");
}

#[test]
fn signals_of_others_do_not_disturb_the_count() {
    require_kvm!(Step);
    // 0: inc ebx; 2: jmp 0
    let mut engine = engine(Step, &long_mode(), &[0xff, 0xc3, 0xeb, 0xfc]);
    // SAFETY: pthread_self has no preconditions.
    let stepping = unsafe { libc::pthread_self() };
    crate::kick::install_handler().unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // SAFETY: the thread outlives this scope, and the signal has a handler.
                unsafe { libc::pthread_kill(stepping, crate::kick::signal()) };
                std::thread::sleep(Duration::from_micros(20));
            }
        });
        assert_eq!(engine.run(20_000).unwrap(), Exit::TickReached);
        stop.store(true, Ordering::Relaxed);
    });
    let state = engine.cpu_state().unwrap();
    assert_eq!((state.gpr[RBX], state.rip), (10_000, CODE));
}

#[test]
fn user_code_that_is_not_64_bit_is_refused_with_a_reason() {
    require_kvm!(Step);
    let mut state = protected_mode();
    for segment in &mut state.segments {
        segment.attributes |= 3 << 5;
        segment.selector |= 3;
    }
    let mut engine = engine(Step, &state, &[NOP]);
    match run(&mut engine) {
        Exit::Unsupported(reason) => assert!(reason.contains("user code"), "{reason}"),
        exit => panic!("{exit:?}"),
    }
}

#[test]
fn a_guest_that_steps_itself_is_refused() {
    require_kvm!(Step);
    // pushf; or word [rsp], 0x100; popf
    let code = [0x9c, 0x66, 0x81, 0x0c, 0x24, 0x00, 0x01, 0x9d];
    let mut engine = engine(Step, &long_mode(), &code);
    match run(&mut engine) {
        Exit::Unsupported(reason) => assert!(reason.contains("TF"), "{reason}"),
        exit => panic!("{exit:?}"),
    }
    assert_eq!(engine.tick(), 2);
}

#[test]
fn a_triple_fault_ends_the_run() {
    require_kvm!(Step);
    let mut state = long_mode();
    state.idtr.limit = 0;
    let mut engine = engine(Step, &state, &[NOP, 0x0f, 0x0b]);
    assert_eq!(run(&mut engine), Exit::TripleFault);
    assert_eq!(engine.tick(), 1);
}

#[test]
fn an_instruction_that_kvm_cannot_execute_is_named() {
    require_kvm!(Step);
    // cmpxchg16b [rbx]
    let mut state = long_mode();
    state.gpr[RBX] = 0x9000;
    let mut engine = engine(Step, &state, &[0x48, 0x0f, 0xc7, 0x0b]);
    match run(&mut engine) {
        Exit::Unsupported(reason) => assert!(reason.contains("48 0f c7 0b"), "{reason}"),
        Exit::TickReached => {}
        exit => panic!("{exit:?}"),
    }
}

#[test]
fn a_fault_amid_a_repeated_instruction_shows_no_trap_flag() {
    require_kvm!(Step);
    // rep stosb to the end of what is mapped; the handler: pop rcx; hlt
    let ram = ram_with(&[0xf3, 0xaa]);
    put(&ram, HANDLER, &[0x59, HLT]);
    put_gate(&ram, 14, HANDLER);
    let mut state = long_mode();
    state.gpr[RCX] = 100;
    state.gpr[RDI] = 0x4000_0000 - 7;
    put(&ram, 0x3000 + 8 * 511, &0x87u64.to_le_bytes());
    let mut engine = engine_on(ram, Step, &state);
    assert_eq!(run(&mut engine), Exit::Halt);
    assert_eq!(engine.tick(), 2);
    let mut flags = [0; 8];
    engine.read_ram(STACK_TOP - 24, &mut flags);
    assert_eq!(u64::from_le_bytes(flags) & 0x100, 0);
    let mut rip = [0; 8];
    engine.read_ram(STACK_TOP - 40, &mut rip);
    assert_eq!(u64::from_le_bytes(rip), CODE);
}

#[test]
fn interrupt_shadows_are_those_of_hardware() {
    require_kvm!(Step);
    // 0: sti; 1: sti; 2: nop; 3: mov ss, eax; 5: mov ss, eax; 7: nop; 8: sti; 9: nop; 10: cli; 11: sti
    let code = [0xfb, 0xfb, NOP, 0x8e, 0xd0, 0x8e, 0xd0, NOP, 0xfb, NOP, 0xfa, 0xfb, NOP, NOP];
    let mut state = long_mode();
    state.gpr[RAX] = u64::from(DATA_SELECTOR);
    let mut engine = engine(Step, &state, &code);
    let open: Vec<bool> = (0..12)
        .map(|_| {
            offsets(&mut engine, 1);
            engine.interruptible().unwrap()
        })
        .collect();
    let (yes, no) = (true, false);
    assert_eq!(open, [no, yes, yes, no, no, yes, yes, yes, no, no, yes, yes]);
    // Alone with interrupts open already, an STI holds nothing off.
    assert!(!engine.cpu_state().unwrap().interrupt_shadow);
}
