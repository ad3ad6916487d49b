//! Expansion: a replay on the software CPU whose every instruction goes to an observer.
//!
//! [`expand`] runs a replaying machine through a window of its recording and shows an
//! [`Observer`](reprise_trace::instructions::Observer) all that it executes: on a thread of its own, so
//! that two cores share the work, or on the machine's. Exporters, statistics and the native format's
//! writer are observers, and so is whatever a user writes: see the example `cache_simulator`.

mod approach;
mod counting;
pub mod pieces;
mod pipeline;
pub mod resimulate;

use reprise_machine::engine::Engine;
use reprise_machine::inputs::Inputs;
use reprise_machine::machine::Machine;
use reprise_machine::outcome::{MachineError, Outcome};
use reprise_replay::{OnSoftware, ReplayError};
use reprise_trace::instructions::{Contents, Observer, TraceError};

pub use approach::{Towards, approach};
pub use counting::Counting;
pub use pipeline::{Control, Threads};

/// Why an expansion came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum ExpandError {
    /// The observer failed, or the trace cannot be written.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// The replay failed.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// There is no machine to begin with.
    #[error(transparent)]
    Replay(#[from] ReplayError),
    /// It was told to stop on the way to the window.
    #[error("stopped before the window began, so there is no trace: expand again")]
    StoppedBefore,
    /// The replay is not the recorded run.
    #[error(
        "the replay differs from the recording at tick {tick} in {what}: `reprise replay` tells more"
    )]
    Diverged {
        /// Where.
        tick: u64,
        /// In what.
        what: String,
    },
    /// The replay does not come to a checkpoint's state.
    #[error(
        "at tick {tick} the replay is not as the checkpoint there says, in {what}: remove the file of \
         checkpoints and run `reprise checkpoint`, and report this if it happens again"
    )]
    Checkpoint {
        /// Where.
        tick: u64,
        /// In what.
        what: String,
    },
}

/// What an expansion came to.
#[derive(Debug)]
pub struct Expanded<O> {
    /// The observer, which has seen the trace's end.
    pub observer: O,
    /// What the replay came to; `None` if it was told to stop before.
    pub outcome: Option<Outcome>,
    /// Instructions seen.
    pub instructions: u64,
}

/// Which part of the recording to expand, in ticks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Nothing before this tick is shown.
    pub from: u64,
    /// The expansion ends at the first boundary at or behind this tick.
    pub to: u64,
}

impl Default for Window {
    fn default() -> Self {
        Self { from: 0, to: u64::MAX }
    }
}

/// Replays `machine` through `window` and shows `observer` what it executes.
///
/// The machine may stand anywhere before the window: what is on the way there is replayed without a
/// trace. A window that begins amid a stretch without boundaries begins at the next one.
///
/// # Errors
/// If the replay or the observer fails. A divergence is an outcome.
pub fn expand<O, E, I>(
    machine: &mut Machine<E, I>,
    window: Window,
    mut observer: O,
    contents: Contents,
    threads: Threads,
    control: &Control,
) -> Result<Expanded<O>, ExpandError>
where
    O: Observer + Send + 'static,
    E: OnSoftware,
    I: Inputs,
{
    if machine.engine().tick() < window.from {
        let outcome = approach(machine, Towards::Tick(window.from), control)?;
        if outcome.ticks < window.from {
            observer.begin(&machine.engine().software().trace_position())?;
            observer.end()?;
            return Ok(Expanded { observer, outcome: Some(outcome), instructions: 0 });
        }
    }
    let first = machine.engine().software().tick();
    observer.begin(&machine.engine().software().trace_position())?;
    let (sink, receiver) = pipeline::lay(observer, contents, threads, control, first)?;
    machine.engine().software().start_trace(sink, contents);
    let outcome = machine.run_until(window.to);
    machine.engine().software().stop_trace();
    let observer = receiver.finish()?;
    let instructions = machine.engine().software().tick() - first;
    let outcome = match outcome {
        Ok(outcome) => Some(outcome),
        Err(_) if control.is_stopped() => None,
        Err(error) => return Err(error.into()),
    };
    Ok(Expanded { observer, outcome, instructions })
}
