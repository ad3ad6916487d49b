//! One frame of a recording: encoding, and decoding of bytes that nobody vouches for.

use std::io::{self, Read, Seek, SeekFrom};

use zstd::bulk::{Compressor, Decompressor};

use crate::varint::{MAX_VARINT_BYTES, TakeError, Taker, put};

/// The most bytes that a frame's payload has, compressed or not. Checked before anything is
/// allocated for it.
pub const MAX_FRAME_BYTES: u32 = 1 << 20;

/// Bytes of the chain value that a frame stores.
const STORED_CHAIN_BYTES: usize = 16;
/// What follows a frame's payload: CRC32C, then the chain value's first bytes.
const TRAILER_BYTES: usize = 4 + STORED_CHAIN_BYTES;
/// The longest head: a kind and three varints.
const MAX_HEAD_BYTES: usize = 1 + 3 * MAX_VARINT_BYTES;
/// zstd's default. Faster levels save nothing that shows at the log's sizes.
const COMPRESSION_LEVEL: i32 = 3;
/// For images, which are large and mostly compressed already: zstd's fastest levels but a few. The
/// default makes Debian's kernel and initramfs a tenth smaller and takes four times as long.
const IMAGE_COMPRESSION_LEVEL: i32 = -1;

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FrameKind {
    /// The header: first, and exactly once.
    Header,
    /// A piece of an image.
    Image,
    /// Records of the log.
    Log,
    /// The end of a recording that was closed.
    End,
    /// Where log frames lie; derived data behind the end.
    Index,
}

/// Kinds and the byte each has in a file.
const KINDS: [(FrameKind, u8); 5] = [
    (FrameKind::Header, b'H'),
    (FrameKind::Image, b'I'),
    (FrameKind::Log, b'L'),
    (FrameKind::End, b'E'),
    (FrameKind::Index, b'X'),
];

/// What is wrong with a frame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameFault {
    /// No such kind.
    #[error("{0:#04x} is no kind of frame")]
    UnknownKind(u8),
    /// A length in the frame's head is not a number, or not one that a frame can have.
    #[error("its head declares lengths that no frame has")]
    Lengths,
    /// It reaches past the end of a file that was closed.
    #[error("it reaches past the end of the file, which is otherwise complete")]
    PastEnd,
    /// The CRC32C does not match.
    #[error("its checksum does not match its bytes")]
    Checksum,
    /// The CRC32C matches, the chain value does not.
    #[error("it does not belong behind the frame before it: the recording was altered")]
    Chain,
    /// The payload does not decompress to what the head declares.
    #[error("its payload does not decompress to the declared length")]
    Compression,
    /// This kind of frame has no place here.
    #[error("a frame of this kind has no place here")]
    OutOfPlace,
    /// The end frame does not agree with what stands before it.
    #[error("the end frame does not agree with what stands before it")]
    Totals,
    /// The payload is not what its kind of frame holds.
    #[error("record {0} of the frame is malformed")]
    Record(u32),
}

/// Where and how a recording is damaged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("frame {frame} at byte {offset} is damaged: {fault}")]
pub struct Damage {
    /// The frame's number in the file, from 0, which is the header.
    pub frame: u64,
    /// The file offset of the frame's first byte.
    pub offset: u64,
    /// What is wrong with it.
    pub fault: FrameFault,
}

/// What stands before a frame's payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FrameHead {
    pub(crate) kind: FrameKind,
    /// Payload bytes after decompression.
    pub(crate) raw_bytes: u32,
    /// Payload bytes in the file; as many as `raw_bytes` where it is not compressed.
    pub(crate) stored_bytes: u32,
    /// [`FrameKind::Log`]: records. [`FrameKind::Image`]: the image's index. Else zero.
    pub(crate) count: u32,
}

impl FrameHead {
    fn encode(&self, out: &mut Vec<u8>) {
        let (_, byte) = KINDS.iter().find(|(kind, _)| *kind == self.kind).expect("all are listed");
        out.push(*byte);
        put(out, u64::from(self.raw_bytes));
        put(out, u64::from(self.stored_bytes));
        put(out, u64::from(self.count));
    }

    fn take(taker: &mut Taker<'_>) -> Result<Self, HeadError> {
        let byte = taker.byte()?;
        let (kind, _) = KINDS
            .iter()
            .find(|(_, listed)| *listed == byte)
            .ok_or(HeadError::Fault(FrameFault::UnknownKind(byte)))?;
        let raw_bytes = taker.varint()?;
        let stored_bytes = taker.varint()?;
        let count = taker.varint()?;
        let lengths_fit = stored_bytes <= raw_bytes
            && raw_bytes <= u64::from(MAX_FRAME_BYTES)
            && (stored_bytes > 0 || raw_bytes == 0);
        // A record takes at least one byte, so this also bounds what a reader makes of the frame.
        let count_fits = match kind {
            FrameKind::Log => (1..=raw_bytes).contains(&count),
            FrameKind::Image => count <= u64::from(u8::MAX),
            FrameKind::Header | FrameKind::End | FrameKind::Index => count == 0,
        };
        if !lengths_fit || !count_fits {
            return Err(HeadError::Fault(FrameFault::Lengths));
        }
        Ok(Self {
            kind: *kind,
            raw_bytes: raw_bytes as u32,
            stored_bytes: stored_bytes as u32,
            count: count as u32,
        })
    }
}

enum HeadError {
    Short,
    Fault(FrameFault),
}

impl From<TakeError> for HeadError {
    fn from(error: TakeError) -> Self {
        match error {
            TakeError::Short => Self::Short,
            TakeError::Varint => Self::Fault(FrameFault::Lengths),
        }
    }
}

/// The running BLAKE3 value that ties each frame to everything before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chain(pub(crate) [u8; 32]);

impl Chain {
    /// The value before the first frame, from the bytes before it.
    pub(crate) fn start(preamble: &[u8]) -> Self {
        Self(*blake3::hash(preamble).as_bytes())
    }

    /// The value after a frame of these head and payload bytes.
    fn next(&self, head: &[u8], payload: &[u8]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.0).update(head).update(payload);
        Self(*hasher.finalize().as_bytes())
    }

    fn stored(&self) -> &[u8] {
        &self.0[..STORED_CHAIN_BYTES]
    }
}

/// Makes frames and carries the chain from one to the next.
pub(crate) struct FrameEncoder {
    compressor: Compressor<'static>,
    chain: Chain,
}

impl FrameEncoder {
    pub(crate) fn new(chain: Chain) -> io::Result<Self> {
        Ok(Self { compressor: Compressor::new(COMPRESSION_LEVEL)?, chain })
    }

    /// The chain value after the last frame.
    pub(crate) fn chain(&self) -> Chain {
        self.chain
    }

    /// A whole frame, ready to be written. `raw` is at most [`MAX_FRAME_BYTES`] long: the caller
    /// sees to it.
    pub(crate) fn encode(
        &mut self,
        kind: FrameKind,
        count: u32,
        raw: &[u8],
    ) -> io::Result<Vec<u8>> {
        debug_assert!(raw.len() <= MAX_FRAME_BYTES as usize);
        self.compressor.set_compression_level(match kind {
            FrameKind::Image => IMAGE_COMPRESSION_LEVEL,
            _ => COMPRESSION_LEVEL,
        })?;
        let compressed = self.compressor.compress(raw)?;
        let payload = if compressed.len() < raw.len() { &compressed[..] } else { raw };
        let head = FrameHead {
            kind,
            raw_bytes: raw.len() as u32,
            stored_bytes: payload.len() as u32,
            count,
        };
        let mut frame = Vec::with_capacity(MAX_HEAD_BYTES + payload.len() + TRAILER_BYTES);
        head.encode(&mut frame);
        self.chain = self.chain.next(&frame, payload);
        frame.extend_from_slice(payload);
        let checksum = crc32c::crc32c(&frame);
        frame.extend_from_slice(&checksum.to_le_bytes());
        frame.extend_from_slice(self.chain.stored());
        Ok(frame)
    }
}

/// A frame whose checksum and chain value are right.
pub(crate) struct Frame {
    pub(crate) head: FrameHead,
    payload: Vec<u8>,
}

impl Frame {
    /// The payload, decompressed.
    pub(crate) fn into_raw(self) -> Result<Vec<u8>, FrameFault> {
        if self.head.stored_bytes == self.head.raw_bytes {
            return Ok(self.payload);
        }
        let raw_bytes = self.head.raw_bytes as usize;
        let raw = Decompressor::new()
            .and_then(|mut decompressor| decompressor.decompress(&self.payload, raw_bytes))
            .map_err(|_| FrameFault::Compression)?;
        if raw.len() == raw_bytes { Ok(raw) } else { Err(FrameFault::Compression) }
    }
}

/// What stands at a place in a file.
pub(crate) enum Found {
    /// A whole, sound frame.
    Frame(Frame),
    /// The file ends before the frame does, or exactly here.
    CutShort,
    /// A frame that is not to be used.
    Fault(FrameFault),
}

/// A place in a file from which frames are read one after the other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FrameCursor {
    /// File offset of the next frame.
    pub(crate) offset: u64,
    /// Where the file, or the part of it to read, ends.
    pub(crate) end: u64,
    /// The next frame's number in the file.
    pub(crate) frame: u64,
    /// The chain value before it.
    pub(crate) chain: Chain,
}

impl FrameCursor {
    /// Reads and checks the next frame, and moves past it if it is sound.
    pub(crate) fn read(&mut self, input: &mut (impl Read + Seek + ?Sized)) -> io::Result<Found> {
        let available = self.end.saturating_sub(self.offset);
        input.seek(SeekFrom::Start(self.offset))?;
        let mut head_bytes = [0; MAX_HEAD_BYTES];
        let head_bytes = &mut head_bytes[..available.min(MAX_HEAD_BYTES as u64) as usize];
        input.read_exact(head_bytes)?;
        let mut taker = Taker::new(head_bytes);
        let head = match FrameHead::take(&mut taker) {
            Ok(head) => head,
            Err(HeadError::Short) => return Ok(Found::CutShort),
            Err(HeadError::Fault(fault)) => return Ok(Found::Fault(fault)),
        };
        let head_bytes = &head_bytes[..head_bytes.len() - taker.remaining()];
        let body_bytes = head.stored_bytes as usize + TRAILER_BYTES;
        let frame_bytes = (head_bytes.len() + body_bytes) as u64;
        if frame_bytes > available {
            return Ok(Found::CutShort);
        }
        let mut body = vec![0; body_bytes];
        input.seek(SeekFrom::Start(self.offset + head_bytes.len() as u64))?;
        input.read_exact(&mut body)?;
        let trailer = body.split_off(head.stored_bytes as usize);
        let (checksum, stored_chain) = trailer.split_at(4);
        let computed = crc32c::crc32c_append(crc32c::crc32c(head_bytes), &body);
        if computed.to_le_bytes() != checksum {
            return Ok(Found::Fault(FrameFault::Checksum));
        }
        let chain = self.chain.next(head_bytes, &body);
        if chain.stored() != stored_chain {
            return Ok(Found::Fault(FrameFault::Chain));
        }
        self.offset += frame_bytes;
        self.frame += 1;
        self.chain = chain;
        Ok(Found::Frame(Frame { head, payload: body }))
    }

    /// Damage of the next frame.
    pub(crate) fn damage(&self, fault: FrameFault) -> Damage {
        Damage { frame: self.frame, offset: self.offset, fault }
    }
}
