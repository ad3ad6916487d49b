//! Linux on simulated hardware, through the workload to the reset. Takes minutes, so it is run by hand:
//! `cargo test --release -p reprise-tests --test simulated_hardware -- --ignored --nocapture linux`.
//!
//! Even where CPUID hides the time-stamp counter, Linux reads it (its first stack canary does). Until
//! RDTSC is trapped and its answers logged, the counter stands still here.

use std::path::Path;
use std::time::Instant;

use reprise::boot::GuestSource;
use reprise_guest_images::WORKLOAD_W;
use reprise_simulated_hardware::Disturbance;
use reprise_tests::linux_image::linux_image;

use crate::case::{Case, Hardware, assert_equal};

const RAM_MIB: u64 = 256;
/// Instructions from kick to kick: a timer interrupt is due every four million.
const KICK_EVERY: u64 = 200_000;

fn hardware(seed: u64) -> Hardware {
    let disturbance = Disturbance {
        kick_every: Some(KICK_EVERY),
        forget_every: Some(400_000),
        access_every: Some(50_000),
        time_stamp_runs: false,
        ..Disturbance::intel(seed)
    };
    Hardware { disturbance, ..Hardware::intel(seed) }
}

#[test]
#[ignore = "takes minutes"]
fn linux_boots_works_and_replays() {
    let Some(image) = linux_image(Path::new(env!("CARGO_TARGET_TMPDIR"))) else { return };
    let source = GuestSource {
        kernel: &image.kernel.bytes,
        initrd: Some(&image.initrd.bytes),
        cmdline: &image.command_line,
    };
    let case = Case { source, ram_mib: RAM_MIB, typed: WORKLOAD_W };
    let started = Instant::now();
    let recorded = case.record(&hardware(1));
    let wall_s = started.elapsed().as_secs_f64();
    let (ticks, counts) = (recorded.outcome.ticks, recorded.counts);
    eprintln!("recorded {ticks} ticks in {wall_s:.1} s: {counts:?}\n{}", recorded.console);
    for line in ["unpacked", "counted 100000", "forked 60"] {
        assert!(recorded.console.contains(line), "no {line:?}");
    }
    for seed in [2, 3] {
        let started = Instant::now();
        let (replay, counts) = case.replay(&recorded.records, &hardware(seed));
        let wall_s = started.elapsed().as_secs_f64();
        eprintln!("seed {seed}: replayed in {wall_s:.1} s: {counts:?}");
        assert_equal(&recorded.outcome, &replay.expect("the machine runs"), seed);
    }
}
