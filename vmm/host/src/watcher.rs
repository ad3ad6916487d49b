//! The thread that waits for the outside: standard input, signals, and the timer that pushes the
//! log out. What it sees it leaves here, and kicks the engine.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use reprise_machine::engine::Kick;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use crate::HostError;
use crate::alarm::Alarm;
use crate::input::{MAX_WAITING_BYTES, OpenInput, Stream, StreamRead};

/// How often the log is pushed out: a killed recorder loses no more than this and what one frame
/// takes to be written, well below the second that is promised.
pub(crate) const FLUSH_INTERVAL: Duration = Duration::from_millis(250);

/// What the watcher leaves for the machine.
pub(crate) struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    flush_due: AtomicBool,
    kick: Arc<dyn Kick>,
}

#[derive(Debug)]
struct State {
    /// Typed, and not taken yet.
    waiting: VecDeque<u8>,
    /// More may be typed.
    source_open: bool,
    stop: bool,
    /// Raised whenever there is something to look at.
    generation: u64,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // No invariant spans a panic: each change is one assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state, wakes a waiting machine and interrupts a running one.
    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state();
        change(&mut state);
        state.generation += 1;
        drop(state);
        self.changed.notify_all();
        self.kick.kick();
    }

    pub(crate) fn stop_requested(&self) -> bool {
        self.state().stop
    }

    pub(crate) fn take_flush_due(&self) -> bool {
        self.flush_due.swap(false, Ordering::AcqRel)
    }

    pub(crate) fn input_may_come(&self) -> bool {
        let state = self.state();
        state.source_open || !state.waiting.is_empty()
    }

    /// Sleeps until something has changed since generation `seen` or the time is over; gives the
    /// generation now.
    pub(crate) fn wait_for_change(&self, seen: u64, timeout: Option<Duration>) -> u64 {
        let unchanged = |state: &mut State| state.generation == seen;
        let state = self.state();
        let state = match timeout {
            None => {
                self.changed.wait_while(state, unchanged).unwrap_or_else(PoisonError::into_inner)
            }
            Some(timeout) => {
                let waited = self.changed.wait_timeout_while(state, timeout, unchanged);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
        };
        state.generation
    }
}

/// What woke the thread: the data of each registered event.
const STREAM: u32 = 0;
const ROOM: u32 = 1;
const STOP: u32 = 2;
const TIMER: u32 = 3;
const CLOSE: u32 = 4;
const ALARM: u32 = 5;

/// The thread's end of everything.
struct Sources {
    shared: Arc<Shared>,
    stream: Option<Stream>,
    /// The stream is not polled, because enough is waiting.
    paused: bool,
    room: EventFd,
    stop: EventFd,
    timer: TimerFd,
    /// Belongs to the machine's thread, which sets it.
    alarm: RawFd,
    close: EventFd,
    closing: Arc<AtomicBool>,
}

impl MutEventSubscriber for Sources {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let always = [
            (self.room.as_raw_fd(), ROOM),
            (self.stop.as_raw_fd(), STOP),
            (self.timer.as_raw_fd(), TIMER),
            (self.close.as_raw_fd(), CLOSE),
        ];
        for (fd, data) in always {
            // These descriptors are of kinds that can be polled, so this cannot fail.
            let _ = ops.add(Events::with_data_raw(fd, data, EventSet::IN));
        }
        // By its edge, each expiry is told once and nobody has to read it: a read could wait for the
        // next, if the alarm was set anew meanwhile.
        let expiry = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let _ = ops.add(Events::with_data_raw(self.alarm, ALARM, expiry));
        if let Some(stream) = &self.stream
            && ops.add(Events::with_data(stream, STREAM, EventSet::IN)).is_err()
        {
            self.end_of_stream();
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match events.data() {
            STREAM => self.read_stream(ops),
            ROOM => {
                let _ = self.room.read();
                self.resume_stream(ops);
            }
            STOP => {
                let _ = self.stop.read();
                self.shared.change(|state| state.stop = true);
            }
            TIMER => {
                let _ = self.timer.wait();
                self.shared.flush_due.store(true, Ordering::Release);
                self.shared.change(|_| {});
            }
            ALARM => self.shared.kick.kick(),
            _ => self.closing.store(true, Ordering::Release),
        }
    }
}

impl Sources {
    fn read_stream(&mut self, ops: &mut EventOps<'_>) {
        let Some(stream) = &mut self.stream else { return };
        let read = stream.read();
        let events = Events::with_data(stream, STREAM, EventSet::IN);
        match read {
            StreamRead::Bytes(bytes) => {
                let mut full = false;
                self.shared.change(|state| {
                    state.waiting.extend(bytes);
                    full = state.waiting.len() >= MAX_WAITING_BYTES;
                });
                if full && ops.remove(events).is_ok() {
                    self.paused = true;
                }
            }
            StreamRead::Escaped(bytes) => self.shared.change(|state| {
                state.waiting.extend(bytes);
                state.stop = true;
            }),
            StreamRead::Ended => {
                let _ = ops.remove(events);
                self.end_of_stream();
            }
        }
    }

    fn end_of_stream(&mut self) {
        self.stream = None;
        self.shared.change(|state| state.source_open = false);
    }

    fn resume_stream(&mut self, ops: &mut EventOps<'_>) {
        if let Some(stream) = self.stream.as_ref().filter(|_| self.paused) {
            self.paused = ops.add(Events::with_data(stream, STREAM, EventSet::IN)).is_err();
        }
    }
}

/// The running thread.
pub(crate) struct Watcher {
    shared: Arc<Shared>,
    room: EventFd,
    close: EventFd,
    alarm: Alarm,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    /// Starts the thread. A write to `stop` asks the machine to stop.
    pub(crate) fn start(
        input: OpenInput,
        stop: &EventFd,
        kick: Arc<dyn Kick>,
        flush_interval: Duration,
    ) -> Result<Self, HostError> {
        let system = HostError::system;
        let state = State {
            waiting: input.ready,
            source_open: input.stream.is_some(),
            stop: false,
            generation: 0,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            changed: Condvar::new(),
            flush_due: AtomicBool::new(false),
            kick,
        });
        let (room, close) = (eventfd()?, eventfd()?);
        let mut timer = TimerFd::new().map_err(|e| system("a timer")(e.into()))?;
        timer
            .reset(flush_interval, Some(flush_interval))
            .map_err(|e| system("a timer")(e.into()))?;
        let alarm = Alarm::new()?;
        let closing = Arc::new(AtomicBool::new(false));
        let sources = Sources {
            shared: Arc::clone(&shared),
            stream: input.stream,
            paused: false,
            room: room.try_clone().map_err(system("an eventfd"))?,
            stop: stop.try_clone().map_err(system("an eventfd"))?,
            timer,
            alarm: alarm.as_raw_fd(),
            close: close.try_clone().map_err(system("an eventfd"))?,
            closing: Arc::clone(&closing),
        };
        let mut manager = EventManager::new()
            .map_err(|error| system("an epoll descriptor")(io::Error::other(error.to_string())))?;
        manager.add_subscriber(sources);
        let thread = std::thread::Builder::new()
            .name("watcher".to_owned())
            .spawn(move || {
                // An error of epoll_wait itself would repeat for ever.
                while !closing.load(Ordering::Acquire) && manager.run().is_ok() {}
            })
            .map_err(system("a thread"))?;
        Ok(Self { shared, room, close, alarm, thread: Some(thread) })
    }

    /// What the thread leaves.
    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// The timer that kicks.
    pub(crate) fn alarm(&mut self) -> &mut Alarm {
        &mut self.alarm
    }

    /// Takes at most `room` waiting bytes, and lets the stream go on if it was held up.
    pub(crate) fn take_input(&self, room: usize) -> Vec<u8> {
        let mut state = self.shared.state();
        let was_full = state.waiting.len() >= MAX_WAITING_BYTES;
        let count = room.min(state.waiting.len());
        let bytes = state.waiting.drain(..count).collect();
        if was_full && state.source_open && state.waiting.len() < MAX_WAITING_BYTES {
            // The counter can only be full if the thread is awake already.
            let _ = self.room.write(1);
        }
        bytes
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let _ = self.close.write(1);
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

/// An eventfd that never blocks.
pub(crate) fn eventfd() -> Result<EventFd, HostError> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(HostError::system("an eventfd"))
}
