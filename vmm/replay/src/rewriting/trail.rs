//! The boundaries that lie right behind the guest, and which of them a branch clock finds again.

use reprise_branch_clock::guest_code::decode_at;
use reprise_branch_clock::settle::writes_memory;
use reprise_machine::inputs::Stamp;
use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::CpuState;
use reprise_trace::register_bits::{RFLAGS_RF, RFLAGS_TF};

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
    fn can_be_stopped_at(&self) -> bool {
        let resumes = self.state.rflags & RFLAGS_RF != 0;
        !self.delivered && !self.state.interrupt_shadow && !resumes
    }

    /// Why the instruction here cannot be done in the guest's place, if so.
    pub(super) fn obstacle_to_doing(&self) -> Option<&'static str> {
        match self.can_be_stopped_at() {
            false => Some(
                "right behind STI, MOV SS, an interrupt or a fault, where no breakpoint stops it",
            ),
            // #DB behind it would have to be raised as well.
            true if self.state.rflags & RFLAGS_TF != 0 => {
                Some("where a debugger in the guest single-steps it (TF)")
            }
            true => None,
        }
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

#[cfg(test)]
mod tests {
    use reprise_machine::paging::write_ram;
    use reprise_trace::moment::Moment;

    use super::*;

    /// Where the guest's only instruction lies.
    const CODE: u64 = 0x1000;
    /// MOV to memory, and of one register to another.
    const WRITES: [u8; 3] = [0x66, 0x89, 0x08];
    const QUIET: [u8; 3] = [0x66, 0x89, 0xc8];

    fn ram(code: &[u8]) -> GuestRam {
        let ram = GuestRam::new(4).expect("the host has 4 MiB");
        write_ram(&ram, CODE, code);
        ram
    }

    /// The boundary before instruction `number`, in a state that no other has; interrupts are closed.
    fn boundary(number: u64) -> Boundary {
        let moment = Moment { tick: 7, rip: CODE, rcx: 0 };
        Boundary {
            instructions: number,
            stamp: Stamp { moment, cpu_digest: number },
            state: CpuState { rip: CODE, ..CpuState::default() },
            open: false,
            delivered: false,
        }
    }

    fn trail(boundaries: impl IntoIterator<Item = Boundary>) -> Trail {
        let mut trail = Trail::default();
        boundaries.into_iter().for_each(|boundary| trail.note(boundary));
        trail
    }

    #[track_caller]
    fn assert_place(trail: &Trail, code: &[u8], expected: Option<u64>) {
        let found = trail.place(&ram(code)).map(|boundary| boundary.instructions);
        assert_eq!(found, expected);
    }

    /// What makes that nothing stops there.
    const NOT_TO_BE_STOPPED_AT: [fn(&mut Boundary); 3] = [
        |boundary| boundary.delivered = true,
        |boundary| boundary.state.interrupt_shadow = true,
        |boundary| boundary.state.rflags |= RFLAGS_RF,
    ];

    #[test]
    fn the_place_is_here_or_before_where_interrupts_were_closed() {
        assert_place(&trail([]), &QUIET, None);
        assert_place(&trail((1..4).map(boundary)), &QUIET, Some(3));
        for change in NOT_TO_BE_STOPPED_AT {
            let mut last = boundary(3);
            change(&mut last);
            let all = |before: Boundary| trail([boundary(1), before, last.clone()]);
            assert_place(&all(boundary(2)), &QUIET, Some(2));
            // There an interrupt would have been taken earlier.
            assert_place(&all(Boundary { open: true, ..boundary(2) }), &QUIET, None);
            // Something has entered behind it already.
            let mut entered = all(boundary(2));
            entered.entered(2);
            assert_place(&entered, &QUIET, Some(2));
            entered.entered(3);
            assert_place(&entered, &QUIET, None);
        }
        // Here it is taken here.
        let open = Boundary { open: true, ..boundary(3) };
        assert_place(&trail([boundary(2), open]), &QUIET, Some(3));
    }

    /// The first place of a tick in a state is found; a later one is not, unless the circle between them writes
    /// nothing.
    #[test]
    fn a_state_that_came_before_is_a_place_only_if_nothing_was_written() {
        let again = Boundary { instructions: 3, ..boundary(1) };
        let circle = || trail([boundary(1), boundary(2), again.clone()]);
        assert_place(&circle(), &QUIET, Some(3));
        assert_place(&circle(), &WRITES, Some(2));
        // Nothing of what was before an exit counts.
        let mut fresh = circle();
        fresh.begin();
        fresh.note(Boundary { instructions: 4, ..boundary(1) });
        assert_place(&fresh, &WRITES, Some(4));
    }

    #[test]
    fn boundaries_that_were_not_watched_break_the_trail() {
        let mut last = boundary(5);
        last.delivered = true;
        assert_place(&trail([boundary(3), last.clone()]), &QUIET, None);
        assert_place(&trail([boundary(4), boundary(4), last]), &QUIET, Some(4));
    }

    #[test]
    fn what_cannot_be_done_in_the_guests_place_has_its_reason() {
        let at = |rflags, delivered| {
            let here = boundary(0);
            let state = CpuState { rflags, ..here.state };
            Boundary { state, delivered, ..here }.obstacle_to_doing()
        };
        assert_eq!(at(0x202, false), None);
        for (rflags, delivered, reason) in [
            (0x202, true, "no breakpoint stops it"),
            (0x202 | RFLAGS_RF, false, "no breakpoint stops it"),
            (0x202 | RFLAGS_TF, false, "single-steps it (TF)"),
        ] {
            let told = at(rflags, delivered).expect("it cannot");
            assert!(told.contains(reason), "{told}");
        }
    }
}
