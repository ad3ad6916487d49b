//! Replays on hardware, which is not exact. Where an engine stops late and is past a place of the log, the
//! replay goes back to the nearest checkpoint before it and approaches it again with a wider margin.
//!
//! Where the guest went another way than recorded, the replay begins anew where it began: a CPU may set an accessed
//! bit early, Linux looks at those (whether a page that is unmapped was used decides a branch), and no log can have
//! it. A checkpoint on the way is no place to begin at, since it would mend whatever has gone wrong before it; so what
//! passes for verified has agreed in one go. A divergence that comes twice is one.

use std::cell::Cell;
use std::rc::Rc;

use reprise_machine::divergence::Divergence;
use reprise_machine::engine::{Engine, Overshoot};
use reprise_machine::inputs::Replaying;
use reprise_machine::machine::Machine;
use reprise_machine::outcome::{MachineError, Outcome};

use crate::beginning::{Beginning, Start};
use crate::error::ReplayError;
use crate::replayable::Replayable;

/// How often one place is approached, each time with twice the margin.
pub const MAX_ATTEMPTS: u32 = 6;

/// How often a replay begins, at most, if the guest diverges each time, and each time otherwise.
pub const MAX_BEGINNINGS: u32 = 3;

/// A replay that came to its end, or failed otherwise than by stopping late.
pub struct Arrived<E: Engine> {
    /// The machine.
    pub machine: Machine<E, Replaying>,
    /// What it came to.
    pub outcome: Result<Outcome, MachineError>,
    /// How often it had to go back because the engine stopped late.
    pub times_back: u32,
    /// How often it began anew because the guest had gone another way.
    pub times_parted: u32,
}

/// Where the approaches to a place stand.
#[derive(Default)]
struct Attempts {
    /// The furthest tick at which the engine was too late.
    furthest: u64,
    /// How often since the replay last came further than that.
    failed: u32,
    times_back: u32,
    /// The last divergence that is no result yet.
    parted: Option<Divergence>,
    times_parted: u32,
}

impl Attempts {
    /// Notes one that failed. Gives the tick before which to begin again.
    fn note(&mut self, overshoot: Overshoot) -> Result<u64, ReplayError> {
        self.times_back += 1;
        if overshoot.place.tick > self.furthest {
            (self.furthest, self.failed) = (overshoot.place.tick, 0);
        }
        self.failed += 1;
        match self.failed < MAX_ATTEMPTS {
            true => Ok(overshoot.place.tick),
            false => Err(ReplayError::Overshot { attempts: self.failed, overshoot }),
        }
    }

    /// Notes that the guest went another way. Gives whether to begin anew; if not, this divergence is the result.
    fn part(&mut self, divergence: &Divergence) -> bool {
        let again =
            self.parted.as_ref() != Some(divergence) && self.times_parted + 1 < MAX_BEGINNINGS;
        if again {
            self.parted = Some(divergence.clone());
            self.times_parted += 1;
            (self.furthest, self.failed) = (0, 0);
        }
        again
    }

    /// Has the engine keep the distance that the next attempt needs.
    fn prepare<E: Engine>(&self, engine: &mut E) {
        if self.failed > 0 {
            engine.widen_margin(self.furthest, 1 << self.failed);
        }
    }
}

impl Replayable {
    /// Has `make` put a machine together from where it is to begin, and `run` run it; from a checkpoint
    /// before the place anew, whenever the engine was stopped behind one, and where it began, whenever the guest
    /// diverged on hardware and not yet so for good. `run` may run a machine in several parts, and gives the
    /// first outcome that is not [`Ok`] or else the last.
    ///
    /// # Errors
    /// As [`Replayable::begin`] and `make`, and if [`MAX_ATTEMPTS`] approaches of one place have failed.
    pub fn run_going_back<E: Engine>(
        &self,
        beginning: Beginning,
        mut make: impl FnMut(Beginning) -> Result<Machine<E, Replaying>, ReplayError>,
        mut run: impl FnMut(&mut Machine<E, Replaying>) -> Result<Outcome, MachineError>,
    ) -> Result<Arrived<E>, ReplayError> {
        let mut attempts = Attempts::default();
        let start = beginning.start();
        let mut beginning = beginning;
        loop {
            let mut machine = make(beginning)?;
            attempts.prepare(machine.engine());
            match run(&mut machine) {
                Err(MachineError::Overshot(overshoot)) => {
                    beginning = self.begin_before(attempts.note(overshoot)?)?;
                }
                outcome => {
                    let early = machine.engine().sets_accessed_bits_early();
                    let parted = outcome.as_ref().ok().and_then(Outcome::divergence);
                    if let (Some(start), Some(divergence)) = (start, parted.filter(|_| early))
                        && attempts.part(divergence)
                    {
                        beginning = self.begin(start)?;
                        continue;
                    }
                    let Attempts { times_back, times_parted, .. } = attempts;
                    return Ok(Arrived { machine, outcome, times_back, times_parted });
                }
            }
        }
    }

    /// The last usable checkpoint before a tick, or else the start of the run.
    fn begin_before(&self, tick: u64) -> Result<Beginning, ReplayError> {
        let before = self.checkpoints().partition_point(|info| info.moment.tick < tick);
        for index in (0..before).rev() {
            match self.begin(Start::Checkpoint(index)) {
                // The one before it serves as well, only later.
                Err(ReplayError::Checkpoint(_)) => {}
                result => return result,
            }
        }
        self.begin(Start::Run)
    }
}

/// Lets console output pass once, whatever parts of it are replayed again.
#[derive(Clone, Debug, Default)]
pub struct ConsoleOnce {
    /// Bytes before what the machine writes next.
    at: Rc<Cell<u64>>,
    /// Bytes that have passed.
    passed: Rc<Cell<u64>>,
}

impl ConsoleOnce {
    /// A machine begins behind so many bytes of output ([`Beginning::console_bytes`]); the first one's
    /// are not asked for.
    pub fn begin(&self, console_bytes: u64) {
        self.at.set(console_bytes);
        self.passed.set(self.passed.get().max(console_bytes));
    }

    /// What of the next output has not passed yet.
    pub fn fresh<'b>(&self, bytes: &'b [u8]) -> &'b [u8] {
        let (at, passed) = (self.at.get(), self.passed.get());
        let end = at + bytes.len() as u64;
        self.at.set(end);
        self.passed.set(passed.max(end));
        let known = passed.saturating_sub(at).min(bytes.len() as u64);
        &bytes[known as usize..]
    }
}

#[cfg(test)]
mod tests {
    use reprise_machine::divergence::Difference;
    use reprise_trace::moment::Moment;

    use super::*;

    #[test]
    fn output_passes_once() {
        let once = ConsoleOnce::default();
        once.begin(10);
        assert_eq!(once.fresh(b"abc"), b"abc");
        assert_eq!(once.fresh(b"de"), b"de");
        once.begin(11);
        assert_eq!(once.fresh(b"b"), b"");
        assert_eq!(once.fresh(b"cdef"), b"f");
        assert_eq!(once.fresh(b"g"), b"g");
        once.begin(0);
        assert_eq!(once.fresh(&[0; 12]), b"");
    }

    #[test]
    fn attempts_at_one_place_are_bounded_and_start_anew_behind_it() {
        let overshoot =
            |tick| Overshoot { place: Moment { tick, rip: 0, rcx: 0 }, margin: 100, ticks_late: 1 };
        let mut attempts = Attempts::default();
        for _ in 1..MAX_ATTEMPTS {
            assert_eq!(attempts.note(overshoot(50)).ok(), Some(50));
        }
        assert_eq!(attempts.note(overshoot(60)).ok(), Some(60));
        for _ in 2..MAX_ATTEMPTS {
            // Places before the furthest are no progress.
            assert_eq!(attempts.note(overshoot(55)).ok(), Some(55));
        }
        let error = attempts.note(overshoot(60)).expect_err("it is enough");
        assert!(error.to_string().contains("--engine soft"), "{error}");
    }

    #[test]
    fn a_divergence_that_comes_twice_is_the_result() {
        let divergence = |tick, found: &str| Divergence {
            moment: Moment { tick, rip: 0, rcx: 0 },
            difference: Difference::Passed,
            expected: "console input".to_owned(),
            found: found.to_owned(),
        };
        let mut attempts = Attempts::default();
        assert!(attempts.part(&divergence(50, "tick 60")));
        assert!(!attempts.part(&divergence(50, "tick 60")));
        // Otherwise, and elsewhere, it may happen again, but not for ever.
        let mut attempts = Attempts::default();
        for begun in 1..MAX_BEGINNINGS {
            assert!(attempts.part(&divergence([70, 50][begun as usize % 2], "tick 80")));
        }
        assert!(!attempts.part(&divergence(90, "tick 99")));
        assert_eq!(attempts.times_parted, MAX_BEGINNINGS - 1);
    }
}
