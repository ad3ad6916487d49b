//! Which engine executes the guest, and how it counts ticks.

use clap::ValueEnum;
use reprise_kvm::KvmClock;
use reprise_machine::clock::TimeSource;
use reprise_machine::digest::AccessedBits;
use reprise_trace::header::Header;
use reprise_trace::moment::TickKind;

/// What the user asked for with `--engine`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum EngineArg {
    /// The fastest exact engine that this host has; for a replay, the engine that recorded.
    #[default]
    Auto,
    /// The host's KVM.
    Kvm,
    /// The software CPU.
    Soft,
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
    /// KVM.
    Kvm(KvmClock),
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
    /// Not there yet.
    #[error("--clock pmu is not built into this version: use --clock sync or --clock step")]
    NoPmuClock,
    /// A recording whose ticks the asked engine cannot count.
    #[error(
        "this recording counts conditional branches (clock pmu), and this version's kvm has no such \
         clock: leave --engine out, or --engine soft"
    )]
    CountsBranches,
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
    pub reason: Option<&'static str>,
}

impl EngineKind {
    /// `soft` or `kvm`.
    pub fn engine_name(self) -> &'static str {
        match self {
            Self::Soft => "soft",
            Self::Kvm(_) => "kvm",
        }
    }

    /// The clock's name.
    pub fn clock_name(self) -> &'static str {
        match self {
            Self::Soft => "instructions",
            Self::Kvm(KvmClock::Step) => "step",
            Self::Kvm(KvmClock::Sync) => "sync",
        }
    }

    /// What a tick is.
    pub fn tick_kind(self) -> TickKind {
        match self {
            Self::Soft | Self::Kvm(KvmClock::Step) => TickKind::Instruction,
            Self::Kvm(KvmClock::Sync) => TickKind::Exit,
        }
    }

    /// Whether the final digest of its recordings counts accessed bits.
    pub fn accessed_bits(self) -> AccessedBits {
        match self {
            Self::Soft => AccessedBits::Exact,
            // Hardware may set them early.
            Self::Kvm(_) => AccessedBits::SetAside,
        }
    }

    /// How virtual time comes about in a new run.
    pub fn time_source(self) -> TimeSource {
        match self {
            Self::Soft => TimeSource::Ticks { ns_per_tick: SOFT_NS_PER_INSTRUCTION },
            Self::Kvm(KvmClock::Step) => TimeSource::Ticks { ns_per_tick: STEP_NS_PER_INSTRUCTION },
            Self::Kvm(KvmClock::Sync) => TimeSource::Host,
        }
    }
}

/// The engine of a new run.
///
/// # Errors
/// An engine and a clock that do not go together, or a clock that is not built.
pub fn for_new_run(engine: EngineArg, clock: ClockArg) -> Result<Choice, ChoiceError> {
    let chosen = |kind| Ok(Choice { kind, reason: None });
    match (engine, clock) {
        (_, ClockArg::Pmu) => Err(ChoiceError::NoPmuClock),
        (EngineArg::Soft, ClockArg::Auto) => chosen(EngineKind::Soft),
        (EngineArg::Soft, _) => Err(ChoiceError::SoftHasOneClock),
        (_, ClockArg::Step) => chosen(EngineKind::Kvm(KvmClock::Step)),
        (_, ClockArg::Sync) => chosen(EngineKind::Kvm(KvmClock::Sync)),
        (EngineArg::Kvm, ClockArg::Auto) => Ok(Choice {
            kind: EngineKind::Kvm(KvmClock::Sync),
            reason: Some("interrupts arrive at exits only; --clock step is exact everywhere"),
        }),
        (EngineArg::Auto, ClockArg::Auto) => Ok(Choice {
            kind: EngineKind::Soft,
            reason: Some(
                "exact on every host; kvm's full-speed exact clock (pmu) is not in this version",
            ),
        }),
    }
}

/// The engine of a replay: the one that recorded, unless another is asked for. The software CPU replays
/// everything, and so stands in for a KVM that this version or this host does not have.
///
/// # Errors
/// An engine that cannot count this recording's ticks, or a recording of neither engine.
pub fn for_replay(
    engine: EngineArg,
    header: &Header,
    kvm_opens: impl FnOnce() -> bool,
) -> Result<EngineKind, ChoiceError> {
    let engines = ["soft", "kvm"];
    if !engines.contains(&header.engine.as_str()) {
        return Err(unknown(header));
    }
    match (engine, header.tick_kind) {
        (EngineArg::Auto, _) => {
            let recorded = recorded_kind(header);
            let there = recorded.filter(|kind| *kind == EngineKind::Soft || kvm_opens());
            Ok(there.unwrap_or(EngineKind::Soft))
        }
        (EngineArg::Soft, _) => Ok(EngineKind::Soft),
        (EngineArg::Kvm, TickKind::Instruction) => Ok(EngineKind::Kvm(KvmClock::Step)),
        (EngineArg::Kvm, TickKind::Exit) => Ok(EngineKind::Kvm(KvmClock::Sync)),
        (EngineArg::Kvm, TickKind::ConditionalBranch) => Err(ChoiceError::CountsBranches),
    }
}

/// The engine that made a recording, if this version has it.
pub fn recorded_kind(header: &Header) -> Option<EngineKind> {
    [EngineKind::Soft, EngineKind::Kvm(KvmClock::Step), EngineKind::Kvm(KvmClock::Sync)]
        .into_iter()
        .find(|kind| {
            kind.engine_name() == header.engine
                && kind.clock_name() == header.clock
                && kind.tick_kind() == header.tick_kind
        })
}

fn unknown(header: &Header) -> ChoiceError {
    ChoiceError::UnknownEngine { engine: header.engine.clone(), clock: header.clock.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_implies_its_engine_and_contradictions_are_refused() {
        let kind = |engine, clock| for_new_run(engine, clock).map(|choice| choice.kind);
        assert_eq!(kind(EngineArg::Auto, ClockArg::Auto), Ok(EngineKind::Soft));
        assert_eq!(kind(EngineArg::Auto, ClockArg::Step), Ok(EngineKind::Kvm(KvmClock::Step)));
        assert_eq!(kind(EngineArg::Kvm, ClockArg::Auto), Ok(EngineKind::Kvm(KvmClock::Sync)));
        assert_eq!(kind(EngineArg::Soft, ClockArg::Sync), Err(ChoiceError::SoftHasOneClock));
        assert_eq!(kind(EngineArg::Kvm, ClockArg::Pmu), Err(ChoiceError::NoPmuClock));
    }
}
