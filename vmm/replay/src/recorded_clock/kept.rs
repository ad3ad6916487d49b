//! What the software CPU under a recording's clock keeps in a checkpoint beside its own state, and what it
//! takes up again: how many ticks and instructions lie before it.

use reprise_machine::engine::{Engine, EngineError};
use reprise_trace::checkpoint::{CheckpointError, EngineState, HiddenState};
use reprise_trace::moment::{MOST_TICKS, TickKind};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::RecordedClock;
use crate::error::ReplayError;

/// The name of what [`RecordedClock`] keeps in a checkpoint where ticks are not the run's instructions, or were
/// not all along.
const KEPT: &str = "soft, another clock";
/// Raised by any change of what the bytes mean. In version 1 `instructions` were ticks plus the instructions
/// since, behind a hand-over from a clock that counts something else.
const KEPT_VERSION: u32 = 2;
/// The name of what it keeps amid a tick. No file holds that: only whoever moves it by instructions can bring
/// it there again.
const KEPT_AMID: &str = "soft, amid a tick of another clock";
/// Why what was kept is refused.
const IMPOSSIBLE: &str = "the saved clock is in a state that it never reaches: take another copy";

/// What a checkpoint keeps of it.
#[derive(Serialize, Deserialize)]
struct Kept {
    instructions: u64,
    events: u64,
    software: HiddenState,
}

/// What is kept of it amid a tick.
#[derive(Serialize, Deserialize)]
struct KeptAmid {
    kept: Kept,
    branches: u64,
    first_of_tick: bool,
}

/// What a state of this name and of this build's version holds.
fn decoded<T: DeserializeOwned>(hidden: &HiddenState, name: &str) -> Option<T> {
    let known = hidden.engine == name && hidden.version == KEPT_VERSION;
    match known.then(|| postcard::take_from_bytes(&hidden.bytes)) {
        Some(Ok((kept, []))) => Some(kept),
        _ => None,
    }
}

/// The instructions of the run before a state that [`RecordedClock`] saved where ticks do not tell them.
pub(crate) fn instructions_before(hidden: &HiddenState) -> Option<u64> {
    decoded(hidden, KEPT).map(|kept: Kept| kept.instructions)
}

/// What the software CPU itself keeps, of what [`RecordedClock`] keeps in a state; anything else as it is.
pub fn kept_by_software(hidden: HiddenState) -> HiddenState {
    let of_amid = || decoded(&hidden, KEPT_AMID).map(|amid: KeptAmid| amid.kept);
    let kept = decoded(&hidden, KEPT).or_else(of_amid);
    kept.map_or(hidden, |kept: Kept| kept.software)
}

/// Whether a file's checkpoint can be taken up, as far as [`RecordedClock`] made it.
///
/// # Errors
/// Another Reprise made it, or it is forged.
pub(crate) fn check_of_file(state: &EngineState) -> Result<(), ReplayError> {
    let HiddenState { engine, version, .. } = &state.hidden;
    if engine == KEPT && *version != KEPT_VERSION {
        let found = u16::try_from(*version).unwrap_or(u16::MAX);
        return Err(CheckpointError::StateVersion { tick: state.tick, found }.into());
    }
    if engine == KEPT_AMID {
        return Err(impossible().into());
    }
    Ok(())
}

fn impossible() -> EngineError {
    EngineError { what: IMPOSSIBLE.to_owned() }
}

impl RecordedClock {
    /// As [`Engine::save`].
    pub(super) fn kept_state(&mut self) -> Result<Option<EngineState>, EngineError> {
        // It does not know how many instructions of the run lie before.
        if self.counts_from_checkpoint {
            return Ok(None);
        }
        let Some(state) = self.software.save()? else { return Ok(None) };
        let counts_instructions = self.kind == TickKind::Instruction;
        if counts_instructions && self.events == 0 {
            return Ok(Some(state));
        }
        // Only the first place of a tick is found again by the tick alone.
        let found_again = self.first_of_tick || self.is_paused();
        if !counts_instructions && (self.amid || self.delivered || !found_again) {
            return Ok(None);
        }
        let EngineState { tick: instructions, cpu, hidden: software } = state;
        let kept = Kept { instructions, events: self.events, software };
        let (engine, bytes) = if self.is_paused() && !counts_instructions {
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

    /// As [`Engine::restore`].
    pub(super) fn take_up(&mut self, state: &EngineState) -> Result<(), EngineError> {
        // Instructions are no more either, which the software CPU looks at.
        if state.tick >= MOST_TICKS {
            return Err(impossible());
        }
        self.halted = state.cpu.halted;
        (self.amid, self.delivered, self.first_of_tick) = (false, false, true);
        self.counts_from_checkpoint = false;
        if self.kind == TickKind::Instruction && state.hidden.engine != KEPT {
            (self.began_at, self.events) = (state.tick, 0);
            return self.software.restore(state);
        }
        if self.kind == TickKind::ConditionalBranch
            && state.hidden == HiddenState::of_branch_clock()
        {
            return self.restore_of_hardware(state);
        }
        let HiddenState { engine, version, .. } = &state.hidden;
        if engine == KEPT_AMID {
            return self.restore_amid(state);
        }
        if engine != KEPT || *version != KEPT_VERSION {
            let what = "this checkpoint was not made by this software CPU, which cannot say how many \
                        instructions lie before it: `reprise checkpoint` makes others";
            return Err(EngineError { what: what.to_owned() });
        }
        let kept: Kept = decoded(&state.hidden, KEPT).ok_or_else(impossible)?;
        let Kept { instructions, events, software: hidden } = kept;
        let branches = match self.kind {
            TickKind::ConditionalBranch => state.tick.checked_sub(events),
            TickKind::Exit => (state.tick == events).then_some(0),
            TickKind::Instruction => (state.tick == instructions.wrapping_add(events)).then_some(0),
        };
        let branches = branches.ok_or_else(impossible)?;
        (self.began_at, self.events) = (instructions, events);
        let state = EngineState { tick: instructions, cpu: state.cpu.clone(), hidden };
        self.software.restore(&state)?;
        self.software.set_conditional_branches(branches);
        Ok(())
    }

    /// Takes up a checkpoint that the clock `pmu` made on hardware: all that has passed is branches to it.
    fn restore_of_hardware(&mut self, state: &EngineState) -> Result<(), EngineError> {
        (self.events, self.began_at) = (0, 0);
        self.counts_from_checkpoint = true;
        self.software.restore(&EngineState { tick: 0, ..state.clone() })?;
        self.software.set_conditional_branches(state.tick);
        Ok(())
    }

    /// Takes up what was kept amid a tick.
    fn restore_amid(&mut self, state: &EngineState) -> Result<(), EngineError> {
        let amid: KeptAmid = decoded(&state.hidden, KEPT_AMID).ok_or_else(impossible)?;
        let KeptAmid { kept, branches, first_of_tick } = amid;
        let Kept { instructions, events, software: hidden } = kept;
        let counted = match self.kind {
            TickKind::ConditionalBranch => branches,
            TickKind::Exit | TickKind::Instruction => 0,
        };
        if events.checked_add(counted) != Some(state.tick) {
            return Err(impossible());
        }
        self.began_at = instructions;
        (self.events, self.first_of_tick) = (events, first_of_tick);
        let state = EngineState { tick: instructions, cpu: state.cpu.clone(), hidden };
        self.software.restore(&state)?;
        self.software.set_conditional_branches(branches);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use reprise_machine::ram::GuestRam;
    use reprise_trace::cpu_state::CpuState;
    use reprise_trace::event::HandOver;
    use reprise_trace::header::{CpuModelInfo, GuestInfo, Header, HostInfo, MachineInfo};

    use super::*;

    fn kept(version: u32, kept: &Kept) -> HiddenState {
        let bytes = postcard::to_allocvec(kept).expect("it encodes");
        HiddenState { engine: KEPT.to_owned(), version, bytes }
    }

    fn at(instructions: u64, events: u64) -> Kept {
        Kept { instructions, events, software: HiddenState::default() }
    }

    /// Under this clock, with code that goes on without end.
    fn clock(kind: TickKind) -> RecordedClock {
        let header = Header {
            machine: MachineInfo { ram_mib: 4, rtc_start_s: 0 },
            cpu_model: CpuModelInfo { name: String::new(), version: 1 },
            tick_kind: kind,
            ns_per_tick: 1,
            engine: String::new(),
            clock: String::new(),
            host: HostInfo::default(),
            guest: GuestInfo {
                name: String::new(),
                command_line: String::new(),
                images: Vec::new(),
            },
            created_unix_s: 0,
            reprise_version: String::new(),
            precautions: Vec::new(),
        };
        let ram = GuestRam::new(4).expect("the host has memory");
        RecordedClock::new(ram, &header).expect("the host has memory")
    }

    #[test]
    fn what_began_at_a_checkpoint_of_hardware_is_not_saved_behind_a_hand_over_either() {
        let mut clock = clock(TickKind::ConditionalBranch);
        let hidden = HiddenState::of_branch_clock();
        clock
            .restore(&EngineState { tick: 100, cpu: CpuState::default(), hidden })
            .expect("it begins");
        assert_eq!(clock.save().expect("it may be asked"), None);
        let to = HandOver {
            engine: "soft".to_owned(),
            clock: "instructions".to_owned(),
            tick_kind: TickKind::Instruction,
            ns_per_tick: 1,
        };
        assert!(clock.become_engine(&to).expect("it goes on"));
        assert_eq!((clock.tick(), clock.instructions()), (100, None));
        assert_eq!(clock.save().expect("it may be asked"), None, "it knows no instructions");
        clock.restore(&EngineState { tick: 30, ..EngineState::default() }).expect("it begins");
        assert_eq!(clock.instructions(), Some(30));
        assert!(clock.save().expect("it may be asked").is_some());
    }

    #[test]
    fn what_no_run_reaches_is_refused() {
        let software = HiddenState::default();
        let of = |instructions, events| Kept { instructions, events, software: software.clone() };
        let amid = |instructions, events, branches| {
            let kept = KeptAmid { kept: of(instructions, events), branches, first_of_tick: true };
            let bytes = postcard::to_allocvec(&kept).expect("it encodes");
            HiddenState { engine: KEPT_AMID.to_owned(), version: KEPT_VERSION, bytes }
        };
        let now = |instructions, events| kept(KEPT_VERSION, &of(instructions, events));
        let (instruction, exit) = (TickKind::Instruction, TickKind::Exit);
        let branch = TickKind::ConditionalBranch;
        let most = u64::MAX;
        for (kind, tick, hidden) in [
            (instruction, most, software.clone()),
            (instruction, most, now(5, most - 5)),
            (instruction, 4, now(most, 5)),
            (exit, most, now(5, most)),
            (exit, 5, now(most, 5)),
            (exit, 5, amid(most, 5, 0)),
            (exit, most, amid(5, most, 0)),
            (branch, most, HiddenState::of_branch_clock()),
            (branch, most, now(5, 5)),
            (branch, 5, now(most, 5)),
            (branch, 5, amid(most, 5, 0)),
            (branch, 5, HiddenState { version: 1, ..amid(5, 5, 0) }),
        ] {
            let state = EngineState { tick, cpu: CpuState::default(), hidden };
            assert!(clock(kind).restore(&state).is_err(), "{kind:?}: {state:?}");
        }
        for (kind, hidden) in [(exit, now(9, 5)), (branch, now(9, 5)), (branch, amid(9, 5, 0))] {
            let state = EngineState { tick: 5, cpu: CpuState::default(), hidden };
            clock(kind).restore(&state).expect("it may be");
        }
        let state = EngineState { hidden: amid(9, 5, 0), ..EngineState::default() };
        assert!(check_of_file(&state).is_err(), "no file holds it");
    }

    #[test]
    fn what_the_bytes_mean_changes_with_the_version() {
        let now = kept(KEPT_VERSION, &at(7, 5));
        // Two numbers; a text, a number and bytes, all of them empty.
        assert_eq!((KEPT_VERSION, &now.bytes[..]), (2, &[7, 5, 0, 0, 0][..]), "raise KEPT_VERSION");
        assert_eq!(instructions_before(&now), Some(7));
        assert_eq!(kept_by_software(now.clone()), HiddenState::default());
        let earlier = kept(1, &at(7, 5));
        assert_eq!(instructions_before(&earlier), None, "it counted something else");
        let state =
            |hidden: &HiddenState| EngineState { hidden: hidden.clone(), ..EngineState::default() };
        assert!(check_of_file(&state(&now)).is_ok());
        assert!(check_of_file(&state(&HiddenState::of_kvm())).is_ok());
        let refused = check_of_file(&state(&earlier)).expect_err("of another Reprise").to_string();
        assert!(refused.contains("state version 1"), "{refused}");
    }
}
