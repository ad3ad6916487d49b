//! A recording in pieces, from checkpoint to checkpoint: expanded on several threads, joined in order.
//!
//! Each piece is a machine's work from one checkpoint to the next, whose digest it must then have, so that
//! every expansion verifies itself. Segments of a trace need no other, so the trace is the same however
//! many threads there are.

use std::collections::VecDeque;
use std::io::Write;
use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread;

use reprise_cpu::engine::SoftEngine;
use reprise_cpu::latitude_sites::Sites;
use reprise_machine::engine::Engine;
use reprise_machine::inputs::Replaying;
use reprise_machine::lawful::SetAside;
use reprise_machine::machine::Machine;
use reprise_machine::outcome::{Conclusion, MachineError, Outcome};
use reprise_replay::{OnSoftware, RecordedClock, Replayable, Start, meet_checkpoint, verification};
use reprise_trace::instructions::filter::{Filter, LeftOut, Selection};
use reprise_trace::instructions::{
    Contents, EncodedSegment, Event, Observer, SegmentOptions, SegmentWriter, TraceError,
    TraceWriter, register,
};

use crate::{Control, ExpandError, Expanded, Threads, Window, expand};

/// Segments of one piece that may wait for their turn: some hundred MiB at most, and more instructions
/// than lie between two checkpoints as `record` makes them.
const WAITING_SEGMENTS: usize = 48;

/// What to expand, and how.
pub struct Plan<'a> {
    /// The recording.
    pub replayable: &'a Replayable,
    /// Which part of it.
    pub window: Window,
    /// What the trace has beside instructions and linear addresses.
    pub contents: Contents,
    /// What of that to keep.
    pub selection: Selection,
    /// Threads that expand, at least 1.
    pub jobs: usize,
    /// Makes the software CPU as it is to run.
    pub set_up: &'a (dyn Fn(&mut SoftEngine) + Sync),
}

/// What an expansion in pieces came to.
#[derive(Debug, Default)]
pub struct Pieces {
    /// Instructions expanded.
    pub instructions: u64,
    /// What the filter left out.
    pub left_out: LeftOut,
    /// Where it ended; `None` if it was stopped before.
    pub outcome: Option<Outcome>,
    /// Checkpoints at which the machine was as they say.
    pub checkpoints_verified: u64,
    /// What the comparison with the recording left out.
    pub set_aside: Vec<SetAside>,
    /// Instructions in the code that ran whose results CPUs of other makers may have otherwise.
    pub latitude_sites: Vec<Sites>,
}

/// The window's pieces: each ends at a checkpoint, or with the window.
pub fn pieces(replayable: &Replayable, window: Window) -> Vec<Window> {
    let ticks = replayable.on_soft().map(|info| info.moment.tick);
    let within = ticks.filter(|tick| (window.from + 1..window.to).contains(tick));
    let bounds: Vec<u64> = [window.from].into_iter().chain(within).chain([window.to]).collect();
    bounds.windows(2).map(|bounds| Window { from: bounds[0], to: bounds[1] }).collect()
}

/// Which of `count` pieces the share `number` (from 1) of `shares` has.
pub fn share(count: usize, number: u32, shares: u32) -> Range<usize> {
    let bound = |number: u32| (count as u64 * u64::from(number) / u64::from(shares)) as usize;
    bound(number - 1)..bound(number)
}

/// What a worker tells of its piece.
enum Message {
    Segment(EncodedSegment),
    Done(Box<Done>),
    Failed(ExpandError),
}

/// What one of the pieces came to.
struct Done {
    expanded: Expanded<LeftOut>,
    /// The machine is as the checkpoint at the piece's end says.
    verified: bool,
    /// What was left out of that comparison.
    set_aside: Vec<SetAside>,
    latitude_sites: Vec<Sites>,
}

impl Plan<'_> {
    /// Writes the native trace of the window.
    ///
    /// # Errors
    /// If the recording or a checkpoint cannot be used, the replay does not come to a checkpoint's state
    /// or diverges, or the trace cannot be written.
    pub fn write<W: Write>(
        &self,
        writer: &mut TraceWriter<W>,
        control: &Control,
    ) -> Result<Pieces, ExpandError> {
        let pieces = pieces(self.replayable, self.window);
        let jobs = self.jobs.clamp(1, pieces.len());
        // A single piece can still have its writer on a thread of its own.
        let threads = if jobs < self.jobs { Threads::Two } else { Threads::One };
        let (senders, receivers): (Vec<_>, Vec<_>) =
            pieces.iter().map(|_| sync_channel(WAITING_SEGMENTS)).unzip();
        // Whoever takes a piece takes its sender, which goes with a worker that panics.
        let left = Mutex::new(pieces.into_iter().zip(senders).collect());
        thread::scope(|scope| {
            for _ in 0..jobs {
                scope.spawn(|| Worker { plan: self, threads, control, machine: None }.work(&left));
            }
            // Dropping the receivers ends workers that still have something to say.
            let collected = collect(receivers, writer);
            if !matches!(&collected, Ok(Pieces { outcome: Some(_), .. })) {
                control.stop();
            }
            collected
        })
    }
}

/// Joins the pieces as they come, in order.
fn collect<W: Write>(
    receivers: Vec<Receiver<Message>>,
    writer: &mut TraceWriter<W>,
) -> Result<Pieces, ExpandError> {
    let mut all = Pieces::default();
    for receiver in receivers {
        loop {
            match receiver.recv() {
                Ok(Message::Segment(segment)) => writer.append_segment(&segment)?,
                // Stopped between two pieces: what is before is whole.
                Ok(Message::Failed(ExpandError::StoppedBefore)) if all.instructions > 0 => {
                    return Ok(Pieces { outcome: None, ..all });
                }
                Ok(Message::Failed(error)) => return Err(error),
                Ok(Message::Done(done)) => {
                    let Done { expanded, verified, set_aside, latitude_sites } = *done;
                    Sites::merge(&mut all.latitude_sites, latitude_sites);
                    all.instructions += expanded.instructions;
                    all.left_out.add(expanded.observer);
                    all.checkpoints_verified += u64::from(verified);
                    let mut outcome = expanded.outcome;
                    let before = all.outcome.take().and_then(|outcome| outcome.verified_until);
                    if let Some(outcome) = &mut outcome {
                        // A checkpoint that is met is more than a record.
                        let met = verified.then_some(outcome.moment);
                        outcome.verified_until = outcome.verified_until.max(before).max(met);
                    }
                    let left_out = outcome.iter().flat_map(|outcome| &outcome.set_aside);
                    let left_out = left_out.chain(&set_aside);
                    left_out.for_each(|more| SetAside::add(&mut all.set_aside, *more));
                    all.outcome = outcome;
                    break;
                }
                // The worker ended without a word: it panicked, which the scope tells.
                Err(_) => return Ok(Pieces { outcome: None, ..all }),
            }
        }
        if !came_to_its_end(all.outcome.as_ref()) {
            break;
        }
    }
    Ok(all)
}

/// Whether a piece ended where it was to end, and not where the run did.
fn came_to_its_end(outcome: Option<&Outcome>) -> bool {
    matches!(outcome, Some(Outcome { conclusion: Conclusion::TargetReached, .. }))
}

/// Pieces that nobody has taken yet, in order.
type Left = VecDeque<(Window, SyncSender<Message>)>;

struct Worker<'a> {
    plan: &'a Plan<'a>,
    threads: Threads,
    control: &'a Control,
    /// The machine that stands at the end of the last piece.
    machine: Option<Machine<RecordedClock, Replaying>>,
}

impl Worker<'_> {
    /// Expands piece after piece, as long as there are any.
    fn work(mut self, left: &Mutex<Left>) {
        let take = || left.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        while let Some((piece, sender)) = take() {
            if self.control.is_stopped() {
                let _ = sender.send(Message::Failed(ExpandError::StoppedBefore));
                break;
            }
            let message = self.expand(piece, &sender).unwrap_or_else(Message::Failed);
            // If nobody listens any more, whoever did knows why.
            if sender.send(message).is_err() {
                break;
            }
        }
        // Its memory goes with the process, which takes less time.
        std::mem::forget(self.machine);
    }

    fn expand(
        &mut self,
        piece: Window,
        sender: &SyncSender<Message>,
    ) -> Result<Message, ExpandError> {
        let mut machine = self.machine_at(piece.from)?;
        let sender = sender.clone();
        let hand_on = move |segment| {
            let gone = TraceError::Contract("nobody joins the trace's pieces any more");
            sender.send(Message::Segment(segment)).map_err(|_| gone)
        };
        let writer = SegmentWriter::new(self.plan.contents, SegmentOptions::default(), hand_on)?;
        let filter = Filter::new(self.plan.selection.clone(), writer);
        let expanded =
            expand(&mut machine, piece, filter, self.plan.contents, self.threads, self.control)?;
        if let Some(Outcome { conclusion: Conclusion::Diverged(divergence), .. }) =
            &expanded.outcome
        {
            return Err(ExpandError::Diverged {
                tick: divergence.moment.tick,
                what: divergence.difference.to_string(),
            });
        }
        // A run that ends at a checkpoint's tick has gone past the checkpoint.
        let met = match came_to_its_end(expanded.outcome.as_ref()) {
            true => self.verify(&mut machine)?,
            false => None,
        };
        let (verified, set_aside) = (met.is_some(), met.unwrap_or_default());
        let latitude_sites = machine.engine().software().latitude_sites();
        let Expanded { mut observer, outcome, instructions } = expanded;
        if !set_aside.is_empty() && self.plan.contents.registers {
            // Flags are the checkpoint's from here on, which no instruction made them.
            let state = machine.engine().cpu_state().map_err(MachineError::from)?;
            let value = [state.rflags, 0];
            observer.event(&Event::Register { register: register::RFLAGS, value })?;
            observer.end()?;
        }
        self.machine = Some(machine);
        let observer = observer.left_out();
        let expanded = Expanded { observer, outcome, instructions };
        Ok(Message::Done(Box::new(Done { expanded, verified, set_aside, latitude_sites })))
    }

    /// Compares the machine with the checkpoint that it stands at, if there is one. Gives what was set aside.
    fn verify(
        &self,
        machine: &mut Machine<RecordedClock, Replaying>,
    ) -> Result<Option<Vec<SetAside>>, ExpandError> {
        let tick = machine.engine().tick();
        let mut checkpoints = self.plan.replayable.on_soft();
        let Some(info) = checkpoints.find(|info| info.moment.tick == tick) else {
            return Ok(None);
        };
        let replayable = self.plan.replayable;
        let verification =
            verification(replayable.recording().header(), replayable.course(), "soft");
        let met = meet_checkpoint(machine, info, verification)?;
        match met.difference {
            None => Ok(Some(met.set_aside)),
            Some(what) => Err(ExpandError::Checkpoint { tick, what }),
        }
    }

    /// A machine that stands at `tick`, or at the checkpoint before it.
    fn machine_at(&mut self, tick: u64) -> Result<Machine<RecordedClock, Replaying>, ExpandError> {
        if let Some(machine) = self.machine.take_if(|machine| machine.engine().tick() == tick) {
            return Ok(machine);
        }
        // Its memory is given back first: two guests' RAM is a thread's worth too much.
        drop(self.machine.take());
        let replayable = self.plan.replayable;
        start(replayable, replayable.nearest(tick), self.plan.set_up)
    }
}

/// A replaying machine on the software CPU.
///
/// # Errors
/// If the recording or the checkpoint cannot be used.
pub fn start(
    replayable: &Replayable,
    at: Start,
    set_up: &dyn Fn(&mut SoftEngine),
) -> Result<Machine<RecordedClock, Replaying>, ExpandError> {
    let beginning = replayable.begin(at)?;
    let header = &replayable.recording().header().of_stretch(beginning.stretch());
    let verification = verification(replayable.recording().header(), replayable.course(), "soft");
    let make = |ram| {
        let mut engine = RecordedClock::new(ram, header)?;
        set_up(engine.software());
        Ok(engine)
    };
    Ok(beginning.into_machine(make, |inputs| inputs.verifying(verification))?)
}
