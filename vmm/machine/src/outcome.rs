//! What a run came to.

use reprise_trace::event::{Assists, EffectDigest, Ending, HandOver};
use reprise_trace::header::Precaution;
use reprise_trace::log::LogError;
use reprise_trace::moment::Moment;

use crate::digest::StateDigest;
use crate::divergence::Divergence;
use crate::engine::{EngineError, Overshoot};
use crate::lawful::SetAside;

/// Why a run is over.
#[derive(Debug)]
pub enum Conclusion {
    /// The guest's run ended; a replay came to the very end that was recorded.
    Ended(Ending),
    /// Replay only: the recording has no end, because its writer was killed or the file is damaged
    /// behind this place. All that is there has been replayed and verified.
    CutShort {
        /// What is wrong with the recording behind this place; `None` if it just stops.
        damage: Option<LogError>,
    },
    /// Replay only: another engine went on from here, and what replays cannot do the same.
    HandedOver(HandOver),
    /// Replay only: the tick that was asked for is reached.
    TargetReached,
    /// Replay only: what happened is not what was recorded.
    Diverged(Divergence),
}

/// What a run came to, and where.
#[derive(Debug)]
pub struct Outcome {
    /// Why the run is over.
    pub conclusion: Conclusion,
    /// Where the machine stands; RIP and RCX are zero where that is no exact moment.
    pub moment: Moment,
    /// Ticks since the machine started.
    pub ticks: u64,
    /// Virtual time, in nanoseconds since the machine started.
    pub virtual_ns: u64,
    /// What has left the machine.
    pub effects: EffectDigest,
    /// The machine's state; `None` where it stands at no exact moment (see
    /// [`reprise_trace::event::Event::End`]) and after a divergence.
    pub state: Option<StateDigest>,
    /// Records written to the log, or replayed from it.
    pub events: u64,
    /// Replay only: the last record that agreed with the replay.
    pub verified_until: Option<Moment>,
    /// Replay only: what the comparison left out, because hardware may lawfully differ there.
    pub set_aside: Vec<SetAside>,
    /// Accesses to the board.
    pub accesses: u64,
    /// Interrupts delivered.
    pub interrupts: u64,
    /// Where other engines went on, and which.
    pub hand_overs: Vec<(u64, HandOver)>,
    /// Instructions that the engine refused and the software CPU executed.
    pub assists: Assists,
    /// What the engine found open, and was to close.
    pub left_open: Vec<Precaution>,
}

impl Outcome {
    /// BLAKE3 over CPU, devices and RAM.
    pub fn final_digest(&self) -> Option<[u8; 32]> {
        self.state.as_ref().map(StateDigest::whole)
    }

    /// The divergence, if there is one.
    pub fn divergence(&self) -> Option<&Divergence> {
        match &self.conclusion {
            Conclusion::Diverged(divergence) => Some(divergence),
            _ => None,
        }
    }
}

/// A run that could not go on, through no fault of the guest.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The engine failed; a recording is closed and replays up to here.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Replay only: the engine, which stops late, is past what the log has next. Another attempt, best from
    /// a checkpoint before that place, may find it.
    #[error(transparent)]
    Overshot(#[from] Overshoot),
    /// The recording could not be written (a full disk, say), so the guest was stopped.
    #[error("{error} (recorded up to {})", kept(.kept_until))]
    Recording {
        /// Why.
        error: LogError,
        /// The last record that is known to have gone out; the log holds at least this much.
        kept_until: Option<Moment>,
    },
    /// Whoever watches the run has ended it: see [`crate::watch::Watch`].
    #[error("stopped on request")]
    Stopped,
}

fn kept(moment: &Option<Moment>) -> String {
    moment.map_or_else(|| "the start".to_owned(), |moment| moment.to_string())
}
