//! What can be said of one recording whose replay diverges.
//!
//! The recorded machine is known at its records, each of which has a digest of the CPU, and at the
//! checkpoints that were taken while recording, which hold all of it. In between only the replay's own
//! side can be looked at. So the divergence is narrowed to the interval between the last moment that
//! agreed and the first that did not; the replay shows what ran there; and the two ways in which the
//! software CPU can execute it are compared with each other.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use reprise_cpu::translate::Translation;
use reprise_export::symbols::Symbols;
use reprise_machine::engine::Engine;
use reprise_machine::inputs::Replaying;
use reprise_machine::machine::Machine;
use reprise_machine::outcome::{Conclusion, Outcome};
use reprise_replay::{
    Met, RecordedClock, ReplayError, Replayable, Start, meet_checkpoint, verification,
};
use reprise_trace::checkpoint::CheckpointInfo;
use reprise_trace::event::Record;
use reprise_trace::moment::TickKind;
use serde::Serialize;

use crate::early_bit::{self, EarlyBit, Parting};
use crate::examine::{Compared, Examiner};
use crate::finding::Finding;
use crate::place::{Elsewhere, Surveyed, survey};
use crate::ran::{APPROXIMATE_RESULT, FlagWriter, PROCESSOR_ASKED, TIME_STAMP_READ};
use crate::search::{BisectError, SLICE_TICKS, Watch};
use crate::side::Side;
use crate::state_rows::flag_names;
use crate::{Cause, Question, ran};

/// Where a replay parts from its recording, as closely as that is known.
#[derive(Clone, Debug, Serialize)]
pub struct Interval {
    /// The divergence; `None` if there was none.
    pub divergence: Option<String>,
    /// The last record at which the CPU was as recorded; `None` if there is none before.
    pub agreed: Option<Place>,
    /// The machines part behind this tick...
    pub from: u64,
    /// ...and at this one at the latest.
    pub to: u64,
    /// Recorded checkpoints that the replay was compared with.
    pub checkpoints: Vec<Checked>,
    /// How the replay differs from the first checkpoint that it is not like.
    pub at_checkpoint: Option<Box<Finding>>,
    /// What ran in the interval, on the replay's side.
    pub ran: ran::Ran,
    /// What the surroundings of the divergence tell.
    pub around: Surveyed,
    /// The accessed bit with which, set early, the replay is as recorded.
    pub early_bit: Option<EarlyBit>,
    /// Translated and interpreted execution of the interval, compared.
    pub engines: Option<Compared>,
    /// The likely causes, the most telling first.
    pub causes: Vec<Cause>,
}

/// A record that agreed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    /// Its number in the log, from 0.
    pub record: u64,
    /// Its tick.
    pub tick: u64,
}

/// A recorded checkpoint that the replay came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Checked {
    /// Its tick.
    pub tick: u64,
    /// In what the replay differs from it.
    pub differs_in: Option<String>,
    /// What was not compared, because hardware may lawfully differ there.
    pub set_aside: Vec<String>,
}

/// What the replay came to.
struct Replayed {
    outcome: Outcome,
    agreed: Option<Place>,
    checkpoints: Vec<Checked>,
}

/// Narrows a divergence. What comes out without one says so.
///
/// # Errors
/// The recording cannot be used, an engine fails, or somebody asked to stop.
pub fn narrow(
    replayable: &Replayable,
    symbols: &Arc<Symbols>,
    watch: &mut dyn Watch,
) -> Result<Interval, BisectError> {
    let Replayed { outcome, agreed, checkpoints } = replay(replayable, watch)?;
    let divergence = match &outcome.conclusion {
        Conclusion::Diverged(divergence) => Some(divergence.to_string()),
        _ => None,
    };
    let unlike = checkpoints.iter().position(|checked| checked.differs_in.is_some());
    let last_alike = unlike.unwrap_or(checkpoints.len()).checked_sub(1);
    let alike_tick = last_alike.map_or(0, |index| checkpoints[index].tick);
    let unlike_tick = unlike.map(|index| checkpoints[index].tick);
    let to = unlike_tick.map_or(outcome.ticks, |tick| tick.min(outcome.ticks));
    // Where RAM was other already the CPU may have agreed for long.
    let from = match agreed {
        Some(Place { tick, .. }) if tick <= to => alike_tick.max(tick),
        _ => alike_tick,
    };
    let numbers: Vec<usize> = own_checkpoints(replayable).map(|(number, _)| number).collect();
    let last_alike = last_alike.map(|index| numbers[index]);
    let at_checkpoint = match unlike.map(|index| numbers[index]) {
        Some(index) => {
            Some(Box::new(at_checkpoint(replayable, (last_alike, index), symbols, watch)?))
        }
        None => None,
    };
    let start = last_alike.map_or(Start::Run, Start::Checkpoint);
    let parted = divergence.is_some() || unlike.is_some();
    // Of another clock's last tick all is looked at that ran before the divergence.
    let whole = Counts::of(replayable) == Counts::Instructions || unlike.is_some();
    let end = if whole { to } else { to.saturating_add(1) };
    let ran = match parted {
        true => ran::between(replayable, start, (from, end), symbols, watch)?,
        false => ran::Ran::default(),
    };
    let around = match divergence.is_some() {
        true => survey(replayable, start, symbols, watch)?,
        false => Surveyed::default(),
    };
    let early_bit = match &outcome.conclusion {
        Conclusion::Diverged(divergence) if is_of_hardware(replayable) && !around.explains() => {
            let (between, record_tick) = ((from, end), divergence.moment.tick);
            let agreed = agreed.map_or(0, |place| place.record + 1);
            let parting = Parting { start, between, record_tick, agreed };
            early_bit::find(replayable, &parting, symbols, watch)?
        }
        _ => None,
    };
    let engines = match parted {
        true => Some(engines(replayable, start, end, symbols, watch)?),
        false => None,
    };
    let mut interval = Interval {
        divergence,
        agreed,
        from,
        to,
        checkpoints,
        at_checkpoint,
        ran,
        around,
        early_bit,
        engines,
        causes: Vec::new(),
    };
    interval.causes = causes(&interval, replayable);
    Ok(interval)
}

/// Replays from the start to the divergence, and compares with each checkpoint on the way.
fn replay(replayable: &Replayable, watch: &mut dyn Watch) -> Result<Replayed, BisectError> {
    let recording = replayable.recording();
    let agreed = Rc::new(RefCell::new(None));
    let (into, mut number) = (agreed.clone(), 0);
    let observe = |inputs: Replaying| {
        inputs.on_record(move |record: &Record| {
            let tick = record.moment.tick;
            *into.borrow_mut() = Some(Place { record: number, tick });
            number += 1;
        })
    };
    let mut machine = replayable.soft_machine_with(Start::Run, observe)?;
    let last = recording.summary().last_moment.map_or(0, |moment| moment.tick);
    let verification = verification(recording.header(), replayable.course(), "soft");
    let mut checkpoints = Vec::new();
    // What KVM's checkpoints say of a TLB and of instructions, the software CPU cannot be compared with.
    for (_, info) in own_checkpoints(replayable) {
        let tick = info.moment.tick;
        if let Some(outcome) = advance(&mut machine, tick, last, watch)? {
            return Ok(Replayed { outcome, agreed: *agreed.borrow(), checkpoints });
        }
        let met = match meet_checkpoint(&mut machine, info, verification) {
            // Checkpoints are of machines that are awake.
            Err(ReplayError::NotConsistent { .. }) => {
                Met { difference: Some("position".to_owned()), ..Met::default() }
            }
            met => met?,
        };
        let unlike = met.difference.is_some();
        let set_aside = met.set_aside.iter().map(|aside| aside.what.to_string()).collect();
        checkpoints.push(Checked { tick, differs_in: met.difference, set_aside });
        if unlike {
            break;
        }
    }
    match advance(&mut machine, u64::MAX, last, watch)? {
        Some(outcome) => Ok(Replayed { outcome, agreed: *agreed.borrow(), checkpoints }),
        // Nothing runs that long.
        None => unreachable!("no log reaches the last tick of all"),
    }
}

/// The recording's checkpoints at which the software CPU can begin, each with its number.
fn own_checkpoints(replayable: &Replayable) -> impl Iterator<Item = (usize, &CheckpointInfo)> {
    let all = replayable.checkpoints().iter().enumerate();
    all.filter(|(index, _)| replayable.begins_on_soft(*index))
}

/// Goes to a tick, in slices. What ended the replay before, if anything did.
pub(crate) fn advance(
    machine: &mut Machine<RecordedClock, Replaying>,
    tick: u64,
    last: u64,
    watch: &mut dyn Watch,
) -> Result<Option<Outcome>, BisectError> {
    loop {
        let here = machine.engine().tick();
        if here >= tick {
            return Ok(None);
        }
        let over = machine.advance_to(tick.min(here.saturating_add(SLICE_TICKS)))?;
        watch.progress(0, machine.engine().tick(), last);
        if over.is_some() {
            return Ok(over);
        }
        if watch.is_stopped() {
            return Err(BisectError::StoppedAlone);
        }
    }
}

/// How the replay, which starts at the checkpoint before, differs from a recorded checkpoint.
fn at_checkpoint(
    replayable: &Replayable,
    (before, index): (Option<usize>, usize),
    symbols: &Arc<Symbols>,
    watch: &mut dyn Watch,
) -> Result<Finding, BisectError> {
    let before = before.map_or(Start::Run, Start::Checkpoint);
    let sides = [
        Side::soft("recorded", replayable, Translation::default()),
        Side::soft("replayed", replayable, Translation::default()),
    ];
    let question = Question {
        starts: [Start::Checkpoint(index), before],
        until: 0,
        input: None,
        typed: None,
        symbols: symbols.clone(),
    };
    let tick = replayable.checkpoints()[index].moment.tick;
    Examiner::new(&sides, &question, watch).at(tick)
}

/// Compares the two ways in which the software CPU executes.
fn engines(
    replayable: &Replayable,
    start: Start,
    until: u64,
    symbols: &Arc<Symbols>,
    watch: &mut dyn Watch,
) -> Result<Compared, BisectError> {
    let sides = [
        Side::soft("translated", replayable, Translation::default()),
        Side::soft("interpreted", replayable, Translation::Never),
    ];
    let symbols = symbols.clone();
    let question = Question { starts: [start; 2], until, input: None, typed: None, symbols };
    crate::compare(&sides, &question, watch)
}

type Test = fn(&Interval, &Replayable) -> Option<String>;

/// A row a cause, the most telling first: its name, the test that gives it in words, and what to do next.
const CAUSES: [(&str, Test, &str); 10] = [
    (
        "engine",
        |interval, _| {
            let finding = interval.engines.as_ref()?.finding.as_ref()?;
            Some(format!(
                "translated and interpreted execution part, so one of them is wrong: {}",
                finding.headline()
            ))
        },
        "keep the recording, and report this; `--no-translate` avoids one of the two",
    ),
    (
        "checkpoint-altered",
        |interval, _| {
            let unlike =
                interval.checkpoints.iter().find(|checked| checked.differs_in.is_some())?;
            let later = interval.agreed.is_some_and(|agreed| agreed.tick > unlike.tick);
            (interval.divergence.is_none() || later).then(|| {
                format!(
                    "the log agrees beyond tick {}, and only the checkpoint there does not: it was \
                     altered, or taken by a faulty build",
                    unlike.tick
                )
            })
        },
        "remove the file of checkpoints beside the recording, and run `reprise checkpoint`",
    ),
    (
        "skid",
        |interval, _| {
            let Elsewhere { recorded_tick, tick, distance, .. } = interval.around.elsewhere?;
            let (count, which) = match distance {
                0 => (0, "from"),
                ..0 => (distance.unsigned_abs(), "before"),
                _ => (distance.unsigned_abs(), "behind"),
            };
            Some(format!(
                "the CPU is as recorded {count} instructions {which} the place where the replay diverged, \
                 at tick {tick}, and the record says tick {recorded_tick}: a counter counted wrongly, was \
                 passed over by its skid, or the record was altered"
            ))
        },
        "run `reprise doctor` on the host that recorded: its counter is tried there; on AMD's Zen switch \
         SpecLockMap off",
    ),
    (
        "undefined-flag",
        |interval, _| {
            let flags = interval.around.flags?;
            let names = flag_names(flags);
            let turned = |writer: &&FlagWriter| flags >> writer.bit & 1 != 0;
            let writers = interval.ran.flags.iter().filter(turned);
            let undefined: Vec<_> = writers.filter(|writer| writer.undefined).collect();
            // A defined flag among them is nothing that processors differ in.
            let all = undefined.len() == flags.count_ones() as usize;
            let writer = undefined.first().filter(|_| all)?;
            Some(format!(
                "with {names} turned the CPU is as recorded, which `{}` at instruction {} leaves undefined: \
                 processors differ in them",
                writer.line.text, writer.line.number
            ))
        },
        "lawful: replay on a processor of the kind that recorded",
    ),
    (
        "accessed-bit",
        |interval, _| {
            let EarlyBit { entry, line } = interval.early_bit.as_ref()?;
            Some(format!(
                "with the accessed bit of the page table's entry at {entry:#x} set before instruction {} reads it \
                 (`{}`), the replay is as recorded there: the processor that recorded had set it early, or one that \
                 the guest reads alike",
                line.number, line.text
            ))
        },
        "lawful on hardware, and in no log: `reprise replay --from` a checkpoint behind this place goes on",
    ),
    (
        "accessed-bit",
        |interval, _| {
            let pages = &interval.at_checkpoint.as_ref()?.memory;
            let walked = |table: &crate::TableEntry| table.only_accessed_or_dirty;
            let only = !pages.is_empty()
                && pages.iter().all(|page| page.table.as_ref().is_some_and(walked));
            only.then(|| "nothing but accessed and dirty bits of page tables differs".to_owned())
        },
        "lawful on hardware; a guest that does not read its own page tables cannot tell",
    ),
    (
        "time-stamp",
        |interval, replayable| {
            if !is_of_hardware(replayable) {
                return None;
            }
            if let Some(line) = interval.around.next.as_ref()
                && interval.around.reads_time_stamp()
            {
                return Some(format!(
                    "the guest reads the time-stamp counter at instruction {}, and the log has no answer \
                     there: hardware answered by itself, because nothing trapped it",
                    line.number
                ));
            }
            interval.ran.of_interest(TIME_STAMP_READ).map(|reads| {
                format!(
                    "the time-stamp counter is read {} times in the interval, first at instruction {}: \
                     hardware answers that without asking Reprise unless it is trapped",
                    reads.count, reads.instruction
                )
            })
        },
        "`reprise info` says which time stamps were OPEN when it was recorded: those are in no log",
    ),
    (
        "other-processor",
        |interval, replayable| {
            let found = interval.ran.of_interest(APPROXIMATE_RESULT)?;
            is_of_hardware(replayable).then(|| {
                format!(
                    "{} instructions in the interval approximate their results, in which processors differ, \
                     first instruction {}",
                    found.count, found.instruction
                )
            })
        },
        "replay on a processor of the kind that recorded (`reprise info` names it)",
    ),
    (
        "host-dependent",
        |interval, replayable| {
            let found = interval.ran.of_interest(PROCESSOR_ASKED)?;
            is_of_hardware(replayable).then(|| {
                format!(
                    "{} instructions in the interval ask the processor itself (CPUID, RDRAND and the like), \
                     first instruction {}: hardware answers unless they are trapped",
                    found.count, found.instruction
                )
            })
        },
        "`reprise info` says which of these were OPEN when it was recorded; keep the guest from asking",
    ),
    (
        "altered",
        |interval, _| {
            let alike = interval.engines.as_ref().is_some_and(|engines| engines.finding.is_none());
            (alike && interval.divergence.is_some()).then(|| {
                "translated and interpreted execution agree with each other, so the recording is what \
                 differs: it was altered, or made by another build, another processor or a faulty host"
                    .to_owned()
            })
        },
        "take another copy, and replay it with the build that recorded it",
    ),
];

/// Hardware executed the guest, or some of it.
fn is_of_hardware(replayable: &Replayable) -> bool {
    replayable.course().stretches.iter().any(|stretch| stretch.on.engine != "soft")
}

fn causes(interval: &Interval, replayable: &Replayable) -> Vec<Cause> {
    let rows = CAUSES.iter();
    let found = rows.filter_map(|(name, test, next)| {
        test(interval, replayable).map(|text| Cause { name, text, next })
    });
    found.collect()
}

/// Whether a recording's ticks are instructions all along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Counts {
    /// They are.
    Instructions,
    /// They are not, or not all along.
    Others,
}

impl Counts {
    pub(crate) fn of(replayable: &Replayable) -> Self {
        let mut stretches = replayable.course().stretches.iter();
        match stretches.all(|stretch| stretch.on.tick_kind == TickKind::Instruction) {
            true => Self::Instructions,
            false => Self::Others,
        }
    }
}
