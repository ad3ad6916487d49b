//! The recording side of the boundary: asks the host, appends to the log, hands on what the log
//! gave back.

use std::collections::VecDeque;

use reprise_devices::time::VirtualTime;
use reprise_trace::checkpoint::LastRecord;
use reprise_trace::event::{EffectDigest, Ending, Event, HandOver, LoggedEvent, Record};
use reprise_trace::log::{FrameSink, LogError, LogWriter};
use reprise_trace::logged::Logged;
use reprise_trace::moment::Moment;

use super::typing::Typing;
use super::{Arrival, Boundary, EndState, Idle, Inputs, MAX_UNLOGGED_JUMPS, Stamp, Stop, Told};
use crate::clock::{MAX_VIRTUAL_NS, TimeBase, TimeSource};
use crate::digest::StateDigest;
use crate::engine::{Access, Engine};
use crate::host::{Host, Wake};

/// An idle guest's records go out after at most this long, even when nobody kicks: half of the
/// second that a killed recorder may lose.
const IDLE_FLUSH_NS: u64 = 500_000_000;

/// A guest to whom no input will come, and that sleeps through this many deadlines without taking an
/// interrupt, sleeps for ever: its timer runs, but is masked.
const MAX_UNPACED_JUMPS: u64 = 1 << 24;

/// Asks the host and writes the log. With a [`reprise_trace::log::DiscardSink`] it is a run without
/// recording.
#[derive(Debug)]
pub struct Recording<H: Host, S: FrameSink> {
    pub(super) host: H,
    /// `None` once the log is closed.
    log: Option<LogWriter<S>>,
    sink: Option<S>,
    records: u64,
    last_logged: Option<LastRecord>,
    last_flushed: Option<Moment>,
    /// What this visit to a boundary will log.
    staged: VecDeque<Event>,
    stop: Option<Ending>,
    /// Nothing can wake the guest: the run ends at the next boundary if nothing has come until then.
    forever: bool,
    /// The outside has been looked at in this visit to a boundary.
    visited: bool,
    /// Somebody kicked: look at everything at the next boundary.
    look: bool,
    mark_due: bool,
    flush_due: bool,
    typing: Typing,
    rest: Option<Rest>,
    plan: VecDeque<Planned>,
    /// What is added to the host's clock.
    clock_shift_ns: u64,
}

/// A place of a run, as whoever plans it knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// A tick.
    Tick(u64),
    /// Nanoseconds of virtual time.
    Time(u64),
}

/// What is to happen at the first place at or behind `at` where the guest is awake and amid nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    /// Where.
    pub at: When,
    /// What.
    pub then: Then,
}

/// See [`Planned`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Then {
    /// Another engine goes on.
    HandOver(HandOver),
    /// The run ends.
    Stop,
}

/// A guest's sleep in HLT, where virtual time follows ticks and so has to be moved.
#[derive(Clone, Copy, Debug)]
struct Rest {
    tick: u64,
    /// The host's clock and virtual time at one instant of the sleep.
    host_ns: u64,
    virtual_ns: u64,
    /// How often virtual time has moved to a deadline since the last record here. Nothing in the log
    /// says so: unless it is never, the next record here must be an [`Event::Time`], or a replay
    /// would apply it too early.
    unlogged_jumps: u64,
    /// How often it has moved because nobody was there to wait for.
    unpaced_jumps: u64,
}

impl<H: Host, S: FrameSink> Recording<H, S> {
    /// A recording into `log`.
    pub fn new(host: H, log: LogWriter<S>) -> Self {
        Self {
            host,
            log: Some(log),
            sink: None,
            records: 0,
            last_logged: None,
            last_flushed: None,
            staged: VecDeque::new(),
            stop: None,
            forever: false,
            visited: false,
            look: true,
            mark_due: false,
            flush_due: false,
            typing: Typing::default(),
            rest: None,
            plan: VecDeque::new(),
            clock_shift_ns: 0,
        }
    }

    /// Plans where the run goes on otherwise, in that order.
    #[must_use]
    pub fn with_plan(mut self, plan: impl IntoIterator<Item = Planned>) -> Self {
        self.plan = plan.into_iter().collect();
        self
    }

    /// The host, and where the log went; the sink is `None` if the run did not end or the log could
    /// not be written.
    pub fn into_parts(self) -> (H, Option<S>) {
        (self.host, self.sink)
    }

    /// The host.
    pub fn host(&self) -> &H {
        &self.host
    }

    fn append(&mut self, stamp: Stamp, event: Event) -> Result<Logged<Record>, Stop> {
        let log = self.log.as_mut().ok_or(Stop::Unwritable(LogError::Closed))?;
        let record = Record { moment: stamp.moment, cpu_digest: stamp.cpu_digest, event };
        let logged = log.append(record).map_err(Stop::Unwritable)?;
        self.records += 1;
        let Stamp { moment, cpu_digest } = stamp;
        self.last_logged = Some(LastRecord { moment, cpu_digest });
        Ok(logged)
    }

    fn flush(&mut self) -> Result<(), Stop> {
        let log = self.log.as_mut().ok_or(Stop::Unwritable(LogError::Closed))?;
        log.flush().map_err(Stop::Unwritable)?;
        self.last_flushed = self.last_moment();
        Ok(())
    }

    /// Stages what enters at this boundary, in order: time, console input, a mark.
    fn visit<E: Engine>(&mut self, here: &mut Boundary<'_, E>) -> Result<(), Stop> {
        if let Some(planned) = self.planned_here(here)? {
            self.stage_planned(here, planned);
            return Ok(());
        }
        let host_ns = match here.time {
            TimeSource::Host => self.now_ns().min(MAX_VIRTUAL_NS),
            TimeSource::Ticks { .. } => 0,
        };
        if self.may_log(here, host_ns) && here.engine.amid_accesses()? {
            // The next boundary is soon.
            return Ok(());
        }
        let looking = std::mem::take(&mut self.look) || here.halted;
        if looking {
            self.stop = self.host.stop_requested();
            self.mark_due |= self.host.flush_due();
        }
        let input = self.input_for(here, looking);
        let entering = input.is_some() || self.stop.is_some();
        let forever = std::mem::take(&mut self.forever) && !entering;
        let marking = std::mem::take(&mut self.mark_due);
        let known = self.last_moment().is_some_and(|moment| moment.tick == here.tick);
        let mark = marking && !known && !entering;
        self.flush_due |= marking;
        match here.time {
            TimeSource::Ticks { .. } => self.stage_sleep(here, entering, mark || forever),
            TimeSource::Host => self.stage_host_time(here, host_ns, entering),
        }
        self.staged.extend(input.map(Event::Console));
        if mark {
            self.staged.push_back(Event::Mark(here.effects.digest().mark()));
        }
        if forever {
            self.stop = Some(Ending::IdleForever);
        }
        Ok(())
    }

    /// Whether this visit may come to a record: asking an engine where it stands costs more than that.
    fn may_log<E: Engine>(&self, here: &Boundary<'_, E>, host_ns: u64) -> bool {
        self.look
            || self.mark_due
            || here.deadline.is_some_and(|deadline| deadline.ns <= host_ns)
            || self.typing.may_be_due(here.console_room)
    }

    /// What is planned for this boundary, if anything is.
    fn planned_here<E: Engine>(
        &mut self,
        here: &mut Boundary<'_, E>,
    ) -> Result<Option<Then>, Stop> {
        let Some(planned) = self.plan.front() else { return Ok(None) };
        let due = match (planned.at, here.time) {
            (When::Tick(tick), _) => here.tick >= tick,
            (When::Time(ns), TimeSource::Ticks { .. }) => here.now.ns >= ns,
            (When::Time(ns), TimeSource::Host) => self.now_ns() >= ns,
        };
        if !due || !here.is_whole()? {
            return Ok(None);
        }
        Ok(self.plan.pop_front().map(|planned| planned.then))
    }

    /// Where the host's clock is virtual time, what follows begins at the time that it is now.
    fn stage_planned<E: Engine>(&mut self, here: &Boundary<'_, E>, then: Then) {
        if here.time == TimeSource::Host {
            let host_ns = self.now_ns().min(MAX_VIRTUAL_NS);
            self.stage_host_time(here, host_ns, true);
        }
        match then {
            Then::HandOver(to) => self.staged.push_back(Event::HandOver(to)),
            Then::Stop => self.stop = Some(Ending::Stopped),
        }
    }

    /// The host's time, shifted so that it goes on from virtual time where the host's clock began to
    /// be that amid a run.
    fn now_ns(&mut self) -> u64 {
        self.host.now_ns().wrapping_add(self.clock_shift_ns)
    }

    /// Console bytes that the guest has room for.
    fn input_for<E: Engine>(&mut self, here: &Boundary<'_, E>, looking: bool) -> Option<Vec<u8>> {
        let room = here.console_room;
        if !self.typing.is_due(room, here.now, here.halted, looking) {
            return None;
        }
        let bytes = self.host.take_console_input(room);
        self.typing.given(bytes.len(), room);
        (!bytes.is_empty()).then_some(bytes)
    }

    /// Where virtual time follows ticks, only a sleep moves it. Whatever enters then comes at the
    /// time that has passed on the host's clock, capped at the deadline that ends the sleep.
    /// `noting` says that a record will follow which does not depend on the time.
    fn stage_sleep<E: Engine>(&mut self, here: &Boundary<'_, E>, entering: bool, noting: bool) {
        if !here.halted {
            self.rest = None;
            return;
        }
        let host_ns = self.now_ns();
        let rest = self.rest_at(here, host_ns);
        let mut ns = here.now.ns;
        if entering {
            let limit = here.deadline.map_or(MAX_VIRTUAL_NS, |deadline| deadline.ns);
            ns = rest.virtual_at(host_ns).min(limit).max(ns);
        }
        let jumped = rest.unlogged_jumps > 0;
        let many = rest.unlogged_jumps >= MAX_UNLOGGED_JUMPS;
        if ns > here.now.ns || (jumped && (entering || noting)) || many {
            self.staged.push_back(Event::Time(ns));
            self.rest = Some(Rest { unlogged_jumps: 0, ..rest });
        }
    }

    /// Where the host's clock is virtual time, it enters when a device waits for it, and with
    /// whatever else enters.
    fn stage_host_time<E: Engine>(&mut self, here: &Boundary<'_, E>, ns: u64, entering: bool) {
        let due = here.deadline.is_some_and(|deadline| deadline.ns <= ns);
        if due || (entering && ns > here.now.ns) {
            self.staged.push_back(Event::Time(ns));
        }
    }

    /// This sleep, which starts here if it has not yet.
    fn rest_at<E: Engine>(&mut self, here: &Boundary<'_, E>, host_ns: u64) -> Rest {
        let (tick, virtual_ns) = (here.tick, here.now.ns);
        let fresh = Rest { tick, host_ns, virtual_ns, unlogged_jumps: 0, unpaced_jumps: 0 };
        let rest = self.rest.filter(|rest| rest.tick == here.tick).unwrap_or(fresh);
        self.rest = Some(rest);
        rest
    }

    fn last_moment(&self) -> Option<Moment> {
        self.last_logged.map(|last| last.moment)
    }

    /// Whether anything that has happened is not in the sink yet, or not verifiable by a record.
    fn has_unflushed(&self, tick: u64) -> bool {
        self.last_flushed != self.last_moment()
            || self.last_moment().is_none_or(|moment| moment.tick != tick)
    }

    /// Sleeps until `remaining_ns` have passed or something came. Gives whether the whole time has
    /// passed.
    fn sleep(&mut self, tick: u64, remaining_ns: Option<u64>) -> bool {
        let limit_ns = self.has_unflushed(tick).then_some(IDLE_FLUSH_NS);
        let timeout_ns = match (remaining_ns, limit_ns) {
            (Some(remaining), Some(limit)) => Some(remaining.min(limit)),
            (remaining, limit) => remaining.or(limit),
        };
        match self.host.wait(timeout_ns) {
            Wake::Look => {
                self.look = true;
                false
            }
            Wake::Timeout if timeout_ns == remaining_ns => true,
            Wake::Timeout => {
                self.mark_due = true;
                false
            }
        }
    }
}

impl Rest {
    /// Virtual time when the host's clock says `host_ns`, if the guest still sleeps.
    fn virtual_at(&self, host_ns: u64) -> u64 {
        self.virtual_ns.saturating_add(host_ns.saturating_sub(self.host_ns))
    }
}

impl<H: Host, S: FrameSink> Inputs for Recording<H, S> {
    fn stop_at(&mut self, tick: u64, base: &TimeBase) -> Result<Option<u64>, Stop> {
        if base.ns_per_tick == 0 {
            // Not every clock stops there in time, and at a place that is found again: what is planned waits
            // for the next such place.
            return Ok(None);
        }
        let next = self.plan.front().and_then(|planned| match planned.at {
            When::Tick(tick) => Some(tick),
            When::Time(ns) => base.tick_of(VirtualTime::from_ns(ns)),
        });
        // One that is due already waits for the guest to wake.
        Ok(next.filter(|next| *next > tick))
    }

    fn place(&mut self) -> Option<Stamp> {
        None
    }

    fn arrival<E: Engine>(&mut self, here: &mut Boundary<'_, E>) -> Result<Option<Arrival>, Stop> {
        if !std::mem::replace(&mut self.visited, true) {
            self.visit(here)?;
        }
        while let Some(event) = self.staged.pop_front() {
            let stamp = here.stamp()?;
            match self.append(stamp, event)?.into_event() {
                LoggedEvent::Time(ns) => return Ok(Some(Arrival::Time(ns))),
                LoggedEvent::Console(bytes) => return Ok(Some(Arrival::Console(bytes))),
                LoggedEvent::HandOver(to) => {
                    self.clock_shift_ns = here.now.ns.wrapping_sub(self.host.now_ns());
                    self.visited = false;
                    return Ok(Some(Arrival::HandOver(to)));
                }
                _ => {}
            }
        }
        self.visited = false;
        if std::mem::take(&mut self.flush_due) {
            self.flush()?;
        }
        Ok(self.stop.take().map(|ending| Arrival::Stop { ending, exact: true }))
    }

    fn answers_time_stamp(&mut self, _tick: u64) -> bool {
        false
    }

    fn runs_freely(&mut self, deadline: Option<VirtualTime>) {
        // The host knows its own clock, and nothing of what is added to it.
        let shift_ns = self.clock_shift_ns as i64;
        let host_ns = |deadline: VirtualTime| {
            let ns = i128::from(deadline.ns) - i128::from(shift_ns);
            ns.clamp(0, i128::from(u64::MAX)) as u64
        };
        self.host.kick_at(deadline.map(host_ns));
    }

    fn idle<E: Engine>(&mut self, here: &mut Boundary<'_, E>) -> Result<Idle, Stop> {
        // A guest without room for a byte sleeps through whatever is typed.
        let input_may_come = here.console_room > 0 && self.host.input_may_come();
        let deadline = here.deadline.filter(|deadline| deadline.ns <= MAX_VIRTUAL_NS);
        let Some(deadline) = deadline else {
            match input_may_come {
                true => _ = self.sleep(here.tick, None),
                false => self.forever = true,
            }
            return Ok(Idle::Look);
        };
        let host_ns = self.now_ns();
        if here.time == TimeSource::Host {
            if host_ns < deadline.ns {
                self.sleep(here.tick, Some(deadline.ns - host_ns));
            }
            return Ok(Idle::Look);
        }
        let mut rest = self.rest_at(here, host_ns);
        if input_may_come {
            let remaining_ns = deadline.ns.saturating_sub(rest.virtual_at(host_ns));
            if remaining_ns > 0 && !self.sleep(here.tick, Some(remaining_ns)) {
                return Ok(Idle::Look);
            }
        } else if rest.unpaced_jumps >= MAX_UNPACED_JUMPS {
            self.forever = true;
            return Ok(Idle::Look);
        } else {
            // Nobody is there to notice how long the sleep takes, so it takes no time.
            (rest.host_ns, rest.virtual_ns) = (host_ns, deadline.ns);
            rest.unpaced_jumps += 1;
        }
        rest.unlogged_jumps += 1;
        self.rest = Some(rest);
        Ok(Idle::Jump(deadline))
    }

    fn clock_answer(
        &mut self,
        tick: u64,
        access: &Access,
        now: VirtualTime,
    ) -> Result<Logged<u64>, Stop> {
        let ns = self.now_ns().min(MAX_VIRTUAL_NS).max(now.ns);
        match self.append(Stamp::of_access(tick, access), Event::ClockRead(ns))?.into_event() {
            LoggedEvent::ClockRead(ns) => Ok(ns),
            other => unreachable!("the log gave back {other:?} for a clock read"),
        }
    }

    fn clock_beside(
        &mut self,
        _tick: u64,
        _access: &Access,
        _now: VirtualTime,
    ) -> Result<Option<Logged<u64>>, Stop> {
        Ok(None)
    }

    fn devices_followed(&mut self, _now: VirtualTime) {
        // A replay comes to the same.
    }

    fn kicked(&mut self, tick: u64, now: VirtualTime, exact: bool) -> Result<(), Stop> {
        self.look = true;
        self.host.progress(tick, now.ns);
        if exact {
            return Ok(());
        }
        // No boundary may come for long (the guest may compute for ever), so what can be done
        // anywhere is done here.
        if self.host.flush_due() {
            self.mark_due = true;
            self.flush()?;
        }
        match self.host.stop_requested() {
            Some(ending) => Err(Stop::Ended { ending, exact: false }),
            None => Ok(()),
        }
    }

    fn console_output(&mut self, bytes: &[u8]) {
        self.host.console_output(bytes);
    }

    fn end(
        &mut self,
        stamp: Stamp,
        effects: EffectDigest,
        ending: &Ending,
        state: Option<EndState<'_>>,
        told: Told,
    ) -> Result<Option<StateDigest>, Stop> {
        let Told { assists, left_open } = told;
        if !assists.is_empty() {
            self.append(stamp, Event::Assists(assists))?;
        }
        if !left_open.is_empty() {
            self.append(stamp, Event::LeftOpen(left_open))?;
        }
        let final_digest = state.map(|state| state.digest.whole());
        self.append(stamp, Event::End { ending: ending.clone(), effects, final_digest })?;
        self.close_without_end()?;
        Ok(state.map(|state| *state.digest))
    }

    fn close_without_end(&mut self) -> Result<(), Stop> {
        self.flush()?;
        let log = self.log.take().ok_or(Stop::Unwritable(LogError::Closed))?;
        self.sink = Some(log.finish().map_err(Stop::Unwritable)?);
        Ok(())
    }

    fn events(&self) -> u64 {
        self.records
    }

    fn last_record(&self) -> Option<LastRecord> {
        self.last_logged
    }

    fn confirmed_until(&self) -> Option<Moment> {
        self.last_flushed
    }
}
