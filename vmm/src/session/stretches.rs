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
use reprise_trace::moment::TickKind;
use reprise_trace::stretches::{Course, Stretch};
use serde::Serialize;

use super::assembly::{self, SoftOptions, TimeStampSites};
use super::choice::{self, ChoiceError, EngineArg, EngineKind};
use super::hardware::{BranchHardware, time_stamp_counter_of};
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
/// `choose` says, and the clock `pmu` runs on `hardware`.
///
/// # Errors
/// The first engine cannot be had.
pub fn relay(
    hardware: &impl BranchHardware,
    ram: GuestRam,
    first: &HandOver,
    header: &Header,
    choose: impl Fn(&HandOver) -> Result<EngineKind, ChoiceError> + 'static,
    soft: SoftOptions,
) -> Result<Relay, EngineError> {
    let (hardware, header) = (hardware.clone(), header.clone());
    let make: MakeEngine = Box::new(move |to, ram| {
        Ok(match choose(to).map_err(refused)? {
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
            EngineKind::Pmu => {
                let counter = time_stamp_counter_of(&header.of_stretch(to));
                Box::new(hardware.engine(ram, counter)?)
            }
        })
    });
    Relay::new(ram, first, make)
}

fn refused(error: ChoiceError) -> EngineError {
    EngineError { what: error.to_string() }
}

/// What executes a stretch of the recording with this header, if `engine` is asked for.
pub fn kind_of(
    hardware: &impl BranchHardware,
    header: &Header,
    on: &HandOver,
    engine: EngineArg,
) -> Result<EngineKind, ChoiceError> {
    choice::for_replay(engine, &header.of_stretch(on), |kind| is_there(hardware, kind))
}

/// How a replay follows a recording.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Followed {
    /// What executes each stretch, from the one it begins in; never empty.
    pub kinds: Vec<EngineKind>,
    /// By an engine after the other; else one executes all of them, and counts what each stretch counts.
    pub by_relay: bool,
    /// Each stretch is executed by the engine that recorded it.
    pub by_recorded_engines: bool,
}

impl Followed {
    /// How a replay follows these stretches of a recording, the first of which it begins in. `kind_of` says
    /// what would execute each by itself.
    ///
    /// # Errors
    /// As `kind_of`.
    pub fn of(
        stretches: &[Stretch],
        kind_of: impl Fn(&HandOver) -> Result<EngineKind, ChoiceError>,
    ) -> Result<Self, ChoiceError> {
        let kinds = stretches.iter().map(|stretch| kind_of(&stretch.on));
        let mut kinds = kinds.collect::<Result<Vec<_>, _>>()?;
        let stands_in = |(stretch, kind): (&Stretch, &EngineKind)| {
            *kind == EngineKind::Soft && stretch.on.tick_kind != TickKind::Instruction
        };
        let one_on_kvm = kinds.iter().any(|kind| *kind != EngineKind::Soft);
        // In the place of hardware the software CPU counts as that did, which it can only as the one engine
        // of the run.
        let by_relay =
            kinds.len() > 1 && one_on_kvm && !stretches.iter().zip(&kinds).any(stands_in);
        if kinds.len() > 1 && !by_relay {
            kinds.fill(EngineKind::Soft);
        }
        let recorded = |(stretch, kind): (&Stretch, &EngineKind)| {
            choice::named(&stretch.on).as_ref() == Ok(kind)
        };
        let by_recorded_engines = stretches.iter().zip(&kinds).all(recorded);
        Ok(Self { kinds, by_relay, by_recorded_engines })
    }

    /// What executes the first of them.
    pub fn first(&self) -> EngineKind {
        self.kinds[0]
    }

    /// What a replay here can compare of a recording with this header.
    pub fn verification(&self, header: &Header) -> Verification {
        Verification {
            other_engine: !self.by_recorded_engines,
            other_cpu: !recorded_here(header),
            on_hardware: self.kinds.iter().any(|kind| *kind != EngineKind::Soft),
        }
    }
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

    /// Those of the log of a run that began like this.
    pub fn of_log(from_tick: u64, engine: &str, clock: &str, outcome: &Outcome) -> Vec<Self> {
        let (engine, clock) = (engine.to_owned(), clock.to_owned());
        let mut stretches = vec![Self { from_tick, engine, clock }];
        stretches.extend(outcome.hand_overs.iter().map(|(tick, to)| Self {
            from_tick: *tick,
            engine: to.engine.clone(),
            clock: to.clock.clone(),
        }));
        stretches
    }

    /// What executed these stretches of a log. The software CPU counts what each of them counts.
    pub fn executed(recorded: &[Self], by: &[EngineKind]) -> Vec<Self> {
        let ran = |(stretch, kind): (&Self, &EngineKind)| {
            let clock = match (kind, stretch.clock.as_str()) {
                (EngineKind::Soft, "step") => EngineKind::Soft.clock_name(),
                (EngineKind::Soft, recorded) => recorded,
                (kind, _) => kind.clock_name(),
            };
            let (engine, clock) = (kind.engine_name().to_owned(), clock.to_owned());
            Self { from_tick: stretch.from_tick, engine, clock }
        };
        recorded.iter().zip(by).map(ran).collect()
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
        let [early, late] = [At::Time(1), At::Time(2)];
        for backward in [[two, one], [one, one], [late, early], [early, early]] {
            assert!(
                matches!(plan(&backward, &[soft]), Err(PlanError::Order { .. })),
                "{backward:?}"
            );
        }
        assert!(plan(&[early, late], &[soft]).is_ok() && plan(&[two, early], &[soft]).is_ok());
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

    fn stretches_of(names: &[&str]) -> Vec<Stretch> {
        let stretch = |name: &&str| {
            let ThenArg(kind) = name.parse().expect("known");
            Stretch { from: None, records_before: 0, on: hand_over(kind, kind.time_source()) }
        };
        names.iter().map(stretch).collect()
    }

    /// How a recording of these stretches is followed on a host that has this and the software CPU.
    fn followed_where(there: &[EngineKind], names: &[&str]) -> Followed {
        let kind_of = |on: &HandOver| {
            let recorded = choice::named(on)?;
            Ok(if there.contains(&recorded) { recorded } else { EngineKind::Soft })
        };
        Followed::of(&stretches_of(names), kind_of).expect("all are known")
    }

    #[test]
    fn where_the_software_cpu_stands_in_for_hardware_it_executes_the_whole_run() {
        const SYNC: EngineKind = EngineKind::Kvm(KvmClock::Sync);
        let there = followed_where(&[SYNC, EngineKind::Pmu], &["kvm:sync", "kvm:pmu"]);
        assert_eq!(there.kinds, [SYNC, EngineKind::Pmu]);
        assert!(there.by_relay && there.by_recorded_engines);
        // KVM without a counter: what the first stretch could be executed by does not help the second.
        for names in [&["kvm:sync", "kvm:pmu"][..], &["soft", "kvm:sync", "kvm:pmu", "soft"]] {
            let without = followed_where(&[SYNC], names);
            assert_eq!(without.kinds, vec![EngineKind::Soft; names.len()]);
            assert!(!without.by_relay && !without.by_recorded_engines);
        }
        // Where it counts instructions in any case it is one of several.
        let own = followed_where(&[SYNC], &["kvm:sync", "soft"]);
        assert_eq!((own.kinds, own.by_relay), (vec![SYNC, EngineKind::Soft], true));
        let one = followed_where(&[SYNC], &["kvm:sync"]);
        assert_eq!((one.kinds, one.by_relay, one.by_recorded_engines), (vec![SYNC], false, true));
    }

    #[test]
    fn what_ran_is_not_what_was_recorded() {
        use reprise_trace::stretches::FinalDigest;

        let texts = |stretches: &[StretchReport]| -> Vec<String> {
            stretches.iter().map(|it| format!("{}/{}", it.engine, it.clock)).collect()
        };
        let names = ["soft", "kvm:step", "kvm:sync", "kvm:pmu"];
        let course = Course {
            stretches: stretches_of(&names),
            assists: reprise_trace::event::Assists::new(),
            left_open: Vec::new(),
            final_digest: FinalDigest::SetsAsideAllTables,
        };
        let recorded = StretchReport::of_course(&course);
        assert_eq!(texts(&recorded), ["soft/instructions", "kvm/step", "kvm/sync", "kvm/pmu"]);
        let on_soft = StretchReport::executed(&recorded, &[EngineKind::Soft; 4]);
        let counted = ["soft/instructions", "soft/instructions", "soft/sync", "soft/pmu"];
        assert_eq!(texts(&on_soft), counted);
        let step = EngineKind::Kvm(KvmClock::Step);
        let stepped = StretchReport::executed(&recorded[..1], &[step]);
        assert_eq!(texts(&stepped), ["kvm/step"]);
    }

    #[test]
    fn an_engine_is_named_with_its_clock() {
        assert!("pmu".parse::<ThenArg>().is_err() && "soft:sync".parse::<ThenArg>().is_err());
        assert_eq!("kvm:pmu".parse(), Ok(ThenArg(EngineKind::Pmu)));
        assert_eq!("kvm:step".parse(), Ok(ThenArg(EngineKind::Kvm(KvmClock::Step))));
    }
}
