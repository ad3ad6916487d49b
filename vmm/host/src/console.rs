//! Where console output goes.

use std::fs::File;
use std::io::{self, Write};
use std::time::{Duration, Instant};

/// Output is pushed out when this much is waiting...
const BUFFER_BYTES: usize = 4096;
/// ... or when bytes come and the last push is this long ago, so that a person sees it flow.
const PUSH_INTERVAL: Duration = Duration::from_millis(20);

/// Where the guest's console output goes.
#[derive(Debug)]
pub enum ConsoleSink {
    /// Standard output.
    Stdout,
    /// A file.
    File(File),
    /// Nowhere.
    Discard,
}

/// Buffers console output and pushes it out in time.
#[derive(Debug)]
pub(crate) struct ConsoleOutput {
    sink: ConsoleSink,
    waiting: Vec<u8>,
    last_push: Instant,
    /// The first failure: output is dropped from then on. The recording is worth more than the
    /// screen, so the run goes on.
    failure: Option<io::Error>,
}

impl ConsoleOutput {
    pub(crate) fn new(sink: ConsoleSink) -> Self {
        let last_push = Instant::now();
        Self { sink, waiting: Vec::with_capacity(BUFFER_BYTES), last_push, failure: None }
    }

    /// Takes bytes, and pushes them out if it is time.
    pub(crate) fn write(&mut self, bytes: &[u8]) {
        if matches!(self.sink, ConsoleSink::Discard) || self.failure.is_some() {
            return;
        }
        self.waiting.extend_from_slice(bytes);
        if self.waiting.len() >= BUFFER_BYTES || self.last_push.elapsed() >= PUSH_INTERVAL {
            self.push();
        }
    }

    /// Pushes out what is waiting.
    pub(crate) fn push(&mut self) {
        if self.waiting.is_empty() {
            return;
        }
        let pushed = match &mut self.sink {
            ConsoleSink::Stdout => {
                let mut stdout = io::stdout().lock();
                stdout.write_all(&self.waiting).and_then(|()| stdout.flush())
            }
            ConsoleSink::File(file) => file.write_all(&self.waiting),
            ConsoleSink::Discard => Ok(()),
        };
        self.failure = pushed.err();
        self.waiting.clear();
        self.last_push = Instant::now();
    }

    /// Why output was lost, if it was.
    pub(crate) fn failure(&self) -> Option<&io::Error> {
        self.failure.as_ref()
    }
}

impl Drop for ConsoleOutput {
    fn drop(&mut self) {
        self.push();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_reaches_a_file_at_the_latest_when_dropped() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("console");
        let mut output = ConsoleOutput::new(ConsoleSink::File(File::create(&path).expect("file")));
        output.write(b"hello");
        output.write(&[b'x'; BUFFER_BYTES]);
        assert_eq!(std::fs::metadata(&path).expect("file").len(), BUFFER_BYTES as u64 + 5);
        output.write(b"end");
        drop(output);
        assert!(std::fs::read(&path).expect("file").ends_with(b"xend"));
    }

    #[test]
    fn a_failing_sink_is_reported_and_then_left_alone() {
        let full = File::options().write(true).open("/dev/full").expect("/dev/full");
        let mut output = ConsoleOutput::new(ConsoleSink::File(full));
        output.write(&[0; BUFFER_BYTES]);
        assert!(output.failure().is_some());
        output.write(&[0; BUFFER_BYTES]);
        assert!(output.waiting.is_empty());
    }
}
