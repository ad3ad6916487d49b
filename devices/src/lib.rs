//! The board: every device of the machine, driven by virtual time and by nothing else.
//!
//! Code here can name no clock, file, thread or hash map, so a board does the same whenever the same
//! is asked of it. Bytes from outside come in only as values that a recording's log holds.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod board;
mod calendar;
pub mod cpu_model;
mod debug_exit;
mod i8042;
mod pic;
mod pit;
mod reset;
mod rtc;
pub mod state;
pub mod time;
mod uart;
