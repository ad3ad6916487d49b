//! The vCPU's way with signals, on this host's KVM and with a counter that stands still.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use reprise_trace::cpu_state::{RCX, RSI};

use super::*;
use crate::branch_counter::SHORTEST_PERIOD;
use crate::fake_perf_host::{Asked, FakePerfHost, counted};
use crate::kick;
use crate::testing::{CODE, long_mode, ram_with, require_kvm, skipped};

/// A jump to itself.
const SPIN: &[u8] = &[0xeb, 0xfe];

fn spinning(host: &FakePerfHost) -> PmuVcpu {
    let mut vcpu = PmuVcpu::new(ram_with(SPIN), host).expect("KVM and a counter");
    vcpu.set_state(&long_mode()).expect("a state that KVM takes");
    vcpu
}

/// Sends this thread a signal again and again, as a counter's overflow would, until it is dropped.
struct Signals {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Signals {
    fn start() -> Self {
        // SAFETY: pthread_self has no preconditions.
        let target = unsafe { libc::pthread_self() } as usize;
        let over = Arc::new(AtomicBool::new(false));
        let seen = over.clone();
        let thread = std::thread::spawn(move || {
            while !seen.load(Ordering::SeqCst) {
                // SAFETY: the target joins this thread before it ends.
                unsafe { libc::pthread_kill(target as libc::pthread_t, kick::signal()) };
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        Self { over, thread: Some(thread) }
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[test]
fn a_signal_that_is_no_kick_interrupts_and_is_told_from_one() {
    require_kvm!();
    let mut vcpu = spinning(&FakePerfHost::new());
    let signals = Signals::start();
    for _ in 0..10 {
        let exit = vcpu.enter().expect("KVM runs");
        assert_eq!(exit, VcpuExit::Interrupted { kicked: false });
        assert_eq!(vcpu.state().expect("a state").rip, CODE);
    }
    drop(signals);
    vcpu.kicker().kick();
    assert_eq!(vcpu.enter().expect("KVM runs"), VcpuExit::Interrupted { kicked: true });
}

#[test]
fn a_kick_amid_signals_is_not_lost() {
    require_kvm!();
    let mut vcpu = spinning(&FakePerfHost::new());
    let _signals = Signals::start();
    for _ in 0..20 {
        vcpu.kicker().kick();
        let mut entries = 0;
        while vcpu.enter().expect("KVM runs") != (VcpuExit::Interrupted { kicked: true }) {
            entries += 1;
            assert!(entries < 3, "the kick comes with the next entry");
        }
    }
}

#[test]
fn a_guest_that_is_watched_and_does_not_come_back_is_an_error() {
    require_kvm!();
    let mut vcpu = spinning(&FakePerfHost::new());
    vcpu.watch(Duration::from_millis(20));
    let error = vcpu.enter().expect_err("it spins").to_string();
    assert!(error.contains("does not come back") && error.contains("--engine soft"), "{error}");
}

#[test]
fn an_overflow_is_asked_of_the_counter() {
    require_kvm!();
    let host = FakePerfHost::new();
    let mut vcpu = spinning(&host);
    vcpu.set_overflow(Some(4_000)).expect("a period");
    assert_eq!(host.asked.borrow().last(), Some(&Asked::Period(4_000)));
    assert_eq!(vcpu.conditional_branches().expect("it reads"), 0);
}

/// The kernel may have stopped a counter that overflowed, and a new period starts it.
#[test]
fn an_entry_behind_a_signal_has_a_new_period_before_it() {
    require_kvm!();
    let host = FakePerfHost::new();
    let mut vcpu = spinning(&host);
    vcpu.set_overflow(Some(4_000)).expect("a period");
    let signals = Signals::start();
    for entries in 1..4 {
        assert_eq!(vcpu.enter().expect("KVM runs"), VcpuExit::Interrupted { kicked: false });
        let periods = host.asked.borrow().iter().filter(|it| **it == Asked::Period(4_000)).count();
        assert_eq!(periods, entries);
    }
    drop(signals);
}

/// Its signal may have come as KVM came back for something else, and whoever enters again need not ask.
#[test]
fn an_entry_behind_any_other_has_what_is_left_of_the_period_before_it() {
    require_kvm!();
    let branches = Rc::new(Cell::new(100));
    let shown = branches.clone();
    let host = FakePerfHost::reading(move || Some(counted(shown.get())));
    // out 0x80, al; jmp back
    let mut vcpu = PmuVcpu::new(ram_with(&[0xe6, 0x80, 0xeb, 0xfc]), &host).expect("KVM");
    vcpu.set_state(&long_mode()).expect("a state that KVM takes");
    vcpu.conditional_branches().expect("it reads");
    vcpu.set_overflow(Some(4_000)).expect("a period");
    for (shows, left) in [(100, None), (1_100, Some(3_000)), (9_000, Some(SHORTEST_PERIOD))] {
        branches.set(shows);
        host.asked.borrow_mut().clear();
        assert!(matches!(vcpu.enter().expect("KVM runs"), VcpuExit::Access(_)));
        vcpu.finish_access(0).expect("it is answered");
        let periods: Vec<Asked> = left.map(Asked::Period).into_iter().collect();
        assert_eq!(*host.asked.borrow(), periods, "at {shows}");
    }
}

/// IRET may load RFLAGS.RF once the instruction that was stepped off has retired.
#[test]
fn the_resume_flag_is_the_guests_elsewhere_than_it_was_set_for() {
    require_kvm!();
    let mut vcpu = PmuVcpu::without_counter(ram_with(&[0x90, 0xf4])).expect("KVM");
    vcpu.set_state(&long_mode()).expect("a state that KVM takes");
    vcpu.step_off().expect("KVM takes it");
    assert_eq!(vcpu.state().expect("a state").rflags & RFLAGS_RF, 0, "ours is not seen");
    let regs = vcpu.engine.registers().expect("registers");
    assert_ne!(regs.rflags & RFLAGS_RF, 0, "it is set");
    vcpu.set_registers(kvm_regs { rip: CODE + 1, ..regs }).expect("KVM takes them");
    assert_ne!(vcpu.state().expect("a state").rflags & RFLAGS_RF, 0, "the guest's is");
    vcpu.set_breakpoints(&[]).expect("KVM takes it");
    assert_ne!(vcpu.engine.registers().expect("registers").rflags & RFLAGS_RF, 0, "and stays");
}

/// As AMD's CPUs may leave it.
#[test]
fn the_resume_flag_does_not_outlive_hlt() {
    require_kvm!();
    let mut vcpu = PmuVcpu::without_counter(ram_with(&[0xf4])).expect("KVM");
    vcpu.set_state(&long_mode()).expect("a state that KVM takes");
    vcpu.step_off().expect("KVM takes it");
    let regs = vcpu.engine.registers().expect("registers");
    vcpu.set_registers(kvm_regs { rip: CODE + 1, ..regs }).expect("KVM takes them");
    vcpu.engine.queued = Some(RawExit::Halt);
    assert_eq!(vcpu.enter().expect("KVM runs"), VcpuExit::Halt);
    assert_eq!(vcpu.state().expect("a state").rflags & RFLAGS_RF, 0);
}

/// Breakpoints at an address are no use to a guest that has its own, and it would not know.
#[test]
fn a_guest_with_breakpoints_of_its_own_is_refused_while_others_are_set() {
    require_kvm!();
    let mut vcpu = PmuVcpu::without_counter(ram_with(&[0x90, 0xf4])).expect("KVM");
    let state = CpuState { dr7: 0x401, ..long_mode() };
    vcpu.set_state(&state).expect("a state that KVM takes");
    vcpu.set_breakpoints(&[CODE + 1]).expect("KVM takes it");
    match vcpu.enter().expect("KVM runs") {
        VcpuExit::Unsupported(reason) => assert!(reason.contains("DR7"), "{reason}"),
        exit => panic!("{exit:?}"),
    }
    vcpu.set_breakpoints(&[]).expect("KVM takes it");
    assert_eq!(vcpu.enter().expect("KVM runs"), VcpuExit::Halt);
}

#[test]
fn a_guest_that_sets_breakpoints_while_others_are_set_is_refused() {
    require_kvm!();
    // mov eax, 0x401; mov dr7, rax; hlt
    let code = [0xb8, 1, 4, 0, 0, 0x0f, 0x23, 0xf8, 0xf4];
    for refused in [true, false] {
        let mut vcpu = PmuVcpu::without_counter(ram_with(&code)).expect("KVM");
        vcpu.set_state(&long_mode()).expect("a state that KVM takes");
        let breakpoints: &[u64] = if refused { &[CODE + 0x100] } else { &[] };
        for _ in 0..2 {
            vcpu.set_breakpoints(breakpoints).expect("KVM takes it");
        }
        match vcpu.enter().expect("KVM runs") {
            VcpuExit::Unsupported(reason) if refused => assert!(reason.contains("DR7"), "{reason}"),
            exit => assert_eq!((exit, refused), (VcpuExit::Halt, false)),
        }
    }
}

#[test]
fn a_guest_that_steps_through_a_repeated_access_is_refused() {
    require_kvm!();
    // rep outsb; hlt
    for elements in [1, 2] {
        let mut vcpu = PmuVcpu::without_counter(ram_with(&[0xf3, 0x6e, 0xf4])).expect("KVM");
        let mut state = CpuState { rflags: 2 | RFLAGS_TF, ..long_mode() };
        (state.gpr[RCX], state.gpr[RSI]) = (elements, CODE);
        vcpu.set_state(&state).expect("a state that KVM takes");
        assert!(matches!(vcpu.enter().expect("KVM runs"), VcpuExit::Access(_)));
        assert!(!vcpu.finish_access(0).expect("it is answered"), "it has not retired");
        match vcpu.enter().expect("KVM runs") {
            VcpuExit::Unsupported(reason) => {
                assert!(reason.contains("REP INS or OUTS"), "{reason}");
            }
            exit => panic!("{elements} elements: {exit:?}"),
        }
    }
}

#[test]
fn a_debug_exception_that_no_breakpoint_raised_is_the_guests() {
    const FIXED: u64 = 0xffff_0ff0;
    for (dr6, hit) in [
        (FIXED | 1, Some(true)),
        (FIXED | 8, Some(true)),
        (FIXED | 1 << 14, Some(false)),
        (FIXED | 1 << 14 | 1, Some(false)),
        // INT1, wherever it stands.
        (FIXED, Some(false)),
        // A host that does not say.
        (0, None),
    ] {
        assert_eq!(hit_of(dr6), hit, "{dr6:#x}");
    }
}

#[test]
fn a_refused_instruction_that_somebody_executed_is_gone_on_behind() {
    require_kvm!();
    // cmpxchg16b [rsi]; hlt: pagetable-based KVM interprets the kernel, and does not know it.
    let code = [0x48, 0x0f, 0xc7, 0x0e, 0xf4];
    let mut vcpu = PmuVcpu::without_counter(ram_with(&code)).expect("KVM");
    let mut before = long_mode();
    before.gpr[RSI] = CODE + 0x200;
    vcpu.set_state(&before).expect("a state that KVM takes");
    vcpu.step_off().expect("KVM takes it");
    let reason = match vcpu.enter().expect("KVM runs") {
        VcpuExit::Unsupported(reason) => reason,
        VcpuExit::Halt => return skipped("this host's KVM executes the instruction"),
        exit => panic!("{exit:?}"),
    };
    assert!(vcpu.has_refused().expect("KVM tells"), "{reason}");
    let before = vcpu.state().expect("a state");
    // It lets an instruction execute in spite of a breakpoint, and was ours.
    assert_eq!(before.rflags & RFLAGS_RF, 0);
    let mut after = CpuState { rip: CODE + 4, ..before.clone() };
    after.gpr[RCX] = 0x55;
    vcpu.go_on(&before, &after).expect("KVM takes it");
    assert_eq!(vcpu.state().expect("a state"), after);
    assert!(!vcpu.has_refused().expect("KVM tells"));
    assert_eq!(vcpu.enter().expect("KVM runs"), VcpuExit::Halt);
    assert_eq!(vcpu.state().expect("a state").gpr[RCX], 0x55);
}

/// What ends a run is no refusal of an instruction.
#[test]
fn a_guest_that_debugs_itself_is_not_assisted() {
    require_kvm!();
    let mut vcpu = PmuVcpu::without_counter(ram_with(&[0x90, 0xf4])).expect("KVM");
    let state = CpuState { dr7: 0x401, ..long_mode() };
    vcpu.set_state(&state).expect("a state that KVM takes");
    vcpu.set_breakpoints(&[CODE + 0x100]).expect("KVM takes it");
    let exit = vcpu.enter().expect("KVM runs");
    assert!(matches!(exit, VcpuExit::Unsupported(_)), "{exit:?}");
    assert!(!vcpu.has_refused().expect("KVM tells"));
}
