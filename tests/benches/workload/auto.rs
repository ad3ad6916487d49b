//! How long `--engine auto` takes to decide for Linux before the guest starts.

use std::time::Instant;

use anyhow::Result;
use reprise::session::choice::{self, ClockArg, EngineArg, Running};
use reprise::session::guest::Guest;
use reprise::session::hardware::{BranchHardware, HostHardware};
use reprise_guest_images::LinuxImage;
use reprise_tests::hardware::Simulated;

use super::contender::{Contender, Sample};

/// This host, and one with a counter, on which the kernel has to be unpacked and searched.
pub(crate) fn contenders(image: &LinuxImage) -> Result<Vec<Contender>> {
    let mut guest = Guest::embedded("compute")?;
    guest.kernel.bytes = image.kernel.bytes.clone().into();
    guest.cmdline.clone_from(&image.command_line);
    let (host, counter) = ("auto: decided on this host", "auto: with a simulated PMU");
    Ok(vec![
        decided("auto_host", host, HostHardware::default(), guest.clone()),
        decided("auto_counter", counter, Simulated::intel(1), guest),
    ])
}

fn decided(
    key: &'static str,
    label: &'static str,
    hardware: impl BranchHardware,
    guest: Guest,
) -> Contender {
    Contender::new(key, label, move || {
        let started = Instant::now();
        let running = Running::Guest(&guest);
        choice::for_new_run_on(&hardware, EngineArg::Auto, ClockArg::Auto, running)?;
        let process_seconds = started.elapsed().as_secs_f64();
        Ok(Sample { process_seconds, ..Sample::default() })
    })
}
