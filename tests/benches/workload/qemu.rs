//! QEMU's translator with the same kernel, initramfs and workload, for comparison.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use reprise_guest_images::LinuxImage;

const QEMU: &str = "qemu-system-x86_64";
/// A machine like Reprise's: no APIC; a PC's PIC, PIT, RTC and one UART.
const MACHINE: &[&str] = &[
    "-machine",
    "pc,usb=off,accel=tcg",
    "-cpu",
    "Nehalem,-apic",
    "-nodefaults",
    "-display",
    "none",
    "-serial",
    "stdio",
    "-no-reboot",
];
/// What the shell shows when it takes commands.
const PROMPT: &[u8] = b"/ # ";

/// The median of the seconds from start to reset; none without QEMU.
pub(crate) fn seconds(
    image: &LinuxImage,
    memory_mib: &str,
    workload: &str,
    runs: usize,
) -> Result<Option<f64>> {
    if Command::new(QEMU).arg("--version").output().is_err() {
        return Ok(None);
    }
    let mut times = Vec::new();
    for round in 1..=runs {
        eprintln!("linux, QEMU TCG: round {round} of {runs}");
        times.push(once(image, memory_mib, workload)?);
    }
    times.sort_by(f64::total_cmp);
    Ok(Some((times[(runs - 1) / 2] + times[runs / 2]) / 2.0))
}

fn once(image: &LinuxImage, memory_mib: &str, workload: &str) -> Result<f64> {
    let started = Instant::now();
    let mut child = Command::new(QEMU)
        .args(MACHINE)
        .args(["-m", memory_mib, "-append", &image.command_line])
        .arg("-kernel")
        .arg(&image.kernel)
        .arg("-initrd")
        .arg(&image.initrd)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .context("QEMU does not start")?;
    let typed = type_at_prompt(&mut child, workload);
    if typed.is_err() {
        let _ = child.kill();
    }
    let status = child.wait()?;
    typed?;
    if !status.success() {
        bail!("QEMU ended with {status}");
    }
    Ok(started.elapsed().as_secs_f64())
}

/// Types once the shell is there, and reads until the console closes.
fn type_at_prompt(child: &mut Child, workload: &str) -> Result<()> {
    let mut keyboard = child.stdin.take().context("stdin is piped")?;
    let mut console = child.stdout.take().context("stdout is piped")?;
    let (mut seen, mut piece) = (Vec::new(), [0; 4096]);
    while !seen.windows(PROMPT.len()).any(|window| window == PROMPT) {
        match console.read(&mut piece)? {
            0 => bail!("the guest ended before its shell: {}", String::from_utf8_lossy(&seen)),
            count => seen.extend(&piece[..count]),
        }
    }
    keyboard.write_all(workload.as_bytes())?;
    keyboard.flush()?;
    std::io::copy(&mut console, &mut std::io::sink())?;
    Ok(())
}
