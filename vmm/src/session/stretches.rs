//! Runs on one engine after the other: what the user plans, and what a recording says.

use std::fmt;
use std::str::FromStr;

use reprise_kvm::KvmClock;
use reprise_machine::clock::TimeSource;
use reprise_machine::engine::{Engine, EngineError};
use reprise_machine::inputs::{Planned, Then, Verification, When};
use reprise_machine::outcome::Outcome;
use reprise_machine::ram::GuestRam;
use reprise_machine::relay::{MakeEngine, Relay};
use reprise_replay::{follow_other_cpu, recorded_here};
use reprise_trace::event::HandOver;
use reprise_trace::header::Header;
use reprise_trace::stretches::Course;
use serde::Serialize;

use super::assembly::{self, SoftOptions, TimeStampSites};
use super::choice::{self, ChoiceError, EngineArg, EngineKind};
use super::hardware::BranchHardware;
use super::replay::{At, is_there};
use crate::output::grouped;

/// What `--then` names: an engine, and its clock if it has several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThenArg(pub EngineKind);

/// What `--then` understands.
const THEN: [(&str, EngineKind); 5] = [
    ("soft", EngineKind::Soft),
    ("kvm", EngineKind::Kvm(KvmClock::Sync)),
    ("kvm:sync", EngineKind::Kvm(KvmClock::Sync)),
    ("kvm:step", EngineKind::Kvm(KvmClock::Step)),
    ("kvm:pmu", EngineKind::Pmu),
];

impl FromStr for ThenArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = THEN.iter().find(|(name, _)| *name == text);
        known.map(|(_, kind)| Self(*kind)).ok_or_else(|| {
            let names: Vec<_> = THEN.iter().map(|(name, _)| *name).collect();
            format!("give one of {}", names.join(", "))
        })
    }
}

/// Why moments and engines make no plan.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// More engines than moments, or moments without an engine amid the run.
    #[error(
        "--until and --then go in pairs, and only the last --until, which ends the run, may stand alone: \
         {untils} --until, {thens} --then"
    )]
    Pairs {
        /// Moments.
        untils: usize,
        /// Engines.
        thens: usize,
    },
    /// Moments go forward.
    #[error("--until {later} is not behind --until {earlier}: give the moments in their order")]
    Order {
        /// The moment before.
        earlier: String,
        /// The moment refused.
        later: String,
    },
    /// Nothing lies between.
    #[error("--until {until} lies before --from {from}: give a moment behind it")]
    EndsBefore {
        /// Where it was to begin.
        from: String,
        /// Where it was to end.
        until: String,
    },
}

impl PlanError {
    /// What is to end at `until` would begin behind it.
    pub fn ends_before(from: At, until: At) -> Self {
        Self::EndsBefore { from: shown(from), until: shown(until) }
    }
}

/// What a run is to do after its first engine.
///
/// # Errors
/// Moments and engines do not go together.
pub fn plan(
    first: EngineKind,
    untils: &[At],
    thens: &[ThenArg],
) -> Result<Vec<Planned>, PlanError> {
    if thens.len() > untils.len() || thens.len() + 1 < untils.len() {
        return Err(PlanError::Pairs { untils: untils.len(), thens: thens.len() });
    }
    for pair in untils.windows(2) {
        let forward = match (pair[0], pair[1]) {
            (At::Tick(earlier), At::Tick(later)) => earlier < later,
            (At::Time(earlier), At::Time(later)) => earlier < later,
            // Which comes first only the run tells.
            _ => true,
        };
        if !forward {
            let [earlier, later] = [pair[0], pair[1]].map(shown);
            return Err(PlanError::Order { earlier, later });
        }
    }
    let mut time = first.time_source();
    let mut thens = thens.iter();
    let planned = untils.iter().map(|at| Planned {
        at: match *at {
            At::Tick(tick) => When::Tick(tick),
            At::Time(ns) => When::Time(ns),
        },
        then: match thens.next() {
            Some(ThenArg(kind)) => {
                let to = hand_over(*kind, time);
                time = TimeSource::of(to.ns_per_tick);
                Then::HandOver(to)
            }
            None => Then::Stop,
        },
    });
    Ok(planned.collect())
}

fn shown(at: At) -> String {
    match at {
        At::Tick(tick) => tick.to_string(),
        At::Time(ns) => format!("{}s", ns as f64 / 1e9),
    }
}

/// Handing over to `kind`. Where time follows instructions before and behind, it goes on at the same pace, so
/// that the guest cannot tell.
fn hand_over(kind: EngineKind, before: TimeSource) -> HandOver {
    let own = kind.time_source();
    let time = match (before, own) {
        (TimeSource::Ticks { .. }, TimeSource::Ticks { .. }) => before,
        _ => own,
    };
    HandOver {
        engine: kind.engine_name().to_owned(),
        clock: kind.clock_name().to_owned(),
        tick_kind: kind.tick_kind(),
        ns_per_tick: time.ns_per_tick(),
    }
}

/// An engine that follows every hand-over, beginning as `first`; each stretch is executed by what
/// `engine` makes of it, and the clock `pmu` runs on `hardware`.
///
/// # Errors
/// The first engine cannot be had.
pub fn relay(
    hardware: &impl BranchHardware,
    ram: GuestRam,
    first: &HandOver,
    header: &Header,
    engine: EngineArg,
    soft: SoftOptions,
) -> Result<Relay, EngineError> {
    let (hardware, header) = (hardware.clone(), header.clone());
    let make: MakeEngine = Box::new(move |to, ram| {
        let kind = kind_of(&hardware, &header, to, engine).map_err(refused)?;
        Ok(match kind {
            EngineKind::Soft => {
                let mut engine = assembly::soft_engine(ram, soft)?;
                if !recorded_here(&header) {
                    follow_other_cpu(&mut engine, &header);
                }
                Box::new(engine) as Box<dyn Engine>
            }
            EngineKind::Kvm(clock) => {
                Box::new(assembly::kvm_engine(ram, clock, &TimeStampSites::of_relay())?)
            }
            EngineKind::Pmu => Box::new(hardware.engine(ram)?),
        })
    });
    Relay::new(ram, first, make)
}

fn refused(error: ChoiceError) -> EngineError {
    EngineError { what: error.to_string() }
}

/// What executes a stretch if `engine` is asked for.
fn kind_of(
    hardware: &impl BranchHardware,
    header: &Header,
    on: &HandOver,
    engine: EngineArg,
) -> Result<EngineKind, ChoiceError> {
    choice::for_replay(engine, &header.of_stretch(on), |kind| is_there(hardware, kind))
}

/// How a replay follows a recording.
#[derive(Clone, Copy, Debug)]
pub struct Followed {
    /// What it can compare.
    pub verification: Verification,
    /// By an engine after the other; else the software CPU alone counts what each stretch counts.
    pub by_relay: bool,
}

/// How a replay on `engine` follows a recording.
///
/// # Errors
/// A stretch that `engine` cannot replay.
pub fn followed(
    hardware: &impl BranchHardware,
    header: &Header,
    course: &Course,
    engine: EngineArg,
) -> Result<Followed, ChoiceError> {
    let (mut same, mut on_soft) = (true, true);
    for stretch in &course.stretches {
        let kind = kind_of(hardware, header, &stretch.on, engine)?;
        same &= choice::recorded_kind(&header.of_stretch(&stretch.on)) == Some(kind);
        on_soft &= kind == EngineKind::Soft;
    }
    let verification = Verification {
        other_engine: !same,
        other_cpu: !recorded_here(header),
        on_hardware: !on_soft,
    };
    Ok(Followed { verification, by_relay: course.stretches.len() > 1 && !on_soft })
}

/// A part of a run that one engine executed, as people and checks read it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StretchReport {
    /// The tick at which it begins.
    pub from_tick: u64,
    /// `kvm` or `soft`.
    pub engine: String,
    /// `instructions`, `step`, `sync` or `pmu`.
    pub clock: String,
}

impl StretchReport {
    /// Those of a recording.
    pub fn of_course(course: &Course) -> Vec<Self> {
        let report = |stretch: &reprise_trace::stretches::Stretch| Self {
            from_tick: stretch.from.map_or(0, |moment| moment.tick),
            engine: stretch.on.engine.clone(),
            clock: stretch.on.clock.clone(),
        };
        course.stretches.iter().map(report).collect()
    }

    /// Those of a run that began on `first`.
    pub fn of_outcome(first: EngineKind, from_tick: u64, outcome: &Outcome) -> Vec<Self> {
        let (engine, clock) = (first.engine_name().to_owned(), first.clock_name().to_owned());
        let mut stretches = vec![Self { from_tick, engine, clock }];
        stretches.extend(outcome.hand_overs.iter().map(|(tick, to)| Self {
            from_tick: *tick,
            engine: to.engine.clone(),
            clock: to.clock.clone(),
        }));
        stretches
    }

    /// All of a run's stretches in a line.
    pub fn to_text(stretches: &[Self]) -> String {
        let texts: Vec<_> = stretches.iter().map(ToString::to_string).collect();
        texts.join("; ")
    }
}

impl fmt::Display for StretchReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "from tick {} {}, clock {}", grouped(self.from_tick), self.engine, self.clock)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_and_engines_go_in_pairs_and_forward() {
        let soft = ThenArg(EngineKind::Soft);
        let [one, two] = [At::Tick(1), At::Tick(2)];
        let plan = |untils: &[At], thens: &[ThenArg]| plan(EngineKind::Soft, untils, thens);
        assert_eq!(plan(&[], &[]), Ok(Vec::new()));
        assert!(plan(&[one, two], &[soft]).is_ok() && plan(&[one, two], &[soft, soft]).is_ok());
        assert!(matches!(plan(&[one], &[soft, soft]), Err(PlanError::Pairs { .. })));
        assert!(matches!(plan(&[one, two], &[]), Err(PlanError::Pairs { .. })));
        assert!(matches!(plan(&[two, one], &[soft]), Err(PlanError::Order { .. })));
        let stop = plan(&[one], &[]).map(|mut plan| plan.remove(0).then);
        assert_eq!(stop, Ok(Then::Stop));
    }

    #[test]
    fn time_goes_on_at_its_pace_where_it_follows_instructions() {
        let thens = ["kvm:step", "kvm", "kvm:step"].map(|name| name.parse().expect("known"));
        let untils = [At::Tick(1), At::Tick(2), At::Tick(3)];
        let plan = plan(EngineKind::Soft, &untils, &thens).expect("it is one");
        let paces: Vec<_> = plan
            .into_iter()
            .map(|planned| match planned.then {
                Then::HandOver(to) => to.ns_per_tick,
                Then::Stop => panic!("no end is planned"),
            })
            .collect();
        let step = EngineKind::Kvm(KvmClock::Step).time_source().ns_per_tick();
        assert_eq!(paces, [EngineKind::Soft.time_source().ns_per_tick(), 0, step]);
    }

    #[test]
    fn an_engine_is_named_with_its_clock() {
        assert!("pmu".parse::<ThenArg>().is_err() && "soft:sync".parse::<ThenArg>().is_err());
        assert_eq!("kvm:pmu".parse(), Ok(ThenArg(EngineKind::Pmu)));
        assert_eq!("kvm:step".parse(), Ok(ThenArg(EngineKind::Kvm(KvmClock::Step))));
    }
}
