//! Checkpoints as they are taken: the machine's thread copies what was written since the last one and
//! goes on; another thread hashes, compresses and writes.
//!
//! At most one checkpoint is under way, so at most one copy of guest RAM exists beside RAM itself. A
//! recording that comes to its next checkpoint earlier takes it later; a replay waits, so that it takes
//! its checkpoints at the same ticks every time.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use reprise_machine::checkpoint::{Checkpointer, Consistent, checkpoint};
use reprise_machine::engine::EngineError;
use reprise_trace::checkpoint::{CheckpointError, CheckpointWriter, MachineState, PAGE_BYTES};

/// A copy's memory is kept for the next one up to this many bytes: most are small, the first is not.
const KEPT_BYTES: usize = 32 << 20;

/// When checkpoints are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckpointEvery {
    /// At every multiple of so many ticks.
    Ticks(u64),
    /// Whenever so many nanoseconds of guest time have passed, where ticks do not tell them.
    GuestTime(u64),
}

/// What a machine does that comes to a checkpoint while the last one is still being written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenBusy {
    /// It runs on and takes the checkpoint later.
    Postpone,
    /// It waits.
    Wait,
}

/// What taking checkpoints came to.
#[derive(Debug, Default)]
pub struct CheckpointTotals {
    /// Checkpoints written.
    pub count: u64,
    /// Bytes of their whole file; zero if there is none.
    pub file_bytes: u64,
    /// The longest time for which one stopped the guest.
    pub longest_stop: Duration,
    /// Why no more were written, if that is so.
    pub failure: Option<CheckpointError>,
}

/// Guest RAM as it was.
#[derive(Default)]
struct Pages {
    addresses: Vec<u64>,
    bytes: Vec<u8>,
    /// Pages that hold zeros now.
    zeros: Vec<u64>,
}

impl Pages {
    fn take(&mut self, address: u64, page: &[u8]) {
        const ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];
        if *page == ZEROS {
            self.zeros.push(address);
        } else {
            self.addresses.push(address);
            self.bytes.extend_from_slice(page);
        }
    }

    fn clear(&mut self) {
        self.addresses.clear();
        self.bytes.clear();
        self.zeros.clear();
        if self.bytes.capacity() > KEPT_BYTES {
            self.bytes = Vec::new();
        }
    }
}

struct Snapshot {
    state: MachineState,
    pages: Pages,
}

/// Opens the file when the first checkpoint is there.
pub type OpenCheckpoints =
    Box<dyn FnOnce() -> Result<CheckpointWriter<File>, CheckpointError> + Send>;

/// The thread that writes checkpoints.
#[derive(Debug)]
pub struct CheckpointThread {
    thread: JoinHandle<CheckpointTotals>,
    longest_stop_ns: Arc<AtomicU64>,
}

/// Takes checkpoints on the machine's thread.
struct Taker {
    every: CheckpointEvery,
    when_busy: WhenBusy,
    /// Where there are checkpoints already.
    present: BTreeSet<u64>,
    due_tick: u64,
    due_ns: u64,
    queue: SyncSender<Snapshot>,
    /// Gives back memory when a checkpoint is written.
    returned: Receiver<Pages>,
    pages: Option<Pages>,
    /// The thread has failed.
    failed: bool,
    longest_stop_ns: Arc<AtomicU64>,
}

impl CheckpointThread {
    /// Starts the thread. `present` holds the ticks at which none is to be taken, because one is there;
    /// `file`, opened by `open` when the first one comes, gets those that are. Give the checkpointer to
    /// a machine.
    ///
    /// # Errors
    /// The host gives no thread.
    pub fn start(
        every: CheckpointEvery,
        when_busy: WhenBusy,
        present: BTreeSet<u64>,
        open: OpenCheckpoints,
    ) -> io::Result<(Box<dyn Checkpointer>, Self)> {
        // One waits at most, because the next is only taken when its memory has come back.
        let (queue, snapshots) = sync_channel(1);
        let (give_back, returned) = sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("checkpoint writer".to_owned())
            .spawn(move || write_snapshots(open, &snapshots, &give_back))?;
        let longest_stop_ns = Arc::new(AtomicU64::new(0));
        let mut taker = Taker {
            every,
            when_busy,
            present,
            due_tick: 0,
            due_ns: 0,
            queue,
            returned,
            pages: Some(Pages::default()),
            failed: false,
            longest_stop_ns: longest_stop_ns.clone(),
        };
        taker.schedule(0, 0);
        Ok((Box::new(taker), Self { thread, longest_stop_ns }))
    }

    /// Waits for the last checkpoint to be written. The machine has been taken apart, or this waits for
    /// ever.
    pub fn finish(self) -> CheckpointTotals {
        let totals = self.thread.join().unwrap_or_default();
        let longest_stop = Duration::from_nanos(self.longest_stop_ns.load(Ordering::Relaxed));
        CheckpointTotals { longest_stop, ..totals }
    }
}

impl Taker {
    /// Chooses the next checkpoint behind this moment.
    fn schedule(&mut self, tick: u64, virtual_ns: u64) {
        match self.every {
            CheckpointEvery::Ticks(every) => {
                let next = |tick: u64| (tick / every).saturating_add(1).saturating_mul(every);
                self.due_tick = next(tick);
                while self.present.contains(&self.due_tick) {
                    self.due_tick = next(self.due_tick);
                }
            }
            CheckpointEvery::GuestTime(every) => self.due_ns = virtual_ns.saturating_add(every),
        }
    }

    /// Whether there is memory for a copy, perhaps after waiting for it.
    fn has_memory(&mut self, wait: bool) -> bool {
        if self.pages.is_none() {
            let returned = match wait {
                true => self.returned.recv().map_err(Into::into),
                false => self.returned.try_recv(),
            };
            self.failed |= matches!(returned, Err(TryRecvError::Disconnected));
            self.pages = returned.ok();
        }
        self.pages.is_some()
    }
}

impl Checkpointer for Taker {
    fn due_at(&mut self, tick: u64, virtual_ns: u64) -> Option<u64> {
        let due = match self.every {
            CheckpointEvery::Ticks(_) => self.due_tick,
            CheckpointEvery::GuestTime(_) if virtual_ns >= self.due_ns => tick,
            CheckpointEvery::GuestTime(_) => return None,
        };
        if self.failed || due <= tick && !self.has_memory(self.when_busy == WhenBusy::Wait) {
            return None;
        }
        Some(due)
    }

    fn take(&mut self, machine: Consistent<'_>) -> Result<(), EngineError> {
        let tick = machine.tick();
        let Some(mut pages) = self.pages.take() else { return Ok(()) };
        if self.present.contains(&tick) {
            self.pages = Some(pages);
            self.schedule(tick, 0);
            return Ok(());
        }
        let started = Instant::now();
        let state = checkpoint(machine, &mut |address, page| pages.take(address, page))?;
        self.schedule(tick, state.virtual_ns);
        self.failed |= self.queue.send(Snapshot { state, pages }).is_err();
        let stopped_ns = started.elapsed().as_nanos() as u64;
        self.longest_stop_ns.fetch_max(stopped_ns, Ordering::Relaxed);
        Ok(())
    }
}

fn write_snapshots(
    open: OpenCheckpoints,
    snapshots: &Receiver<Snapshot>,
    give_back: &SyncSender<Pages>,
) -> CheckpointTotals {
    let mut totals = CheckpointTotals::default();
    let (mut open, mut writer) = (Some(open), None);
    for Snapshot { state, mut pages } in snapshots {
        if let Some(open) = open.take() {
            match open() {
                Ok(opened) => writer = Some(opened),
                Err(error) => totals.failure = Some(error),
            }
        }
        let Some(writer) = &mut writer else { break };
        if let Err(error) = write(writer, &state, &pages) {
            totals.failure = Some(error);
            break;
        }
        totals.count += 1;
        totals.file_bytes = writer.bytes();
        pages.clear();
        // The machine may be gone.
        let _ = give_back.send(pages);
    }
    if let Some(writer) = writer
        && let Err(error) = writer.get_ref().sync_data()
    {
        totals.failure.get_or_insert(CheckpointError::Write(error));
    }
    totals
}

fn write(
    writer: &mut CheckpointWriter<File>,
    state: &MachineState,
    pages: &Pages,
) -> Result<(), CheckpointError> {
    for address in &pages.zeros {
        writer.page(*address, &[0; PAGE_BYTES])?;
    }
    for (address, page) in pages.addresses.iter().zip(pages.bytes.chunks(PAGE_BYTES)) {
        writer.page(*address, page)?;
    }
    writer.checkpoint(state).map(drop)
}
