//! Whether RDTSC of a guest is trapped with the clock `pmu`.

use reprise_branch_clock::engine::BranchClock;
use reprise_branch_clock::time_stamp_trap::{TimeStampTrap, TrapCounts};
use reprise_branch_clock::vcpu::Vcpu;
use reprise_kvm::Finding;
use reprise_machine::engine::EngineError;
use reprise_machine::ram::GuestRam;
use reprise_time_stamp_sites::{KernelText, Unpacking};
use reprise_trace::header::Header;

use super::hardware::BranchHardware;

/// What keeps Linux where it is linked to.
const STAYS: &str = "nokaslr";

/// What becomes of a guest's RDTSC with the clock `pmu`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PmuTrap {
    /// It is trapped in this kernel and its user code.
    On(Box<KernelText>),
    /// It is not; the reason is for a person.
    Off(String),
}

impl PmuTrap {
    /// For a kernel's file and its command line, on a host that can do it or cannot.
    pub fn of_kernel(host: &Finding, kernel: &[u8], command_line: &str) -> Self {
        if !host.available {
            return Self::Off(format!("this host's KVM cannot do it ({})", host.reason));
        }
        let text = match KernelText::of_image(kernel) {
            Ok(text) => text,
            Err(error) => return Self::Off(error.to_string()),
        };
        if !text.shows_when_patched() {
            let reason = "nothing in the kernel's text shows when it has applied its alternatives";
            return Self::Off(reason.to_owned());
        }
        if text.unpacking == Unpacking::Unknown
            && !command_line.split_ascii_whitespace().any(|word| word == STAYS)
        {
            return Self::Off(format!(
                "the kernel's boot stub does not show where it goes: add {STAYS} to its command line"
            ));
        }
        Self::On(Box::new(text))
    }

    /// For a machine that moves between engines: not all of them can.
    pub fn of_relay() -> Self {
        Self::Off("the machine moves between engines".to_owned())
    }

    /// For the replay of a recording with this kernel: it is trapped where it was.
    ///
    /// # Errors
    /// It was, and here it cannot be.
    pub fn of_recording(
        host: &Finding,
        header: &Header,
        kernel: &[u8],
    ) -> Result<Self, EngineError> {
        if !header.logs_time_stamps() {
            return Ok(Self::Off("its recording has no time stamps".to_owned()));
        }
        if header.marks_time_stamps() {
            return Ok(Self::Off("its recording says where each is".to_owned()));
        }
        match Self::of_kernel(host, kernel, &header.guest.command_line) {
            Self::Off(reason) => Err(not_trapped_here(&reason)),
            on => Ok(on),
        }
    }

    /// Why it is not trapped.
    pub fn reason_against(&self) -> Option<&str> {
        match self {
            Self::On(_) => None,
            Self::Off(reason) => Some(reason),
        }
    }
}

/// Why a recording whose log has what RDTSC gave is not replayed.
pub fn not_trapped_here(reason: &str) -> EngineError {
    let what = format!(
        "the recording has what RDTSC gave, and here it is not trapped: {reason}; use --engine soft"
    );
    EngineError { what }
}

/// What is said of a run that ended before the kernel was found where its boot stub put it.
pub const KERNEL_MOVED: &str = "RDTSC was not trapped: the kernel was not found behind its boot stub, so what it read is in no log \
     and a replay may differ; add nokaslr to its command line, or use --engine soft";

/// What is said of a run with places at which RDTSC was not trapped.
pub const PLACES_LEFT: &str = "RDTSC was not trapped everywhere: places of the kernel's text do not hold what its file says, so what it \
     read there is in no log and a replay may differ; use --engine soft";
/// What is said of a run whose user code was refused RDTSC, and nobody answered.
pub const USER_LEFT: &str = "RDTSC of user code was refused and not answered, since the kernel's handler of #GP was not found while \
     programs ran: one that reads the counter got a fault; use --engine soft";

/// The clock `pmu` that traps RDTSC.
pub type TrappingClock<V> = BranchClock<TimeStampTrap<V>>;

/// The clock on this hardware, RDTSC of this kernel trapped.
///
/// # Errors
/// The hardware refuses.
pub fn trapping_engine<H: BranchHardware>(
    hardware: &H,
    ram: GuestRam,
    kernel: &KernelText,
) -> Result<TrappingClock<H::Vcpu>, EngineError> {
    hardware.engine(ram)?.trapping_time_stamps(kernel.clone())
}

/// What there is to say of a run on it that is over.
pub fn note_of<V: Vcpu>(engine: &TrappingClock<V>) -> Option<&'static str> {
    note_of_counts(engine.vcpu().counts())
}

/// The same, by what the trap did; `None` if it never saw the kernel.
pub fn note_of_counts(counts: Option<TrapCounts>) -> Option<&'static str> {
    match counts {
        None => Some(KERNEL_MOVED),
        Some(TrapCounts { refused: 1.., .. }) => Some(PLACES_LEFT),
        Some(TrapCounts { unguarded: 1.., .. }) => Some(USER_LEFT),
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_trapped_is_told() {
        let all = TrapCounts { kernel: 5, user: 3, open: 2, unforeseen: 1, ..Default::default() };
        assert_eq!(note_of_counts(None), Some(KERNEL_MOVED));
        assert_eq!(note_of_counts(Some(all)), None);
        assert_eq!(note_of_counts(Some(TrapCounts { refused: 1, ..all })), Some(PLACES_LEFT));
        assert_eq!(note_of_counts(Some(TrapCounts { unguarded: 9, ..all })), Some(USER_LEFT));
        for note in [PLACES_LEFT, USER_LEFT] {
            assert!(!note.contains('\n') && note.contains("--engine soft"), "{note}");
        }
    }
}
