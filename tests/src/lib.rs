//! Tests of the whole: end to end, differential, and the house style. The library is what more than
//! one of them needs.

pub mod engine_within;
pub mod hardware;
pub mod linux_image;
pub mod skipped;
