//! Reprise as a library: session assembly and the commands of the binary.
#![forbid(unsafe_code)]

pub use reprise_boot as boot;

pub mod cli;
pub mod commands;
pub mod defect;
pub mod output;
pub mod session;
