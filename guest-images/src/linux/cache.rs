//! The cache of built images. A directory for each pair of package versions appears in one step, by
//! a rename, so that several builders do not disturb each other; a small file names the current
//! one. Digests tell a damaged image, which is then built anew.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use tempfile::{NamedTempFile, TempDir};

use super::{LINUX_COMMAND_LINE, LinuxFile, LinuxImage, LinuxVersions, RecipeError};

/// Raised with every change of the recipe that changes the image.
const RECIPE_REVISION: u32 = 1;

const KERNEL: &str = "vmlinuz";
const INITRD: &str = "initramfs.cpio";
const MANIFEST: &str = "manifest";

/// Holds the directory name of the image that is used until a newer one is asked for.
fn current_file(cache_dir: &Path) -> PathBuf {
    cache_dir.join(format!("current-r{RECIPE_REVISION}"))
}

/// A name for a directory: other characters than these become dots.
fn directory_name(versions: &LinuxVersions) -> String {
    let LinuxVersions { kernel_package, kernel, busybox } = versions;
    format!("{kernel_package}-{kernel}-busybox-{busybox}-r{RECIPE_REVISION}")
        .chars()
        .map(|letter| match letter {
            'a'..='z' | 'A'..='Z' | '0'..='9' | '-' | '+' | '~' => letter,
            _ => '.',
        })
        .collect()
}

fn manifest(versions: &LinuxVersions, kernel: &[u8; 32], initrd: &[u8; 32]) -> String {
    let lines = [
        versions.kernel_package.clone(),
        versions.kernel.clone(),
        versions.busybox.clone(),
        blake3::Hash::from_bytes(*kernel).to_string(),
        blake3::Hash::from_bytes(*initrd).to_string(),
    ];
    lines.join("\n") + "\n"
}

fn read_file(path: PathBuf) -> Option<LinuxFile> {
    let bytes = fs::read(&path).ok()?;
    let blake3 = *blake3::hash(&bytes).as_bytes();
    Some(LinuxFile { path, bytes, blake3 })
}

/// The image in `directory`, if it is whole.
fn read(directory: &Path) -> Option<LinuxImage> {
    let text = fs::read_to_string(directory.join(MANIFEST)).ok()?;
    let mut lines = text.lines().map(str::to_owned);
    let versions = LinuxVersions {
        kernel_package: lines.next()?,
        kernel: lines.next()?,
        busybox: lines.next()?,
    };
    let kernel = read_file(directory.join(KERNEL))?;
    let initrd = read_file(directory.join(INITRD))?;
    let expected = manifest(&versions, &kernel.blake3, &initrd.blake3);
    let command_line = LINUX_COMMAND_LINE.to_owned();
    (text == expected).then_some(LinuxImage { kernel, initrd, command_line, versions })
}

/// The image in use, if there is one and it is whole.
pub(super) fn current(cache_dir: &Path) -> Option<LinuxImage> {
    let name = fs::read_to_string(current_file(cache_dir)).ok()?;
    // A name, never a path: the file might be damaged.
    let name = Path::new(name.trim()).file_name()?;
    read(&cache_dir.join(name))
}

/// The image of these versions, if there is one and it is whole.
pub(super) fn find(cache_dir: &Path, versions: &LinuxVersions) -> Option<LinuxImage> {
    read(&cache_dir.join(directory_name(versions))).filter(|image| image.versions == *versions)
}

/// Makes the image of these versions the one in use.
pub(super) fn make_current(cache_dir: &Path, versions: &LinuxVersions) -> Result<(), RecipeError> {
    let path = current_file(cache_dir);
    let write = || {
        let mut file = NamedTempFile::new_in(cache_dir)?;
        writeln!(file, "{}", directory_name(versions))?;
        file.persist(&path).map_err(|failed| failed.error)
    };
    write().map(drop).map_err(|error: io::Error| RecipeError::store(&path, error))
}

/// Puts a new image into the cache and makes it the one in use.
pub(super) fn store(
    cache_dir: &Path,
    versions: &LinuxVersions,
    kernel: &[u8],
    initrd: &[u8],
) -> Result<LinuxImage, RecipeError> {
    let directory = cache_dir.join(directory_name(versions));
    let failed = |error| RecipeError::store(&directory, error);
    let new = TempDir::with_prefix_in("storing-", cache_dir).map_err(failed)?;
    let digest = |content| *blake3::hash(content).as_bytes();
    let manifest = manifest(versions, &digest(kernel), &digest(initrd));
    let files = [(KERNEL, kernel), (INITRD, initrd), (MANIFEST, manifest.as_bytes())]
        .map(|(name, content)| write_durably(&new.path().join(name), content));
    files.into_iter().collect::<io::Result<()>>().map_err(failed)?;
    // Two tries: another builder may have been quicker, or a damaged image may be in the way.
    for _ in 0..2 {
        if fs::rename(new.path(), &directory).is_ok() {
            break;
        }
        if find(cache_dir, versions).is_none() {
            let _ = fs::remove_dir_all(&directory);
        }
    }
    let image = find(cache_dir, versions)
        .ok_or_else(|| failed(io::Error::other("the new image cannot be put there")))?;
    make_current(cache_dir, versions)?;
    Ok(image)
}

fn write_durably(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = fs::File::create(path)?;
    file.write_all(content)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn versions(busybox: &str) -> LinuxVersions {
        LinuxVersions {
            kernel_package: "linux-image-6.1.0-1-cloud-amd64".to_owned(),
            kernel: "6.1.1-1".to_owned(),
            busybox: busybox.to_owned(),
        }
    }

    fn cache() -> TempDir {
        TempDir::new().expect("a temporary directory")
    }

    #[test]
    fn what_is_stored_is_found_and_current() {
        let cache = cache();
        assert_eq!(current(cache.path()), None);
        let one = store(cache.path(), &versions("1:1"), b"kernel", b"initrd").expect("stored");
        assert_eq!(fs::read(&one.kernel.path).expect("readable"), b"kernel");
        assert_eq!(current(cache.path()), Some(one.clone()));
        let two = store(cache.path(), &versions("1:2"), b"kernel", b"other").expect("stored");
        assert_ne!(one.initrd, two.initrd);
        assert_eq!(current(cache.path()), Some(two));
        assert_eq!(find(cache.path(), &versions("1:1")), Some(one.clone()));
        make_current(cache.path(), &versions("1:1")).expect("made current");
        assert_eq!(current(cache.path()), Some(one));
    }

    #[test]
    fn damage_is_seen_and_repaired() {
        let cache = cache();
        let image = store(cache.path(), &versions("1"), b"kernel", b"initrd").expect("stored");
        for name in [KERNEL, INITRD, MANIFEST] {
            let path = image.kernel.path.with_file_name(name);
            fs::write(&path, b"").expect("cut short");
            assert_eq!(current(cache.path()), None, "{name} is damaged");
            store(cache.path(), &versions("1"), b"kernel", b"initrd").expect("stored again");
            assert_eq!(current(cache.path()).as_ref(), Some(&image));
            fs::remove_file(&path).expect("removed");
            assert_eq!(current(cache.path()), None, "{name} is missing");
            store(cache.path(), &versions("1"), b"kernel", b"initrd").expect("stored again");
        }
        fs::write(current_file(cache.path()), b"../elsewhere\n").expect("damaged");
        assert_eq!(current(cache.path()), None);
    }

    #[test]
    fn builders_at_once_all_succeed_and_leave_nothing_behind() {
        let cache = cache();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    store(cache.path(), &versions("1"), b"kernel", b"initrd").expect("stored");
                });
            }
        });
        assert!(current(cache.path()).is_some());
        assert_eq!(fs::read_dir(cache.path()).expect("readable").count(), 2);
    }
}
