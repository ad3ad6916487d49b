//! [`RecordedClock`]: the software CPU, counting what the recording's clock counts.
//!
//! Where a tick is an instruction, the software CPU counts it anyway. Exits (clock `sync`) happen on it at
//! the same accesses and HLTs as on KVM, so they are counted here as they pass. Retired conditional
//! branches (clock `pmu`) it counts itself; a tick's moment is then found by stepping from the tick's first
//! place to the one where the CPU is in the recorded state. In both cases it knows the instruction count
//! beside the tick, and every record is compared where it stands: a replay resolves the recording anew
//! each time, and needs no help of an earlier one.

use std::sync::Arc;

use reprise_cpu::cpu::TimeStamps;
use reprise_cpu::engine::SoftEngine;
use reprise_cpu::flag_laws::FlagLaws;
use reprise_machine::clock::TimeBase;
use reprise_machine::engine::{Access, Engine, EngineError, Exit, Kick};
use reprise_machine::inputs::Stamp;
use reprise_machine::lawful::explained;
use reprise_machine::ram::GuestRam;
use reprise_trace::checkpoint::{EngineState, HiddenState};
use reprise_trace::cpu_state::CpuState;
use reprise_trace::event::HandOver;
use reprise_trace::header::Header;
use reprise_trace::moment::{Moment, TickKind};
use serde::{Deserialize, Serialize};

use crate::recorded_here;
use crate::software::OnSoftware;

/// The name of what [`RecordedClock`] keeps in a checkpoint, if a tick is no instruction.
const KEPT: &str = "soft, another clock";
/// Raised by any change of what the bytes mean.
const KEPT_VERSION: u32 = 1;
/// The name of what it keeps amid a tick. No file holds that: only whoever moves it by instructions can bring
/// it there again.
const KEPT_AMID: &str = "soft, amid a tick of another clock";
/// Why what was kept is refused.
const IMPOSSIBLE: &str = "the saved clock is in a state that it never reaches: take another copy";
/// KVM hands over a larger access to memory that is not RAM in pieces of so many bytes, each an exit.
const LARGEST_MMIO_EXIT_BYTES: u8 = 8;

/// The software CPU under a recording's clock.
#[derive(Debug)]
pub struct RecordedClock {
    software: SoftEngine,
    /// What the recording says of itself.
    header: Header,
    kind: TickKind,
    /// The software CPU's tick at which it began; moves where another engine's ticks go on.
    began_at: u64,
    /// Instructions of the run before it began, as far as that is known.
    instructions_before: u64,
    /// Ticks that are no instructions and no branches: exits; or finished accesses, HLTs and delivered
    /// interrupts.
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

/// What a checkpoint keeps of it.
#[derive(Serialize, Deserialize)]
struct Kept {
    instructions: u64,
    events: u64,
    software: HiddenState,
}

/// What the software CPU itself keeps, of what [`RecordedClock`] keeps in a state; anything else as it is.
pub fn kept_by_software(hidden: HiddenState) -> HiddenState {
    let kept = match hidden.engine.as_str() {
        KEPT => postcard::from_bytes::<Kept>(&hidden.bytes).ok(),
        KEPT_AMID => postcard::from_bytes::<KeptAmid>(&hidden.bytes).ok().map(|amid| amid.kept),
        _ => None,
    };
    kept.map_or(hidden, |kept| kept.software)
}

/// What is kept of it amid a tick.
#[derive(Serialize, Deserialize)]
struct KeptAmid {
    kept: Kept,
    branches: u64,
    first_of_tick: bool,
}

impl RecordedClock {
    /// The software CPU with the clock of a recording.
    ///
    /// # Errors
    /// If the host refuses the memory for generated code.
    pub fn new(ram: GuestRam, header: &Header) -> Result<Self, EngineError> {
        let mut clock = Self {
            software: SoftEngine::new(ram)?,
            header: header.clone(),
            kind: header.tick_kind,
            began_at: 0,
            instructions_before: 0,
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
        if !recorded_here(header) {
            follow_other_cpu(&mut clock.software, header);
        }
        Ok(clock)
    }

    /// Sets the software CPU, which has decoded nothing yet, up for what this header says.
    fn count_what(&mut self, header: &Header) {
        let software = &mut self.software;
        if header.tick_kind == TickKind::ConditionalBranch {
            software.count_conditional_branches();
            software.set_conditional_branches(0);
        }
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

    /// Takes up a checkpoint that the clock `pmu` made on hardware: all that has passed is branches to it.
    fn restore_of_hardware(&mut self, state: &EngineState) -> Result<(), EngineError> {
        (self.events, self.began_at) = (0, 0);
        self.counts_from_checkpoint = true;
        self.software.restore(&EngineState { tick: 0, ..state.clone() })?;
        self.software.set_conditional_branches(state.tick);
        Ok(())
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
        let tick_of = |pause: u64| self.began_at.wrapping_add(pause - self.instructions_before);
        self.pause_at.map_or(until, |pause| until.min(tick_of(pause)))
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

    /// So many instructions lie before.
    fn begin_at(&mut self, instructions: u64) {
        (self.began_at, self.instructions_before) = (instructions, instructions);
    }

    /// Takes up what was kept amid a tick.
    fn restore_amid(&mut self, state: &EngineState) -> Result<(), EngineError> {
        let impossible = || EngineError { what: IMPOSSIBLE.to_owned() };
        let kept = postcard::take_from_bytes(&state.hidden.bytes).ok();
        let (KeptAmid { kept, branches, first_of_tick }, []) = kept.ok_or_else(impossible)? else {
            return Err(impossible());
        };
        let Kept { instructions, events, software: hidden } = kept;
        let counted = match self.kind {
            TickKind::ConditionalBranch => branches,
            TickKind::Exit | TickKind::Instruction => 0,
        };
        if events.checked_add(counted) != Some(state.tick) {
            return Err(impossible());
        }
        self.begin_at(instructions);
        (self.events, self.first_of_tick) = (events, first_of_tick);
        let state = EngineState { tick: instructions, cpu: state.cpu.clone(), hidden };
        self.software.restore(&state)?;
        self.software.set_conditional_branches(branches);
        Ok(())
    }

    /// Whether the guest stands where `stamp` was taken.
    fn stands_at(&mut self, stamp: &Stamp) -> Result<bool, EngineError> {
        if self.amid || self.delivered || self.moment()? != stamp.moment {
            return Ok(false);
        }
        let state = self.cpu_state()?;
        if state.short_digest() == stamp.cpu_digest {
            return Ok(true);
        }
        let undefined_flags = self.software.undefined_flags();
        Ok(explained(&state, stamp.cpu_digest, undefined_flags).is_some())
    }
}

/// Has the software CPU leave undefined flags as the CPU that recorded does, if that was measured, and
/// know which are undefined.
pub fn follow_other_cpu(software: &mut SoftEngine, header: &Header) {
    software.know_undefined_flags();
    if let Some(laws) = FlagLaws::of(&header.host.cpu_vendor, header.host.cpu_family) {
        software.leave_flags_by(laws);
    }
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
            TickKind::Instruction => self.software.tick(),
            TickKind::Exit => self.events,
            TickKind::ConditionalBranch => self.software.conditional_branches() + self.events,
        }
    }

    fn run(&mut self, until: u64) -> Result<Exit, EngineError> {
        match self.kind {
            TickKind::Instruction if self.is_paused() => Ok(Exit::Kicked),
            TickKind::Instruction => self.software.run(self.no_further_than(until)),
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
        while self.tick() == stamp.moment.tick && !self.stands_at(stamp)? {
            match self.run_software(self.software.tick() + 1)? {
                Exit::TickReached => {}
                exit => return Ok(exit),
            }
        }
        Ok(Exit::TickReached)
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
        // The software CPU's own ticks are instructions, of which a base of other ticks says nothing.
        let tick = match self.kind {
            TickKind::Instruction => base.tick,
            _ => self.software.tick(),
        };
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
        let Some(state) = self.software.save()? else { return Ok(None) };
        if self.kind == TickKind::Instruction {
            return Ok(Some(state));
        }
        // Only the first place of a tick is found again by the tick alone.
        let found_again = self.first_of_tick && !self.counts_from_checkpoint || self.is_paused();
        if self.amid || self.delivered || !found_again {
            return Ok(None);
        }
        let EngineState { tick: instructions, cpu, hidden: software } = state;
        let kept = Kept { instructions, events: self.events, software };
        let (engine, bytes) = if self.is_paused() {
            let (branches, first_of_tick) =
                (self.software.conditional_branches(), self.first_of_tick);
            let amid = KeptAmid { kept, branches, first_of_tick };
            (KEPT_AMID, postcard::to_allocvec(&amid))
        } else {
            (KEPT, postcard::to_allocvec(&kept))
        };
        let bytes = bytes.expect("no type of it can fail to encode");
        let hidden = HiddenState { engine: engine.to_owned(), version: KEPT_VERSION, bytes };
        Ok(Some(EngineState { tick: self.tick(), cpu, hidden }))
    }

    fn restore(&mut self, state: &EngineState) -> Result<(), EngineError> {
        self.halted = state.cpu.halted;
        (self.amid, self.delivered, self.first_of_tick) = (false, false, true);
        if self.kind == TickKind::Instruction {
            self.begin_at(state.tick);
            return self.software.restore(state);
        }
        let refused = |what: &str| Err(EngineError { what: what.to_owned() });
        if self.kind == TickKind::ConditionalBranch
            && state.hidden == HiddenState::of_branch_clock()
        {
            return self.restore_of_hardware(state);
        }
        self.counts_from_checkpoint = false;
        let HiddenState { engine, version, bytes } = &state.hidden;
        if engine == KEPT_AMID {
            return self.restore_amid(state);
        }
        if engine != KEPT || *version != KEPT_VERSION {
            return refused(
                "this checkpoint was not made by the software CPU, which cannot say how many \
                 instructions lie before it: `reprise checkpoint` makes others",
            );
        }
        let Ok((kept, [])) = postcard::take_from_bytes::<Kept>(bytes) else {
            return refused(IMPOSSIBLE);
        };
        let Kept { instructions, events, software: hidden } = kept;
        let Some(branches) = state.tick.checked_sub(events) else { return refused(IMPOSSIBLE) };
        if self.kind != TickKind::ConditionalBranch && branches != 0 {
            return refused(IMPOSSIBLE);
        }
        self.begin_at(instructions);
        self.events = events;
        let state = EngineState { tick: instructions, cpu: state.cpu.clone(), hidden };
        self.software.restore(&state)?;
        self.software.set_conditional_branches(branches);
        Ok(())
    }

    fn become_engine(&mut self, to: &HandOver) -> Result<bool, EngineError> {
        let (tick, cpu, executed) = (self.tick(), self.cpu_state()?, self.instructions_executed());
        let hands_branches = [self.kind, to.tick_kind].contains(&TickKind::ConditionalBranch);
        if hands_branches {
            // Code is decoded anew, its branches counted or no longer.
            self.software.start_over(tick, &cpu)?;
            self.count_what(&self.header.of_stretch(to));
        } else {
            // The engine that took over there knew nothing but the state.
            let hidden = HiddenState { engine: String::new(), version: 0, bytes: Vec::new() };
            self.software.restore(&EngineState { tick, cpu, hidden })?;
        }
        self.began_at = tick.wrapping_sub(executed);
        (self.kind, self.events) = (to.tick_kind, tick);
        (self.amid, self.delivered, self.first_of_tick) = (false, false, true);
        Ok(true)
    }

    fn instructions(&self) -> Option<u64> {
        Some(self.instructions_before + self.instructions_executed())
    }

    fn pause_at(&mut self, instructions: Option<u64>) -> bool {
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
