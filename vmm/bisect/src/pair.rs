//! Two machines side by side, and what they had in common last.

use std::collections::BTreeSet;

use reprise_machine::engine::EngineError;
use reprise_machine::stepping::Standing;
use reprise_replay::{ReplayError, Start};

use crate::image::Image;
use crate::replica::{Depth, Look, Runner};
use crate::side::Side;

/// A moment at which both machines had the same RAM, and from which both can go on.
#[derive(Clone, Debug)]
pub(crate) struct Base {
    /// Instructions before it.
    pub(crate) instructions: u64,
    pub(crate) image: Image,
    standing: [Standing; 2],
}

/// Both machines.
pub(crate) struct Pair {
    pub(crate) runners: [Runner; 2],
    /// Pages that either may have written since the image that they are compared with.
    changed: BTreeSet<u64>,
}

impl Pair {
    /// Both where their replays begin; any page of RAM may differ.
    pub(crate) fn begin(sides: &[Side<'_>; 2], starts: [Start; 2]) -> Result<Self, ReplayError> {
        let runners = [sides[0].begin(starts[0])?, sides[1].begin(starts[1])?];
        Ok(Self { runners, changed: BTreeSet::new() })
    }

    /// Both at a moment that they had in common.
    pub(crate) fn resume(sides: &[Side<'_>; 2], base: &Base) -> Result<Self, ReplayError> {
        let [one, other] = [0, 1].map(|which| sides[which].resume(base, &base.standing[which]));
        let mut pair = Self { runners: [one?, other?], changed: BTreeSet::new() };
        // All of RAM, which is the image.
        pair.forget_changes();
        Ok(pair)
    }

    /// From here on only pages count that are written from here on.
    pub(crate) fn forget_changes(&mut self) {
        self.see_changes();
        self.changed.clear();
    }

    pub(crate) fn looks(&mut self) -> Result<[Look; 2], EngineError> {
        let [one, other] = &mut self.runners;
        Ok([one.look()?, other.look()?])
    }

    pub(crate) fn is_over(&self) -> bool {
        self.runners.iter().all(|runner| runner.over().is_some())
    }

    fn see_changes(&mut self) {
        for runner in &mut self.runners {
            runner.add_changed_pages(&mut self.changed);
        }
    }

    /// Whether they are not the same, RAM included.
    pub(crate) fn differs(&mut self, depth: Depth) -> Result<bool, EngineError> {
        let [one, other] = &mut self.runners;
        if one.cpu()? != other.cpu()? {
            return Ok(true);
        }
        let [one, other] = self.looks()?;
        Ok(!one.is_like(&other, depth) || !self.differing_pages(1).is_empty())
    }

    /// Pages of RAM that are not the same, at most so many.
    pub(crate) fn differing_pages(&mut self, at_most: usize) -> Vec<u64> {
        self.see_changes();
        let Self { runners: [one, other], changed } = self;
        let differs = |page: &&u64| one.page(**page) != other.page(**page);
        changed.iter().filter(differs).take(at_most).copied().collect()
    }

    /// How many there are of them.
    pub(crate) fn count_differing_pages(&mut self) -> usize {
        self.differing_pages(usize::MAX).len()
    }

    /// What both have in common here, `before` being what they had at an earlier moment. `None` where
    /// they cannot go on from.
    pub(crate) fn common(&mut self, before: &Image) -> Result<Option<Base>, EngineError> {
        // Taking the states forgets what was written before.
        self.see_changes();
        let [one, other] = &mut self.runners;
        let instructions = one.instructions();
        let (Some(standing), Some(other_standing)) = (one.standing()?, other.standing()?) else {
            return Ok(None);
        };
        let mut image = before.clone();
        for page in std::mem::take(&mut self.changed) {
            image.set(page, self.runners[0].page(page));
        }
        Ok(Some(Base { instructions, image, standing: [standing, other_standing] }))
    }

    /// RAM as the machine `which` has it, `before` being what both had.
    pub(crate) fn image_of(&mut self, which: usize, before: &Image) -> Image {
        self.see_changes();
        let mut image = before.clone();
        for page in &self.changed {
            image.set(*page, self.runners[which].page(*page));
        }
        image
    }
}
