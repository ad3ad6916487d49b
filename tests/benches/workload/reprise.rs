//! The product as a contender, timed from outside.

use std::process::{Command, Output, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::contender::{Contender, Sample};

/// The product.
const BINARY: &str = env!("CARGO_BIN_EXE_reprise-under-test");

/// `reprise run`.
pub(crate) fn run(key: &'static str, label: &'static str, guest: &[&str]) -> Contender {
    contender(key, label, [&["run"], guest].concat())
}

/// `reprise record` into `file`.
pub(crate) fn record(
    key: &'static str,
    label: &'static str,
    guest: &[&str],
    file: &str,
) -> Contender {
    contender(key, label, [&["record"], guest, &["-o", file, "--force"]].concat())
}

/// `reprise replay` of what was recorded there.
pub(crate) fn replay(key: &'static str, label: &'static str, file: &str) -> Contender {
    contender(key, label, vec!["replay", file])
}

/// `reprise expand` of what was recorded there: into `trace`, or into nothing.
pub(crate) fn expand(
    key: &'static str,
    label: &'static str,
    file: &str,
    trace: Option<&str>,
) -> Contender {
    let out = trace.iter().flat_map(|trace| ["-o", trace]);
    contender(key, label, ["expand", file].into_iter().chain(out).collect())
}

fn contender(key: &'static str, label: &'static str, words: Vec<&str>) -> Contender {
    let words: Vec<String> = words.into_iter().map(str::to_owned).collect();
    Contender::new(key, label, move || timed(&words))
}

/// An ordinary process, of which nothing but its times is known.
pub(crate) fn process(key: &'static str, label: &'static str, words: Vec<String>) -> Contender {
    Contender::new(key, label, move || {
        let (times, output) = run_timed(&words)?;
        if !output.status.success() {
            bail!("it did not end as it should: {}", output.status);
        }
        Ok(times)
    })
}

fn timed(words: &[String]) -> Result<Sample> {
    let words = [&[BINARY.to_owned(), "--json".to_owned()], words].concat();
    let (times, output) = run_timed(&words)?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    let report: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("no report: {}", stderr.trim()))?;
    if !output.status.success() || report["verified"] == false {
        bail!("it did not end as it should: {report}");
    }
    Ok(Sample {
        guest_seconds: report["wall_seconds"].as_f64(),
        instructions: report["instructions"].as_f64(),
        log_bytes: report["log_bytes"].as_f64(),
        trace_bytes: report["trace_bytes"].as_f64(),
        ..times
    })
}

/// Runs a program by a shell, which tells its times: bash, since others tell them in hundredths.
fn run_timed(words: &[String]) -> Result<(Sample, Output)> {
    let started = Instant::now();
    let output = Command::new("bash")
        .args(["-c", "\"$0\" \"$@\"; status=$?; times >&2; exit $status"])
        .args(words)
        .stdin(Stdio::null())
        .output()
        .context("bash does not start: it tells the benchmark what processes take")?;
    let process_seconds = started.elapsed().as_secs_f64();
    let stderr = String::from_utf8_lossy(&output.stderr);
    // The last line of `times`: user and system time of what the shell has waited for.
    let last = stderr.lines().last().unwrap_or_default();
    let seconds: Vec<f64> = last.split_whitespace().filter_map(shell_seconds).collect();
    let (user_seconds, cpu_seconds) = match seconds[..] {
        [user, system] => (Some(user), Some(user + system)),
        _ => (None, None),
    };
    let times = Sample { process_seconds, cpu_seconds, user_seconds, ..Sample::default() };
    Ok((times, output))
}

/// Seconds as a shell prints them: `1m2.34s`.
fn shell_seconds(text: &str) -> Option<f64> {
    let (minutes, seconds) = text.strip_suffix('s')?.split_once('m')?;
    Some(minutes.parse::<f64>().ok()? * 60.0 + seconds.parse::<f64>().ok()?)
}
