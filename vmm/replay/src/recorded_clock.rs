//! [`RecordedClock`]: the software CPU, counting what the recording's clock counts.
//!
//! The software CPU's own ticks are the run's instructions, whichever stretch it is in. Where a tick is an
//! instruction, the two are one number, or, behind a stretch that counted something else, differ by a constant.
//! Exits (clock `sync`) happen on it at
//! the same accesses and HLTs as on KVM, so they are counted here as they pass. Retired conditional
//! branches (clock `pmu`) it counts itself; a tick's moment is then found by stepping from the tick's first
//! place to the one where the CPU is in the recorded state. In both cases it knows the instruction count
//! beside the tick, and every record is compared where it stands: a replay resolves the recording anew
//! each time, and needs no help of an earlier one.

mod kept;

use std::sync::Arc;

use reprise_cpu::cpu::TimeStamps;
use reprise_cpu::engine::SoftEngine;
use reprise_cpu::flag_laws::FlagLaws;
use reprise_cpu::scout::Scout;
use reprise_machine::clock::TimeBase;
use reprise_machine::engine::{Access, Engine, EngineError, Exit, Kick};
use reprise_machine::inputs::Stamp;
use reprise_machine::lawful::{Permitted, explained};
use reprise_machine::ram::GuestRam;
use reprise_trace::checkpoint::{EngineState, HiddenState};
use reprise_trace::cpu_state::CpuState;
use reprise_trace::event::HandOver;
use reprise_trace::header::Header;
use reprise_trace::moment::{Moment, TickKind};

use crate::recorded_here;
use crate::software::OnSoftware;

pub use kept::kept_by_software;
pub(crate) use kept::{check_of_file, instructions_before};

/// Instructions of one tick that are looked at for a place like the recorded one: whoever recorded has stood behind
/// an exit or a branch, or watched the guest for some hundred instructions.
const MAX_SCOUTED: u64 = 2_000;
/// KVM hands over a larger access to memory that is not RAM in pieces of so many bytes, each an exit.
const LARGEST_MMIO_EXIT_BYTES: u8 = 8;

/// The software CPU under a recording's clock.
#[derive(Debug)]
pub struct RecordedClock {
    software: SoftEngine,
    /// Who went ahead of it last.
    scout: Option<Scout>,
    /// The last place, by its instruction count, behind which the stamp's exact one does not come in its tick.
    comes_not: Option<(u64, Stamp)>,
    /// What the recording says of itself.
    header: Header,
    /// Made on another CPU than this host's.
    of_other_cpu: bool,
    kind: TickKind,
    /// The software CPU's tick, and so the instructions of the run before it began, as far as that is known.
    began_at: u64,
    /// Ticks that are no instructions and no branches: exits; or finished accesses, HLTs and delivered
    /// interrupts. Where a tick is an instruction, by how many ticks are ahead of instructions, wrapping.
    events: u64,
    halted: bool,
    /// Exits that the access counts for which the machine has not finished yet.
    exits_of_access: u64,
    /// The instruction whose access was finished last has not retired.
    amid: bool,
    /// An interrupt has been delivered, and nothing executed since.
    delivered: bool,
    /// The guest stands at the first place of its tick.
    first_of_tick: bool,
    /// It is to stop before the instruction of the run that has so many before it.
    pause_at: Option<u64>,
    /// It began at a checkpoint of hardware, which does not say how many instructions lie before it.
    counts_from_checkpoint: bool,
}

impl RecordedClock {
    /// The software CPU with the clock of a recording.
    ///
    /// # Errors
    /// If the host refuses the memory for generated code.
    pub fn new(ram: GuestRam, header: &Header) -> Result<Self, EngineError> {
        let mut clock = Self {
            software: SoftEngine::new(ram)?,
            scout: None,
            comes_not: None,
            header: header.clone(),
            of_other_cpu: !recorded_here(header),
            kind: header.tick_kind,
            began_at: 0,
            events: 0,
            halted: false,
            exits_of_access: 0,
            amid: false,
            delivered: false,
            first_of_tick: true,
            pause_at: None,
            counts_from_checkpoint: false,
        };
        clock.count_what(header);
        if clock.of_other_cpu {
            follow_other_cpu(&mut clock.software, header);
        }
        Ok(clock)
    }

    /// Sets the software CPU, which has decoded nothing yet, up for what this header says.
    fn count_what(&mut self, header: &Header) {
        let software = &mut self.software;
        software.count_conditional_branches(header.tick_kind == TickKind::ConditionalBranch);
        software.set_conditional_branches(0);
        match header.shows_time_stamp_counter() {
            true => software.show_time_stamp_counter(),
            false => software.hide_time_stamp_counter(),
        }
        software.set_time_stamps(match header.tick_kind {
            _ if !header.logs_time_stamps() => TimeStamps::Computed,
            TickKind::ConditionalBranch if header.marks_time_stamps() => TimeStamps::Asked,
            TickKind::ConditionalBranch => TimeStamps::AskedThroughFault,
            TickKind::Exit => TimeStamps::Asked,
            TickKind::Instruction => TimeStamps::Computed,
        });
    }

    /// Instructions executed since this engine was made or took up a checkpoint.
    pub fn instructions_executed(&self) -> u64 {
        self.software.tick().wrapping_sub(self.began_at)
    }

    /// Lets the software CPU run up to an instruction count, and does the accounting of what it comes to.
    fn run_software(&mut self, until: u64) -> Result<Exit, EngineError> {
        if self.is_paused() {
            return Ok(Exit::Kicked);
        }
        let until = self.no_further_than(until);
        let (ticks, instructions) = (self.tick(), self.software.tick());
        let exit = self.software.run(until)?;
        self.delivered = false;
        // Behind as many branches as instructions stands whoever has just executed a branch.
        self.first_of_tick =
            exit == Exit::TickReached && self.tick() - ticks == self.software.tick() - instructions;
        match &exit {
            Exit::Access(access) => self.exits_of_access = exits_of(access),
            Exit::Halt => {
                self.halted = true;
                self.events += 1;
            }
            _ => {}
        }
        Ok(exit)
    }

    /// The software CPU's tick `until`, or the one before it at which the guest is to pause.
    fn no_further_than(&self, until: u64) -> u64 {
        self.pause_at.map_or(until, |pause| until.min(pause))
    }

    /// The software CPU's tick at a tick to come, where ticks are instructions.
    fn software_tick_at(&self, tick: u64) -> u64 {
        self.software.tick().saturating_add(tick.saturating_sub(self.tick()))
    }

    /// Runs until the next exit.
    fn run_to_exit(&mut self) -> Result<Exit, EngineError> {
        loop {
            match self.run_software(u64::MAX)? {
                // At a pause, which comes next.
                Exit::TickReached => {}
                exit => return Ok(exit),
            }
        }
    }

    /// Runs until tick `until` under the clock `pmu`: exactly, since so many branches are at least so many
    /// instructions, and what is left shrinks each time.
    fn run_branches(&mut self, until: u64) -> Result<Exit, EngineError> {
        loop {
            let left = until.saturating_sub(self.tick());
            if left == 0 && !self.amid {
                return Ok(Exit::TickReached);
            }
            let instructions = self.software.tick().saturating_add(left.max(1));
            match self.run_software(instructions)? {
                Exit::TickReached => self.amid = false,
                exit => return Ok(exit),
            }
        }
    }

    /// Whether the guest stands where `stamp` was taken.
    fn stands_at(&mut self, stamp: &Stamp) -> Result<Standing, EngineError> {
        if self.amid || self.delivered || self.moment()? != stamp.moment {
            return Ok(Standing::Elsewhere);
        }
        let state = self.cpu_state()?;
        if state.short_digest() == stamp.cpu_digest {
            return Ok(Standing::Exactly);
        }
        // Only hardware records by this clock.
        let undefined_flags = if self.of_other_cpu { self.software.undefined_flags() } else { 0 };
        let permitted = Permitted { x87_last_instruction: true, undefined_flags };
        Ok(match explained(&state, stamp.cpu_digest, permitted) {
            Some(_) => Standing::Lawfully,
            None => Standing::Elsewhere,
        })
    }
}

/// Whether a scout comes to exactly the state of `stamp` in the tick in which it stands.
fn passes(scout: &mut Scout, stamp: &Stamp) -> Result<bool, EngineError> {
    let branches = scout.conditional_branches();
    for _ in 0..MAX_SCOUTED {
        if !scout.step()? || scout.conditional_branches() != branches {
            break;
        }
        let moment = scout.moment()?;
        let is_there = (moment.rip, moment.rcx) == (stamp.moment.rip, stamp.moment.rcx);
        if is_there && scout.cpu_state()?.short_digest() == stamp.cpu_digest {
            return Ok(true);
        }
    }
    Ok(false)
}

/// How a place is like a recorded one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// Not at all.
    Elsewhere,
    /// But for what another engine or CPU may lawfully have otherwise.
    Lawfully,
    /// In everything.
    Exactly,
}

/// Has the software CPU leave undefined flags as the CPU that recorded does, if that was measured, and
/// know which are undefined.
pub fn follow_other_cpu(software: &mut SoftEngine, header: &Header) {
    software.know_undefined_flags();
    if let Some(laws) = laws_of(header) {
        software.leave_flags_by(laws);
    }
}

/// How the CPU that recorded leaves undefined flags, if that was measured.
pub fn laws_of(header: &Header) -> Option<&'static FlagLaws> {
    let host = &header.host;
    FlagLaws::of(&host.cpu_vendor, host.cpu_family, host.cpu_model)
}

/// How many exits KVM makes of an access.
fn exits_of(access: &Access) -> u64 {
    match access {
        Access::PortRead { .. } | Access::PortWrite { .. } | Access::TimeStamp => 1,
        Access::MmioRead { size, .. } | Access::MmioWrite { size, .. } => {
            u64::from(size.div_ceil(LARGEST_MMIO_EXIT_BYTES)).max(1)
        }
    }
}

impl OnSoftware for RecordedClock {
    fn software(&mut self) -> &mut SoftEngine {
        &mut self.software
    }
}

impl Engine for RecordedClock {
    fn tick_kind(&self) -> TickKind {
        self.kind
    }

    fn tick(&self) -> u64 {
        match self.kind {
            TickKind::Instruction => self.software.tick().wrapping_add(self.events),
            TickKind::Exit => self.events,
            TickKind::ConditionalBranch => self.software.conditional_branches() + self.events,
        }
    }

    fn run(&mut self, until: u64) -> Result<Exit, EngineError> {
        match self.kind {
            TickKind::Instruction if self.is_paused() => Ok(Exit::Kicked),
            TickKind::Instruction => {
                self.software.run(self.no_further_than(self.software_tick_at(until)))
            }
            _ if self.halted => Ok(Exit::Halt),
            TickKind::Exit if self.events == until => Ok(Exit::TickReached),
            TickKind::Exit => self.run_to_exit(),
            TickKind::ConditionalBranch => self.run_branches(until),
        }
    }

    fn run_to(&mut self, stamp: &Stamp) -> Result<Exit, EngineError> {
        if self.kind != TickKind::ConditionalBranch {
            return self.run(stamp.moment.tick);
        }
        if self.halted {
            return Ok(Exit::Halt);
        }
        if self.amid || self.tick() < stamp.moment.tick {
            match self.run_branches(stamp.moment.tick)? {
                Exit::TickReached => {}
                exit => return Ok(exit),
            }
        }
        // From here on one instruction at a time; a place that never comes ends with the tick.
        while self.tick() == stamp.moment.tick {
            let stands = match self.stands_at(stamp)? {
                Standing::Elsewhere => false,
                // A place that is exactly the recorded one comes before one that may be.
                Standing::Lawfully => !self.comes_exactly(stamp)?,
                Standing::Exactly => true,
            };
            if stands {
                break;
            }
            match self.run_software(self.software.tick() + 1)? {
                Exit::TickReached => {}
                exit => return Ok(exit),
            }
        }
        Ok(Exit::TickReached)
    }

    /// A copy of the CPU goes ahead to see, and takes back what it writes.
    fn comes_exactly(&mut self, stamp: &Stamp) -> Result<bool, EngineError> {
        // Whoever was led here is asked again here.
        let asked = (self.software.tick(), *stamp);
        if self.comes_not == Some(asked) {
            return Ok(false);
        }
        let Some(mut scout) = self.software.scout(self.scout.take())? else { return Ok(false) };
        // On an error it goes, and takes back as well.
        let comes = passes(&mut scout, stamp)?;
        scout.take_back();
        self.scout = Some(scout);
        self.comes_not = (!comes).then_some(asked);
        Ok(comes)
    }

    fn stands_exactly(&self) -> bool {
        // A kick of a replay only shows how far it is.
        self.kind == TickKind::Instruction
    }

    fn finish_access(&mut self, value: u128) -> Result<(), EngineError> {
        self.software.finish_access(value)?;
        self.amid = self.software.amid_instruction();
        let ticks = match self.kind {
            TickKind::Instruction => 0,
            TickKind::Exit => self.exits_of_access,
            TickKind::ConditionalBranch => u64::from(!self.amid),
        };
        self.events += ticks;
        self.first_of_tick = ticks != 0;
        Ok(())
    }

    fn amid_accesses(&mut self) -> Result<bool, EngineError> {
        Ok(self.kind == TickKind::Exit && self.amid)
    }

    fn interruptible(&mut self) -> Result<bool, EngineError> {
        Ok(!self.delivered && self.software.interruptible()?)
    }

    fn set_interrupt_request(&mut self, wanted: bool) {
        // Under a clock of exits the machine looks at each exit, and nowhere else.
        self.software.set_interrupt_request(wanted && self.kind != TickKind::Exit);
    }

    fn inject(&mut self, vector: u8) -> Result<(), EngineError> {
        self.software.inject(vector)?;
        self.halted = false;
        if self.kind != TickKind::Instruction {
            self.delivered = true;
            self.first_of_tick = false;
        }
        self.events += u64::from(self.kind == TickKind::ConditionalBranch);
        Ok(())
    }

    fn set_time_base(&mut self, base: TimeBase) {
        // Of the software CPU's own ticks, which are instructions, a base of other ticks says nothing.
        let behind = match self.kind {
            TickKind::Instruction => self.tick().saturating_sub(base.tick),
            _ => 0,
        };
        let tick = self.software.tick().saturating_sub(behind);
        self.software.set_time_base(TimeBase { tick, ..base });
    }

    fn moment(&mut self) -> Result<Moment, EngineError> {
        Ok(Moment { tick: self.tick(), ..self.software.moment()? })
    }

    fn cpu_state(&mut self) -> Result<CpuState, EngineError> {
        self.software.cpu_state()
    }

    fn set_cpu_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.halted = state.halted;
        self.software.set_cpu_state(state)
    }

    fn undefined_flags(&mut self) -> u64 {
        self.software.undefined_flags()
    }

    fn set_undefined_flags(&mut self, rflags: u64) -> Result<(), EngineError> {
        self.software.set_undefined_flags(rflags)
    }

    fn read_ram(&self, address: u64, bytes: &mut [u8]) {
        self.software.read_ram(address, bytes);
    }

    fn visit_ram(&self, visit: &mut dyn FnMut(u64, &[u8])) {
        self.software.visit_ram(visit);
    }

    fn start_capture(&mut self, visit: &mut dyn FnMut(u64, &[u8])) {
        self.software.start_capture(visit);
    }

    fn continue_capture(&mut self, max_pages: usize, visit: &mut dyn FnMut(u64, &[u8])) -> bool {
        self.software.continue_capture(max_pages, visit)
    }

    fn save(&mut self) -> Result<Option<EngineState>, EngineError> {
        self.kept_state()
    }

    fn restore(&mut self, state: &EngineState) -> Result<(), EngineError> {
        self.take_up(state)
    }

    fn become_engine(&mut self, to: &HandOver) -> Result<bool, EngineError> {
        let (tick, cpu, instructions) = (self.tick(), self.cpu_state()?, self.software.tick());
        let hands_branches = [self.kind, to.tick_kind].contains(&TickKind::ConditionalBranch);
        if hands_branches {
            // Code is decoded anew, its branches counted or no longer.
            self.software.start_over(instructions, &cpu)?;
            self.count_what(&self.header.of_stretch(to));
        } else {
            // The engine that took over there knew nothing but the state.
            let hidden = HiddenState { engine: String::new(), version: 0, bytes: Vec::new() };
            self.software.restore(&EngineState { tick: instructions, cpu, hidden })?;
        }
        self.kind = to.tick_kind;
        self.events = match self.kind {
            TickKind::Instruction => tick.wrapping_sub(instructions),
            TickKind::Exit | TickKind::ConditionalBranch => tick,
        };
        (self.amid, self.delivered, self.first_of_tick) = (false, false, true);
        Ok(true)
    }

    fn instructions(&self) -> Option<u64> {
        (!self.counts_from_checkpoint).then(|| self.software.tick())
    }

    fn pause_at(&mut self, instructions: Option<u64>) -> bool {
        if self.counts_from_checkpoint {
            return false;
        }
        self.pause_at = instructions;
        true
    }

    fn is_paused(&self) -> bool {
        // Amid an instruction it is not behind the one before any more.
        !self.amid && self.pause_at.is_some() && self.pause_at == self.instructions()
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.software.kicker()
    }
}
