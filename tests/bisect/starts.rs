//! Where a comparison of two recordings begins: at the last checkpoint that both have alike.

use reprise_bisect::{Side, common_start};
use reprise_cpu::translate::Translation;
use reprise_replay::{Start, checkpoints_path};
use reprise_trace::checkpoint::MachineState;

use crate::recordings::{Workplace, open};
use crate::unused_entry;

const NOWHERE: (u64, u8) = (u64::MAX, 0);

/// What makes a checkpoint another one, beside a bit of RAM.
const CHANGES: [fn(&mut MachineState); 3] = [
    |state| *state.devices.last_mut().expect("a board") ^= 1,
    |state| state.engine.cpu.gpr[12] ^= 1,
    |state| state.engine.hidden.bytes.push(0),
];

#[test]
fn a_comparison_begins_at_the_last_checkpoint_that_is_alike() {
    let workplace = Workplace::new();
    let typed = "one\rtwo\rthree\rquit\r";
    let a = workplace.record("a.rr", "echo", typed, &["--checkpoint-every", "2000"]);
    let first = open(&a);
    let ticks: Vec<u64> = first.checkpoints().iter().map(|info| info.moment.tick).collect();
    let [.., before_last, last] = ticks[..] else { panic!("{ticks:?}") };
    // In a page that is not all zeros: of those alone checkpoints have the bytes.
    let of_ram: ((u64, u8), fn(&mut MachineState)) = ((unused_entry(&first), 0x20), |_| {});
    for (byte, change) in CHANGES.map(|change| (NOWHERE, change)).into_iter().chain([of_ram]) {
        let b = workplace.path("b.rr");
        std::fs::copy(&a, &b).expect("a copy");
        std::fs::copy(checkpoints_path(&a), checkpoints_path(&b)).expect("a copy");
        let starts = |tick| {
            let second = open(&b);
            let sides = [&first, &second];
            let sides = sides.map(|one| Side::soft("one", one, Translation::default()));
            common_start(&sides, tick)
        };
        let at = |index| [Start::Checkpoint(index); 2];
        assert_eq!(starts(u64::MAX), at(ticks.len() - 1));
        assert_eq!(starts(last), at(ticks.len() - 1));
        assert_eq!(starts(last - 1), at(ticks.len() - 2));
        assert_eq!(starts(ticks[0] - 1), [Start::Run; 2]);
        workplace.alter_checkpoint_and_state(&b, ticks.len() - 1, byte, change);
        assert_eq!(starts(u64::MAX), at(ticks.len() - 2));
        assert_eq!(starts(before_last), at(ticks.len() - 2));
    }
}

/// Checkpoints of a log that says something else before them.
#[test]
fn a_checkpoint_of_another_log_is_refused() {
    let workplace = Workplace::new();
    let a = workplace.record("a.rr", "echo", "one\rtwo\rquit\r", &["--checkpoint-every", "2000"]);
    let recording = open(&a);
    let info = recording.checkpoints().last().expect("it has checkpoints");
    let last = usize::try_from(info.records).expect("few") - 1;
    let index = recording.checkpoints().len() - 1;
    let b = workplace.altered("b.rr", &a, |records| records[last].cpu_digest ^= 1);
    std::fs::copy(checkpoints_path(&a), checkpoints_path(&b)).expect("a copy");
    assert!(recording.begin(Start::Checkpoint(index)).is_ok());
    let error = open(&b).begin(Start::Checkpoint(index)).expect_err("it is of another log");
    let line = error.to_string();
    assert!(line.contains("recording") && !line.contains('\n'), "{line}");
}
