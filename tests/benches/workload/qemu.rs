//! QEMU's translator with the same kernel, initramfs and workload, for comparison.

#[path = "../../../guest-images/tests/qemu/machine.rs"]
mod machine;

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use super::contender::{Contender, Sample};
use machine::{MACHINE, QEMU};

/// Virtual time follows the instruction count, two nanoseconds each, and what enters is recorded.
const RECORDING: &str = "shift=1,rr=record,rrfile=";
/// What the shell shows when it takes commands.
const PROMPT: &[u8] = b"/ # ";

/// Bytes typed before their echo is awaited: while QEMU records, it loses what does not fit into the
/// UART's FIFO of 16.
const TYPED_AT_ONCE: usize = 8;

/// What is run.
#[derive(Clone)]
pub(crate) struct Work {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: PathBuf,
    pub(crate) command_line: String,
    pub(crate) memory_mib: &'static str,
    pub(crate) typed: &'static str,
}

/// Whether QEMU is there.
pub(crate) fn installed() -> Result<()> {
    Command::new(QEMU)
        .arg("--version")
        .output()
        .map(|_| ())
        .with_context(|| format!("{QEMU} does not start"))
}

/// As fast as it goes.
pub(crate) fn plain(work: Work) -> Contender {
    Contender::new("qemu_plain", "linux: QEMU TCG", move || once(&work, None, &[]))
}

/// With a plugin that traces blocks and accesses and forgets them, compiled into `directory`.
///
/// # Errors
/// If there is no C compiler.
pub(crate) fn traced(work: Work, directory: &Path) -> Result<Contender> {
    let plugin = directory.join("tracer.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/workload/qemu_tracer.c");
    let compiled = Command::new("cc")
        .args(["-O2", "-fPIC", "-shared", "-o"])
        .args([&plugin, &source])
        .status()
        .context("cc does not start")?;
    if !compiled.success() {
        bail!("the plugin for QEMU does not compile");
    }
    let plugin = plugin.to_string_lossy().into_owned();
    Ok(Contender::new("qemu_traced", "linux: QEMU TCG traced", move || {
        once(&work, None, &["-plugin", &plugin])
    }))
}

/// Recording into `log`.
pub(crate) fn record(work: Work, log: PathBuf) -> Contender {
    Contender::new("qemu_record", "linux: QEMU TCG record", move || once(&work, Some(&log), &[]))
}

fn once(work: &Work, log: Option<&PathBuf>, more: &[&str]) -> Result<Sample> {
    let recording = log.map(|log| format!("{RECORDING}{}", log.display()));
    let started = Instant::now();
    let mut child = Command::new(QEMU)
        .args(MACHINE)
        .args(more)
        .args(["-m", work.memory_mib, "-append", &work.command_line])
        .arg("-kernel")
        .arg(&work.kernel)
        .arg("-initrd")
        .arg(&work.initrd)
        .args(recording.iter().flat_map(|recording| ["-icount", recording]))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .context("QEMU does not start")?;
    let typed = type_at_prompt(&mut child, work.typed);
    if typed.is_err() {
        let _ = child.kill();
    }
    let status = child.wait()?;
    let process_seconds = started.elapsed().as_secs_f64();
    typed?;
    if !status.success() {
        bail!("QEMU ended with {status}");
    }
    let log_bytes = log.map(std::fs::metadata).transpose()?.map(|log| log.len() as f64);
    Ok(Sample { process_seconds, log_bytes, ..Sample::default() })
}

/// Types each line when the shell asks for it, and reads until the console closes.
fn type_at_prompt(child: &mut Child, workload: &str) -> Result<()> {
    let mut keyboard = child.stdin.take().context("stdin is piped")?;
    let mut console = child.stdout.take().context("stdout is piped")?;
    for line in workload.split_inclusive('\n') {
        let mut seen = Vec::new();
        while !seen.windows(PROMPT.len()).any(|window| window == PROMPT) {
            seen.extend(read_some(&mut console)?);
        }
        for piece in line.as_bytes().chunks(TYPED_AT_ONCE) {
            keyboard.write_all(piece)?;
            keyboard.flush()?;
            let mut echoed = 0;
            while echoed < piece.len() && piece.last() != Some(&b'\n') {
                echoed += read_some(&mut console)?.len();
            }
        }
    }
    std::io::copy(&mut console, &mut std::io::sink())?;
    Ok(())
}

fn read_some(console: &mut impl Read) -> Result<Vec<u8>> {
    let mut piece = vec![0; 4096];
    let count = console.read(&mut piece)?;
    if count == 0 {
        bail!("the guest ended before everything was typed");
    }
    piece.truncate(count);
    Ok(piece)
}
