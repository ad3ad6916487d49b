//! In which ways simulated hardware is not exact.

/// How late the counter's overflow interrupts the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Skid {
    /// By any number of conditional branches up to this one, as Intel's.
    UpTo(u64),
    /// Mostly by up to `usual` branches; once in `seldom` times by ten times as many and more, as AMD's
    /// Zen.
    Unbounded {
        /// Conditional branches.
        usual: u64,
        /// Once in so many overflows.
        seldom: u64,
    },
}

/// What disturbs a simulated vCPU. Distances are mean numbers of instructions, `None` for never.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Disturbance {
    /// What all of it follows from.
    pub seed: u64,
    /// How late overflows are.
    pub skid: Skid,
    /// From kick to kick.
    pub kick_every: Option<u64>,
    /// From signal to signal that means nothing.
    pub signal_every: Option<u64>,
    /// From one forgetting of all translations to the next.
    pub forget_every: Option<u64>,
    /// From one accessed bit that is set early to the next.
    pub access_every: Option<u64>,
    /// Those accessed bits are left as they are, all else being as if they were set: where a guest then goes no
    /// other way, it was one of them that led it there.
    pub spares_accessed_bits: bool,
    /// From one branch that is counted too many to the next, as Zen has them unless its speculation past
    /// locks is switched off.
    pub overcount_every: Option<u64>,
    /// From one instruction that is refused, as KVM's emulator refuses what it does not know, to the next.
    pub refuse_every: Option<u64>,
    /// It is another maker's: flags that the architecture leaves undefined come out inverted.
    pub other_maker: bool,
    /// RDTSC reads a counter of its own, which no log has; else it reads zero.
    pub time_stamp_runs: bool,
}

impl Disturbance {
    /// None at all: the software CPU itself.
    pub fn none() -> Self {
        Self {
            seed: 0,
            skid: Skid::UpTo(0),
            kick_every: None,
            signal_every: None,
            forget_every: None,
            access_every: None,
            spares_accessed_bits: false,
            overcount_every: None,
            refuse_every: None,
            other_maker: false,
            time_stamp_runs: false,
        }
    }

    /// An Intel machine of this seed.
    pub fn intel(seed: u64) -> Self {
        Self {
            seed,
            skid: Skid::UpTo(100),
            kick_every: Some(20_000),
            signal_every: Some(70_000),
            forget_every: Some(50_000),
            access_every: Some(5_000),
            spares_accessed_bits: false,
            overcount_every: None,
            refuse_every: None,
            other_maker: false,
            time_stamp_runs: true,
        }
    }

    /// The same of another maker.
    pub fn of_other_maker(self) -> Self {
        Self { other_maker: true, ..self }
    }

    /// A Zen machine of this seed, with the cure for its overcount.
    pub fn zen(seed: u64) -> Self {
        Self { skid: Skid::Unbounded { usual: 1_000, seldom: 200 }, ..Self::intel(seed) }
    }
}
