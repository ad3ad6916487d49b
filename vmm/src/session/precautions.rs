//! What a recording says of the instructions whose answers only a CPU knows: were they the machine's, or
//! may they have been the host's?

use reprise_branch_clock::time_stamp_trap::NOT_COVERED;
use reprise_kvm::{Finding, KvmClock, KvmError};
use reprise_machine::inputs::{Planned, Then};
use reprise_time_stamp_sites::Instruction;
use reprise_trace::header::{Precaution, Treatment};

use super::assembly::{TimeStampSites, Traps};
use super::choice::EngineKind;
use super::guest::Guest;
use super::pmu_trap::PmuTrap;

/// How RDTSC comes about under the clock `step`.
const STEPPED: &str = "computed from virtual time where it is stepped";

/// How they are dealt with in a run of this guest that begins on an engine and goes on as planned, its RDTSC
/// trapped like this.
///
/// # Errors
/// What KVM does with them cannot be found out.
pub fn of_run(
    first: EngineKind,
    plan: &[Planned],
    guest: &Guest,
    traps: &Traps,
) -> Result<Vec<Precaution>, KvmError> {
    let mut kinds = vec![first];
    for planned in plan {
        let Then::HandOver(to) = &planned.then else { continue };
        let names = (to.engine.as_str(), to.clock.as_str());
        let is_named = |kind: &EngineKind| (kind.engine_name(), kind.clock_name()) == names;
        kinds.extend(EngineKind::ALL.into_iter().find(is_named));
    }
    let kept = guest.keeps_user_time_stamps();
    match kinds[..] {
        [kind] => of(kind, traps, kept, reprise_kvm::precautions),
        _ => of_relay(kinds, kept, reprise_kvm::precautions),
    }
}

/// What this host's KVM does with each of them by itself.
type Asked<'a> = Result<&'a [reprise_kvm::Precaution], KvmError>;

/// What one stretch leaves open is open; the log has no time stamps of any.
fn of_relay<'a>(
    kinds: Vec<EngineKind>,
    kept: Option<&str>,
    asked: impl Fn() -> Asked<'a>,
) -> Result<Vec<Precaution>, KvmError> {
    let mut list: Vec<Precaution> = Vec::new();
    for kind in kinds {
        // Stepping answers RDTSC only while it is done.
        let kind = match kind {
            EngineKind::Kvm(_) => EngineKind::Kvm(KvmClock::Sync),
            other => other,
        };
        for precaution in of(kind, &Traps::of_relay(), kept, &asked)? {
            if !list.contains(&precaution) {
                list.push(precaution);
            }
        }
    }
    Ok(list)
}

/// How they are dealt with by this engine; `kept` says how the guest itself keeps its user code from RDTSC, if it
/// does.
fn of<'a>(
    kind: EngineKind,
    traps: &Traps,
    kept: Option<&str>,
    asked: impl Fn() -> Asked<'a>,
) -> Result<Vec<Precaution>, KvmError> {
    Ok(match kind {
        EngineKind::Soft => vec![
            closed("RDTSC", "computed from virtual time"),
            closed("RDTSCP, RDRAND, RDSEED, RDPMC, MONITOR", "not in the CPU model: they fault"),
            closed("CPUID", "the CPU model's"),
        ],
        EngineKind::Kvm(clock) => {
            let time_stamps = [kernel_time_stamp(clock, &traps.sync)];
            on_kvm(asked()?, time_stamps.into(), clock == KvmClock::Step, kept)
        }
        EngineKind::Pmu => on_kvm(asked()?, by_trap(&traps.pmu), false, kept),
    })
}

fn open(what: &str, how: &str) -> Precaution {
    Precaution { what: what.to_owned(), treatment: Treatment::Open, how: how.to_owned() }
}

fn closed(what: &str, how: &str) -> Precaution {
    Precaution { what: what.to_owned(), treatment: Treatment::Closed, how: how.to_owned() }
}

fn of_finding(what: String, finding: &Finding) -> Precaution {
    let treatment = if finding.available { Treatment::Closed } else { Treatment::Open };
    Precaution { what, treatment, how: finding.reason.clone() }
}

/// On KVM, which does this by itself with each of them; `time_stamps` says what is done about RDTSC, and
/// `stepped` whether all code is.
fn on_kvm(
    asked: &[reprise_kvm::Precaution],
    time_stamps: Vec<Precaution>,
    stepped: bool,
    kept: Option<&str>,
) -> Vec<Precaution> {
    let mut list = time_stamps;
    for precaution in asked {
        let [kernel, user] =
            ["kernel", "user"].map(|who| format!("{}, {who} code", precaution.instruction));
        let of_both = match precaution.instruction {
            "RDTSC" if stepped => vec![closed(&user, STEPPED)],
            "RDTSC" => vec![user_time_stamp(&user, &precaution.closed.user, kept)],
            _ => vec![
                of_finding(kernel, &precaution.closed.kernel),
                of_finding(user, &precaution.closed.user),
            ],
        };
        let known = |new: &Precaution| list.iter().any(|old: &Precaution| old.what == new.what);
        let new: Vec<_> = of_both.into_iter().filter(|new| !known(new)).collect();
        list.extend(new);
    }
    list
}

/// RDTSC of user code that nothing traps: what the hardware refuses under CR4.TSD only a guest that sets it, and
/// answers from its kernel, does not get from the host.
fn user_time_stamp(what: &str, refused: &Finding, kept: Option<&str>) -> Precaution {
    match kept {
        Some(how) if refused.available => closed(what, how),
        None if refused.available => open(
            what,
            &format!("the guest decides, and is not known to refuse it: {}", refused.reason),
        ),
        _ => open(what, &refused.reason),
    }
}

/// RDTSC with the clock `pmu`; where it is not trapped, what hardware does about user code is not in it.
fn by_trap(trap: &PmuTrap) -> Vec<Precaution> {
    let text = match trap {
        PmuTrap::On(text) => text,
        PmuTrap::Off(reason) => {
            return vec![open(Precaution::KERNEL_TIME_STAMPS, &format!("not trapped: {reason}"))];
        }
    };
    let places = text.sites_of(Instruction::ReadTimeStamp).count();
    let patched = text.patched.len();
    // Written before the run, which says itself if the kernel was not found there.
    let kernel = format!(
        "trapped at {places} places of the kernel's text and {patched} that it patches, once it is entered \
         where its boot stub puts it"
    );
    vec![
        closed(Precaution::KERNEL_TIME_STAMPS, &kernel),
        closed(Precaution::USER_TIME_STAMPS, "refused by CR4.TSD, and caught at the entry of #GP"),
        open(NOT_COVERED.0, NOT_COVERED.1),
    ]
}

/// RDTSC of kernel code, trapped at these sites with the clock `sync`.
fn kernel_time_stamp(clock: KvmClock, sites: &TimeStampSites) -> Precaution {
    let what = Precaution::KERNEL_TIME_STAMPS;
    match (clock, sites) {
        (KvmClock::Step, _) => closed(what, STEPPED),
        (KvmClock::Sync, TimeStampSites::Unknown(reason)) => {
            open(what, &format!("not trapped: {reason}"))
        }
        (KvmClock::Sync, TimeStampSites::At(places)) if places.is_empty() => {
            closed(what, "none in the kernel's text")
        }
        (KvmClock::Sync, TimeStampSites::At(places)) => {
            closed(what, &format!("trapped at the {} places of the kernel's text", places.len()))
        }
    }
}

#[cfg(test)]
mod tests {
    use reprise_kvm::ByLevel;

    use super::*;

    #[test]
    fn a_run_that_logs_no_time_stamps_does_not_say_that_it_does() {
        let sync = EngineKind::Kvm(KvmClock::Sync);
        let about = |list: &[Precaution]| {
            let logged = |it: &&Precaution| it.what == Precaution::KERNEL_TIME_STAMPS;
            list.iter().filter(logged).map(|it| it.treatment).collect::<Vec<_>>()
        };
        for first in [EngineKind::Kvm(KvmClock::Step), EngineKind::Soft, EngineKind::Pmu] {
            let answers = asked(true);
            let list = of_relay(vec![first, sync], None, || Ok(&answers)).expect("it was asked");
            assert!(about(&list).contains(&Treatment::Open), "{list:?}");
            assert!(!about(&list).contains(&Treatment::Closed), "{list:?}");
        }
        let off = PmuTrap::Off("a reason".to_owned());
        let pmu = on_kvm(&[], by_trap(&off), false, None);
        assert_eq!(about(&pmu), [Treatment::Open], "{pmu:?}");
    }

    fn finding(available: bool) -> Finding {
        Finding { available, reason: "a reason".to_owned(), remedy: None }
    }

    /// What a KVM says of RDTSC.
    fn asked(user: bool) -> Vec<reprise_kvm::Precaution> {
        let closed = ByLevel { kernel: finding(true), user: finding(user) };
        vec![reprise_kvm::Precaution { instruction: "RDTSC", closed }]
    }

    #[test]
    fn user_code_that_the_guest_lets_read_the_hosts_counter_is_open() {
        let treatment = |stepped, refused, kept: bool| {
            let kept = kept.then_some("in some way");
            let list = on_kvm(&asked(refused), Vec::new(), stepped, kept);
            let about: Vec<_> =
                list.iter().filter(|it| it.what == Precaution::USER_TIME_STAMPS).collect();
            assert_eq!(about.len(), 1, "{list:?}");
            about[0].treatment
        };
        assert_eq!(treatment(false, true, true), Treatment::Closed);
        assert_eq!(treatment(false, true, false), Treatment::Open);
        assert_eq!(treatment(false, false, true), Treatment::Open);
        assert_eq!(treatment(true, false, false), Treatment::Closed);
    }

    #[test]
    fn the_embedded_guests_answer_user_code_unless_they_are_told_not_to() {
        let mut compute = Guest::embedded("compute").expect("it is listed");
        assert!(compute.keeps_user_time_stamps().is_some());
        for (words, answers) in
            [("scale=1 tsd=1", true), ("timing=1 tsd=0", false), ("tsd=00", false)]
        {
            words.clone_into(&mut compute.cmdline);
            assert_eq!(compute.keeps_user_time_stamps().is_some(), answers, "{words}");
        }
        compute.cmdline.clear();
        compute.kernel.bytes = b"of the same name".to_vec().into();
        assert_eq!(compute.keeps_user_time_stamps(), None);
    }

    #[test]
    fn what_the_clock_pmu_traps_is_closed_once_for_each_kind_of_code() {
        let on = PmuTrap::On(Box::default());
        let list = on_kvm(&asked(true), by_trap(&on), false, None);
        for what in [Precaution::KERNEL_TIME_STAMPS, Precaution::USER_TIME_STAMPS] {
            let about: Vec<_> = list.iter().filter(|it| it.what == what).collect();
            assert!(
                matches!(about[..], [Precaution { treatment: Treatment::Closed, .. }]),
                "{list:?}"
            );
        }
    }

    #[test]
    fn the_kernels_time_stamps_are_closed_only_if_trapped() {
        let sync = |sites: TimeStampSites, available| {
            let sites = sites.trapped_by(|| Ok::<_, KvmError>(finding(available))).expect("asked");
            kernel_time_stamp(KvmClock::Sync, &sites).treatment
        };
        let at = |count| TimeStampSites::At(vec![0x1000; count]);
        let unknown = || TimeStampSites::Unknown("a reason".to_owned());
        assert_eq!(sync(at(0), false), Treatment::Closed);
        assert_eq!(sync(at(4), true), Treatment::Closed);
        assert_eq!(sync(at(4), false), Treatment::Open);
        assert_eq!(sync(at(5), true), Treatment::Open);
        assert_eq!(sync(unknown(), true), Treatment::Open);
        assert_eq!(kernel_time_stamp(KvmClock::Step, &at(5)).treatment, Treatment::Closed);
        // A question that cannot be asked is no answer.
        assert!(at(1).trapped_by(|| Err(KvmError::ApiVersion(1))).is_err());
        assert!(at(0).trapped_by(|| Err(KvmError::ApiVersion(1))).is_ok());
    }
}
