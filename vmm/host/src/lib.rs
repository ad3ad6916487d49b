//! The host side: the only crate with a clock, standard input, files and signals.
//!
//! [`RealHost`] is the world outside as the recording machine asks it. A thread waits for standard
//! input, signals and a timer; whatever it sees it leaves in shared flags and kicks the engine, so
//! the order in which things become ready reaches the machine only as logged arrivals.

mod alarm;
mod checkpoint_file;
mod console;
mod host_cpu;
mod input;
mod log_file;
mod real_host;
mod stop_requests;
mod terminal;
mod terminal_queries;
mod watcher;

pub use checkpoint_file::{
    CheckpointEvery, CheckpointThread, CheckpointTotals, OpenCheckpoints, WhenBusy,
};
pub use console::ConsoleSink;
pub use host_cpu::host_info;
pub use input::InputSource;
pub use log_file::{ImagesEmbedded, LogFile, LogTotals, SharedImage};
pub use real_host::{HostOptions, Progress, ProgressObserver, RealHost};
pub use stop_requests::StopRequests;
pub use terminal::{end_on_panic, terminal_can_be_used};
pub use terminal_queries::WithoutQueries;

/// Why the host side cannot do its part.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A file that was to be typed.
    #[error("cannot read the input {path}: {error}; give a readable file with --input")]
    Input {
        /// As the user gave it.
        path: String,
        /// The system's reason.
        error: std::io::Error,
    },
    /// Too much to type.
    #[error("the input {path} has {bytes} bytes: give a file of at most {limit_bytes} bytes")]
    InputTooLarge {
        /// As the user gave it.
        path: String,
        /// Its length.
        bytes: u64,
        /// What is accepted.
        limit_bytes: u64,
    },
    /// A system call that a host normally grants.
    #[error("the host refused {what}: {error}")]
    System {
        /// What was asked for.
        what: &'static str,
        /// The system's reason.
        error: std::io::Error,
    },
}

impl HostError {
    pub(crate) fn system(what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |error| Self::System { what, error }
    }
}
