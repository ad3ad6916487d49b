//! What `--engine auto` finds out about this host, and remembers until the host is started again.
//!
//! Whether there is a counter is asked each time, since it takes microseconds and depends on settings
//! that change. Whether it counts right is tried by a tiny guest; that a counter passed is kept in a
//! small file in the cache directory. That one failed is not kept, for its owner may cure it.

use std::fs;
use std::path::PathBuf;

use reprise_host::host_info;
use reprise_kvm::{Finding, pmu_clock, pmu_counter};
use serde::{Deserialize, Serialize};

use super::guest::cache_directory;

/// The file's name in the cache directory.
const FILE_NAME: &str = "branch-counter.json";
/// Longer than any such file.
const MAX_FILE_BYTES: u64 = 1 << 16;

/// Whether the clock `pmu` can be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// What was found.
    pub finding: Finding,
    /// It was found earlier since the host was started.
    pub remembered: bool,
}

/// Decides by what is remembered, else by trying.
pub fn decide() -> Verdict {
    decide_by(pmu_counter, pmu_clock, &Memory::of_this_host())
}

/// Tries, whatever is remembered.
pub fn try_anew() -> Finding {
    try_by(pmu_clock, &Memory::of_this_host())
}

/// Remembers what somebody else has tried.
pub fn remember(clock: &Finding) {
    try_by(|| clock.clone(), &Memory::of_this_host());
}

fn decide_by(
    counter: impl FnOnce() -> Finding,
    clock: impl FnOnce() -> Finding,
    memory: &Memory,
) -> Verdict {
    let counter = counter();
    if !counter.available {
        return Verdict { finding: counter, remembered: false };
    }
    if let Some(reason) = memory.recall() {
        let finding = Finding { available: true, reason, remedy: None };
        return Verdict { finding, remembered: true };
    }
    Verdict { finding: try_by(clock, memory), remembered: false }
}

fn try_by(clock: impl FnOnce() -> Finding, memory: &Memory) -> Finding {
    let finding = clock();
    match finding.available {
        true => memory.keep(&finding.reason),
        false => memory.forget(),
    }
    finding
}

/// What a finding holds for: another host, kernel or version asks anew, and so does each start and each
/// sleep of the host, which may undo its settings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Key {
    boot_id: String,
    sleeps: String,
    cpu: String,
    kernel_release: String,
    reprise_version: String,
}

impl Key {
    fn of_this_host() -> Self {
        let read = |path| fs::read_to_string(path).map(|text| text.trim().to_owned());
        let host = host_info();
        let (family, model) = (host.cpu_family, host.cpu_model);
        let (vendor, stepping) = (host.cpu_vendor, host.cpu_stepping);
        Self {
            boot_id: read("/proc/sys/kernel/random/boot_id").unwrap_or_default(),
            sleeps: read("/sys/power/suspend_stats/success").unwrap_or_default(),
            cpu: format!("{vendor} {family:#x} {model:#x} {stepping:#x}"),
            kernel_release: host.kernel_release,
            reprise_version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

/// The file.
#[derive(Serialize, Deserialize)]
struct Kept {
    key: Key,
    reason: String,
}

/// Where it is kept. A file that cannot be read, is damaged or cannot be written means nothing.
struct Memory {
    path: PathBuf,
    key: Key,
}

impl Memory {
    fn of_this_host() -> Self {
        Self { path: cache_directory().join(FILE_NAME), key: Key::of_this_host() }
    }

    /// What was said for a counter that passed, under this key.
    fn recall(&self) -> Option<String> {
        let metadata = fs::symlink_metadata(&self.path).ok()?;
        if !metadata.is_file() || metadata.len() > MAX_FILE_BYTES || self.key.boot_id.is_empty() {
            return None;
        }
        let kept: Kept = serde_json::from_slice(&fs::read(&self.path).ok()?).ok()?;
        (kept.key == self.key).then_some(kept.reason)
    }

    fn keep(&self, reason: &str) {
        let kept = Kept { key: self.key.clone(), reason: reason.to_owned() };
        let Ok(text) = serde_json::to_vec(&kept) else { return };
        if let Some(directory) = self.path.parent() {
            let _ = fs::create_dir_all(directory);
        }
        // Two programs at once write the same; each its own file, so that neither reads half of one.
        let own = self.path.with_extension(format!("{}.new", std::process::id()));
        if fs::write(&own, text).and_then(|()| fs::rename(&own, &self.path)).is_err() {
            let _ = fs::remove_file(&own);
        }
    }

    fn forget(&self) {
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn yes(reason: &str) -> Finding {
        Finding { available: true, reason: reason.to_owned(), remedy: None }
    }

    fn no(reason: &str) -> Finding {
        Finding { available: false, ..yes(reason) }
    }

    fn key() -> Key {
        let text = |text: &str| text.to_owned();
        Key {
            boot_id: text("06b4d749"),
            sleeps: text("0"),
            cpu: text("GenuineIntel 0x6 0x55 0x4"),
            kernel_release: text("6.12.0"),
            reprise_version: text("0.1.0"),
        }
    }

    fn memory(directory: &tempfile::TempDir) -> Memory {
        // A directory that does not exist yet.
        Memory { path: directory.path().join("cache").join(FILE_NAME), key: key() }
    }

    fn never() -> Finding {
        panic!("it is not asked")
    }

    #[test]
    fn a_counter_that_passed_is_remembered_for_its_key_alone() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let memory = memory(&directory);
        let first = decide_by(|| yes("there"), || yes("exact"), &memory);
        assert_eq!(first, Verdict { finding: yes("exact"), remembered: false });
        let second = decide_by(|| yes("there"), never, &memory);
        assert_eq!(second, Verdict { finding: yes("exact"), remembered: true });
        let changes: [fn(&mut Key); 5] = [
            |key| key.boot_id.push('x'),
            |key| key.sleeps.push('1'),
            |key| key.cpu.push('x'),
            |key| key.kernel_release.push('x'),
            |key| key.reprise_version.push('x'),
        ];
        for change in changes {
            let mut key = key();
            change(&mut key);
            let other = Memory { path: memory.path.clone(), key };
            let finding = decide_by(|| yes("there"), || no("wrong"), &other).finding;
            assert_eq!(finding, no("wrong"));
            // Which forgot what was kept.
            assert!(!memory.path.exists());
            memory.keep("exact");
        }
    }

    #[test]
    fn a_counter_that_is_gone_or_wrong_is_asked_each_time() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let memory = memory(&directory);
        memory.keep("exact");
        let gone = decide_by(|| no("forbidden"), never, &memory);
        assert_eq!(gone, Verdict { finding: no("forbidden"), remembered: false });
        assert_eq!(try_by(|| no("wrong"), &memory), no("wrong"));
        let cured = decide_by(|| yes("there"), || yes("exact"), &memory);
        assert!(cured.finding.available && !cured.remembered);
    }

    #[test]
    fn a_damaged_file_means_nothing() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let memory = memory(&directory);
        memory.keep("exact");
        let whole = fs::read(&memory.path).expect("it was kept");
        let mut damaged: Vec<Vec<u8>> = (0..whole.len()).map(|len| whole[..len].to_vec()).collect();
        damaged.extend([b"null".to_vec(), b"{}".to_vec(), vec![0xff; 40], vec![b' '; 1 << 20]]);
        for bytes in damaged {
            fs::write(&memory.path, &bytes).expect("write");
            assert_eq!(memory.recall(), None, "{:?}", String::from_utf8_lossy(&bytes));
        }
        fs::remove_file(&memory.path).expect("it is there");
        fs::create_dir(&memory.path).expect("a directory in its place");
        assert_eq!(memory.recall(), None);
        // Neither can it be written or removed then.
        memory.keep("exact");
        memory.forget();
        assert_eq!(memory.recall(), None);
    }

    #[test]
    fn a_place_that_cannot_be_written_means_nothing() {
        for path in ["/proc/nowhere/x.json", "/dev/null/x.json"] {
            let memory = Memory { path: PathBuf::from(path), key: key() };
            let verdict = decide_by(|| yes("there"), || yes("exact"), &memory);
            assert!(verdict.finding.available && !verdict.remembered, "{path}");
        }
    }

    #[test]
    fn a_host_that_does_not_tell_its_boot_remembers_nothing() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let key = Key { boot_id: String::new(), ..key() };
        let memory = Memory { key, ..memory(&directory) };
        memory.keep("exact");
        assert_eq!(memory.recall(), None);
    }

    #[test]
    fn this_host_is_decided_on_quickly() {
        let began = Instant::now();
        let verdict = decide();
        let took = began.elapsed();
        eprintln!("{} in {took:?}", verdict.finding);
        // What is aimed at is 300 ms; the machine may be busy.
        assert!(took < Duration::from_secs(3), "{took:?}");
    }
}
