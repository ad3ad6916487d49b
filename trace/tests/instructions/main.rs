//! The instruction trace from outside: whatever is written comes back, and whatever is done to the
//! bytes is told.

mod account;
mod concat;
mod contract;
mod damage;
mod filters;
mod idle;
mod round_trip;
mod synthetic;
