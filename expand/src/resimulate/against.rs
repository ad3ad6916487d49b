//! A trace file re-simulated against its recording.

use std::io::Read;

use reprise_machine::engine::Engine;
use reprise_machine::inputs::Replaying;
use reprise_machine::machine::Machine;
use reprise_machine::outcome::{Conclusion, MachineError};
use reprise_machine::ram::GuestRam;
use reprise_replay::{OnSoftware, RecordedClock, ReplayError, Replayable};
use reprise_trace::cpu_state::CpuState;
use reprise_trace::instructions::register::{self, take_changes};
use reprise_trace::instructions::{Observer, TraceReader};

use super::{Counts, Mismatch, Resimulator};
use crate::ExpandError;
use crate::pieces::start;

/// What a re-simulation came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Against {
    /// What was compared and carried out.
    pub counts: Counts,
    /// Checkpoints whose RAM and CPU came out.
    pub checkpoints: u64,
    /// RAM and CPU came out as a replay has them where the trace ends.
    pub end_verified: bool,
    /// The first thing that is wrong.
    pub mismatch: Option<Mismatch>,
    /// How many things are.
    pub mismatches: u64,
}

/// Re-simulates a trace that has values, registers and physical addresses, from where it begins, at
/// `first_instruction`, to its end. `go_on` is asked after each segment, with the offset in the trace.
///
/// # Errors
/// If the recording or the trace cannot be used.
pub fn check_against<R: Read>(
    trace: &mut TraceReader<R>,
    first_instruction: u64,
    replayable: &Replayable,
    mut go_on: impl FnMut(u64) -> bool,
) -> Result<Against, ExpandError> {
    let nearest = replayable.nearest_before_instruction(first_instruction);
    let mut machine = start(replayable, nearest, &|_| {})?;
    run_to(&mut machine, first_instruction)?;
    let (ram, cpu) = copy_of(&mut machine, replayable)?;
    let mut resimulator = Resimulator::new(ram, cpu);
    let mut passed = Passed { replayable, verified: 0, failed: None };
    let ended = loop {
        let ending = trace.drive_segment(&mut resimulator)?;
        passed.look(&mut resimulator);
        if ending.is_some() || !go_on(trace.offset()) {
            break ending.is_some();
        }
    };
    if let Some(tick) = passed.failed {
        resimulator.find(|| format!("RAM or CPU is not that of the checkpoint at tick {tick}"));
    }
    resimulator.end()?;
    let mut against = Against { checkpoints: passed.verified, ..Against::default() };
    if ended && resimulator.mismatch().is_none() {
        run_to(&mut machine, resimulator.instruction())?;
        let mut differences = compare_end(&mut resimulator, &mut machine)?;
        // A fault that ends the recording retires nothing: with and without it a trace ends at one tick.
        if !differences.is_empty() && ends_here(&mut machine)? {
            differences = compare_end(&mut resimulator, &mut machine)?;
        }
        against.end_verified = differences.is_empty();
        differences.into_iter().for_each(|what| resimulator.find(|| what));
    }
    against.counts = resimulator.counts();
    if let Some((first, count)) = resimulator.mismatch() {
        (against.mismatch, against.mismatches) = (Some(first.clone()), count);
    }
    // Its memory goes with the process.
    std::mem::forget(machine);
    Ok(against)
}

/// The checkpoints that were passed.
struct Passed<'a> {
    replayable: &'a Replayable,
    verified: u64,
    /// The tick of one that did not come out.
    failed: Option<u64>,
}

impl Passed<'_> {
    /// Behind a segment: where pieces of an expansion end, checkpoints may stand.
    fn look(&mut self, resimulator: &mut Resimulator) {
        let behind = Some(resimulator.instruction_behind());
        let mut checkpoints = self.replayable.checkpoints().iter().enumerate();
        let here = |index: usize| self.replayable.instructions_before(index) == behind;
        let Some((_, info)) = checkpoints.find(|(index, _)| here(*index)) else { return };
        let tick = info.moment.tick;
        let came_out = resimulator.cpu().digest().as_bytes() == &info.digest.cpu
            && resimulator.ram_digest() == info.digest.ram;
        if came_out {
            self.verified += 1;
        }
        // A piece that ends may have one more segment, of events alone.
        if came_out && self.failed == Some(tick) {
            self.failed = None;
        } else if !came_out {
            self.failed.get_or_insert(tick);
        }
    }
}

/// Replays up to an instruction, whatever the recording's ticks are.
fn run_to(
    machine: &mut Machine<RecordedClock, Replaying>,
    instruction: u64,
) -> Result<(), ExpandError> {
    if machine.engine().software().tick() < instruction {
        advance_to_instruction(machine, instruction)?;
    }
    Ok(())
}

/// Goes on, and gives whether the recording ends before another instruction retires.
fn ends_here(machine: &mut Machine<RecordedClock, Replaying>) -> Result<bool, ExpandError> {
    let instruction = machine.engine().software().tick();
    // That the recording diverges behind the trace is no part of the trace, and hides nothing found in it.
    let over = machine.advance_to_instruction(instruction + 1)?;
    let ended = over.is_some_and(|outcome| matches!(outcome.conclusion, Conclusion::Ended(_)));
    Ok(ended && machine.engine().software().tick() == instruction)
}

/// Gives how the recording ended, if that was before.
fn advance_to_instruction(
    machine: &mut Machine<RecordedClock, Replaying>,
    instruction: u64,
) -> Result<Option<Conclusion>, ExpandError> {
    match machine.advance_to_instruction(instruction)?.map(|outcome| outcome.conclusion) {
        Some(Conclusion::Diverged(divergence)) => {
            let (tick, what) = (divergence.moment.tick, divergence.difference.to_string());
            Err(ExpandError::Diverged { tick, what })
        }
        conclusion => Ok(conclusion),
    }
}

/// The machine's RAM and CPU.
fn copy_of(
    machine: &mut Machine<RecordedClock, Replaying>,
    replayable: &Replayable,
) -> Result<(GuestRam, CpuState), ExpandError> {
    const PAGE_BYTES: usize = 4096;
    let ram_mib = replayable.recording().header().machine.ram_mib;
    let mut ram = GuestRam::new(ram_mib).map_err(ReplayError::from)?;
    let engine = machine.engine();
    engine.visit_ram(&mut |start, bytes| {
        for (address, page) in (start..).step_by(PAGE_BYTES).zip(bytes.chunks(PAGE_BYTES)) {
            // A page that is only zeros need not be touched.
            let placed = page.iter().all(|byte| *byte == 0) || ram.place(address, page);
            assert!(placed, "both machines have the same RAM");
        }
    });
    let cpu = engine.cpu_state().map_err(MachineError::from)?;
    Ok((ram, cpu))
}

/// What of the machine's registers and RAM did not come out, in words.
fn compare_end(
    resimulator: &mut Resimulator,
    machine: &mut Machine<RecordedClock, Replaying>,
) -> Result<Vec<String>, ExpandError> {
    let mut differences = Vec::new();
    let engine = machine.engine();
    let mut now = engine.cpu_state().map_err(MachineError::from)?;
    let mut then = resimulator.cpu().clone();
    let mut registers = Vec::new();
    take_changes(&mut then, &mut now, register::all(), |number, value| {
        registers.push(format!("{}={value:x?}", register::name(number).unwrap_or("unknown")));
    });
    if !registers.is_empty() {
        let registers = registers.join(", ");
        differences.push(format!("at the end the guest has {registers}"));
    }
    let mut differing = None;
    let mut note = |start: u64, one: &[u8], other: &[u8]| {
        if differing.is_none()
            && let Some(at) = one.iter().zip(other).position(|(one, other)| one != other)
        {
            differing = Some(start + at as u64);
        }
    };
    let mut buffer = Vec::new();
    let ram = resimulator.ram();
    engine.visit_ram(&mut |start, bytes| {
        buffer.resize(bytes.len(), 0);
        ram.read(start, &mut buffer);
        note(start, bytes, &buffer);
    });
    ram.visit(&mut |start, bytes| {
        buffer.resize(bytes.len(), 0);
        engine.read_ram(start, &mut buffer);
        note(start, bytes, &buffer);
    });
    if let Some(address) = differing {
        differences.push(format!("at the end the guest's RAM @{address:#x} is another"));
    }
    Ok(differences)
}
