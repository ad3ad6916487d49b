//! The bare-metal guests, run on QEMU, and compute's results against the host's own.

mod qemu;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use qemu::{Run, qemu_is_here};
use reprise_guest_images::{COMPUTE_AT_SCALE_1, embedded};
use tempfile::TempDir;

const TIME_LIMIT: Duration = Duration::from_secs(30);

/// Runs an embedded guest in 16 MiB; `None` where there is no QEMU.
fn run(name: &str, command_line: &str, script: &[(&str, &str)], limit: Duration) -> Option<Run> {
    if !qemu_is_here() {
        return None;
    }
    let directory = TempDir::new().expect("a temporary directory");
    let kernel = directory.path().join(name);
    std::fs::write(&kernel, embedded(name).expect("the guest exists").image).expect("it is stored");
    Some(qemu::run(&kernel, &["-m", "16", "-append", command_line], script, limit))
}

/// Runs it and expects that it ends the machine itself, by a reset.
fn run_to_end(name: &str, command_line: &str, script: &[(&str, &str)]) -> Option<String> {
    let run = run(name, command_line, script, TIME_LIMIT)?;
    let status = run.status.unwrap_or_else(|| panic!("{name} did not end:\n{}", run.console));
    assert!(status.success(), "{name}: {status}\n{}", run.console);
    Some(run.console)
}

/// The words behind `key` on the console.
fn word_after<'a>(console: &'a str, key: &str) -> &'a str {
    let at = console.find(key).unwrap_or_else(|| panic!("no {key:?} in {console:?}"));
    console[at + key.len()..].split([',', '\r', ' ']).next().unwrap_or_default()
}

#[test]
fn hello_prints_its_line() {
    let Some(console) = run_to_end("hello", "", &[]) else { return };
    assert_eq!(console, "Hello from a bare-metal guest.\r\n");
}

#[test]
fn hello32_is_started_by_multiboot() {
    let Some(console) = run_to_end("hello32", "one two", &[]) else { return };
    assert!(console.starts_with("Hello from a 32-bit guest, upper memory 15"), "{console:?}");
    assert!(console.contains("one two\"."), "{console:?}");
}

#[test]
fn ticks_counts_its_interrupts_and_hashes() {
    let Some(console) = run_to_end("ticks", "hz=1000 count=7", &[]) else { return };
    assert!(console.starts_with("ticks: 7 interrupts, position hash "), "{console:?}");
    assert_eq!(word_after(&console, "position hash ").len(), 16, "{console:?}");
}

#[test]
fn ticks_lands_elsewhere_at_another_rate() {
    if !qemu_is_here() {
        return;
    }
    let hash = |command_line: &str| {
        let run = run_to_end("ticks", command_line, &[]).expect("QEMU is here");
        word_after(&run, "position hash ").to_owned()
    };
    assert_ne!(hash("count=3 hz=1000"), hash("count=3 hz=999"));
}

#[test]
fn echo_hashes_its_input_alone() {
    let whole = [("> ", "hello\rxquit\rquit\r")];
    let pieces = [("> ", "hel"), ("hel", "lo\r"), ("> ", "xquit\r"), ("> ", "quit\r")];
    let Some(first) = run_to_end("echo", "", &whole) else { return };
    let Some(second) = run_to_end("echo", "", &pieces) else { return };
    for console in [&first, &second] {
        assert!(
            console.contains("> hello\r\n> xquit\r\n> quit\r\necho: 17 bytes, "),
            "{console:?}"
        );
    }
    assert_eq!(word_after(&first, "input hash "), word_after(&second, "input hash "));
    let Some(other) = run_to_end("echo", "", &[("> ", "hellp\rxquit\r\x04")]) else { return };
    assert!(other.contains("echo: 13 bytes"), "{other:?}");
    assert_ne!(word_after(&first, "input hash "), word_after(&other, "input hash "));
}

#[test]
fn echo_loses_nothing_when_input_comes_faster_than_it_goes() {
    let flood = format!("{}\rquit\r", "0123456789".repeat(100));
    let Some(console) = run_to_end("echo", "", &[("> ", &flood)]) else { return };
    assert!(console.contains("echo: 1006 bytes"), "{console:?}");
}

/// Builds compute's program for the host and returns what it prints.
fn native_program(scale: u32) -> String {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR"));
    let directory = TempDir::new().expect("a temporary directory");
    let program = directory.path().join("program");
    let user = sources.join("bare-metal/user");
    let files = ["program.c", "sha256.c", "sort.c", "matrix.c", "compression.c"];
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    let mut words = compiler.split_whitespace();
    let status = Command::new(words.next().expect("CC is not empty"))
        .args(words)
        .args(["-O1", "-ffp-contract=off", "-I"])
        .arg(&user)
        .arg(sources.join("tests/native_program.c"))
        .args(files.map(|file| user.join(file)))
        .arg("-o")
        .arg(&program)
        .status()
        .expect("the C compiler runs");
    assert!(status.success());
    let output = Command::new(program).arg(scale.to_string()).output().expect("it runs");
    assert!(output.status.success(), "a stage finds its own result wrong");
    String::from_utf8(output.stdout).expect("it prints ASCII")
}

#[test]
fn compute_at_scale_1_prints_what_is_documented() {
    assert_eq!(native_program(1) + "compute: done\r\n", COMPUTE_AT_SCALE_1);
}

#[test]
fn compute_prints_what_the_host_computes() {
    for scale in [0, 1, 3] {
        let Some(console) = run_to_end("compute", &format!("scale={scale}"), &[]) else { return };
        assert_eq!(console, native_program(scale) + "compute: done\r\n");
    }
}

#[test]
fn misbehave_ends_as_it_should() {
    // (do=, what the console shows at its end, QEMU's exit status)
    let rows = [
        ("", "wild-page-tables\r\n", 0),
        ("absent", "absent: done\r\n", 0),
        // isa-debug-exit: twice the value plus one.
        ("debug-exit", "debug-exit\r\n", 0x21),
        ("divide", "", 0),
        ("double-fault", "", 0),
        ("triple-fault", "triple-fault\r\n", 0),
        ("wild-jump", "error 0000 rip 0000123456789000 address 0000123456789000\r\n", 0),
        ("wild-jump-no-idt", "wild-jump-no-idt\r\n", 0),
        ("wild-page-tables", "wild-page-tables\r\n", 0),
    ];
    for (deed, end, code) in rows {
        let Some(run) = run("misbehave", &format!("do={deed}"), &[], TIME_LIMIT) else { return };
        assert_eq!(run.status.and_then(|status| status.code()), Some(code), "{}", run.console);
        assert!(run.console.ends_with(end), "{deed}: {:?}", run.console);
    }
    for (deed, exception) in [("divide", "exception 0 "), ("double-fault", "exception 8 ")] {
        let Some(console) = run_to_end("misbehave", &format!("do={deed}"), &[]) else { return };
        assert!(console.contains(exception), "{console:?}");
    }
}

#[test]
fn misbehave_runs_for_ever_where_it_says_so() {
    for deed in ["flood", "halt", "idle", "spin"] {
        let limit = Duration::from_secs(2);
        let Some(run) = run("misbehave", &format!("do={deed}"), &[], limit) else { return };
        assert!(run.status.is_none(), "{deed} ended: {}", run.console);
        assert!(run.console.starts_with(&format!("misbehave: {deed}\r\n")), "{:?}", run.console);
    }
}

#[test]
fn the_build_hangs_on_no_directory() {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let workspace = here.parent().expect("the crate lies in a workspace").display().to_string();
    for guest in reprise_guest_images::EMBEDDED {
        let found = guest.image.windows(workspace.len()).any(|text| text == workspace.as_bytes());
        assert!(!found, "{} holds the path of its sources", guest.name);
    }
}
