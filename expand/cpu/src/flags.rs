//! RFLAGS, split in two: the six arithmetic flags in the form that LAHF and SETO give, so that
//! native sequences load and save them in a few cycles, and everything else.

/// Carry.
pub(crate) const CF: u64 = 1 << 0;
/// Parity.
pub(crate) const PF: u64 = 1 << 2;
/// Auxiliary carry.
pub(crate) const AF: u64 = 1 << 4;
/// Zero.
pub(crate) const ZF: u64 = 1 << 6;
/// Sign.
pub(crate) const SF: u64 = 1 << 7;
/// Trap.
pub(crate) const TF: u64 = 1 << 8;
/// Interrupt enable.
pub(crate) const IF: u64 = 1 << 9;
/// Direction.
pub(crate) const DF: u64 = 1 << 10;
/// Overflow.
pub(crate) const OF: u64 = 1 << 11;
/// I/O privilege level.
pub(crate) const IOPL: u64 = 3 << 12;
/// Nested task.
pub(crate) const NT: u64 = 1 << 14;
/// Resume.
pub(crate) const RF: u64 = 1 << 16;
/// Virtual-8086.
pub(crate) const VM: u64 = 1 << 17;
/// Alignment check, and SMAP override.
pub(crate) const AC: u64 = 1 << 18;
/// CPUID available.
pub(crate) const ID: u64 = 1 << 21;
/// The arithmetic flags.
pub(crate) const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;
/// Every flag that exists here (no VME: VIF and VIP stay clear), and the bit that is always set.
pub(crate) const KNOWN: u64 = ARITHMETIC | TF | IF | DF | IOPL | NT | RF | VM | AC | ID | 2;

/// The arithmetic flags as `lahf; seto al` leave them in AX: OF in bit 0, the rest in bits 8-15.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Arithmetic(pub(crate) u16);

impl Arithmetic {
    /// From RFLAGS.
    pub(crate) fn from_rflags(rflags: u64) -> Self {
        let high = (rflags & (CF | PF | AF | ZF | SF) | 2) as u16;
        Self(high << 8 | (rflags >> 11 & 1) as u16)
    }

    /// The bits at their place in RFLAGS.
    pub(crate) fn to_rflags(self) -> u64 {
        let bits = u64::from(self.0);
        bits >> 8 & (CF | PF | AF | ZF | SF) | (bits & 1) << 11
    }

    /// Whether condition `code` (the low nibble of Jcc, SETcc and CMOVcc) holds.
    #[inline(always)]
    pub(crate) fn condition<const CODE: u8>(self) -> bool {
        let bits = self.0;
        let overflow = bits & 1 != 0;
        let carry = bits & 0x100 != 0;
        let zero = bits & 0x4000 != 0;
        let sign = bits & 0x8000 != 0;
        let holds = match CODE >> 1 {
            0 => overflow,
            1 => carry,
            2 => zero,
            3 => carry | zero,
            4 => sign,
            5 => bits & 0x400 != 0,
            6 => sign != overflow,
            _ => zero | (sign != overflow),
        };
        holds != (CODE & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_flags_survive_the_round_trip() {
        for combination in 0..64u64 {
            let flags = [CF, PF, AF, ZF, SF, OF];
            let rflags = flags.iter().enumerate().fold(0, |sum, (bit, flag)| {
                if combination >> bit & 1 != 0 { sum | flag } else { sum }
            });
            assert_eq!(Arithmetic::from_rflags(rflags).to_rflags(), rflags);
        }
    }

    #[test]
    fn conditions_follow_the_manual() {
        let only = |flag| Arithmetic::from_rflags(flag);
        assert!(only(OF).condition::<0x0>() && only(0).condition::<0x1>());
        assert!(only(CF).condition::<0x2>() && only(0).condition::<0x3>());
        assert!(only(ZF).condition::<0x4>() && only(0).condition::<0x5>());
        assert!(only(CF).condition::<0x6>() && only(ZF).condition::<0x6>());
        assert!(only(SF).condition::<0x8>() && only(PF).condition::<0xa>());
        assert!(only(SF).condition::<0xc>() && only(OF).condition::<0xc>());
        assert!(only(SF | OF).condition::<0xd>() && only(ZF).condition::<0xe>());
        assert!(!only(ZF).condition::<0xf>() && only(SF | OF).condition::<0xf>());
    }
}
