//! What a recording's log holds: one record for each thing that the machine could not have known.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};

use serde::{Deserialize, Serialize};

use crate::header::Precaution;
use crate::logged::Logged;
use crate::moment::{Moment, TickKind};

/// Why a run ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ending {
    /// The guest asked for a reset (i8042, port 0x92 or port 0xcf9).
    Reset,
    /// The guest took a triple fault, which resets a PC.
    TripleFault,
    /// HLT with interrupts off: how a guest without ACPI powers off.
    PowerOff,
    /// HLT with interrupts on, but nothing left that could ever interrupt.
    IdleForever,
    /// The guest wrote this process exit code's source to the debug-exit port: `(value << 1) | 1`.
    DebugExit(u8),
    /// Someone asked the recorder to stop (Ctrl-C, the escape key, a limit).
    Stopped,
    /// The engine could not go on; the reason is for a person.
    EngineFailed(String),
}

/// From here on another engine executes the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandOver {
    /// The engine that goes on: `kvm` or `soft`.
    pub engine: String,
    /// How it counts ticks: `instructions`, `sync`, `step` or `pmu`.
    pub clock: String,
    /// What one of its ticks is. Its count goes on where the one before stood.
    pub tick_kind: TickKind,
    /// Nanoseconds of guest time in one tick; zero where virtual time is the host's clock, logged.
    pub ns_per_tick: u64,
}

/// Instructions that an engine refused and the software CPU executed in its place: how often, by
/// mnemonic.
pub type Assists = BTreeMap<String, u64>;

/// One thing that entered the machine, or a mark of how far it had come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// Arrival: bytes typed on the console.
    Console(Vec<u8>),
    /// Arrival: virtual time is now this many nanoseconds since the machine started.
    Time(u64),
    /// Answer: the guest asked for the time and was told this many nanoseconds.
    ClockRead(u64),
    /// No input: where the machine stood, so that a recording cut short replays this far, verified.
    Mark(MarkDigest),
    /// No input: another engine goes on from here.
    HandOver(HandOver),
    /// No input: what engines refused and the software CPU executed in their place, in all of the run.
    Assists(Assists),
    /// No input: what the run found open though the header could only say, before it, that it would be closed.
    LeftOpen(Vec<Precaution>),
    /// The run's end.
    End {
        /// Why it ended.
        ending: Ending,
        /// Effects up to the end.
        effects: EffectDigest,
        /// BLAKE3 over CPU, devices and RAM; `None` where the engine could not stop at an exact
        /// moment (a stop asked for under a clock that counts exits only).
        final_digest: Option<[u8; 32]>,
    },
}

/// What has left the machine so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EffectDigest {
    /// Console bytes written.
    pub console_bytes: u64,
    /// BLAKE3 of all console bytes written.
    pub console_digest: [u8; 32],
}

impl EffectDigest {
    /// The short form that a mark carries.
    pub fn mark(&self) -> MarkDigest {
        let prefix = self.console_digest.first_chunk().expect("a digest has 32 bytes");
        MarkDigest {
            console_bytes: self.console_bytes,
            console_digest_prefix: u64::from_le_bytes(*prefix),
        }
    }
}

/// [`EffectDigest`] in short: marks come a few times a second, and the log has to stay small. The
/// run's [`Event::End`] carries the digest whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MarkDigest {
    /// Console bytes written.
    pub console_bytes: u64,
    /// The first eight bytes of [`EffectDigest::console_digest`], little-endian.
    pub console_digest_prefix: u64,
}

/// One record of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// When.
    pub moment: Moment,
    /// The first eight bytes of the CPU state's digest at that moment.
    pub cpu_digest: u64,
    /// What.
    pub event: Event,
}

/// Console bytes of one record that are shown to a person.
const SHOWN_CONSOLE_BYTES: usize = 32;

impl Display for Ending {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reset => f.write_str("the guest asked for a reset"),
            Self::TripleFault => f.write_str("the guest took a triple fault"),
            Self::PowerOff => f.write_str("the guest powered off"),
            Self::IdleForever => f.write_str("the guest waits for nothing that could come"),
            Self::DebugExit(value) => write!(f, "the guest wrote {value} to the debug-exit port"),
            Self::Stopped => f.write_str("the run was stopped"),
            Self::EngineFailed(reason) => write!(f, "the engine failed: {reason}"),
        }
    }
}

impl Event {
    /// Whether it only tells of the run as a whole, and stands at no place of it.
    pub fn is_told(&self) -> bool {
        matches!(self, Self::Assists(_) | Self::LeftOpen(_))
    }
}

impl Display for Event {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Console(bytes) => {
                let shown = &bytes[..bytes.len().min(SHOWN_CONSOLE_BYTES)];
                let more = if shown.len() < bytes.len() { "..." } else { "" };
                let count = bytes.len();
                write!(f, "{count} console bytes \"{}{more}\"", shown.escape_ascii())
            }
            Self::Time(ns) => write!(f, "time {ns} ns"),
            Self::ClockRead(ns) => write!(f, "clock read {ns} ns"),
            Self::Mark(mark) => write!(
                f,
                "mark after {} console bytes (digest {:016x}...)",
                mark.console_bytes,
                mark.console_digest_prefix.swap_bytes()
            ),
            Self::HandOver(to) => write!(f, "hand-over to {} (clock {})", to.engine, to.clock),
            Self::Assists(assists) => {
                write!(f, "{} instructions assisted", assists.values().sum::<u64>())
            }
            Self::LeftOpen(left) => {
                let all: Vec<_> = left.iter().map(|precaution| &precaution.what[..]).collect();
                write!(f, "left open: {}", all.join("; "))
            }
            Self::End { ending, effects, .. } => {
                write!(f, "end after {} console bytes: {ending}", effects.console_bytes)
            }
        }
    }
}

impl Display for Record {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.event, self.moment)
    }
}

/// A logged record taken apart: each payload keeps its proof.
#[derive(Debug)]
pub enum LoggedEvent {
    /// See [`Event::Console`].
    Console(Logged<Vec<u8>>),
    /// See [`Event::Time`].
    Time(Logged<u64>),
    /// See [`Event::ClockRead`].
    ClockRead(Logged<u64>),
    /// See [`Event::Mark`].
    Mark(MarkDigest),
    /// See [`Event::HandOver`].
    HandOver(HandOver),
    /// See [`Event::Assists`].
    Assists(Assists),
    /// See [`Event::LeftOpen`].
    LeftOpen(Vec<Precaution>),
    /// See [`Event::End`].
    End {
        /// Why it ended.
        ending: Ending,
        /// Effects up to the end.
        effects: EffectDigest,
        /// See [`Event::End`].
        final_digest: Option<[u8; 32]>,
    },
}

impl Logged<Record> {
    /// Takes the record apart.
    pub fn into_event(self) -> LoggedEvent {
        match self.into_inner().event {
            Event::Console(bytes) => LoggedEvent::Console(Logged::new(bytes)),
            Event::Time(ns) => LoggedEvent::Time(Logged::new(ns)),
            Event::ClockRead(ns) => LoggedEvent::ClockRead(Logged::new(ns)),
            Event::Mark(effects) => LoggedEvent::Mark(effects),
            Event::HandOver(to) => LoggedEvent::HandOver(to),
            Event::Assists(assists) => LoggedEvent::Assists(assists),
            Event::LeftOpen(left) => LoggedEvent::LeftOpen(left),
            Event::End { ending, effects, final_digest } => {
                LoggedEvent::End { ending, effects, final_digest }
            }
        }
    }
}
