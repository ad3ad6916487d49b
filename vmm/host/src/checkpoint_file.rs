//! Checkpoints as they are taken: the machine's thread copies what was written since the last one, a
//! little at each boundary, and another thread hashes, compresses and writes.
//!
//! Copies go from one to the other in a few pieces of memory that come back, so a guest that writes
//! faster than the disk has its checkpoints later, and memory stays bounded. A recording that comes to
//! its next checkpoint before the last one is complete takes it later; a replay waits, so that it takes
//! its checkpoints at the same ticks every time.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use reprise_machine::checkpoint::{Checkpointer, Consistent, start_checkpoint};
use reprise_machine::engine::EngineError;
use reprise_trace::checkpoint::{CheckpointError, CheckpointWriter, MachineState, PAGE_BYTES};

/// Pages of one piece of memory, and so copied at one boundary: a millisecond's work.
const PIECE_PAGES: usize = 512;
/// Pieces of memory.
const PIECES: usize = 16;

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

/// Some of guest RAM as it was.
struct Piece {
    addresses: Vec<u64>,
    bytes: Vec<u8>,
    /// Pages that hold zeros now.
    zeros: Vec<u64>,
}

impl Piece {
    fn new() -> Self {
        let (addresses, zeros) = (Vec::with_capacity(PIECE_PAGES), Vec::new());
        Self { addresses, bytes: Vec::with_capacity(PIECE_PAGES * PAGE_BYTES), zeros }
    }

    fn take(&mut self, address: u64, page: &[u8]) {
        const ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];
        if *page == ZEROS {
            self.zeros.push(address);
        } else {
            self.addresses.push(address);
            self.bytes.extend_from_slice(page);
        }
    }

    fn pages(&self) -> usize {
        self.addresses.len() + self.zeros.len()
    }

    fn clear(&mut self) {
        self.addresses.clear();
        self.bytes.clear();
        self.zeros.clear();
    }
}

enum Job {
    Pages(Piece),
    /// The checkpoint's pages have all been given.
    Complete(Box<MachineState>),
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
    queue: SyncSender<Job>,
    /// Gives back memory that has been written.
    returned: Receiver<Piece>,
    /// Memory that is here, the last piece being filled.
    pieces: Vec<Piece>,
    /// Pieces that exist.
    piece_count: usize,
    /// The state of the checkpoint under way.
    state: Option<Box<MachineState>>,
    /// The thread has failed.
    failed: bool,
    /// When the machine began to do what it does for a checkpoint now.
    stopped_at: Instant,
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
        // Whatever is sent finds room: every checkpoint sends a piece before it is complete.
        let (queue, jobs) = sync_channel(2 * PIECES + 2);
        let (give_back, returned) = sync_channel(PIECES);
        let thread = std::thread::Builder::new()
            .name("checkpoint writer".to_owned())
            .spawn(move || write_jobs(open, &jobs, &give_back))?;
        let longest_stop_ns = Arc::new(AtomicU64::new(0));
        let mut taker = Taker {
            every,
            when_busy,
            present,
            due_tick: 0,
            due_ns: 0,
            queue,
            returned,
            pieces: Vec::new(),
            piece_count: 0,
            state: None,
            failed: false,
            stopped_at: Instant::now(),
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

    /// The piece to be filled next; `None` if all are on their way and none is waited for.
    fn piece(&mut self, wait: bool) -> Option<&mut Piece> {
        if self.pieces.is_empty() && self.piece_count < PIECES {
            self.piece_count += 1;
            self.pieces.push(Piece::new());
        }
        if self.pieces.is_empty() {
            let returned = match wait {
                true => self.returned.recv().map_err(Into::into),
                false => self.returned.try_recv(),
            };
            match returned {
                Ok(piece) => self.pieces.push(piece),
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => {
                    // The thread has gone, and says why: what is copied from here on goes nowhere.
                    self.failed = true;
                    self.pieces.push(Piece::new());
                }
            }
        }
        self.pieces.last_mut()
    }

    fn make_room(&mut self, wait: bool) -> usize {
        if self.pieces.last().is_some_and(|piece| piece.pages() >= PIECE_PAGES) {
            self.send_piece();
        }
        self.piece(wait).map_or(0, |piece| PIECE_PAGES - piece.pages())
    }

    /// Hands the last piece over.
    fn send_piece(&mut self) {
        let Some(mut piece) = self.pieces.pop() else { return };
        if self.failed {
            piece.clear();
            self.pieces.push(piece);
        } else {
            self.failed |= self.queue.send(Job::Pages(piece)).is_err();
        }
    }

    fn note_stop(&self) {
        let stopped_ns = self.stopped_at.elapsed().as_nanos() as u64;
        self.longest_stop_ns.fetch_max(stopped_ns, Ordering::Relaxed);
    }
}

impl Checkpointer for Taker {
    fn due_at(&mut self, tick: u64, virtual_ns: u64) -> Option<u64> {
        match self.every {
            _ if self.failed => None,
            CheckpointEvery::Ticks(_) => Some(self.due_tick),
            CheckpointEvery::GuestTime(_) => (virtual_ns >= self.due_ns).then_some(tick),
        }
    }

    fn start(&mut self, machine: Consistent<'_>) -> Result<bool, EngineError> {
        let tick = machine.tick();
        if self.present.contains(&tick) {
            self.schedule(tick, 0);
            return Ok(false);
        }
        self.stopped_at = Instant::now();
        let state = start_checkpoint(machine, &mut |address, page| {
            // An engine that cannot keep RAM as it is has to be waited for.
            self.make_room(true);
            self.page(address, page);
        })?;
        self.schedule(tick, state.virtual_ns);
        self.state = Some(Box::new(state));
        self.note_stop();
        Ok(true)
    }

    fn room(&mut self, at_once: bool) -> usize {
        self.stopped_at = Instant::now();
        self.make_room(at_once || self.when_busy == WhenBusy::Wait)
    }

    fn page(&mut self, address: u64, page: &[u8]) {
        if let Some(piece) = self.piece(true) {
            piece.take(address, page);
        }
        self.note_stop();
    }

    fn complete(&mut self) {
        self.send_piece();
        if let Some(state) = self.state.take() {
            self.failed |= self.queue.send(Job::Complete(state)).is_err();
        }
    }
}

fn write_jobs(
    open: OpenCheckpoints,
    jobs: &Receiver<Job>,
    give_back: &SyncSender<Piece>,
) -> CheckpointTotals {
    let mut totals = CheckpointTotals::default();
    totals.failure = write_all(open, jobs, give_back, &mut totals).err();
    totals
}

fn write_all(
    open: OpenCheckpoints,
    jobs: &Receiver<Job>,
    give_back: &SyncSender<Piece>,
    totals: &mut CheckpointTotals,
) -> Result<(), CheckpointError> {
    let Ok(first) = jobs.recv() else { return Ok(()) };
    let mut writer = open()?;
    for job in std::iter::once(first).chain(jobs) {
        match job {
            Job::Pages(mut piece) => {
                for address in &piece.zeros {
                    writer.page(*address, &[0; PAGE_BYTES])?;
                }
                for (address, page) in piece.addresses.iter().zip(piece.bytes.chunks(PAGE_BYTES)) {
                    writer.page(*address, page)?;
                }
                piece.clear();
                // The machine may be gone.
                let _ = give_back.send(piece);
            }
            Job::Complete(state) => {
                writer.checkpoint(&state)?;
                totals.count += 1;
                totals.file_bytes = writer.bytes();
            }
        }
    }
    writer.get_ref().sync_data().map_err(CheckpointError::Write)
}
