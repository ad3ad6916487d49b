//! From moments of the branch clock to instruction counts.
//!
//! A recording made on hardware tells a moment by branches and the CPU's state. Replayed once on the
//! undisturbed vCPU, which is the software CPU, each moment gets its instruction count; with those as
//! ticks the same records replay and expand on the soft engine, translated code and all.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::Ordering;

use reprise_branch_clock::engine::{BranchClock, Parameters};
use reprise_devices::board::Board;
use reprise_machine::clock::TimeSource;
use reprise_machine::engine::Engine;
use reprise_machine::inputs::{Replaying, Verification};
use reprise_machine::machine::Machine;
use reprise_machine::outcome::{MachineError, Outcome};
use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::CpuState;
use reprise_trace::event::Record;
use reprise_trace::log::LogReader;

use crate::disturbance::Disturbance;
use crate::vcpu::SimulatedVcpu;

/// The software CPU's counter is late by nothing; the clock wants to stop short of a tick all the same.
const EXACT_SKID: u64 = 1;

/// A recording with its moments resolved.
#[derive(Debug)]
pub struct Resolved {
    /// What the replay came to that resolved them.
    pub outcome: Outcome,
    /// The records that it agreed with, their ticks being instruction counts. A machine that replays
    /// them is one [`Machine::of_free_running_hardware`], with [`TimeSource::Host`].
    pub records: Vec<Record>,
    /// Instructions that the guest executed.
    pub instructions: u64,
}

/// Replays a recording of the branch clock on the software CPU. The guest is loaded in `ram`, and
/// `state` is its first.
///
/// # Errors
/// If the host refuses memory. A recording that the software CPU does not reproduce is no error: the
/// outcome tells.
pub fn resolve(
    ram: GuestRam,
    state: &CpuState,
    board: Board,
    log: LogReader,
    verification: Verification,
) -> Result<Resolved, MachineError> {
    let mut vcpu = SimulatedVcpu::new(ram, Disturbance::none())?;
    vcpu.hide_time_stamp_counter();
    let count = vcpu.instruction_count();
    let mut engine = BranchClock::new(vcpu, Parameters::with_skid(EXACT_SKID))?;
    engine.set_cpu_state(state)?;
    let records = Rc::new(RefCell::new(Vec::new()));
    let (into, at) = (records.clone(), count.clone());
    let inputs = Replaying::new(log).verifying(verification).on_record(move |record: &Record| {
        let mut record = record.clone();
        record.moment.tick = at.load(Ordering::Relaxed);
        into.borrow_mut().push(record);
    });
    let mut machine = Machine::new(engine, board, inputs, TimeSource::Host);
    let outcome = machine.run()?;
    let instructions = count.load(Ordering::Relaxed);
    Ok(Resolved { outcome, records: records.take(), instructions })
}
