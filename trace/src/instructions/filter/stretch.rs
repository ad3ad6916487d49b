//! Many plain runs at once: what a filter keeps of them goes on as it came, and what it leaves out is only
//! counted. Reasons that depend on a block alone are found once a block; those that depend on the position
//! hold for so many instructions.

use std::ops::Range;

use super::{LeftOut, Parts, Privilege, Sample, Selection, page_table_root};
use crate::instructions::TraceError;
use crate::instructions::block::BlockRef;
use crate::instructions::run::{Observer, PlainRuns};

/// Why instructions are left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reason {
    OutsideWindow,
    OtherPrivilege,
    OtherAddressSpace,
    OutsideRange,
    BetweenSamples,
}

impl Reason {
    fn counter(self, left_out: &mut LeftOut) -> &mut u64 {
        match self {
            Self::OutsideWindow => &mut left_out.outside_window,
            Self::OtherPrivilege => &mut left_out.other_privilege,
            Self::OtherAddressSpace => &mut left_out.other_address_space,
            Self::OutsideRange => &mut left_out.outside_range,
            Self::BetweenSamples => &mut left_out.between_samples,
        }
    }
}

/// What a filter does with every whole run of a block, as far as the block alone decides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nobody has looked.
    #[default]
    Unknown,
    /// Keeps it.
    Keep,
    /// Leaves it out: code of the other privilege.
    OtherPrivilege,
    /// Leaves it out: no instruction lies in the range of addresses.
    OutsideRange,
    /// Some instructions lie in the range.
    Partly,
}

/// Runs that go the same way.
struct Stretch {
    words: usize,
    addresses: usize,
    instructions: u64,
    /// Linear address of the first of them.
    linear: u64,
    /// Why they are left out, if they are.
    reason: Option<Reason>,
}

/// Reasons that hold from a place on for so many instructions.
struct Here {
    /// One that goes between privilege and range, one behind both.
    first: Option<Reason>,
    last: Option<Reason>,
    instructions: u64,
}

impl<O: Observer> Parts<O> {
    /// Takes plain runs until none is left.
    pub(super) fn stretches(&mut self, runs: &mut PlainRuns<'_>) -> Result<(), TraceError> {
        loop {
            if let Some(stretch) = self.next_stretch(runs) {
                self.take_stretch(runs, &stretch)?;
            } else if let Some(run) = runs.next() {
                self.run(&run)?;
            } else {
                return Ok(());
            }
        }
    }

    /// The longest stretch that comes next; `None` if the next run needs a closer look.
    fn next_stretch(&mut self, runs: &PlainRuns<'_>) -> Option<Stretch> {
        let here = self.here();
        let (id, block) = runs.plain(0)?;
        let (linear, reason) = (block.linear, self.reason_for(&here, id, runs)?);
        let mut stretch = Stretch { words: 0, addresses: 0, instructions: 0, linear, reason };
        while let Some((id, block)) = runs.plain(stretch.words) {
            let instructions = stretch.instructions + u64::from(block.instruction_count);
            if instructions > here.instructions
                || self.reason_for(&here, id, runs) != Some(stretch.reason)
            {
                break;
            }
            stretch.instructions = instructions;
            stretch.addresses += block.access_count as usize;
            stretch.words += 1;
        }
        (stretch.words > 0).then_some(stretch)
    }

    fn take_stretch(
        &mut self,
        runs: &mut PlainRuns<'_>,
        stretch: &Stretch,
    ) -> Result<(), TraceError> {
        let mut part = runs.split(stretch.words, stretch.addresses)?;
        if let Some(reason) = stretch.reason {
            *reason.counter(&mut self.left_out) += stretch.instructions;
            self.skip(stretch.instructions, || Some(stretch.linear));
        } else {
            self.catch_up()?;
            self.kept_last = true;
            self.observer.runs(&mut part)?;
            part.try_for_each(|run| self.observer.run(&run))?;
        }
        self.position.instruction += stretch.instructions;
        Ok(())
    }

    /// What holds at the position.
    fn here(&self) -> Here {
        let Selection { instructions, cr3, sample, .. } = &self.selection;
        let number = self.position.instruction;
        let mut here = Here { first: None, last: None, instructions: u64::MAX };
        if let Some(window) = instructions {
            here.first = (!window.contains(&number)).then_some(Reason::OutsideWindow);
            here.instructions = distance(window, number);
        }
        let root = page_table_root(self.position.cr3);
        if cr3.is_some_and(|wanted| page_table_root(wanted) != root) {
            here.first = Some(Reason::OtherAddressSpace);
        }
        if let Some(Sample { period, length }) = *sample {
            let (period, phase) = (period.max(1), number % period.max(1));
            let kept = phase < length;
            here.last = (!kept).then_some(Reason::BetweenSamples);
            let until = if kept { length.min(period) } else { period };
            here.instructions = here.instructions.min(until - phase);
        }
        here
    }

    /// Why a run of a block is left out, or that it is not; `None` if that takes a closer look.
    #[inline]
    fn reason_for(&mut self, here: &Here, id: u32, runs: &PlainRuns<'_>) -> Option<Option<Reason>> {
        let verdict = match self.verdicts.get(id as usize) {
            Some(verdict) if *verdict != Verdict::Unknown => *verdict,
            _ => self.judge(id, runs.blocks.get(id)?),
        };
        Some(match (verdict, here.first) {
            (Verdict::OtherPrivilege, _) => Some(Reason::OtherPrivilege),
            (_, Some(reason)) => Some(reason),
            (Verdict::OutsideRange, None) => Some(Reason::OutsideRange),
            (Verdict::Keep, None) => here.last,
            (Verdict::Partly | Verdict::Unknown, None) => return None,
        })
    }

    #[cold]
    fn judge(&mut self, id: u32, block: BlockRef<'_>) -> Verdict {
        let Selection { privilege, linear, .. } = &self.selection;
        let is_user = block.mode().cpl == 3;
        let inside = |range: &Range<u64>| {
            block.instructions().filter(|one| range.contains(&one.linear())).count()
        };
        let verdict = match linear.as_ref().map(inside) {
            _ if privilege.is_some_and(|wanted| (wanted == Privilege::User) != is_user) => {
                Verdict::OtherPrivilege
            }
            None => Verdict::Keep,
            Some(0) => Verdict::OutsideRange,
            Some(all) if all == block.instruction_count() => Verdict::Keep,
            Some(_) => Verdict::Partly,
        };
        let index = id as usize;
        if index >= self.verdicts.len() {
            self.verdicts.resize(index + 1, Verdict::Unknown);
        }
        self.verdicts[index] = verdict;
        verdict
    }
}

/// How many instructions from `number` on are on the same side of a window.
fn distance(window: &Range<u64>, number: u64) -> u64 {
    if number < window.start {
        window.start - number
    } else if number < window.end {
        window.end - number
    } else {
        u64::MAX
    }
}
