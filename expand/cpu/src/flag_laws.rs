//! How CPUs that were measured leave flags that the architecture leaves undefined: laws, with which a
//! replay on another CPU leaves them as they were recorded, wherever they go from there.
//!
//! No manual has them. A row was found by running each instruction on that CPU with random operands and
//! flags, and a test holds the CPU that it runs on to them, if it is one of these.

use std::ops::RangeInclusive;

use iced_x86::{Instruction, Mnemonic};

use crate::flags::{AF, ARITHMETIC, CF, OF, PF, SF, ZF};
use crate::latitude;

/// What a flag becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Law {
    /// What it was.
    Unchanged,
    /// Clear.
    Zero,
    /// Set.
    One,
    /// SF of the result against CF.
    SignAgainstCarry,
    /// The result's top bit against CF.
    TopAgainstCarry,
    /// The result's top bit against the next.
    TopAgainstNext,
    /// The bit that a shift to the left moved out last; none is left when more than all are out.
    OutLeft,
    /// The same of a shift to the right.
    OutRight,
}

type Row = (&'static [Mnemonic], u64, Law);

/// The laws of a CPU.
#[derive(Debug)]
pub struct FlagLaws {
    vendor: &'static str,
    family: u32,
    /// Of those models alone that are of one design.
    models: RangeInclusive<u32>,
    /// CF before what depends on it.
    rows: &'static [Row],
}

const SHIFTS: &[Mnemonic] =
    &[Mnemonic::Shl, Mnemonic::Sal, Mnemonic::Shr, Mnemonic::Sar, Mnemonic::Shld, Mnemonic::Shrd];
const LOGIC: &[Mnemonic] = &[Mnemonic::And, Mnemonic::Or, Mnemonic::Xor, Mnemonic::Test];
const DIVISIONS: &[Mnemonic] = &[Mnemonic::Div, Mnemonic::Idiv];

/// All that were measured.
static MEASURED: [FlagLaws; 1] = [
    // Zen 3, measured on model 1 (an EPYC). Models 0x10 to 0x1f and from 0x60 on are Zen 4; those from 0x20 to
    // 0x5f are Zen 3 and 3+, and nobody has measured them.
    FlagLaws {
        vendor: "AuthenticAMD",
        family: 0x19,
        models: 0..=0xf,
        rows: &[
            (&[Mnemonic::Mul, Mnemonic::Imul], PF | AF | ZF | SF, Law::Unchanged),
            (DIVISIONS, CF | OF, Law::Unchanged),
            (DIVISIONS, PF | ZF | SF, Law::Zero),
            (DIVISIONS, AF, Law::One),
            (LOGIC, AF, Law::Zero),
            (SHIFTS, AF, Law::One),
            (&[Mnemonic::Shl, Mnemonic::Sal], CF, Law::OutLeft),
            (&[Mnemonic::Shl, Mnemonic::Sal], OF, Law::SignAgainstCarry),
            (&[Mnemonic::Shr, Mnemonic::Sar], OF, Law::Zero),
            (&[Mnemonic::Shr], CF, Law::OutRight),
            (&[Mnemonic::Shld], OF, Law::SignAgainstCarry),
            (&[Mnemonic::Rol, Mnemonic::Rcl], OF, Law::TopAgainstCarry),
            (&[Mnemonic::Ror, Mnemonic::Rcr, Mnemonic::Shrd], OF, Law::TopAgainstNext),
            (
                &[Mnemonic::Bt, Mnemonic::Btc, Mnemonic::Btr, Mnemonic::Bts],
                PF | AF | ZF | SF | OF,
                Law::Unchanged,
            ),
            (&[Mnemonic::Bsf, Mnemonic::Bsr], CF | PF | AF | SF | OF, Law::Unchanged),
        ],
    },
];

/// An instruction that has been executed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Executed<'a> {
    pub(crate) instruction: &'a Instruction,
    /// RFLAGS before and after.
    pub(crate) flags: [u64; 2],
    /// The first operand before and after, if it is a register.
    pub(crate) operand: Option<[u64; 2]>,
    /// CL before.
    pub(crate) cl: u8,
}

impl FlagLaws {
    /// The laws of this CPU, if it was measured.
    pub fn of(vendor: &str, family: u32, model: u32) -> Option<&'static Self> {
        MEASURED.iter().find(|laws| {
            laws.vendor == vendor && laws.family == family && laws.models.contains(&model)
        })
    }

    fn rows(&self, instruction: &Instruction) -> impl Iterator<Item = &Row> {
        let mnemonic = instruction.mnemonic();
        self.rows.iter().filter(move |(family, _, _)| family.contains(&mnemonic))
    }

    /// Whether there is a law that a CPU need not keep by itself; one of which it is known that it
    /// clears AF in logic instructions keeps that.
    pub(crate) fn concern(&self, instruction: &Instruction, logic_clears_af: bool) -> bool {
        let is_logic = LOGIC.contains(&instruction.mnemonic());
        self.rows(instruction).next().is_some() && !(is_logic && logic_clears_af)
    }

    /// RFLAGS behind an instruction as this CPU leaves them.
    pub(crate) fn apply(&self, executed: &Executed<'_>) -> u64 {
        let undefined = latitude::undefined_flags_for(executed.instruction, executed.cl);
        let mut flags = executed.flags[1];
        for (_, of_row, law) in self.rows(executed.instruction) {
            let concerned = of_row & undefined;
            let Some(set) = (concerned != 0).then(|| law.sets(executed, flags)).flatten() else {
                continue;
            };
            flags = flags & !concerned | set & concerned;
        }
        flags
    }
}

impl Law {
    /// Flags as the law has them; `None` where it needs an operand that is in memory.
    fn sets(self, executed: &Executed<'_>, flags: u64) -> Option<u64> {
        let bits = latitude::operand_bits(executed.instruction);
        let bit = |value: u64, number: usize| value >> number & 1 != 0;
        let all_if = |set: bool| if set { ARITHMETIC } else { 0 };
        let carry = flags & CF != 0;
        Some(match self {
            Self::Unchanged => executed.flags[0],
            Self::Zero => 0,
            Self::One => ARITHMETIC,
            Self::SignAgainstCarry => all_if((flags & SF != 0) != carry),
            Self::TopAgainstCarry => all_if(bit(executed.operand?[1], bits - 1) != carry),
            Self::TopAgainstNext => {
                let [_, result] = executed.operand?;
                all_if(bit(result, bits - 1) != bit(result, bits - 2))
            }
            Self::OutLeft | Self::OutRight => {
                let [before, _] = executed.operand?;
                let last = if self == Self::OutLeft { 0 } else { bits - 1 };
                all_if(
                    latitude::count(executed.instruction, executed.cl) == bits && bit(before, last),
                )
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn laws_are_those_of_the_design_that_was_measured() {
        let of = |vendor, family, model| FlagLaws::of(vendor, family, model).is_some();
        assert!(of("AuthenticAMD", 0x19, 1));
        // Genoa, a Zen 4; Cezanne, a Zen 3 that was not measured.
        assert!(!of("AuthenticAMD", 0x19, 0x11));
        assert!(!of("AuthenticAMD", 0x19, 0x50));
        assert!(!of("AuthenticAMD", 0x17, 1));
        assert!(!of("GenuineIntel", 0x19, 1));
    }
}
