//! Leading a kicked guest on to a place that another run finds again.
//!
//! Best is the first place of a tick, right behind a conditional branch: no other place has that tick
//! and comes before. The guest is led there instruction by instruction, with breakpoints wherever the
//! next one may lead. Not to be stood on is what a breakpoint does not find: the boundaries in an
//! interrupt shadow, under RFLAGS.RF, and amid a REP. Nor is a handler's first instruction, where
//! nothing has retired since the event: an instruction count does not tell it from the place before.
//!
//! In a loop without conditional branches the tick never changes. Where the loop changes nothing at all,
//! any round will do. Where each visit to an address finds another state, the state tells the place; that
//! is seen by watching the guest for a while. Where the same state comes again and memory was written,
//! nothing tells one visit from the other; then nothing enters before the guest has left the loop. What
//! this cannot see is a loop without conditional branches longer than the guest is watched.

use std::collections::{BTreeMap, BTreeSet};

use iced_x86::{
    Code, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, Register,
};
use reprise_machine::engine::{EngineError, Exit};
use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::{CpuState, RCX};

use crate::engine::BranchClock;
use crate::guest_code::{Successors, decode_at, handler_address, linear_of, repeats, successors};
use crate::retired::interrupt_returned;
use crate::vcpu::{OwnDebugging, Vcpu, VcpuExit};
use reprise_trace::register_bits::{RFLAGS_RF, RFLAGS_TF};

/// Where a kicked guest is led to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stand {
    /// Right behind the next conditional branch, if one comes soon.
    #[default]
    BehindBranch,
    /// The first place that a breakpoint finds. For tests: the CPU's state alone tells these places, so
    /// the guest must not repeat one.
    AtOnce,
}

/// Instructions that the guest is led on, at most: some ten lie between two conditional branches.
const MAX_STEPS: u32 = 512;
/// From this step on, it is watched which states are visited at an address...
const WATCHED_FROM: u32 = 64;
/// ...and from this one on, an address with another state at each visit is good enough.
const WATCHED_ENOUGH: u32 = 288;
/// Where no place is found, it is tried again so many times, after so many branches each.
const ATTEMPTS: u32 = 32;
const BRANCHES_BETWEEN: u64 = 16;
/// So often a step may be interrupted before it counts as one that leads nowhere known.
const MAX_INTERRUPTIONS: u32 = 16;
/// A step that has led the guest elsewhere than it may lead ends after so many branches: no breakpoint would
/// end it. More than the shortest period that a counter takes.
const STEP_BRANCHES: u64 = 48;

/// Exceptions whose handlers have breakpoints as far as there are some left, likeliest first: #PF, #GP,
/// #NM, #UD.
const LIKELY_FAULTS: [u8; 4] = [14, 13, 7, 6];
const DIVIDE_ERROR: u8 = 0;

/// What leading the guest on came to.
pub(crate) enum Settled {
    /// It stands where it can be found again.
    Stands {
        /// Right behind a conditional branch.
        first_of_tick: bool,
    },
    /// It exits before that.
    Exits(Exit),
    /// There is no such place near.
    Nowhere {
        /// It debugs itself there, which goes on only without breakpoints.
        debugging: Option<OwnDebugging>,
    },
}

/// What one step came to.
pub(crate) enum Stepped {
    /// The instruction has retired, or faulted and its handler is next.
    Done,
    Exits(Exit),
    /// Somebody kicked before it was done.
    Kicked,
    /// Where it leads cannot be said, or it does not come there.
    Lost,
}

impl<V: Vcpu> BranchClock<V> {
    /// Leads a guest that was just interrupted on to a place that can be found again.
    pub(crate) fn settle(&mut self) -> Result<Settled, EngineError> {
        let mut met = None;
        for _ in 0..ATTEMPTS {
            match self.settle_near()? {
                Settled::Nowhere { debugging } => met = debugging.or(met),
                settled => return Ok(settled),
            }
            self.vcpu.set_breakpoints(&[])?;
            self.vcpu.set_overflow(Some(BRANCHES_BETWEEN))?;
            match self.enter()? {
                VcpuExit::Interrupted { .. } | VcpuExit::Breakpoint => {}
                exit => return Ok(Settled::Exits(self.hand_over(exit))),
            }
        }
        Ok(Settled::Nowhere { debugging: met })
    }

    fn settle_near(&mut self) -> Result<Settled, EngineError> {
        let start = self.branches;
        let mut behind_branch = false;
        let mut round = Round::default();
        let mut places = Places::default();
        for step in 0..=MAX_STEPS {
            let state = self.vcpu.state()?;
            let instruction = self.vcpu.instruction_at(&state);
            if let Some(how) = debugs_itself(&state, instruction.as_ref()) {
                return Ok(Settled::Nowhere { debugging: Some(how) });
            }
            let retired = places.successors().contains(&linear_of(&state, state.rip));
            if retired && is_found_by_breakpoint(&state, instruction.as_ref()) {
                let fresh = self.branches != start || self.parameters.stand == Stand::AtOnce;
                let single = round.is_single(step, &state);
                let first_of_tick = behind_branch;
                if fresh || step >= WATCHED_ENOUGH && single {
                    return Ok(Settled::Stands { first_of_tick });
                }
                match round.closes_at(&state) {
                    Some(true) => return Ok(Settled::Nowhere { debugging: None }),
                    Some(false) => return Ok(Settled::Stands { first_of_tick }),
                    None => {}
                }
                round.note(step, &state);
            }
            round.wrote |= instruction.as_ref().is_none_or(writes_memory);
            places = self.places_after(&state, instruction.as_ref());
            let before = self.branches;
            match self.step(&state, &places)? {
                Stepped::Done => behind_branch = self.branches != before,
                // It is being served; where the guest was interrupted is no place yet.
                Stepped::Kicked => (places, behind_branch) = (Places::default(), false),
                Stepped::Exits(exit) => return Ok(Settled::Exits(exit)),
                Stepped::Lost => break,
            }
        }
        Ok(Settled::Nowhere { debugging: None })
    }

    /// Executes the next instruction, or delivers the interrupt that is queued.
    pub(crate) fn step_on(&mut self) -> Result<Stepped, EngineError> {
        if self.amid {
            self.vcpu.set_breakpoints(&[])?;
            self.vcpu.set_overflow(Some(STEP_BRANCHES))?;
            return Ok(match self.enter()? {
                VcpuExit::Interrupted { kicked: true } => Stepped::Kicked,
                VcpuExit::Interrupted { .. } | VcpuExit::Breakpoint => Stepped::Done,
                exit => Stepped::Exits(self.hand_over(exit)),
            });
        }
        let state = self.vcpu.state()?;
        let places = match self.injected {
            Some(vector) => Places::of_delivery(self.vcpu.ram(), &state, vector),
            None => self.places_after(&state, self.vcpu.instruction_at(&state).as_ref()),
        };
        let branches = self.branches;
        let stepped = self.step(&state, &places)?;
        if self.branches != branches && matches!(stepped, Stepped::Done) {
            // Not so at the handler of a fault in fetching what the branch led to.
            let state = self.vcpu.state()?;
            self.first_of_tick = places.successors().contains(&linear_of(&state, state.rip));
        }
        Ok(stepped)
    }

    fn places_after(&self, state: &CpuState, instruction: Option<&Instruction>) -> Places {
        Places::after(self.vcpu.ram(), state, instruction, self.vcpu.breakpoints())
    }

    /// Executes the instruction at RIP, or delivers what is queued, which leads to one of `places`.
    fn step(&mut self, before: &CpuState, places: &Places) -> Result<Stepped, EngineError> {
        if places.all.is_empty() {
            return Ok(Stepped::Lost);
        }
        self.vcpu.set_breakpoints(&places.all)?;
        // What is delivered first would save RFLAGS.RF. And where no breakpoint is, none is stepped off: KVM may
        // leave the flag to the next instruction, whose breakpoint would not hit.
        let at_breakpoint = places.all.contains(&linear_of(before, before.rip));
        let steps_off = self.injected.is_none() && at_breakpoint;
        let branches = self.branches;
        let mut here = before.rip;
        for _ in 0..MAX_INTERRUPTIONS {
            if steps_off && here == before.rip {
                self.vcpu.step_off()?;
            }
            self.vcpu.set_overflow(Some(STEP_BRANCHES))?;
            let exit = self.enter()?;
            let retired = self.branches.wrapping_sub(branches);
            match exit {
                // Where it hits later, the guest was elsewhere in between.
                VcpuExit::Breakpoint if retired > u64::from(places.behind_branch) => break,
                VcpuExit::Breakpoint => return Ok(Stepped::Done),
                VcpuExit::Interrupted { kicked: true } => return Ok(Stepped::Kicked),
                VcpuExit::Interrupted { .. } if retired >= STEP_BRANCHES => break,
                VcpuExit::Interrupted { .. } => here = self.vcpu.state()?.rip,
                exit => return Ok(Stepped::Exits(self.hand_over(exit))),
            }
        }
        Ok(Stepped::Lost)
    }
}

/// Finds out that a guest goes round in a circle (Brent's way: the state looked out for is changed
/// after 1, 2, 4, 8... steps, so that a circle of any length closes).
#[derive(Default)]
struct Round {
    sought: Option<CpuState>,
    /// Whether an instruction since then may have written memory.
    wrote: bool,
    /// The states visited at each RIP: their digests, and whether one came twice.
    visited: BTreeMap<u64, (BTreeSet<u64>, bool)>,
}

impl Round {
    /// Whether memory may have been written in the round that this closes, if it closes one.
    fn closes_at(&self, state: &CpuState) -> Option<bool> {
        let sought = self.sought.as_ref()?;
        (sought == state).then_some(self.wrote)
    }

    /// Watches the guest, and gives whether no state came twice at this RIP.
    fn is_single(&mut self, step: u32, state: &CpuState) -> bool {
        if step < WATCHED_FROM {
            return false;
        }
        let (states, twice) = self.visited.entry(state.rip).or_default();
        *twice |= !states.insert(state.short_digest());
        !*twice
    }

    fn note(&mut self, step: u32, state: &CpuState) {
        if self.sought.is_none() || step.is_power_of_two() {
            self.sought = Some(state.clone());
            self.wrote = false;
        }
    }
}

/// Whether a breakpoint at RIP stops the guest in this very state when it comes here again.
fn is_found_by_breakpoint(state: &CpuState, instruction: Option<&Instruction>) -> bool {
    // The REP may have begun already, and its first element is where the breakpoint hits.
    let amid = state.gpr[RCX] != 0 && instruction.is_some_and(repeats);
    !state.interrupt_shadow && state.rflags & RFLAGS_RF == 0 && !amid
}

/// How the guest debugs itself, so that the next step would end the run; or where a replay that comes by with
/// breakpoints would.
fn debugs_itself(state: &CpuState, instruction: Option<&Instruction>) -> Option<OwnDebugging> {
    let sets = |it: &Instruction| it.op0_register().is_dr();
    if OwnDebugging::has_breakpoints(state.dr7) || instruction.is_some_and(sets) {
        return Some(OwnDebugging::Breakpoints);
    }
    let raises = instruction.is_some_and(|it| it.code() == Code::Int1);
    (raises || state.rflags & RFLAGS_TF != 0).then_some(OwnDebugging::Exception)
}

/// Whether an instruction may write memory.
pub fn writes_memory(instruction: &Instruction) -> bool {
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(instruction);
    let quiet = |access| matches!(access, OpAccess::None | OpAccess::Read | OpAccess::CondRead);
    // What the kernel's entry points push is not in the list.
    let enters = instruction.flow_control() == FlowControl::Interrupt;
    enters || info.used_memory().iter().any(|memory| !quiet(memory.access()))
}

/// Linear addresses where the guest may stand after an instruction.
#[derive(Default)]
pub(crate) struct Places {
    /// Those where it stands if the instruction retires come first, then the likeliest faults' handlers.
    pub(crate) all: Vec<u64>,
    successors: usize,
    /// What retires last on the way there is a conditional branch.
    behind_branch: bool,
}

impl Places {
    /// Where the guest may stand after the instruction at RIP, so many places at most; nowhere if that
    /// cannot be said.
    pub(crate) fn after(
        ram: &GuestRam,
        state: &CpuState,
        instruction: Option<&Instruction>,
        most: usize,
    ) -> Self {
        let mut places = Self::default();
        if let Some(instruction) = instruction {
            let Some(next) = next_of(ram, state, instruction) else { return places };
            next.addresses.iter().for_each(|address| places.add(*address, most));
            places.behind_branch = next.behind_branch;
        }
        places.successors = places.all.len();
        let divides = |it: &Instruction| matches!(it.mnemonic(), Mnemonic::Div | Mnemonic::Idiv);
        let first = instruction.is_some_and(divides).then_some(DIVIDE_ERROR);
        for vector in first.into_iter().chain(LIKELY_FAULTS) {
            if let Some(handler) = handler_address(ram, state, vector) {
                places.add(handler, most);
            }
        }
        places
    }

    /// Where the guest stands when an interrupt has been delivered.
    fn of_delivery(ram: &GuestRam, state: &CpuState, vector: u8) -> Self {
        let all = handler_address(ram, state, vector).into_iter().collect();
        Self { all, ..Self::default() }
    }

    fn add(&mut self, address: u64, most: usize) {
        if self.all.len() < most && !self.all.contains(&address) {
            self.all.push(address);
        }
    }

    fn successors(&self) -> &[u64] {
        &self.all[..self.successors]
    }
}

/// Where a breakpoint finds the guest, and what retired last before that.
#[derive(Default)]
struct Next {
    /// Linear.
    addresses: Vec<u64>,
    behind_branch: bool,
}

impl Next {
    fn at(address: u64) -> Self {
        Self { addresses: vec![address], behind_branch: false }
    }
}

/// Where a breakpoint finds the guest once `instruction` has retired; `None` if that cannot be said.
fn next_of(ram: &GuestRam, state: &CpuState, instruction: &Instruction) -> Option<Next> {
    let next = instruction.next_ip();
    match instruction.code() {
        Code::Iretw | Code::Iretd | Code::Iretq => {
            let after = interrupt_returned(ram, state, instruction)?;
            return match after.rflags & RFLAGS_RF {
                0 => Some(Next::at(linear_of(&after, after.rip))),
                // As every fault's frame has it.
                _ => behind_unseen(ram, &after),
            };
        }
        Code::Int3 => return Some(handler_next(ram, state, 3)),
        Code::Int_imm8 => return Some(handler_next(ram, state, instruction.immediate8())),
        _ if repeats(instruction) => return Some(Next::at(linear_of(state, next))),
        _ if instruction.op0_register() == Register::SS => {
            return behind_unseen(ram, &CpuState { rip: next, ..state.clone() });
        }
        _ => {}
    }
    let addresses = match successors(ram, state, instruction) {
        Successors::These(all) => all.map(|rip| linear_of(state, rip)).to_vec(),
        Successors::None => Vec::new(),
        Successors::Any => return None,
    };
    let behind_branch = instruction.flow_control() == FlowControl::ConditionalBranch;
    Some(Next { addresses, behind_branch })
}

fn handler_next(ram: &GuestRam, state: &CpuState, vector: u8) -> Next {
    handler_address(ram, state, vector).map_or_else(Next::default, Next::at)
}

/// Where a breakpoint finds the guest that comes to `state` where none hits: behind a load of SS, or
/// with RFLAGS.RF.
fn behind_unseen(ram: &GuestRam, state: &CpuState) -> Option<Next> {
    let Some(instruction) = decode_at(ram, state, state.rip) else {
        return Some(Next::default());
    };
    let returns = matches!(instruction.code(), Code::Iretw | Code::Iretd | Code::Iretq);
    if returns || instruction.op0_register() == Register::SS {
        return None;
    }
    next_of(ram, state, &instruction)
}
