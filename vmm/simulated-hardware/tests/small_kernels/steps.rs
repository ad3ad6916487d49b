//! Steps of the branch clock that lead where no breakpoint is: a guest of a few instructions is kicked
//! once, nothing else strikes, and it is to be caught soon all the same.

use std::cell::Cell;

use reprise_branch_clock::ask_vcpu_within;
use reprise_branch_clock::engine::{BranchClock, Parameters};
use reprise_branch_clock::guest_code::linear_of;
use reprise_branch_clock::settle::Stand;
use reprise_branch_clock::vcpu::{Vcpu, VcpuExit};
use reprise_machine::engine::{Engine, EngineError, Exit};
use reprise_machine::inputs::Stamp;
use reprise_machine::paging::write_ram;
use reprise_machine::ram::GuestRam;
use reprise_simulated_hardware::{Disturbance, SimulatedVcpu};
use reprise_trace::cpu_state::{CpuState, RAX, RCX, RSP};
use reprise_trace::moment::Moment;
use reprise_trace::register_bits::{RFLAGS_RF, RFLAGS_TF};

use crate::kernel::{
    CODE, HIGH, HLT, IRETQ, NOP, USER_CODE, USER_CODE_32_BIT, USER_GATE, kernel, put_gate,
};

const UNDEFINED_HANDLER: u64 = CODE + 0x400;
const STACK_FAULT_HANDLER: u64 = CODE + 0x500;
const CALL_HANDLER: u64 = CODE + 0x600;
const INTERRUPT_HANDLER: u64 = CODE + 0x700;
const DEBUG_HANDLER: u64 = CODE + 0x800;

const DEBUG: u64 = 1;
const UNDEFINED: u64 = 6;
const STACK_FAULT: u64 = 12;
const INTERRUPT: u8 = 0x40;
const CALL: u64 = 0x80;

const UD2: [u8; 2] = [0x0f, 0x0b];
/// Branches that an entry with breakpoints may let pass, the counter being exact.
const SOON: u64 = 256;

/// mov ecx, ROUNDS; here: dec ecx; jnz here
fn looping(rounds: u32) -> Vec<u8> {
    let mut code = vec![0xb9];
    code.extend(rounds.to_le_bytes());
    code.extend([0xff, 0xc9, 0x75, 0xfc]);
    code
}

/// A kernel in high memory that begins with `code`; what its handlers do. User code is 32-bit code.
fn guest(code: &[u8], handlers: &[(u64, u64, &[u8])]) -> (GuestRam, CpuState) {
    let (ram, state) = kernel(USER_CODE_32_BIT);
    for (vector, handler, instructions) in handlers {
        put_gate(&ram, *vector, HIGH + handler, USER_GATE);
        write_ram(&ram, *handler, instructions);
    }
    write_ram(&ram, CODE, code);
    (ram, CpuState { rip: HIGH + CODE, ..state })
}

/// Kicked once, and no step of it may run on.
struct KickedOnce {
    vcpu: SimulatedVcpu,
    /// Branches to the kick.
    kick_after: Cell<Option<u64>>,
    breakpoints: Vec<u64>,
}

impl Vcpu for KickedOnce {
    ask_vcpu_within! {
        vcpu: finish_access, conditional_branches, set_overflow, state, set_state,
        interruptible, set_window_request, inject, catch_breakpoint_instructions,
        pass_breakpoint_instruction, watch_writes, retire_instruction, write_ram, ram, kicker
    }

    fn enter(&mut self) -> Result<VcpuExit, EngineError> {
        let kick_after = self.kick_after.take();
        if let Some(branches) = kick_after {
            self.vcpu.set_overflow(Some(branches))?;
        }
        let before = self.vcpu.conditional_branches()?;
        let exit = self.vcpu.enter()?;
        let passed = self.vcpu.conditional_branches()? - before;
        assert!(
            self.breakpoints.is_empty() || passed <= SOON,
            "a step passed {passed} branches: {exit:?}"
        );
        Ok(match exit {
            VcpuExit::Interrupted { .. } => VcpuExit::Interrupted { kicked: kick_after.is_some() },
            exit => exit,
        })
    }

    fn set_breakpoints(&mut self, addresses: &[u64]) -> Result<(), EngineError> {
        self.breakpoints = addresses.to_vec();
        self.vcpu.set_breakpoints(addresses)
    }

    fn step_off(&mut self) -> Result<(), EngineError> {
        let state = self.vcpu.state()?;
        let here = linear_of(&state, state.rip);
        assert!(self.breakpoints.contains(&here), "no breakpoint is at {here:#x}");
        self.vcpu.step_off()
    }
}

fn clock(
    guest: (GuestRam, CpuState),
    skid: u64,
    kick_after: Option<u64>,
) -> BranchClock<KickedOnce> {
    clock_with(guest, Parameters::with_skid(skid), kick_after)
}

fn clock_with(
    (ram, state): (GuestRam, CpuState),
    parameters: Parameters,
    kick_after: Option<u64>,
) -> BranchClock<KickedOnce> {
    let vcpu = SimulatedVcpu::new(ram, Disturbance::none()).expect("the host has memory");
    let vcpu = KickedOnce { vcpu, kick_after: kick_after.into(), breakpoints: Vec::new() };
    let mut clock = BranchClock::new(vcpu, parameters).expect("it counts");
    clock.set_cpu_state(&state).expect("a first state");
    clock
}

fn run(clock: &mut BranchClock<KickedOnce>, until: u64) -> Exit {
    clock.run(until).expect("it runs")
}

/// `first` branches, at whose last the kick comes, then `between`, and a long loop.
fn kicked_before(between: &[u8], handlers: &[(u64, u64, &[u8])]) -> BranchClock<KickedOnce> {
    const FIRST: u32 = 150;
    let code = [&looping(FIRST), between, &looping(1_000_000), &[HLT]].concat();
    let mut clock = clock(guest(&code, handlers), 100, Some(FIRST.into()));
    assert_eq!(run(&mut clock, u64::MAX), Exit::Kicked, "{:x?}", clock.moment());
    assert!(clock.stands_exactly());
    clock
}

/// add qword [rsp], 2; iretq
const OVER_TWO_BYTES: [u8; 7] = [0x48, 0x83, 0x04, 0x24, 2, IRETQ[0], IRETQ[1]];

#[test]
fn a_handler_that_returns_with_the_resume_flag_is_followed() {
    let between = [&UD2[..], &[NOP]].concat();
    let handlers = [(UNDEFINED, UNDEFINED_HANDLER, &OVER_TWO_BYTES[..])];
    let mut clock = kicked_before(&between, &handlers);
    let moment = clock.moment().expect("a moment");
    assert_eq!((moment.tick, moment.rcx), (151, 999_999), "the first branch behind it");
    assert!(clock.save().expect("a state").is_some(), "it is the first place of its tick");
}

#[test]
fn a_fault_for_which_there_is_no_breakpoint_is_caught_soon() {
    // movabs rbp, 1 << 62; mov rax, [rbp]: #SS
    let between = [0x48, 0xbd, 0, 0, 0, 0, 0, 0, 0, 0x40, 0x48, 0x8b, 0x45, 0];
    let handler = [looping(1_000_000), vec![HLT]].concat();
    let mut clock = kicked_before(&between, &[(STACK_FAULT, STACK_FAULT_HANDLER, &handler)]);
    let moment = clock.moment().expect("a moment");
    assert!(moment.tick < 150 + 2 * SOON, "{moment:x?}");
}

#[test]
fn a_fault_is_not_taken_for_what_follows_in_silence() {
    // btr dword [rsp + 16], 16: RF, with which the breakpoint behind the fault does not hit.
    const CLEAR_RESUME_FLAG: &[u8] = &[0x0f, 0xba, 0x74, 0x24, 0x10, 0x10];
    // Its handler, of twenty branches, goes back behind it: if the breakpoint there hits, it is too late.
    let between = [0x48, 0xbd, 0, 0, 0, 0, 0, 0, 0, 0x40, 0x48, 0x8b, 0x45, 0];
    for clears in [&[], CLEAR_RESUME_FLAG] {
        // push rcx; 20 rounds; pop rcx; add rsp, 8; add qword [rsp], 4; iretq
        let mut handler = [&[0x51][..], &looping(20), &[0x59, 0x48, 0x83, 0xc4, 8]].concat();
        handler.extend([0x48, 0x83, 0x04, 0x24, 4]);
        handler.extend([clears, &IRETQ].concat());
        let mut clock = kicked_before(&between, &[(STACK_FAULT, STACK_FAULT_HANDLER, &handler)]);
        let moment = clock.moment().expect("a moment");
        let first = clock.save().expect("a state").is_some();
        // Right behind a branch of the last loop it is, and nowhere else.
        let in_loop = 1_000_000 - moment.rcx;
        assert_eq!(moment.tick, 150 + 20 + in_loop, "{moment:x?}");
        assert_eq!(first, in_loop > 0, "{moment:x?}");
    }
}

#[test]
fn behind_a_rep_that_a_branch_led_to_the_guest_stands() {
    // mov ecx, 3; jnz to the next; rep stosb; nop
    let between = [0xb9, 3, 0, 0, 0, 0x75, 0, 0xf3, 0xaa, NOP];
    let mut clock = kicked_before(&between, &[]);
    let moment = clock.moment().expect("a moment");
    let behind = looping(0).len() + between.len() - 1;
    assert_eq!(moment, Moment { tick: 151, rip: HIGH + CODE + behind as u64, rcx: 0 });
    assert!(clock.save().expect("it can be asked").is_none(), "the REP was the tick's first place");
}

#[test]
fn a_step_with_an_interrupt_queued_goes_to_its_handler() {
    let handler = [&[0x51][..], &looping(40), &[0x59], &IRETQ].concat();
    let code = [&[0xfb, NOP][..], &looping(1_000_000)].concat();
    let handlers = [(INTERRUPT.into(), INTERRUPT_HANDLER, &handler[..])];
    let mut clock = clock(guest(&code, &handlers), 100, Some(10));
    assert_eq!(run(&mut clock, u64::MAX), Exit::Kicked);
    clock.inject(INTERRUPT).expect("it is taken");
    let until = clock.tick() + 5;
    assert_eq!(run(&mut clock, until), Exit::TickReached);
    let state = clock.cpu_state().expect("a state");
    assert_eq!((clock.tick(), state.gpr[RCX]), (until, 35), "amid the handler");
    let mut rflags = [0; 8];
    // RCX, RIP and CS lie before it.
    clock.vcpu().ram().read(state.gpr[RSP] + 24, &mut rflags);
    assert_eq!(u64::from_le_bytes(rflags) & RFLAGS_RF, 0, "nobody sees that it was stepped");
}

/// push rcx; nop; pop rcx; iretq: between its delivery and its return no branch retires.
const BRANCHLESS: [u8; 5] = [0x51, NOP, 0x59, IRETQ[0], IRETQ[1]];

fn interruptible_loop() -> (GuestRam, CpuState) {
    let code = [&[0xfb, NOP][..], &looping(1_000_000)].concat();
    guest(&code, &[(INTERRUPT.into(), INTERRUPT_HANDLER, &BRANCHLESS[..])])
}

/// As `positions` once failed: the place is sought where an interrupt is yet to be delivered, and nothing but its
/// breakpoint tells it.
#[test]
fn a_moment_behind_a_delivery_has_its_breakpoint() {
    let mut clock = clock(interruptible_loop(), 100, Some(10));
    assert_eq!(run(&mut clock, u64::MAX), Exit::Kicked);
    let branches = clock.tick();
    clock.inject(INTERRUPT).expect("it is taken");
    let moment = clock.moment().expect("a moment");

    // The same by hand, up to the handler's second instruction.
    let (ram, state) = interruptible_loop();
    let mut vcpu = SimulatedVcpu::new(ram, Disturbance::none()).expect("the host has memory");
    vcpu.set_state(&state).expect("a first state");
    vcpu.set_overflow(Some(branches)).expect("it counts");
    assert_eq!(vcpu.enter().expect("it runs"), VcpuExit::Interrupted { kicked: false });
    assert_eq!(vcpu.state().expect("a state").rip, moment.rip);
    let rip = HIGH + INTERRUPT_HANDLER + 1;
    vcpu.inject(INTERRUPT).expect("it is taken");
    vcpu.set_breakpoints(&[rip]).expect("it has some");
    assert_eq!(vcpu.enter().expect("it runs"), VcpuExit::Breakpoint);
    let there = vcpu.state().expect("a state");
    assert_eq!(there.rip, rip);

    let moment = Moment { tick: moment.tick, rip, rcx: there.gpr[RCX] };
    let stamp = Stamp { moment, cpu_digest: there.short_digest() };
    assert_eq!(clock.run_to(&stamp).expect("it runs"), Exit::TickReached);
    assert_eq!(clock.cpu_state().expect("a state"), there);
}

/// As `positions` once failed: nothing has retired at a handler's first instruction since the fault, so no
/// instruction count tells it from the place before.
#[test]
fn nobody_is_left_at_a_handlers_first_instruction() {
    const FIRST: u32 = 150;
    let handlers = [(UNDEFINED, UNDEFINED_HANDLER, &OVER_TWO_BYTES[..])];
    let code = [&looping(FIRST)[..], &UD2, &looping(1_000_000), &[HLT]].concat();
    let parameters = Parameters { skid: 100, stand: Stand::AtOnce };
    let mut clock = clock_with(guest(&code, &handlers), parameters, Some(FIRST.into()));
    assert_eq!(run(&mut clock, u64::MAX), Exit::Kicked);
    assert!(clock.stands_exactly());
    // ADD [RSP], 2 comes first.
    let second = HIGH + UNDEFINED_HANDLER + 5;
    assert_eq!(clock.moment().expect("a moment").rip, second);
}

/// A 64-bit kernel with a 32-bit process that makes a system call after so many branches.
fn with_compatible_user() -> (GuestRam, CpuState) {
    // push data; push stack; push RFLAGS; push code; push RIP; iretq
    let mut code = vec![0x6a, 0x1b, 0x68, 0, 0, 5, 0, 0x6a, 2, 0x6a, 0x23, 0x68, 0, 0, 4, 0];
    code.extend(IRETQ);
    let handler = [looping(1_000), vec![HLT]].concat();
    let guest = guest(&code, &[(CALL, CALL_HANDLER, &handler)]);
    write_ram(&guest.0, USER_CODE, &[looping(200), vec![0xcd, 0x80]].concat());
    guest
}

#[test]
fn a_moment_in_the_kernel_is_found_from_a_32_bit_process() {
    const TICK: u64 = 221;
    let mut near = clock(with_compatible_user(), 1, None);
    assert_eq!(run(&mut near, TICK), Exit::TickReached);
    let state = near.cpu_state().expect("a state");
    assert_eq!((near.tick(), state.gpr[RCX]), (TICK, 979));
    let moment = near.moment().expect("a moment");
    let stamp = Stamp { moment, cpu_digest: state.short_digest() };
    let mut far = clock(with_compatible_user(), 100, None);
    assert_eq!(far.run_to(&stamp).expect("it runs"), Exit::TickReached);
    assert_eq!(far.moment().expect("a moment"), stamp.moment);
    assert_eq!(far.cpu_state().expect("a state"), state);
}

#[test]
fn a_32_bit_process_is_stepped_into_the_kernel() {
    let mut clock = clock(with_compatible_user(), 100, None);
    assert_eq!(run(&mut clock, 221), Exit::TickReached);
    let state = clock.cpu_state().expect("a state");
    assert_eq!((clock.tick(), state.gpr[RCX]), (221, 979));
}

#[test]
fn a_time_stamp_that_is_answered_in_place_is_as_long_as_it_is() {
    // rex.w rdtsc; hlt
    let mut clock = clock(guest(&[0x48, 0x0f, 0x31, HLT], &[]), 100, None);
    assert!(clock.ask_for_time_stamp().expect("it runs"));
    clock.finish_access(5).expect("it is answered");
    assert_eq!(run(&mut clock, u64::MAX), Exit::Halt);
    let state = clock.cpu_state().expect("a state");
    assert_eq!((state.rip, state.gpr[RAX]), (HIGH + CODE + 4, 5));
}

#[test]
fn a_time_stamp_that_a_debugger_steps_is_not_answered_in_place() {
    let (ram, state) = guest(&[0x0f, 0x31, HLT], &[]);
    let state = CpuState { rflags: state.rflags | RFLAGS_TF, ..state };
    let mut clock = clock((ram, state), 100, None);
    let error = clock.ask_for_time_stamp().expect_err("#DB would be lost").to_string();
    let told = error.contains("single-steps (TF)") && error.contains("--engine soft");
    assert!(told && error.contains("0xffffffff80010000"), "{error}");
}

/// pushfq; or byte [rsp + 1], 1; popfq
const SET_TRAP_FLAG: [u8; 7] = [0x9c, 0x80, 0x4c, 0x24, 1, 1, 0x9d];
/// mov eax, 0x401; mov dr7, rax
const SET_BREAKPOINTS: [u8; 8] = [0xb8, 1, 4, 0, 0, 0x0f, 0x23, 0xf8];
/// mov eax, 0x400; mov dr7, rax; pushfq; and byte [rsp + 1], 0xfe; popfq
const END_DEBUGGING: [u8; 15] =
    [0xb8, 0, 4, 0, 0, 0x0f, 0x23, 0xf8, 0x9c, 0x80, 0x64, 0x24, 1, 0xfe, 0x9d];
/// What a kernel with a debugger begins with, and what a refusal says of it.
const DEBUGGERS: [(&[u8], &str); 3] = [
    (&SET_TRAP_FLAG, "single-steps (TF) or executes INT1"),
    (&[0xf1], "single-steps (TF) or executes INT1"),
    (&SET_BREAKPOINTS, "breakpoints in debug registers (DR7)"),
];

/// A guest that begins so, and has a loop of this many rounds behind it.
fn debugged(begins: &[u8], rounds: u32) -> (GuestRam, CpuState) {
    let code = [begins, &looping(rounds), &END_DEBUGGING, &[HLT]].concat();
    guest(&code, &[(DEBUG, DEBUG_HANDLER, &IRETQ)])
}

#[test]
fn a_guest_that_debugs_itself_is_refused_while_there_are_breakpoints() {
    for (begins, expected) in DEBUGGERS {
        let mut free = clock(debugged(begins, 500), 100, None);
        assert_eq!(run(&mut free, u64::MAX), Exit::Halt, "{begins:x?}");
        let mut replayed = clock(debugged(begins, 500), 100, None);
        let moment = Moment { tick: 5, rip: HIGH + CODE + 0x300, rcx: 0 };
        let Exit::Unsupported(reason) =
            replayed.run_to(&Stamp { moment, cpu_digest: 0 }).expect("it runs")
        else {
            panic!("{begins:x?} is not refused");
        };
        assert!(reason.contains(expected) && reason.contains("rip 0xffffffff8001"), "{reason}");
        assert!(reason.contains("--engine soft") && !reason.contains('\n'), "{reason}");
    }
}

/// Where a debugger is at work nothing enters: behind it something does.
#[test]
fn a_recording_of_a_guest_that_debugs_itself_goes_on() {
    for (begins, _) in DEBUGGERS {
        for kick in 1..40 {
            let code =
                [&looping(10), begins, &looping(10), &END_DEBUGGING, &looping(1_000), &[HLT]];
            let ram = guest(&code.concat(), &[(DEBUG, DEBUG_HANDLER, &IRETQ)]);
            let mut clock = clock(ram, 100, Some(kick));
            assert_eq!(run(&mut clock, u64::MAX), Exit::Kicked, "{begins:x?}, kick {kick}");
            assert!(clock.stands_exactly(), "{begins:x?}, kick {kick}");
            assert_eq!(run(&mut clock, u64::MAX), Exit::Halt, "{begins:x?}, kick {kick}");
        }
    }
}

#[test]
fn a_recording_of_a_guest_that_always_debugs_itself_ends() {
    for (begins, expected) in [DEBUGGERS[0], DEBUGGERS[2]] {
        let code = [begins, &[0x48, 0xff, 0xc0, 0x75, 0xfb]].concat();
        let mut clock = clock(guest(&code, &[(DEBUG, DEBUG_HANDLER, &IRETQ)]), 100, Some(50));
        let mut kicks = 0;
        let reason = loop {
            match run(&mut clock, u64::MAX) {
                Exit::Kicked => kicks += 1,
                Exit::Unsupported(reason) => break reason,
                exit => panic!("{exit:?}"),
            }
            assert!(!clock.stands_exactly());
            clock.vcpu().kick_after.set(Some(50));
        };
        assert!(reason.contains(expected), "{reason}");
        assert_eq!(kicks, 999);
    }
}

#[test]
fn a_moment_is_not_sought_for_ever_where_the_guest_rests() {
    // here: jmp here, with another RAX than the moment's.
    let mut clock = clock(guest(&[0xeb, 0xfe], &[]), 100, None);
    let moment = clock.moment().expect("a moment");
    let stamp = Stamp { moment, cpu_digest: 0 };
    let error = clock.run_to(&stamp).expect_err("it does not come there").to_string();
    assert!(error.contains("does not come out of rip 0xffffffff80010000"), "{error}");
}
