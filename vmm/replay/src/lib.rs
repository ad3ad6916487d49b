//! Machines made from recordings: at the start of the run, or at a checkpoint.
//!
//! [`Replayable`] is a recording with the checkpoints that lie beside it. [`Replayable::begin`] gives
//! RAM, CPU, board and log at a [`Start`]; [`Beginning::into_machine`] gives them to any engine, and
//! [`Replayable::soft_machine`] to the software CPU. A machine that was run to a checkpoint's tick is
//! compared with it by [`meet_checkpoint`].
#![forbid(unsafe_code)]

mod beginning;
mod error;
mod going_back;
mod recorded_clock;
mod replayable;
mod rewriting;
mod software;

pub use beginning::{
    Beginning, Met, Start, accessed_bits, meet_checkpoint, recorded_here, time_source, verification,
};
pub use error::ReplayError;
pub use going_back::{Arrived, ConsoleOnce, MAX_ATTEMPTS, MAX_BEGINNINGS};
pub use recorded_clock::{RecordedClock, follow_other_cpu, kept_by_software, laws_of};
pub use replayable::{Replayable, checkpoints_path};
pub use rewriting::{Counts as RewritingCounts, RewriteError, Rewriting, Rewritten};
pub use software::OnSoftware;
