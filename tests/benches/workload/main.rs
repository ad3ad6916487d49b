//! What running, recording and replaying cost, and how fast each engine is.
//!
//!     cargo bench -p reprise-tests --bench workload -- [--runs N] [--small] [--json]
//!
//! Medians of N runs (3 where none is given) of Linux with the workload W on the software CPU, of
//! `compute` on KVM where there is one, and, where QEMU is installed, of the same kernel with the
//! same workload on QEMU's translator. `--small` takes the small workload. Nothing here passes or
//! fails by a time. Use a machine on which nothing else runs.

mod measure;
mod qemu;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use measure::{Guest, Measured};
use reprise_guest_images::{LINUX_COMMAND_LINE, WORKLOAD_SMALL, WORKLOAD_W, linux};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Memory of the Linux guest, in MiB, here and on QEMU.
const MEMORY_MIB: &str = "512";
/// `compute`'s size on KVM: 3,000 million instructions, nearly all at CPL3.
const COMPUTE: &str = "scale=150";

/// What the command line asks for.
struct Options {
    runs: usize,
    small: bool,
    json: bool,
}

fn options() -> Result<Options> {
    let mut options = Options { runs: 3, small: false, json: false };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--runs" => {
                let number = words.next().context("--runs wants a number")?;
                options.runs = number.parse().context("--runs wants a number")?;
            }
            "--small" => options.small = true,
            "--json" => options.json = true,
            // Cargo adds it to what the user gives.
            "--bench" => {}
            other => bail!("{other} is not known: give --runs N, --small or --json"),
        }
    }
    if options.runs == 0 {
        bail!("--runs wants at least 1");
    }
    Ok(options)
}

fn main() -> ExitCode {
    match options().and_then(|options| benchmark(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("workload: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn benchmark(options: &Options) -> Result<()> {
    let directory = TempDir::new()?;
    let mut report = json!({ "runs": options.runs, "small": options.small });
    let mut rows = Vec::new();
    let soft = linux_on_soft(options, &directory, &mut report, &mut rows);
    if let Err(error) = soft {
        report["linux"] = format!("not measured: {error:#}").into();
        eprintln!("linux: not measured: {error:#}");
    }
    match kvm_opens() {
        Ok(()) => {
            let guest = Guest {
                name: "compute, kvm sync",
                words: ["--engine", "kvm", "--clock", "sync", "--image", "compute", "--cmdline"]
                    .into_iter()
                    .chain([COMPUTE])
                    .map(str::to_owned)
                    .collect(),
            };
            let measured = measure::medians(&guest, options.runs, directory.path())?;
            report["compute_kvm_sync"] = measured.to_json();
            rows.push(measured);
        }
        Err(error) => {
            report["compute_kvm_sync"] = format!("not measured: /dev/kvm: {error}").into();
            eprintln!("compute on kvm: not measured: /dev/kvm: {error}");
        }
    }
    if options.json {
        println!("{report:#}");
    } else {
        print!("{}", table(&rows, &report["qemu_tcg"]));
    }
    Ok(())
}

/// Linux with the workload on the software CPU, and on QEMU beside it.
fn linux_on_soft(
    options: &Options,
    directory: &TempDir,
    report: &mut Value,
    rows: &mut Vec<Measured>,
) -> Result<()> {
    let cache = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("linux-image");
    let image = linux(&cache, &mut |step| eprintln!("{step}"))?;
    let workload = if options.small { WORKLOAD_SMALL } else { WORKLOAD_W };
    let input = directory.path().join("workload");
    std::fs::write(&input, workload)?;
    let words = [
        ["--engine", "soft"],
        ["--memory", MEMORY_MIB],
        ["--kernel", path(&image.kernel)?],
        ["--initrd", path(&image.initrd)?],
        ["--cmdline", LINUX_COMMAND_LINE],
        ["--input", path(&input)?],
    ];
    let words = words.concat().into_iter().map(str::to_owned).collect();
    let guest = Guest { name: "linux, soft", words };
    let mut measured = measure::medians(&guest, options.runs, directory.path())?;
    report["qemu_tcg"] = match qemu::seconds(&image, MEMORY_MIB, workload, options.runs)? {
        Some(seconds) => {
            measured.times_qemu = Some(measured.run_seconds / seconds);
            json!({ "wall_seconds": seconds })
        }
        None => "not measured: qemu-system-x86_64 is not installed".into(),
    };
    report["linux"] = measured.to_json();
    rows.push(measured);
    Ok(())
}

fn path(path: &std::path::Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not text", path.display()))
}

fn kvm_opens() -> std::io::Result<()> {
    std::fs::File::options().read(true).write(true).open("/dev/kvm").map(|_| ())
}

fn table(rows: &[Measured], qemu: &Value) -> String {
    let mut text = format!(
        "{:20} {:>9} {:>9} {:>9} {:>11} {:>11} {:>8} {:>11} {:>14}\n",
        "",
        "run",
        "record",
        "replay",
        "record/run",
        "of CPU time",
        "MIPS",
        "log bytes",
        "bytes/kinstr"
    );
    for row in rows {
        text.push_str(&row.to_row());
    }
    if let Some(seconds) = qemu["wall_seconds"].as_f64() {
        text.push_str(&format!("{:20} {seconds:>7.2} s\n", "linux, QEMU TCG"));
    }
    for times in rows.iter().filter_map(|row| row.times_qemu) {
        text.push_str(&format!("Reprise's run takes {times:.2} times as long as QEMU's\n"));
    }
    text
}
