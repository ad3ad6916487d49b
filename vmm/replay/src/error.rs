//! Why a recording gives no machine.

use reprise_boot::BootError;
use reprise_machine::checkpoint::ResumeError;
use reprise_machine::engine::{EngineError, Overshoot};
use reprise_machine::ram::RamError;
use reprise_trace::checkpoint::CheckpointError;
use reprise_trace::log::LogError;
use reprise_trace::recording::RecordingError;

/// Why a recording gives no machine: one line that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The file cannot be opened.
    #[error("cannot read {path}: {error}; check the path and its permissions")]
    File {
        /// The file.
        path: String,
        /// The system's reason.
        error: std::io::Error,
    },
    /// The recording cannot be used.
    #[error(transparent)]
    Recording(#[from] RecordingError),
    /// The log cannot be used.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The checkpoint cannot be used.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// No RAM.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The recorded guest cannot be loaded.
    #[error("the recorded guest cannot be started: {0}")]
    Boot(#[from] BootError),
    /// No image to start.
    #[error("the recording embeds no kernel: take another copy")]
    NoKernel,
    /// Another CPU model.
    #[error(
        "recorded with CPU model {found}, and this Reprise has {known}: use the Reprise that recorded it"
    )]
    CpuModel {
        /// The recording's.
        found: String,
        /// This build's.
        known: String,
    },
    /// The engine cannot be had or fails.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The machine does not take the checkpoint's state.
    #[error(transparent)]
    Resume(#[from] ResumeError),
    /// The engine was stopped behind a place of the log each time.
    #[error(
        "in {attempts} attempts, each with a wider margin, the guest was stopped behind {}: the branch \
         counter of this host is too late for it; use --engine soft",
        .overshoot.place
    )]
    Overshot {
        /// How often it was approached.
        attempts: u32,
        /// The last time.
        overshoot: Overshoot,
    },
    /// The machine stands amid something.
    #[error("the machine stands at tick {tick}, where it can be compared with no checkpoint")]
    NotConsistent {
        /// Where.
        tick: u64,
    },
}
