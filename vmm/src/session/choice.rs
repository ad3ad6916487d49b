//! Which engine executes the guest, and how it counts ticks.

use std::cell::OnceCell;

use clap::ValueEnum;
use reprise_kvm::{Finding, KvmClock, KvmEngine, SelfTesting};
use reprise_machine::clock::TimeSource;
use reprise_machine::digest::AccessedBits;
use reprise_machine::ram::{GuestRam, MIN_RAM_MIB};
use reprise_trace::event::HandOver;
use reprise_trace::header::Header;
use reprise_trace::moment::TickKind;

use super::automatic::Verdict;
use super::guest::Guest;
use super::hardware::{BranchHardware, HostHardware};
use super::pmu_trap::PmuTrap;

/// What the user asked for with `--engine`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum EngineArg {
    /// The fastest engine of this host that replays every guest exactly; for a replay, the engine that recorded.
    #[default]
    Auto,
    /// The host's KVM.
    Kvm,
    /// The software CPU.
    Soft,
}

impl EngineArg {
    /// What is meant beside this clock: who names one of KVM's means KVM.
    #[must_use]
    pub fn beside(self, clock: ClockArg) -> Self {
        match (self, clock) {
            (Self::Auto, ClockArg::Pmu | ClockArg::Step | ClockArg::Sync) => Self::Kvm,
            _ => self,
        }
    }
}

/// What the user asked for with `--clock`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ClockArg {
    /// The engine's own.
    #[default]
    Auto,
    /// Retired conditional branches (kvm).
    Pmu,
    /// Every instruction stepped (kvm).
    Step,
    /// Exits (kvm).
    Sync,
}

/// An engine with its clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineKind {
    /// The software CPU, which counts instructions.
    Soft,
    /// KVM, counting what its own interface tells.
    Kvm(KvmClock),
    /// KVM with a performance counter of branches.
    Pmu,
}

/// Guest time of an instruction on the software CPU: 1 GHz at one instruction a cycle.
const SOFT_NS_PER_INSTRUCTION: u64 = 1;
/// Guest time of a stepped instruction: a step takes some 10 µs, so a guest that waits for its
/// timer is not starved by the interrupts of a timer that runs faster than it.
const STEP_NS_PER_INSTRUCTION: u64 = 100;

/// Why an engine cannot be had as asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChoiceError {
    /// Clock of one engine, the other asked for.
    #[error("--engine soft counts instructions: leave --clock out")]
    SoftHasOneClock,
    /// The host has no counter that would do.
    #[error("the clock pmu cannot be used on this host: {reason}; {remedy}use --engine soft")]
    NoPmuClock {
        /// What is lacking.
        reason: String,
        /// What to do about it, and "or", if anything is known.
        remedy: String,
    },
    /// The host's KVM cannot be used; the reason says what to do.
    #[error("{0}")]
    NoKvm(String),
    /// The ticks of a recording are not counted by the clock asked for, nor can be.
    #[error(
        "this recording was made with clock {clock}, and replays with that, or on the software CPU: leave \
         --clock out"
    )]
    OtherClock {
        /// The recording's.
        clock: String,
    },
    /// A clock for a recording that has several.
    #[error(
        "this recording has stretches of several clocks, and each replays by its own: leave --clock out"
    )]
    SeveralClocks,
    /// A file for what is not made.
    #[error(
        "--rewritten keeps what --clock pmu makes of a recording that counts instructions, and nothing is \
         made here: leave it out"
    )]
    NothingRewritten,
    /// A recording whose ticks no engine of this version counts.
    #[error(
        "this recording was made by engine {engine} with clock {clock}, \
         which this version cannot replay: use the version that recorded it"
    )]
    UnknownEngine {
        /// As the header has it.
        engine: String,
        /// As the header has it.
        clock: String,
    },
}

/// A choice, and the line that says why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// What runs.
    pub kind: EngineKind,
    /// One line for a person, where the program chose.
    pub reason: Option<String>,
    /// Whether the counter of the clock `pmu` is still to be tried out.
    self_testing: SelfTesting,
    /// What becomes of the guest's RDTSC with the clock `pmu`, if the choice hung on it: to unpack and search a
    /// kernel takes a while.
    trap: Option<PmuTrap>,
}

impl Choice {
    /// As asked for, in so many words; the clock `pmu` tries its counter out.
    pub fn of(kind: EngineKind) -> Self {
        Self { kind, reason: None, self_testing: SelfTesting::Run, trap: None }
    }

    fn because(kind: EngineKind, reason: impl Into<String>) -> Self {
        Self { reason: Some(reason.into()), ..Self::of(kind) }
    }

    /// The clock `pmu`, whose counter has been tried out.
    fn on_pmu(reason: String) -> Self {
        Self { self_testing: SelfTesting::Done, ..Self::because(EngineKind::Pmu, reason) }
    }

    /// What becomes of the guest's RDTSC with the clock `pmu`, if that is known already.
    pub fn trap(&self) -> Option<&PmuTrap> {
        self.trap.as_ref()
    }

    /// What the clock `pmu` runs on.
    pub fn hardware(&self) -> HostHardware {
        HostHardware::new(self.self_testing)
    }

    /// The same for a run that goes on with `planned` engines, which are tried first: nobody is to learn
    /// amid a run that the host lacks one.
    ///
    /// # Errors
    /// It does.
    pub fn going_on_with(
        self,
        planned: impl IntoIterator<Item = EngineKind>,
    ) -> Result<Self, ChoiceError> {
        let hardware = self.hardware();
        self.going_on_if(planned, try_kvm, || hardware.try_anew())
    }

    fn going_on_if(
        self,
        planned: impl IntoIterator<Item = EngineKind>,
        kvm: impl Fn(KvmClock) -> Result<(), ChoiceError>,
        pmu: impl FnOnce() -> Finding,
    ) -> Result<Self, ChoiceError> {
        let mut counts = false;
        for kind in planned {
            match kind {
                EngineKind::Soft => {}
                EngineKind::Kvm(clock) => kvm(clock)?,
                EngineKind::Pmu => counts = true,
            }
        }
        if !counts || self.self_testing == SelfTesting::Done {
            return Ok(self);
        }
        let finding = pmu();
        if !finding.available {
            return Err(no_pmu_clock(finding));
        }
        Ok(Self { self_testing: SelfTesting::Done, ..self })
    }
}

impl EngineKind {
    /// Every engine with every clock, the fastest exact one first.
    pub const ALL: [Self; 4] =
        [Self::Pmu, Self::Soft, Self::Kvm(KvmClock::Sync), Self::Kvm(KvmClock::Step)];

    /// `soft` or `kvm`.
    pub fn engine_name(self) -> &'static str {
        match self {
            Self::Soft => "soft",
            Self::Kvm(_) | Self::Pmu => "kvm",
        }
    }

    /// The clock's name.
    pub fn clock_name(self) -> &'static str {
        match self {
            Self::Soft => "instructions",
            Self::Kvm(KvmClock::Step) => "step",
            Self::Kvm(KvmClock::Sync) => "sync",
            Self::Pmu => "pmu",
        }
    }

    /// Whether a log that says this means this engine with this clock.
    fn is(self, on: &HandOver) -> bool {
        let HandOver { engine, clock, tick_kind, .. } = on;
        (self.engine_name(), self.clock_name(), self.tick_kind()) == (engine, clock, *tick_kind)
    }

    /// What a tick is.
    pub fn tick_kind(self) -> TickKind {
        match self {
            Self::Soft | Self::Kvm(KvmClock::Step) => TickKind::Instruction,
            Self::Kvm(KvmClock::Sync) => TickKind::Exit,
            Self::Pmu => TickKind::ConditionalBranch,
        }
    }

    /// Whether the final digest of its recordings counts accessed bits.
    pub fn accessed_bits(self) -> AccessedBits {
        match self {
            Self::Soft => AccessedBits::Exact,
            // Hardware may set them early.
            Self::Kvm(_) | Self::Pmu => AccessedBits::SetAside,
        }
    }

    /// How virtual time comes about in a new run.
    pub fn time_source(self) -> TimeSource {
        match self {
            Self::Soft => TimeSource::Ticks { ns_per_tick: SOFT_NS_PER_INSTRUCTION },
            Self::Kvm(KvmClock::Step) => TimeSource::Ticks { ns_per_tick: STEP_NS_PER_INSTRUCTION },
            Self::Kvm(KvmClock::Sync) | Self::Pmu => TimeSource::Host,
        }
    }
}

/// What is to run, as far as it bears on the engine.
#[derive(Clone, Copy, Debug)]
pub enum Running<'a> {
    /// This guest, on one engine.
    Guest(&'a Guest),
    /// A guest on one engine after the other.
    OnSeveralEngines,
    /// A guest whose kernel's text is known and stays where it is.
    AnyKnownText,
}

impl Running<'_> {
    /// What becomes of its RDTSC with the clock `pmu`.
    fn trap(self, hardware: &impl BranchHardware) -> PmuTrap {
        let host = hardware.time_stamp_trap();
        match self {
            Self::Guest(guest) => PmuTrap::of_kernel(&host, &guest.kernel.bytes, &guest.cmdline),
            Self::OnSeveralEngines => PmuTrap::of_relay(),
            Self::AnyKnownText if host.available => PmuTrap::On(Box::default()),
            Self::AnyKnownText => PmuTrap::Off(host.reason),
        }
    }
}

/// The engine of a new run.
///
/// # Errors
/// An engine and a clock that do not go together, or a clock that the host does not have.
pub fn for_new_run(
    engine: EngineArg,
    clock: ClockArg,
    running: Running<'_>,
) -> Result<Choice, ChoiceError> {
    for_new_run_on(&HostHardware::default(), engine, clock, running)
}

/// As [`for_new_run`]; what the clock `pmu` would run on is this hardware.
///
/// # Errors
/// As [`for_new_run`].
pub fn for_new_run_on(
    hardware: &impl BranchHardware,
    engine: EngineArg,
    clock: ClockArg,
    running: Running<'_>,
) -> Result<Choice, ChoiceError> {
    let trap = OnceCell::new();
    let untrapped = || trap.get_or_init(|| running.trap(hardware)).reason_against().map(Into::into);
    let choice = choose(engine, clock, || hardware.verdict(), || hardware.try_anew(), untrapped)?;
    let of_guest = matches!(running, Running::Guest(_));
    Ok(Choice { trap: trap.into_inner().filter(|_| of_guest), ..choice })
}

/// Chooses, given what is known of the clock `pmu` or else found out, what trying it anew gives, and why
/// RDTSC would not be trapped with it.
fn choose(
    engine: EngineArg,
    clock: ClockArg,
    decide: impl FnOnce() -> Verdict,
    try_anew: impl FnOnce() -> Finding,
    untrapped: impl FnOnce() -> Option<String>,
) -> Result<Choice, ChoiceError> {
    match (engine, clock) {
        (EngineArg::Soft, ClockArg::Auto) => Ok(Choice::of(EngineKind::Soft)),
        (EngineArg::Soft, _) => Err(ChoiceError::SoftHasOneClock),
        (_, ClockArg::Step) => Ok(Choice::of(EngineKind::Kvm(KvmClock::Step))),
        (_, ClockArg::Sync) => Ok(Choice::of(EngineKind::Kvm(KvmClock::Sync))),
        (_, ClockArg::Pmu) => {
            let finding = try_anew();
            if !finding.available {
                return Err(no_pmu_clock(finding));
            }
            Ok(Choice { self_testing: SelfTesting::Done, ..Choice::of(EngineKind::Pmu) })
        }
        (EngineArg::Kvm | EngineArg::Auto, ClockArg::Auto) => {
            Ok(automatically(engine, &decide(), untrapped))
        }
    }
}

/// On `kvm` the clock `pmu` if the host has it. Who did not ask for `kvm` gets it only if RDTSC of this guest
/// is trapped: what is in no log does not replay.
fn automatically(
    engine: EngineArg,
    verdict: &Verdict,
    untrapped: impl FnOnce() -> Option<String>,
) -> Choice {
    let Finding { available, reason, .. } = &verdict.finding;
    let earlier = if verdict.remembered { ", as was tried since the last boot" } else { "" };
    if *available {
        let reason = format!("{reason}{earlier}");
        return match untrapped() {
            Some(why) if engine == EngineArg::Auto => Choice::because(
                EngineKind::Soft,
                format!(
                    "exact whatever the guest does; this host has the faster --clock pmu as well ({reason}), but \
                     RDTSC of this guest would not be trapped: {why}"
                ),
            ),
            Some(why) => Choice::on_pmu(format!(
                "the speed of hardware, though RDTSC is not trapped ({why}): {reason}"
            )),
            None => Choice::on_pmu(format!("the speed of hardware, RDTSC trapped: {reason}")),
        };
    }
    let without = format!("the faster kvm with clock pmu cannot be had: {reason}");
    match engine {
        EngineArg::Kvm => Choice::because(
            EngineKind::Kvm(KvmClock::Sync),
            format!("interrupts arrive at exits only, --clock step has no such limit; {without}"),
        ),
        EngineArg::Auto | EngineArg::Soft => Choice::because(
            EngineKind::Soft,
            format!("exact whatever the guest does; {without}; see `reprise doctor`"),
        ),
    }
}

fn no_pmu_clock(finding: Finding) -> ChoiceError {
    let remedy = finding.remedy.map_or_else(String::new, |remedy| format!("{remedy}, or "));
    ChoiceError::NoPmuClock { reason: finding.reason, remedy }
}

/// Whether KVM gives an engine with this clock.
fn try_kvm(clock: KvmClock) -> Result<(), ChoiceError> {
    let ram = GuestRam::new(MIN_RAM_MIB).map_err(|error| ChoiceError::NoKvm(error.to_string()))?;
    match KvmEngine::new(ram, clock) {
        Ok(_) => Ok(()),
        Err(error) => Err(ChoiceError::NoKvm(error.to_string())),
    }
}

/// The engine of a stretch that is recorded: the one that the log will name, and no other.
///
/// # Errors
/// There is none of this name.
pub fn named(on: &HandOver) -> Result<EngineKind, ChoiceError> {
    let found = EngineKind::ALL.into_iter().find(|kind| kind.is(on));
    found.ok_or_else(|| ChoiceError::UnknownEngine {
        engine: on.engine.clone(),
        clock: on.clock.clone(),
    })
}

/// The engine of a replay: the one that recorded, unless another is asked for. The software CPU replays
/// everything, and so stands in for a KVM that this host does not have.
///
/// # Errors
/// An engine that cannot count this recording's ticks, or a recording of neither engine.
pub fn for_replay(
    engine: EngineArg,
    header: &Header,
    is_there: impl FnOnce(EngineKind) -> bool,
) -> Result<EngineKind, ChoiceError> {
    let engines = ["soft", "kvm"];
    if !engines.contains(&header.engine.as_str()) {
        return Err(unknown(header));
    }
    match (engine, header.tick_kind) {
        (EngineArg::Auto, _) => {
            let recorded = recorded_kind(header);
            let there = recorded.filter(|kind| is_there(*kind));
            Ok(there.unwrap_or(EngineKind::Soft))
        }
        (EngineArg::Soft, _) => Ok(EngineKind::Soft),
        (EngineArg::Kvm, TickKind::Instruction) => Ok(EngineKind::Kvm(KvmClock::Step)),
        (EngineArg::Kvm, TickKind::Exit) => Ok(EngineKind::Kvm(KvmClock::Sync)),
        (EngineArg::Kvm, TickKind::ConditionalBranch) => Ok(EngineKind::Pmu),
    }
}

/// The engine that made a recording, if this version has it.
pub fn recorded_kind(header: &Header) -> Option<EngineKind> {
    named(&header.first_stretch()).ok()
}

fn unknown(header: &Header) -> ChoiceError {
    ChoiceError::UnknownEngine { engine: header.engine.clone(), clock: header.clock.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: EngineKind = EngineKind::Kvm(KvmClock::Step);
    const SYNC: EngineKind = EngineKind::Kvm(KvmClock::Sync);

    fn finding(available: bool) -> Finding {
        let (reason, remedy) = if available {
            ("it counts", None)
        } else {
            ("no permission", Some("run `sudo sysctl`".to_owned()))
        };
        Finding { available, reason: reason.to_owned(), remedy }
    }

    const UNTRAPPED: &str = "its kernel is packed";

    fn chosen(engine: EngineArg, clock: ClockArg, pmu: bool) -> Result<Choice, ChoiceError> {
        chosen_for(engine, clock, pmu, true)
    }

    fn chosen_for(
        engine: EngineArg,
        clock: ClockArg,
        pmu: bool,
        trapped: bool,
    ) -> Result<Choice, ChoiceError> {
        let decide = || Verdict { finding: finding(pmu), remembered: false };
        let untrapped = || (!trapped).then(|| UNTRAPPED.to_owned());
        choose(engine, clock, decide, || finding(pmu), untrapped)
    }

    #[test]
    fn a_clock_implies_its_engine_and_contradictions_are_refused() {
        use {ClockArg as C, EngineArg as E};
        let kind = |engine, clock, pmu| chosen(engine, clock, pmu).map(|choice| choice.kind);
        for pmu in [false, true] {
            assert_eq!(kind(E::Auto, C::Step, pmu), Ok(STEP));
            assert_eq!(kind(E::Kvm, C::Sync, pmu), Ok(SYNC));
            assert_eq!(kind(E::Soft, C::Auto, pmu), Ok(EngineKind::Soft));
            for clock in [C::Pmu, C::Step, C::Sync] {
                assert_eq!(kind(E::Soft, clock, pmu), Err(ChoiceError::SoftHasOneClock));
            }
        }
        assert_eq!(kind(E::Auto, C::Auto, false), Ok(EngineKind::Soft));
        assert_eq!(kind(E::Auto, C::Auto, true), Ok(EngineKind::Pmu));
        assert_eq!(kind(E::Kvm, C::Auto, false), Ok(SYNC));
        assert_eq!(kind(E::Kvm, C::Auto, true), Ok(EngineKind::Pmu));
        assert_eq!(kind(E::Kvm, C::Pmu, true), Ok(EngineKind::Pmu));
        assert_eq!(kind(E::Auto, C::Pmu, true), Ok(EngineKind::Pmu));
    }

    #[test]
    fn a_clock_that_the_host_lacks_is_refused_with_what_to_do() {
        let error = chosen(EngineArg::Kvm, ClockArg::Pmu, false).expect_err("no counter");
        let line = error.to_string();
        assert!(line.contains("no permission; run `sudo sysctl`, or use --engine soft"), "{line}");
    }

    #[test]
    fn what_the_program_chose_it_gives_a_reason_for() {
        for (engine, pmu) in [
            (EngineArg::Auto, false),
            (EngineArg::Auto, true),
            (EngineArg::Kvm, false),
            (EngineArg::Kvm, true),
        ] {
            let choice = chosen(engine, ClockArg::Auto, pmu).expect("a choice");
            let reason = choice.reason.expect("a reason");
            let expected = if pmu { "it counts" } else { "no permission" };
            assert!(reason.contains(expected) && !reason.contains('\n'), "{reason}");
            assert!(!reason.contains(UNTRAPPED), "{reason}");
        }
        assert_eq!(chosen(EngineArg::Soft, ClockArg::Auto, true).expect("a choice").reason, None);
    }

    /// Nobody who did not ask for `kvm` gets a clock under which the guest's RDTSC is in no log.
    #[test]
    fn without_the_trap_the_clock_is_only_for_who_asks() {
        use EngineArg as E;
        let kinds = [(E::Auto, EngineKind::Soft), (E::Kvm, EngineKind::Pmu)];
        for (engine, kind) in kinds {
            let choice = chosen_for(engine, ClockArg::Auto, true, false).expect("a choice");
            let reason = choice.reason.expect("a reason");
            assert_eq!(choice.kind, kind, "{reason}");
            assert!(reason.contains(UNTRAPPED) && !reason.contains('\n'), "{reason}");
        }
    }

    /// Each test of the counter is made once: by whoever chose, or by whoever makes the engine.
    #[test]
    fn the_counter_is_tried_once() {
        let tested = |clock| chosen(EngineArg::Kvm, clock, true).expect("a choice").hardware();
        for clock in [ClockArg::Auto, ClockArg::Pmu] {
            assert_eq!(tested(clock).self_testing(), SelfTesting::Done);
        }
        assert_eq!(Choice::of(EngineKind::Pmu).hardware().self_testing(), SelfTesting::Run);
        // Nor once more where a run hands over to it.
        let soft = || Choice::of(EngineKind::Soft);
        let yes = || finding(true);
        let later = soft().going_on_if([EngineKind::Pmu], |_| Ok(()), yes).expect("it counts");
        assert_eq!(later.hardware().self_testing(), SelfTesting::Done);
        let never = || panic!("it has been tried");
        assert!(later.going_on_if([EngineKind::Pmu], |_| Ok(()), never).is_ok());
    }

    #[test]
    fn every_engine_that_is_planned_is_there_or_refused_before_the_run() {
        let soft = || Choice::of(EngineKind::Soft);
        let lacks = || ChoiceError::NoKvm("/dev/kvm does not exist".to_owned());
        let without = |kind| soft().going_on_if([kind], |_| Err(lacks()), || finding(false));
        assert_eq!(without(EngineKind::Soft), Ok(soft()));
        for kind in [SYNC, STEP] {
            assert_eq!(without(kind), Err(lacks()));
            assert_eq!(soft().going_on_if([kind], |_| Ok(()), || finding(false)), Ok(soft()));
        }
        assert!(matches!(without(EngineKind::Pmu), Err(ChoiceError::NoPmuClock { .. })));
    }

    /// A stretch that is recorded runs on the engine that its log names, or not at all.
    #[test]
    fn a_stretch_is_named_by_all_that_its_log_says() {
        let on = |kind: EngineKind| HandOver {
            engine: kind.engine_name().to_owned(),
            clock: kind.clock_name().to_owned(),
            tick_kind: kind.tick_kind(),
            ns_per_tick: 0,
        };
        for kind in EngineKind::ALL {
            assert_eq!(named(&on(kind)), Ok(kind));
        }
        let other = HandOver { tick_kind: TickKind::Exit, ..on(EngineKind::Soft) };
        assert!(named(&other).is_err());
    }

    #[test]
    fn who_names_a_clock_of_kvm_means_kvm() {
        use {ClockArg as C, EngineArg as E};
        for clock in [C::Pmu, C::Step, C::Sync] {
            assert_eq!(E::Auto.beside(clock), E::Kvm);
            assert_eq!(E::Soft.beside(clock), E::Soft);
        }
        assert_eq!(E::Auto.beside(C::Auto), E::Auto);
    }

    #[test]
    fn every_engine_is_found_again_by_its_names() {
        let names = EngineKind::ALL.map(|kind| (kind.engine_name(), kind.clock_name()));
        for (index, name) in names.iter().enumerate() {
            assert!(!names[..index].contains(name), "{name:?}");
        }
    }
}
