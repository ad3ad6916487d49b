//! The Linux image, built from Debian's packages and run on QEMU.

mod qemu;

use std::path::Path;
use std::time::Duration;

use qemu::qemu_is_here;
use reprise_guest_images::{LinuxImage, RecipeError, WORKLOAD_SMALL, WORKLOAD_W, linux};

const TIME_LIMIT: Duration = Duration::from_secs(100);
const PROMPT: &str = "/ # ";

/// The image; `None`, saying why, where it cannot be had. It is kept between runs of the tests.
fn image() -> Option<LinuxImage> {
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("linux-image");
    match linux(&cache, &mut |step| eprintln!("{step}")) {
        Ok(image) => Some(image),
        Err(error @ (RecipeError::NoApt { .. } | RecipeError::Apt { .. })) => {
            eprintln!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Boots it with a clock that counts instructions, one nanosecond each, as Reprise's machine has.
fn console(script: &[(&str, &str)]) -> Option<String> {
    if !qemu_is_here() {
        return None;
    }
    let image = image()?;
    let initrd = image.initrd.path.display().to_string();
    let arguments = [
        ["-m", "256"],
        ["-icount", "shift=0,sleep=off"],
        ["-initrd", &initrd],
        ["-append", &image.command_line],
    ]
    .concat();
    let run = qemu::run(&image.kernel.path, &arguments, script, TIME_LIMIT);
    let status = run.status.unwrap_or_else(|| panic!("it did not end:\n{}", run.console));
    assert!(status.success(), "{status}\n{}", run.console);
    Some(run.console)
}

/// Whether a line of the console is just this (and not the echo of what was typed).
fn has_line(console: &str, wanted: &str) -> bool {
    console.lines().any(|line| line.trim_end_matches('\r') == wanted)
}

#[test]
fn it_boots_to_a_shell_with_job_control_and_runs_the_small_workload() {
    // Ctrl-C ends what waits for input, not the shell.
    let script = [(PROMPT, "echo re''ady; cat\n"), ("ready\r\n", "\x03"), (PROMPT, WORKLOAD_SMALL)];
    let Some(console) = console(&script) else { return };
    assert!(!console.contains("can't access tty"), "{console}");
    for line in ["unpacked", "counted 2000", "forked 3"] {
        assert!(has_line(&console, line), "no line {line:?} in\n{console}");
    }
}

#[test]
#[ignore = "takes up to a minute on QEMU; the end-to-end tests run this workload on Reprise"]
fn it_runs_the_workload() {
    let Some(console) = console(&[(PROMPT, WORKLOAD_W)]) else { return };
    for line in [
        // SHA-256 of 16 MiB of zeros.
        "080acf35a507ac9849cfcba47dc2ad83e01b75663a516279c8b9d243b719643e  -",
        "unpacked",
        "counted 100000",
        "forked 60",
    ] {
        assert!(has_line(&console, line), "no line {line:?} in\n{console}");
    }
    let digests = console.lines().filter(|line| line.trim_end().ends_with("  -")).count();
    assert_eq!(digests, 3, "{console}");
}
