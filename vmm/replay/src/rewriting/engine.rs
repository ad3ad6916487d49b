//! [`Rewriting`]: the software CPU, replaying by its instruction count, and writing down what a machine that
//! counts branches would have logged.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use reprise_cpu::cpu::TimeStamps;
use reprise_cpu::engine::SoftEngine;
use reprise_devices::board::Board;
use reprise_machine::clock::TimeBase;
use reprise_machine::effects::Effects;
use reprise_machine::engine::{Access, Engine, EngineError, Exit, Kick};
use reprise_machine::inputs::Stamp;
use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::CpuState;
use reprise_trace::event::{Event, Record};
use reprise_trace::log::LogWriter;
use reprise_trace::moment::{Moment, TickKind};

use super::frames::Frames;
use super::trail::{Boundary, Trail, WATCHED};

/// What enters at the boundary where the machine stands, as the machine's inputs see it go by.
#[derive(Debug, Default)]
pub(super) struct Entering {
    /// In their order.
    events: Vec<Event>,
    /// Console input whose time is not known yet.
    typed: Option<Event>,
    /// What has left the machine.
    effects: Effects,
}

impl Entering {
    /// A record is taken.
    pub(super) fn record(&mut self, record: &Record) {
        match &record.event {
            event @ Event::Console(_) => self.typed = Some(event.clone()),
            event @ Event::Mark(_) => self.events.push(event.clone()),
            // That time moved is shown as well; the end is written last.
            _ => {}
        }
    }

    /// The guest wrote to its console.
    pub(super) fn console_output(&mut self, bytes: &[u8]) {
        self.effects.console_output(bytes);
    }

    /// Devices are carried to this virtual time.
    pub(super) fn time(&mut self, ns: u64) {
        match self.events.last_mut() {
            // One leap or two are the same to devices.
            Some(Event::Time(last_ns)) => *last_ns = ns,
            _ => self.events.push(Event::Time(ns)),
        }
        self.events.extend(self.typed.take());
    }
}

/// An engine that replays a recording whose ticks are instructions, and rewrites it for the branch clock.
#[derive(Debug)]
pub struct Rewriting {
    software: SoftEngine,
    log: LogWriter<Frames>,
    /// Accesses finished, HLTs and interrupts delivered: ticks of the branch clock that are no branches.
    events: u64,
    base: TimeBase,
    /// Virtual time as the log has it.
    logged_ns: u64,
    entering: Rc<RefCell<Entering>>,
    /// What entered at a place that is not found again, and waits for one that is.
    owed: Vec<Event>,
    /// Virtual time to which the board was carried.
    carried_ns: u64,
    trail: Trail,
    /// The guest stands right behind an exit, or in HLT: hardware exits there by itself.
    behind_exit: bool,
    /// The instruction count at which the last interrupt was delivered.
    delivered_at: Option<u64>,
    window_wanted: bool,
    counts: Counts,
}

/// What a rewritten run had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// RDTSC executed.
    pub time_stamps: u64,
    /// Of those, in user code.
    pub user_time_stamps: u64,
    /// Boundaries at which something entered that was put before them.
    pub put_before: u64,
    /// Boundaries at which something entered that was put behind them.
    pub put_behind: u64,
}

impl Rewriting {
    /// Over `ram`; the machine's inputs say what enters.
    pub(super) fn new(ram: GuestRam, entering: Rc<RefCell<Entering>>) -> Result<Self, EngineError> {
        let mut software = SoftEngine::new(ram)?;
        software.count_conditional_branches(true);
        software.set_time_stamps(TimeStamps::Asked);
        Ok(Self {
            software,
            log: LogWriter::new(Frames::default()),
            events: 0,
            base: TimeBase { tick: 0, ns: 0, ns_per_tick: 0 },
            logged_ns: 0,
            entering,
            owed: Vec::new(),
            carried_ns: 0,
            trail: Trail::default(),
            behind_exit: true,
            delivered_at: None,
            window_wanted: false,
            counts: Counts::default(),
        })
    }

    /// Another CPU recorded what is rewritten. The comparison with it has to know which flags are undefined; they
    /// stay as this CPU leaves them, since what is written is to replay on this one.
    pub(super) fn know_undefined_flags(&mut self) {
        self.software.know_undefined_flags();
    }

    /// Where the guest stands, as the branch clock counts.
    fn branch_tick(&self) -> u64 {
        self.software.conditional_branches() + self.events
    }

    /// Virtual time.
    fn now_ns(&self) -> u64 {
        self.base.at(self.software.tick()).ns
    }

    /// Where the guest stands.
    fn stamp(&mut self) -> Result<Stamp, EngineError> {
        let moment = Moment { tick: self.branch_tick(), ..self.software.moment()? };
        Ok(Stamp { moment, cpu_digest: self.software.cpu_state()?.short_digest() })
    }

    pub(super) fn append(&mut self, stamp: Stamp, event: Event) -> Result<(), EngineError> {
        if let Event::Time(ns) | Event::ClockRead(ns) = event {
            self.logged_ns = ns;
        }
        let record = Record { moment: stamp.moment, cpu_digest: stamp.cpu_digest, event };
        let failed = |error| EngineError { what: format!("{error}") };
        self.log.append(record).map(|_| ()).map_err(failed)
    }

    /// The boundary where the guest stands before an instruction.
    fn boundary(&mut self) -> Result<Boundary, EngineError> {
        let instructions = self.software.tick();
        Ok(Boundary {
            instructions,
            stamp: self.stamp()?,
            state: self.software.cpu_state()?,
            open: self.software.interruptible()?,
            delivered: self.delivered_at == Some(instructions),
        })
    }

    /// Notes it.
    fn watch(&mut self) -> Result<(), EngineError> {
        let boundary = self.boundary()?;
        self.trail.note(boundary);
        Ok(())
    }

    /// Takes over what entered where the machine stands, and writes it down if there is a place for it.
    /// Gives whether nothing is owed any more.
    fn settle(&mut self) -> Result<bool, EngineError> {
        // On hardware nothing that is owed has entered yet, nor asks for a window.
        let owed = !self.owed.is_empty();
        let window = !owed && self.window_wanted;
        self.owed.append(&mut self.entering.borrow_mut().events);
        if self.owed.is_empty() {
            return Ok(true);
        }
        // Where hardware exits by itself, any place will do.
        let exits = self.behind_exit || window && self.software.interruptible()?;
        let place = match exits {
            true => Some((self.stamp()?, self.software.tick())),
            false => {
                self.watch()?;
                let place = self.trail.place(self.software.ram());
                place.map(|place| (place.stamp, place.instructions))
            }
        };
        let Some((stamp, instructions)) = place else {
            // Whoever replays does without a mark.
            self.owed.retain(|event| !matches!(event, Event::Mark(_)));
            return Ok(self.owed.is_empty());
        };
        for event in std::mem::take(&mut self.owed) {
            let known = matches!(event, Event::Time(ns) if ns <= self.logged_ns);
            if !known {
                self.append(stamp, event)?;
            }
        }
        self.counts.put_behind += u64::from(owed);
        self.counts.put_before += u64::from(!owed && instructions < self.software.tick());
        self.trail.entered(instructions);
        Ok(true)
    }

    /// The run is over, and hardware stands there as well; or, if the guest was `stopped` there, has to find
    /// the place. Gives its stamp if it does.
    pub(super) fn end(&mut self, stopped: bool) -> Result<Option<Stamp>, EngineError> {
        if !self.settle()? {
            // What entered last did so at no place that hardware finds, and nobody ever saw it.
            return Ok(None);
        }
        let stamp = self.stamp()?;
        if stopped && !self.behind_exit {
            self.watch()?;
            let place = self.trail.place(self.software.ram());
            if place.map(|place| place.stamp) != Some(stamp) {
                return Ok(None);
            }
        }
        // A triple fault comes before anything could enter.
        if self.carried_ns > self.logged_ns && (stopped || self.behind_exit) {
            self.append(stamp, Event::Time(self.carried_ns))?;
        }
        Ok(Some(stamp))
    }

    /// Virtual time as the log has it.
    pub(super) fn logged_ns(&self) -> u64 {
        self.logged_ns
    }

    /// Where the guest stands, as far as it is known where nothing is compared.
    pub(super) fn tick_alone(&self) -> Stamp {
        Stamp { moment: Moment { tick: self.branch_tick(), rip: 0, rcx: 0 }, cpu_digest: 0 }
    }

    fn not_found_again(&self) -> EngineError {
        EngineError {
            what: format!(
                "what enters at instruction {} does so at a place that no breakpoint finds again: \
                 hardware cannot replay this recording, use --engine soft",
                self.software.tick()
            ),
        }
    }

    /// Lets the guest execute up to an instruction count; the last instructions of the way, and those up to
    /// a place for what is owed, are watched.
    fn approach(&mut self, until: u64) -> Result<Exit, EngineError> {
        let mut owes = !self.settle()?;
        loop {
            let tick = self.software.tick();
            if !owes && until - tick > WATCHED {
                let exit = self.software.run(until - WATCHED)?;
                self.passed(tick);
                if exit != Exit::TickReached {
                    return Ok(exit);
                }
                continue;
            }
            if until == tick {
                return self.software.run(until);
            }
            self.watch()?;
            let exit = self.software.run(tick + 1)?;
            self.passed(tick);
            if exit != Exit::TickReached {
                return Ok(exit);
            }
            owes = owes && !self.settle()?;
        }
    }

    /// The guest has executed, unless it still stands where it did at this instruction count.
    fn passed(&mut self, before: u64) {
        if self.software.tick() != before {
            self.behind_exit = false;
        }
    }

    /// The guest accesses the board. What time it is then is in the log, even where the access does not ask:
    /// the devices of the replayed machine saw every instant.
    fn note_access(&mut self, access: &Access) -> Result<(), EngineError> {
        self.trail.begin();
        // The time is told beside the access.
        self.owed.retain(|event| !matches!(event, Event::Time(_)));
        if !self.owed.is_empty() {
            return Err(self.not_found_again());
        }
        let asks = match access {
            Access::PortRead { port, .. } | Access::PortWrite { port, .. } => {
                Board::port_depends_on_time(*port)
            }
            Access::MmioRead { .. } | Access::MmioWrite { .. } => false,
            Access::TimeStamp => true,
        };
        if *access == Access::TimeStamp {
            self.mark_time_stamp()?;
        }
        let now_ns = self.now_ns();
        if asks || now_ns > self.logged_ns {
            let stamp = Stamp::of_access(self.branch_tick(), access);
            self.append(stamp, Event::ClockRead(now_ns))?;
        }
        Ok(())
    }

    /// The guest is about to execute RDTSC, for which hardware leaves it to nobody: a mark says where, so that
    /// the machine comes to stand there and does it. Each ends its tick, so there is one place of it in a tick.
    fn mark_time_stamp(&mut self) -> Result<(), EngineError> {
        self.counts.time_stamps += 1;
        self.counts.user_time_stamps += u64::from(self.software.is_in_user_code());
        let here = self.boundary()?;
        if let Some(obstacle) = here.obstacle_to_doing() {
            return Err(EngineError {
                what: format!(
                    "the guest reads the time-stamp counter at instruction {}, {obstacle}: hardware cannot \
                     replay this recording, use --engine soft",
                    here.instructions
                ),
            });
        }
        let mark = self.entering.borrow().effects.digest().mark();
        self.append(here.stamp, Event::Mark(mark))
    }

    /// The end of the log.
    pub(super) fn finish(self) -> Result<Frames, EngineError> {
        self.log.finish().map_err(|error| EngineError { what: error.to_string() })
    }

    /// What the run had so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }
}

impl Engine for Rewriting {
    fn tick_kind(&self) -> TickKind {
        TickKind::Instruction
    }

    fn tick(&self) -> u64 {
        self.software.tick()
    }

    fn run(&mut self, until: u64) -> Result<Exit, EngineError> {
        let exit = match self.software.amid_instruction() {
            true => self.software.run(until)?,
            false => self.approach(until)?,
        };
        match &exit {
            Exit::Access(access) => self.note_access(access)?,
            Exit::Halt => {
                self.trail.begin();
                self.events += 1;
                self.behind_exit = true;
            }
            _ => {}
        }
        Ok(exit)
    }

    fn finish_access(&mut self, value: u128) -> Result<(), EngineError> {
        self.software.finish_access(value)?;
        if !self.software.amid_instruction() {
            self.events += 1;
            self.behind_exit = true;
        }
        Ok(())
    }

    fn interruptible(&mut self) -> Result<bool, EngineError> {
        self.software.interruptible()
    }

    fn set_interrupt_request(&mut self, wanted: bool) {
        self.window_wanted = wanted;
        self.software.set_interrupt_request(wanted);
    }

    fn inject(&mut self, vector: u8) -> Result<(), EngineError> {
        if !self.settle()? {
            return Err(self.not_found_again());
        }
        self.carried_ns = self.now_ns();
        self.software.inject(vector)?;
        self.trail.begin();
        self.events += 1;
        self.behind_exit = false;
        self.delivered_at = Some(self.software.tick());
        Ok(())
    }

    fn set_time_base(&mut self, base: TimeBase) {
        self.base = base;
        // Translated code answers RDTSC in line where time follows ticks: it is to ask.
        self.software.set_time_base(TimeBase { ns_per_tick: 0, ..base });
    }

    fn moment(&mut self) -> Result<Moment, EngineError> {
        self.software.moment()
    }

    fn cpu_state(&mut self) -> Result<CpuState, EngineError> {
        self.software.cpu_state()
    }

    fn set_cpu_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.software.set_cpu_state(state)
    }

    fn undefined_flags(&mut self) -> u64 {
        self.software.undefined_flags()
    }

    fn set_undefined_flags(&mut self, _rflags: u64) -> Result<(), EngineError> {
        // The recorder's are not those of the machine for which this is rewritten.
        Ok(())
    }

    fn read_ram(&self, address: u64, bytes: &mut [u8]) {
        self.software.read_ram(address, bytes);
    }

    fn visit_ram(&self, visit: &mut dyn FnMut(u64, &[u8])) {
        self.software.visit_ram(visit);
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.software.kicker()
    }
}

#[cfg(test)]
mod tests {
    use reprise_trace::event::MarkDigest;

    use super::*;

    #[test]
    fn what_enters_keeps_its_order_and_leaps_of_time_are_one() {
        let record = |event| {
            let moment = Moment { tick: 1, rip: 0, rcx: 0 };
            Record { moment, cpu_digest: 0, event }
        };
        let mark = Event::Mark(MarkDigest { console_bytes: 0, console_digest_prefix: 0 });
        let typed = Event::Console(vec![b'x']);
        let mut entering = Entering::default();
        entering.time(5);
        entering.time(7);
        entering.record(&record(mark.clone()));
        // Bytes enter at a time, which is told behind their record.
        entering.record(&record(typed.clone()));
        entering.time(8);
        entering.time(9);
        let expected = [Event::Time(7), mark, Event::Time(8), typed, Event::Time(9)];
        assert_eq!(entering.events, expected);
        assert!(entering.typed.is_none());
    }
}
