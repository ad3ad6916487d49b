//! The engine under the clock that counts exits.

use std::time::Duration;

use reprise_machine::engine::{Access, Engine, Exit};
use reprise_trace::cpu_state::*;

use crate::KvmClock::{Step, Sync};
use crate::KvmKind;
use crate::testing::*;

const OUT_AL_DX: u8 = 0xee;
const IN_AL_DX: u8 = 0xec;
const HLT: u8 = 0xf4;

fn out(value: u32) -> Exit {
    Exit::Access(Access::PortWrite { port: 0x3f8, size: 1, value })
}

#[test]
fn port_accesses_and_hlt_are_ticks_in_every_mode() {
    require_kvm!();
    // mov dx, 0x3f8 (operand size prefix outside real mode); in al, dx; inc al; out dx, al; hlt
    let tail = [IN_AL_DX, 0xfe, 0xc0, OUT_AL_DX, HLT];
    let wide = [&[0x66, 0xba, 0xf8, 0x03][..], &tail].concat();
    let real = [&[0xba, 0xf8, 0x03][..], &tail].concat();
    for (state, code) in [(long_mode(), &wide), (protected_mode(), &wide), (real_mode(), &real)] {
        let mut engine = engine(Sync, &state, code);
        let read = Exit::Access(Access::PortRead { port: 0x3f8, size: 1 });
        assert_eq!(run(&mut engine), read);
        assert_eq!(engine.tick(), 0);
        engine.finish_access(0x41).unwrap();
        assert_eq!(engine.tick(), 1);
        assert_eq!(run(&mut engine), out(0x42));
        engine.finish_access(0).unwrap();
        assert_eq!(run(&mut engine), Exit::Halt);
        assert_eq!(engine.tick(), 3);
        assert_eq!(engine.moment().unwrap().rip, state.rip + code.len() as u64);
        assert!(engine.cpu_state().unwrap().halted);
        // Nothing wakes it.
        assert_eq!(run(&mut engine), Exit::Halt);
        assert_eq!(engine.tick(), 3);
    }
}

#[test]
fn a_finished_access_shows_in_the_state() {
    require_kvm!();
    let mut state = long_mode();
    state.gpr[RDX] = 0x60;
    state.gpr[RAX] = 0x1111_2222_3333_4444;
    let mut engine = engine(Sync, &state, &[IN_AL_DX, HLT]);
    run(&mut engine);
    engine.finish_access(0xab).unwrap();
    let after = engine.cpu_state().unwrap();
    state.gpr[RAX] = 0x1111_2222_3333_44ab;
    state.rip += 1;
    assert_eq!(after, state);
    assert_eq!(engine.moment().unwrap().tick, 1);
}

#[test]
fn a_trapped_time_stamp_behind_a_prefix_is_as_long_as_it_is() {
    require_kvm!();
    // rex.w rdtsc; hlt
    let mut engine = engine(Sync, &long_mode(), &[0x48, 0x0f, 0x31, HLT]);
    engine.trap_time_stamps(&[CODE]).unwrap();
    assert_eq!(run(&mut engine), Exit::Access(Access::TimeStamp));
    engine.finish_access(0x7_0000_0009).unwrap();
    let state = engine.cpu_state().unwrap();
    assert_eq!((state.rip, state.gpr[RAX], state.gpr[RDX]), (CODE + 3, 9, 7));
    assert_eq!(run(&mut engine), Exit::Halt);
}

#[test]
fn until_is_compared_at_exits() {
    require_kvm!();
    let mut state = long_mode();
    state.gpr[RDX] = 0x3f8;
    let mut engine = engine(Sync, &state, &[OUT_AL_DX, OUT_AL_DX, HLT]);
    assert_eq!(engine.run(1).unwrap(), out(0));
    engine.finish_access(0).unwrap();
    assert_eq!(engine.run(1).unwrap(), Exit::TickReached);
    assert_eq!(engine.run(2).unwrap(), out(0));
}

#[test]
fn mmio_of_every_size() {
    require_kvm!();
    // mov [rbx], rax; mov eax, [rbx]; add word [rbx], 1; hlt
    let code = [0x48, 0x89, 0x03, 0x8b, 0x03, 0x66, 0x83, 0x03, 0x01, HLT];
    let mut state = long_mode();
    state.gpr[RBX] = 0xb_8000;
    state.gpr[RAX] = 0x8877_6655_4433_2211;
    let mut engine = engine(Sync, &state, &code);
    let address = 0xb_8000;
    let write = |size, value| Exit::Access(Access::MmioWrite { address, size, value });
    let read = |size| Exit::Access(Access::MmioRead { address, size });
    assert_eq!(run(&mut engine), write(8, 0x8877_6655_4433_2211));
    engine.finish_access(0).unwrap();
    assert_eq!(run(&mut engine), read(4));
    engine.finish_access(0xdead_beef).unwrap();
    assert_eq!(engine.cpu_state().unwrap().gpr[RAX], 0xdead_beef);
    assert_eq!(run(&mut engine), read(2));
    engine.finish_access(0x00ff).unwrap();
    assert!(!engine.interruptible().unwrap());
    assert_eq!(run(&mut engine), write(2, 0x0100));
    engine.finish_access(0).unwrap();
    assert_eq!(run(&mut engine), Exit::Halt);
    assert_eq!(engine.tick(), 5);
}

#[test]
fn string_port_instructions_are_a_sequence_of_accesses() {
    require_kvm!();
    // rep insb; rep outsb; hlt
    let code = [0xf3, 0x6c, 0x48, 0x89, 0xde, 0x48, 0x89, 0xd9, 0xf3, 0x6e, HLT];
    // (mov rsi, rbx; mov rcx, rbx stand between, so RBX is both the address and the count)
    let mut state = long_mode();
    state.gpr[RDX] = 0x3f8;
    state.gpr[RCX] = 5;
    state.gpr[RDI] = 0x9000;
    state.gpr[RBX] = 3;
    let ram = ram_with(&code);
    put(&ram, 3, b"xyz");
    let mut engine = engine_on(ram, Sync, &state);
    for byte in b"hello" {
        assert_eq!(run(&mut engine), Exit::Access(Access::PortRead { port: 0x3f8, size: 1 }));
        engine.finish_access(u128::from(*byte)).unwrap();
    }
    for byte in b"xyz" {
        assert_eq!(run(&mut engine), out(u32::from(*byte)));
        engine.finish_access(0).unwrap();
    }
    let mut read = [0; 5];
    engine.read_ram(0x9000, &mut read);
    assert_eq!(&read, b"hello");
    assert_eq!(run(&mut engine), Exit::Halt);
    assert_eq!(engine.tick(), 9);
}

#[test]
fn looking_between_the_accesses_of_a_string_instruction_loses_none() {
    require_kvm!();
    let mut state = long_mode();
    state.gpr[RDX] = 0x3f8;
    state.gpr[RCX] = 3;
    state.gpr[RSI] = 0x9000;
    let ram = ram_with(&[0xf3, 0x6e, HLT]);
    put(&ram, 0x9000, b"xyz");
    let mut engine = engine_on(ram, Sync, &state);
    for byte in b"xyz" {
        assert_eq!(run(&mut engine), out(u32::from(*byte)));
        engine.finish_access(0).unwrap();
        engine.moment().unwrap();
        engine.cpu_state().unwrap();
    }
    assert_eq!(run(&mut engine), Exit::Halt);
    assert_eq!(engine.tick(), 4);
}

/// Interrupts stay out until RCX has run out; then the instruction has retired.
#[test]
fn a_string_instruction_is_amid_its_accesses_until_it_has_retired() {
    require_kvm!();
    // rep insb; rep outsb; rep stosb; rep lodsb: the last two to memory that is not there
    for (code, address, ask) in [
        ([0xf3, 0x6c], 0x9ffe, true),
        ([0xf3, 0x6e], 0x9ffe, true),
        ([0xf3, 0x6e], 0x9ffe, false),
        ([0xf3, 0xaa], 0xb_8000, true),
        ([0xf3, 0xac], 0xb_8000, false),
    ] {
        // What follows repeats as well, and has not begun.
        let mut state = long_mode();
        state.rflags |= 0x200;
        (state.gpr[RDX], state.gpr[RCX]) = (0x3f8, 5);
        (state.gpr[RSI], state.gpr[RDI]) = (address, address);
        let mut engine = engine(Sync, &state, &[&code[..], &[0xf3, 0x6e, HLT]].concat());
        for left in (0..5).rev() {
            assert!(matches!(run(&mut engine), Exit::Access(_)));
            engine.finish_access(0x41).unwrap();
            if ask {
                assert_eq!(engine.amid_accesses().unwrap(), left != 0, "{code:x?}, {left} left");
                assert_eq!(engine.interruptible().unwrap(), left == 0);
                assert_eq!(engine.save().unwrap().is_some(), left == 0);
            }
        }
        let after = engine.cpu_state().unwrap();
        assert_eq!((after.rip, after.gpr[RCX], after.rflags), (CODE + 2, 0, 0x202));
        assert_eq!((engine.tick(), run(&mut engine)), (5, Exit::Halt));
    }
}

#[test]
fn an_access_before_a_string_instruction_is_not_amid_it() {
    require_kvm!();
    for first in [IN_AL_DX, OUT_AL_DX, 0x6e] {
        let mut state = long_mode();
        (state.gpr[RDX], state.gpr[RCX], state.gpr[RSI]) = (0x3f8, 2, 0x9000);
        let mut engine = engine(Sync, &state, &[first, 0xf3, 0x6e, HLT]);
        run(&mut engine);
        engine.finish_access(0).unwrap();
        assert!(!engine.amid_accesses().unwrap());
        assert_eq!(engine.moment().unwrap().rip, CODE + 1);
    }
}

#[test]
fn an_interrupt_is_taken_where_it_is_injected() {
    require_kvm!();
    // handler: out dx, al; iretq
    // code: sti; out dx, al; hlt; out dx, al; hlt
    let code = [0xfb, OUT_AL_DX, HLT, OUT_AL_DX, HLT];
    let ram = ram_with(&code);
    let handler = CODE + 0x800;
    put(&ram, handler, &[OUT_AL_DX, 0x48, 0xcf]);
    put_gate(&ram, 0x30, handler);
    let mut state = long_mode();
    state.gpr[RDX] = 0x3f8;
    let mut engine = engine_on(ram, Sync, &state);
    assert!(!engine.interruptible().unwrap());
    run(&mut engine);
    engine.finish_access(0).unwrap();
    assert!(engine.interruptible().unwrap());
    assert_eq!(run(&mut engine), Exit::Halt);
    assert!(engine.interruptible().unwrap());
    engine.inject(0x30).unwrap();
    assert!(!engine.interruptible().unwrap());
    assert!(!engine.cpu_state().unwrap().halted);
    assert_eq!(run(&mut engine), out(0));
    engine.finish_access(0).unwrap();
    assert_eq!(engine.moment().unwrap().rip, handler + 1);
    assert!(!engine.interruptible().unwrap());
    assert_eq!(run(&mut engine), out(0));
    engine.finish_access(0).unwrap();
    assert_eq!(engine.moment().unwrap().rip, CODE + 4);
    assert!(engine.interruptible().unwrap());
}

#[test]
fn sti_casts_a_shadow_over_one_instruction() {
    require_kvm!();
    let mut state = long_mode();
    state.rflags |= 0x200;
    state.interrupt_shadow = true;
    state.gpr[RDX] = 0x3f8;
    let mut engine = engine(Sync, &state, &[OUT_AL_DX, HLT]);
    assert!(!engine.interruptible().unwrap());
    assert_eq!(engine.cpu_state().unwrap(), state);
    run(&mut engine);
    engine.finish_access(0).unwrap();
    assert!(engine.interruptible().unwrap());
}

#[test]
fn a_kick_ends_an_endless_loop_and_is_never_lost() {
    require_kvm!();
    // jmp $
    let mut engine = engine(Sync, &long_mode(), &[0xeb, 0xfe]);
    let kick = engine.kicker();
    kick.kick();
    assert_eq!(run(&mut engine), Exit::Kicked);
    for delay_us in [0, 1, 10, 100, 1000, 20_000] {
        for _ in 0..20 {
            let kick = kick.clone();
            let thread = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_micros(delay_us));
                kick.kick();
            });
            assert_eq!(run(&mut engine), Exit::Kicked);
            thread.join().unwrap();
        }
    }
    assert_eq!(engine.tick(), 0);
    assert_eq!(engine.moment().unwrap().rip, CODE);
}

#[test]
fn a_triple_fault_and_an_unknown_instruction_end_the_run() {
    require_kvm!();
    // ud2 without an IDT
    let mut state = long_mode();
    state.idtr.limit = 0;
    let mut faulting = engine(Sync, &state, &[0x0f, 0x0b]);
    assert_eq!(run(&mut faulting), Exit::TripleFault);
}

#[test]
fn a_state_comes_back_as_it_was_set() {
    require_kvm!();
    for state in [long_mode(), protected_mode(), real_mode(), odd_state()] {
        let mut engine = engine(Sync, &state, &[HLT]);
        let read = engine.cpu_state().unwrap();
        assert_eq!(read, state);
        assert_eq!(read.digest(), state.digest());
    }
}

#[test]
fn cpuid_is_the_models() {
    require_kvm!();
    // cpuid; hlt
    for (leaf, subleaf) in
        [(0, 0), (1, 0), (4, 1), (4, 9), (7, 0), (0x4000_0000, 0), (0x8000_0001, 0)]
    {
        let mut state = long_mode();
        (state.gpr[RAX], state.gpr[RCX]) = (u64::from(leaf), u64::from(subleaf));
        let mut engine = engine(Sync, &state, &[0x0f, 0xa2, HLT]);
        run(&mut engine);
        let after = engine.cpu_state().unwrap().gpr;
        let seen = [RAX, RBX, RCX, RDX].map(|index| after[index] as u32);
        let model = reprise_devices::cpu_model::cpuid(leaf, subleaf);
        // That one shows the host's features in these two leaves.
        let features = matches!(leaf, 1 | 7);
        if !(features && KvmKind::of_this_host() == KvmKind::PagetableBased) {
            assert_eq!(seen, model, "leaf {leaf:#x}");
        }
    }
}

#[test]
fn model_specific_registers_are_the_models_under_both_clocks() {
    require_kvm!(Step);
    // 0: mov ecx, 0x8b; 5: rdmsr; 7: wrmsr; 9: mov cl, 0xfe; 11: rdmsr, which faults
    let code = [0xb9, 0x8b, 0, 0, 0, 0x0f, 0x32, 0x0f, 0x30, 0xb1, 0xfe, 0x0f, 0x32];
    // inc ebx; hlt
    let handler = [0xff, 0xc3, HLT];
    for clock in [Sync, Step] {
        let ram = ram_with(&code);
        put(&ram, CODE + 0x800, &handler);
        put_gate(&ram, 13, CODE + 0x800);
        let mut engine = engine_on(ram, clock, &long_mode());
        assert_eq!(run(&mut engine), Exit::Halt);
        let gpr = engine.cpu_state().unwrap().gpr;
        assert_eq!((gpr[RDX], gpr[RAX], gpr[RBX]), (1, 0, 1));
        if clock == Step {
            // Four instructions of the code, two of the handler.
            assert_eq!(engine.tick(), 6);
        }
    }
}

/// Every field different from its neighbours.
fn odd_state() -> CpuState {
    let mut state = long_mode();
    state.gpr = std::array::from_fn(|index| 0x0101_0101_0101_0101 * (index as u64 + 1));
    state.rflags = 0x0004_0ed7 & !0x100;
    // Null segments; a base that counts although FS is null.
    state.segments[ES] = Segment::default();
    state.segments[DS] = Segment { selector: 3, ..Segment::default() };
    state.segments[FS] = Segment { base: 0x1234_5678_9abc, ..Segment::default() };
    state.segments[GS].base = 0xffff_8000_0000_1000;
    state.ldtr = Segment { selector: 0x28, attributes: 0x82, limit: 0x17, base: 0x7000 };
    state.cr2 = 0xdead_b000;
    state.cr8 = 5;
    state.dr = [0x1000, 0x2000, 0x3000, 0x4000];
    state.dr6 = 0xffff_0ff1;
    state.dr7 = 0x401;
    state.star = 0x0023_0010_0000_0000;
    state.lstar = 0xffff_ffff_8100_0000;
    state.cstar = 0xffff_ffff_8100_1000;
    state.sfmask = 0x4_7700;
    state.kernel_gs_base = 0xffff_8880_0000_0000;
    state.sysenter_cs = 0x10;
    state.sysenter_esp = 0xffff_8000_0000_2000;
    state.sysenter_eip = 0xffff_8000_0000_3000;
    state.pat = 0x0007_0106_0007_0106;
    state.tsc_offset = 77;
    state.tsc_aux = 3;
    state.fpu = FpuState {
        fcw: 0x27f,
        fsw: 0x3800 | 0x4000,
        ftw: 0b1000_0001,
        fop: 0,
        fip: 0,
        fdp: 0,
        st: std::array::from_fn(|index| std::array::from_fn(|byte| (16 * index + byte) as u8)),
        mxcsr: 0x1fa0,
        xmm: std::array::from_fn(|index| u128::MAX / (index as u128 + 3)),
    };
    state
}
