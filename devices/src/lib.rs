//! The board: every device of the machine, driven by virtual time and by nothing else.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod board;
pub mod cpu_model;
pub mod state;
pub mod time;
