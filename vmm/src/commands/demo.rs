//! `reprise demo`: the main job end to end. Boots Linux, types a shell session, records all of it,
//! replays it and shows what that took; without a way to get Linux, the embedded guests instead.

use std::cell::RefCell;
use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::rc::Rc;

use anyhow::Result;
use reprise_guest_images::WORKLOAD_SMALL;
use reprise_host::{ConsoleSink, HostOptions, InputSource};
use serde::Serialize;

use super::replay::{bar, failure, verdict};
use crate::output::{Output, byte_size, grouped, one_line};
use crate::session::assembly::SoftOptions;
use crate::session::checkpoints::CheckpointArg;
use crate::session::choice::{self, ClockArg, EngineArg, Running};
use crate::session::guest::{Guest, GuestChoice, GuestError, LINUX, cache_directory};
use crate::session::record::{self, RecordTo, RunPlan};
use crate::session::replay::{self, ReplayOptions};
use crate::session::report::SessionReport;

/// What the embedded guests do where there is no Linux: name, command line, what is typed.
const EMBEDDED_SCENES: [(&str, Option<&str>, &str); 4] = [
    ("hello", None, ""),
    ("ticks", None, ""),
    ("echo", None, "recorded\nand replayed\nquit\n"),
    ("compute", Some("scale=10"), ""),
];

/// How much of the console is shown.
const TAIL_LINES: usize = 16;

/// One guest to be recorded and replayed.
struct Scene {
    guest: Guest,
    typed: Vec<u8>,
}

/// What one guest came to.
#[derive(Debug, Serialize)]
struct SceneReport {
    record: SessionReport,
    replay: SessionReport,
    file: String,
    /// The last lines of the console, as the replay wrote them.
    console_tail: Vec<String>,
}

/// What the demonstration came to.
#[derive(Debug, Serialize)]
struct DemoReport {
    /// Why the embedded guests ran instead of Linux.
    without_linux: Option<String>,
    /// Every replay is the recorded run.
    verified: bool,
    scenes: Vec<SceneReport>,
}

/// Runs the demonstration.
///
/// # Errors
/// A guest cannot be recorded or replayed.
pub fn run(output: Output) -> Result<u8> {
    let (scenes, without_linux) = scenes(output)?;
    let mut reports = Vec::new();
    for scene in scenes {
        reports.push(play(&scene, output)?);
    }
    let verified = reports.iter().all(|scene| scene.replay.verified == Some(true));
    let report = DemoReport { without_linux, verified, scenes: reports };
    output.result(&report, text(&report))?;
    for scene in report.scenes.iter().filter(|scene| scene.replay.verified != Some(true)) {
        output.note(failure(&scene.replay));
    }
    Ok(u8::from(!verified))
}

/// Linux, or else the embedded guests and the reason.
fn scenes(output: Output) -> Result<(Vec<Scene>, Option<String>)> {
    let linux = GuestChoice::Image(LINUX.to_owned());
    match Guest::obtain(&linux, None, &mut |step| output.note(step)) {
        Ok(guest) => {
            output.note("Linux boots and a shell session is typed, recorded and then replayed");
            Ok((vec![Scene { guest, typed: WORKLOAD_SMALL.into() }], None))
        }
        Err(GuestError::Linux(reason)) => {
            output.note(format_args!("{reason}"));
            output.note("so the demonstration goes on with the embedded guests");
            let scenes = EMBEDDED_SCENES.iter().map(|(name, cmdline, typed)| {
                let mut guest = Guest::embedded(name)?;
                if let Some(cmdline) = cmdline {
                    (*cmdline).clone_into(&mut guest.cmdline);
                }
                Ok(Scene { guest, typed: typed.as_bytes().to_vec() })
            });
            Ok((scenes.collect::<Result<_>>()?, Some(reason.to_string())))
        }
        Err(error) => Err(error.into()),
    }
}

fn play(scene: &Scene, output: Output) -> Result<SceneReport> {
    let path = recording_path(&scene.guest);
    let name = &scene.guest.name;
    let running = output.bar(&format!("recording {name}"), None);
    let message = format!("recording {name}");
    let plan = RunPlan {
        plan: Vec::new(),
        guest: &scene.guest,
        choice: choice::for_new_run(EngineArg::Auto, ClockArg::Auto, Running::Guest(&scene.guest))?,
        memory_mib: scene.guest.default_memory_mib,
        soft: SoftOptions::default(),
        host: HostOptions {
            input: InputSource::Bytes(scene.typed.clone()),
            console: ConsoleSink::Discard,
            handle_signals: true,
            time_limit: None,
            progress: Some(Box::new(move |progress| {
                running.set_message(format!("{message}: {} ticks", grouped(progress.tick)));
                running.tick();
            })),
        },
    };
    let to = RecordTo { path: path.clone(), force: true, checkpoints: CheckpointArg::default() };
    let record = record::record(plan, &to)?;
    output.note(format_args!(
        "recorded {name}: {} {} in {:.1} s; replaying",
        grouped(record.ticks),
        if record.instructions.is_some() { "instructions" } else { "ticks" },
        record.wall_seconds
    ));
    let replayable = replay::open_replayable(&path)?;
    let console = Transcript::default();
    let options = ReplayOptions {
        progress: Some(bar("replaying", replayable.recording(), output)),
        console: Some(Box::new(console.clone())),
        ..ReplayOptions::default()
    };
    let replay = replay::replay(&replayable, options)?.report;
    let file = path.display().to_string();
    Ok(SceneReport { record, replay, file, console_tail: console.tail() })
}

/// Collects console output.
#[derive(Clone, Default)]
struct Transcript(Rc<RefCell<Vec<u8>>>);

impl Write for Transcript {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.borrow_mut().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Transcript {
    /// The last lines, without what drives a terminal.
    fn tail(&self) -> Vec<String> {
        let bytes = self.0.borrow();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<String> =
            text.lines().map(one_line).filter(|line| !line.is_empty()).collect();
        lines[lines.len().saturating_sub(TAIL_LINES)..].to_vec()
    }
}

/// The recording stays in the cache, so that it can be looked at; the next demonstration replaces
/// it. Where there can be no cache, it goes to a directory of its own among the temporary ones.
fn recording_path(guest: &Guest) -> PathBuf {
    let cache = cache_directory();
    let directory = if fs::create_dir_all(&cache).is_ok() {
        cache
    } else {
        let own = std::env::temp_dir().join(format!("reprise-{}", std::process::id()));
        // If this fails, creating the recording does too, and says why.
        let _ = fs::create_dir(&own);
        own
    };
    directory.join(format!("demo-{}.rr", guest.name))
}

fn text(report: &DemoReport) -> String {
    let scenes: Vec<String> = report.scenes.iter().map(scene_text).collect();
    let verdict = if report.verified {
        "Every replay was the recorded run: same console output, same final state."
    } else {
        "A REPLAY WAS NOT THE RECORDED RUN."
    };
    format!("{}\n{verdict}\n", scenes.join("\n"))
}

fn scene_text(scene: &SceneReport) -> String {
    let SceneReport { record, replay, file, console_tail } = scene;
    let count = |report: &SessionReport| grouped(report.instructions.unwrap_or(report.ticks));
    let mips = |report: &SessionReport| {
        report.mips.map_or_else(|| "-".to_owned(), |mips| format!("{mips:.0}"))
    };
    let short = |digest: &str| digest.chars().take(16).collect::<String>();
    let state = |report: &SessionReport| {
        report.final_digest.as_deref().map_or_else(|| "-".to_owned(), short)
    };
    let rows = [
        ("instructions", count(record), count(replay)),
        ("seconds", format!("{:.2}", record.wall_seconds), format!("{:.2}", replay.wall_seconds)),
        ("MIPS", mips(record), mips(replay)),
        ("events", grouped(record.events), grouped(replay.events)),
        ("console", short(&record.console_digest), short(&replay.console_digest)),
        ("final state", state(record), state(replay)),
    ];
    let title = format!("{} on {} ({})", record.guest, record.engine, record.clock);
    let mut text: String = console_tail.iter().map(|line| format!("  | {line}\n")).collect();
    text.push_str(&format!("{title:24}{:>18}{:>18}\n", "recorded", "replayed"));
    for (name, recorded, replayed) in rows {
        text.push_str(&format!("  {name:22}{recorded:>18}{replayed:>18}\n"));
    }
    let rate = record
        .bytes_per_kiloinstruction
        .map(|rate| format!(", {rate:.4} bytes for each thousand instructions"));
    text.push_str(&format!(
        "  event log: {}{}\n  file: {file}, {}\n  {}\n",
        byte_size(record.log_bytes.unwrap_or(0)),
        rate.unwrap_or_default(),
        byte_size(record.file_bytes.unwrap_or(0)),
        verdict(replay)
    ));
    text
}
