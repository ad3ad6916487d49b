//! Why two machines may have parted: a table of causes, each with its test and what to do next.

use iced_x86::{Instruction, InstructionInfoFactory, Mnemonic, OpAccess, Register};
use reprise_cpu::latitude::{approximates, undefined_flags};
use reprise_trace::cpu_state::CpuState;
use serde::Serialize;

use crate::input::{InputDifference, TypedDifference};
use crate::memory::PageDifference;
use crate::replica::{Depth, Look};
use crate::state_rows::flag_names;

/// A likely cause.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Cause {
    /// The row's name.
    pub name: &'static str,
    /// In words.
    pub text: String,
    /// What to do next.
    pub next: &'static str,
}

/// All that the tests look at.
#[derive(Debug)]
pub(crate) struct Evidence<'a> {
    /// What the two are called.
    pub(crate) names: [&'a str; 2],
    /// Header fields that decide what the machine is and that differ.
    pub(crate) machines: &'a [String],
    /// What the real-time clocks were set to when the machines started, in seconds since 1970.
    pub(crate) clocks_set: [u64; 2],
    /// They differ where the comparison begins.
    pub(crate) from_the_start: bool,
    /// They differ in what enters before the instruction.
    pub(crate) entering: bool,
    /// Right before the instruction, before anything enters.
    pub(crate) before: &'a [Look; 2],
    /// With all in that enters there.
    pub(crate) entered: &'a [Look; 2],
    /// Behind it.
    pub(crate) after: &'a [Look; 2],
    /// What each is about to execute; `None` where it cannot be fetched.
    pub(crate) instructions: [Option<Instruction>; 2],
    /// Its bytes are not the same on both sides.
    pub(crate) other_code: bool,
    /// RAM that differs afterwards.
    pub(crate) pages: &'a [PageDifference],
    /// There are more pages than those.
    pub(crate) more_pages: bool,
    /// The first input that differs between the two logs, if their clocks are one.
    pub(crate) input: Option<&'a InputDifference>,
    /// The first byte that was typed otherwise.
    pub(crate) typed: Option<&'a TypedDifference>,
    /// Ticks and virtual time cannot be compared.
    pub(crate) other_clocks: bool,
    /// A replay ended here because it is not what its recording says.
    pub(crate) contradicted: Option<(&'a str, &'a str)>,
    /// What executes the two is not the same.
    pub(crate) other_engines: bool,
}

impl Evidence<'_> {
    fn tick(&self) -> u64 {
        self.before[0].tick
    }

    fn mnemonic(&self) -> Option<Mnemonic> {
        self.instructions[0].map(|instruction| instruction.mnemonic())
    }

    fn cpus(&self) -> [&CpuState; 2] {
        [&self.after[0].cpu, &self.after[1].cpu]
    }

    /// The bits of RFLAGS that differ, if no other part of machine and RAM does.
    fn only_flags(&self) -> Option<u64> {
        let [a, b] = self.cpus();
        let masked = CpuState { rflags: b.rflags, ..a.clone() };
        let only = a.rflags != b.rflags && masked == *b && self.pages.is_empty();
        only.then_some(a.rflags ^ b.rflags)
    }

    /// The instruction's result is a device's answer.
    fn asks_devices(&self) -> bool {
        self.other_clocks && self.port_read().is_some()
    }

    fn port_read(&self) -> Option<u16> {
        let instruction = self.instructions[0]?;
        match instruction.mnemonic() {
            Mnemonic::In if instruction.op1_register() == Register::DX => {
                Some(self.before[0].cpu.gpr[2] as u16)
            }
            Mnemonic::In => Some(u16::from(instruction.immediate8())),
            Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => {
                Some(self.before[0].cpu.gpr[2] as u16)
            }
            _ => None,
        }
    }

    /// Everything that the instruction could depend on is the same on both sides.
    fn same_before(&self) -> bool {
        let [a, b] = self.entered;
        // What neither clocks nor devices say of each other may be the reason.
        let same = a == b || self.other_clocks && a.is_like(b, Depth::Visible);
        same && !self.other_code && !self.from_the_start && !self.asks_devices()
    }
}

type Test = fn(&Evidence<'_>) -> Option<String>;

/// A row a cause, the most telling first: its name, the test that gives it in words, and what to do next.
const CAUSES: [(&str, Test, &str); 15] = [
    ("other-machine", other_machine, "compare two recordings of one guest on one machine"),
    (
        "clock-set",
        clock_set,
        "no fault: two recordings begin at two times of day; to find one, compare a recording with its own \
         replay (`reprise replay --bisect`)",
    ),
    (
        "other-start",
        other_start,
        "remove the file of checkpoints beside the recording, and compare again",
    ),
    (
        "skid",
        skid,
        "if they are two runs, no fault; if both are to be one run, `reprise replay --bisect` tells which of \
         them is not what its machine did",
    ),
    (
        "input",
        input,
        "no fault: the guests were given different things; `reprise replay --show-console --until TICK` \
         shows what each had printed by then",
    ),
    (
        "contradiction",
        contradiction,
        "take another copy of that recording; `reprise replay --bisect` narrows down where it is not what \
         its machine did",
    ),
    (
        "interrupt-moment",
        interrupt_moment,
        "look where devices or virtual time differ first; `reprise replay --bisect` tells whether a \
         recording is not what its machine did",
    ),
    (
        "time-stamp",
        time_stamp,
        "no fault between two runs, whose clocks are the host's; in one run, `reprise info` says which time \
         stamps were OPEN when it was recorded: those are in no log",
    ),
    (
        "accessed-bit",
        accessed_bit,
        "lawful on hardware; a guest that does not read its own page tables cannot tell",
    ),
    ("undefined-flag", undefined_flag, "lawful: replay on a processor of the kind that recorded"),
    ("approximation", approximation, "lawful: replay on a processor of the kind that recorded"),
    (
        "host-dependent",
        host_dependent,
        "`reprise info` says which of these were OPEN when it was recorded; keep the guest from asking",
    ),
    (
        "other-code",
        other_code,
        "the difference is older: remove the files of checkpoints, and compare again from the start",
    ),
    (
        "stale-translation",
        stale_translation,
        "lawful on hardware: look for the guest's change of a page table that no INVLPG and no write of CR3 \
         followed",
    ),
    (
        "engine",
        engine,
        "keep both recordings, and report this; `--no-translate` avoids translated code",
    ),
];

/// The likely causes, the most telling first.
pub(crate) fn causes(evidence: &Evidence<'_>) -> Vec<Cause> {
    let rows = CAUSES.iter();
    let found =
        rows.filter_map(|(name, test, next)| test(evidence).map(|text| Cause { name, text, next }));
    found.collect()
}

fn other_machine(evidence: &Evidence<'_>) -> Option<String> {
    (!evidence.machines.is_empty())
        .then(|| format!("not the same machine or guest: {} differ", evidence.machines.join(", ")))
}

/// Index and data port of the real-time clock.
const RTC_DATA: u16 = 0x71;

fn clock_set(evidence: &Evidence<'_>) -> Option<String> {
    let [a, b] = evidence.clocks_set;
    let read = evidence.port_read() == Some(RTC_DATA);
    let start = evidence.from_the_start && evidence.before[0].cpu == evidence.before[1].cpu;
    (a != b && (read || start)).then(|| {
        let verb = if start { "was set" } else { "is read, which was set" };
        format!(
            "the real-time clock {verb} to {a} and {b} seconds since 1970 when the machines started, as \
             the host's clock was"
        )
    })
}

fn other_start(evidence: &Evidence<'_>) -> Option<String> {
    (evidence.from_the_start && evidence.machines.is_empty() && clock_set(evidence).is_none()).then(
        || {
            "they differ where the comparison begins: a checkpoint was altered, or was not made by \
         the run that it belongs to"
                .to_owned()
        },
    )
}

/// Ports of the serial port.
const SERIAL: std::ops::RangeInclusive<u16> = 0x3f8..=0x3ff;
/// Ports of PIT, port B and RTC, which tell time.
const CLOCKS: [u16; 7] = [0x40, 0x41, 0x42, 0x43, 0x61, 0x70, 0x71];

fn input(evidence: &Evidence<'_>) -> Option<String> {
    let reads = evidence.port_read().is_some_and(|port| SERIAL.contains(&port));
    let same_devices = evidence.entered[0].devices == evidence.entered[1].devices;
    if reads && !same_devices {
        return Some(match (evidence.typed, evidence.input) {
            (Some(typed), _) => format!("the guest reads what was typed: {typed}"),
            // What it reads follows from what came when.
            (None, Some(input)) => format!("the guest reads what was typed: {input}"),
            (None, None) => {
                "the guest asks the serial port, to which the same was typed at other moments"
                    .to_owned()
            }
        });
    }
    let input =
        evidence.input.filter(|input| input.is_of_input() && input.displaced().is_none())?;
    if evidence.tick() == input.tick() && evidence.entering {
        return Some(format!("the recordings hold different input here: {input}"));
    }
    let before = evidence.tick() < input.tick();
    (!before && (evidence.entering || !same_devices))
        .then(|| format!("it follows from other input: {input}"))
}

fn skid(evidence: &Evidence<'_>) -> Option<String> {
    let input = evidence.input?;
    let (one, other) = input.displaced()?;
    let same_devices = evidence.entered[0].devices == evidence.entered[1].devices;
    if evidence.tick() < input.tick() || !evidence.entering && same_devices {
        return None;
    }
    let apart = one.moment.tick.abs_diff(other.moment.tick);
    let [first, second] = evidence.names;
    Some(format!(
        "the same enters at two places, {apart} ticks apart: {one} on the {first} side, {other} on the \
         {second} one; a counter's skid was passed over, or these are two runs"
    ))
}

fn contradiction(evidence: &Evidence<'_>) -> Option<String> {
    let (name, text) = evidence.contradicted?;
    Some(format!(
        "the {name} recording contradicts itself, so it was altered or made by a faulty engine: {text}"
    ))
}

fn interrupt_moment(evidence: &Evidence<'_>) -> Option<String> {
    let taken = [0, 1].map(|side| {
        let count = |look: &Look| look.surroundings.interrupts;
        count(&evidence.entered[side]) - count(&evidence.before[side])
    });
    let [here, other] = match taken {
        [a, b] if a > b => evidence.names,
        [a, b] if a < b => [evidence.names[1], evidence.names[0]],
        _ => return None,
    };
    Some(format!(
        "an interrupt is taken before this instruction on the {here} side and not on the {other} \
         one: virtual time or device state differs, or a counter's skid was passed over"
    ))
}

fn time_stamp(evidence: &Evidence<'_>) -> Option<String> {
    if clock_set(evidence).is_some() {
        return None;
    }
    let reads = match evidence.mnemonic()? {
        Mnemonic::Rdtsc | Mnemonic::Rdtscp => "the time-stamp counter".to_owned(),
        _ => {
            let port = evidence.port_read().filter(|port| CLOCKS.contains(port))?;
            format!("a clock through port {port:#x}")
        }
    };
    let [a, b] = evidence.entered;
    let [one, other] = evidence.names;
    let times = match (a.surroundings.virtual_ns, b.surroundings.virtual_ns) {
        (a, b) if a == b => format!("virtual time is the same, {a} ns, so the value was altered"),
        (a, b) => format!("virtual time is {a} ns on the {one} side and {b} ns on the {other} one"),
    };
    Some(format!("the guest reads {reads}, and {times}"))
}

fn accessed_bit(evidence: &Evidence<'_>) -> Option<String> {
    let tables = || evidence.pages.iter().map(|page| page.table.as_ref());
    let walked = tables().all(|table| table.is_some_and(|table| table.only_accessed_or_dirty));
    let first = tables().next()??;
    (walked && !evidence.more_pages).then(|| {
        format!(
            "{} of the page-table entry for {:#x} (level {}) is set on one side only, and no other \
             byte of RAM differs: a page walk that one side made and the other did not, or hardware \
             that set the bit early",
            first.bits(),
            first.linear,
            first.level
        )
    })
}

fn undefined_flag(evidence: &Evidence<'_>) -> Option<String> {
    let differing = evidence.only_flags()?;
    let instruction = evidence.instructions[0]?;
    let undefined = undefined_flags(&instruction);
    (differing & !undefined == 0).then(|| {
        format!(
            "only {} differ, which {:?} leaves undefined: processors differ in them",
            flag_names(differing),
            instruction.mnemonic()
        )
    })
}

fn approximation(evidence: &Evidence<'_>) -> Option<String> {
    let mnemonic = evidence.mnemonic().filter(|mnemonic| approximates(*mnemonic))?;
    let [a, b] = evidence.cpus();
    (a.gpr == b.gpr && a.fpu != b.fpu).then(|| {
        format!(
            "{mnemonic:?} gives an approximation, in which processors of different vendors differ"
        )
    })
}

/// Instructions that ask the processor itself.
const ASKING: [Mnemonic; 7] = [
    Mnemonic::Cpuid,
    Mnemonic::Rdrand,
    Mnemonic::Rdseed,
    Mnemonic::Rdpmc,
    Mnemonic::Rdmsr,
    Mnemonic::Xgetbv,
    Mnemonic::Rdpid,
];

fn host_dependent(evidence: &Evidence<'_>) -> Option<String> {
    let mnemonic = evidence.mnemonic().filter(|mnemonic| ASKING.contains(mnemonic))?;
    Some(format!(
        "{mnemonic:?} asks the processor itself, whose answer is no part of a recording where \
         nothing traps it"
    ))
}

fn other_code(evidence: &Evidence<'_>) -> Option<String> {
    (evidence.other_code && !evidence.entering).then(|| {
        "they execute different instructions here: RIP or the code in RAM differs already"
            .to_owned()
    })
}

fn accesses_memory(instruction: &Instruction) -> bool {
    let mut factory = InstructionInfoFactory::new();
    let memory = factory.info(instruction).used_memory();
    memory.iter().any(|used| !matches!(used.access(), OpAccess::None | OpAccess::NoMemAccess))
}

fn stale_translation(evidence: &Evidence<'_>) -> Option<String> {
    let [a, b] = evidence.entered;
    let other_tlb = a.hidden.is_some() && b.hidden.is_some() && a.hidden != b.hidden;
    let [one, other] = evidence.cpus();
    let one_faults = one.cr2 != other.cr2 && one.rip != other.rip;
    let accesses = evidence.instructions[0].as_ref().is_some_and(accesses_memory);
    let what = match (one_faults, other_tlb) {
        (true, _) => "one side takes a page fault where the other does not",
        (false, true) if accesses && !evidence.other_code => {
            "the TLBs do not hold the same translations, and the instruction accesses memory"
        }
        _ => return None,
    };
    Some(format!(
        "{what}: the guest changed a page table without a flush, and one side still used the old \
         translation"
    ))
}

fn engine(evidence: &Evidence<'_>) -> Option<String> {
    if !evidence.same_before() || evidence.entering || evidence.contradicted.is_some() {
        return None;
    }
    let others = [time_stamp, undefined_flag, approximation, host_dependent];
    if others.iter().any(|test| test(evidence).is_some()) {
        return None;
    }
    let what = match evidence.other_engines {
        true => "one of the two engines executes it wrongly",
        false => "the engine did not do the same twice",
    };
    Some(format!(
        "the same instruction on the same machine gave two results: {what}; keep both recordings \
         and report this"
    ))
}

#[cfg(test)]
#[path = "cause_tests.rs"]
mod tests;
