//! Runs cases on both sides, shrinks what differs, and says what happened.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use iced_x86::{OpKind, Register};
use reprise_cpu::translate::Translation;
use reprise_kvm::KvmKind;
use reprise_kvm::user_oracle::{OracleError, UserOracle, UserOutcome};

use crate::case::Case;
use crate::compare::{Comparison, Strictness, differences};
use crate::generate;
use crate::lawful;
use crate::soft::Soft;

/// Divergences that are told in full.
const MAX_TOLD: usize = 12;

/// Both sides, the software CPU's twice: each instruction a call, and whole blocks translated.
pub(crate) struct Judge {
    oracle: UserOracle,
    kvm: KvmKind,
    soft: Soft,
    translated: Soft,
}

/// What came of many cases.
#[derive(Default)]
pub(crate) struct Verdict {
    pub(crate) cases: u64,
    pub(crate) divergences: u64,
    /// Cases that differ as they should, by reason.
    pub(crate) set_aside: BTreeMap<&'static str, u64>,
    told: Vec<String>,
    /// How often which first difference, for an overview.
    kinds: BTreeMap<String, (u64, u64)>,
}

impl Judge {
    /// `None` where there is no KVM, and says so.
    pub(crate) fn new() -> Option<Self> {
        match UserOracle::new() {
            Ok(oracle) => Some(Self {
                oracle,
                kvm: KvmKind::of_this_host(),
                soft: Soft::new(Translation::Never),
                translated: Soft::new(Translation::AtOnce),
            }),
            Err(error) => {
                eprintln!("no real CPU to compare with: {error}");
                None
            }
        }
    }

    pub(crate) fn oracle(&mut self) -> &mut UserOracle {
        &mut self.oracle
    }

    /// Runs the cases of these seeds.
    pub(crate) fn judge(&mut self, seeds: impl Iterator<Item = u64>) -> Verdict {
        let mut verdict = Verdict::default();
        for seed in seeds {
            let case = generate::case(seed);
            match self.compare(&case) {
                Comparison::Different(found) => {
                    let (case, found) = self.shrink(case, found);
                    verdict.note(&case, Comparison::Different(found));
                }
                comparison => verdict.note(&case, comparison),
            }
        }
        verdict
    }

    /// Where the two sides differ.
    pub(crate) fn compare(&mut self, case: &Case) -> Comparison {
        let soft = self.soft.run(&case.input);
        let translated = self.translated.run(&case.input);
        if translated != soft {
            return Comparison::Different(unlike_twin(&soft, &translated));
        }
        match (self.oracle.run(&case.input), soft) {
            (Ok(real), Ok(soft)) => {
                differences(case, &real, &soft, Strictness::Everything, self.kvm, &mut self.soft)
            }
            // Both ask the same of a device, which neither has.
            (Err(OracleError::Unexpected(exit)), Err(reason)) if format!("{exit:?}") == reason => {
                // The real CPU would go on with it in the next case.
                self.oracle = UserOracle::new().expect("there was one");
                Comparison::Same
            }
            // Neither comes to an end.
            (Err(OracleError::TimedOut), Err(_)) => Comparison::Same,
            // A branch that leads elsewhere may make an endless loop of either.
            (Err(_), _) | (_, Err(_)) if lawful::loops_by_prefix(case) => {
                Comparison::SetAside(lawful::LOOP_BY_PREFIX)
            }
            (Err(_), _) | (_, Err(_)) if lawful::branches_narrowly(case) => {
                Comparison::SetAside("AMD cuts the target of a near branch with a 66 prefix")
            }
            (Err(error), soft) => {
                let soft = soft.map(|outcome| outcome.exception);
                Comparison::Different(vec![format!("end: real {error}, soft {soft:x?}")])
            }
            (Ok(real), Err(reason)) => {
                let end = format!("end: real {:x?}, soft {reason}", real.exception);
                Comparison::Different(vec![end])
            }
        }
    }

    /// Drops instructions as long as the case still differs.
    fn shrink(&mut self, mut case: Case, mut found: Vec<String>) -> (Case, Vec<String>) {
        let mut dropped = 0;
        while dropped < case.pieces.len() {
            let shorter = case.without(dropped).map(|case| (self.compare(&case), case));
            match shorter {
                Some((Comparison::Different(differences), shorter)) => {
                    (case, found) = (shorter, differences);
                }
                _ => dropped += 1,
            }
        }
        (case, found)
    }
}

/// What translation made different; nothing of it is lawful.
fn unlike_twin(
    soft: &Result<UserOutcome, String>,
    translated: &Result<UserOutcome, String>,
) -> Vec<String> {
    let (Ok(soft), Ok(translated)) = (soft, translated) else {
        let end = |outcome: &Result<UserOutcome, String>| match outcome {
            Ok(outcome) => format!("{:x?}", outcome.exception),
            Err(reason) => reason.clone(),
        };
        return vec![format!("translated: end: {} not {}", end(translated), end(soft))];
    };
    let what = [
        ("exception", soft.exception != translated.exception),
        ("rip", soft.rip != translated.rip),
        ("rflags", soft.rflags != translated.rflags),
        ("general registers", soft.gpr != translated.gpr),
        ("x87 and SSE", soft.fpu != translated.fpu),
        ("memory", soft.data != translated.data),
    ];
    let different = what.iter().filter(|(_, different)| *different);
    different
        .map(|(name, _)| format!("translated: {name}: {translated:x?} not {soft:x?}"))
        .collect()
}

impl Verdict {
    /// Takes a case's comparison into account.
    pub(crate) fn note(&mut self, case: &Case, comparison: Comparison) {
        self.cases += 1;
        let found = match comparison {
            Comparison::Same => return,
            Comparison::SetAside(reason) => {
                *self.set_aside.entry(reason).or_insert(0) += 1;
                return;
            }
            Comparison::Different(found) => found,
        };
        self.divergences += 1;
        let (count, _) = self.kinds.entry(kind(case, &found)).or_insert((0, case.seed));
        *count += 1;
        if *count == 1 && self.told.len() < MAX_TOLD {
            self.told.push(tell(case, &found));
        }
    }

    /// # Panics
    /// If anything differed, with all that is known about it.
    pub(crate) fn demand_agreement(&self) {
        let mut text = self.told.join("\n");
        for (kind, (count, seed)) in &self.kinds {
            let _ = writeln!(text, "{count:6} of: {kind} (seed {seed:#x})");
        }
        for (reason, count) in &self.set_aside {
            eprintln!("{count} of {} set aside: {reason}", self.cases);
        }
        let (divergences, cases) = (self.divergences, self.cases);
        eprintln!("{cases} cases, {divergences} differ");
        assert!(divergences == 0, "{text}\n{divergences} of {cases} cases differ");
    }
}

/// The first difference's place and the last instruction.
fn kind(case: &Case, found: &[String]) -> String {
    let place = found[0].split(':').next().unwrap_or_default();
    let place = if place.starts_with("data") { "data" } else { place };
    let codes: Vec<_> =
        case.instructions().iter().map(|instruction| format!("{:?}", instruction.code())).collect();
    format!("{place} after {}", codes.join(", "))
}

/// Seed, code, the state that matters, and every difference.
fn tell(case: &Case, found: &[String]) -> String {
    let mut text = format!("seed {:#x}\n{}", case.seed, case.listing());
    let input = &case.input;
    let _ = writeln!(text, "  rflags {:#x}", input.rflags);
    let mut vectors = false;
    let mut stack = false;
    for number in 0..16 {
        let used = case.instructions().iter().any(|instruction| {
            let named = (0..instruction.op_count())
                .filter(|&operand| instruction.op_kind(operand) == OpKind::Register)
                .map(|operand| instruction.op_register(operand))
                .chain([instruction.memory_base(), instruction.memory_index()]);
            let mut used = number < 8;
            for register in named {
                vectors |= register.is_xmm();
                stack |= register.is_st() || register.is_mm();
                used |= register.is_gpr() && register.full_register().number() == number;
            }
            used
        });
        if used {
            let register = Register::RAX + number as u32;
            let _ = writeln!(text, "  {register:?} {:#x}", input.gpr[number]);
        }
    }
    let fpu = &input.fpu;
    let _ = writeln!(
        text,
        "  fcw {:#x} fsw {:#x} ftw {:#x} mxcsr {:#x}",
        fpu.fcw, fpu.fsw, fpu.ftw, fpu.mxcsr
    );
    if stack {
        let _ = writeln!(text, "  st (little-endian) {:02x?}", fpu.st);
    }
    if vectors {
        let _ = writeln!(text, "  xmm {:x?}", fpu.xmm);
    }
    for difference in found {
        let _ = writeln!(text, "  {difference}");
    }
    text
}
