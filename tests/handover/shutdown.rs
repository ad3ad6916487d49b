//! The CPU in shutdown, behind a triple fault: what KVM shows of it is what the software CPU shows.

use reprise_cpu::engine::SoftEngine;
use reprise_kvm::{KvmClock, KvmEngine};
use reprise_machine::engine::{Engine, Exit};
use reprise_trace::cpu_state::{CpuState, RBX, RSP};

use crate::bare::{self, UNMAPPED};
use crate::kvm_refuses::kvm_is_missing;

/// Runs to the triple fault, and gives the state behind it.
fn shut_down(mut engine: impl Engine, state: &CpuState) -> CpuState {
    engine.set_cpu_state(state).expect("it takes any");
    assert_eq!(engine.run(u64::MAX).expect("it runs"), Exit::TripleFault);
    engine.cpu_state().expect("it has one")
}

#[test]
fn kvm_in_shutdown_is_as_the_software_cpu_is() {
    if kvm_is_missing() {
        return;
    }
    // mov rax, [rbx]
    const LOAD: &[u8] = &[0x48, 0x8b, 0x03];
    const UNDEFINED: &[u8] = &[0x0f, 0x0b];
    let no_handlers = |state: &mut CpuState| state.idtr.limit = 0;
    let no_stack = |state: &mut CpuState| state.gpr[RSP] = UNMAPPED + 0x1000;
    let no_tables = |state: &mut CpuState| state.cr3 = 0x3f_f000;
    let nowhere = |state: &mut CpuState| (state.rip, state.idtr.limit) = (UNMAPPED, 0);
    let unmapped_data = |state: &mut CpuState| {
        (state.gpr[RBX], state.idtr.limit) = (UNMAPPED, 0);
    };
    type Change<'a> = (&'a str, &'a [u8], &'a dyn Fn(&mut CpuState));
    let cases: [Change<'_>; 6] = [
        ("an undefined instruction, no handlers", UNDEFINED, &no_handlers),
        ("an undefined instruction, no stack", UNDEFINED, &no_stack),
        ("no page tables", UNDEFINED, &no_tables),
        ("a jump to nowhere, no handlers", UNDEFINED, &nowhere),
        ("a load from nowhere, no handlers", LOAD, &unmapped_data),
        ("a load, no stack and no page", LOAD, &|state| {
            unmapped_data(state);
            state.idtr.limit = 0xfff;
            no_stack(state);
        }),
    ];
    for clock in [KvmClock::Sync, KvmClock::Step] {
        for (name, code, change) in cases {
            let mut state = bare::state();
            change(&mut state);
            let soft = SoftEngine::new(bare::ram(code)).expect("the host has memory");
            let expected = shut_down(soft, &state);
            let kvm = KvmEngine::new(bare::ram(code), clock).expect("it was there");
            let found = shut_down(kvm, &state);
            // Of page faults on the way KVM's emulator shows the first one's CR2, as no CPU does.
            let expected = CpuState { cr2: found.cr2, ..expected };
            assert_eq!(found, expected, "{name}, {clock:?}");
        }
    }
}
