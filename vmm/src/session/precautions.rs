//! What a recording says of the instructions whose answers only a CPU knows: were they the machine's, or
//! may they have been the host's?

use reprise_branch_clock::time_stamp_trap::NOT_COVERED;
use reprise_kvm::{Finding, KvmClock};
use reprise_machine::inputs::{Planned, Then};
use reprise_time_stamp_sites::Instruction;
use reprise_trace::header::{Precaution, Treatment};

use super::assembly::{MAX_TRAPPED, TimeStampSites};
use super::choice::EngineKind;
use super::pmu_trap::PmuTrap;

/// How they are dealt with in a run of this kernel that begins on an engine and goes on as planned; with
/// the clock `pmu`, by `trap`.
pub fn of_run(
    first: EngineKind,
    plan: &[Planned],
    kernel: &[u8],
    trap: &PmuTrap,
) -> Vec<Precaution> {
    let mut kinds = vec![first];
    for planned in plan {
        let Then::HandOver(to) = &planned.then else { continue };
        let names = (to.engine.as_str(), to.clock.as_str());
        let is_named = |kind: &EngineKind| (kind.engine_name(), kind.clock_name()) == names;
        kinds.extend(EngineKind::ALL.into_iter().find(is_named));
    }
    match kinds[..] {
        [EngineKind::Pmu] => on_kvm(None, &TimeStampSites::of_relay(), trap),
        [kind] => of(kind, &TimeStampSites::of_kernel(kernel)),
        _ => of_relay(kinds),
    }
}

/// What one stretch leaves open is open; the log has no time stamps of any.
fn of_relay(kinds: Vec<EngineKind>) -> Vec<Precaution> {
    let mut list: Vec<Precaution> = Vec::new();
    for kind in kinds {
        // Stepping answers RDTSC only while it is done.
        let kind = match kind {
            EngineKind::Kvm(_) => EngineKind::Kvm(KvmClock::Sync),
            other => other,
        };
        for precaution in of(kind, &TimeStampSites::of_relay()) {
            if !list.contains(&precaution) {
                list.push(precaution);
            }
        }
    }
    list
}

/// How they are dealt with by this engine, for a guest with these sites.
fn of(kind: EngineKind, sites: &TimeStampSites) -> Vec<Precaution> {
    match kind {
        EngineKind::Soft => vec![
            closed("RDTSC", "computed from virtual time"),
            closed("RDTSCP, RDRAND, RDSEED, RDPMC, MONITOR", "not in the CPU model: they fault"),
            closed("CPUID", "the CPU model's"),
        ],
        EngineKind::Kvm(clock) => on_kvm(Some(clock), sites, &PmuTrap::of_relay()),
        EngineKind::Pmu => on_kvm(None, sites, &PmuTrap::of_relay()),
    }
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

/// On KVM with one of its clocks, or `None` for the clock `pmu`.
fn on_kvm(clock: Option<KvmClock>, sites: &TimeStampSites, trap: &PmuTrap) -> Vec<Precaution> {
    let mut list = match clock {
        Some(_) => Vec::new(),
        None => by_trap(trap),
    };
    for precaution in reprise_kvm::precautions() {
        let [kernel, user] =
            ["kernel", "user"].map(|who| format!("{}, {who} code", precaution.instruction));
        let of_both = match (precaution.instruction, clock) {
            ("RDTSC", None) => [None, Some(of_finding(user, &precaution.closed.user))],
            ("RDTSC", Some(clock)) => [
                Some(kernel_time_stamp(clock, sites, kernel, &precaution.closed.kernel)),
                Some(of_finding(user, &precaution.closed.user)),
            ],
            _ => [
                Some(of_finding(kernel, &precaution.closed.kernel)),
                Some(of_finding(user, &precaution.closed.user)),
            ],
        };
        let known = |new: &Precaution| list.iter().any(|old: &Precaution| old.what == new.what);
        let new: Vec<_> = of_both.into_iter().flatten().filter(|new| !known(new)).collect();
        list.extend(new);
    }
    list
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
    let kernel =
        format!("trapped at {places} places of the kernel's text and {patched} that it patches");
    vec![
        closed(Precaution::KERNEL_TIME_STAMPS, &kernel),
        closed("RDTSC, user code", "refused by CR4.TSD, and caught at the entry of #GP"),
        open(NOT_COVERED.0, NOT_COVERED.1),
    ]
}

fn kernel_time_stamp(
    clock: KvmClock,
    sites: &TimeStampSites,
    what: String,
    trap: &Finding,
) -> Precaution {
    let open = |how: String| open(&what, &how);
    match (clock, sites) {
        (KvmClock::Step, _) => closed(&what, "computed from virtual time where it is stepped"),
        (KvmClock::Sync, TimeStampSites::Unknown(reason)) => open(format!("not trapped: {reason}")),
        (KvmClock::Sync, TimeStampSites::At(places)) if places.is_empty() => {
            closed(&what, "none in the kernel's text")
        }
        (KvmClock::Sync, TimeStampSites::At(places)) if places.len() > MAX_TRAPPED => {
            open(format!("not trapped: {} places, and four breakpoints", places.len()))
        }
        (KvmClock::Sync, TimeStampSites::At(places)) if trap.available => {
            closed(&what, &format!("trapped at the {} places of the kernel's text", places.len()))
        }
        (KvmClock::Sync, TimeStampSites::At(_)) => open(trap.reason.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_logs_no_time_stamps_does_not_say_that_it_does() {
        let sync = EngineKind::Kvm(KvmClock::Sync);
        for kinds in [[EngineKind::Kvm(KvmClock::Step), sync], [EngineKind::Soft, sync]] {
            let list = of_relay(kinds.to_vec());
            let logged = |it: &&Precaution| it.what == Precaution::KERNEL_TIME_STAMPS;
            assert!(
                list.iter().filter(logged).all(|it| it.treatment == Treatment::Open),
                "{list:?}"
            );
        }
        let off = PmuTrap::Off("a reason".to_owned());
        let pmu = of_run(EngineKind::Pmu, &[], &[], &off);
        let about = pmu.iter().find(|it| it.what == Precaution::KERNEL_TIME_STAMPS);
        assert!(about.is_some_and(|it| it.treatment == Treatment::Open), "{pmu:?}");
    }

    #[test]
    fn what_the_clock_pmu_traps_is_closed_once_for_each_kind_of_code() {
        let on = PmuTrap::On(Box::default());
        let list = of_run(EngineKind::Pmu, &[], &[], &on);
        for what in [Precaution::KERNEL_TIME_STAMPS, "RDTSC, user code"] {
            let about: Vec<_> = list.iter().filter(|it| it.what == what).collect();
            assert!(
                matches!(about[..], [Precaution { treatment: Treatment::Closed, .. }]),
                "{list:?}"
            );
        }
    }

    #[test]
    fn the_kernels_time_stamps_are_closed_only_if_trapped() {
        let treatment = |clock, sites: TimeStampSites, available| {
            let trap = Finding { available, reason: "a reason".to_owned(), remedy: None };
            kernel_time_stamp(clock, &sites, String::new(), &trap).treatment
        };
        let at = |count| TimeStampSites::At(vec![0x1000; count]);
        let unknown = TimeStampSites::Unknown("a reason".to_owned());
        assert_eq!(treatment(KvmClock::Sync, at(0), false), Treatment::Closed);
        assert_eq!(treatment(KvmClock::Sync, at(4), true), Treatment::Closed);
        assert_eq!(treatment(KvmClock::Sync, at(4), false), Treatment::Open);
        assert_eq!(treatment(KvmClock::Sync, at(5), true), Treatment::Open);
        assert_eq!(treatment(KvmClock::Sync, unknown, true), Treatment::Open);
        assert_eq!(treatment(KvmClock::Step, at(5), false), Treatment::Closed);
    }
}
