//! Starts the product's binary, waits for it no longer than a test may take, and holds every run of
//! it to what no run may do: panic, die of a signal that nobody sent, hang.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// The product.
pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_reprise-under-test");
/// The longest that a run may take before it counts as hung. Machines that run tests are loaded.
const TIME_LIMIT: Duration = Duration::from_secs(240);

/// The numbers of the signals that tests send.
pub(crate) const SIGKILL: i32 = 9;

/// A run to be started.
pub(crate) struct Invocation {
    command: Command,
    what: String,
}

/// A run that has been started.
pub(crate) struct Running {
    child: Child,
    stdout: File,
    stderr: File,
    what: String,
}

/// A run that has ended.
pub(crate) struct Finished {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
    what: String,
}

/// The product with these arguments, its standard input empty.
pub(crate) fn reprise<S: AsRef<str>>(arguments: &[S]) -> Invocation {
    Invocation::of(Command::new(BINARY), arguments)
}

/// The product with these arguments, started by a shell after `setup`, which may set limits.
pub(crate) fn reprise_after<S: AsRef<str>>(setup: &str, arguments: &[S]) -> Invocation {
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(format!("{setup}; exec \"$0\" \"$@\"")).arg(BINARY);
    Invocation::of(shell, arguments)
}

/// Runs the product with these arguments to its end.
pub(crate) fn run<S: AsRef<str>>(arguments: &[S]) -> Finished {
    reprise(arguments).start().finish()
}

impl Invocation {
    fn of<S: AsRef<str>>(mut command: Command, arguments: &[S]) -> Self {
        let shown: Vec<String> = arguments.iter().map(|word| shortened(word.as_ref())).collect();
        command.args(arguments.iter().map(AsRef::as_ref)).stdin(Stdio::null());
        Self { command, what: format!("reprise {}", shown.join(" ")) }
    }

    pub(crate) fn in_directory(mut self, directory: &Path) -> Self {
        self.command.current_dir(directory);
        self
    }

    pub(crate) fn with_variable(mut self, name: &str, value: &Path) -> Self {
        self.command.env(name, value);
        self
    }

    /// The run's standard input is a pipe; see [`Running::keyboard`].
    pub(crate) fn with_keyboard(mut self) -> Self {
        self.command.stdin(Stdio::piped());
        self
    }

    pub(crate) fn start(mut self) -> Running {
        let stdout = tempfile::tempfile().expect("a temporary file");
        let stderr = tempfile::tempfile().expect("a temporary file");
        let other_end = |file: &File| Stdio::from(file.try_clone().expect("a descriptor"));
        self.command.stdout(other_end(&stdout)).stderr(other_end(&stderr));
        let child = self.command.spawn().expect("the product starts");
        Running { child, stdout, stderr, what: self.what }
    }
}

impl Running {
    /// What is typed into the run, if it was started with a keyboard.
    pub(crate) fn keyboard(&mut self) -> ChildStdin {
        self.child.stdin.take().expect("started with a keyboard")
    }

    /// The process's number.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal, by `kill`'s name for it or its number.
    pub(crate) fn signal(&self, signal: &str) {
        let status = Command::new("kill")
            .args([format!("-{signal}"), self.child.id().to_string()])
            .status()
            .expect("kill starts");
        assert!(status.success(), "{} had ended before it got {signal}", self.what);
    }

    /// Waits until `condition` holds. Panics if the run ends before.
    pub(crate) fn wait_until(&mut self, what: &str, mut condition: impl FnMut() -> bool) {
        let deadline = Instant::now() + TIME_LIMIT;
        while !condition() {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                panic!("{} ended ({status}) before {what}: {}", self.what, text(&mut self.stderr));
            }
            assert!(Instant::now() < deadline, "{}: not within {TIME_LIMIT:?}: {what}", self.what);
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits for its end, however that comes.
    pub(crate) fn wait(mut self) -> Finished {
        let deadline = Instant::now() + TIME_LIMIT;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                break status;
            }
            assert!(
                Instant::now() < deadline,
                "{} has not ended within {TIME_LIMIT:?}: {}",
                self.what,
                text(&mut self.stderr)
            );
            std::thread::sleep(Duration::from_millis(3));
        };
        let stdout = bytes(&mut self.stdout);
        let stderr = text(&mut self.stderr);
        let what = std::mem::take(&mut self.what);
        for sign in ["panicked", "internal error", "RUST_BACKTRACE"] {
            assert!(!stderr.contains(sign), "{what}: {stderr}");
        }
        Finished { status, stdout, stderr, what }
    }

    /// Waits for its end, which must not be by a signal.
    pub(crate) fn finish(self) -> Finished {
        let finished = self.wait();
        let signal = finished.status.signal();
        assert_eq!(signal, None, "{}: {}", finished.what, finished.stderr);
        finished
    }
}

impl Drop for Running {
    /// A test that fails leaves nothing behind that runs on.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Finished {
    pub(crate) fn code(&self) -> i32 {
        self.status.code().unwrap_or(-1)
    }

    /// Panics unless it ended with this exit status.
    pub(crate) fn expect_code(self, code: i32) -> Self {
        assert_eq!(self.code(), code, "{}: {}", self.what, self.stderr);
        self
    }

    /// The one JSON object that standard output must be.
    pub(crate) fn json(&self) -> Value {
        let value: Value = serde_json::from_slice(&self.stdout).unwrap_or_else(|error| {
            let stdout = String::from_utf8_lossy(&self.stdout);
            panic!("{}: {error} in {stdout:?}; {}", self.what, self.stderr)
        });
        assert!(value.is_object(), "{}: {value}", self.what);
        value
    }

    /// The one line of a failure: exit status 1, nothing else on standard error.
    pub(crate) fn expect_reason(&self) -> &str {
        assert_eq!(self.code(), 1, "{}: {}", self.what, self.stderr);
        let reason = self.stderr.strip_suffix('\n').unwrap_or(&self.stderr);
        let prefix = "reprise: ";
        assert!(reason.starts_with(prefix), "{}: {reason:?}", self.what);
        assert!(reason.len() > prefix.len() + 10, "{}: {reason:?} says little", self.what);
        assert!(!reason.contains('\n'), "{}: not one line: {reason}", self.what);
        reason
    }
}

/// A directory of this test's own, and paths in it as arguments.
pub(crate) struct Workplace(TempDir);

impl Workplace {
    pub(crate) fn new() -> Self {
        Self(TempDir::with_prefix("reprise-test-").expect("a temporary directory"))
    }

    pub(crate) fn directory(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().expect("temporary paths are text").to_owned()
    }

    /// Writes a file and gives its path.
    pub(crate) fn file(&self, name: &str, contents: impl AsRef<[u8]>) -> String {
        let path = self.path(name);
        std::fs::write(&path, contents).expect("a file in a temporary directory");
        path
    }
}

/// Records with `arguments` into `file`, and gives the report of a recording that ended with `code`.
pub(crate) fn record(arguments: &[&str], file: &str, code: i32) -> Value {
    let words = [&["--json", "record"], arguments, &["-o", file]].concat();
    run(&words).expect_code(code).json()
}

/// Replays `file` with `arguments` beside, and gives the report of a replay that is verified.
pub(crate) fn replay(file: &str, arguments: &[&str]) -> Value {
    let replayed = run(&[&["--json", "replay", file], arguments].concat()).expect_code(0).json();
    assert_eq!(replayed["verified"], true, "{replayed:#}");
    assert!(replayed["divergence"].is_null() && replayed["damage"].is_null(), "{replayed:#}");
    replayed
}

/// Holds a replay to its recording: every field that a replay must give again.
#[track_caller]
pub(crate) fn assert_equal_runs(recorded: &Value, replayed: &Value) {
    assert!(recorded["final_digest"].is_string(), "{recorded:#}");
    let fields = [
        "final_digest",
        "console_digest",
        "console_bytes",
        "ticks",
        "instructions",
        "events",
        "ending",
        "ending_detail",
        "engine",
        "clock",
        "interrupts",
    ];
    for field in fields {
        assert_eq!(recorded[field], replayed[field], "{field}: {recorded:#} {replayed:#}");
    }
    assert_eq!(replayed["complete"], true, "{replayed:#}");
}

/// Records with `arguments` and replays; the recording's report.
#[track_caller]
pub(crate) fn record_and_replay(arguments: &[&str]) -> Value {
    let workplace = Workplace::new();
    let file = workplace.path("recording.rr");
    let recorded = record(arguments, &file, 0);
    assert_equal_runs(&recorded, &replay(&file, &[]));
    recorded
}

/// The console output that a replay gives.
pub(crate) fn replayed_console(file: &str, arguments: &[&str]) -> String {
    let words = [&["--json", "replay", "--show-console", file], arguments].concat();
    let finished = run(&words).expect_code(0);
    finished.stderr
}

/// Where tests keep what is expensive to make.
pub(crate) fn kept_directory() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
}

fn bytes(file: &mut File) -> Vec<u8> {
    let mut bytes = Vec::new();
    file.rewind().and_then(|()| file.read_to_end(&mut bytes)).expect("a temporary file reads");
    bytes
}

fn text(file: &mut File) -> String {
    String::from_utf8_lossy(&bytes(file)).into_owned()
}

/// An argument as a failure shows it.
fn shortened(word: &str) -> String {
    match word.char_indices().nth(80) {
        Some((at, _)) => format!("{}...", &word[..at]),
        None => word.to_owned(),
    }
}
