//! The kernel that a bzImage unpacks (Documentation/arch/x86/boot.rst: `payload_offset`).

use std::io::{self, Read};

use crate::{SitesError, lz4};

/// File offset of the magic `HdrS`.
const MAGIC_OFFSET: usize = 0x202;
/// File offset of the number of setup sectors.
const SETUP_SECTORS_OFFSET: usize = 0x1f1;
/// File offset of the protocol's version; the payload's place is told from 2.08 on.
const VERSION_OFFSET: usize = 0x206;
const VERSION_WITH_PAYLOAD: u16 = 0x208;
/// File offsets of the payload's place and length.
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const SECTOR_BYTES: usize = 512;
/// No kernel is larger.
const MAX_KERNEL_BYTES: u64 = 256 << 20;

/// What LZ4's legacy frames begin with.
const LZ4_MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];

/// Unpacks a stream of one format.
type Unpack = for<'a> fn(&'a [u8]) -> io::Result<Box<dyn Read + 'a>>;

/// How a kernel may be packed: what the payload begins with, what it is called, and what unpacks it.
const FORMATS: &[(&[u8], &str, Option<Unpack>)] = &[
    (&[0x1f, 0x8b], "gzip", Some(|bytes| Ok(Box::new(flate2::read::GzDecoder::new(bytes))))),
    (
        &[0xfd, b'7', b'z', b'X', b'Z', 0],
        "xz",
        Some(|bytes| Ok(Box::new(liblzma::read::XzDecoder::new(bytes)))),
    ),
    (
        &[0x28, 0xb5, 0x2f, 0xfd],
        "zstd",
        // The length of what is unpacked stands behind the frame.
        Some(|bytes| Ok(Box::new(zstd::stream::read::Decoder::with_buffer(bytes)?.single_frame()))),
    ),
    (b"BZh", "bzip2", None),
    (&[0x5d, 0, 0], "lzma", None),
    (&[0x89, b'L', b'Z', b'O'], "lzo", None),
    (
        &LZ4_MAGIC,
        "lz4",
        Some(|bytes| {
            let unpacked = lz4::unpack(&bytes[LZ4_MAGIC.len()..], MAX_KERNEL_BYTES as usize)?;
            Ok(Box::new(io::Cursor::new(unpacked)))
        }),
    ),
    (b"\x7fELF", "nothing", Some(|bytes| Ok(Box::new(bytes)))),
];

/// What a bzImage is made of.
pub(crate) struct Payload<'f> {
    /// The kernel, unpacked.
    pub(crate) kernel: Vec<u8>,
    /// What unpacks it: the code before the payload, and behind it.
    pub(crate) stub: [&'f [u8]; 2],
}

/// The kernel in a bzImage; `None` of another file.
pub(crate) fn of_bz_image(file: &[u8]) -> Result<Option<Payload<'_>>, SitesError> {
    if file.get(MAGIC_OFFSET..MAGIC_OFFSET + 4) != Some(b"HdrS") {
        return Ok(None);
    }
    let damaged = SitesError::Damaged("setup header");
    let field = |at: usize| {
        let bytes = file.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map(u32::from_le_bytes).ok_or(damaged.clone())
    };
    if (field(VERSION_OFFSET)? as u16) < VERSION_WITH_PAYLOAD {
        return Err(SitesError::Packing("a boot protocol before 2.08"));
    }
    let sectors = match file[SETUP_SECTORS_OFFSET] {
        0 => 4,
        count => usize::from(count),
    };
    let code = (sectors + 1) * SECTOR_BYTES;
    let start = code + field(PAYLOAD_OFFSET)? as usize;
    let end = start.saturating_add(field(PAYLOAD_LENGTH)? as usize);
    let payload = file.get(start..end).ok_or(damaged)?;
    let (_, name, unpack) = FORMATS
        .iter()
        .find(|(magic, _, _)| payload.starts_with(magic))
        .ok_or(SitesError::Packing("something unknown"))?;
    let unpack = unpack.ok_or(SitesError::Packing(name))?;
    let mut kernel = Vec::new();
    unpack(payload)
        .and_then(|stream| stream.take(MAX_KERNEL_BYTES).read_to_end(&mut kernel))
        .map_err(|_| SitesError::Damaged("packed payload"))?;
    Ok(Some(Payload { kernel, stub: [&file[code..start], &file[end..]] }))
}
