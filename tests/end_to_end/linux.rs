//! Debian's kernel, booted to a shell, with commands typed on its console: recorded on the software
//! CPU, and replayed.
//!
//! The image is fetched once and kept beside other test data; without apt or a network these tests
//! say so and end.

use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reprise_guest_images::WORKLOAD_SMALL;
use reprise_tests::linux_image::{cache_directory, linux_image};
use serde_json::Value;

use crate::program::{
    SIGKILL, Workplace, assert_equal_runs, kept_directory, replay, replayed_console, reprise,
};

/// The cache directory's parent, with the image in it; `None`, said once, where it cannot be had.
fn cache_home() -> Option<&'static PathBuf> {
    static HOME: OnceLock<Option<PathBuf>> = OnceLock::new();
    HOME.get_or_init(|| {
        linux_image(&kept_directory())?;
        let cache = cache_directory(&kept_directory());
        // The product looks for `reprise` in a cache home.
        let home = kept_directory().join("cache-home");
        std::fs::create_dir_all(&home).expect("a directory among the test data");
        let link = home.join("reprise");
        if !std::fs::read_link(&link).is_ok_and(|leads_to| leads_to == cache) {
            // It led to where the tests lay before they were moved.
            let _ = std::fs::remove_file(&link);
            symlink(&cache, &link).expect("a link among the test data");
        }
        Some(home)
    })
    .as_ref()
}

/// A recording of the small workload, made once for all tests.
pub(crate) struct Workload {
    pub(crate) workplace: Workplace,
    pub(crate) report: Value,
}

pub(crate) fn workload() -> Option<&'static Workload> {
    static RECORDED: OnceLock<Option<Workload>> = OnceLock::new();
    RECORDED
        .get_or_init(|| {
            let home = cache_home()?;
            let workplace = Workplace::new();
            let input = workplace.file("input", WORKLOAD_SMALL);
            let file = workplace.path("linux.rr");
            let words = [
                "--json", "record", "--engine", "soft", "--image", "linux", "--memory", "256",
                "--input", &input, "-o", &file,
            ];
            let running = reprise(&words).with_variable("XDG_CACHE_HOME", home).start();
            let report = running.finish().expect_code(0).json();
            Some(Workload { workplace, report })
        })
        .as_ref()
}

/// The kernel and the initrd each need their room.
#[test]
fn too_little_memory_is_told_once() {
    let Some(home) = cache_home() else { return };
    let with = |memory: &str| {
        let words =
            ["run", "--engine", "soft", "--image", "linux", "--memory", memory, "--until", "1"];
        reprise(&words).with_variable("XDG_CACHE_HOME", home).start().finish()
    };
    let refused = with("4").expect_code(1);
    let (_, needed) = refused.stderr.trim_end().rsplit_once("--memory ").expect("it says how much");
    with(needed).expect_code(0);
    let less = needed.parse::<u64>().expect("a number") - 1;
    with(&less.to_string()).expect_code(1);
}

#[test]
fn the_workload_replays_with_its_console() {
    let Some(workload) = workload() else { return };
    assert_eq!(workload.report["ending"], "triple-fault", "reboot=t: {:#}", workload.report);
    let file = workload.workplace.path("linux.rr");
    let console = replayed_console(&file, &[]);
    for line in ["unpacked", "counted 2000", "forked 3"] {
        let shown = console.lines().any(|shown| shown.trim_end_matches('\r') == line);
        assert!(shown, "no line {line:?} in\n{console}");
    }
    assert!(!console.contains("Oops") && !console.contains("BUG:"), "{console}");
}

/// In another directory, while other load takes both of the machine's processors.
#[test]
fn the_workload_replays_elsewhere_under_load() {
    let Some(workload) = workload() else { return };
    let elsewhere = Workplace::new();
    let moved = elsewhere.path("moved.rr");
    std::fs::copy(workload.workplace.path("linux.rr"), &moved).expect("a copy");
    let busy = AtomicBool::new(true);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while busy.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        let replayed = std::panic::catch_unwind(|| replay(&moved, &[]));
        busy.store(false, Ordering::Relaxed);
        assert_equal_runs(&workload.report, &replayed.expect("the replay is verified"));
    });
}

/// Checkpoints added to Linux's recording: from the last of them, and from one amid the boot, the rest
/// is as recorded.
#[test]
fn the_workload_goes_on_from_checkpoints() {
    let Some(workload) = workload() else { return };
    let elsewhere = Workplace::new();
    let file = elsewhere.path("linux.rr");
    std::fs::copy(workload.workplace.path("linux.rr"), &file).expect("a copy");
    let words = ["--json", "checkpoint", &file, "--every", "120000000"];
    let added = reprise(&words).start().finish().expect_code(0).json();
    assert_eq!(added["replay"]["verified"], true, "{added:#}");
    assert!(added["total"].as_u64() > Some(2), "{added:#}");
    for from in ["300000000", "99999999999"] {
        let replayed = replay(&file, &["--from", from]);
        assert!(replayed["from_tick"].as_u64() > Some(0), "{replayed:#}");
        for field in ["final_digest", "console_digest", "ticks", "interrupts", "ending"] {
            assert_eq!(workload.report[field], replayed[field], "{field}, from {from}");
        }
    }
}

#[test]
fn a_boot_that_is_killed_replays_up_to_there() {
    let Some(home) = cache_home() else { return };
    let workplace = Workplace::new();
    let file = workplace.path("killed.rr");
    let words = ["record", "--engine", "soft", "--image", "linux", "--memory", "256", "-o", &file];
    let mut running = reprise(&words).with_variable("XDG_CACHE_HOME", home).start();
    running.wait_until("the recording has begun", || std::path::Path::new(&file).exists());
    std::thread::sleep(Duration::from_millis(3000));
    running.signal("KILL");
    assert_eq!(running.wait().status.signal(), Some(SIGKILL));
    let replayed = replay(&file, &[]);
    assert_eq!(replayed["ending"], "cut-short", "{replayed:#}");
    assert!(replayed["ticks"].as_u64() > Some(1_000_000), "{replayed:#}");
}

#[test]
#[ignore = "takes minutes; run it with --ignored"]
fn ten_replays_of_ten_are_equal() {
    let Some(workload) = workload() else { return };
    for _ in 0..10 {
        assert_equal_runs(&workload.report, &replay(&workload.workplace.path("linux.rr"), &[]));
    }
}
