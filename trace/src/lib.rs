//! What Reprise stores, and nothing else: moments, the recording log and CPU state.
//!
//! Reader and writer of a format live in one file; `FORMAT.md` beside this crate describes the bytes.

pub mod cpu_state;
pub mod event;
pub mod logged;
pub mod moment;
