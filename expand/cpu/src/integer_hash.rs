//! A hash for integers that no adversary gains by choosing: addresses, and places in a page.

use std::hash::{BuildHasherDefault, Hasher};

/// What a `HashMap` with integer keys is built with.
pub(crate) type IntegerHash = BuildHasherDefault<IntegerHasher>;

/// Fibonacci hashing: 2^64 over the golden ratio.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct IntegerHasher(u64);

impl Hasher for IntegerHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u16(&mut self, value: u16) {
        self.write_u64(u64::from(value));
    }

    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}
