//! Reprise as a library: boot loaders, session assembly and the commands of the binary.
#![forbid(unsafe_code)]

pub mod boot;
pub mod cli;
pub mod commands;
pub mod defect;
pub mod output;
pub mod session;
