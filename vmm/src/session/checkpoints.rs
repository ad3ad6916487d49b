//! Checkpoints of a session: how often, where they go, and adding them to a recording by replaying it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{ErrorKind, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, anyhow, bail};
use reprise_host::{
    CheckpointEvery, CheckpointThread, CheckpointTotals, OpenCheckpoints, WhenBusy,
};
use reprise_machine::checkpoint::Checkpointer;
use reprise_machine::clock::TimeSource;
use reprise_replay::{Replayable, checkpoints_path};
use reprise_trace::checkpoint::{CheckpointError, CheckpointWriter};
use serde::Serialize;

use super::choice::EngineKind;
use crate::output::{byte_size, grouped};

/// Unless told otherwise, a recording on the software CPU keeps a checkpoint after so many ticks: some
/// three seconds of it, whose writing costs about a hundredth of that.
const TICKS_OF_RECORDING: u64 = 2_000_000_000;
/// Unless told otherwise, `reprise checkpoint` takes one after so many ticks: nobody waits for the guest.
const TICKS_AFTERWARDS: u64 = 1_000_000_000;

/// What the user asked for with `--checkpoint-every` or `--every`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CheckpointArg {
    /// Nothing: every 2000000000 instructions recorded on the software CPU, none on KVM.
    #[default]
    Default,
    /// None at all.
    Never,
    /// So many ticks.
    Ticks(u64),
    /// So many nanoseconds of guest time.
    GuestTime(u64),
}

impl FromStr for CheckpointArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wanted = || "give ticks (500000000), seconds (2s), or never".to_owned();
        if text == "never" || text == "0" {
            return Ok(Self::Never);
        }
        if let Some(ns) = parse_seconds(text) {
            return if ns == 0 { Ok(Self::Never) } else { Ok(Self::GuestTime(ns)) };
        }
        let digits: String = text.chars().filter(|c| !matches!(c, ',' | '_')).collect();
        digits.parse().map(Self::Ticks).map_err(|_| wanted())
    }
}

/// Seconds such as `2s` or `0.25s`, as nanoseconds; `None` for anything else.
pub fn parse_seconds(text: &str) -> Option<u64> {
    let number = text.trim().strip_suffix('s')?;
    let seconds: f64 = number.parse().ok()?;
    let ns = seconds * 1e9;
    (0.0..9e18).contains(&ns).then_some(ns.round() as u64)
}

impl CheckpointArg {
    /// As the machine counts; `None` for never. Where guest time follows ticks, what counts is the time
    /// in which the guest executes: an idle guest is left alone.
    pub fn every(self, time: TimeSource, default_ticks: Option<u64>) -> Option<CheckpointEvery> {
        match (self, time) {
            (Self::Never, _) => None,
            (Self::Default, _) => default_ticks.map(CheckpointEvery::Ticks),
            (Self::Ticks(ticks), _) => Some(CheckpointEvery::Ticks(ticks.max(1))),
            (Self::GuestTime(ns), TimeSource::Ticks { ns_per_tick }) => {
                Some(CheckpointEvery::Ticks((ns / ns_per_tick.max(1)).max(1)))
            }
            (Self::GuestTime(ns), TimeSource::Host) => Some(CheckpointEvery::GuestTime(ns)),
        }
    }
}

/// What taking checkpoints came to.
#[derive(Clone, Debug, Serialize)]
pub struct CheckpointReport {
    /// Checkpoints written.
    pub count: u64,
    /// Bytes of their whole file.
    pub file_bytes: u64,
    /// Record: the longest time for which one stopped the guest.
    pub longest_stop_ms: Option<f64>,
    /// Why no more were written.
    pub failure: Option<String>,
}

impl CheckpointReport {
    /// For a person.
    pub fn to_text(&self) -> String {
        if self.count == 0 {
            return "none".to_owned();
        }
        let size = byte_size(self.file_bytes);
        match self.longest_stop_ms {
            Some(ms) => {
                let count = grouped(self.count);
                format!("{count}, {size}; the guest stopped for {ms:.1} ms at most")
            }
            None => format!("{}, {size} in all", grouped(self.count)),
        }
    }
}

impl From<CheckpointTotals> for CheckpointReport {
    fn from(totals: CheckpointTotals) -> Self {
        Self {
            count: totals.count,
            file_bytes: totals.file_bytes,
            longest_stop_ms: Some(totals.longest_stop.as_secs_f64() * 1e3),
            failure: totals.failure.map(|failure| failure.to_string()),
        }
    }
}

/// Takes the checkpoints of a new recording, if any are wanted and there can be a file beside it.
///
/// # Errors
/// The host gives no thread.
pub fn of_recording(
    path: &Path,
    identity: [u8; 32],
    wanted: CheckpointArg,
    kind: EngineKind,
) -> Result<Option<(Box<dyn Checkpointer>, CheckpointThread)>> {
    let default_ticks = (kind == EngineKind::Soft).then_some(TICKS_OF_RECORDING);
    let Some(every) = wanted.every(kind.time_source(), default_ticks) else {
        return Ok(None);
    };
    // Beside a pipe or a device nothing lies.
    if !fs::metadata(path).is_ok_and(|metadata| metadata.is_file()) {
        return Ok(None);
    }
    let file = checkpoints_path(path);
    let open: OpenCheckpoints = Box::new(move || {
        let file = File::create(file).map_err(CheckpointError::Write)?;
        CheckpointWriter::create(file, &identity)
    });
    let started = CheckpointThread::start(every, WhenBusy::Postpone, BTreeSet::new(), open)
        .context("the host refused a thread")?;
    Ok(Some(started))
}

/// The checkpoints that an earlier recording of this name left; a new one must not find them.
pub fn left_over(path: &Path) -> Option<PathBuf> {
    let file = checkpoints_path(path);
    fs::symlink_metadata(&file).is_ok_and(|metadata| metadata.is_file()).then_some(file)
}

/// Removes them.
///
/// # Errors
/// They cannot be removed.
pub fn remove_left_over(path: &Path) -> Result<()> {
    match left_over(path).map(|file| (fs::remove_file(&file), file)) {
        Some((Err(error), file)) if error.kind() != ErrorKind::NotFound => {
            Err(anyhow!("cannot remove {}: {error}; give another name", file.display()))
        }
        _ => Ok(()),
    }
}

/// Takes checkpoints of a recording that is replayed, behind those that it has.
///
/// # Errors
/// Its file of checkpoints is another recording's or cannot be written, or the host gives no thread.
pub fn of_replay(
    replayable: &Replayable,
    path: &Path,
    every: CheckpointEvery,
) -> Result<(Box<dyn Checkpointer>, CheckpointThread)> {
    let file_path = checkpoints_path(path);
    let shown = file_path.display().to_string();
    if let Some(trouble) = replayable.trouble() {
        bail!("{shown}: {trouble}");
    }
    // In place of one that others took, of which expansion makes nothing, there can be another.
    let present = replayable.on_soft().map(|info| info.moment.tick).collect();
    let writer =
        open_to_append(replayable, &file_path).with_context(|| format!("cannot write {shown}"))?;
    let open: OpenCheckpoints = Box::new(move || Ok(writer));
    CheckpointThread::start(every, WhenBusy::Wait, present, open)
        .context("the host refused a thread")
}

fn open_to_append(replayable: &Replayable, path: &Path) -> Result<CheckpointWriter<File>> {
    let mut file =
        File::options().read(true).write(true).create(true).truncate(false).open(path)?;
    if file.try_lock().is_err() {
        bail!("another process writes it: wait until it has ended");
    }
    match replayable.checkpoint_file() {
        Some(written) => {
            // What stands behind is a frame that was cut off.
            file.set_len(written.sound_bytes())?;
            file.seek(SeekFrom::End(0))?;
            Ok(CheckpointWriter::append(file, written)?)
        }
        None => Ok(CheckpointWriter::create(file, &replayable.recording().identity())?),
    }
}

/// The default of `reprise checkpoint`.
pub fn default_ticks() -> Option<u64> {
    Some(TICKS_AFTERWARDS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_is_ticks_seconds_or_never() {
        use CheckpointArg::{GuestTime, Never, Ticks};
        for (text, meant) in [
            ("never", Never),
            ("0", Never),
            ("0s", Never),
            ("500_000_000", Ticks(500_000_000)),
            ("2s", GuestTime(2_000_000_000)),
            ("0.25s", GuestTime(250_000_000)),
        ] {
            assert_eq!(text.parse(), Ok(meant), "{text}");
        }
        for wrong in ["", "s", "-1", "-1s", "often", "1e300s", "NaNs"] {
            assert!(wrong.parse::<CheckpointArg>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn seconds_are_ticks_where_time_follows_them() {
        let seconds = CheckpointArg::GuestTime(2_000);
        let every = |arg: CheckpointArg, time| arg.every(time, Some(7));
        let ticks = TimeSource::Ticks { ns_per_tick: 100 };
        assert_eq!(every(seconds, ticks), Some(CheckpointEvery::Ticks(20)));
        assert_eq!(every(seconds, TimeSource::Host), Some(CheckpointEvery::GuestTime(2_000)));
        assert_eq!(every(CheckpointArg::Default, ticks), Some(CheckpointEvery::Ticks(7)));
        assert_eq!(every(CheckpointArg::Never, ticks), None);
    }
}
