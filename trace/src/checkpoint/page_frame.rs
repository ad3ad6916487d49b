//! Frames of pages: a few pages are compressed as one, and all of them are read for any of them.

use std::io::{self, Read};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;

use zstd::bulk::Compressor;

use super::frame::{self, FramePlace};
use super::page_table::Entry;
use super::state::{RamDigest, page_digest};
use super::{CheckpointError, PAGE_BYTES};
use crate::contents::{SharedInput, lock};

/// Pages of one frame, at most.
const FRAME_PAGES: usize = 64;
/// zstd's level: pages come in gigabytes.
const LEVEL: i32 = -3;
/// Frames decompressed ahead of the one that is put in its place.
const FRAMES_AHEAD: usize = 8;

/// The pages of the next frame.
pub(super) struct PendingPages {
    compressor: Compressor<'static>,
    bytes: Vec<u8>,
}

impl PendingPages {
    pub(super) fn new() -> io::Result<Self> {
        let bytes = Vec::with_capacity(FRAME_PAGES * PAGE_BYTES);
        Ok(Self { compressor: Compressor::new(LEVEL)?, bytes })
    }

    pub(super) fn add(&mut self, page: &[u8]) {
        self.bytes.extend_from_slice(page);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(super) fn is_full(&self) -> bool {
        self.bytes.len() == FRAME_PAGES * PAGE_BYTES
    }

    /// The payload of their frame.
    pub(super) fn payload(&mut self) -> io::Result<Vec<u8>> {
        let mut payload = vec![(self.bytes.len() / PAGE_BYTES) as u8];
        let compressed = self.compressor.compress(&self.bytes)?;
        let stored = if compressed.len() < self.bytes.len() { &compressed } else { &self.bytes };
        payload.extend_from_slice(stored);
        Ok(payload)
    }

    /// The frame is written.
    pub(super) fn clear(&mut self) {
        self.bytes.clear();
    }
}

/// A frame of pages in a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct PageFrame {
    place: FramePlace,
    pub(super) first_id: u64,
    pub(super) count: usize,
}

impl PageFrame {
    /// The frame at a place, where `input` stands at its payload; `None` if it can be none.
    pub(super) fn find(
        input: &mut impl Read,
        place: FramePlace,
        first_id: u64,
    ) -> io::Result<Option<Self>> {
        let mut count = [0];
        input.read_exact(&mut count)?;
        let count = usize::from(count[0]);
        let can_be = place.payload_bytes >= 2 && (1..=FRAME_PAGES).contains(&count);
        Ok(can_be.then_some(Self { place, first_id, count }))
    }

    /// Reads and decompresses its pages.
    pub(super) fn read(&self, input: &SharedInput) -> Result<Pages, PageFault> {
        let offset = self.place.offset;
        let damaged = |what| PageFault::Damaged { what, offset };
        let payload = self.place.payload(&mut *lock(input)).map_err(PageFault::Read)?;
        let payload = payload.ok_or_else(|| damaged("a checksum of pages does not match"))?;
        let (stored, raw_bytes) = (&payload[1..], self.count * PAGE_BYTES);
        let bytes = match stored.len() == raw_bytes {
            true => stored.to_vec(),
            false => frame::decompress(stored, raw_bytes)
                .ok_or_else(|| damaged("its pages do not decompress"))?,
        };
        let digests: Option<Vec<_>> = bytes.chunks(PAGE_BYTES).map(page_digest).collect();
        let digests = digests.ok_or_else(|| damaged("a page of zeros has no place in it"))?;
        Ok(Pages { bytes, digests })
    }
}

/// The pages of a frame.
pub(super) struct Pages {
    bytes: Vec<u8>,
    pub(super) digests: Vec<[u8; 32]>,
}

/// Why a frame of pages cannot be used.
pub(super) enum PageFault {
    Read(io::Error),
    Damaged { what: &'static str, offset: u64 },
}

impl PageFault {
    /// As the error of the checkpoint that needs the pages.
    fn at(self, tick: u64) -> CheckpointError {
        match self {
            Self::Read(error) => CheckpointError::Read(error),
            Self::Damaged { what, offset } => CheckpointError::Damaged { tick, what, offset },
        }
    }
}

/// Reads the pages of a checkpoint's table on several threads, places them on this one, and gives the digest of
/// the RAM that they make.
pub(super) fn load_ram(
    input: &SharedInput,
    frames: &[PageFrame],
    tick: u64,
    entries: &[Entry],
    place: &mut dyn FnMut(u64, &[u8]) -> bool,
) -> Result<[u8; 32], CheckpointError> {
    let mut by_id: Vec<usize> = (0..entries.len()).collect();
    by_id.sort_by_key(|&at| entries[at].id);
    let frame_of = |at: usize| {
        let id = u64::from(entries[at].id);
        frames.partition_point(|frame| frame.first_id <= id) - 1
    };
    let jobs: Vec<&[usize]> =
        by_id.chunk_by(|&one, &next| frame_of(one) == frame_of(next)).collect();
    let mut digests = vec![[0; 32]; entries.len()];
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(jobs.len());
    let next_job = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let (done, results) = sync_channel(FRAMES_AHEAD);
        for _ in 0..workers {
            let (done, next_job, jobs) = (done.clone(), &next_job, &jobs);
            scope.spawn(move || {
                while let Some(&job) = jobs.get(next_job.fetch_add(1, Ordering::Relaxed)) {
                    let frame = frames[frame_of(job[0])];
                    let read = frame.read(input);
                    // Nobody listens any more once something has failed.
                    if done.send((job, frame, read)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(done);
        for (job, frame, read) in results {
            let pages = read.map_err(|fault| fault.at(tick))?;
            for &at in job {
                let number = (u64::from(entries[at].id) - frame.first_id) as usize;
                let page = &pages.bytes[number * PAGE_BYTES..][..PAGE_BYTES];
                if !place(entries[at].address(), page) {
                    return Err(CheckpointError::Digest { tick });
                }
                digests[at] = pages.digests[number];
            }
        }
        Ok(())
    })?;
    let mut ram = RamDigest::default();
    for (entry, digest) in entries.iter().zip(&digests) {
        ram.page(entry.address(), digest);
    }
    Ok(ram.finish())
}
