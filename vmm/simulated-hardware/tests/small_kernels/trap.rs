//! The trap of RDTSC around a vCPU made of the software CPU: kernels of a few instructions that do what a
//! trap may trip over.

use reprise_branch_clock::engine::{BranchClock, Parameters};
use reprise_branch_clock::time_stamp_trap::{TimeStampTrap, TrapCounts};
use reprise_branch_clock::vcpu::{MAX_BREAKPOINTS, Vcpu, VcpuExit};
use reprise_machine::engine::{Access, Engine, Exit};
use reprise_machine::paging::write_ram;
use reprise_machine::ram::GuestRam;
use reprise_simulated_hardware::{Disturbance, SimulatedVcpu};
use reprise_time_stamp_sites::{
    Evidence, Instruction, KernelText, Replaced, Site, Text, Unpacking,
};
use reprise_trace::cpu_state::{CS, CpuState, RAX, RCX, RSP, Segment};
use reprise_trace::register_bits::{CR4_TSD, RFLAGS_RF};

use crate::kernel::{
    CODE, HLT, IRETQ, KERNEL_GATE, NOP, USER_CODE, USER_CODE_64_BIT, kernel, put_gate, put_words,
};

const LDT: u64 = 0x7000;
const TEXT_BYTES: u64 = 0x4000;
const DEBUG_HANDLER: u64 = CODE + 0x600;
const BREAKPOINT_HANDLER: u64 = CODE + 0x700;
const FAULT_HANDLER: u64 = CODE + 0x800;
const UNDEFINED_HANDLER: u64 = CODE + 0x900;
/// A function of the kernel.
const FUNCTION: u64 = CODE + 0xa00;
const ELSEWHERE: u64 = 0x3_0000;

const USER_SELECTOR: u8 = 0x23;
/// The first entry of the LDT.
const LDT_SELECTOR: u8 = 0x07;

const RDTSC: [u8; 2] = [0x0f, 0x31];
/// mov cr4, rcx
const WRITE_CR4: [u8; 3] = [0x0f, 0x22, 0xe1];
/// mov rcx, cr4
const READ_CR4: [u8; 3] = [0x0f, 0x20, 0xe1];

/// A kernel and what it runs on.
struct Guest {
    ram: GuestRam,
    state: CpuState,
    text: KernelText,
}

impl Guest {
    /// A kernel that begins with this code; whatever it is led to by an exception halts.
    fn new(code: &[u8]) -> Self {
        let (ram, mut state) = kernel(USER_CODE_64_BIT);
        state.ldtr = Segment { selector: 0x30, attributes: 0x82, limit: 7, base: LDT };
        put_words(&ram, LDT, &[USER_CODE_64_BIT]);
        let linear = CODE..CODE + TEXT_BYTES;
        let text = Text { name: ".text".to_owned(), linear, physical: CODE, initial: None };
        let entry_bytes = code[..code.len().min(4)].to_vec();
        let text =
            KernelText { entry: CODE, entry_bytes, text: vec![text], ..KernelText::default() };
        let mut guest = Self { ram, state, text };
        guest.put(CODE, &[NOP; TEXT_BYTES as usize]);
        for (vector, handler) in [
            (1, DEBUG_HANDLER),
            (3, BREAKPOINT_HANDLER),
            (6, UNDEFINED_HANDLER),
            (13, FAULT_HANDLER),
        ] {
            put_gate(&guest.ram, vector, handler, KERNEL_GATE);
            guest.put(handler, &[HLT]);
        }
        guest.put(CODE, code);
        guest
    }

    /// The kernel goes to this user code, and it ends with UD2.
    fn with_user(code: &[u8], selector: u8) -> Self {
        let mut guest = Self::new(&enter_user(selector));
        guest.put(USER_CODE, &[code, &[0x0f, 0x0b]].concat());
        guest
    }

    fn put(&mut self, address: u64, bytes: &[u8]) -> &mut Self {
        write_ram(&self.ram, address, bytes);
        self
    }

    /// The kernel's file says that this is at `address`, where it is put.
    fn site(&mut self, address: u64, instruction: Instruction, code: &[u8]) -> &mut Self {
        let (bytes, evidence) = (code.len() as u8, Evidence::Section);
        self.text.sites.push(Site { address, instruction, bytes, evidence });
        self.put(address, code)
    }

    fn trap(self, disturbance: Disturbance) -> TimeStampTrap<SimulatedVcpu> {
        let mut vcpu = SimulatedVcpu::new(self.ram, disturbance).expect("the host has memory");
        vcpu.hide_time_stamp_counter();
        let mut trap = TimeStampTrap::new(vcpu, self.text).expect("it traps");
        trap.set_state(&self.state).expect("a first state");
        trap
    }

    /// Runs it to its end.
    fn run(self) -> Ran {
        let mut trap = self.trap(Disturbance { time_stamp_runs: true, ..Disturbance::none() });
        let mut asked = 0;
        for _ in 0..10_000 {
            match trap.enter().expect("it runs") {
                VcpuExit::Interrupted { .. } => {}
                VcpuExit::Access(Access::TimeStamp) => {
                    asked += 1;
                    assert!(trap.finish_access(asked.into()).expect("it is answered"));
                }
                exit => {
                    let state = trap.state().expect("a state");
                    return Ran { trap, exit, state, asked };
                }
            }
        }
        panic!("it does not end: {:x?}", trap.state());
    }
}

/// push USER_DATA; push the stack; push RFLAGS; push code; push USER_CODE; iretq
fn enter_user(selector: u8) -> Vec<u8> {
    let mut code = vec![0x6a, 0x1b, 0x68, 0, 0, 5, 0, 0x68, 2, 2, 0, 0, 0x6a, selector];
    code.extend([0x68, 0, 0, 4, 0]);
    code.extend(IRETQ);
    code
}

/// How a run ended.
struct Ran {
    trap: TimeStampTrap<SimulatedVcpu>,
    exit: VcpuExit,
    state: CpuState,
    asked: u64,
}

impl Ran {
    #[track_caller]
    fn halted_at(&self, handler: u64) {
        assert_eq!(self.exit, VcpuExit::Halt, "{:x?}", self.state);
        assert_eq!(self.state.rip, handler + 1, "{:x?}", self.counts());
    }

    #[track_caller]
    fn ended_with(&self, what: &str) {
        match &self.exit {
            VcpuExit::Unsupported(reason) => assert!(reason.contains(what), "{reason}"),
            exit => panic!("{exit:?}: {:x?}", self.state),
        }
    }

    fn counts(&self) -> TrapCounts {
        self.trap.counts().expect("the kernel was found")
    }
}

#[test]
fn a_site_that_crosses_a_page_is_trapped() {
    let mut guest = Guest::new(&[0xe9, 0xf0, 0x0f, 0, 0]); // jmp to CODE + 0xff5
    guest.site(CODE + 0xfff, Instruction::ReadTimeStamp, &RDTSC);
    guest.site(CODE + 0x1010, Instruction::ReadControl4, &READ_CR4);
    guest.site(CODE + 0x1ffe, Instruction::WriteControl4, &WRITE_CR4);
    guest.put(CODE + 0x2010, &enter_user(USER_SELECTOR));
    guest.put(USER_CODE, &[&RDTSC[..], &[0x0f, 0x0b]].concat());
    let ran = guest.run();
    ran.halted_at(UNDEFINED_HANDLER);
    let counts = ran.counts();
    assert_eq!((counts.kernel, counts.control, counts.user), (1, 2, 1), "{counts:?}");
    assert_eq!((ran.asked, counts.refused), (2, 0));
    let mut shown = [0; 3];
    ran.trap.read_ram(CODE + 0x1ffe, &mut shown);
    assert_eq!(shown, WRITE_CR4);
}

/// add qword [rsp + 8], 1; add rsp, 8; iretq: goes on behind an instruction of one byte.
const SKIP: [u8; 12] = [0x48, 0x83, 0x44, 0x24, 8, 1, 0x48, 0x83, 0xc4, 8, 0x48, 0xcf];

/// Whatever the handler of #GP begins with, the breakpoint at it stays, and the next RDTSC is answered.
#[test]
fn the_fault_handler_keeps_its_breakpoint_whatever_it_begins_with() {
    let to_function = (FUNCTION - FAULT_HANDLER) as u32;
    let call = [&[0xe8][..], &(to_function - 5).to_le_bytes()].concat();
    let none: Option<Instruction> = None;
    for (name, first, site, kernel) in [
        ("nop", vec![NOP], none, 0),
        ("jmp over INT3", vec![0xeb, 2, 0xcc, 0xcc], none, 0),
        ("call of RDTSC", call, none, 1),
        ("INT3", vec![0xcc], none, 0),
        ("push", vec![0x50, 0x48, 0x83, 0xc4, 8], none, 0),
        ("RDTSC", RDTSC.to_vec(), Some(Instruction::ReadTimeStamp), 1),
        ("cld by jump to another page", vec![0xe9, 0xfb, 0x27, 0, 0], none, 0),
    ] {
        // hlt, which faults; rdtsc
        let mut guest = Guest::with_user(&[HLT, 0x0f, 0x31], USER_SELECTOR);
        guest.site(FUNCTION, Instruction::ReadTimeStamp, &RDTSC).put(FUNCTION + 2, &[0xc3]);
        guest.put(BREAKPOINT_HANDLER, &IRETQ);
        guest.put(CODE + 0x3000, &SKIP);
        guest.put(FAULT_HANDLER, &[&first[..], &SKIP].concat());
        if let Some(site) = site {
            guest.site(FAULT_HANDLER, site, &first);
        }
        let ran = guest.run();
        eprintln!("{name}: {:?}", ran.counts());
        ran.halted_at(UNDEFINED_HANDLER);
        let counts = ran.counts();
        assert_eq!((counts.kernel, counts.user, counts.refused), (kernel, 1, 0), "{name}");
        assert_eq!(ran.asked, kernel + 1, "{name}");
    }
}

/// Kicks that come while the handler's first instruction executes lead nowhere else.
#[test]
fn kicks_at_the_fault_handler_change_nothing() {
    // hlt, again and again: mov ecx, 50; hlt; dec ecx; jnz
    let user = [0xb9, 50, 0, 0, 0, HLT, 0xff, 0xc9, 0x75, 0xfb];
    let mut kicked = false;
    for seed in 0..20 {
        let mut guest = Guest::with_user(&user, USER_SELECTOR);
        // out 0x80, al: an exit that is no interruption, right behind.
        guest.put(FAULT_HANDLER, &[&[NOP, 0xe6, 0x80][..], &SKIP].concat());
        let kicks = Disturbance { kick_every: Some(30), ..Disturbance::none() };
        let mut trap = guest.trap(Disturbance { seed, ..kicks });
        let mut ports = 0;
        loop {
            match trap.enter().expect("it runs") {
                VcpuExit::Interrupted { kicked: now } => kicked |= now,
                VcpuExit::Access(_) => {
                    ports += 1;
                    trap.finish_access(0).expect("it is answered");
                }
                VcpuExit::Halt => break,
                exit => panic!("seed {seed}: {exit:?}"),
            }
        }
        let state = trap.state().expect("a state");
        assert_eq!((state.rip, ports), (UNDEFINED_HANDLER + 1, 50), "seed {seed}");
    }
    assert!(kicked);
}

#[test]
fn a_move_to_cr4_that_faults_does() {
    // A bit that no CPU has, one that the model has not (FSGSBASE), and PAE cleared in long mode.
    for (value, faults) in [
        (0x620 | 1 << 30, true),
        (0x620 | 1 << 16, true),
        (0x600, true),
        (0x620 | 1 << 63, true),
        (0x620 | CR4_TSD, false),
    ] {
        let mut guest = Guest::new(&[NOP]);
        guest.site(CODE + 4, Instruction::WriteControl4, &WRITE_CR4).put(CODE + 7, &[HLT]);
        guest.state.gpr[RCX] = value;
        let ran = guest.run();
        ran.halted_at(if faults { FAULT_HANDLER } else { CODE + 7 });
        assert_eq!(ran.state.cr4, if faults { 0x620 } else { value }, "{value:#x}");
        if faults {
            let mut frame = [0; 16];
            ran.trap.read_ram(ran.state.gpr[RSP], &mut frame);
            assert_eq!(frame[..8], [0; 8], "{value:#x}");
            assert_eq!(frame[8..], (CODE + 4).to_le_bytes(), "{value:#x}");
        }
    }
}

/// What would raise #DB behind it, and the trap does not.
#[test]
fn a_guest_that_steps_what_is_trapped_is_refused() {
    // push 0x102; popfq
    let mut kernel = Guest::new(&[0x68, 2, 1, 0, 0, 0x9d]);
    kernel.site(CODE + 6, Instruction::ReadTimeStamp, &RDTSC);
    kernel.run().ended_with("a debugger in the guest single-steps (TF) an instruction at rip 0x1");
    let user = Guest::with_user(&[0x68, 2, 1, 0, 0, 0x9d, 0x0f, 0x31], USER_SELECTOR);
    user.run().ended_with("a debugger in the guest single-steps (TF) an instruction at rip 0x4");
}

#[test]
fn user_code_in_the_kernels_text_is_refused() {
    // jmp to FUNCTION
    let distance = (FUNCTION as i64 - USER_CODE as i64 - 5) as i32;
    let jump = [&[0xe9][..], &distance.to_le_bytes()].concat();
    let mut guest = Guest::with_user(&jump, USER_SELECTOR);
    guest.site(FUNCTION, Instruction::ReadTimeStamp, &RDTSC);
    guest.run().ended_with("user code");
}

/// What is MOV to CR4 as 64-bit code is something else as 32-bit code.
#[test]
fn text_in_another_mode_is_refused() {
    let mut guest = Guest::new(&[NOP]);
    // mov cr4, r9
    guest.site(CODE + 1, Instruction::WriteControl4, &[0x41, 0x0f, 0x22, 0xe1]);
    guest.state.segments[CS].attributes = 0xc09b;
    guest.run().ended_with("another mode");
}

#[test]
fn user_code_of_the_ldt_is_answered() {
    let ran = Guest::with_user(&RDTSC, LDT_SELECTOR).run();
    ran.halted_at(UNDEFINED_HANDLER);
    assert_eq!((ran.asked, ran.counts().user), (1, 1));
}

/// mov byte [ELSEWHERE in text], byte
fn store(address: u64, byte: u8) -> Vec<u8> {
    let mut code = vec![0xc6, 0x04, 0x25];
    code.extend((address as u32).to_le_bytes());
    code.push(byte);
    code
}

/// RDTSC that comes byte by byte, in the order in which kernels write code, and what only looks like one.
#[test]
fn what_comes_byte_by_byte_is_trapped() {
    const PATCHED: u64 = CODE + 0x200;
    let test_eax = [0xa9, 0x0f, 0x31, 0, 0];
    let cases: [(&str, Vec<(u64, u8)>, u64); 5] = [
        ("forward", vec![(0, 0x0f), (1, 0x31)], 1),
        ("backward", vec![(1, 0x31), (0, 0x0f)], 1),
        ("INT3 first", vec![(0, 0xcc), (1, 0x31), (0, 0x0f)], 1),
        ("behind a prefix", vec![(0, 0x66), (1, 0x0f), (2, 0x31)], 1),
        (
            "an operand, INT3 first",
            [(0, 0xcc), (1, 0x0f), (2, 0x31), (3, 0), (4, 0), (0, 0xa9)].to_vec(),
            0,
        ),
    ];
    for at in [PATCHED, PATCHED + 0x2e00] {
        for (name, stores, asked) in &cases {
            let mut code: Vec<u8> =
                stores.iter().flat_map(|(offset, byte)| store(at + offset, *byte)).collect();
            let distance = (at - CODE) as i32 - code.len() as i32 - 5;
            code.push(0xe9);
            code.extend(distance.to_le_bytes());
            let mut guest = Guest::new(&code);
            guest.put(at + 8, &[HLT]);
            let ran = guest.run();
            ran.halted_at(at + 8);
            assert_eq!((ran.asked, ran.counts().refused), (*asked, 0), "{name} at {at:#x}");
            if *asked == 0 {
                let mut raw = [0; 5];
                ran.trap.ram().read(at, &mut raw);
                assert_eq!(raw, test_eax, "{name} at {at:#x}");
            }
        }
    }
}

/// The guest's CR4.TSD is its own from before its kernel was entered, and the breakpoint there stays
/// whatever else has one.
#[test]
fn a_kernel_that_is_waited_for_is_entered_as_it_was_left() {
    let mut guest = Guest::new(&[NOP, NOP, NOP, NOP]);
    guest.text.unpacking = Unpacking::Unknown;
    guest.site(CODE + 4, Instruction::ReadControl4, &READ_CR4).put(CODE + 7, &[HLT]);
    // mov cr4, rcx; xor ecx, ecx; jmp to CODE
    let stub = [&WRITE_CR4[..], &[0x31, 0xc9, 0xe9]].concat();
    let distance = (CODE as i64 - (ELSEWHERE + stub.len() as u64 + 4) as i64) as i32;
    guest.put(ELSEWHERE, &[&stub[..], &distance.to_le_bytes()].concat());
    guest.put(CODE, &[NOP; 4]);
    // The kernel is not there yet, as far as can be told: it is entered first.
    (guest.state.rip, guest.state.gpr[RCX]) = (ELSEWHERE, 0x620 | CR4_TSD);
    let mut trap = guest.trap(Disturbance::none());
    assert_eq!(trap.breakpoints(), MAX_BREAKPOINTS - 1);
    trap.set_breakpoints(&[CODE + 1, CODE + 2, CODE + 3]).expect("three");
    let mut stood = Vec::new();
    loop {
        match trap.enter().expect("it runs") {
            VcpuExit::Interrupted { .. } => {}
            VcpuExit::Breakpoint => {
                stood.push(trap.state().expect("a state").rip);
                trap.step_off().expect("it can");
            }
            VcpuExit::Halt => break,
            exit => panic!("{exit:?}"),
        }
    }
    assert_eq!(stood, [CODE + 1, CODE + 2, CODE + 3]);
    assert_eq!(trap.breakpoints(), MAX_BREAKPOINTS);
    let state = trap.state().expect("a state");
    assert_eq!((state.cr4, state.gpr[RCX]), (0x620 | CR4_TSD, 0x620 | CR4_TSD));
}

/// The guest's own INT3 leaves a frame without RF, wherever kicks strike and the guest is led.
#[test]
fn the_guests_own_breakpoint_instructions_have_the_frames_that_they_have() {
    // mov ecx, 200; loop: int3; dec ecx; jnz loop; hlt
    let code = [0xb9, 200, 0, 0, 0, 0xcc, 0xff, 0xc9, 0x75, 0xfb, HLT];
    // or eax, [rsp + 16]; iretq
    let handler = [0x0b, 0x44, 0x24, 16, 0x48, 0xcf];
    for seed in 0..20 {
        let mut guest = Guest::new(&code);
        guest.put(BREAKPOINT_HANDLER, &handler);
        let state = guest.state.clone();
        let (kick_every, signal_every) = (Some(20), Some(30));
        let trap =
            guest.trap(Disturbance { seed, kick_every, signal_every, ..Disturbance::none() });
        let mut engine = BranchClock::new(trap, Parameters::with_skid(1)).expect("it counts");
        engine.set_cpu_state(&state).expect("a first state");
        let mut kicks = 0;
        while engine.run(u64::MAX).expect("it runs") != Exit::Halt {
            kicks += 1;
        }
        let after = engine.cpu_state().expect("a state");
        assert!(kicks > 3 && after.gpr[RCX] == 0, "seed {seed}: {kicks}");
        assert_eq!(after.gpr[RAX] & RFLAGS_RF, 0, "seed {seed}: {:#x}", after.gpr[RAX]);
    }
}

/// Until the kernel has applied its alternatives, user code's RDTSC is refused and nobody sees it.
#[test]
fn user_code_that_is_not_guarded_is_counted() {
    let mut guest = Guest::with_user(&[NOP; 4], USER_SELECTOR);
    let (instruction, evidence) = (Instruction::ReadTimeStamp, Evidence::Alternative);
    guest.text.patched.push(Site { address: CODE + 0x300, instruction, bytes: 2, evidence });
    let replaced = Replaced { address: CODE + 0x400, bytes: vec![NOP; 3] };
    guest.text.replaced_behind.push(replaced);
    let mut trap = guest.trap(Disturbance { signal_every: Some(2), ..Disturbance::none() });
    while trap.enter().expect("it runs") != VcpuExit::Halt {}
    assert!(trap.counts().expect("the kernel was found").unguarded > 0);
}
