//! A point in guest execution.

use serde::{Deserialize, Serialize};

/// What one step of a recording's clock is. Fixed for a recording, in its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TickKind {
    /// A retired instruction: engine `soft`, and `kvm` under the clock `step`.
    Instruction,
    /// A retired conditional branch, a finished access to the board, or a HLT: `kvm` under the clock
    /// `pmu`. Several instructions share a tick, so a moment within it is told by the CPU's state.
    ConditionalBranch,
    /// An exit from the guest for port I/O, MMIO or HLT: `kvm` under the clock `sync`.
    Exit,
}

/// No run is longer, in ticks of any kind: a file that says otherwise is forged.
pub const MOST_TICKS: u64 = 1 << 62;

/// A point in guest execution, totally ordered within one recording.
///
/// The tick count orders moments; RIP and RCX tell apart moments of one tick where a tick is
/// coarser than an instruction, and let a replay check that it stands where the recording stood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Moment {
    /// Ticks since the machine started.
    pub tick: u64,
    /// The next instruction's address (RIP, without the CS base).
    pub rip: u64,
    /// RCX: how much of a REP in progress remains.
    pub rcx: u64,
}

impl std::fmt::Display for Moment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "tick {} (rip {:#x}, rcx {:#x})", self.tick, self.rip, self.rcx)
    }
}
