//! What a checkpoint holds of this CPU beside its architectural state and RAM.

use reprise_trace::checkpoint::{EngineState, HiddenState};
use reprise_trace::moment::MOST_TICKS;
use serde::{Deserialize, Serialize};

use crate::cpu::Cpu;
use crate::memory::tlb::TlbState;
use crate::system::debug::DebugState;
use crate::system::deliver::ExceptionRun;

/// This engine's name in a [`HiddenState`].
const ENGINE: &str = "soft";
/// Raised by any change of what the bytes mean.
const VERSION: u32 = 1;
/// What to do about a state that cannot be taken up: it is only ever kept in checkpoints.
const ADVICE: &str = "delete the file of checkpoints, and `reprise checkpoint` makes them anew";

#[derive(Serialize, Deserialize)]
struct Hidden {
    tlb: TlbState,
    debug: DebugState,
    exceptions: ExceptionRun,
}

impl Cpu {
    /// Everything that decides what the guest sees next and that [`Cpu::state`] has not. Only at an
    /// instruction boundary.
    pub(crate) fn hidden_state(&self) -> HiddenState {
        let hidden = Hidden {
            tlb: self.memory.saved_translations(),
            debug: self.debug,
            exceptions: self.exceptions,
        };
        let bytes = postcard::to_allocvec(&hidden).expect("no type of it can fail to encode");
        HiddenState { engine: ENGINE.to_owned(), version: VERSION, bytes }
    }

    /// Takes up a saved state, whose RAM is there already. What another engine kept is not used: the
    /// CPU then begins without translations.
    ///
    /// # Errors
    /// Says in one line why the state cannot be taken up.
    pub(crate) fn restore(&mut self, state: &EngineState) -> Result<(), String> {
        let HiddenState { engine, version, bytes } = &state.hidden;
        if state.tick >= MOST_TICKS {
            return Err(impossible());
        }
        self.set_state(&state.cpu);
        self.tick = state.tick;
        self.answered.clear();
        self.answered_used = 0;
        self.pending_exit = None;
        if engine != ENGINE {
            return Ok(());
        }
        if *version != VERSION {
            return Err(format!(
                "the saved CPU has state version {version}, but this build knows {VERSION}: {ADVICE}"
            ));
        }
        let hidden = match postcard::take_from_bytes::<Hidden>(bytes) {
            Ok((hidden, [])) => hidden,
            _ => return Err(impossible()),
        };
        if !self.memory.load_translations(&hidden.tlb) {
            return Err(impossible());
        }
        self.debug = hidden.debug;
        self.exceptions = hidden.exceptions;
        Ok(())
    }
}

fn impossible() -> String {
    format!("the saved CPU is in a state that it never reaches: {ADVICE}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_bytes_mean_changes_with_the_version() {
        let hidden = Hidden {
            tlb: TlbState::default(),
            debug: DebugState::default(),
            exceptions: ExceptionRun::NONE,
        };
        let bytes = postcard::to_allocvec(&hidden).expect("it encodes");
        // Nine empty lists; no hits, two boundaries that never were; no exceptions since none.
        let none = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1];
        let expected = [&[0; 9][..], &[0], &none, &none, &none, &[0]].concat();
        assert_eq!((VERSION, bytes), (1, expected), "raise VERSION, then say here what is saved");
    }
}
