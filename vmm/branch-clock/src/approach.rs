//! Finding a recorded moment again: the counter stops the guest short of its tick, and breakpoints do the
//! rest.
//!
//! The counter is late by a number of branches that nobody knows beforehand, and the margin by which it
//! is asked to stop short of a tick covers that mostly. Where it does not, the guest is past the moment
//! for good. That is told ([`Exit::Overshot`]), and whoever drives the replay goes back to a checkpoint.

use reprise_machine::engine::{Engine, EngineError, Exit, Overshoot};
use reprise_machine::inputs::Stamp;
use reprise_trace::cpu_state::{CpuState, RCX};
use reprise_trace::moment::Moment;

use crate::engine::BranchClock;
use crate::guest_code::linear_of;
use crate::settle::Stepped;
use crate::vcpu::{Vcpu, VcpuExit};

/// A guest that was stepped off a breakpoint so often in a row, and is at it again in the same state, would be
/// for ever.
const MAX_AT_REST: u32 = 3;

impl<V: Vcpu> BranchClock<V> {
    /// A kick of a replay only shows how far it is.
    fn kicked_on_the_way(&mut self) -> Exit {
        self.stands = false;
        Exit::Kicked
    }

    /// Ticks by which the counter is to stop the guest short of tick `target`.
    fn margin(&self, target: u64) -> u64 {
        let usual = self.parameters.skid;
        match self.widened {
            Some((until, margin)) if target <= until => margin.max(usual),
            _ => usual,
        }
    }

    /// Runs until soon after tick `until`.
    pub(crate) fn run_past(&mut self, until: u64) -> Result<Exit, EngineError> {
        self.vcpu.set_breakpoints(&[])?;
        loop {
            let tick = self.tick();
            if tick >= until && !self.amid {
                return Ok(Exit::TickReached);
            }
            let left = until.saturating_sub(tick).saturating_add(self.parameters.skid);
            self.vcpu.set_overflow(Some(left))?;
            match self.enter()? {
                VcpuExit::Interrupted { kicked: true } => return Ok(self.kicked_on_the_way()),
                VcpuExit::Interrupted { kicked: false } | VcpuExit::Breakpoint => {}
                exit => return Ok(self.hand_over(exit)),
            }
        }
    }

    /// Runs to the first place of tick `until`, the last branches of the way step by step; soon after it,
    /// where what an instruction leads to cannot be said.
    pub(crate) fn run_exactly(&mut self, until: u64) -> Result<Exit, EngineError> {
        let place = Moment { tick: until, rip: 0, rcx: 0 };
        if !self.amid
            && let Some(exit) = self.come_near(place)?
        {
            // Whatever is there is there to be seen: no place is sought.
            self.doubtful = None;
            return Ok(exit);
        }
        while self.tick() < until || self.amid {
            match self.step_on()? {
                Stepped::Done => {}
                Stepped::Kicked => return Ok(self.kicked_on_the_way()),
                Stepped::Exits(exit) => return Ok(exit),
                Stepped::Lost => return self.run_past(until),
            }
        }
        Ok(Exit::TickReached)
    }

    /// Runs until short of the tick by the margin, at the latest; `None` if it got there.
    fn come_near(&mut self, target: Moment) -> Result<Option<Exit>, EngineError> {
        self.vcpu.set_breakpoints(&[])?;
        let margin = self.margin(target.tick);
        loop {
            let distance = target.tick.saturating_sub(self.tick());
            if distance <= margin {
                return Ok(None);
            }
            self.vcpu.set_overflow(Some(distance - margin))?;
            match self.enter()? {
                VcpuExit::Interrupted { kicked } => {
                    if self.tick() >= target.tick {
                        return Ok(Some(self.overshot(target, margin)));
                    }
                    if kicked {
                        return Ok(Some(self.kicked_on_the_way()));
                    }
                }
                VcpuExit::Breakpoint => {}
                exit => {
                    let exit = self.hand_over(exit);
                    if self.tick() > target.tick {
                        return Ok(Some(self.overshot(target, margin)));
                    }
                    if self.tick() == target.tick {
                        self.doubtful = Some(margin);
                    }
                    return Ok(Some(exit));
                }
            }
        }
    }

    fn overshot(&mut self, place: Moment, margin: u64) -> Exit {
        self.counts.overshot += 1;
        let ticks_late = self.tick().saturating_sub(place.tick);
        Exit::Overshot(Overshoot { place, margin, ticks_late })
    }

    /// Whether the guest stands where `stamp` was taken.
    fn stands_at(&self, stamp: &Stamp, state: &CpuState) -> bool {
        let Moment { tick, rip, rcx } = stamp.moment;
        let near = self.tick() == tick && state.rip == rip && state.gpr[RCX] == rcx;
        near && state.short_digest() == stamp.cpu_digest
    }

    /// Finds the place of `stamp`.
    pub(crate) fn find(&mut self, stamp: &Stamp) -> Result<Exit, EngineError> {
        if !self.amid
            && let Some(exit) = self.come_near(stamp.moment)?
        {
            return Ok(exit);
        }
        self.close_in(stamp)
    }

    /// Runs from breakpoint to breakpoint at the moment's RIP.
    fn close_in(&mut self, stamp: &Stamp) -> Result<Exit, EngineError> {
        let target = stamp.moment;
        let mut at_rest = 0;
        loop {
            let tick = self.tick();
            if tick > target.tick {
                return Ok(match self.doubtful.take() {
                    Some(margin) => self.overshot(target, margin),
                    None => Exit::TickReached,
                });
            }
            let state = self.vcpu.state()?;
            let settled = self.injected.is_none() && !self.amid;
            if settled && self.stands_at(stamp, &state) {
                self.counts.found += 1;
                self.doubtful = None;
                return Ok(Exit::TickReached);
            }
            // The moment may lie in other code than the guest is in now: a moment of 64-bit code, at the
            // linear address that is its RIP.
            let wanted = [linear_of(&state, target.rip), target.rip];
            let distinct = if wanted[0] == wanted[1] { &wanted[..1] } else { &wanted };
            self.vcpu.set_breakpoints(distinct)?;
            let steps_off = settled && wanted.contains(&linear_of(&state, state.rip));
            if steps_off {
                self.counts.passed_over += 1;
                self.vcpu.step_off()?;
            }
            // A guest that never comes to the place must not run for ever.
            let beyond = (target.tick - tick).saturating_add(self.parameters.skid + 1);
            self.vcpu.set_overflow(Some(beyond))?;
            match self.enter()? {
                VcpuExit::Breakpoint if steps_off && self.tick() == tick => {
                    at_rest = if self.vcpu.state()? == state { at_rest + 1 } else { 0 };
                    if at_rest == MAX_AT_REST {
                        return Err(does_not_move(&state, tick));
                    }
                }
                VcpuExit::Breakpoint | VcpuExit::Interrupted { kicked: false } => {}
                VcpuExit::Interrupted { kicked: true } => return Ok(self.kicked_on_the_way()),
                exit => return Ok(self.hand_over(exit)),
            }
        }
    }
}

fn does_not_move(state: &CpuState, tick: u64) -> EngineError {
    let what = format!(
        "the guest does not come out of rip {:#x} at tick {tick}, where a moment of the recording is sought: use \
         --engine soft",
        state.rip
    );
    EngineError { what }
}
