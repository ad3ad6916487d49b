//! Sessions: a guest, an engine and the world put together into a machine that runs, records or
//! replays.

pub mod assembly;
pub mod automatic;
pub mod bisection;
pub mod checkpoints;
pub mod choice;
mod drive;
pub mod expand;
pub mod expand_report;
pub mod file_kind;
pub mod guest;
pub mod hardware;
pub mod makers;
pub mod pmu_trap;
pub mod precautions;
pub mod profile_report;
pub mod record;
pub mod replay;
pub mod report;
pub mod rewriting;
pub mod stretches;
pub mod trace_file;
pub mod trace_target;
pub mod trial;
