//! One frame of a file of checkpoints.

use std::io::{self, Read, Seek, SeekFrom, Write};

use zstd::bulk::Decompressor;

/// Kind, payload length, CRC32C of the payload, CRC32C of those.
pub(super) const HEAD_BYTES: usize = 16;
/// The most bytes of a payload: the page table of the largest machine, and what an engine keeps.
pub(super) const MAX_PAYLOAD_BYTES: u64 = 64 << 20;

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FrameKind {
    /// Which recording it belongs to: first, and exactly once.
    Header,
    /// Pages that no frame before has.
    Pages,
    /// A checkpoint, whose pages all stand before it.
    Checkpoint,
}

const KINDS: [(FrameKind, [u8; 4]); 3] = [
    (FrameKind::Header, *b"HEAD"),
    (FrameKind::Pages, *b"PAGE"),
    (FrameKind::Checkpoint, *b"CKPT"),
];

/// Where a frame's payload lies, and what it has to be.
#[derive(Clone, Copy, Debug)]
pub(super) struct FramePlace {
    pub(super) kind: FrameKind,
    /// File offset of the frame.
    pub(super) offset: u64,
    pub(super) payload_bytes: u64,
    checksum: u32,
}

impl FramePlace {
    /// File offset of what follows the frame.
    pub(super) fn end(&self) -> u64 {
        self.offset + HEAD_BYTES as u64 + self.payload_bytes
    }

    /// Reads the payload; `None` if its checksum does not match.
    pub(super) fn payload(
        &self,
        input: &mut (impl Read + Seek + ?Sized),
    ) -> io::Result<Option<Vec<u8>>> {
        let mut payload = vec![0; self.payload_bytes as usize];
        input.seek(SeekFrom::Start(self.offset + HEAD_BYTES as u64))?;
        input.read_exact(&mut payload)?;
        Ok((crc32c::crc32c(&payload) == self.checksum).then_some(payload))
    }
}

/// What stands at a place in a file.
pub(super) enum Found {
    /// A frame whose head is sound, and that the file holds whole.
    Frame(FramePlace),
    /// The file ends before the frame does, or exactly here.
    CutShort,
    /// No frame.
    Fault,
}

/// Looks at the head of the frame at `offset` of a file of `file_bytes`.
pub(super) fn find(
    input: &mut (impl Read + Seek + ?Sized),
    offset: u64,
    file_bytes: u64,
) -> io::Result<Found> {
    let available = file_bytes.saturating_sub(offset);
    if available < HEAD_BYTES as u64 {
        return Ok(Found::CutShort);
    }
    let mut head = [0; HEAD_BYTES];
    input.seek(SeekFrom::Start(offset))?;
    input.read_exact(&mut head)?;
    let [kind @ .., l0, l1, l2, l3, p0, p1, p2, p3, h0, h1, h2, h3] = head;
    let payload_bytes = u64::from(u32::from_le_bytes([l0, l1, l2, l3]));
    let sound = u32::from_le_bytes([h0, h1, h2, h3]) == crc32c::crc32c(&head[..12]);
    let kind = KINDS.iter().find(|(_, name)| *name == kind);
    let (true, Some((kind, _))) = (sound && payload_bytes <= MAX_PAYLOAD_BYTES, kind) else {
        return Ok(Found::Fault);
    };
    let checksum = u32::from_le_bytes([p0, p1, p2, p3]);
    let place = FramePlace { kind: *kind, offset, payload_bytes, checksum };
    Ok(if place.end() > file_bytes { Found::CutShort } else { Found::Frame(place) })
}

/// Writes a frame in one write, and says how long it is.
pub(super) fn write(out: &mut impl Write, kind: FrameKind, payload: &[u8]) -> io::Result<u64> {
    if payload.len() as u64 > MAX_PAYLOAD_BYTES {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let (_, name) = KINDS.iter().find(|(one, _)| *one == kind).expect("all are listed");
    let mut frame = Vec::with_capacity(HEAD_BYTES + payload.len());
    frame.extend(name);
    frame.extend((payload.len() as u32).to_le_bytes());
    frame.extend(crc32c::crc32c(payload).to_le_bytes());
    frame.extend(crc32c::crc32c(&frame).to_le_bytes());
    frame.extend(payload);
    out.write_all(&frame)?;
    Ok(frame.len() as u64)
}

/// Decompresses to exactly so many bytes.
pub(super) fn decompress(stored: &[u8], raw_bytes: usize) -> Option<Vec<u8>> {
    let raw = Decompressor::new().and_then(|mut it| it.decompress(stored, raw_bytes)).ok()?;
    (raw.len() == raw_bytes).then_some(raw)
}
