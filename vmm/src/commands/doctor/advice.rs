//! What the owner of a host could do to have more of Reprise.

use reprise_kvm::{Finding, KvmKind, KvmReport};
use serde::Serialize;

use super::EngineReport;

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Advice {
    /// What it would give: options of the command line, mostly.
    pub(super) gives: String,
    /// What to do, as half a sentence.
    pub(super) what: String,
}

/// What would give the engines that cannot be had; what gives several is said once.
pub(super) fn of(engines: &[EngineReport], kvm: &KvmReport) -> Vec<Advice> {
    let precaution = kvm.counter_of_cpu.as_ref().and_then(|counter| counter.precaution);
    of_findings(engines, &kvm.conditional_branch_counter, precaution, kvm.kind)
}

/// `precaution` is against what a counter may do though it is right now.
fn of_findings(
    engines: &[EngineReport],
    counter: &Finding,
    precaution: Option<&str>,
    kvm: KvmKind,
) -> Vec<Advice> {
    let mut all: Vec<Advice> = Vec::new();
    let lacking = engines.iter().filter(|engine| !engine.available);
    for (engine, remedy) in lacking.filter_map(|engine| Some((engine, engine.remedy.as_ref()?))) {
        match all.iter_mut().find(|advice| advice.what == *remedy) {
            Some(advice) => {
                advice.gives.push_str(", ");
                advice.gives.push_str(&engine.options);
            }
            None => all.push(Advice { gives: engine.options.clone(), what: remedy.clone() }),
        }
    }
    // Where KVM itself is lacking, the counter may be what is lacking next.
    if let Some(remedy) = counter.remedy.as_ref().filter(|_| !counter.available)
        && all.iter().all(|advice| advice.what != *remedy)
    {
        let gives = "a counter for --clock pmu".to_owned();
        all.push(Advice { gives, what: remedy.clone() });
    }
    if let Some(precaution) = precaution.filter(|_| counter.available) {
        let gives = "a counter for --clock pmu that stays right when threads contend".to_owned();
        all.push(Advice { gives, what: precaution.to_owned() });
    }
    if kvm == KvmKind::PagetableBased {
        all.push(Advice {
            gives: "Linux on kvm".to_owned(),
            what: "use a host with hardware virtualisation (modules kvm_intel, kvm_amd): \
                   pagetable-based KVM interprets the guest's kernel, and not all of its instructions"
                .to_owned(),
        });
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn engine(options: &str, available: bool, remedy: Option<&str>) -> EngineReport {
        EngineReport {
            engine: "kvm",
            clock: "sync",
            options: options.to_owned(),
            gives: String::new(),
            available,
            reason: String::new(),
            remedy: remedy.map(str::to_owned),
            trial: None,
        }
    }

    fn counter(remedy: Option<&str>) -> Finding {
        let (available, reason) = (remedy.is_none(), String::new());
        Finding { available, reason, remedy: remedy.map(str::to_owned) }
    }

    #[test]
    fn what_gives_several_is_said_once_and_what_is_there_is_not_advised() {
        let engines = [
            engine("a", false, Some("load it")),
            engine("b", true, Some("nothing")),
            engine("c", false, None),
            engine("d", false, Some("load it")),
        ];
        let expected = Advice { gives: "a, d".to_owned(), what: "load it".to_owned() };
        for counter in [counter(None), counter(Some("load it"))] {
            let advice = of_findings(&engines, &counter, None, KvmKind::Vmx);
            assert_eq!(advice, std::slice::from_ref(&expected));
        }
    }

    #[test]
    fn what_is_lacking_next_is_told_as_well() {
        let engines = [engine("a", false, Some("load it"))];
        let advice = of_findings(&engines, &counter(Some("leave this VM")), None, KvmKind::Vmx);
        let what: Vec<&str> = advice.iter().map(|advice| advice.what.as_str()).collect();
        assert_eq!(what, ["load it", "leave this VM"]);
    }

    /// That its self-test passes is no proof on AMD's Zen.
    #[test]
    fn a_counter_that_may_go_wrong_later_is_told_of() {
        let advised = |counter| of_findings(&[], &counter, Some("run it"), KvmKind::Svm);
        let expected = ["run it".to_owned()];
        let what = |all: Vec<Advice>| all.into_iter().map(|it| it.what).collect::<Vec<_>>();
        assert_eq!(what(advised(counter(None))), expected);
        assert_eq!(what(advised(counter(Some("leave this VM")))), ["leave this VM".to_owned()]);
    }

    #[test]
    fn pagetable_based_kvm_is_told_from_hardware() {
        let advice = of_findings(&[], &counter(None), None, KvmKind::PagetableBased);
        assert!(advice[0].what.contains("kvm_intel"), "{advice:?}");
    }
}
