//! Debug exceptions: the trap flag, instruction, data and I/O breakpoints, the resume flag, general
//! detect, and what holds them off.

mod guest;

use guest::{
    ABSENT, ENTRY, Ended, Guest, HANDLERS, INNER_STACK, KERNEL_CODE, KERNEL_DATA, KERNEL_SS,
    KERNEL_STACK, RF, TF, USER_CODE, USER_CS, USER_SS, USER_STACK,
};
use reprise_machine::engine::{Access, Engine, Exit};
use reprise_trace::cpu_state::{CS, RAX, RBX, RCX, RDI, RSP};

const DB: u8 = 1;
const UD: u8 = 6;
const PF: u8 = 14;
const SINGLE_STEP: u64 = 0x4000;
const GENERAL_DETECT: u64 = 0x2000;
const FIXED: u64 = 0xffff_0ff0;
const NOP: u8 = 0x90;

/// DR7 with breakpoint 0 on: `condition` 0 executes, 1 writes, 2 ports, 3 reads or writes; `length`
/// as encoded (0 one byte, 1 two, 2 eight, 3 four).
const fn control(condition: u64, length: u64) -> u64 {
    0x401 | condition << 16 | length << 18
}

/// Checks that #DB came with DR6 and a return address.
fn assert_debug(ended: &Ended, name: &str, dr6: u64, rip: u64) {
    let delivered = ended.delivered().unwrap_or_else(|| panic!("{name}: {:?}", ended.exit));
    assert_eq!(delivered.vector, DB, "{name}");
    assert_eq!(ended.state.dr6, FIXED | dr6, "{name}: DR6 {:#x}", ended.state.dr6);
    assert_eq!(delivered.rip, rip, "{name}: RIP");
    assert_eq!(ended.state.rflags & TF, 0, "{name}: TF in the handler");
}

#[test]
fn the_trap_flag_steps_instructions() {
    // (name, code, TF before, the trap's distance from the start)
    #[rustfmt::skip]
    let cases: &[(&str, &[u8], bool, u64)] = &[
        ("nop", &[NOP, NOP], true, 1),
        // push 0x102; popfq; nop: the trap comes after the instruction that follows.
        ("popfq sets TF", &[0x68, 2, 1, 0, 0, 0x9d, NOP, NOP], false, 7),
        // mov eax, ss; mov ss, eax; nop: loading SS holds the trap off.
        ("first before mov ss", &[0x8c, 0xd0, 0x8e, 0xd0, NOP, NOP], true, 2),
        ("mov ss", &[0x8e, 0xd0, NOP, NOP], true, 3),
        // lss esp, [rbx]: it loads the stack pointer itself, so it holds nothing off.
        ("lss", &[0x0f, 0xb2, 0x23, NOP, NOP], true, 3),
        ("jmp", &[0xeb, 4, NOP, NOP, NOP, NOP, NOP], true, 6),
        // The trap comes after each element of a REP, which then goes on from its start.
        ("rep stosb", &[0xf3, 0xaa, NOP], true, 0),
        ("sti", &[0xfb, NOP], true, 1),
        ("hlt", &[0xf4, NOP], true, 1),
    ];
    for &(name, code, trap, distance) in cases {
        let ended = Guest::long()
            .code(code)
            .with(|guest| {
                guest.state.rflags |= if trap { TF } else { 0 };
                guest.state.gpr[RAX] = KERNEL_SS.into();
                guest.state.gpr[RCX] = 100;
                guest.state.gpr[RDI] = KERNEL_DATA;
                guest.state.gpr[RBX] = KERNEL_DATA + 0x100;
                guest.write(KERNEL_DATA + 0x100, &(KERNEL_STACK as u32).to_le_bytes());
                guest.write(KERNEL_DATA + 0x104, &KERNEL_SS.to_le_bytes());
            })
            .run();
        assert_debug(&ended, name, SINGLE_STEP, KERNEL_CODE + distance);
        let delivered = ended.delivered().expect("the handler ran");
        assert_eq!(delivered.rflags & (TF | RF), TF, "{name}: RFLAGS in the frame");
    }
}

#[test]
fn popf_that_clears_the_trap_flag_still_traps() {
    // push 2; popfq; nop, stepped from the second instruction on.
    let ended = Guest::long()
        .code(&[0x9d, NOP])
        .with(|guest| {
            guest.write(KERNEL_STACK - 64, &2u64.to_le_bytes());
            guest.state.gpr[RSP] = KERNEL_STACK - 64;
            guest.state.rflags |= TF;
        })
        .run();
    assert_debug(&ended, "popfq", SINGLE_STEP, KERNEL_CODE + 1);
    assert_eq!(ended.delivered().expect("the handler ran").rflags & TF, 0);
}

#[test]
fn events_and_system_calls_set_the_trap_flag_aside() {
    let ended = Guest::long().code(&[0xcd, 0x40]).with(|guest| guest.state.rflags |= TF).run();
    let delivered = ended.delivered().expect("the handler ran");
    assert_eq!((delivered.vector, delivered.rflags & TF), (0x40, TF));
    assert_eq!(ended.state.dr6, FIXED);

    let ended = Guest::long().code(&[0x0f, 0x0b]).with(|guest| guest.state.rflags |= TF).run();
    assert_eq!(ended.fault(), (UD, None));

    let ended = Guest::long()
        .user()
        .code(&[0x0f, 0x05])
        .with(|guest| {
            guest.state.rflags |= TF;
            guest.state.sfmask = TF;
        })
        .run();
    assert_eq!((ended.exit, ended.state.rip), (Exit::Halt, ENTRY + 1), "syscall");
}

#[test]
fn a_system_call_that_keeps_the_trap_flag_traps_at_its_entry() {
    let ended = Guest::long()
        .user()
        .code(&[0x0f, 0x05])
        .with(|guest| guest.state.rflags |= TF)
        .run_instructions(2);
    let delivered = ended.delivered().expect("the handler ran");
    assert_eq!((delivered.vector, delivered.rip, delivered.rflags), (DB, ENTRY, TF | 2));
    assert_eq!(ended.state.dr6, FIXED | SINGLE_STEP);
}

#[test]
fn sysret_that_sets_the_trap_flag_traps_at_once() {
    let ended = Guest::long()
        .code(&[0x48, 0x0f, 0x07])
        .with(|guest| {
            guest.state.gpr[RCX] = USER_CODE;
            guest.state.gpr[11] = TF | 2;
        })
        .run();
    assert_debug(&ended, "sysretq", SINGLE_STEP, USER_CODE);
    let delivered = ended.delivered().expect("the handler ran");
    assert_eq!((delivered.cs, delivered.rflags), (USER_CS, TF | 2));
}

#[test]
fn iretq_that_sets_the_trap_flag_steps_the_next_instruction() {
    let ended = Guest::long()
        .code(&[0x48, 0xcf])
        .with(|guest| {
            guest.write(USER_CODE, &[NOP, NOP]);
            let frame = [USER_CODE, USER_CS.into(), TF | 2, USER_STACK, USER_SS.into()];
            for (index, value) in frame.iter().enumerate() {
                guest.write(KERNEL_STACK - 64 + 8 * index as u64, &value.to_le_bytes());
            }
            guest.state.gpr[RSP] = KERNEL_STACK - 64;
        })
        .run();
    assert_debug(&ended, "iretq", SINGLE_STEP, USER_CODE + 1);
}

#[test]
fn an_instruction_breakpoint_comes_before_its_instruction() {
    let run = |resume: bool| {
        Guest::long()
            .code(&[NOP, NOP, NOP, 0xf4])
            .with(|guest| {
                guest.state.dr[0] = KERNEL_CODE + u64::from(!resume);
                guest.state.dr7 = control(0, 0);
                guest.state.rflags |= if resume { RF } else { 0 };
            })
            .run()
    };
    let ended = run(false);
    assert_debug(&ended, "breakpoint", 1, KERNEL_CODE + 1);
    assert_eq!(ended.delivered().expect("the handler ran").rflags & RF, 0);
    assert_eq!(ended.engine.tick(), 2);
    let ended = run(true);
    assert_eq!((ended.exit, ended.state.rip), (Exit::Halt, KERNEL_CODE + 4), "RF passes it");
    assert_eq!(ended.state.rflags & RF, 0);
}

#[test]
fn a_restarted_instruction_clears_the_resume_flag_once_it_has_run() {
    // A page fault whose handler returns with RF set; RF must be gone two instructions later.
    let code = &[0x48, 0x8b, 0x03, NOP, 0x0f, 0x05]; // mov rax, [rbx]; nop; syscall
    let ended = Guest::long()
        .user()
        .code(code)
        .with(|guest| {
            guest.state.gpr[RBX] = ABSENT;
            // add rsp, 8; mov rbx, rsi; iretq
            let handler = &[0x48, 0x83, 0xc4, 8, 0x48, 0x89, 0xf3, 0x48, 0xcf];
            guest.write(HANDLERS + 16 * u64::from(PF), handler);
            guest.state.gpr[6] = USER_CODE;
        })
        .run_instructions(5);
    assert_eq!(ended.state.rip, USER_CODE + 4);
    assert_eq!(ended.state.rflags & RF, 0);
    assert_eq!(ended.u64(INNER_STACK - 24) & RF, RF, "the fault's frame had it");
}

#[test]
fn data_breakpoints_trap_behind_their_instruction() {
    const WRITE: &[u8] = &[0x89, 0x03, NOP]; // mov [rbx], eax
    const READ: &[u8] = &[0x8b, 0x03, NOP]; // mov eax, [rbx]
    const PUSH: &[u8] = &[0x50, NOP];
    // (name, code, DR7, DR0 relative to the access, hit, length of the instruction)
    #[rustfmt::skip]
    let cases: &[(&str, &[u8], u64, i64, bool, u64)] = &[
        ("write watched", WRITE, control(1, 3), 0, true, 2),
        ("read of a written watch", READ, control(1, 3), 0, false, 2),
        ("read watched", READ, control(3, 3), 0, true, 2),
        ("write of a read watch", WRITE, control(3, 3), 0, true, 2),
        ("one byte inside", WRITE, control(1, 0), 3, true, 2),
        ("one byte after", WRITE, control(1, 0), 4, false, 2),
        ("one byte before", WRITE, control(1, 0), -1, false, 2),
        ("eight bytes around", WRITE, control(1, 2), 4, true, 2),
        ("switched off", WRITE, control(1, 3) & !3, 0, false, 2),
        ("globally on", WRITE, control(1, 3) & !3 | 2, 0, true, 2),
        ("execute", WRITE, control(0, 0), 0, false, 2),
        ("push", PUSH, control(1, 2), -8, true, 1),
    ];
    for &(name, code, dr7, offset, hit, length) in cases {
        let address = KERNEL_STACK - 0x100;
        let ended = Guest::long()
            .code(code)
            .code(&[0xf4])
            .with(|guest| {
                guest.state.dr[0] = address.wrapping_add_signed(offset);
                guest.state.dr7 = dr7;
                guest.state.gpr[RBX] = address;
                guest.state.gpr[RSP] = address;
            })
            .run();
        if hit {
            assert_debug(&ended, name, 1, KERNEL_CODE + length);
        } else {
            assert_eq!(ended.delivered(), None, "{name}");
            assert_eq!(ended.state.dr6, FIXED, "{name}");
        }
    }
}

#[test]
fn a_breakpoint_hit_by_a_stack_load_waits_for_the_next_instruction() {
    // mov ss, [rbx]; nop; nop
    let ended = Guest::long()
        .code(&[0x8e, 0x13, NOP, NOP])
        .with(|guest| {
            guest.write(KERNEL_DATA, &KERNEL_SS.to_le_bytes());
            guest.state.gpr[RBX] = KERNEL_DATA;
            guest.state.dr[0] = KERNEL_DATA;
            guest.state.dr7 = control(3, 1);
        })
        .run();
    assert_debug(&ended, "mov ss", 1, KERNEL_CODE + 3);
}

#[test]
fn a_faulting_access_hits_no_breakpoint() {
    let ended = Guest::long()
        .code(&[0x89, 0x03])
        .with(|guest| {
            guest.state.gpr[RBX] = ABSENT;
            guest.state.dr[0] = ABSENT;
            guest.state.dr7 = control(1, 3);
        })
        .run();
    assert_eq!(ended.fault(), (PF, Some(2)));
    assert_eq!(ended.state.dr6, FIXED);
}

#[test]
fn port_breakpoints_need_debugging_extensions() {
    for (extensions, hit) in [(false, false), (true, true)] {
        let mut engine = Guest::long()
            .code(&[0xe6, 0x80, 0xf4]) // out 0x80, al; hlt
            .with(|guest| {
                guest.state.dr[0] = 0x80;
                guest.state.dr7 = control(2, 0);
                guest.state.cr4 |= if extensions { 8 } else { 0 };
            })
            .engine();
        let write = Access::PortWrite { port: 0x80, size: 1, value: 0 };
        assert_eq!(engine.run(100).expect("runs"), Exit::Access(write));
        engine.finish_access(0).expect("finishes");
        assert_eq!(engine.tick(), 1);
        assert_eq!(engine.run(100).expect("runs"), Exit::Halt);
        let state = engine.cpu_state().expect("state");
        assert_eq!(state.dr6 & 1, u64::from(hit));
        assert_eq!(state.rip == HANDLERS + 16 + 1, hit);
    }
}

#[test]
fn debug_registers_guard_themselves() {
    // mov rax, dr0 under general detect
    let ended =
        Guest::long().code(&[0x0f, 0x21, 0xc0]).with(|guest| guest.state.dr7 = 0x2400).run();
    assert_debug(&ended, "general detect", GENERAL_DETECT, KERNEL_CODE);
    assert_eq!(ended.delivered().expect("the handler ran").rflags & RF, RF, "it is a fault");
    assert_eq!(ended.state.dr7, 0x400);
    // mov rax, dr4: DR6, or undefined with debugging extensions.
    let run = |cr4: u64| {
        Guest::long().code(&[0x0f, 0x21, 0xe0, 0xf4]).with(|guest| guest.state.cr4 |= cr4).run()
    };
    assert_eq!(run(0).state.gpr[RAX], FIXED);
    assert_eq!(run(8).fault(), (UD, None));
}

#[test]
fn debug_registers_keep_their_fixed_bits() {
    // mov dr6, rax; mov dr7, rcx; hlt
    let ended = Guest::long()
        .code(&[0x0f, 0x23, 0xf0, 0x0f, 0x23, 0xf9, 0xf4])
        .with(|guest| {
            guest.state.gpr[RAX] = 0xffff_ffff;
            guest.state.gpr[RCX] = 0x0000_f000;
        })
        .run();
    assert_eq!(ended.state.dr6, 0xffff_eff0 | 0xf);
    assert_eq!(ended.state.dr7, 0x2400);
    assert_eq!(ended.state.segments[CS].selector, guest::KERNEL_CS);
}

#[test]
fn alignment_is_checked_for_users_only() {
    const MISALIGNED: &[u8] = &[0x8b, 0x43, 0x02, 0xcd, 0x80]; // mov eax, [rbx + 2]; int 0x80
    for (user, flag, mask, raises) in [
        (true, true, true, 17),
        (true, false, true, 0x80),
        (true, true, false, 0x80),
        (false, true, true, 0x80),
    ] {
        let guest = if user { Guest::long().user() } else { Guest::long() };
        let ended = guest
            .code(MISALIGNED)
            .with(|guest| {
                guest.state.rflags |= if flag { guest::AC } else { 0 };
                guest.state.cr0 |= if mask { 1 << 18 } else { 0 };
                guest.state.gpr[RBX] = guest::USER_DATA;
            })
            .run();
        assert_eq!(ended.fault().0, raises, "user {user}, AC {flag}, AM {mask}");
    }
}

#[test]
fn a_watched_write_ends_the_run_whatever_wrote() {
    // mov [rsp - 16], eax; nop, with a breakpoint elsewhere; and ud2, which leaves a frame.
    let careful = Guest::long().code(&[0x89, 0x44, 0x24, 0xf0, 0x90, 0xf4]).with(|guest| {
        guest.state.dr[0] = 0x1234;
        guest.state.dr7 = control(0, 0);
    });
    let faulting = Guest::long().code(&[0x0f, 0x0b]);
    for (guest, ticks) in [(careful, 1), (faulting, 0)] {
        let mut engine = guest.engine();
        let stack = engine.cpu_state().expect("a state").gpr[RSP];
        engine.watch_writes(stack - 256..stack, true);
        assert_eq!(engine.run(u64::MAX).expect("it runs"), Exit::Kicked);
        assert_eq!(engine.tick(), ticks);
        assert!(!engine.take_watched_writes().is_empty());
        assert_eq!(engine.run(u64::MAX).expect("it runs"), Exit::Halt);
    }
}
