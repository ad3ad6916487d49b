//! INT3 in kernel code, on this host's KVM.

use reprise_branch_clock::vcpu::{Vcpu, VcpuExit};
use reprise_trace::cpu_state::RSP;

use super::*;
use crate::testing::{CODE, STACK_TOP, long_mode, put, put_gate, ram_with, require_kvm};

const HANDLER: u64 = CODE + 0x100;
const HLT: u8 = 0xf4;

/// INT3 and HLT, and a handler of #BP.
fn vcpu(handler: &[u8]) -> PmuVcpu {
    let ram = ram_with(&[0xcc, HLT]);
    put_gate(&ram, BREAKPOINT, HANDLER);
    put(&ram, HANDLER, handler);
    let mut vcpu = PmuVcpu::without_counter(ram).expect("KVM");
    vcpu.set_state(&long_mode()).expect("a state that KVM takes");
    vcpu.catch_breakpoint_instructions(true).expect("KVM takes it");
    vcpu
}

#[track_caller]
fn comes_back(vcpu: &mut PmuVcpu) {
    assert_eq!(vcpu.enter().expect("KVM runs"), VcpuExit::BreakpointInstruction);
    assert_eq!(vcpu.state().expect("a state"), long_mode());
}

#[test]
fn the_frame_of_one_that_is_passed_on_leads_behind_it() {
    require_kvm!();
    let mut vcpu = vcpu(&[HLT]);
    comes_back(&mut vcpu);
    vcpu.pass_breakpoint_instruction().expect("KVM takes it");
    assert_eq!(vcpu.enter().expect("KVM runs"), VcpuExit::Halt);
    let state = vcpu.state().expect("a state");
    assert_eq!((state.rip, state.gpr[RSP]), (HANDLER + 1, STACK_TOP - 40));
    let mut frame = [0; 8];
    vcpu.ram().read(state.gpr[RSP], &mut frame);
    assert_eq!(u64::from_le_bytes(frame), CODE + 1);
}

#[test]
fn a_handler_returns_behind_it() {
    require_kvm!();
    // iretq
    let mut vcpu = vcpu(&[0x48, 0xcf]);
    comes_back(&mut vcpu);
    vcpu.pass_breakpoint_instruction().expect("KVM takes it");
    assert_eq!(vcpu.enter().expect("KVM runs"), VcpuExit::Halt);
    let state = vcpu.state().expect("a state");
    assert_eq!((state.rip, state.gpr[RSP]), (CODE + 2, STACK_TOP));
}

#[test]
fn it_comes_back_as_often_as_it_is_come_to() {
    require_kvm!();
    let mut vcpu = vcpu(&[HLT]);
    for _ in 0..3 {
        comes_back(&mut vcpu);
    }
    // Somebody else has done it.
    let state = vcpu.state().expect("a state");
    let after = reprise_trace::cpu_state::CpuState { rip: CODE + 1, ..state };
    vcpu.retire_instruction(&after).expect("KVM takes it");
    assert_eq!(vcpu.enter().expect("KVM runs"), VcpuExit::Halt);
    assert_eq!(vcpu.state().expect("a state").rip, CODE + 2);
}

#[test]
fn breakpoints_in_debug_registers_go_on_beside_it() {
    require_kvm!();
    let mut vcpu = vcpu(&[HLT]);
    vcpu.set_breakpoints(&[HANDLER]).expect("KVM takes it");
    comes_back(&mut vcpu);
    vcpu.pass_breakpoint_instruction().expect("KVM takes it");
    assert_eq!(vcpu.enter().expect("KVM runs"), VcpuExit::Breakpoint);
    assert_eq!(vcpu.state().expect("a state").rip, HANDLER);
    vcpu.set_breakpoints(&[]).expect("KVM takes it");
    assert_eq!(vcpu.enter().expect("KVM runs"), VcpuExit::Halt);
}

/// Whoever has the guest step off the INT3 that is on its way sets RFLAGS.RF on KVM, which is no business of the
/// guest's.
#[test]
fn the_frame_of_one_that_is_passed_on_has_the_guests_flags() {
    require_kvm!();
    let mut vcpu = vcpu(&[HLT]);
    comes_back(&mut vcpu);
    vcpu.pass_breakpoint_instruction().expect("KVM takes it");
    vcpu.step_off().expect("KVM takes it");
    assert_eq!(vcpu.enter().expect("KVM runs"), VcpuExit::Halt);
    let state = vcpu.state().expect("a state");
    let mut flags = [0; 8];
    vcpu.ram().read(state.gpr[RSP] + 16, &mut flags);
    assert_eq!(u64::from_le_bytes(flags), long_mode().rflags);
}

/// A kick keeps KVM from entering the guest, and KVM does not tell that it has #BP still.
#[test]
fn a_kick_does_not_come_between_one_that_is_passed_on_and_its_delivery() {
    require_kvm!();
    let mut vcpu = vcpu(&[HLT]);
    comes_back(&mut vcpu);
    vcpu.pass_breakpoint_instruction().expect("KVM takes it");
    vcpu.kicker().kick();
    assert_eq!(vcpu.enter().expect("KVM runs"), VcpuExit::Halt);
    let state = vcpu.state().expect("a state");
    assert_eq!((state.rip, state.gpr[RSP]), (HANDLER + 1, STACK_TOP - 40));
    assert_eq!(vcpu.enter().expect("KVM runs"), VcpuExit::Interrupted { kicked: true });
}

#[test]
fn breakpoints_stay_when_it_is_caught_or_no_longer() {
    require_kvm!();
    let mut vcpu = vcpu(&[HLT]);
    vcpu.set_breakpoints(&[HANDLER]).expect("KVM takes it");
    vcpu.catch_breakpoint_instructions(false).expect("KVM takes it");
    vcpu.catch_breakpoint_instructions(true).expect("KVM takes it");
    comes_back(&mut vcpu);
    vcpu.pass_breakpoint_instruction().expect("KVM takes it");
    assert_eq!(vcpu.enter().expect("KVM runs"), VcpuExit::Breakpoint);
}
