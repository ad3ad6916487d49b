//! A short recording and its replay, to see whether an engine does here what it should.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use reprise_host::HostOptions;
use reprise_machine::ram::MIN_RAM_MIB;
use serde::Serialize;

use super::assembly::SoftOptions;
use super::checkpoints::CheckpointArg;
use super::choice::{Choice, EngineArg, EngineKind};
use super::guest::Guest;
use super::hardware::BranchHardware;
use super::record::{self, RecordTo, RunPlan};
use super::replay::{self, ReplayOptions};

/// The guest: timer interrupts that land in a loop, with a port access now and then.
const GUEST: &str = "ticks";
const COMMAND_LINE: &str = "hz=2000 count=4";
/// A guest that does not come to its end by then will not.
const TIME_LIMIT: Duration = Duration::from_secs(10);

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Trial {
    /// The replay was the recorded run.
    pub equal: bool,
    /// Ticks of the clock.
    pub ticks: u64,
    /// Interrupts that the guest took.
    pub interrupts: u64,
    /// Time on the host's clock, for both.
    pub wall_seconds: f64,
    /// Why it is not equal, in one line.
    pub failure: Option<String>,
}

/// Records and replays a guest for a moment.
pub fn attempt(kind: EngineKind) -> Trial {
    attempt_on(&Choice::of(kind).hardware(), kind)
}

/// As [`attempt`]; where the clock is `pmu`, on this hardware.
pub fn attempt_on(hardware: &impl BranchHardware, kind: EngineKind) -> Trial {
    let began = Instant::now();
    let trial = Directory::new().and_then(|directory| try_in(&directory.0, hardware, kind));
    let wall_seconds = began.elapsed().as_secs_f64();
    match trial {
        Ok(trial) => Trial { wall_seconds, ..trial },
        Err(error) => Trial {
            wall_seconds,
            failure: Some(crate::output::one_line(&format!("{error:#}"))),
            ..Trial::default()
        },
    }
}

fn try_in(directory: &Path, hardware: &impl BranchHardware, kind: EngineKind) -> Result<Trial> {
    let mut guest = Guest::embedded(GUEST)?;
    COMMAND_LINE.clone_into(&mut guest.cmdline);
    let plan = RunPlan {
        guest: &guest,
        choice: Choice::of(kind),
        plan: Vec::new(),
        memory_mib: MIN_RAM_MIB,
        soft: SoftOptions::default(),
        host: HostOptions { time_limit: Some(TIME_LIMIT), ..HostOptions::default() },
    };
    let path = directory.join("trial.rr");
    let to = RecordTo { path: path.clone(), force: false, checkpoints: CheckpointArg::Never };
    let recorded = record::record_on(hardware, plan, &to)?;
    let mut trial =
        Trial { ticks: recorded.ticks, interrupts: recorded.interrupts, ..Trial::default() };
    if recorded.ending == "stopped" {
        let seconds = TIME_LIMIT.as_secs();
        trial.failure = Some(format!("the guest did not come to its end within {seconds} s"));
        return Ok(trial);
    }
    if let Some(detail) = &recorded.ending_detail {
        trial.failure = Some(detail.clone());
        return Ok(trial);
    }
    // The engine that the finding is about, even where another could.
    let engine = if kind == EngineKind::Soft { EngineArg::Soft } else { EngineArg::Kvm };
    let options = ReplayOptions { engine, ..ReplayOptions::default() };
    let replayed = replay::replay_on(hardware, &replay::open_replayable(&path)?, options)?.report;
    trial.equal = replayed.verified == Some(true)
        && replayed.final_digest == recorded.final_digest
        && replayed.console_digest == recorded.console_digest;
    if !trial.equal {
        let what = replayed.divergence.map_or("the end", |_| "an event on the way");
        trial.failure = Some(format!("the replay was not the recorded run: {what} differs"));
    }
    Ok(trial)
}

/// A directory of its own, which goes when it is dropped.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Result<Self> {
        let since_epoch = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
        let name = format!("reprise-{}-{}", std::process::id(), since_epoch.as_nanos());
        let path = std::env::temp_dir().join(name);
        let shown = path.display();
        fs::create_dir(&path).with_context(|| format!("cannot create {shown}; set TMPDIR"))?;
        Ok(Self(path))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn the_software_cpu_replays_what_it_recorded() {
        let trial = attempt(EngineKind::Soft);
        assert!(trial.equal && trial.interrupts == 4 && trial.failure.is_none(), "{trial:?}");
    }

    #[test]
    fn an_engine_that_cannot_be_had_says_why() {
        let trial = attempt(EngineKind::Pmu);
        if trial.equal {
            return;
        }
        let failure = trial.failure.expect("a reason");
        // Past the harness, which shows nothing of a test that passes.
        let line = format!("skipped: no PMU: {failure} (the trial of the clock pmu)\n");
        let _ = std::io::stderr().write_all(line.as_bytes());
        assert!(failure.contains("pmu") && !failure.contains('\n'), "{failure}");
    }
}
