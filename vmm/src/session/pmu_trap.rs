//! Whether RDTSC of a guest is trapped with the clock `pmu`.

use reprise_branch_clock::engine::BranchClock;
use reprise_branch_clock::time_stamp_trap::TimeStampTrap;
use reprise_devices::cpu_model::TimeStampCounter;
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

/// The clock `pmu` that traps RDTSC.
pub type TrappingClock<V> = BranchClock<TimeStampTrap<V>>;

/// The clock on this hardware, RDTSC of this kernel trapped; CPUID hides it, too.
///
/// # Errors
/// The hardware refuses.
pub fn trapping_engine<H: BranchHardware>(
    hardware: &H,
    ram: GuestRam,
    kernel: &KernelText,
) -> Result<TrappingClock<H::Vcpu>, EngineError> {
    hardware.engine(ram, TimeStampCounter::Hidden)?.trapping_time_stamps(kernel.clone())
}
