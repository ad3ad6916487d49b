//! Runs of the product, timed from outside, and their medians.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// The product.
const BINARY: &str = env!("CARGO_BIN_EXE_reprise-under-test");

/// What is run: a name for the table, and the words of `reprise run`.
pub(crate) struct Guest {
    pub(crate) name: &'static str,
    pub(crate) words: Vec<String>,
}

/// Medians. Times are those of the sessions themselves: without loading the guest, which `record`
/// and `run` do alike, and without embedding the images.
pub(crate) struct Measured {
    name: &'static str,
    pub(crate) run_seconds: f64,
    record_seconds: f64,
    replay_seconds: f64,
    /// From the start of the process to its end: what a user waits for.
    record_process_seconds: f64,
    run_process_seconds: f64,
    /// The processor's time for the whole process, which other load disturbs less than the clock's.
    record_cpu_seconds: f64,
    run_cpu_seconds: f64,
    /// Million instructions a second of `run`; none where the clock counts no instructions.
    mips: Option<f64>,
    replay_mips: Option<f64>,
    log_bytes: u64,
    bytes_per_kiloinstruction: Option<f64>,
    pub(crate) times_qemu: Option<f64>,
}

/// One run: what it reported, how long the process took, and the processor's time for it.
struct Timed {
    report: Value,
    process_seconds: f64,
    cpu_seconds: Option<f64>,
}

/// Runs, records and replays in turn, `runs` times each, so that a change in the machine's load
/// falls on all alike.
pub(crate) fn medians(guest: &Guest, runs: usize, directory: &Path) -> Result<Measured> {
    let file = directory.join("recording.rr").display().to_string();
    let (mut ran, mut recorded, mut replayed) = (Vec::new(), Vec::new(), Vec::new());
    for round in 1..=runs {
        eprintln!("{}: round {round} of {runs}", guest.name);
        ran.push(timed("run", &guest.words)?);
        let output = ["-o", &file, "--force"].map(str::to_owned);
        recorded.push(timed("record", &[&guest.words[..], &output[..]].concat())?);
        let replay = timed("replay", std::slice::from_ref(&file))?;
        if replay.report["verified"] != true {
            bail!("the replay is not verified: {:#}", replay.report);
        }
        replayed.push(replay);
    }
    let wall = |timed: &Timed| timed.report["wall_seconds"].as_f64();
    let mips = |timed: &Timed| timed.report["mips"].as_f64();
    let process = |timed: &Timed| Some(timed.process_seconds);
    let cpu = |timed: &Timed| timed.cpu_seconds;
    let needed = |value: Option<f64>| value.context("a report without a time");
    let last = &recorded[recorded.len() - 1].report;
    Ok(Measured {
        name: guest.name,
        run_seconds: needed(median(&ran, wall))?,
        record_seconds: needed(median(&recorded, wall))?,
        replay_seconds: needed(median(&replayed, wall))?,
        run_process_seconds: needed(median(&ran, process))?,
        record_process_seconds: needed(median(&recorded, process))?,
        run_cpu_seconds: needed(median(&ran, cpu))?,
        record_cpu_seconds: needed(median(&recorded, cpu))?,
        mips: median(&ran, mips),
        replay_mips: median(&replayed, mips),
        log_bytes: last["log_bytes"].as_u64().context("a recording without a log")?,
        bytes_per_kiloinstruction: last["bytes_per_kiloinstruction"].as_f64(),
        times_qemu: None,
    })
}

fn timed(command: &str, words: &[String]) -> Result<Timed> {
    let started = Instant::now();
    let output = Command::new("sh")
        .args(["-c", "\"$0\" \"$@\"; status=$?; times >&2; exit $status", BINARY])
        .args(["--json", command])
        .args(words)
        .stdin(Stdio::null())
        .output()
        .context("the product does not start")?;
    let process_seconds = started.elapsed().as_secs_f64();
    let stderr = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        bail!("{command}: {}", stderr.trim());
    }
    let report = serde_json::from_slice(&output.stdout).context("a report that is no JSON")?;
    // The last line of `times`: user and system time of what the shell has waited for.
    let cpu_seconds = stderr
        .lines()
        .last()
        .and_then(|line| line.split_whitespace().map(shell_seconds).sum::<Option<f64>>());
    Ok(Timed { report, process_seconds, cpu_seconds })
}

/// Seconds as a shell prints them: `1m2.34s`.
fn shell_seconds(text: &str) -> Option<f64> {
    let (minutes, seconds) = text.strip_suffix('s')?.split_once('m')?;
    Some(minutes.parse::<f64>().ok()? * 60.0 + seconds.parse::<f64>().ok()?)
}

/// The middle one of what there is; the mean of the two middle ones of an even number.
fn median(timed: &[Timed], value: impl Fn(&Timed) -> Option<f64>) -> Option<f64> {
    let mut values: Vec<f64> = timed.iter().filter_map(value).collect();
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    let lower = values[(values.len() - 1) / 2];
    Some((lower + upper) / 2.0)
}

impl Measured {
    /// Recording's time by running's.
    fn record_ratio(&self) -> f64 {
        self.record_seconds / self.run_seconds
    }

    fn cpu_ratio(&self) -> f64 {
        self.record_cpu_seconds / self.run_cpu_seconds
    }

    pub(crate) fn to_json(&self) -> Value {
        json!({
            "run_seconds": self.run_seconds,
            "record_seconds": self.record_seconds,
            "replay_seconds": self.replay_seconds,
            "run_process_seconds": self.run_process_seconds,
            "record_process_seconds": self.record_process_seconds,
            "record_by_run": self.record_ratio(),
            "record_process_by_run_process":
                self.record_process_seconds / self.run_process_seconds,
            "run_cpu_seconds": self.run_cpu_seconds,
            "record_cpu_seconds": self.record_cpu_seconds,
            "record_cpu_by_run_cpu": self.cpu_ratio(),
            "mips": self.mips,
            "replay_mips": self.replay_mips,
            "log_bytes": self.log_bytes,
            "bytes_per_kiloinstruction": self.bytes_per_kiloinstruction,
            "run_by_qemu_tcg": self.times_qemu,
        })
    }

    pub(crate) fn to_row(&self) -> String {
        let or_dash = |value: Option<f64>, digits: usize| {
            value.map_or("-".to_owned(), |value| format!("{value:.digits$}"))
        };
        format!(
            "{:20} {:>7.2} s {:>7.2} s {:>7.2} s {:>11.3} {:>11.3} {:>8} {:>11} {:>14}\n",
            self.name,
            self.run_seconds,
            self.record_seconds,
            self.replay_seconds,
            self.record_ratio(),
            self.cpu_ratio(),
            or_dash(self.mips, 1),
            self.log_bytes,
            or_dash(self.bytes_per_kiloinstruction, 5),
        )
    }
}
