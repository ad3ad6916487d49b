//! A guest that looks at accessed bits, on hardware that sets some early: what the session tells.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use reprise::session::automatic::Verdict;
use reprise::session::checkpoints::CheckpointArg;
use reprise::session::hardware::BranchHardware;
use reprise::session::report::SessionReport;
use reprise_branch_clock::engine::BranchClock;
use reprise_devices::cpu_model::TimeStampCounter;
use reprise_kvm::Finding;
use reprise_machine::engine::EngineError;
use reprise_machine::ram::GuestRam;
use reprise_tests::hardware::Simulated;

use crate::{Session, assert_equal, replay};

/// Hardware whose first engine sets accessed bits early, the others too or not.
#[derive(Clone, Debug)]
struct Early {
    simulated: Simulated,
    /// An engine was made.
    made: Arc<AtomicBool>,
    always: bool,
}

impl Early {
    fn new(seed: u64, always: bool) -> Self {
        Self { simulated: exact(seed), made: Arc::default(), always }
    }
}

/// Hardware that sets no accessed bit early.
fn exact(seed: u64) -> Simulated {
    let mut simulated = Simulated::intel(seed);
    simulated.disturbance.access_every = None;
    simulated
}

impl BranchHardware for Early {
    type Vcpu = <Simulated as BranchHardware>::Vcpu;

    fn is_there(&self) -> bool {
        self.simulated.is_there()
    }

    fn verdict(&self) -> Verdict {
        self.simulated.verdict()
    }

    fn try_anew(&self) -> Finding {
        self.simulated.try_anew()
    }

    fn time_stamp_trap(&self) -> Finding {
        self.simulated.time_stamp_trap()
    }

    fn engine(
        &self,
        ram: GuestRam,
        counter: TimeStampCounter,
    ) -> Result<BranchClock<Self::Vcpu>, EngineError> {
        let mut simulated = self.simulated.clone();
        let first = !self.made.swap(true, Ordering::Relaxed);
        // A few steps from one to the next: the guest sees one soon.
        simulated.disturbance.access_every = (first || self.always).then_some(300);
        simulated.engine(ram, counter)
    }
}

fn session() -> (Session, SessionReport) {
    let session = Session::new("positions", "do=accessed hz=2000 count=20");
    let recorded = session.record_with(&exact(1), CheckpointArg::Ticks(100_000));
    (session, recorded)
}

#[test]
fn a_guest_that_went_another_way_is_replayed_again() {
    let (session, recorded) = session();
    for seed in 2..6 {
        let replayed = replay(&session.path(), &Early::new(seed, false)).expect("it replays");
        assert_equal(&recorded, &replayed.report, seed);
        assert_eq!(replayed.report.times_parted, 1, "seed {seed}");
        let told = |note: &String| note.contains("another way than recorded once");
        assert!(replayed.notes.iter().any(told), "{:?}", replayed.notes);
    }
}

#[test]
fn a_guest_that_goes_another_way_each_time_is_not_verified() {
    let (session, _) = session();
    let replayed = replay(&session.path(), &Early::new(2, true)).expect("it is told");
    assert_eq!(replayed.report.verified, Some(false));
    assert!(replayed.report.divergence.is_some() && replayed.report.times_parted > 0);
    let told = |note: &String| note.contains("it differs still");
    assert!(replayed.notes.iter().any(told), "{:?}", replayed.notes);
}
