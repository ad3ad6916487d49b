//! Checkpoints: a machine's whole state at a moment of its recording, beside the recording's file.
//!
//! `file.rs` has the file's reader and writer, `page_frame.rs` those of the pages in it, and
//! `page_table.rs` says which page of guest RAM is which page of the file. Nothing of a recording
//! depends on its checkpoints.

mod error;
mod file;
mod frame;
mod page_frame;
mod page_table;
mod state;

pub use error::CheckpointError;
pub use file::{CheckpointInfo, CheckpointWriter, Checkpoints, Loaded};
pub use state::{
    CheckpointDigest, ConsoleState, EngineState, HiddenState, LastRecord, MachineState, RamDigest,
    page_digest,
};

/// Bytes of a page of guest RAM.
pub const PAGE_BYTES: usize = 4096;
