//! Tiny guests that find out what this host's KVM does, as against what its interface promises.

use std::collections::BTreeSet;
use std::sync::OnceLock;
use std::time::Duration;

use kvm_bindings::{KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP};
use reprise_devices::cpu_model::{LEAVES, cpuid};
use reprise_machine::engine::Engine;
use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::{CpuState, RAX, RBX, RCX, RDX};

use crate::counter_refusal::CounterRefusal;
use crate::counters::{Counted, Counter};
use crate::error::KvmError;
use crate::report::Finding;
use crate::user_oracle::{
    CODE_ADDRESS, RAM_MIB, UserInput, build_image, handler_address, into_kernel_state,
};
use crate::user_step::set_interrupt_table_limit;
use crate::vcpu::RawExit;
use crate::watchdog::Watchdog;
use crate::{KvmClock, KvmEngine};
use reprise_machine::paging::write_ram;
use reprise_trace::register_bits::RFLAGS_TF;

/// A guest that runs this long has run away.
const TIME_LIMIT: Duration = Duration::from_millis(50);

/// A guest that is interrupted is begun again so often.
const ATTEMPTS: u32 = 4;

const NOP: u8 = 0x90;
const HLT: u8 = 0xf4;
const INT3: u8 = 0xcc;
const UD2: [u8; 2] = [0x0f, 0x0b];
const PUSHF: u8 = 0x9c;

/// The guest's privilege.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    /// CPL0.
    Kernel,
    /// CPL3.
    User,
}

/// How a guest came back, and where it stood then.
struct Stop {
    exit: RawExit,
    rip: u64,
}

/// A guest for one question after the other.
pub(crate) struct SelfTest {
    engine: KvmEngine,
    watchdog: Watchdog,
}

impl SelfTest {
    pub(crate) fn new() -> Result<Self, KvmError> {
        let ram = GuestRam::new(RAM_MIB).map_err(|error| KvmError::Unusable {
            path: "guest RAM".into(),
            reason: error.to_string(),
        })?;
        let engine = KvmEngine::untested(ram, KvmClock::Sync)?;
        let watchdog = Watchdog::start(engine.kicker(), TIME_LIMIT);
        Ok(Self { engine, watchdog })
    }

    /// Puts the guest at the start of `code`; what follows the code is INT3, and what handles an
    /// exception NOP and HLT.
    fn start(&mut self, level: Level, code: &[u8]) -> Result<(), KvmError> {
        let input = UserInput { code: code.to_vec(), ..UserInput::default() };
        let mut state = build_image(&self.engine.ram, &input).expect("the code fits its page");
        for vector in 0..=255 {
            write_ram(&self.engine.ram, handler_address(vector), &[NOP, HLT]);
        }
        if level == Level::Kernel {
            into_kernel_state(&mut state);
        }
        self.engine.restart()?;
        self.engine.vcpu.set_debug(0, [0; 8])?;
        crate::state::write(&self.engine.vcpu.fd, &state)
    }

    fn run(&mut self) -> Result<Stop, KvmError> {
        self.watchdog.begin();
        let exit = self.engine.run_watched();
        self.watchdog.end();
        Ok(Stop { exit: exit?, rip: self.state()?.rip })
    }

    fn state(&self) -> Result<CpuState, KvmError> {
        crate::state::read(&self.engine.vcpu.fd)
    }

    /// Whether single-step comes back after each instruction.
    pub(crate) fn single_step(&mut self, level: Level) -> Result<Finding, KvmError> {
        self.start(level, &[NOP, NOP, NOP])?;
        self.engine.vcpu.single_step()?;
        for steps in 1..=3 {
            let stop = self.run()?;
            if !stop.is_debug_at(CODE_ADDRESS + steps) {
                return Ok(stop.explain("a step", level));
            }
        }
        Ok(Finding::yes("each step comes back after one instruction"))
    }

    /// Whether user code can be stepped into an empty interrupt descriptor table, and KVM then tells what
    /// was raised.
    pub(crate) fn step_into_empty_table(&mut self) -> Result<Finding, KvmError> {
        const DEBUG: u8 = 1;
        const UNDEFINED: u8 = 6;
        self.start(Level::User, &[&[NOP, NOP][..], &UD2].concat())?;
        set_interrupt_table_limit(&self.engine.vcpu.fd, 0)?;
        self.engine.vcpu.single_step()?;
        for (vector, offset) in [(DEBUG, 1), (DEBUG, 2), (UNDEFINED, 2)] {
            let stop = self.run()?;
            let raised = crate::state::read_events(&self.engine.vcpu.fd)?.exception.nr;
            let expected = (RawExit::Shutdown, CODE_ADDRESS + offset, vector);
            if (stop.exit, stop.rip, raised) != expected {
                return Ok(stop.explain("a step", Level::User));
            }
        }
        Ok(Finding::yes("each step of user code comes back as what it raises"))
    }

    /// Whether a step over a fault comes back after the handler's first instruction.
    pub(crate) fn step_into_handler(&mut self) -> Result<Finding, KvmError> {
        self.start(Level::Kernel, &UD2)?;
        self.engine.vcpu.single_step()?;
        let stop = self.run()?;
        Ok(match stop.is_debug_at(handler_address(6) + 1) {
            true => Finding::yes("a fault is stepped into its handler"),
            false => Finding::no(
                "handlers of faults run unstepped, so that their instructions cannot be counted",
            ),
        })
    }

    /// Whether the flags that the guest saves show the TF that steps it.
    pub(crate) fn step_hides_trap_flag(&mut self) -> Result<Finding, KvmError> {
        self.start(Level::Kernel, &[PUSHF, 0x58])?;
        self.engine.vcpu.single_step()?;
        self.run()?;
        let stop = self.run()?;
        let pushed = self.state()?.gpr[RAX];
        if !stop.is_debug_at(CODE_ADDRESS + 2) {
            return Ok(stop.explain("a step of PUSHF and POP", Level::Kernel));
        }
        Ok(match pushed & RFLAGS_TF == 0 {
            true => Finding::yes("the guest does not see that it is stepped"),
            false => {
                Finding::no("the guest sees TF in the flags that it saves while it is stepped")
            }
        })
    }

    /// Whether a breakpoint in a debug register comes back.
    pub(crate) fn hardware_breakpoint(&mut self, level: Level) -> Result<Finding, KvmError> {
        self.start(level, &[NOP, NOP, NOP])?;
        let target = CODE_ADDRESS + 2;
        // DR7: breakpoint 0 enabled (G0, L0), on execution; bit 10 always reads one.
        let debugreg = [target, 0, 0, 0, 0, 0, 0, 0x403];
        self.engine.vcpu.set_debug(KVM_GUESTDBG_USE_HW_BP, debugreg)?;
        let stop = self.run()?;
        Ok(match stop.is_debug_at(target) {
            true => Finding::yes("a breakpoint in a debug register comes back"),
            false => stop.explain("a breakpoint in a debug register", level),
        })
    }

    /// Whether INT3 comes back instead of reaching the guest.
    pub(crate) fn software_breakpoint(&mut self, level: Level) -> Result<Finding, KvmError> {
        self.start(level, &[NOP, INT3])?;
        self.engine.vcpu.set_debug(KVM_GUESTDBG_USE_SW_BP, [0; 8])?;
        let stop = self.run()?;
        Ok(match stop.is_debug_at(CODE_ADDRESS + 1) {
            true => Finding::yes("INT3 comes back"),
            false if stop.rip.wrapping_sub(handler_address(3)) <= 2 => {
                Finding::no(format!("INT3 at {} reaches the guest as exception 3", level.name()))
            }
            false => stop.explain("INT3", level),
        })
    }

    /// The exception that `code` comes to, with these bits of CR4 set besides: 3 if it just executes. Or
    /// what else happens; that it was interrupted, if it is so again and again.
    pub(crate) fn fault_of(
        &mut self,
        level: Level,
        code: &[u8],
        control: u64,
    ) -> Result<Result<u8, RawExit>, KvmError> {
        for _ in 1..ATTEMPTS {
            let found = self.fault_of_once(level, code, control)?;
            if found != Err(RawExit::Interrupted) {
                return Ok(found);
            }
        }
        self.fault_of_once(level, code, control)
    }

    fn fault_of_once(
        &mut self,
        level: Level,
        code: &[u8],
        control: u64,
    ) -> Result<Result<u8, RawExit>, KvmError> {
        self.start(level, code)?;
        let state = self.state()?;
        let state = CpuState { cr4: state.cr4 | control, ..state };
        crate::state::write(&self.engine.vcpu.fd, &state)?;
        let Stop { exit, rip } = self.run()?;
        let in_handler =
            |vector: &u8| (1..=2).contains(&rip.wrapping_sub(handler_address(*vector)));
        Ok((0..=31).find(in_handler).ok_or(exit))
    }

    /// Whether the guest sees the CPU model that it is given: all of it, and what lies beyond.
    pub(crate) fn shows_cpu_model(&mut self, level: Level) -> Result<Finding, KvmError> {
        let mut others: Vec<String> = Vec::new();
        for (leaf, subleaf) in asked_leaves() {
            if self.identity(level, leaf, subleaf)? == cpuid(leaf, subleaf) {
                continue;
            }
            let name = format!("{leaf:#x}");
            if others.last() != Some(&name) {
                others.push(name);
            }
        }
        Ok(match others.is_empty() {
            true => Finding::yes("CPUID shows the CPU model"),
            false => Finding::no(format!(
                "CPUID at {} shows another CPU than the CPU model, in leaf {}",
                level.name(),
                others.join(", ")
            )),
        })
    }

    /// What CPUID answers there: EAX, EBX, ECX, EDX.
    fn identity(&mut self, level: Level, leaf: u32, subleaf: u32) -> Result<[u32; 4], KvmError> {
        // mov eax, leaf; mov ecx, subleaf; cpuid; hlt
        let (leaf, subleaf) = (leaf.to_le_bytes(), subleaf.to_le_bytes());
        let code = [&[0xb8][..], &leaf, &[0xb9], &subleaf, &[0x0f, 0xa2, HLT]].concat();
        self.start(level, &code)?;
        self.run_to_handler(level)?;
        let gpr = self.state()?.gpr;
        Ok([RAX, RBX, RCX, RDX].map(|index| gpr[index] as u32))
    }

    /// Whether a counter counts this guest, and it alone.
    pub(crate) fn counter(&mut self, counted: Counted) -> Result<Finding, KvmError> {
        const ROUNDS: u16 = 10_000;
        let mut counter = match Counter::open(counted) {
            Ok(counter) => counter,
            Err(errno) => return Ok(Finding::refused(&CounterRefusal::of_this_host(errno))),
        };
        // mov ecx, ROUNDS; dec ecx; jnz -4
        let [low, high] = ROUNDS.to_le_bytes();
        self.start(Level::User, &[0xb9, low, high, 0, 0, 0xff, 0xc9, 0x75, 0xfc])?;
        self.run_to_handler(Level::User)?;
        let per_round = if counted == Counted::Instructions { 2 } else { 1 };
        let least = u64::from(ROUNDS) * per_round;
        Ok(match counter.reading().map(|reading| reading.count) {
            None => Finding::no("the counter was opened, but the hardware had none free"),
            Some(count) if (least..least + least / 10).contains(&count) => {
                Finding::yes(format!("counted {count} where the guest made {least} and a few"))
            }
            Some(count) => {
                Finding::no(format!("counted {count} where the guest made {least} and a few"))
            }
        })
    }

    /// Runs until HLT: the code's own, or a handler's.
    fn run_to_handler(&mut self, level: Level) -> Result<(), KvmError> {
        let stop = self.run()?;
        if stop.exit == RawExit::Halt {
            return Ok(());
        }
        Err(KvmError::Unusable {
            path: "the self-test's guest".into(),
            reason: stop.explain("the end of the code", level).reason,
        })
    }
}

/// Leaves that the CPU model has not, or has no more of, and that tell a host's CPUs apart or change as it
/// runs: caches, MONITOR, power, counters, topology, XSAVE, trace, frequencies, and what hypervisors
/// and AMD put there.
const BEYOND_MODEL: [(u32, u32); 18] = [
    (3, 0),
    (4, 4),
    (5, 0),
    (6, 0),
    (7, 1),
    (0xa, 0),
    (0xb, 0),
    (0xb, 1),
    (0xd, 0),
    (0xd, 1),
    (0x14, 0),
    (0x15, 0),
    (0x16, 0),
    (0x1f, 0),
    (0x4000_0001, 0),
    (0x8000_0005, 0),
    (0x8000_000a, 0),
    (0x8000_001e, 0),
];

/// What CPUID is asked for, ordered: every leaf and subleaf of the model, and some that it has not.
fn asked_leaves() -> BTreeSet<(u32, u32)> {
    let of_model = LEAVES.iter().map(|leaf| (leaf.leaf, leaf.subleaf.unwrap_or(0)));
    of_model.chain(BEYOND_MODEL).collect()
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Level::Kernel => "CPL0",
            Level::User => "CPL3",
        }
    }
}

impl Stop {
    fn is_debug_at(&self, rip: u64) -> bool {
        matches!(self.exit, RawExit::Debug { .. }) && self.rip == rip
    }

    /// Why something did not come back.
    fn explain(&self, what: &str, level: Level) -> Finding {
        /// What ends the code, which is INT3.
        const END: u8 = 3;
        let level = level.name();
        let in_handler =
            |vector: &u8| (1..=2).contains(&self.rip.wrapping_sub(handler_address(*vector)));
        Finding::no(match (self.exit, (0..=31u8).find(in_handler)) {
            (_, Some(END)) => format!("{what} at {level} does not come back, the guest runs on"),
            (_, Some(vector)) => {
                format!("{what} at {level} reaches the guest as exception {vector}")
            }
            (RawExit::Interrupted, None) => format!("{what} at {level} never comes back"),
            (exit, None) => format!("{what} at {level} does not work: {exit}"),
        })
    }
}

/// Whether the clock `step` counts exactly on this host; asked of the hardware once.
pub(crate) fn step_clock() -> Finding {
    static ANSWER: OnceLock<Finding> = OnceLock::new();
    ANSWER
        .get_or_init(|| ask_step_clock().unwrap_or_else(|error| Finding::no(error.to_string())))
        .clone()
}

fn ask_step_clock() -> Result<Finding, KvmError> {
    let mut test = SelfTest::new()?;
    type Question = fn(&mut SelfTest) -> Result<Finding, KvmError>;
    let questions: [Question; 3] = [
        |test| test.single_step(Level::Kernel),
        SelfTest::step_into_handler,
        SelfTest::step_hides_trap_flag,
    ];
    for question in questions {
        let finding = question(&mut test)?;
        if !finding.available {
            return Ok(finding);
        }
    }
    Ok(Finding::yes(match steps_user_code() {
        true => "every instruction of kernel and user code can be stepped",
        false => "every instruction of kernel code (CPL0) can be stepped, user code (CPL3) cannot",
    }))
}

/// Whether the clock `step` counts user code exactly too; asked of the hardware once.
pub(crate) fn steps_user_code() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        SelfTest::new()
            .and_then(|mut test| test.step_into_empty_table())
            .is_ok_and(|finding| finding.available)
    })
}
