//! The random numbers that a seed stands for: the same on every host and for ever.

/// SplitMix64, by the published constants.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The numbers of this seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any number.
    pub fn any(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ value >> 31
    }

    /// A number below `limit`, which is not zero.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.any() % limit
    }

    /// True once in so many times.
    pub fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// A distance whose mean is about `mean`, often short and sometimes long.
    pub fn around(&mut self, mean: u64) -> u64 {
        let longest = match self.below(4) {
            0 => mean / 8,
            1 => mean,
            2 => mean * 2,
            _ => mean * 4,
        };
        1 + self.below(longest.max(1))
    }
}
