//! Looks around a divergence for the place that the record means, and for the flags in which the CPU there is
//! not as recorded.
//!
//! A record has a digest of the CPU. A counter that was late or counted wrongly leaves a record whose digest is
//! right and whose tick is not: the CPU then stands as recorded some instructions away. And of an instruction
//! that leaves flags undefined, processors make one of few states, each of which can be tried.

use std::sync::Arc;

use reprise_export::symbols::Symbols;
use reprise_machine::divergence::{Difference, Divergence};
use reprise_machine::engine::{Engine, Exit};
use reprise_machine::inputs::Replaying;
use reprise_machine::lawful::{Permitted, explained};
use reprise_machine::machine::Machine;
use reprise_machine::outcome::{Conclusion, Outcome};
use reprise_machine::ram::GuestRam;
use reprise_replay::{OnSoftware, RecordedClock, Replayable, Start};
use reprise_trace::checkpoint::PAGE_BYTES;
use reprise_trace::cpu_state::CpuState;
use reprise_trace::event::Record;
use serde::Serialize;

use crate::interval::advance;
use crate::listing::{Disassembler, Line};
use crate::search::{BisectError, SLICE, Watch};

/// Instructions looked at on either side: more than an overflow of Intel's counters is late, which is some hundred
/// conditional branches (`branch_events.rs` of `vmm/kvm`). Zen's has no bound, and may lie farther off.
const NEAR: u64 = 50_000;
/// The bits of RFLAGS that instructions leave undefined: CF, PF, AF, ZF, SF and OF.
pub(crate) const ARITHMETIC_FLAGS: [u32; 6] = [0, 2, 4, 6, 7, 11];

/// A place that is not where the record has it, and at which the CPU is as recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Elsewhere {
    /// The record's tick.
    pub recorded_tick: u64,
    /// The tick there.
    pub tick: u64,
    /// Instructions before it.
    pub instructions: u64,
    /// How many instructions it lies behind the place at which the replay diverged; before it, if negative.
    pub distance: i64,
}

/// What the surroundings of a divergence tell.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Surveyed {
    /// What the replay was about to execute where it diverged, or was amid.
    pub next: Option<Line>,
    /// The CPU is as recorded some instructions away.
    pub elsewhere: Option<Elsewhere>,
    /// The bits of RFLAGS that would have to be turned for the CPU to be as recorded.
    pub flags: Option<u64>,
}

impl Surveyed {
    /// Whether that says already why the replay diverged.
    pub(crate) fn explains(&self) -> bool {
        self.elsewhere.is_some() || self.flags.is_some() || self.reads_time_stamp()
    }

    /// Whether the replay was about to read the time-stamp counter.
    pub(crate) fn reads_time_stamp(&self) -> bool {
        self.next.as_ref().is_some_and(|line| line.text == "rdtsc")
    }
}

/// Looks around the divergence at which a replay from `start` ends.
///
/// # Errors
/// The recording cannot be used, an engine fails, there is no memory, or somebody asked to stop.
pub(crate) fn survey(
    replayable: &Replayable,
    start: Start,
    symbols: &Arc<Symbols>,
    watch: &mut dyn Watch,
) -> Result<Surveyed, BisectError> {
    let mut machine = replayable.soft_machine(start)?;
    let last = replayable.recording().summary().last_moment.map_or(0, |moment| moment.tick);
    let outcome = advance(&mut machine, u64::MAX, last, watch)?;
    let Some(Outcome { conclusion: Conclusion::Diverged(divergence), events, .. }) = outcome else {
        return Ok(Surveyed::default());
    };
    let next = Some(next_line(replayable, &mut machine, symbols)?);
    let Some(record) =
        record_at(replayable, &divergence, replayable.begin(start)?.records() + events)?
    else {
        return Ok(Surveyed { next, ..Surveyed::default() });
    };
    let end = machine.engine().instructions().unwrap_or(0);
    let flags = match divergence.difference {
        Difference::CpuState => {
            flags_that_differ(&machine.engine().cpu_state()?, record.cpu_digest)
        }
        _ => None,
    };
    let behind = match is_as_recorded(machine.engine(), &record)? {
        // The place is right, and its tick is not.
        true => Some(here(machine.engine(), &record, end)),
        false => find_behind(&mut machine, &record, end)?,
    };
    // The nearest on either side.
    let reach = behind.map_or(NEAR, |found| found.distance.unsigned_abs());
    let before = find_before(replayable, start, &record, (end, reach), watch)?;
    Ok(Surveyed { next, elsewhere: before.or(behind), flags })
}

/// The instruction at which a machine stands.
fn next_line(
    replayable: &Replayable,
    machine: &mut Machine<RecordedClock, Replaying>,
    symbols: &Arc<Symbols>,
) -> Result<Line, BisectError> {
    let mut ram = GuestRam::new(replayable.recording().header().machine.ram_mib)?;
    let engine = machine.engine();
    engine.visit_ram(&mut |start, piece| {
        for (address, page) in (start..).step_by(PAGE_BYTES).zip(piece.chunks(PAGE_BYTES)) {
            // RAM of the same size.
            let placed = ram.place(address, page);
            debug_assert!(placed, "page {address:#x} lies in RAM");
        }
    });
    let (number, cpu) = (engine.instructions().unwrap_or(0), engine.cpu_state()?);
    Ok(Disassembler::new(Arc::clone(symbols)).line(&ram, number, &cpu))
}

/// The record at which a replay diverged behind so many others, if it is one that has a digest of the CPU.
fn record_at(
    replayable: &Replayable,
    divergence: &Divergence,
    records: u64,
) -> Result<Option<Record>, BisectError> {
    let tells = matches!(
        divergence.difference,
        Difference::Rip
            | Difference::Rcx
            | Difference::CpuState
            | Difference::Passed
            | Difference::Idle
    );
    if !tells {
        return Ok(None);
    }
    let (mut log, _) =
        replayable.recording().log_behind(records).map_err(reprise_replay::ReplayError::from)?;
    let record = log.next_record().map_err(reprise_replay::ReplayError::from)?;
    let record = record.map(reprise_trace::logged::Logged::into_inner);
    Ok(record.filter(|record| record.moment == divergence.moment))
}

/// The subset of the arithmetic flags that has to be turned.
fn flags_that_differ(state: &CpuState, recorded: u64) -> Option<u64> {
    let arithmetic = ARITHMETIC_FLAGS.iter().map(|bit| 1_u64 << bit).sum();
    let permitted = Permitted { x87_last_instruction: true, undefined_flags: arithmetic };
    let turned = explained(state, recorded, permitted)?.state.rflags ^ state.rflags;
    (turned != 0).then_some(turned)
}

/// Whether the CPU is as a record has it, wherever that is.
fn is_as_recorded(engine: &mut RecordedClock, record: &Record) -> Result<bool, BisectError> {
    let moment = engine.moment()?;
    if (moment.rip, moment.rcx) != (record.moment.rip, record.moment.rcx) {
        return Ok(false);
    }
    let state = engine.cpu_state()?;
    let digest = record.cpu_digest;
    let undefined_flags = engine.undefined_flags();
    let permitted = Permitted { x87_last_instruction: true, undefined_flags };
    Ok(state.short_digest() == digest || explained(&state, digest, permitted).is_some())
}

fn here(engine: &mut RecordedClock, record: &Record, end: u64) -> Elsewhere {
    let instructions = engine.instructions().unwrap_or(0);
    let distance = instructions.wrapping_sub(end).cast_signed();
    Elsewhere { recorded_tick: record.moment.tick, tick: engine.tick(), instructions, distance }
}

/// Goes on behind the divergence, as far as the guest needs no device.
fn find_behind(
    machine: &mut Machine<RecordedClock, Replaying>,
    record: &Record,
    end: u64,
) -> Result<Option<Elsewhere>, BisectError> {
    let engine = machine.engine();
    for _ in 0..NEAR {
        if engine.cpu_state()?.halted {
            break;
        }
        let next = engine.software().tick() + 1;
        if engine.software().run(next)? != Exit::TickReached {
            break;
        }
        if is_as_recorded(engine, record)? {
            return Ok(Some(here(engine, record, end)));
        }
    }
    Ok(None)
}

/// Goes the last instructions before the divergence again, one by one.
fn find_before(
    replayable: &Replayable,
    start: Start,
    record: &Record,
    (end, reach): (u64, u64),
    watch: &mut dyn Watch,
) -> Result<Option<Elsewhere>, BisectError> {
    let mut machine = replayable.soft_machine(start)?;
    let first = machine.engine().instructions().unwrap_or(0);
    let from = end.saturating_sub(reach.min(NEAR)).max(first);
    for slice in (first..from).step_by(SLICE as usize).skip(1) {
        if machine.advance_to_instruction(slice)?.is_some() {
            return Ok(None);
        }
        watch.progress(0, machine.engine().tick(), record.moment.tick);
        if watch.is_stopped() {
            return Err(BisectError::StoppedAlone);
        }
    }
    let mut found = None;
    for instruction in from..end {
        if instruction > first && machine.advance_to_instruction(instruction)?.is_some() {
            break;
        }
        let engine = machine.engine();
        if is_as_recorded(engine, record)? {
            found = Some(here(engine, record, end));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_found_by_trying_them_and_nothing_else_is() {
        let state = CpuState { rflags: 0x246, ..CpuState::default() };
        for turned in [1, 1 << 4, 1 | 1 << 11, 1 << 2 | 1 << 6 | 1 << 7] {
            let there = CpuState { rflags: state.rflags ^ turned, ..state.clone() };
            assert_eq!(flags_that_differ(&state, there.short_digest()), Some(turned));
        }
        let other = CpuState { rip: 1, ..state.clone() };
        assert_eq!(flags_that_differ(&state, other.short_digest()), None);
        // The interrupt flag is no result of a computation.
        let shut = CpuState { rflags: state.rflags ^ 1 << 9, ..state.clone() };
        assert_eq!(flags_that_differ(&state, shut.short_digest()), None);
        assert_eq!(flags_that_differ(&state, state.short_digest()), None);
    }
}
