//! The first instruction after which two replays differ, and why.
//!
//! [`compare()`] takes two [`Side`]s: two recordings, or one recording on two engines. It moves both
//! machines together, narrows the gap in which they part to one instruction (`search.rs`), and says what
//! differs behind it (`state_rows.rs`, `memory.rs`), what ran around it (`listing.rs`) and what the
//! likely cause is (`cause.rs`, a table). [`interval`] does what can be done for a recording whose replay
//! diverges, where the recorded side is known at its records and checkpoints alone.
//!
//! What enters a machine before an instruction (input, the end of a sleep, an interrupt) is a step of
//! its own. A difference that is in devices, virtual time or the TLB alone is told as the *origin*; the
//! search then goes on to the first instruction after which CPU or RAM differ.
#![forbid(unsafe_code)]

mod cause;
pub mod early_bit;
mod examine;
mod finding;
mod finding_text;
mod image;
pub mod input;
pub mod interval;
mod interval_text;
mod listing;
mod memory;
mod pair;
pub mod place;
pub mod ran;
mod replica;
mod search;
mod side;
mod state_rows;

use std::sync::Arc;

use reprise_export::symbols::Symbols;
use reprise_replay::Start;
use reprise_trace::diff::header_differences;

pub use crate::cause::Cause;
pub use crate::examine::{Compared, Comparison};
pub use crate::finding::{Finding, Kind, SideInfo};
pub use crate::listing::Line;
pub use crate::memory::{PageDifference, TableEntry};
pub use crate::replica::{Depth, Look};
pub use crate::search::{BisectError, Unwatched, Watch};
pub use crate::side::Side;
pub use crate::state_rows::{Row, cpu_rows, other_rows};

use crate::examine::Examiner;
use crate::input::{InputDifference, TypedDifference};

/// What is known before machines are compared.
#[derive(Clone, Debug)]
pub struct Question<'a> {
    /// Where the replays begin, behind as many instructions.
    pub starts: [Start; 2],
    /// The tick behind which nothing is compared, of either clock.
    pub until: u64,
    /// The first input that differs: before its tick the machines cannot differ, if their clocks are one.
    pub input: Option<&'a InputDifference>,
    /// The first byte that was typed otherwise.
    pub typed: Option<&'a TypedDifference>,
    /// Names for addresses.
    pub symbols: Arc<Symbols>,
}

/// Finds the first instruction after which two replays differ.
///
/// # Errors
/// A recording cannot be used, an engine fails, or somebody asked to stop.
pub fn compare(
    sides: &[Side<'_>; 2],
    question: &Question<'_>,
    watch: &mut dyn Watch,
) -> Result<Compared, BisectError> {
    Examiner::new(sides, question, watch).compare()
}

/// The fields of two recordings' headers that decide what the machine is, as far as they differ. When
/// its real-time clock was set to is not among them: any two recordings differ in that.
pub fn machine_differences(sides: &[Side<'_>; 2]) -> Vec<String> {
    differing_fields(
        sides,
        &[
            "machine.ram_mib",
            "cpu_model.name",
            "cpu_model.version",
            "guest.name",
            "guest.command_line",
            "guest.images",
        ],
    )
}

/// The same of the fields that decide how virtual time follows what the guest does. Ticks and time of two
/// recordings that differ in one cannot be compared; what the guest executes can.
pub fn clock_differences(sides: &[Side<'_>; 2]) -> Vec<String> {
    differing_fields(sides, &["tick_kind", "ns_per_tick"])
}

fn differing_fields(sides: &[Side<'_>; 2], deciding: &[&str]) -> Vec<String> {
    let [a, b] = [0, 1].map(|side: usize| sides[side].replayable().recording().header());
    let all = header_differences(a, b).into_iter().map(|found| found.field);
    all.filter(|field| deciding.contains(field)).map(str::to_owned).collect()
}

/// The last place at which two recordings of one machine are known to be alike without replaying
/// either: their last checkpoints at one tick with one digest, or the start of the run. At or before
/// `tick`.
pub fn common_start(sides: &[Side<'_>; 2], tick: u64) -> [Start; 2] {
    let [one, other] = [0, 1].map(|side: usize| sides[side].replayable().checkpoints());
    let usable = |side: usize, index: usize| sides[side].replayable().begins_on_soft(index);
    for (index, a) in one.iter().enumerate().rev() {
        if a.moment.tick > tick || !usable(0, index) {
            continue;
        }
        let same = |b: &&reprise_trace::checkpoint::CheckpointInfo| {
            let (x, y) = (a.digest, b.digest);
            // The rest holds the last record, which may be a mark.
            a.moment == b.moment
                && (x.cpu, x.devices, x.ram, x.engine) == (y.cpu, y.devices, y.ram, y.engine)
        };
        let found = other.iter().position(|b| same(&b));
        if let Some(other_index) = found.filter(|found| usable(1, *found)) {
            return [Start::Checkpoint(index), Start::Checkpoint(other_index)];
        }
    }
    [Start::Run, Start::Run]
}
