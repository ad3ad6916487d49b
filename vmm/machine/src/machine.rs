//! The run loop: one for recording, running, replaying and simulated tests.
//!
//! The machine does something only at boundaries where it stands for a reason that the guest
//! causes (an access, HLT, a deadline's tick, interrupts opening) or that the log holds. A kick
//! makes the recording machine stand at boundaries where the replaying one does not; there the
//! loop does nothing but look for arrivals, and what it finds it logs, so that the replay stands
//! there too. At each boundary the order is the same: deadlines, arrivals, the interrupt.

use reprise_devices::board::{Board, PowerEvent};
use reprise_devices::time::VirtualTime;
use reprise_trace::cpu_state::{CS, CpuState};
use reprise_trace::event::{Ending, HandOver};
use reprise_trace::moment::TickKind;

use crate::checkpoint::{CAPTURE_TICKS, Checkpointer};
use crate::clock::{TimeBase, TimeSource};
use crate::digest::{AccessedBits, StateDigest};
use crate::effects::Effects;
use crate::engine::{Access, Engine, EngineError, Exit};
use crate::inputs::{Arrival, Boundary, Idle, Inputs, Stamp, Stop};
use crate::outcome::{MachineError, Outcome};
use crate::watch::Watch;

/// RFLAGS.IF.
const INTERRUPT_FLAG: u64 = 1 << 9;

/// Whether a CPU stands where a reset puts it (Intel SDM volume 3A, table 11-1).
fn was_reset(state: &CpuState) -> bool {
    (state.rip, state.segments[CS].base) == (0xfff0, 0xffff_0000)
}

/// An engine and a board, with everything from outside coming through `I`.
pub struct Machine<E: Engine, I: Inputs> {
    pub(crate) engine: E,
    pub(crate) board: Board,
    pub(crate) inputs: I,
    time: TimeSource,
    pub(crate) base: TimeBase,
    pub(crate) effects: Effects,
    pub(crate) sleep: Option<Sleep>,
    pub(crate) power_event: Option<PowerEvent>,
    /// The engine was told to come back when interrupts open.
    pub(crate) interrupt_requested: bool,
    /// The recording's own boundaries are exits and places that it names, not ticks: it was made on
    /// hardware that runs freely between them, whatever replays it.
    runs_freely: bool,
    /// Whether the digests of this recording count accessed bits.
    accessed_bits: AccessedBits,
    /// What becomes of that where hardware takes over.
    accessed_bits_of_hardware: AccessedBits,
    /// The tick at which the last interrupt was delivered. Until that tick has passed the delivery
    /// may be half done (on KVM it happens with the handler's first instruction), so nothing enters.
    delivered_at: Option<u64>,
    /// The tick of the last boundary at which something may have entered.
    pub(crate) visited: Option<u64>,
    /// Stands at a boundary that a replay finds again, and does not run.
    pub(crate) at_rest: bool,
    /// Whoever moves the machine by instructions stopped it where it does not stand by itself, or where all
    /// has entered that does: it goes on with the next instruction.
    pub(crate) amid_stretch: bool,
    pub(crate) checkpointer: Option<Box<dyn Checkpointer>>,
    watch: Option<Watch>,
    /// RAM is being copied for a checkpoint.
    pub(crate) capturing: bool,
    /// Where other engines went on.
    pub(crate) hand_overs: Vec<(u64, HandOver)>,
    /// Records of the log before the checkpoint that this machine comes from.
    pub(crate) records_before: u64,
    pub(crate) accesses: u64,
    pub(crate) interrupts: u64,
}

/// Where a run stops: at whichever comes first.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    pub(crate) tick: u64,
    /// Virtual time.
    pub(crate) ns: u64,
}

/// How far the guest may execute before the machine stands again.
#[derive(Clone, Copy, Debug)]
struct Limit {
    tick: u64,
    /// The machine wants to stand there itself; else only the log has something there, to which the guest
    /// comes by itself if it has no place.
    exact: bool,
}

/// The guest is in HLT.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sleep {
    /// With RFLAGS.IF set, that is, an interrupt can end it.
    interruptible: bool,
}

impl<E: Engine, I: Inputs> Machine<E, I> {
    /// A machine whose engine is at its first instruction and whose board is as it is at reset.
    pub fn new(mut engine: E, board: Board, inputs: I, time: TimeSource) -> Self {
        let base = TimeBase { tick: engine.tick(), ns: 0, ns_per_tick: time.ns_per_tick() };
        engine.set_time_base(base);
        let runs_freely = engine.tick_kind() == TickKind::ConditionalBranch;
        let accessed_bits = match engine.tick_kind() {
            TickKind::Instruction => AccessedBits::Exact,
            TickKind::ConditionalBranch | TickKind::Exit => AccessedBits::SetAside,
        };
        Self {
            runs_freely,
            accessed_bits,
            accessed_bits_of_hardware: AccessedBits::SetAside,
            engine,
            board,
            inputs,
            time,
            base,
            effects: Effects::default(),
            sleep: None,
            power_event: None,
            interrupt_requested: false,
            delivered_at: None,
            visited: None,
            at_rest: true,
            amid_stretch: false,
            checkpointer: None,
            watch: None,
            capturing: false,
            hand_overs: Vec::new(),
            records_before: 0,
            accesses: 0,
            interrupts: 0,
        }
    }

    /// Chooses whether digests count accessed bits: what a recording's digests are made of is the
    /// recording's affair. Unless told otherwise, they do where ticks are instructions, and do not where
    /// the guest's code runs on hardware freely.
    #[must_use]
    pub fn with_accessed_bits(mut self, accessed_bits: AccessedBits) -> Self {
        self.accessed_bits = accessed_bits;
        self
    }

    /// Chooses what of accessed bits digests count once hardware has taken over, in recordings older than
    /// this version of the format.
    #[must_use]
    pub fn with_accessed_bits_of_hardware(mut self, accessed_bits: AccessedBits) -> Self {
        self.accessed_bits_of_hardware = accessed_bits;
        self
    }

    /// Runs the guest to its end.
    ///
    /// A replay that differs from its recording is an outcome
    /// ([`Conclusion::Diverged`]), not an error.
    ///
    /// # Errors
    /// If the engine fails, or the recording cannot be written. What was recorded replays.
    pub fn run(&mut self) -> Result<Outcome, MachineError> {
        self.run_until(u64::MAX)
    }

    /// As [`Self::run`], but stops at the first boundary at or behind tick `target`, before anything
    /// enters there. Only for a replay: a recording that stops so has no end.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_until(&mut self, target: u64) -> Result<Outcome, MachineError> {
        self.run_to(Target { tick: target, ns: u64::MAX })
    }

    /// As [`Self::run_until`], but to the first boundary at or behind so many nanoseconds of virtual
    /// time.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_until_time(&mut self, virtual_ns: u64) -> Result<Outcome, MachineError> {
        self.run_to(Target { tick: u64::MAX, ns: virtual_ns })
    }

    /// Lets `watch` see how far the machine is whenever its engine is kicked, and end the run there, from
    /// now on or, with `None`, no more. Only for a replay: a recording that stops so has no end.
    pub fn set_watch(&mut self, watch: Option<Watch>) {
        self.watch = watch;
    }

    fn run_to(&mut self, target: Target) -> Result<Outcome, MachineError> {
        let stop = self.go(target);
        self.conclude(stop)
    }

    /// Runs until something stops the run, and knows whether the machine is at rest then.
    pub(crate) fn go(&mut self, target: Target) -> Stop {
        self.at_rest = false;
        let stop = self.run_loop(target);
        self.continue_checkpoint(true);
        self.at_rest = matches!(stop, Stop::TargetReached);
        stop
    }

    /// The digest of the machine's state. Costs a pass over guest RAM.
    ///
    /// # Errors
    /// If the engine fails.
    pub fn state_digest(&mut self) -> Result<StateDigest, EngineError> {
        StateDigest::of(&mut self.engine, &self.board, self.accessed_bits)
    }

    /// As [`Self::state_digest`], whatever the machine's own counts.
    ///
    /// # Errors
    /// If the engine fails.
    pub fn state_digest_with(
        &mut self,
        accessed_bits: AccessedBits,
    ) -> Result<StateDigest, EngineError> {
        StateDigest::of(&mut self.engine, &self.board, accessed_bits)
    }

    /// The engine, for looking at the guest.
    pub fn engine(&mut self) -> &mut E {
        &mut self.engine
    }

    /// Carries the devices on to a virtual time before which nothing of theirs is due.
    pub fn carry_devices(&mut self, now: VirtualTime) {
        self.board.advance(now);
    }

    /// The board.
    pub fn board(&self) -> &Board {
        &self.board
    }

    /// Takes the machine apart.
    pub fn into_parts(self) -> (E, Board, I) {
        (self.engine, self.board, self.inputs)
    }

    /// Runs until something stops the run.
    fn run_loop(&mut self, target: Target) -> Stop {
        // Whether the machine stands at a boundary that a replay finds again.
        let mut stands = !std::mem::take(&mut self.amid_stretch);
        loop {
            let stepped = match self.visit(stands, target) {
                Ok(true) => self.execute(target),
                Ok(false) => Ok(true),
                Err(stop) => return stop,
            };
            match stepped {
                Ok(stands_now) => stands = stands_now,
                Err(stop) => return stop,
            }
        }
    }

    /// Does what is to be done at this boundary. Gives whether the guest executes next.
    pub(crate) fn visit(&mut self, stands: bool, target: Target) -> Result<bool, Stop> {
        self.continue_checkpoint(false);
        let tick = self.engine.tick();
        if !stands || self.delivered_at == Some(tick) {
            return Ok(true);
        }
        let stops = self.power_event.is_some()
            || tick >= target.tick
            || self.now().ns >= target.ns
            || self.engine.is_paused();
        if stops && self.engine.amid_accesses()? {
            return Ok(true);
        }
        if let Some(event) = self.power_event.take() {
            return Err(Stop::Ended { ending: ending_of(event), exact: true });
        }
        if stops {
            return Err(Stop::TargetReached);
        }
        self.checkpoint_if_due()?;
        let entered = self.visited.replace(tick) == Some(tick);
        self.settle();
        self.take_arrivals(entered)?;
        self.deliver_interrupt()?;
        match self.sleep {
            None => Ok(true),
            Some(sleep) => self.idle(sleep).map(|()| false),
        }
    }

    pub(crate) fn now(&self) -> VirtualTime {
        self.base.at(self.engine.tick())
    }

    /// Another engine goes on from this boundary.
    fn hand_over(&mut self, to: HandOver) -> Result<(), Stop> {
        self.continue_checkpoint(true);
        if !self.engine.become_engine(&to)? {
            return Err(Stop::HandedOver(Box::new(to)));
        }
        self.hand_overs.push((self.engine.tick(), to.clone()));
        let now = self.now();
        self.time = TimeSource::of(to.ns_per_tick);
        self.runs_freely = to.tick_kind == TickKind::ConditionalBranch;
        if to.engine != "soft" {
            // From here on hardware may have set them early.
            self.accessed_bits = self.accessed_bits_of_hardware;
        }
        self.base = TimeBase { tick: self.engine.tick(), ns: now.ns, ns_per_tick: to.ns_per_tick };
        self.engine.set_time_base(self.base);
        // Asked for anew at this boundary.
        self.engine.set_interrupt_request(false);
        self.interrupt_requested = false;
        Ok(())
    }

    /// Lets the devices do what is due.
    fn settle(&mut self) {
        let now = self.now();
        if self.board.next_deadline().is_some_and(|deadline| deadline <= now) {
            self.board.advance(now);
            self.inputs.devices_followed(now);
        }
        self.drain_console();
    }

    /// Console output leaves the machine.
    pub(crate) fn drain_console(&mut self) {
        if self.board.has_console_output() {
            let bytes = self.board.take_console_output();
            self.effects.console_output(&bytes);
            self.inputs.console_output(&bytes);
        }
    }

    fn boundary<'a>(
        engine: &'a mut E,
        board: &Board,
        effects: &'a Effects,
        now: VirtualTime,
        halted: bool,
        time: TimeSource,
    ) -> Boundary<'a, E> {
        let tick = engine.tick();
        let (deadline, console_room) = (board.next_deadline(), board.console_room());
        let entered = true;
        Boundary { engine, effects, tick, now, deadline, console_room, halted, entered, time }
    }

    fn take_arrivals(&mut self, entered: bool) -> Result<(), Stop> {
        loop {
            let (now, halted) = (self.now(), self.sleep.is_some());
            let Self { engine, board, effects, time, .. } = self;
            let mut here = Self::boundary(engine, board, effects, now, halted, *time);
            here.entered = entered;
            match self.inputs.arrival(&mut here)? {
                None => return Ok(()),
                Some(Arrival::Time(ns)) => {
                    self.set_time(VirtualTime::from_ns(ns.into_inner()));
                }
                Some(Arrival::Console(bytes)) => {
                    self.inputs.devices_followed(now);
                    self.board.console_input(bytes, now);
                }
                Some(Arrival::HandOver(to)) => self.hand_over(to)?,
                Some(Arrival::Stop { ending, exact }) => return Err(Stop::Ended { ending, exact }),
            }
            self.settle();
        }
    }

    /// Moves virtual time, and the devices with it.
    fn set_time(&mut self, now: VirtualTime) {
        self.base = TimeBase { tick: self.engine.tick(), ns: now.ns, ..self.base };
        self.engine.set_time_base(self.base);
        self.board.advance(now);
        self.inputs.devices_followed(now);
        self.drain_console();
    }

    /// Delivers the pending interrupt, or asks the engine to come back when that is possible. Both
    /// depend on the state of the guest and the board alone.
    fn deliver_interrupt(&mut self) -> Result<(), Stop> {
        let pending = self.board.interrupt_pending();
        let deliverable = pending && self.engine.interruptible()?;
        let wait_for_window = pending && !deliverable;
        if wait_for_window != self.interrupt_requested {
            self.engine.set_interrupt_request(wait_for_window);
            self.interrupt_requested = wait_for_window;
        }
        if deliverable {
            let now = self.now();
            self.board.advance(now);
            let vector = self.board.acknowledge_interrupt();
            self.engine.inject(vector)?;
            self.sleep = None;
            self.interrupts += 1;
            if self.runs_freely {
                // Nobody looks again before the next exit.
                self.interrupt_requested = self.board.interrupt_pending();
                self.engine.set_interrupt_request(self.interrupt_requested);
            } else {
                self.delivered_at = Some(self.engine.tick());
            }
        }
        Ok(())
    }

    /// The guest sleeps, and nothing at this boundary wakes it.
    fn idle(&mut self, sleep: Sleep) -> Result<(), Stop> {
        if !sleep.interruptible {
            return Err(Stop::Ended { ending: Ending::PowerOff, exact: true });
        }
        let now = self.now();
        let Self { engine, board, effects, time, .. } = self;
        let mut here = Self::boundary(engine, board, effects, now, true, *time);
        match self.inputs.idle(&mut here)? {
            Idle::Look => {}
            Idle::Jump(deadline) => self.set_time(deadline),
        }
        Ok(())
    }

    /// Lets the guest execute. Gives whether the machine stands at a boundary that a replay finds
    /// again.
    fn execute(&mut self, target: Target) -> Result<bool, Stop> {
        let tick = self.engine.tick();
        if self.inputs.answers_time_stamp(tick) && self.engine.ask_for_time_stamp()? {
            return self.answer(Access::TimeStamp);
        }
        let Limit { tick: until, exact } = self.run_limit(tick, target)?;
        let place = match self.engine.tick_kind() {
            TickKind::ConditionalBranch => {
                self.inputs.runs_freely(self.board.next_deadline());
                self.inputs.place()
            }
            TickKind::Instruction | TickKind::Exit => None,
        };
        let on_the_way = |place: &Stamp| {
            // A checkpoint may be due before it.
            place.moment.tick <= until && place.moment.tick < target.tick
        };
        let exit = match place.filter(on_the_way) {
            Some(place) => self.engine.run_to(&place)?,
            None if exact => self.engine.run(until)?,
            None => self.engine.run_about(until)?,
        };
        match exit {
            Exit::TickReached | Exit::InterruptWindow => Ok(true),
            Exit::Access(access) => self.answer(access),
            Exit::Halt => {
                let interruptible = self.engine.interruptible()?
                    || self.engine.cpu_state()?.rflags & INTERRUPT_FLAG != 0;
                self.sleep.get_or_insert(Sleep { interruptible });
                Ok(true)
            }
            Exit::Kicked if self.engine.is_paused() => {
                self.amid_stretch = true;
                Err(Stop::TargetReached)
            }
            Exit::Kicked => {
                let stands = self.engine.stands_exactly();
                let now = self.now();
                self.inputs.kicked(self.engine.tick(), now, stands)?;
                self.show_watch(now)?;
                Ok(stands)
            }
            Exit::Overshot(overshoot) => Err(Stop::Overshot(overshoot)),
            Exit::TripleFault => {
                // AMD's KVM has reset the CPU by then, and what it was is lost.
                let exact = !was_reset(&self.engine.cpu_state()?);
                Err(Stop::Ended { ending: Ending::TripleFault, exact })
            }
            // The failed attempt may have left traces, so that this is no exact moment.
            Exit::Unsupported(reason) => {
                Err(Stop::Ended { ending: Ending::EngineFailed(reason), exact: false })
            }
        }
    }

    fn show_watch(&self, now: VirtualTime) -> Result<(), Stop> {
        let Some(watch) = &self.watch else { return Ok(()) };
        watch.see(self.engine.tick(), now.ns);
        if watch.is_stopped() { Err(Stop::Watched) } else { Ok(()) }
    }

    /// How far the guest may execute.
    fn run_limit(&mut self, tick: u64, target: Target) -> Result<Limit, Stop> {
        let next = tick.saturating_add(1);
        if self.delivered_at == Some(tick) {
            // Stand again as soon as the delivery is done: nothing entered at this tick since.
            return Ok(Limit { tick: next, exact: true });
        }
        let deadline = self.board.next_deadline().and_then(|deadline| self.base.tick_of(deadline));
        let logged = self.inputs.stop_at(tick, &self.base)?;
        let now = self.now();
        let checkpoint = match &mut self.checkpointer {
            // It is taken at the first boundary behind that.
            Some(_) if self.engine.comes_late() && logged.is_none() => None,
            Some(_) if self.capturing => Some(tick.saturating_add(CAPTURE_TICKS)),
            Some(checkpointer) => checkpointer.due_at(tick, now.ns),
            None => None,
        };
        let target_time = match target.ns {
            u64::MAX => None,
            ns => self.base.tick_of(VirtualTime::from_ns(ns)),
        };
        let limits = [deadline, checkpoint, target_time];
        let own = limits.into_iter().flatten().fold(target.tick, u64::min);
        let limit = logged.map_or(own, |logged| logged.min(own));
        Ok(Limit { tick: limit.max(next), exact: own <= limit })
    }

    /// Answers an access. Gives whether its instruction is done; if not, more accesses follow, and
    /// in between is no boundary.
    fn answer(&mut self, access: Access) -> Result<bool, Stop> {
        self.accesses += 1;
        let tick = self.engine.tick();
        self.read_clock_for(&access, tick)?;
        let now = self.base.at(tick);
        let value = match access {
            Access::PortRead { port, size } => u128::from(self.board.port_read(port, size, now)),
            Access::PortWrite { port, size, value } => {
                self.board.port_write(port, size, value, now);
                0
            }
            Access::MmioRead { address, size } => self.board.mmio_read(address, size, now),
            Access::MmioWrite { address, size, value } => {
                self.board.mmio_write(address, size, value, now);
                0
            }
            Access::TimeStamp => u128::from(now.ns),
        };
        self.engine.finish_access(value)?;
        self.drain_console();
        self.power_event = self.power_event.take().or_else(|| self.board.take_power_event());
        Ok(self.engine.tick() != tick)
    }

    /// Where the host's clock is virtual time, it is read for the accesses that depend on it; for others a
    /// log may have it.
    fn read_clock_for(&mut self, access: &Access, tick: u64) -> Result<(), Stop> {
        let depends = match access {
            Access::PortRead { port, .. } | Access::PortWrite { port, .. } => {
                Board::port_depends_on_time(*port)
            }
            Access::MmioRead { .. } | Access::MmioWrite { .. } => false,
            Access::TimeStamp => true,
        };
        if self.time != TimeSource::Host {
            return Ok(());
        }
        let now = self.base.at(tick);
        let ns = match depends {
            true => Some(self.inputs.clock_answer(tick, access, now)?),
            false => self.inputs.clock_beside(tick, access, now)?,
        };
        if let Some(ns) = ns {
            self.set_time(VirtualTime::from_ns(ns.into_inner()));
        }
        Ok(())
    }
}

fn ending_of(event: PowerEvent) -> Ending {
    match event {
        PowerEvent::Reset => Ending::Reset,
        PowerEvent::DebugExit(value) => Ending::DebugExit(value),
    }
}
