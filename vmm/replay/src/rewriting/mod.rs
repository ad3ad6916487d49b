//! Recordings by instruction counts, rewritten for machines that count branches.
//!
//! A recording of the software CPU, or of KVM stepping, names its moments by instruction counts, which no
//! free-running hardware knows; and what follows from them (virtual time, and with it timers, RDTSC and
//! what devices answer) is not in its log. One replay on the software CPU tells it all. [`Rewriting`] is
//! that software CPU: it counts branches beside instructions, sees what enters and at which boundary, and
//! writes the recording that a machine with the clock `pmu` would have made of the very same run.
//!
//! - A deadline becomes a record of the time, stamped with the branch clock's moment; so does whatever the
//!   recording itself lets enter, with the time that it had.
//! - Each access to the board is an answer: the time that it found. The recorded machine's devices saw every
//!   instant, those of a `pmu` machine only what is logged.
//! - RDTSC executes on hardware without asking anybody. So a mark says where each is, whatever code it is in;
//!   the replaying machine comes to stand there, as at any record, and executes it with the logged answer.
//! - Interrupts follow, as they do in every replay.
//!
//! A recording of another CPU becomes one of this CPU: flags that its instructions leave undefined are compared and
//! set aside, and written as they are here. Where they reach memory that is not what was recorded, and refused.
//!
//! Not every boundary is one that a breakpoint and the CPU's state find again (`trail.rs`). What enters at
//! another is put before it, as long as interrupts were closed from there on, or behind it, where nobody
//! could tell. Where neither will do the recording is refused.

mod engine;
mod frames;
mod trail;

use std::cell::RefCell;
use std::io::Write;
use std::rc::Rc;

use reprise_devices::time::VirtualTime;
use reprise_host::host_info;
use reprise_machine::digest::AccessedBits;
use reprise_machine::divergence::{Difference, Divergence};
use reprise_machine::inputs::Replaying;
use reprise_machine::machine::Machine;
use reprise_machine::outcome::{Conclusion, MachineError, Outcome};
use reprise_trace::event::{Ending, Event};
use reprise_trace::header::{Header, Precaution, Treatment};
use reprise_trace::moment::TickKind;
use reprise_trace::recording::RecordingWriter;

use self::engine::Entering;
pub use self::engine::{Counts, Rewriting};
use self::frames::Frames;
use crate::beginning::{Start, recorded_here, verification};
use crate::error::ReplayError;
use crate::replayable::Replayable;

/// Why a recording is not rewritten.
#[derive(Debug, thiserror::Error)]
pub enum RewriteError {
    /// It cannot be replayed at all.
    #[error(transparent)]
    Replay(#[from] ReplayError),
    /// The engine failed, or there is a place that hardware does not find.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Its ticks are no instructions, or not all of them.
    #[error(
        "only a recording whose every tick is an instruction is rewritten for the clock pmu, and this one \
         counts otherwise: leave --clock out"
    )]
    OtherTicks,
    /// It is not what the software CPU comes to.
    #[error(
        "the software CPU does not come to what was recorded ({0}): use --engine soft to see where"
    )]
    Diverged(Divergence),
    /// But for flags that are another CPU's own, and that the guest has kept.
    #[error(
        "another CPU recorded this, and what its guest kept of flags that are undefined is not what it is \
         here ({0}): no hardware of this host can replay it, use --engine soft"
    )]
    OtherCpu(Divergence),
}

/// What was rewritten.
#[derive(Debug)]
pub struct Rewritten {
    /// What the replay of the recording came to, every record and the end compared.
    pub outcome: Outcome,
    /// What it had.
    pub counts: Counts,
    /// The last place is not one that hardware finds, so the state there will not be compared.
    pub end_is_open: bool,
}

impl Replayable {
    /// Writes to `out` the recording that a machine with the clock `pmu` would have made of the same run.
    /// `set_up` completes the inputs of the replay that this takes, and `drive` runs it, to its end.
    ///
    /// # Errors
    /// The recording is none of this kind, or cannot be rewritten; or `out` cannot be written.
    pub fn rewrite<W: Write>(
        &self,
        out: W,
        set_up: impl FnOnce(Replaying) -> Replaying,
        drive: impl FnOnce(&mut Machine<Rewriting, Replaying>) -> Result<Outcome, MachineError>,
    ) -> Result<(W, Rewritten), RewriteError> {
        let of_instructions = |stretch: &reprise_trace::stretches::Stretch| {
            stretch.on.tick_kind == TickKind::Instruction
        };
        let course = self.course();
        if course.stretches.len() != 1 || !course.stretches.iter().all(of_instructions) {
            return Err(RewriteError::OtherTicks);
        }
        let entering = Rc::new(RefCell::new(Entering::default()));
        let [records, times, console] = std::array::from_fn(|_| entering.clone());
        let header = self.recording().header();
        let beginning = self.begin(Start::Run)?;
        let mut machine = beginning.into_machine(
            |ram| {
                let mut engine = Rewriting::new(ram, entering)?;
                if !recorded_here(header) {
                    engine.know_undefined_flags();
                }
                Ok(engine)
            },
            |inputs| {
                set_up(inputs.verifying(verification(header, course, "soft")))
                    .on_record(move |record| records.borrow_mut().record(record))
                    .on_time(move |ns| times.borrow_mut().time(ns))
                    .on_console(move |bytes| console.borrow_mut().console_output(bytes))
            },
        )?;
        let outcome = drive(&mut machine)?;
        if let Conclusion::Diverged(divergence) = outcome.conclusion {
            let of_memory = divergence.difference == Difference::FinalState;
            return Err(match of_memory && !recorded_here(header) {
                true => RewriteError::OtherCpu(divergence),
                false => RewriteError::Diverged(divergence),
            });
        }
        let counts = machine.engine().counts();
        let end_is_open = end(&mut machine, &outcome)?;
        let (engine, ..) = machine.into_parts();
        let frames = engine.finish().map_err(MachineError::from)?;
        let out = self.write(out, frames, counts.time_stamps)?;
        Ok((out, Rewritten { outcome, counts, end_is_open }))
    }

    /// The rewritten recording.
    fn write<W: Write>(&self, out: W, log: Frames, time_stamps: u64) -> Result<W, ReplayError> {
        let recording = self.recording();
        let header = rewritten(recording.header(), time_stamps);
        let mut writer = RecordingWriter::create(out, &header)?;
        for index in 0..header.guest.images.len() {
            writer.write_image(index, &recording.read_image(index)?)?;
        }
        log.write(&mut writer)?;
        Ok(writer.finish()?)
    }
}

/// Writes the run's end, if it has one. Gives whether the state there is one that nobody will compare.
fn end(
    machine: &mut Machine<Rewriting, Replaying>,
    outcome: &Outcome,
) -> Result<bool, MachineError> {
    let Conclusion::Ended(ending) = &outcome.conclusion else { return Ok(false) };
    let found = machine.engine().end(*ending == Ending::Stopped)?;
    // There the last answer to RDTSC carried the devices too.
    let logged = VirtualTime::from_ns(machine.engine().logged_ns());
    machine.carry_devices(logged);
    // Hardware may set accessed bits early.
    let compared = outcome.state.is_some() && found.is_some();
    let final_digest = match compared {
        true => Some(machine.state_digest_with(AccessedBits::SetAside)?.whole()),
        false => None,
    };
    let effects = outcome.effects;
    let stamp = match found {
        Some(stamp) => stamp,
        None => machine.engine().tick_alone(),
    };
    machine.engine().append(stamp, Event::End { ending: ending.clone(), effects, final_digest })?;
    Ok(outcome.state.is_some() && found.is_none())
}

/// The header that goes with the rewritten log.
fn rewritten(header: &Header, time_stamps: u64) -> Header {
    let closed = |what: &str, how: String| Precaution {
        what: what.to_owned(),
        treatment: Treatment::Closed,
        how,
    };
    let of = format!("engine {}, clock {}", header.engine, header.clock);
    let mut precautions = vec![closed(
        Precaution::SHOWN_TIME_STAMP_COUNTER,
        format!("CPUID shows it, as in the recording that this was rewritten from ({of})"),
    )];
    if time_stamps > 0 {
        let how = format!("answered as there, {time_stamps} times");
        precautions.push(closed(Precaution::KERNEL_TIME_STAMPS, how));
        let how = "in all code; the log has a mark before each".to_owned();
        precautions.push(closed(Precaution::MARKED_TIME_STAMPS, how));
    }
    Header {
        tick_kind: TickKind::ConditionalBranch,
        ns_per_tick: 0,
        engine: "kvm".to_owned(),
        clock: "pmu".to_owned(),
        precautions,
        // Its digests are of the CPU that this replay ran on.
        host: host_info(),
        ..header.clone()
    }
}
