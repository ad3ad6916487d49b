//! The commands, one file each. Each returns the process's exit status.

pub mod checkpoint;
pub mod demo;
pub mod diff;
pub mod doctor;
pub mod expand;
pub mod images;
pub mod info;
pub mod record;
pub mod replay;
pub mod run;
pub mod trace;
