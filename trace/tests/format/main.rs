//! The recording format from outside: whatever is written comes back, and whatever is done to the
//! bytes is told.

mod checkpoints;
mod damage;
mod hostile;
mod log;
mod recording;
mod sample;
