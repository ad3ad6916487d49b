//! A copy of the CPU that goes ahead: it sees what the guest will come to, and RAM is as if it had never gone.

mod guest;

use guest::{Guest, KERNEL_CODE, KERNEL_DATA};
use reprise_cpu::engine::SoftEngine;
use reprise_cpu::scout::Scout;
use reprise_machine::engine::{Engine, Exit};
use reprise_trace::cpu_state::{CpuState, RDI};

/// Counts in memory and, each round, in the immediate operand of an instruction before it.
const CODE: &[u8] = &[
    0xb8, 0x00, 0x00, 0x00, 0x00, // again: mov eax, 0
    0xff, 0x07, // inc dword [rdi]
    0xff, 0x05, 0xf4, 0xff, 0xff, 0xff, // inc dword [again + 1]
    0xeb, 0xf1, // jmp again
];
const ROUND: u64 = 4;

fn engine() -> SoftEngine {
    let guest = Guest::long().code(CODE).with(|guest| guest.state.gpr[RDI] = KERNEL_DATA);
    guest.engine()
}

fn ram(engine: &SoftEngine) -> [u8; 64] {
    let mut bytes = [0; 64];
    engine.read_ram(KERNEL_DATA, &mut bytes[..32]);
    engine.read_ram(KERNEL_CODE, &mut bytes[32..]);
    bytes
}

fn ahead(scout: &mut Scout, instructions: u64) -> CpuState {
    for _ in 0..instructions {
        assert!(scout.step().expect("it runs"));
    }
    scout.cpu_state().expect("a state")
}

#[test]
fn it_sees_what_comes_however_often_it_is_sent() {
    let mut engine = engine();
    let mut scout = None;
    for sent in 1..6 {
        let before = ram(&engine);
        let mut there = engine.scout(scout.take()).expect("it is made").expect("it may go");
        let seen = ahead(&mut there, 3 * ROUND);
        assert_ne!(ram(&engine), before, "it writes, the {sent}th time");
        there.take_back();
        assert_eq!(ram(&engine), before, "the {sent}th time");
        scout = Some(there);
        let tick = engine.tick() + 3 * ROUND;
        assert_eq!(engine.run(tick).expect("it runs"), Exit::TickReached);
        assert_eq!(engine.cpu_state().expect("a state"), seen, "the {sent}th time");
        // What the original goes on to write, code above all, is not what the copy knew.
        assert_eq!(engine.run(tick + sent * ROUND).expect("it runs"), Exit::TickReached);
    }
}

#[test]
fn who_drops_it_takes_back_as_well() {
    let mut engine = engine();
    let before = ram(&engine);
    let mut scout = engine.scout(None).expect("it is made").expect("it may go");
    ahead(&mut scout, 2 * ROUND);
    assert_ne!(ram(&engine), before);
    drop(scout);
    assert_eq!(ram(&engine), before);
}
