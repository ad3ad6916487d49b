//! What the recording side may ask of the world outside. The real one is the host crate's; tests
//! bring simulated ones.

use reprise_trace::event::Ending;

/// What ended a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// The time asked for has passed.
    Timeout,
    /// Console input may be there, or a stop was asked for: look.
    Look,
}

/// The world outside, as the recording implementation of the boundary asks it. Only the recording
/// machine has one; a replaying machine holds no host at all.
pub trait Host {
    /// Nanoseconds since the machine started, never going back.
    fn now_ns(&mut self) -> u64;

    /// Takes at most `room` bytes that were typed on the console and are waiting.
    fn take_console_input(&mut self, room: usize) -> Vec<u8>;

    /// Whether bytes may still be typed: false once an input file is used up or standard input is
    /// closed, and no byte is waiting. While true, an idle guest waits for the host.
    fn input_may_come(&mut self) -> bool;

    /// Sleeps until input may be there, a stop is asked for, or `timeout_ns` has passed (`None`:
    /// no limit).
    fn wait(&mut self, timeout_ns: Option<u64>) -> Wake;

    /// The guest is about to run freely, and at `deadline_ns` of [`Host::now_ns`] a device wants to be
    /// looked after: kicks the engine then, and again a while later if the deadline asked for is past
    /// already. `None` forgets it. A host whose guests are kicked by somebody else ignores this.
    fn kick_at(&mut self, _deadline_ns: Option<u64>) {}

    /// Console output leaves the machine.
    fn console_output(&mut self, bytes: &[u8]);

    /// Why to stop now, if somebody asked.
    fn stop_requested(&mut self) -> Option<Ending>;

    /// Whether it is time to write a mark and push the log out (a few times a second).
    fn flush_due(&mut self) -> bool;

    /// How far the machine is, for a progress line; cheap, called now and then.
    fn progress(&mut self, tick: u64, virtual_ns: u64);
}
