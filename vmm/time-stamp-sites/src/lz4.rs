//! LZ4's legacy frames, as the kernel's build packs with `lz4 -l` (doc/lz4_Frame_format.md of LZ4): after
//! the magic number come blocks, each with its packed length, and each on its own.

use std::io;

/// The most that a block unpacks to.
const BLOCK_BYTES: usize = 8 << 20;
/// Unpacks the blocks behind the magic number, up to `limit` bytes. What is no block ends them: the kernel's
/// build appends the unpacked length.
pub(crate) fn unpack(mut packed: &[u8], limit: usize) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    let mut unpacked = vec![0; BLOCK_BYTES];
    while let Some((length, rest)) = packed.split_first_chunk() {
        let length = u32::from_le_bytes(*length) as usize;
        let Some((block, rest)) = rest.split_at_checked(length).filter(|_| length > 0) else {
            break;
        };
        let bytes = lz4_flex::block::decompress_into(block, &mut unpacked)
            .map_err(|_| io::ErrorKind::InvalidData)?;
        if out.len() + bytes > limit {
            return Err(io::ErrorKind::InvalidData.into());
        }
        out.extend_from_slice(&unpacked[..bytes]);
        packed = rest;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(block: &[u8]) -> Vec<u8> {
        let mut packed = (block.len() as u32).to_le_bytes().to_vec();
        packed.extend_from_slice(block);
        packed.extend_from_slice(&[0xff; 4]);
        packed
    }

    #[test]
    fn literals_matches_that_overlap_and_long_lengths() {
        // "ab", a match of 4 + 15 + 2 at distance 2, and "c".
        let block = [0x2f, b'a', b'b', 2, 0, 2, 0x10, b'c'];
        let expected = "ab".to_owned() + &"ab".repeat(10) + "a" + "c";
        assert_eq!(unpack(&framed(&block), 100).expect("it is sound"), expected.as_bytes());
    }

    #[test]
    fn what_is_damaged_is_refused() {
        for block in [&[0x10][..], &[0x20, b'a'], &[0x10, b'a', 2, 0], &[0x10, b'a', 0, 0], &[0xf0]]
        {
            assert!(unpack(&framed(block), 100).is_err(), "{block:?}");
        }
        assert!(unpack(&framed(&[0x20, b'a', b'b']), 1).is_err());
    }
}
