//! Runs a replaying machine, whatever its engine: from the place asked for to the one asked for, again where the
//! engine stopped late or the guest went another way, its console and how far it is shown on the way.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use anyhow::Result;
use reprise_machine::engine::{Engine, EngineError, Kick};
use reprise_machine::inputs::{Replaying, Verification};
use reprise_machine::machine::Machine;
use reprise_machine::outcome::{Conclusion, MachineError, Outcome};
use reprise_machine::ram::GuestRam;
use reprise_replay::{Arrived, Beginning, ConsoleOnce, Replayable};
use reprise_trace::event::HandOver;

use super::replay::{At, ReplayOptions};
use super::stretches::PlanError;

/// How often a replay that is watched says how far it is.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// What drives a replaying machine, whatever its engine.
pub(super) struct Drive<'a> {
    pub(super) replayable: &'a Replayable,
    pub(super) verification: Verification,
    pub(super) by_relay: bool,
    pub(super) options: ReplayOptions,
}

/// What a replay came to.
pub(super) struct Driven<E> {
    pub(super) outcome: Result<Outcome, MachineError>,
    pub(super) wall: Duration,
    pub(super) engine: E,
    /// How often it went back to a checkpoint, because the engine stopped late.
    pub(super) times_back: u32,
    /// How often it began anew because the guest had gone another way.
    pub(super) times_parted: u32,
}

impl Drive<'_> {
    /// Makes the machine and runs it.
    pub(super) fn run<E: Engine>(
        self,
        beginning: Beginning,
        make_engine: impl Fn(&HandOver, GuestRam) -> Result<E, EngineError>,
    ) -> Result<Driven<E>> {
        let Self { replayable, verification, by_relay, options } = self;
        // Only from the place asked for on.
        let shown = Rc::new(Cell::new(options.from.is_none()));
        let once = ConsoleOnce::default();
        let console = options.console.map(|console| Rc::new(RefCell::new(console)));
        let progress = options.progress.map(|progress| Rc::new(RefCell::new(progress)));
        let mut checkpointer = options.checkpointer;
        let make = |beginning: Beginning| {
            once.begin(beginning.console_bytes());
            let beginning = if by_relay { beginning.for_relay() } else { beginning };
            let on = beginning.stretch().clone();
            let make_engine = |ram| make_engine(&on, ram);
            let mut machine = beginning.into_machine(make_engine, |inputs| {
                let mut inputs = inputs.verifying(verification);
                if let Some(console) = console.clone() {
                    let (shown, once) = (shown.clone(), once.clone());
                    inputs = inputs.on_console(move |bytes| {
                        let fresh = once.fresh(bytes);
                        // Whoever reads it may go away; the replay is worth going on with.
                        if shown.get() {
                            let _ = console.borrow_mut().write_all(fresh);
                        }
                    });
                }
                if let Some(progress) = progress.clone() {
                    inputs = inputs.on_progress(move |tick, _| (*progress.borrow_mut())(tick));
                }
                inputs
            })?;
            if let Some(checkpointer) = checkpointer.take() {
                machine.set_checkpointer(checkpointer);
            }
            Ok(machine)
        };
        // Which of two moments comes first, a tick and a time, only the run tells.
        let ends_before = Cell::new(false);
        let go = |machine: &mut Machine<E, Replaying>| {
            let kicker = progress.is_some().then(|| machine.engine().kicker());
            let _kicks = kicker.map(RegularKicks::start);
            if let Some(from) = options.from.filter(|_| !shown.get()) {
                let outcome = run_to(machine, Some(from))?;
                if !matches!(outcome.conclusion, Conclusion::TargetReached) {
                    return Ok(outcome);
                }
                shown.set(true);
                let passes = |until: At| until.is_passed(outcome.ticks, outcome.virtual_ns);
                if options.until.is_some_and(passes) {
                    ends_before.set(true);
                    return Ok(outcome);
                }
            }
            run_to(machine, options.until)
        };
        let mut wall = Duration::ZERO;
        let run = |machine: &mut Machine<E, Replaying>| {
            let started = Instant::now();
            let outcome = go(machine);
            wall += started.elapsed();
            outcome
        };
        let Arrived { machine, outcome, times_back, times_parted } =
            replayable.run_going_back(beginning, make, run)?;
        if let (Some(from), Some(until), true) = (options.from, options.until, ends_before.get()) {
            return Err(PlanError::ends_before(from, until).into());
        }
        let (engine, _, _) = machine.into_parts();
        Ok(Driven { outcome, wall, engine, times_back, times_parted })
    }
}

fn run_to<E: Engine>(
    machine: &mut Machine<E, Replaying>,
    to: Option<At>,
) -> Result<Outcome, MachineError> {
    match to {
        None => machine.run(),
        Some(At::Tick(tick)) => machine.run_until(tick),
        Some(At::Time(ns)) => machine.run_until_time(ns),
    }
}

/// Kicks an engine at regular intervals, so that the machine tells how far it is.
pub(super) struct RegularKicks {
    stop: Option<Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl RegularKicks {
    pub(super) fn start(kick: Arc<dyn Kick>) -> Self {
        let (stop, stopped) = channel::<()>();
        // Without the thread there is no progress, which is no reason not to replay.
        let thread = std::thread::Builder::new()
            .name("progress".to_owned())
            .spawn(move || {
                use std::sync::mpsc::RecvTimeoutError::Timeout;
                while stopped.recv_timeout(PROGRESS_INTERVAL) == Err(Timeout) {
                    kick.kick();
                }
            })
            .ok();
        Self { stop: Some(stop), thread }
    }
}

impl Drop for RegularKicks {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
