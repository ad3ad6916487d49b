//! Debian packages through the system's own apt, as an ordinary user: resolved and authenticated
//! with the system's package lists, or, where those are missing or out of date, with fresh ones
//! that are kept apart. Nothing of the system is changed.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use super::{RecipeError, tar};

const KERNEL_META_PACKAGE: &str = "linux-image-cloud-amd64";
const KERNEL_PACKAGE_PREFIX: &str = "linux-image-";
const BUSYBOX_PACKAGE: &str = "busybox-static";

/// A package and its version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Package {
    pub(super) name: String,
    pub(super) version: String,
}

/// The two packages that the image is made of.
#[derive(Debug)]
pub(super) struct Packages {
    pub(super) kernel: Package,
    pub(super) busybox: Package,
}

/// Where apt looks for its lists.
pub(super) struct Apt {
    options: Vec<OsString>,
    /// Downloads and unpacked files go here.
    directory: PathBuf,
}

impl Apt {
    /// With the system's lists.
    pub(super) fn with_system_lists(directory: &Path) -> Self {
        // Short timeouts: without a network the user is told soon.
        let options = [
            "Acquire::http::Timeout=20",
            "Acquire::https::Timeout=20",
            "Acquire::Retries=1",
            "APT::Get::AllowUnauthenticated=false",
            "APT::Sandbox::User=root",
        ];
        let options = options.iter().flat_map(|option| ["-o".into(), option.into()]).collect();
        Self { options, directory: directory.to_owned() }
    }

    /// With lists of its own in `directory`, fetched now.
    pub(super) fn with_fresh_lists(directory: &Path) -> Result<Self, RecipeError> {
        let mut apt = Self::with_system_lists(directory);
        for (option, inside) in [("Dir::State", "state/lists"), ("Dir::Cache", "cache/archives")] {
            let partial = directory.join(inside).join("partial");
            fs::create_dir_all(&partial).map_err(|error| RecipeError::store(&partial, error))?;
            let top = directory.join(inside.split('/').next().unwrap_or(inside));
            let mut value = OsString::from(format!("{option}="));
            value.push(top);
            apt.options.extend(["-o".into(), value]);
        }
        let output = run(apt.command("apt-get").args(["-q", "update"]))?;
        // Without a network apt-get warns, and calls it a success.
        let mut files = fs::read_dir(directory.join("state/lists"))
            .map_err(|error| RecipeError::store(directory, error))?
            .filter_map(|file| Some(file.ok()?.file_name().to_string_lossy().into_owned()));
        if files.any(|name| name.contains("_Packages")) {
            Ok(apt)
        } else {
            Err(RecipeError::Apt { program: "apt-get".to_owned(), reason: complaint(&output) })
        }
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.args(&self.options).env("LC_ALL", "C").current_dir(&self.directory);
        command
    }

    /// The concrete packages of today.
    pub(super) fn resolve(&self) -> Result<Packages, RecipeError> {
        let meta = self.show(KERNEL_META_PACKAGE)?;
        let kernel = kernel_dependency(&meta).ok_or_else(|| RecipeError::Package {
            package: KERNEL_META_PACKAGE.to_owned(),
            reason: "it depends on no kernel".to_owned(),
        })?;
        Ok(Packages { kernel: self.package(&kernel)?, busybox: self.package(BUSYBOX_PACKAGE)? })
    }

    fn package(&self, name: &str) -> Result<Package, RecipeError> {
        let record = self.show(name)?;
        let version = field(&record, "Version").ok_or_else(|| RecipeError::Package {
            package: name.to_owned(),
            reason: "it has no version".to_owned(),
        })?;
        Ok(Package { name: name.to_owned(), version: version.to_owned() })
    }

    fn show(&self, name: &str) -> Result<String, RecipeError> {
        let output = run(self.command("apt-cache").args(["show", "--no-all-versions", name]))?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Downloads a package (apt checks it against the signed lists) and takes one file out of it.
    pub(super) fn fetch(
        &self,
        package: &Package,
        wanted: &dyn Fn(&str) -> bool,
    ) -> Result<Vec<u8>, RecipeError> {
        let pinned = format!("{}={}", package.name, package.version);
        run(self.command("apt-get").args(["-q", "download", &pinned]))?;
        let archive = self.downloaded(package)?;
        let content = unpack(&archive, &pinned, wanted);
        // The disk may be small; a leftover is harmless.
        let _ = fs::remove_file(&archive);
        content?.filter(|content| !content.is_empty()).ok_or_else(|| RecipeError::Package {
            package: pinned,
            reason: "the file that is needed is not in it".to_owned(),
        })
    }

    /// apt names the file after package and version, in its own spelling of the version.
    fn downloaded(&self, package: &Package) -> Result<PathBuf, RecipeError> {
        let prefix = format!("{}_", package.name);
        let files = fs::read_dir(&self.directory)
            .map_err(|error| RecipeError::store(&self.directory, error))?;
        files
            .filter_map(|file| Some(file.ok()?.path()))
            .find(|path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                name.starts_with(&prefix) && name.ends_with(".deb")
            })
            .ok_or_else(|| RecipeError::Package {
                package: package.name.clone(),
                reason: "apt-get downloaded nothing".to_owned(),
            })
    }
}

fn unpack(
    archive: &Path,
    package: &str,
    wanted: &dyn Fn(&str) -> bool,
) -> Result<Option<Vec<u8>>, RecipeError> {
    let mut command = Command::new("dpkg-deb");
    command.arg("--fsys-tarfile").arg(archive).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(|error| RecipeError::start(&command, &error))?;
    let found = match &mut child.stdout {
        Some(stream) => tar::find(stream, wanted),
        None => Err(io::ErrorKind::BrokenPipe.into()),
    };
    // The rest of the archive is not wanted.
    drop(child.stdout.take());
    let _ = child.kill();
    let _ = child.wait();
    let useless = |error: io::Error| RecipeError::Package {
        package: package.to_owned(),
        reason: error.to_string(),
    };
    found.map_err(useless)
}

/// Runs a program to its end; a failure carries its complaint.
fn run(command: &mut Command) -> Result<Output, RecipeError> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| RecipeError::start(command, &error))?;
    if output.status.success() {
        return Ok(output);
    }
    Err(RecipeError::Apt { program: program_name(command), reason: complaint(&output) })
}

/// The line of a program's errors that says most: the first error, else the first of all.
fn complaint(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    let errors = said.lines().filter(|line| line.starts_with("E:"));
    errors.chain(said.lines()).next().unwrap_or("it gives no reason").trim().to_owned()
}

pub(super) fn program_name(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

/// The value of a one-line field of a package's record.
fn field<'a>(record: &'a str, name: &str) -> Option<&'a str> {
    record.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim()))
}

/// The concrete kernel that the meta package stands for.
fn kernel_dependency(meta: &str) -> Option<String> {
    let dependencies = field(meta, "Depends")?.split([',', '|']);
    let mut names = dependencies.filter_map(|dependency| dependency.split_whitespace().next());
    names.find(|name| name.starts_with(KERNEL_PACKAGE_PREFIX)).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    const META: &str = "\
Package: linux-image-cloud-amd64
Version: 6.1.192-2
Provides: wireguard-modules (= 1.0.0)
Depends: kmod, linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2) | linux-image-other
Description: Linux
";

    #[test]
    fn the_meta_package_names_the_kernel() {
        let kernel = kernel_dependency(META);
        assert_eq!(kernel.as_deref(), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(kernel_dependency("Depends: kmod, initramfs-tools\n"), None);
        assert_eq!(kernel_dependency("Package: x\n"), None);
    }

    #[test]
    fn a_field_is_found_by_its_whole_name() {
        assert_eq!(field(META, "Version"), Some("6.1.192-2"));
        assert_eq!(field("Versions: 1\nVersion: 2\n", "Version"), Some("2"));
        assert_eq!(field(META, "SHA256"), None);
    }

    #[test]
    fn a_failing_program_gives_its_error_line() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo W: later >&2; echo 'E: no such thing' >&2; exit 100"]);
        let error = run(&mut command).expect_err("it fails");
        assert!(error.to_string().contains("E: no such thing"), "{error}");
    }

    #[test]
    fn a_missing_program_leads_to_ones_own_kernel() {
        let error = run(&mut Command::new("no-such-package-tool")).expect_err("it is not there");
        assert!(matches!(error, RecipeError::NoApt { .. }));
        let line = error.to_string();
        assert!(line.contains("no-such-package-tool") && line.contains("--kernel"), "{line}");
    }
}
