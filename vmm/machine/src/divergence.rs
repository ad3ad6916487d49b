//! Where a replay is not what was recorded.

use std::fmt;

use reprise_trace::event::{Ending, Event};
use reprise_trace::moment::Moment;

/// What differs between a recording and its replay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference {
    /// The replay stands at another instruction.
    Rip,
    /// The replay stands at the same instruction with another RCX: amid a REP, or in other data.
    Rcx,
    /// The position agrees, some other part of the CPU's state does not.
    CpuState,
    /// The replay has gone past the record's tick without a place for it.
    Passed,
    /// The guest asked for the time where the recording has no answer, or asked something else.
    Answer,
    /// What left the machine.
    Effects,
    /// The run ended elsewhere or otherwise.
    Ending,
    /// The state at the end.
    FinalState,
    /// The guest sleeps, and the recording has nothing that could wake it.
    Idle,
    /// The recorded time lies before the replay's, or beyond any run's.
    Time,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rip => "the instruction pointer",
            Self::Rcx => "RCX",
            Self::CpuState => "the CPU state",
            Self::Passed => "the order of events",
            Self::Answer => "what the guest asked for",
            Self::Effects => "what the guest wrote to its console",
            Self::Ending => "how the run ended",
            Self::FinalState => "the final state",
            Self::Idle => "what wakes the idle guest",
            Self::Time => "virtual time",
        })
    }
}

/// The first place where a replay is not what was recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Divergence {
    /// Where, as the recording has it.
    pub moment: Moment,
    /// What differs.
    pub difference: Difference,
    /// What the recording has.
    pub expected: String,
    /// What the replay has.
    pub found: String,
}

impl fmt::Display for Divergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { moment, difference, expected, found } = self;
        write!(
            f,
            "the replay differs from the recording at {moment} in {difference}: \
             recorded {expected}, replayed {found}"
        )
    }
}

/// An event as a divergence names it.
pub(crate) fn describe(event: &Event) -> String {
    match event {
        Event::Console(bytes) => format!("{} bytes of console input", bytes.len()),
        Event::Time(ns) => format!("virtual time set to {ns} ns"),
        Event::ClockRead(ns) => format!("a clock read answered with {ns} ns"),
        Event::Mark(_) => "a mark".to_owned(),
        Event::HandOver(to) => format!("a hand-over to engine {} (clock {})", to.engine, to.clock),
        Event::Assists(_) => "what was assisted".to_owned(),
        Event::LeftOpen(_) => "what was left open".to_owned(),
        Event::End { ending, .. } => format!("the end: {}", describe_ending(ending)),
    }
}

/// An ending as a divergence names it.
pub(crate) fn describe_ending(ending: &Ending) -> String {
    match ending {
        Ending::Reset => "reset by the guest".to_owned(),
        Ending::TripleFault => "triple fault".to_owned(),
        Ending::PowerOff => "power-off (HLT with interrupts off)".to_owned(),
        Ending::IdleForever => "idle with nothing left to wake the guest".to_owned(),
        Ending::DebugExit(value) => format!("debug exit with value {value}"),
        Ending::Stopped => "stopped as asked".to_owned(),
        Ending::EngineFailed(reason) => format!("engine failed ({reason})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_divergence_names_where_what_and_both_sides() {
        let divergence = Divergence {
            moment: Moment { tick: 1234, rip: 0xffff_8000, rcx: 7 },
            difference: Difference::Rcx,
            expected: "0x7".to_owned(),
            found: "0x8".to_owned(),
        };
        assert_eq!(
            divergence.to_string(),
            "the replay differs from the recording at tick 1234 (rip 0xffff8000, rcx 0x7) in RCX: \
             recorded 0x7, replayed 0x8"
        );
    }
}
