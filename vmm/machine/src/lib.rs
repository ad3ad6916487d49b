//! The machine: one run loop over an engine, a board and the determinism boundary.
#![forbid(unsafe_code)]

pub mod clock;
pub mod engine;
pub mod host;
pub mod ram;
