//! `reprise images`: what there is to boot.

use anyhow::{Result, bail};
use reprise_guest_images::{EMBEDDED, LinuxImage, build_linux};
use serde::Serialize;

use crate::cli::{ImagesAction, ImagesArgs};
use crate::output::{Output, byte_size, table};
use crate::session::guest::{LINUX, cache_directory};

#[derive(Debug, Serialize)]
struct ImagesReport {
    images: Vec<ImageRow>,
    cache_directory: String,
}

#[derive(Debug, Serialize)]
struct ImageRow {
    name: &'static str,
    description: String,
    default_command_line: String,
    bytes: Option<u64>,
}

#[derive(Debug, Serialize)]
struct BuiltReport {
    name: &'static str,
    kernel: String,
    initrd: String,
    command_line: String,
    kernel_package: String,
    kernel_version: String,
    busybox_version: String,
}

/// Lists the images, or builds one.
///
/// # Errors
/// An image cannot be built.
pub fn run(arguments: &ImagesArgs, output: Output) -> Result<u8> {
    match &arguments.action {
        None => list(output)?,
        Some(ImagesAction::Build { name }) => build(name, output)?,
    }
    Ok(0)
}

fn list(output: Output) -> Result<()> {
    let mut images: Vec<ImageRow> = EMBEDDED
        .iter()
        .map(|guest| ImageRow {
            name: guest.name,
            description: guest.description.to_owned(),
            default_command_line: guest.default_command_line.to_owned(),
            bytes: Some(guest.image.len() as u64),
        })
        .collect();
    images.push(ImageRow {
        name: LINUX,
        description: "Debian's stock kernel and busybox with a shell on the console; fetched once \
                      with apt, then cached"
            .to_owned(),
        default_command_line: reprise_guest_images::LINUX_COMMAND_LINE.to_owned(),
        bytes: None,
    });
    let cache_directory = cache_directory().display().to_string();
    let report = ImagesReport { images, cache_directory };
    output.result(&report, to_text(&report))
}

fn to_text(report: &ImagesReport) -> String {
    let rows: Vec<(&str, String)> = report
        .images
        .iter()
        .map(|image| {
            let size = image.bytes.map(|bytes| format!(" [{}]", byte_size(bytes)));
            (image.name, format!("{}{}", image.description, size.unwrap_or_default()))
        })
        .collect();
    format!("{}built images are kept in {}", table(&rows), report.cache_directory)
}

fn build(name: &str, output: Output) -> Result<()> {
    if EMBEDDED.iter().any(|guest| guest.name == name) {
        bail!("{name} is part of this program: there is nothing to build");
    }
    if name != LINUX {
        bail!("there is no image {name:?} to build: give {LINUX}");
    }
    let image = build_linux(&cache_directory(), &mut |step| output.note(step))?;
    let report = built_report(&image);
    let rows = [
        ("kernel", report.kernel.clone()),
        ("initrd", report.initrd.clone()),
        ("command line", report.command_line.clone()),
        ("made from", format!("{} {}", report.kernel_package, report.kernel_version)),
        ("and", format!("busybox-static {}", report.busybox_version)),
    ];
    output.result(&report, table(&rows))
}

fn built_report(image: &LinuxImage) -> BuiltReport {
    BuiltReport {
        name: LINUX,
        kernel: image.kernel.path.display().to_string(),
        initrd: image.initrd.path.display().to_string(),
        command_line: image.command_line.clone(),
        kernel_package: image.versions.kernel_package.clone(),
        kernel_version: image.versions.kernel.clone(),
        busybox_version: image.versions.busybox.clone(),
    }
}
