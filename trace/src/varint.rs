//! Variable-length integers: seven bits a byte, least significant first, the top bit set on all bytes
//! but the last. Signed differences are zigzag-coded first. A value has exactly one encoding.

/// The longest encoding of a `u64`, in bytes.
pub(crate) const MAX_VARINT_BYTES: usize = 10;

/// Appends `value`.
pub(crate) fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends the difference that leads from `previous` to `value`, modulo 2^64.
pub(crate) fn put_difference(out: &mut Vec<u8>, previous: u64, value: u64) {
    let difference = value.wrapping_sub(previous) as i64;
    put(out, ((difference << 1) ^ (difference >> 63)) as u64);
}

/// Why bytes could not be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TakeError {
    /// The bytes end too early.
    Short,
    /// A varint longer than its value needs, or than 64 bits.
    Varint,
}

/// Takes values from the front of a byte slice. Never reads past it and allocates nothing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Taker<'a> {
    rest: &'a [u8],
}

impl<'a> Taker<'a> {
    /// Starts at the front of `bytes`.
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// Bytes not taken yet.
    pub(crate) fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// The next `count` bytes.
    pub(crate) fn bytes(&mut self, count: u64) -> Result<&'a [u8], TakeError> {
        let count = usize::try_from(count).map_err(|_| TakeError::Short)?;
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(TakeError::Short)?;
        self.rest = rest;
        Ok(taken)
    }

    /// The next `N` bytes.
    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], TakeError> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(TakeError::Short)?;
        self.rest = rest;
        Ok(*taken)
    }

    /// The next byte.
    pub(crate) fn byte(&mut self) -> Result<u8, TakeError> {
        Ok(self.array::<1>()?[0])
    }

    /// The next eight bytes, little-endian.
    pub(crate) fn fixed_u64(&mut self) -> Result<u64, TakeError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// The next varint.
    pub(crate) fn varint(&mut self) -> Result<u64, TakeError> {
        let mut value = 0;
        for index in 0..MAX_VARINT_BYTES {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            let overflows = index == MAX_VARINT_BYTES - 1 && bits > 1;
            let overlong = index > 0 && byte == 0;
            if overflows || overlong {
                return Err(TakeError::Varint);
            }
            value |= bits << (7 * index);
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(TakeError::Varint)
    }

    /// The next zigzag-coded difference, applied to `previous` modulo 2^64.
    pub(crate) fn difference(&mut self, previous: u64) -> Result<u64, TakeError> {
        let coded = self.varint()?;
        let difference = (coded >> 1) as i64 ^ -((coded & 1) as i64);
        Ok(previous.wrapping_add(difference as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EDGES: [u64; 9] = [0, 1, 0x7f, 0x80, 0x3fff, 0x4000, u32::MAX as u64, 1 << 63, u64::MAX];

    #[test]
    fn every_edge_comes_back() {
        for value in EDGES {
            let mut bytes = Vec::new();
            put(&mut bytes, value);
            assert!(bytes.len() <= MAX_VARINT_BYTES);
            let mut taker = Taker::new(&bytes);
            assert_eq!(taker.varint(), Ok(value));
            assert_eq!(taker.remaining(), 0);
            for previous in EDGES {
                let mut bytes = Vec::new();
                put_difference(&mut bytes, previous, value);
                assert_eq!(Taker::new(&bytes).difference(previous), Ok(value));
            }
        }
    }

    #[test]
    fn small_differences_take_one_byte_either_way() {
        for (previous, value) in [(100, 163), (163, 100), (0, u64::MAX)] {
            let mut bytes = Vec::new();
            put_difference(&mut bytes, previous, value);
            assert_eq!(bytes.len(), 1, "{previous} to {value}");
        }
    }

    #[test]
    fn other_encodings_are_refused() {
        let cases: [(&[u8], TakeError); 5] = [
            (&[], TakeError::Short),
            (&[0x80], TakeError::Short),
            (&[0x80, 0x00], TakeError::Varint),
            (&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02], TakeError::Varint),
            (&[0x80; 11], TakeError::Varint),
        ];
        for (bytes, error) in cases {
            assert_eq!(Taker::new(bytes).varint(), Err(error), "{bytes:x?}");
        }
    }

    #[test]
    fn a_length_past_the_end_takes_nothing() {
        let mut taker = Taker::new(&[1, 2, 3]);
        assert_eq!(taker.bytes(u64::MAX), Err(TakeError::Short));
        assert_eq!(taker.bytes(4), Err(TakeError::Short));
        assert_eq!(taker.bytes(3), Ok(&[1u8, 2, 3][..]));
    }
}
