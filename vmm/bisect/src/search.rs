//! The search for the first instruction after which two machines differ.
//!
//! Both machines are moved forward together and compared before chosen instructions. Wherever they are alike,
//! what they have in common is kept, a checkpoint in memory; once they are not, both go back to the last of
//! them and are compared at sixteen places in between, until the gap is one instruction. Of RAM only the
//! pages are looked at that either may have written since. Places are counted in instructions, whatever the
//! recordings' clocks count.

use std::collections::VecDeque;

use reprise_machine::engine::EngineError;
use reprise_machine::outcome::MachineError;
use reprise_machine::ram::RamError;
use reprise_replay::{ReplayError, Start};

use crate::image::Image;
use crate::pair::{Base, Pair};
use crate::replica::{Depth, Look, Over};
use crate::side::Side;

/// Instructions that a machine runs between two looks at whether to stop: a fraction of a second.
pub(crate) const SLICE: u64 = 50_000_000;
/// The same in ticks, which may be seldom.
pub(crate) const SLICE_TICKS: u64 = 1 << 20;
/// Comparisons in a gap that is searched again.
const COMPARISONS: u64 = 16;
/// What is in common is kept at each comparison that is so many instructions from the last one, and at every
/// sixteenth in any case.
const WORTH_KEEPING: u64 = 4096;
/// So many of them are kept: what ran before a difference is shown from one of these.
const KEPT_BASES: usize = 8;

/// Why no answer was found.
#[derive(Debug, thiserror::Error)]
pub enum BisectError {
    /// A recording or a checkpoint cannot be used.
    #[error(transparent)]
    Replay(#[from] ReplayError),
    /// An engine fails.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A replay fails.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// No RAM.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// Somebody asked to stop.
    #[error(
        "stopped: the two were the same up to instruction {equal_until}; run it again to go on"
    )]
    Stopped {
        /// Instructions before the last place at which they were compared and alike.
        equal_until: u64,
    },
    /// Somebody asked to stop before there was anything to compare.
    #[error("stopped before it was known where the replay parts from the recording; run it again")]
    StoppedAlone,
    /// The same machine did not do the same twice.
    #[error(
        "a difference between instructions {equal} and {differs} was not there when both replayed it \
         again: the host or Reprise is at fault; run `reprise doctor`, and report this"
    )]
    NotAgain {
        /// Alike here.
        equal: u64,
        /// Not alike here, the first time.
        differs: u64,
    },
}

/// Watches a search, and may stop it.
pub trait Watch {
    /// The machine `side` (0 or 1) stands at `tick` of its recording, which ends at `until`.
    fn progress(&mut self, side: usize, tick: u64, until: u64);
    /// Whether somebody asked to stop.
    fn is_stopped(&self) -> bool;
}

/// Nobody watches.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unwatched;

impl Watch for Unwatched {
    fn progress(&mut self, _side: usize, _tick: u64, _until: u64) {}

    fn is_stopped(&self) -> bool {
        false
    }
}

/// Both machines are alike before one instruction and not before the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gap {
    pub(crate) equal: u64,
    pub(crate) differs: u64,
}

/// A search under way.
pub(crate) struct Search<'a> {
    pub(crate) sides: &'a [Side<'a>; 2],
    watch: &'a mut dyn Watch,
    /// The tick at which each recording ends.
    ends: [u64; 2],
    /// What both had in common, ever later; never empty once the search has begun.
    bases: VecDeque<Base>,
    equal_until: u64,
    /// How often they were compared.
    pub(crate) comparisons: u64,
    /// How the replays ended that came to an end.
    pub(crate) over: [Option<Over>; 2],
}

impl<'a> Search<'a> {
    pub(crate) fn new(sides: &'a [Side<'a>; 2], watch: &'a mut dyn Watch) -> Self {
        let end = |side: &Side<'_>| {
            let last = side.replayable().recording().summary().last_moment;
            last.map_or(0, |moment| moment.tick)
        };
        Self {
            sides,
            watch,
            ends: sides.each_ref().map(end),
            bases: VecDeque::new(),
            equal_until: 0,
            comparisons: 0,
            over: [None, None],
        }
    }

    /// Both where their replays begin.
    pub(crate) fn begin(&mut self, starts: [Start; 2]) -> Result<Pair, BisectError> {
        let mut pair = Pair::begin(self.sides, starts)?;
        self.comparisons += 1;
        if !pair.differs(Depth::Visible)? {
            self.keep(&mut pair)?;
        }
        Ok(pair)
    }

    fn keep(&mut self, pair: &mut Pair) -> Result<(), BisectError> {
        let before = self.newest_image();
        if let Some(base) = pair.common(&before)? {
            if self.bases.len() == KEPT_BASES {
                self.bases.pop_front();
            }
            self.bases.push_back(base);
        }
        Ok(())
    }

    /// RAM that both had in common last; of zeros before there was any.
    pub(crate) fn newest_image(&self) -> Image {
        self.bases.back().map(|base| base.image.clone()).unwrap_or_default()
    }

    pub(crate) fn newest(&self) -> &Base {
        self.bases.back().expect("the search has begun where both are alike")
    }

    /// The last moment in common at or before an instruction, or the first that is known.
    fn base_before(&self, instruction: u64) -> &Base {
        let before = self.bases.iter().rev().find(|base| base.instructions <= instruction);
        before.unwrap_or_else(|| self.bases.front().expect("the search has begun"))
    }

    /// Both before an instruction, where they are alike; what they had in common is as [`Self::newest`] has
    /// it.
    pub(crate) fn return_to(&mut self, instruction: u64) -> Result<Pair, BisectError> {
        let mut pair = Pair::resume(self.sides, self.newest())?;
        self.advance(&mut pair, instruction)?;
        Ok(pair)
    }

    /// Both so many instructions before `instruction`, or less if that far back nothing is kept.
    pub(crate) fn return_before(
        &mut self,
        instruction: u64,
        count: u64,
    ) -> Result<Pair, BisectError> {
        let target = instruction.saturating_sub(count);
        let base = self.base_before(target);
        let from = base.instructions.max(target);
        let mut pair = Pair::resume(self.sides, base)?;
        self.advance(&mut pair, from)?;
        Ok(pair)
    }

    pub(crate) fn advance(&mut self, pair: &mut Pair, instruction: u64) -> Result<(), BisectError> {
        for (side, runner) in pair.runners.iter_mut().enumerate() {
            while runner.over().is_none() && runner.instructions() < instruction {
                let here = runner.instructions();
                runner.advance(instruction.min(here.saturating_add(SLICE)))?;
                self.watch.progress(side, runner.tick(), self.ends[side]);
                self.look_whether_to_stop()?;
            }
        }
        self.note_ends(pair);
        Ok(())
    }

    /// Moves both to a tick of their recordings, whose clock is one and the same.
    pub(crate) fn advance_to_tick(
        &mut self,
        pair: &mut Pair,
        tick: u64,
    ) -> Result<(), BisectError> {
        for (side, runner) in pair.runners.iter_mut().enumerate() {
            while runner.over().is_none() && runner.tick() < tick {
                let here = runner.tick();
                runner.advance_to_tick(tick.min(here.saturating_add(SLICE_TICKS)))?;
                self.watch.progress(side, runner.tick(), self.ends[side]);
                self.look_whether_to_stop()?;
            }
        }
        self.note_ends(pair);
        Ok(())
    }

    fn look_whether_to_stop(&self) -> Result<(), BisectError> {
        match self.watch.is_stopped() {
            true => Err(BisectError::Stopped { equal_until: self.equal_until }),
            false => Ok(()),
        }
    }

    fn note_ends(&mut self, pair: &Pair) {
        for (over, runner) in self.over.iter_mut().zip(&pair.runners) {
            if let Some(found) = runner.over() {
                *over = Some(found.clone());
            }
        }
    }

    /// Compares before each of `instructions`, which rise, up to the first place at which they are not alike,
    /// to the end of both runs, or to tick `until` of both.
    pub(crate) fn scan(
        &mut self,
        pair: &mut Pair,
        depth: Depth,
        until: u64,
        instructions: impl Iterator<Item = u64>,
    ) -> Result<Option<Gap>, BisectError> {
        let mut equal = pair.runners[0].instructions();
        for instruction in instructions {
            self.advance(pair, instruction)?;
            self.comparisons += 1;
            if pair.differs(depth)? {
                return Ok(Some(Gap { equal, differs: instruction }));
            }
            self.look_whether_to_stop()?;
            self.alike_at(pair, instruction)?;
            equal = instruction;
            if pair.is_over() || pair.runners.iter_mut().all(|runner| runner.tick() >= until) {
                break;
            }
        }
        Ok(None)
    }

    /// Compares at a tick that both clocks have.
    pub(crate) fn scan_tick(
        &mut self,
        pair: &mut Pair,
        depth: Depth,
        tick: u64,
    ) -> Result<Option<Gap>, BisectError> {
        let equal = pair.runners[0].instructions();
        self.advance_to_tick(pair, tick)?;
        self.comparisons += 1;
        let [one, other] = &mut pair.runners;
        let both = [one.instructions(), other.instructions()];
        if pair.differs(depth)? {
            // Where the first came to the tick the other one has not.
            let differs = both[0].min(both[1]).max(equal + 1);
            return Ok(Some(Gap { equal, differs }));
        }
        self.alike_at(pair, both[0])?;
        Ok(None)
    }

    fn alike_at(&mut self, pair: &mut Pair, instruction: u64) -> Result<(), BisectError> {
        let far = instruction - self.newest().instructions >= WORTH_KEEPING;
        if far || self.comparisons.is_multiple_of(COMPARISONS) {
            self.keep(pair)?;
        }
        self.equal_until = self.equal_until.max(instruction);
        Ok(())
    }

    /// Narrows a gap to one instruction.
    pub(crate) fn narrow(&mut self, mut gap: Gap, depth: Depth) -> Result<Gap, BisectError> {
        while gap.differs - gap.equal > 1 {
            let Gap { equal, differs } = gap;
            let step = (differs - equal).div_ceil(COMPARISONS);
            let mut pair = self.return_to(equal)?;
            let places = (1..=COMPARISONS).map(|number| differs.min(equal + number * step));
            let places = places.take_while_inclusive(differs);
            let found = self.scan(&mut pair, depth, u64::MAX, places)?;
            gap = found.ok_or(BisectError::NotAgain { equal, differs })?;
        }
        Ok(gap)
    }

    /// Both machines right before the instruction of a gap, before anything enters there.
    pub(crate) fn looks_at(&mut self, instruction: u64) -> Result<(Pair, [Look; 2]), BisectError> {
        let mut pair = self.return_to(instruction)?;
        let looks = pair.looks()?;
        Ok((pair, looks))
    }
}

/// Ends a rising sequence with the first element that is `last`.
trait TakeWhileInclusive: Iterator<Item = u64> + Sized {
    fn take_while_inclusive(self, last: u64) -> impl Iterator<Item = u64> {
        let mut done = false;
        self.take_while(move |tick| !std::mem::replace(&mut done, *tick >= last))
    }
}

impl<I: Iterator<Item = u64>> TakeWhileInclusive for I {}

/// Places behind `from` up to `until`: one after the other at first, then ever farther apart.
pub(crate) fn ever_farther(from: u64, until: u64) -> impl Iterator<Item = u64> {
    let next = move |place: &u64| {
        let step = 1 + (place - from) / DENSITY;
        (*place < until).then(|| until.min(place.saturating_add(step)))
    };
    std::iter::successors(Some(from), next).skip(1)
}

/// Behind a place where a difference is expected, the distance to the next comparison is this part of
/// the distance to that place.
const DENSITY: u64 = 256;

/// Places from `from` to `until` in equal steps.
pub(crate) fn evenly(from: u64, until: u64) -> impl Iterator<Item = u64> {
    const STEPS: u64 = 64;
    let step = (until - from).div_ceil(STEPS).max(1);
    (1..=STEPS).map(move |number| from + number * step).map(move |tick| tick.min(until)).take_while(
        {
            let mut last = from;
            move |tick| *tick > std::mem::replace(&mut last, *tick)
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_each_compared_at_first_and_reach_the_end() {
        let ticks: Vec<u64> = ever_farther(1000, 1_000_000).collect();
        assert_eq!(&ticks[..256], (1001..=1256).collect::<Vec<_>>());
        assert_eq!(ticks.last(), Some(&1_000_000));
        assert!(ticks.windows(2).all(|pair| pair[0] < pair[1]) && ticks.len() < 4000);
        assert_eq!(ever_farther(5, 5).count(), 0);
    }

    #[test]
    fn equal_steps_end_at_the_end() {
        for (from, until) in [(0, 1), (0, 63), (7, 71), (0, 1_000_003)] {
            let ticks: Vec<u64> = evenly(from, until).collect();
            assert_eq!(ticks.last(), Some(&until), "{from} to {until}");
            assert!(ticks[0] > from && ticks.windows(2).all(|pair| pair[0] < pair[1]));
        }
        assert_eq!(evenly(9, 9).count(), 0);
    }
}
