//! The replaying side of the boundary: reads the log, compares, and holds no host.

use std::fmt;

use reprise_devices::time::VirtualTime;
use reprise_trace::checkpoint::LastRecord;
use reprise_trace::cpu_state::CpuState;
use reprise_trace::event::{EffectDigest, Ending, Event, LoggedEvent, Record};
use reprise_trace::log::LogReader;
use reprise_trace::logged::Logged;
use reprise_trace::moment::{Moment, TickKind};

use super::{Arrival, Boundary, EndState, Idle, Inputs, MAX_UNLOGGED_JUMPS, Stamp, Stop, Told};
use crate::clock::{MAX_VIRTUAL_NS, TimeBase, TimeSource};
use crate::digest::StateDigest;
use crate::divergence::{Difference, Divergence, describe, describe_ending};
use crate::engine::{Access, Engine, EngineError};
use crate::lawful::{Explained, Lawful, Permitted, SetAside, explained};

/// How much of the machine a replay compares.
///
/// By default everything: position, CPU state, effects, final state. What another engine or another CPU may
/// lawfully keep otherwise is set aside and told ([`crate::lawful`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verification {
    /// Another engine recorded.
    pub other_engine: bool,
    /// Another CPU recorded.
    pub other_cpu: bool,
    /// Hardware replays, and keeps the x87 unit's last instruction as that CPU does.
    pub on_hardware: bool,
}

impl Verification {
    /// In what a CPU state may differ from the recorded one, where these flags are undefined.
    pub fn permits(self, undefined_flags: impl FnOnce() -> u64) -> Permitted {
        Permitted {
            x87_last_instruction: self.other_engine || self.other_cpu && self.on_hardware,
            undefined_flags: if self.other_cpu { undefined_flags() } else { 0 },
        }
    }
}

/// Sees console output go by.
type ConsoleObserver = Box<dyn FnMut(&[u8])>;
/// Sees how far the replay is: tick and virtual nanoseconds.
type ProgressObserver = Box<dyn FnMut(u64, u64)>;
/// Sees each record when the machine stands at its place and it agrees.
type RecordObserver = Box<dyn FnMut(&Record)>;
/// Sees the virtual nanoseconds to which devices were carried.
type TimeObserver = Box<dyn FnMut(u64)>;

/// Reads the log. Holds no host; observers only see what goes out.
pub struct Replaying {
    log: LogReader,
    verification: Verification,
    console: Option<ConsoleObserver>,
    progress: Option<ProgressObserver>,
    record: Option<RecordObserver>,
    time: Option<TimeObserver>,
    records: u64,
    /// Records before the next one that have no place of their own.
    passed_over: u64,
    verified_until: Option<Moment>,
    last: Option<LastRecord>,
    set_aside: Vec<SetAside>,
    /// Jumps to deadlines since the last record or the sleep's start, and the sleep's tick.
    unlogged_jumps: u64,
    sleep_tick: u64,
}

impl fmt::Debug for Replaying {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { log, verification, records, verified_until, .. } = self;
        f.debug_struct("Replaying")
            .field("log", log)
            .field("verification", verification)
            .field("records", records)
            .field("verified_until", verified_until)
            .finish_non_exhaustive()
    }
}

impl Replaying {
    /// A replay of `log`.
    pub fn new(log: LogReader) -> Self {
        Self {
            log,
            verification: Verification::default(),
            console: None,
            progress: None,
            record: None,
            time: None,
            records: 0,
            passed_over: 0,
            verified_until: None,
            last: None,
            set_aside: Vec::new(),
            unlogged_jumps: 0,
            sleep_tick: 0,
        }
    }

    /// The log begins behind this record.
    pub(crate) fn behind(mut self, last: Option<LastRecord>) -> Self {
        self.last = last;
        self
    }

    /// Chooses what is compared.
    pub fn verifying(mut self, verification: Verification) -> Self {
        self.verification = verification;
        self
    }

    /// Shows console output as it is replayed.
    pub fn on_console(mut self, observer: impl FnMut(&[u8]) + 'static) -> Self {
        self.console = Some(Box::new(observer));
        self
    }

    /// Shows tick and virtual nanoseconds whenever the engine is kicked.
    pub fn on_progress(mut self, observer: impl FnMut(u64, u64) + 'static) -> Self {
        self.progress = Some(Box::new(observer));
        self
    }

    /// Shows each record when it is replayed: for an answer, before its access is answered.
    pub fn on_record(mut self, observer: impl FnMut(&Record) + 'static) -> Self {
        self.record = Some(Box::new(observer));
        self
    }

    /// Shows the virtual nanoseconds to which devices are carried at a boundary, because a deadline has
    /// come, time was moved (behind its record), or for console input (behind its record, before the bytes).
    pub fn on_time(mut self, observer: impl FnMut(u64) + 'static) -> Self {
        self.time = Some(Box::new(observer));
        self
    }

    /// The next record that stands at a place of the run.
    fn peek(&mut self) -> Result<&Record, Stop> {
        while matches!(self.log.peek(), Ok(Some(record)) if record.event.is_told()) {
            self.passed_over += 1;
            let _ = self.log.next_record();
        }
        match self.log.peek() {
            Ok(Some(record)) => Ok(record),
            Ok(None) => Err(Stop::CutShort(None)),
            Err(damage) => Err(Stop::CutShort(Some(damage))),
        }
    }

    /// Whether the next record is the answer to this access.
    fn answers(&mut self, tick: u64, access: &Access) -> bool {
        match self.peek() {
            Ok(record) if record.moment.tick == tick => {
                matches!(record.event, Event::ClockRead(_))
                    && stamp_of(record) == Stamp::of_access(tick, access)
            }
            _ => false,
        }
    }

    /// Takes the record that [`Self::peek`] showed, which agreed.
    fn take(&mut self) -> Result<LoggedEvent, Stop> {
        match self.log.next_record() {
            Ok(Some(record)) => {
                self.records += 1 + std::mem::take(&mut self.passed_over);
                let Record { moment, cpu_digest, .. } = *record.get();
                self.verified_until = Some(moment);
                self.last = Some(LastRecord { moment, cpu_digest });
                if let Some(observer) = &mut self.record {
                    observer(record.get());
                }
                self.unlogged_jumps = 0;
                Ok(record.into_event())
            }
            Ok(None) => Err(Stop::CutShort(None)),
            Err(damage) => Err(Stop::CutShort(Some(damage))),
        }
    }

    /// The next record, if its place is this boundary.
    fn due<E: Engine>(&mut self, here: &Boundary<'_, E>) -> Result<Option<Record>, Stop> {
        let record = self.peek()?;
        if record.moment.tick > here.tick {
            return Ok(None);
        }
        if record.moment.tick < here.tick {
            return Err(passed(record, here.tick).into());
        }
        let waits = match &record.event {
            // Given amid the next instruction.
            Event::ClockRead(_) => true,
            // Time moves only in a sleep, and to one deadline after the other.
            Event::Time(ns) if here.time != TimeSource::Host => {
                !here.halted || here.deadline.is_some_and(|deadline| *ns > deadline.ns)
            }
            // The guest comes to these by itself.
            Event::End { ending, .. } => match ending {
                Ending::Stopped | Ending::EngineFailed(_) => false,
                Ending::IdleForever => !here.halted,
                Ending::Reset | Ending::TripleFault | Ending::PowerOff | Ending::DebugExit(_) => {
                    true
                }
            },
            Event::Time(_)
            | Event::Console(_)
            | Event::Mark(_)
            | Event::HandOver(_)
            | Event::Assists(_)
            | Event::LeftOpen(_) => false,
        };
        Ok((!waits).then(|| record.clone()))
    }

    /// Whether the record's place is another one of this tick, where a tick has several: the engine
    /// finds it, or comes to the next tick without it. One that is exactly the recorded one comes before one
    /// that may be.
    fn lies_further_on<E: Engine>(
        &mut self,
        record: &Record,
        here: &mut Boundary<'_, E>,
    ) -> Result<bool, Stop> {
        if here.engine.tick_kind() != TickKind::ConditionalBranch {
            return Ok(false);
        }
        let Some(place) = self.place() else { return Ok(false) };
        debug_assert_eq!(place, stamp_of(record));
        match self.compare_here(place, here)? {
            Ok(None) => Ok(false),
            Ok(Some(_)) => Ok(here.engine.comes_exactly(&place)?),
            Err(_) => Ok(true),
        }
    }

    /// Compares a place that the log has with where the machine stands.
    fn compare_here<E: Engine>(
        &self,
        recorded: Stamp,
        here: &mut Boundary<'_, E>,
    ) -> Result<Result<Option<Explained>, Divergence>, Stop> {
        let (moment, state) = (here.engine.moment()?, here.engine.cpu_state()?);
        let found = Stamp { moment, cpu_digest: state.short_digest() };
        Ok(self.compare_position(recorded, found, &state, || here.engine.undefined_flags()))
    }

    /// Notes what was lawfully different at a record. Undefined flags become what they were there, so
    /// that whatever is made of them from here on is what was recorded.
    fn set_aside_here<E: Engine>(
        &mut self,
        lawful: &Explained,
        moment: Moment,
        here: &mut Boundary<'_, E>,
    ) -> Result<(), Stop> {
        for what in &lawful.what {
            SetAside::note(&mut self.set_aside, *what, moment);
        }
        if lawful.what.contains(&Lawful::UndefinedFlags) {
            here.engine.set_undefined_flags(lawful.state.rflags)?;
        }
        Ok(())
    }

    /// Gives the lawful difference that is left, and the state as hardware has it.
    fn compare_position(
        &self,
        recorded: Stamp,
        found: Stamp,
        state: &CpuState,
        undefined_flags: impl FnOnce() -> u64,
    ) -> Result<Option<Explained>, Divergence> {
        let (was, is) = (recorded.moment, found.moment);
        let difference = if was.rip != is.rip {
            (Difference::Rip, was.rip, is.rip)
        } else if was.rcx != is.rcx {
            (Difference::Rcx, was.rcx, is.rcx)
        } else if recorded.cpu_digest == found.cpu_digest {
            return Ok(None);
        } else {
            let permitted = self.verification.permits(undefined_flags);
            if let Some(lawful) = explained(state, recorded.cpu_digest, permitted) {
                return Ok(Some(lawful));
            }
            (Difference::CpuState, recorded.cpu_digest, found.cpu_digest)
        };
        let (difference, expected, found) = difference;
        Err(divergence(was, difference, format!("{expected:#x}"), format!("{found:#x}")))
    }

    /// Compares the end's state, whose position agrees already.
    fn compare_final(
        &self,
        moment: Moment,
        recorded: &[u8; 32],
        state: &StateDigest,
    ) -> Result<(), Divergence> {
        let found = state.whole();
        if found == *recorded {
            return Ok(());
        }
        let found = format!("{} (the CPU agrees: devices or RAM differ)", hex(&found));
        Err(divergence(moment, Difference::FinalState, hex(recorded), found))
    }
}

/// Whether the recording's engine failed for this reason, or at this tick.
fn failed_so(record: &Record, reason: &str, tick: u64) -> bool {
    match &record.event {
        Event::End { ending: Ending::EngineFailed(recorded), .. } => {
            recorded == reason || record.moment.tick == tick
        }
        _ => false,
    }
}

fn stamp_of(record: &Record) -> Stamp {
    Stamp { moment: record.moment, cpu_digest: record.cpu_digest }
}

fn divergence(
    moment: Moment,
    difference: Difference,
    expected: String,
    found: String,
) -> Divergence {
    Divergence { moment, difference, expected, found }
}

fn passed(record: &Record, tick: u64) -> Divergence {
    let expected = describe(&record.event);
    divergence(record.moment, Difference::Passed, expected, format!("none up to tick {tick}"))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn compare_time(moment: Moment, recorded_ns: u64, now: VirtualTime) -> Result<(), Divergence> {
    if (now.ns..=MAX_VIRTUAL_NS).contains(&recorded_ns) {
        return Ok(());
    }
    let (expected, found) = (format!("{recorded_ns} ns"), format!("{} ns already", now.ns));
    Err(divergence(moment, Difference::Time, expected, found))
}

fn compare_effects<T: PartialEq>(
    moment: Moment,
    recorded: (u64, T),
    found: (u64, T),
) -> Result<(), Divergence> {
    if recorded == found {
        return Ok(());
    }
    let same_length = recorded.0 == found.0;
    let found = format!("{} bytes{}", found.0, if same_length { ", but other ones" } else { "" });
    Err(divergence(moment, Difference::Effects, format!("{} bytes", recorded.0), found))
}

impl Inputs for Replaying {
    fn stop_at(&mut self, tick: u64, _base: &TimeBase) -> Result<Option<u64>, Stop> {
        // A record at this very tick is waiting for what the next instruction does.
        let next = match self.peek() {
            Ok(record) if record.moment.tick > tick => record.moment.tick,
            _ => tick.saturating_add(1),
        };
        Ok(Some(next))
    }

    fn place(&mut self) -> Option<Stamp> {
        let record = self.peek().ok()?;
        let known = match &record.event {
            Event::Console(_) | Event::Time(_) | Event::Mark(_) | Event::HandOver(_) => true,
            Event::ClockRead(_) | Event::Assists(_) | Event::LeftOpen(_) => false,
            Event::End { ending, final_digest, .. } => {
                *ending == Ending::Stopped && final_digest.is_some()
            }
        };
        known.then(|| stamp_of(record))
    }

    fn answers_time_stamp(&mut self, tick: u64) -> bool {
        self.answers(tick, &Access::TimeStamp)
    }

    fn arrival<E: Engine>(&mut self, here: &mut Boundary<'_, E>) -> Result<Option<Arrival>, Stop> {
        while let Some(record) = self.due(here)? {
            if self.lies_further_on(&record, here)? {
                return Ok(None);
            }
            if let Event::End { ending, final_digest, .. } = record.event {
                // Taken and compared by `end`.
                return Ok(Some(Arrival::Stop { ending, exact: final_digest.is_some() }));
            }
            if let Some(lawful) = self.compare_here(stamp_of(&record), here)?? {
                self.set_aside_here(&lawful, record.moment, here)?;
            }
            match record.event {
                Event::Time(ns) => compare_time(record.moment, ns, here.now)?,
                Event::Mark(mark) => {
                    let found = here.effects.digest().mark();
                    compare_effects(
                        record.moment,
                        (mark.console_bytes, mark.console_digest_prefix),
                        (found.console_bytes, found.console_digest_prefix),
                    )?;
                }
                _ => {}
            }
            match self.take()? {
                LoggedEvent::Time(ns) => return Ok(Some(Arrival::Time(ns))),
                LoggedEvent::Console(bytes) => return Ok(Some(Arrival::Console(bytes))),
                LoggedEvent::HandOver(to) => return Ok(Some(Arrival::HandOver(to))),
                _ => {}
            }
        }
        Ok(None)
    }

    fn runs_freely(&mut self, _deadline: Option<VirtualTime>) {
        // The log says where it is stopped.
    }

    fn idle<E: Engine>(&mut self, here: &mut Boundary<'_, E>) -> Result<Idle, Stop> {
        if std::mem::replace(&mut self.sleep_tick, here.tick) != here.tick {
            self.unlogged_jumps = 0;
        }
        let deadline = match here.time {
            TimeSource::Ticks { .. } => here.deadline,
            TimeSource::Host => None,
        };
        match deadline.filter(|deadline| deadline.ns <= MAX_VIRTUAL_NS) {
            Some(deadline) if self.unlogged_jumps < MAX_UNLOGGED_JUMPS => {
                self.unlogged_jumps += 1;
                return Ok(Idle::Jump(deadline));
            }
            _ => {}
        }
        let tick = here.tick;
        let record = self.peek()?;
        let expected = format!("{} at tick {}", describe(&record.event), record.moment.tick);
        let found = format!("nothing that could wake it at tick {tick}");
        Err(divergence(record.moment, Difference::Idle, expected, found).into())
    }

    fn clock_answer(
        &mut self,
        tick: u64,
        access: &Access,
        now: VirtualTime,
    ) -> Result<Logged<u64>, Stop> {
        let record = self.peek()?;
        let agrees = stamp_of(record) == Stamp::of_access(tick, access);
        match record.event {
            Event::ClockRead(ns) if agrees => compare_time(record.moment, ns, now)?,
            _ => {
                let expected = format!("{} at {}", describe(&record.event), record.moment);
                let found = format!("the time asked for at tick {tick} by {access:x?}");
                let moment = record.moment;
                return Err(divergence(moment, Difference::Answer, expected, found).into());
            }
        }
        match self.take()? {
            LoggedEvent::ClockRead(ns) => Ok(ns),
            other => unreachable!("the log shows a clock read and gives {other:?}"),
        }
    }

    fn clock_beside(
        &mut self,
        tick: u64,
        access: &Access,
        now: VirtualTime,
    ) -> Result<Option<Logged<u64>>, Stop> {
        match self.answers(tick, access) {
            true => self.clock_answer(tick, access, now).map(Some),
            false => Ok(None),
        }
    }

    fn devices_followed(&mut self, now: VirtualTime) {
        if let Some(observer) = &mut self.time {
            observer(now.ns);
        }
    }

    fn kicked(&mut self, tick: u64, now: VirtualTime, _exact: bool) -> Result<(), Stop> {
        if let Some(observer) = &mut self.progress {
            observer(tick, now.ns);
        }
        Ok(())
    }

    fn console_output(&mut self, bytes: &[u8]) {
        if let Some(observer) = &mut self.console {
            observer(bytes);
        }
    }

    fn end(
        &mut self,
        stamp: Stamp,
        effects: EffectDigest,
        ending: &Ending,
        state: Option<EndState<'_>>,
        _told: Told,
    ) -> Result<Option<StateDigest>, Stop> {
        let record = self.peek()?.clone();
        let moment = record.moment;
        if let Ending::EngineFailed(reason) = ending
            && !failed_so(&record, reason, stamp.moment.tick)
        {
            // This engine's limits, which are nothing that the recording has otherwise.
            return Err(EngineError { what: reason.clone() }.into());
        }
        let Event::End { ending: recorded, effects: recorded_effects, final_digest } =
            &record.event
        else {
            let found = format!("the end: {} at {}", describe_ending(ending), stamp.moment);
            return Err(
                divergence(moment, Difference::Ending, describe(&record.event), found).into()
            );
        };
        if recorded != ending || moment.tick != stamp.moment.tick {
            let expected = describe_ending(recorded);
            let found = format!("{} at {}", describe_ending(ending), stamp.moment);
            return Err(divergence(moment, Difference::Ending, expected, found).into());
        }
        let mut state_there = state.map(|state| *state.digest);
        if let (Some(_), Some(EndState { digest, cpu, undefined_flags })) = (final_digest, state)
            && let Some(Explained { what, state: cpu }) =
                self.compare_position(stamp_of(&record), stamp, cpu, || undefined_flags)?
        {
            what.into_iter().for_each(|what| SetAside::note(&mut self.set_aside, what, moment));
            state_there = Some(StateDigest { cpu: *cpu.digest().as_bytes(), ..*digest });
        }
        compare_effects(
            moment,
            (recorded_effects.console_bytes, recorded_effects.console_digest),
            (effects.console_bytes, effects.console_digest),
        )?;
        if let (Some(recorded), Some(state)) = (final_digest, state_there) {
            self.compare_final(moment, recorded, &state)?;
        }
        self.take()?;
        Ok(state_there)
    }

    fn close_without_end(&mut self) -> Result<(), Stop> {
        Ok(())
    }

    fn set_aside(&self) -> &[SetAside] {
        &self.set_aside
    }

    fn events(&self) -> u64 {
        self.records
    }

    fn last_record(&self) -> Option<LastRecord> {
        self.last
    }

    fn confirmed_until(&self) -> Option<Moment> {
        self.verified_until
    }
}
