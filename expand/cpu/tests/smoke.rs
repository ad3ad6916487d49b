//! The smallest programs, in 32-bit protected mode without paging.

use reprise_cpu::engine::SoftEngine;
use reprise_machine::engine::{Access, Engine, Exit};
use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::{CpuState, Segment};
use vm_memory::{Bytes, GuestAddress};

const CODE: u64 = 0x10_0000;

/// An engine about to run `code` at 1 MiB with flat 32-bit segments.
fn flat_32(code: &[u8]) -> SoftEngine {
    let ram = GuestRam::new(16).expect("16 MiB");
    ram.memory().write_slice(code, GuestAddress(CODE)).expect("code fits");
    let mut engine = SoftEngine::new(ram).expect("memory for generated code");
    let data = Segment { selector: 16, attributes: 0xc093, limit: u32::MAX, base: 0 };
    let mut state = CpuState { rip: CODE, cr0: 0x11, ..CpuState::default() };
    state.segments = [data; 6];
    state.segments[1] = Segment { selector: 8, attributes: 0xc09b, limit: u32::MAX, base: 0 };
    state.gpr[4] = 0x8000;
    engine.set_cpu_state(&state).expect("state");
    engine
}

#[test]
fn adds_and_writes_to_a_port() {
    // mov eax, 5; add eax, 7; out 0xf4, al; hlt
    let mut engine = flat_32(&[0xb8, 5, 0, 0, 0, 0x83, 0xc0, 7, 0xe6, 0xf4, 0xf4]);
    let exit = engine.run(u64::MAX).expect("runs");
    assert_eq!(exit, Exit::Access(Access::PortWrite { port: 0xf4, size: 1, value: 12 }));
    assert_eq!(engine.tick(), 2);
    engine.finish_access(0).expect("finishes");
    assert_eq!(engine.tick(), 3);
    assert_eq!(engine.run(u64::MAX).expect("runs"), Exit::Halt);
    assert_eq!(engine.tick(), 4);
}

#[test]
fn stops_at_the_exact_tick() {
    // loop: inc eax; mov [0x2000], eax; jmp loop
    let mut engine = flat_32(&[0x40, 0xa3, 0, 0x20, 0, 0, 0xeb, 0xf8]);
    for until in [1, 2, 3, 4, 100, 101, 3_000_000] {
        assert_eq!(engine.run(until).expect("runs"), Exit::TickReached);
        assert_eq!(engine.tick(), until);
        let state = engine.cpu_state().expect("state");
        assert_eq!(state.gpr[0], until.div_ceil(3));
        let mut bytes = [0; 4];
        engine.read_ram(0x2000, &mut bytes);
        assert_eq!(u64::from(u32::from_le_bytes(bytes)), (until + 1) / 3);
    }
}

#[test]
fn overwritten_code_is_decoded_again() {
    // mov byte [next + 1], 7; next: mov al, 1; hlt
    let code = [0xc6, 0x05, 0x08, 0x00, 0x10, 0x00, 7, 0xb0, 1, 0xf4];
    let mut engine = flat_32(&code);
    assert_eq!(engine.run(u64::MAX).expect("runs"), Exit::Halt);
    assert_eq!(engine.cpu_state().expect("state").gpr[0] & 0xff, 7);
}
