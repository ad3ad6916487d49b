//! Why KVM cannot be used.

use reprise_machine::engine::EngineError;
use vmm_sys_util::errno::Error as Errno;

use crate::counter_refusal::CounterRefusal;
use crate::host;

/// Why KVM cannot be used on this host, or refused what it was asked. Each message is one line that
/// says what to do.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// There is no such device.
    #[error(
        "{path} does not exist: load the host's kvm module (kvm_intel, kvm_amd) or allow nested virtualisation, or use --engine soft"
    )]
    Missing {
        /// The device's path.
        path: String,
    },
    /// The device may not be opened by this user.
    #[error(
        "no permission to open {path}: add yourself to its group (often `kvm`), or use --engine soft"
    )]
    Permission {
        /// The device's path.
        path: String,
    },
    /// The device cannot be opened for another reason, or is not KVM.
    #[error("{path} cannot be used ({reason}): use --engine soft")]
    Unusable {
        /// The device's path.
        path: String,
        /// The host's reason.
        reason: String,
    },
    /// KVM speaks another version of its interface.
    #[error(
        "this host's KVM has API version {0}, and version 12 is needed: update its kernel, or use --engine soft"
    )]
    ApiVersion(i32),
    /// KVM lacks something that the engine needs.
    #[error("this host's KVM lacks {0}: update its kernel, or use --engine soft")]
    Lacks(&'static str),
    /// KVM's single-step does not do what the clock `step` needs.
    #[error("the clock step cannot be used on this host ({0}): use --clock sync or --engine soft")]
    CannotStep(String),
    /// There is no counter for the clock `pmu`.
    #[error("the clock pmu cannot be used on this host: {0}; {remedy}, or use --engine soft", remedy = .0.remedy())]
    NoBranchCounter(CounterRefusal),
    /// The counter failed in the middle of a run.
    #[error("the branch counter failed: {0}; {remedy}, or use --engine soft", remedy = .0.remedy())]
    CounterFailed(CounterRefusal),
    /// The guest's kernel reads the time-stamp counter at more places than there are breakpoints.
    #[error(
        "the guest's kernel reads the time-stamp counter at {0} places, and this clock traps four: use --engine soft"
    )]
    TooManyTimeStampSites(usize),
    /// An ioctl was refused.
    #[error("KVM refused {what} ({reason}): {advice}")]
    Refused {
        /// The ioctl and what it was for.
        what: String,
        /// The host's reason.
        reason: String,
        /// What to do.
        advice: &'static str,
    },
}

impl KvmError {
    /// What is wrong, without what to do.
    pub(crate) fn reason(&self) -> String {
        match self {
            Self::Missing { path } => format!("{path} does not exist"),
            Self::Permission { path } => format!("no permission to open {path}"),
            Self::NoBranchCounter(refusal) | Self::CounterFailed(refusal) => refusal.to_string(),
            other => other.to_string(),
        }
    }

    /// What to do on this host, as half a sentence, where something is known that helps.
    pub(crate) fn remedy(&self) -> Option<String> {
        let remedy = match self {
            Self::Missing { .. } => host::how_to_get_kvm(),
            Self::Permission { .. } => {
                "run `sudo setfacl -m u:$USER:rw /dev/kvm`, or for good `sudo usermod -aG kvm $USER` and \
                 log in again"
            }
            Self::ApiVersion(_) | Self::Lacks(_) => "update the host's kernel",
            Self::NoBranchCounter(refusal) | Self::CounterFailed(refusal) => refusal.remedy(),
            Self::Unusable { .. }
            | Self::CannotStep(_)
            | Self::TooManyTimeStampSites(_)
            | Self::Refused { .. } => return None,
        };
        Some(remedy.to_owned())
    }

    /// An ioctl that failed where it should not.
    pub(crate) fn refused(what: impl Into<String>, errno: Errno) -> Self {
        Self::Refused {
            what: what.into(),
            reason: errno.to_string(),
            advice: "run `reprise doctor` to see what this host can do, or use --engine soft",
        }
    }
}

impl From<KvmError> for EngineError {
    fn from(error: KvmError) -> Self {
        EngineError { what: error.to_string() }
    }
}
