//! What running, recording and replaying cost, and what the same work costs on QEMU.
//!
//!     cargo bench -p reprise-tests --bench workload -- [--runs N] [--only RACE] [--small] [--traces]
//!         [--without-qemu] [--json]
//!
//! Races, each of N rounds (5 where no number is given) in which every contender runs once; every
//! other round goes backwards, so that a drift of the machine's speed falls on all alike. Printed are
//! medians; of a ratio, from six rounds on, also between which bounds its median is known.
//!
//! - `linux`: Linux with the workload W: `reprise run`, `record` and `replay` on the software CPU; where QEMU is
//!   installed, its translator with the same kernel, initramfs and commands, plain and recording.
//! - `compute`: nearly all of it user code; the software CPU, and, where there is KVM, the processor
//!   itself.
//! - `recording`: the same on KVM, with and without recording.
//! - `user-code`: user code alone on KVM, against the same program as a process.
//! - `auto`: what a user waits for until `--engine auto` has decided for Linux, in the column of processes.
//!
//! `--traces` runs another race instead: the recording of W expanded into nothing and into a file, and
//! QEMU with a plugin that traces blocks and accesses and forgets them, which takes it minutes.
//!
//! `--small` takes less of all, `--only` one race, `--without-qemu` leaves QEMU out: so small differences
//! can have the many rounds that they want. Nothing here passes or fails by a time. Use a machine on which nothing
//! else runs.

mod auto;
mod contender;
mod qemu;
mod report;
mod reprise;

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use contender::{Contender, race};
use reprise_guest_images::{LINUX_COMMAND_LINE, LinuxImage, WORKLOAD_SMALL, WORKLOAD_W, linux};
use tempfile::TempDir;

/// Memory of the Linux guest, in MiB, here and on QEMU.
const MEMORY_MIB: &str = "512";
/// `compute`'s size: 2,000 million instructions, nearly all at CPL3.
const COMPUTE: &str = "scale=100";
/// The same for `--small`: 400 million.
const COMPUTE_SMALL: &str = "scale=20";

/// The same of what compares user code with a process: long, because what is compared are whole processes.
const USER_CODE: &str = "500";
const USER_CODE_SMALL: &str = "100";
/// The processor itself, as `--engine` is told it.
const KVM_SYNC: [&str; 3] = ["kvm", "--clock", "sync"];
/// How `guest-images/build.rs` builds the guest's user code.
const PROGRAM_FLAGS: [&str; 13] = [
    "-std=gnu11",
    "-O2",
    "-ffreestanding",
    "-fno-pic",
    "-fno-pie",
    "-no-pie",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fno-tree-loop-distribute-patterns",
    "-fcf-protection=none",
    "-ffp-contract=off",
    "-march=x86-64",
    "-mno-red-zone",
];
const PROGRAM_SOURCES: [&str; 5] = ["program.c", "sha256.c", "sort.c", "matrix.c", "compression.c"];

/// What the command line asks for.
struct Options {
    runs: usize,
    small: bool,
    json: bool,
    without_qemu: bool,
    traces: bool,
    /// One race alone.
    only: Option<String>,
}

/// The races without `--traces`.
const RACES: [(&str, fn(&Options, &Path) -> Result<Vec<Contender>>); 5] = [
    ("linux", linux_contenders),
    ("compute", compute_contenders),
    ("recording", recording_contenders),
    ("user-code", user_code_contenders),
    ("auto", auto_contenders),
];

fn options() -> Result<Options> {
    let mut options = Options {
        runs: 5,
        small: false,
        json: false,
        without_qemu: false,
        traces: false,
        only: None,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--runs" => {
                let number = words.next().context("--runs wants a number")?;
                options.runs = number.parse().context("--runs wants a number")?;
            }
            "--only" => {
                let race = words.next().filter(|race| RACES.iter().any(|(name, _)| name == race));
                let names = RACES.map(|(name, _)| name).join(", ");
                options.only = Some(race.with_context(|| format!("--only wants one of {names}"))?);
            }
            "--small" => options.small = true,
            "--json" => options.json = true,
            "--without-qemu" => options.without_qemu = true,
            "--traces" => options.traces = true,
            // Cargo adds it to what the user gives.
            "--bench" => {}
            other => {
                bail!(
                    "{other} is not known: give --runs N, --only RACE, --small, --traces, --without-qemu or \
                     --json"
                )
            }
        }
    }
    if options.runs == 0 {
        bail!("--runs wants at least 1");
    }
    if options.traces && options.only.is_some() {
        bail!("--traces is a race of its own: leave --only out");
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
    let mut missing = Vec::new();
    let mut contenders = Vec::new();
    let mut measure = |what: &str, group: Result<Vec<Contender>>| {
        let raced = group.and_then(|mut group| {
            race(&mut group, options.runs)?;
            Ok(group)
        });
        match raced {
            Ok(group) => contenders.extend(group),
            Err(error) => missing.push((what.to_owned(), format!("{error:#}"))),
        }
    };
    for (name, contenders_of) in RACES {
        let traced = !options.traces || name == "linux";
        if traced && options.only.as_deref().is_none_or(|only| only == name) {
            measure(name, contenders_of(options, directory.path()));
        }
    }
    let with_kvm = kvm_opens();
    for (what, reason) in
        [("qemu", with_qemu(options).err()), ("kvm", with_kvm.err().map(Into::into))]
    {
        missing.extend(reason.map(|reason| (what.to_owned(), reason.to_string())));
    }
    if contenders.is_empty() {
        let reasons: Vec<String> =
            missing.iter().map(|(what, reason)| format!("{what}: {reason}")).collect();
        bail!("nothing was measured: {}", reasons.join("; "));
    }
    let report = report::Report::new(options.runs, options.small, &contenders, &missing);
    match options.json {
        true => println!("{:#}", report.to_json()),
        false => print!("{}", report.to_text()),
    }
    Ok(())
}

/// Whether QEMU takes part.
fn with_qemu(options: &Options) -> Result<()> {
    if options.without_qemu {
        bail!("left out, as asked for");
    }
    qemu::installed()
}

/// Linux with the workload, on the software CPU and on QEMU.
fn linux_contenders(options: &Options, directory: &Path) -> Result<Vec<Contender>> {
    let image = linux_image()?;
    let workload = if options.small { WORKLOAD_SMALL } else { WORKLOAD_W };
    let input = directory.join("workload");
    std::fs::write(&input, workload)?;
    let guest = [
        ["--engine", "soft"],
        ["--memory", MEMORY_MIB],
        ["--kernel", text(&image.kernel.path)?],
        ["--initrd", text(&image.initrd.path)?],
        ["--cmdline", LINUX_COMMAND_LINE],
        ["--input", text(&input)?],
    ]
    .concat();
    let file = text(&directory.join("linux.rr"))?.to_owned();
    let mut contenders = Vec::new();
    if with_qemu(options).is_ok() {
        let work = qemu::Work {
            kernel: image.kernel.path.clone(),
            initrd: image.initrd.path.clone(),
            command_line: image.command_line.clone(),
            memory_mib: MEMORY_MIB,
            typed: workload,
        };
        let log = directory.join("qemu.rr");
        if options.traces {
            contenders.push(qemu::traced(work, directory)?);
        } else {
            contenders.push(qemu::plain(work.clone()));
            contenders.push(qemu::record(work, log));
        }
    }
    if options.traces {
        let mut recording = reprise::record("linux_record", "linux: reprise record", &guest, &file);
        race(std::slice::from_mut(&mut recording), 1)?;
        let trace = directory.join("linux.trace");
        let (label, to_file) = ("linux: reprise expand", "linux: expand to a file");
        contenders.push(reprise::replay("linux_replay", "linux: reprise replay", &file));
        contenders.push(reprise::expand("linux_expand", label, &file, None));
        contenders.push(reprise::expand("linux_expand_file", to_file, &file, Some(text(&trace)?)));
        return Ok(contenders);
    }
    contenders.push(reprise::run("linux_run", "linux: reprise run", &guest));
    contenders.push(reprise::record("linux_record", "linux: reprise record", &guest, &file));
    contenders.push(reprise::replay("linux_replay", "linux: reprise replay", &file));
    Ok(contenders)
}

fn linux_image() -> Result<LinuxImage> {
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("linux-image");
    Ok(linux(&cache, &mut |step| eprintln!("{step}"))?)
}

/// How long the choice of an engine takes.
fn auto_contenders(_: &Options, _: &Path) -> Result<Vec<Contender>> {
    auto::contenders(&linux_image()?)
}

/// User code, on the software CPU and on the processor itself.
fn compute_contenders(options: &Options, _: &Path) -> Result<Vec<Contender>> {
    let soft = compute_on(options, &["soft"]);
    let mut contenders = vec![reprise::run("compute_soft", "compute: soft", &soft)];
    if kvm_opens().is_ok() {
        let kvm = compute_on(options, &KVM_SYNC);
        contenders.push(reprise::run("compute_kvm_sync", "compute: kvm sync", &kvm));
    }
    Ok(contenders)
}

/// What recording adds on KVM.
fn recording_contenders(options: &Options, directory: &Path) -> Result<Vec<Contender>> {
    kvm_opens()?;
    let guest = compute_on(options, &KVM_SYNC);
    let file = directory.join("compute.rr");
    let (run, record) = ("recording: compute, kvm sync, run", "recording: the same, recorded");
    Ok(vec![
        reprise::run("recording_run", run, &guest),
        reprise::record("recording_record", record, &guest, text(&file)?),
    ])
}

/// The words that say `compute` on this engine.
fn compute_on(options: &Options, engine: &[&'static str]) -> Vec<&'static str> {
    let scale = if options.small { COMPUTE_SMALL } else { COMPUTE };
    [&["--image", "compute", "--cmdline", scale, "--engine"], engine].concat()
}

/// `compute` without exits on the way, on KVM; and its program built alike as a process of the host.
fn user_code_contenders(options: &Options, directory: &Path) -> Result<Vec<Contender>> {
    kvm_opens()?;
    let scale = if options.small { USER_CODE_SMALL } else { USER_CODE };
    let program = directory.join("program");
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-images");
    let user = sources.join("bare-metal/user");
    let built = Command::new("cc")
        .args(PROGRAM_FLAGS)
        .arg("-I")
        .arg(&user)
        .arg(sources.join("tests/native_program.c"))
        .args(PROGRAM_SOURCES.map(|file| user.join(file)))
        .arg("-o")
        .arg(&program)
        .status()
        .context("the C compiler does not start")?;
    if !built.success() {
        bail!("the program of compute does not build");
    }
    let command_line = format!("scale={scale} yields=0");
    let guest = ["--image", "compute", "--cmdline", &command_line, "--engine"];
    let kvm = [&guest[..], &KVM_SYNC].concat();
    let words = vec![text(&program)?.to_owned(), scale.to_owned()];
    Ok(vec![
        reprise::run("user_code_kvm", "user code: kvm sync", &kvm),
        reprise::process("user_code_process", "user code: a process", words),
    ])
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not text", path.display()))
}

fn kvm_opens() -> std::io::Result<()> {
    std::fs::File::options().read(true).write(true).open("/dev/kvm").map(|_| ())
}
