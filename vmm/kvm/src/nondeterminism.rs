//! Instructions whose answers only a CPU knows, and whether this host's KVM lets a guest have them behind
//! everybody's back. Asked of the hardware once, by running each in a tiny guest.

use std::sync::OnceLock;

use reprise_trace::register_bits::{CR4_PCE, CR4_TSD};

use crate::error::KvmError;
use crate::report::{ByLevel, Finding};
use crate::self_test::{Level, SelfTest};
use crate::vcpu::RawExit;

/// What became of one instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Precaution {
    /// Its mnemonic.
    pub instruction: &'static str,
    /// Whether a guest cannot have an answer that no log has.
    pub closed: ByLevel,
}

/// What the CPU model hides, which must fault: mnemonic, bytes, and the bits of CR4 by which a guest would
/// allow it to user code.
const HIDDEN: [(&str, &[u8], u64); 8] = [
    ("RDTSCP", &[0x0f, 0x01, 0xf9], 0),
    ("RDRAND", &[0x0f, 0xc7, 0xf0], 0),
    ("RDSEED", &[0x0f, 0xc7, 0xf8], 0),
    ("RDPMC", &[0x0f, 0x33], CR4_PCE),
    ("RDPID", &[0xf3, 0x0f, 0xc7, 0xf8], 0),
    ("XGETBV", &[0x0f, 0x01, 0xd0], 0),
    ("MONITOR", &[0x0f, 0x01, 0xc8], 0),
    ("MWAIT", &[0x0f, 0x01, 0xc9], 0),
];
const RDTSC: [u8; 2] = [0x0f, 0x31];
/// #UD and #GP.
const REFUSALS: [u8; 2] = [6, 13];

/// What this host's KVM does with each of them.
///
/// # Errors
/// There is no KVM, or it refuses what asking takes.
pub fn precautions() -> Result<&'static [Precaution], KvmError> {
    static ANSWER: OnceLock<Vec<Precaution>> = OnceLock::new();
    if let Some(known) = ANSWER.get() {
        return Ok(known);
    }
    let asked = ask()?;
    Ok(ANSWER.get_or_init(|| asked))
}

fn ask() -> Result<Vec<Precaution>, KvmError> {
    let mut guest = SelfTest::new()?;
    let mut precautions = vec![Precaution {
        instruction: "RDTSC",
        closed: ByLevel {
            kernel: trapped_in_kernel(&mut guest)?,
            user: refused_to_user(&mut guest)?,
        },
    }];
    for (instruction, code, allowing) in HIDDEN {
        let kernel = faults(&mut guest, Level::Kernel, code, allowing)?;
        let user = faults(&mut guest, Level::User, code, allowing)?;
        precautions.push(Precaution { instruction, closed: ByLevel { kernel, user } });
    }
    let kernel = guest.shows_cpu_model(Level::Kernel)?;
    let user = guest.shows_cpu_model(Level::User)?;
    precautions.push(Precaution { instruction: "CPUID", closed: ByLevel { kernel, user } });
    Ok(precautions)
}

fn trapped_in_kernel(guest: &mut SelfTest) -> Result<Finding, KvmError> {
    let breakpoint = guest.hardware_breakpoint(Level::Kernel)?;
    Ok(match breakpoint.available {
        true => Finding::yes("trapped at known places, by breakpoints in debug registers"),
        false => Finding::no(format!("not trapped: {}", breakpoint.reason)),
    })
}

fn refused_to_user(guest: &mut SelfTest) -> Result<Finding, KvmError> {
    Ok(match guest.fault_of(Level::User, &RDTSC, CR4_TSD)? {
        Ok(13) => Finding::yes("raises #GP where the guest sets CR4.TSD, and executes elsewhere"),
        Ok(vector) => Finding::no(format!("raises exception {vector} under CR4.TSD")),
        Err(what) => Finding::no(format!("CR4.TSD does not stop it: {what}")),
    })
}

fn faults(
    guest: &mut SelfTest,
    level: Level,
    code: &[u8],
    allowing: u64,
) -> Result<Finding, KvmError> {
    Ok(finding_of(guest.fault_of(level, code, allowing)?))
}

/// What it means that an instruction which is hidden came to this.
fn finding_of(found: Result<u8, RawExit>) -> Finding {
    match found {
        Ok(vector) if REFUSALS.contains(&vector) => {
            Finding::yes(format!("hidden: raises exception {vector}"))
        }
        Ok(3) => Finding::no("executes, though CPUID hides it"),
        Ok(vector) => Finding::no(format!("raises exception {vector}")),
        Err(exit) if exit.is_refusal() || exit == RawExit::Shutdown => {
            Finding::yes(format!("ends the run: {exit}"))
        }
        Err(exit) => Finding::no(format!("not known: {exit}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::KvmKind;
    use crate::testing::{require_kvm, skipped};

    /// Whether they are closed to user code on pagetable-based KVM, where it runs on the host's own CPU with
    /// the host's CR4; of the others that CPU's features decide.
    const TO_USER: [(&str, bool); 5] =
        [("RDTSC", true), ("CPUID", false), ("RDPMC", true), ("MONITOR", true), ("MWAIT", true)];

    #[test]
    fn pagetable_based_kvm_is_known() {
        require_kvm!();
        let found = precautions().expect("nothing fails");
        for Precaution { instruction, closed } in found {
            eprintln!("{instruction}: kernel {}; user {}", closed.kernel, closed.user);
        }
        if KvmKind::of_this_host() != KvmKind::PagetableBased {
            return skipped("this host's KVM is not pagetable-based");
        }
        for (name, expected) in TO_USER {
            let of_name = |it: &&Precaution| it.instruction == name;
            let closed = &found.iter().find(of_name).expect("it was tried").closed;
            assert_eq!(closed.user.available, expected, "{name}: {}", closed.user);
        }
    }

    /// What was not found out is not closed.
    #[test]
    fn only_what_faults_or_ends_the_run_is_closed() {
        let refusal = RawExit::InternalError { suberror: 1 };
        for (found, closed) in [
            (Ok(6), true),
            (Ok(13), true),
            (Ok(3), false),
            (Ok(14), false),
            (Err(refusal), true),
            (Err(RawExit::Shutdown), true),
            (Err(RawExit::Interrupted), false),
            (Err(RawExit::InternalError { suberror: 2 }), false),
            (Err(RawExit::Halt), false),
        ] {
            assert_eq!(finding_of(found).available, closed, "{found:?}");
        }
    }
}
