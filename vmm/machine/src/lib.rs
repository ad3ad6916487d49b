//! The machine: one run loop over an engine, a board and the determinism boundary.
#![forbid(unsafe_code)]

pub mod accessed_bits;
pub mod assist;
pub mod checkpoint;
pub mod clock;
mod conclude;
pub mod digest;
pub mod divergence;
pub mod effects;
pub mod engine;
pub mod host;
pub mod inputs;
pub mod lawful;
pub mod machine;
pub mod outcome;
pub mod paging;
pub mod ram;
pub mod relay;
#[cfg(test)]
mod standing;
pub mod stepping;
mod touched;
pub mod watch;
