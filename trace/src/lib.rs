//! What Reprise stores, and nothing else: moments, the recording log, checkpoints, CPU
//! state and instruction traces.
//!
//! Reader and writer of a format live in one file; `FORMAT.md` beside this crate describes the bytes.

pub mod checkpoint;
mod contents;
pub mod cpu_state;
pub mod diff;
pub mod event;
pub mod frame;
pub mod header;
pub mod instructions;
pub mod log;
pub mod logged;
pub mod moment;
pub mod recording;
pub mod register_bits;
mod seek_index;
pub mod stretches;
mod varint;
