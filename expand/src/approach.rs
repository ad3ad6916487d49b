//! The way to a window: a replay without a trace, which may be watched and stopped.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use reprise_machine::inputs::Inputs;
use reprise_machine::machine::Machine;
use reprise_machine::outcome::{MachineError, Outcome};
use reprise_machine::watch::Watch;
use reprise_replay::OnSoftware;

use crate::{Control, ExpandError};

/// How often the machine looks whether it is to go on.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// Where a replay goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Towards {
    /// The first boundary at or behind this tick.
    Tick(u64),
    /// The first boundary at or behind so many nanoseconds of virtual time.
    Time(u64),
}

/// A replay on its way, as other threads see it.
#[derive(Clone, Debug)]
pub(crate) struct Journey {
    watch: Watch,
    from: u64,
    to: Towards,
}

impl Journey {
    /// How much of it is done: from 0 to 1.
    pub(crate) fn fraction(&self) -> f64 {
        let (here, to) = match self.to {
            Towards::Tick(tick) => (self.watch.tick(), tick),
            Towards::Time(ns) => (self.watch.virtual_ns(), ns),
        };
        let done = here.saturating_sub(self.from) as f64;
        done / to.saturating_sub(self.from).max(1) as f64
    }
}

/// Replays `machine` up to a place, without a trace. [`Control::approach`] tells how far it is, and
/// [`Control::stop`] ends it.
///
/// # Errors
/// If the replay fails or is stopped: [`ExpandError::StoppedBefore`]. A divergence is an outcome.
pub fn approach<E: OnSoftware, I: Inputs>(
    machine: &mut Machine<E, I>,
    to: Towards,
    control: &Control,
) -> Result<Outcome, ExpandError> {
    let from = match to {
        Towards::Tick(_) => machine.engine().tick(),
        Towards::Time(_) => machine.engine().software().trace_position().virtual_ns(),
    };
    let watch = Watch::stopped_by(control.stop_flag());
    control.set_journey(Some(Journey { watch: watch.clone(), from, to }));
    machine.set_watch(Some(watch));
    let kick = machine.engine().kicker();
    let (over, until_over) = channel::<()>();
    let outcome = thread::scope(|scope| {
        scope.spawn(move || {
            while until_over.recv_timeout(LOOK_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                kick.kick();
            }
        });
        let outcome = match to {
            Towards::Tick(tick) => machine.run_until(tick),
            Towards::Time(ns) => machine.run_until_time(ns),
        };
        drop(over);
        outcome
    });
    machine.set_watch(None);
    control.set_journey(None);
    match outcome {
        Err(MachineError::Stopped) => Err(ExpandError::StoppedBefore),
        // It may have come there before anybody looked.
        Ok(_) if control.is_stopped() => Err(ExpandError::StoppedBefore),
        outcome => Ok(outcome?),
    }
}
