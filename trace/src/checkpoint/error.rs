//! Why checkpoints cannot be read or written.

use std::io;

use super::file::FORMAT_VERSION;

/// Why checkpoints cannot be read or written. The recording itself is not concerned.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// Writing failed.
    #[error("the checkpoints cannot be written: {0}; what was written before can be used")]
    Write(io::Error),
    /// An earlier write failed.
    #[error("the checkpoints are closed, because an earlier write failed")]
    Closed,
    /// Reading failed.
    #[error("the checkpoints cannot be read: {0}; see that their file is there and whole")]
    Read(io::Error),
    /// Some other file, or one cut off within its first bytes.
    #[error("the file holds no checkpoints: {ADVICE}")]
    Foreign,
    /// Another version of the format.
    #[error(
        "the checkpoints have format version {found}, and this Reprise reads {FORMAT_VERSION}: {ADVICE}"
    )]
    Version {
        /// The version in the file.
        found: u32,
    },
    /// The first frame is not sound.
    #[error("the checkpoints' header is damaged: {ADVICE}")]
    Header,
    /// Of another recording.
    #[error("the checkpoints belong to another recording: {ADVICE}")]
    OtherRecording,
    /// A frame is not sound, or does not hold what it should.
    #[error("the checkpoint at tick {tick} is damaged ({what} at byte {offset}): {ADVICE}")]
    Damaged {
        /// The checkpoint's tick.
        tick: u64,
        /// What.
        what: &'static str,
        /// The file offset of the frame.
        offset: u64,
    },
    /// Saved by another Reprise.
    #[error(
        "the checkpoint at tick {tick} has state version {found}, which this Reprise does not read: {ADVICE}"
    )]
    StateVersion {
        /// The checkpoint's tick.
        tick: u64,
        /// The version in the file.
        found: u16,
    },
    /// The frames are sound, but what they hold is not what was saved.
    #[error("the checkpoint at tick {tick} is not what was saved, its digest differs: {ADVICE}")]
    Digest {
        /// The checkpoint's tick.
        tick: u64,
    },
    /// No checkpoint of that number.
    #[error("there are {count} checkpoints, and none is numbered {index}")]
    NoSuch {
        /// What was asked for.
        index: usize,
        /// How many there are.
        count: usize,
    },
}

/// What to do about it.
const ADVICE: &str = "delete their file, and `reprise checkpoint` makes them anew";
