//! The boundaries that lie right behind the guest, and which of them a branch clock finds again.

use reprise_branch_clock::guest_code::decode_at;
use reprise_branch_clock::settle::writes_memory;
use reprise_machine::inputs::Stamp;
use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::CpuState;
use reprise_trace::register_bits::RFLAGS_RF;

/// So many instructions before a place the guest is watched one by one: some ten lie between two
/// conditional branches.
pub(super) const WATCHED: u64 = 256;

/// A boundary at which an instruction was about to execute.
#[derive(Clone, Debug)]
pub(super) struct Boundary {
    /// The instruction count.
    pub(super) instructions: u64,
    /// Where, as the branch clock counts.
    pub(super) stamp: Stamp,
    /// What it is to be decoded in.
    pub(super) state: CpuState,
    /// An interrupt would enter here.
    pub(super) open: bool,
    /// The first instruction of a handler, which an interrupt has just led to.
    pub(super) delivered: bool,
}

impl Boundary {
    /// Whether a breakpoint stops hardware here at all, and an instruction count the software CPU.
    pub(super) fn can_be_stopped_at(&self) -> bool {
        let resumes = self.state.rflags & RFLAGS_RF != 0;
        !self.delivered && !self.state.interrupt_shadow && !resumes
    }
}

/// Boundaries without an exit between them, each an instruction behind the one before.
#[derive(Debug, Default)]
pub(super) struct Trail {
    boundaries: Vec<Boundary>,
    /// The instruction count before which nothing may be put any more.
    entered_at: u64,
}

impl Trail {
    /// An exit or an interrupt: nothing can enter before it any more.
    pub(super) fn begin(&mut self) {
        self.boundaries.clear();
    }

    /// The guest stands here, and was watched if it was seen one instruction before.
    pub(super) fn note(&mut self, here: Boundary) {
        match self.boundaries.last() {
            Some(last) if last.instructions == here.instructions => return,
            Some(last) if last.instructions + 1 == here.instructions => {}
            Some(_) => self.boundaries.clear(),
            None => {}
        }
        if self.boundaries.len() as u64 >= 2 * WATCHED {
            self.boundaries.drain(..WATCHED as usize);
        }
        self.boundaries.push(here);
    }

    /// What entered, entered at this instruction count: nothing else enters before it.
    pub(super) fn entered(&mut self, instructions: u64) {
        self.entered_at = instructions;
    }

    /// A place for what is to enter where the guest stands: here, or before it where nothing can tell.
    pub(super) fn place(&self, ram: &GuestRam) -> Option<&Boundary> {
        let last = self.boundaries.len().checked_sub(1)?;
        for index in (0..=last).rev() {
            let boundary = &self.boundaries[index];
            // An interrupt would be delivered before it was.
            let too_early = index < last && boundary.open;
            if too_early || boundary.instructions < self.entered_at {
                return None;
            }
            if boundary.can_be_stopped_at() && self.is_first_such(index, ram) {
                return Some(boundary);
            }
        }
        None
    }

    /// Whether this boundary is the first of its tick in its state, or as good as that one. Where the tick
    /// began is not known where the guest has executed no branch for long; then it is if no state was seen
    /// twice.
    fn is_first_such(&self, index: usize, ram: &GuestRam) -> bool {
        let there = &self.boundaries[index].stamp;
        let before = &self.boundaries[..index];
        let Some(same) = before.iter().rposition(|boundary| boundary.stamp == *there) else {
            return true;
        };
        // A circle in which nothing is written: any round is like the other.
        let writes = |boundary: &Boundary| {
            let instruction = decode_at(ram, &boundary.state, boundary.state.rip);
            instruction.is_none_or(|instruction| writes_memory(&instruction))
        };
        !before[same..].iter().any(writes)
    }
}
