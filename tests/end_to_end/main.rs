//! The product end to end: the very binary that a user starts, driven as a user drives it.
//!
//! The binary is built by this crate from the product's own `main.rs` (Cargo gives a test the path
//! of a binary of the test's own package only), so it is never stale and never missing.

mod bad_input;
mod broken_recordings;
mod checkpoints;
mod crossing;
mod embedded_guests;
mod expansion;
mod hand_over;
mod inspection;
mod interruption;
mod kvm;
mod linux;
mod misbehaviour;
mod own_files;
mod program;
mod terminal;
mod translation;
mod values;
