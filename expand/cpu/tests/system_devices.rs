//! Accesses that the board answers: the instruction starts again for each, and must not notice.

mod guest;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use guest::{Guest, KERNEL_CODE, KERNEL_DATA, TASK};
use reprise_machine::engine::{Access, Engine, Exit};
use reprise_trace::cpu_state::{RBX, RCX, RDI, RSI, RSP};

/// Where a PC has video memory: nobody answers there.
const HOLE: u64 = 0xa_0000;

/// Runs until the guest halts, and gives what it wrote to devices and left in RAM below them.
fn run(guest: Guest) -> (Vec<Access>, [u8; 8]) {
    let mut engine = guest.engine();
    let mut accesses = Vec::new();
    loop {
        match engine.run(100).expect("runs") {
            Exit::Access(access) => {
                accesses.push(access);
                engine.finish_access(0xfe).expect("finishes");
            }
            exit => {
                assert_eq!(exit, Exit::Halt);
                break;
            }
        }
    }
    let mut below = [0; 8];
    engine.read_ram(HOLE - 8, &mut below);
    (accesses, below)
}

fn write(value: u128) -> Access {
    Access::MmioWrite { address: HOLE, size: 4, value }
}

#[test]
fn a_read_modify_write_half_in_ram_happens_once() {
    // add qword [rbx], 2; hlt
    let (accesses, below) = run(Guest::long().code(&[0x48, 0x83, 0x03, 2, 0xf4]).with(|guest| {
        guest.write(HOLE - 4, &0xffff_ffffu32.to_le_bytes());
        guest.state.gpr[RBX] = HOLE - 4;
    }));
    assert_eq!(accesses, [Access::MmioRead { address: HOLE, size: 4 }, write(0xff)]);
    assert_eq!(below, [0, 0, 0, 0, 1, 0, 0, 0]);
}

#[test]
fn a_move_onto_its_own_source_half_in_ram_reads_it_once() {
    // movsq and push [rbx], each with a target four bytes behind its source.
    for code in [&[0x48, 0xa5, 0xf4][..], &[0xff, 0x33, 0xf4]] {
        let (accesses, below) = run(Guest::long().code(code).with(|guest| {
            guest.write(HOLE - 8, &[1, 2, 3, 4, 5, 6, 7, 8]);
            guest.state.gpr[RSI] = HOLE - 8;
            guest.state.gpr[RBX] = HOLE - 8;
            guest.state.gpr[RDI] = HOLE - 4;
            guest.state.gpr[RSP] = HOLE + 4;
        }));
        assert_eq!(accesses, [write(0x0807_0605)]);
        assert_eq!(below, [1, 2, 3, 4, 1, 2, 3, 4]);
    }
}

#[test]
fn a_page_table_entry_may_be_written_to_the_device_that_it_maps() {
    // push [rbx]: the entry of the page that is pushed to, which the push itself marks as dirty.
    const ENTRY: u64 = 0x4000 + 0xa0 * 8;
    let mut engine = Guest::long()
        .code(&[0xff, 0x33, 0xf4])
        .with(|guest| {
            guest.page(HOLE, 3);
            guest.state.gpr[RBX] = ENTRY;
            guest.state.gpr[RSP] = HOLE + 8;
        })
        .engine();
    let write = Access::MmioWrite { address: HOLE, size: 8, value: u128::from(HOLE) + 3 };
    assert_eq!(engine.run(100).expect("runs"), Exit::Access(write));
    engine.finish_access(0).expect("finishes");
    assert_eq!(engine.run(100).expect("runs"), Exit::Halt);
    assert_eq!(engine.tick(), 2);
}

#[test]
fn a_move_over_itself_goes_on_as_what_it_has_become() {
    // nop; rep movsd, which overwrites itself with HLT and then meets a device.
    let run = |stride: u64| {
        let mut engine = Guest::protected()
            .code(&[0x90, 0xf3, 0xa5])
            .with(|guest| {
                guest.write(KERNEL_DATA, &[0xf4; 16]);
                guest.state.gpr[RSI] = KERNEL_DATA;
                guest.state.gpr[RDI] = KERNEL_CODE;
                guest.state.gpr[RCX] = (HOLE - KERNEL_CODE) / 4 + 4;
            })
            .engine();
        loop {
            match engine.run(engine.tick().saturating_add(stride)).expect("runs") {
                Exit::Access(_) => engine.finish_access(0).expect("finishes"),
                Exit::TickReached => {}
                exit => {
                    assert_eq!(exit, Exit::Halt);
                    break (engine.tick(), engine.cpu_state().expect("state"));
                }
            }
        }
    };
    let (tick, state) = run(u64::MAX);
    assert_eq!((tick, state.rip), (2, KERNEL_CODE + 2));
    assert_eq!(run(1), (tick, state));
}

/// A guest whose handler of #UD is UD2, on an interrupt stack that begins anew each time.
fn faulting_without_end() -> Guest {
    Guest::long().code(&[0x0f, 0x0b]).with(|guest| {
        guest.gate(6, 0x8e, 1);
        guest.write(guest::HANDLERS + 16 * 6, &[0x0f, 0x0b]);
    })
}

#[test]
fn exceptions_without_end_have_an_end() {
    let ended = faulting_without_end().run();
    let named = matches!(&ended.exit, Exit::Unsupported(reason) if reason.contains("without end"));
    assert!(named, "{:?}", ended.exit);
    assert_eq!(ended.engine.tick(), 0);
}

#[test]
fn a_kick_finds_no_boundary_between_a_fault_and_its_handler() {
    let mut engine = faulting_without_end().engine();
    let before = engine.cpu_state().expect("state");
    let kicker = engine.kicker();
    let done = Arc::new(AtomicBool::new(false));
    let stop = done.clone();
    let thread = std::thread::spawn(move || {
        while !stop.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(5));
            kicker.kick();
        }
    });
    // A kick that comes before the first instruction is answered at once.
    while engine.run(u64::MAX).expect("runs") == Exit::Kicked {
        assert_eq!(engine.cpu_state().expect("state"), before);
    }
    done.store(true, Ordering::Relaxed);
    thread.join().expect("joins");
}

#[test]
fn an_exception_through_a_task_gate_ends_with_a_reason() {
    // ud2, and a single step
    for (code, vector, rflags) in [(&[0x0f, 0x0b][..], 6, 2), (&[0x90, 0x90], 1, 0x102)] {
        let ended = Guest::protected()
            .code(code)
            .with(|guest| {
                let gate = u64::from(TASK) << 16 | 0x85 << 40;
                guest.write(guest::IDT + 8 * vector, &gate.to_le_bytes());
                guest.state.rflags = rflags;
            })
            .run();
        let named = matches!(&ended.exit, Exit::Unsupported(reason) if reason.contains("task"));
        assert!(named, "{:?}", ended.exit);
        assert!(ended.state.rip <= KERNEL_CODE + 1);
    }
}
