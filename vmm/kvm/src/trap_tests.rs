//! The trap of RDTSC around KVM's vCPU, on this host's KVM: a kernel of a few instructions, which patches
//! its text, moves CR4 and has user code.

use reprise_branch_clock::time_stamp_trap::{TimeStampTrap, TrapCounts};
use reprise_branch_clock::vcpu::{Vcpu, VcpuExit};
use reprise_machine::engine::Access;
use reprise_time_stamp_sites::{Evidence, Instruction, KernelText, Site, Text};
use reprise_trace::cpu_state::{CpuState, DescriptorTable, RAX, RCX, RSP};

use super::*;
use crate::testing::{CODE, STACK_TOP, long_mode, put, put_gate, ram_with, require_kvm};

const HLT: u8 = 0xf4;
const GDT: u64 = 0x7000;
/// RSP0 of the TSS.
const KERNEL_STACK: u64 = 0x6004;
const FAULT_HANDLER: u64 = CODE + 0x800;
const UNDEFINED_HANDLER: u64 = CODE + 0x900;
const USER_CODE: u64 = 0x4_0000;

/// Where in [`KERNEL`] what is trapped stands: offset, length and what it is.
const SITES: [(u64, u8, Instruction); 3] = [
    (0, 2, Instruction::ReadTimeStamp),
    (5, 3, Instruction::ReadControl4),
    (8, 3, Instruction::WriteControl4),
];
/// Where it writes a fourth.
const PATCHED: u64 = 20;

const KERNEL: [u8; 49] = [
    0x0f, 0x31, // 0: rdtsc
    0x49, 0x89, 0xc0, // 2: mov r8, rax
    0x0f, 0x20, 0xe1, // 5: mov rcx, cr4
    0x0f, 0x22, 0xe1, // 8: mov cr4, rcx
    0x66, 0xc7, 0x05, 0, 0, 0, 0, 0x0f, 0x31, // 11: mov word [rip+0], 0x310f
    0x90, 0x90, // 20: nop; nop, and then rdtsc
    0x49, 0x89, 0xc1, // 22: mov r9, rax
    0xe6, 0x80, // 25: out 0x80, al
    0x6a, 0x1b, // 27: push user data
    0x68, 0, 0, 0x5, 0, // 29: push the user's stack
    0x68, 0x02, 0x02, 0, 0, // 34: push RFLAGS, IF
    0x6a, 0x23, // 39: push user code
    0x68, 0, 0, 0x4, 0, // 41: push USER_CODE
    0x48, 0xcf, // 46: iretq
    HLT,  // 48
];

fn kernel_text() -> KernelText {
    let site = |&(offset, bytes, instruction): &(u64, u8, Instruction)| Site {
        address: CODE + offset,
        instruction,
        bytes,
        evidence: Evidence::Section,
    };
    let linear = CODE..CODE + 0x1000;
    let text = Text { name: ".text".to_owned(), linear, physical: CODE, initial: None };
    KernelText {
        entry: CODE,
        entry_bytes: KERNEL.to_vec(),
        sites: SITES.iter().map(site).collect(),
        text: vec![text],
        ..KernelText::default()
    }
}

fn guest() -> (GuestRam, CpuState) {
    let ram = ram_with(&KERNEL);
    // Null, kernel code and data, user data and code.
    let entries: [u64; 5] = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
    ];
    for (at, entry) in (GDT..).step_by(8).zip(entries) {
        put(&ram, at, &entry.to_le_bytes());
    }
    put(&ram, KERNEL_STACK, &STACK_TOP.to_le_bytes());
    put_gate(&ram, 6, UNDEFINED_HANDLER);
    put_gate(&ram, 13, FAULT_HANDLER);
    put(&ram, FAULT_HANDLER, &[HLT]);
    put(&ram, UNDEFINED_HANDLER, &[HLT]);
    // rdtsc; ud2
    put(&ram, USER_CODE, &[0x0f, 0x31, 0x0f, 0x0b]);
    let mut state = CpuState { gdtr: DescriptorTable { base: GDT, limit: 39 }, ..long_mode() };
    state.gpr[RSP] = STACK_TOP;
    (ram, state)
}

/// What RDTSC number `number` reads: EAX and EDX.
fn answer(number: u64) -> u64 {
    0x11_0000_0000 * number + number
}

#[test]
fn a_kernels_and_its_user_codes_time_stamps_are_answered() {
    require_kvm!();
    let (ram, state) = guest();
    let vcpu = PmuVcpu::without_counter(ram).expect("KVM");
    let mut trap = TimeStampTrap::new(vcpu, kernel_text()).expect("KVM can do it");
    trap.set_state(&state).expect("a state that KVM takes");
    let (mut asked, mut ports) = (0, 0);
    loop {
        match trap.enter().expect("KVM runs") {
            VcpuExit::Interrupted { .. } => {}
            VcpuExit::Access(Access::TimeStamp) => {
                asked += 1;
                assert!(trap.finish_access(answer(asked).into()).expect("it is answered"));
            }
            VcpuExit::Access(_) => {
                ports += 1;
                trap.finish_access(0).expect("it is answered");
            }
            VcpuExit::Halt => break,
            exit => panic!("{exit:?} at {:#x}", trap.state().expect("a state").rip),
        }
    }
    let after = trap.state().expect("a state");
    assert_eq!((asked, ports, after.rip), (3, 1, UNDEFINED_HANDLER + 1));
    let read = [after.gpr[8], after.gpr[9], after.gpr[RAX]];
    assert_eq!(read, [1, 2, 3].map(|number| answer(number) & 0xffff_ffff));
    // The guest never sees that CR4.TSD is set.
    assert_eq!((after.cr4, after.gpr[RCX]), (state.cr4, state.cr4));
    let expected = TrapCounts {
        kernel: 2,
        user: 1,
        control: 2,
        writes: 1,
        unforeseen: 1,
        ..Default::default()
    };
    assert_eq!(trap.counts(), Some(expected));
    // In RAM as the guest has it there is no breakpoint.
    let mut shown = KERNEL;
    trap.read_ram(CODE, &mut shown);
    let mut patched = KERNEL;
    patched[PATCHED as usize..][..2].copy_from_slice(&[0x0f, 0x31]);
    assert_eq!(shown, patched);
    trap.ram().read(CODE, &mut shown);
    assert_eq!(shown[0], 0xcc);
}

#[test]
fn this_host_is_tried_and_the_answer_is_a_line() {
    require_kvm!();
    let finding = time_stamp_trap();
    eprintln!("{finding}");
    assert!(!finding.reason.contains('\n') && !finding.reason.is_empty(), "{finding}");
}
