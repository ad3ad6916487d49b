//! The world outside, as the recording machine asks it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use reprise_machine::engine::Kick;
use reprise_machine::host::{Host, Wake};
use reprise_trace::event::Ending;
use vmm_sys_util::eventfd::EventFd;

use crate::HostError;
use crate::console::{ConsoleOutput, ConsoleSink};
use crate::input::{InputSource, OpenInput};
use crate::terminal::{RawMode, StopSignals};
use crate::watcher::{FLUSH_INTERVAL, Watcher, eventfd};

/// How far a machine is.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Ticks since the machine started.
    pub tick: u64,
    /// Virtual time, in nanoseconds since the machine started.
    pub virtual_ns: u64,
    /// Time on the host's clock since the machine started.
    pub elapsed: Duration,
}

/// Told how far the machine is, a few times a second.
pub type ProgressObserver = Box<dyn FnMut(Progress)>;

/// How the machine meets the world.
pub struct HostOptions {
    /// Where console input comes from.
    pub input: InputSource,
    /// Where console output goes.
    pub console: ConsoleSink,
    /// SIGINT, SIGTERM and SIGHUP ask for a stop, so that a recording is closed. A process can have
    /// one such host at a time.
    pub handle_signals: bool,
    /// The run stops, soon after this time, as if somebody had asked.
    pub time_limit: Option<Duration>,
    /// Told how far the machine is.
    pub progress: Option<ProgressObserver>,
}

impl Default for HostOptions {
    /// Nobody types, nobody listens.
    fn default() -> Self {
        Self {
            input: InputSource::None,
            console: ConsoleSink::Discard,
            handle_signals: false,
            time_limit: None,
            progress: None,
        }
    }
}

/// The real world: standard input or a file, standard output, the monotonic clock, signals.
///
/// The terminal and the signals are as they were when the value is dropped.
pub struct RealHost {
    started: Instant,
    console: ConsoleOutput,
    progress: Option<ProgressObserver>,
    time_limit: Option<Duration>,
    /// The generation of changes that the last wait saw.
    seen: u64,
    // In the order of dropping: no signal writes to an eventfd that is gone.
    _raw_mode: Option<RawMode>,
    _signals: Option<StopSignals>,
    watcher: Watcher,
    _stop: EventFd,
}

impl std::fmt::Debug for RealHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RealHost").field("started", &self.started).finish_non_exhaustive()
    }
}

impl RealHost {
    /// Opens the input, takes over terminal and signals as asked, and starts the clock. `kick`
    /// interrupts the engine when there is something to look at.
    ///
    /// # Errors
    /// The input cannot be read, or the host refuses a descriptor or a thread.
    pub fn start(options: HostOptions, kick: Arc<dyn Kick>) -> Result<Self, HostError> {
        Self::start_with(options, kick, FLUSH_INTERVAL)
    }

    fn start_with(
        options: HostOptions,
        kick: Arc<dyn Kick>,
        flush_interval: Duration,
    ) -> Result<Self, HostError> {
        let input = OpenInput::open(&options.input)?;
        let stop = eventfd()?;
        let watcher = Watcher::start(input, &stop, kick, flush_interval)?;
        let signals = options.handle_signals.then(|| StopSignals::route_to(&stop)).transpose()?;
        let at_terminal = options.input == InputSource::Terminal;
        let raw_mode = at_terminal.then(RawMode::enter).transpose()?;
        Ok(Self {
            started: Instant::now(),
            console: ConsoleOutput::new(options.console),
            progress: options.progress,
            time_limit: options.time_limit,
            seen: 0,
            _raw_mode: raw_mode,
            _signals: signals,
            watcher,
            _stop: stop,
        })
    }

    /// Time on the host's clock since the machine started.
    fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Writes what is left of the console's output, and tells why output was lost, if it was.
    pub fn console_failure(&mut self) -> Option<&std::io::Error> {
        self.console.push();
        self.console.failure()
    }
}

impl Host for RealHost {
    fn now_ns(&mut self) -> u64 {
        // 584 years fit.
        self.started.elapsed().as_nanos() as u64
    }

    fn take_console_input(&mut self, room: usize) -> Vec<u8> {
        self.watcher.take_input(room)
    }

    fn input_may_come(&mut self) -> bool {
        self.watcher.shared().input_may_come()
    }

    fn wait(&mut self, timeout_ns: Option<u64>) -> Wake {
        self.console.push();
        // The wait ends with the deadline by itself: a kick as well would be one for nothing.
        self.kick_at(None);
        let timeout = timeout_ns.map(Duration::from_nanos);
        let generation = self.watcher.shared().wait_for_change(self.seen, timeout);
        if generation == self.seen {
            return Wake::Timeout;
        }
        self.seen = generation;
        Wake::Look
    }

    fn kick_at(&mut self, deadline_ns: Option<u64>) {
        let now_ns = self.now_ns();
        self.watcher.alarm().set(deadline_ns, now_ns);
    }

    fn console_output(&mut self, bytes: &[u8]) {
        self.console.write(bytes);
    }

    fn stop_requested(&mut self) -> Option<Ending> {
        let over = self.time_limit.is_some_and(|limit| self.elapsed() > limit);
        (over || self.watcher.shared().stop_requested()).then_some(Ending::Stopped)
    }

    fn flush_due(&mut self) -> bool {
        let due = self.watcher.shared().take_flush_due();
        if due {
            self.console.push();
        }
        due
    }

    fn progress(&mut self, tick: u64, virtual_ns: u64) {
        let elapsed = self.elapsed();
        if let Some(observer) = &mut self.progress {
            observer(Progress { tick, virtual_ns, elapsed });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use reprise_machine::engine::FlagKick;

    use super::*;

    fn host(input: InputSource) -> (RealHost, FlagKick) {
        let kick = FlagKick::default();
        let options = HostOptions { input, ..HostOptions::default() };
        (RealHost::start(options, Arc::new(kick.clone())).expect("a host"), kick)
    }

    #[test]
    fn a_typed_file_is_taken_in_pieces_and_then_used_up() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("typed");
        std::fs::write(&path, "abcde").expect("write");
        let (mut host, _) = host(InputSource::File(path));
        assert!(host.input_may_come());
        assert_eq!(host.take_console_input(2), b"ab");
        assert_eq!(host.take_console_input(9), b"cde");
        assert!(!host.input_may_come());
    }

    #[test]
    fn waiting_ends_with_its_time_and_with_the_flush_timer() {
        let (mut host, kick) = host(InputSource::None);
        let before = host.now_ns();
        assert_eq!(host.wait(Some(2_000_000)), Wake::Timeout);
        assert!(host.now_ns() - before >= 2_000_000);
        assert_eq!(host.wait(None), Wake::Look);
        assert!(host.flush_due() && !host.flush_due());
        assert!(kick.0.load(Ordering::Acquire));
    }

    #[test]
    fn a_time_limit_asks_for_a_stop() {
        let limit = Duration::from_millis(20);
        let options = HostOptions { time_limit: Some(limit), ..HostOptions::default() };
        let kick = Arc::new(FlagKick::default());
        let mut host = RealHost::start(options, kick).expect("a host");
        assert_eq!(host.stop_requested(), None);
        std::thread::sleep(2 * limit);
        assert_eq!(host.stop_requested(), Some(Ending::Stopped));
    }

    #[test]
    fn an_event_before_the_wait_is_not_lost() {
        let (mut host, _) = host(InputSource::None);
        std::thread::sleep(Duration::from_millis(400));
        assert_eq!(host.wait(None), Wake::Look);
    }

    /// Counts kicks.
    #[derive(Default)]
    struct Counting(std::sync::atomic::AtomicU64);

    impl Kick for Counting {
        fn kick(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Waits until so many kicks have come, and as long again for one too many.
    fn expect_kicks(kick: &Counting, count: u64) {
        let kicks = || kick.0.load(Ordering::SeqCst);
        let started = Instant::now();
        while kicks() < count {
            assert!(started.elapsed() < Duration::from_secs(60), "{} of {count} kicks", kicks());
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(kicks(), count);
    }

    /// A host without a flush timer, which kicks as well.
    fn quiet_host() -> (RealHost, Arc<Counting>) {
        let kick = Arc::new(Counting::default());
        let never = Duration::from_secs(3600);
        let host = RealHost::start_with(HostOptions::default(), kick.clone(), never);
        (host.expect("a host"), kick)
    }

    #[test]
    fn a_deadline_kicks_once_and_not_before() {
        let (mut host, kick) = quiet_host();
        let deadline = host.now_ns() + 30_000_000;
        // As often as the guest is entered.
        for _ in 0..100 {
            host.kick_at(Some(deadline));
        }
        let early = kick.0.load(Ordering::SeqCst);
        assert!(early == 0 || host.now_ns() >= deadline, "{early} kicks before the deadline");
        expect_kicks(&kick, 1);
    }

    #[test]
    fn a_deadline_that_is_past_kicks_again_and_again() {
        let (mut host, kick) = quiet_host();
        let deadline = host.now_ns();
        for count in 1..=3 {
            host.kick_at(Some(deadline));
            expect_kicks(&kick, count);
        }
    }

    #[test]
    fn a_deadline_that_is_called_off_and_one_that_is_slept_through_do_not_kick() {
        let (mut host, kick) = quiet_host();
        let soon = host.now_ns() + 10_000_000;
        host.kick_at(Some(soon));
        host.kick_at(None);
        expect_kicks(&kick, 0);
        let soon = host.now_ns() + 500_000_000;
        host.kick_at(Some(soon));
        assert_eq!(host.wait(Some(600_000_000)), Wake::Timeout);
        expect_kicks(&kick, 0);
        // And a new one is not taken for the one that was set before.
        host.kick_at(Some(soon));
        expect_kicks(&kick, 1);
    }
}
