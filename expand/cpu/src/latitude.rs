//! Latitude: what the architecture leaves to each maker of CPUs, by instruction.
//!
//! The host's CPU is the software CPU's semantics, so on another maker's CPU, or another generation of
//! one maker's, these come out otherwise: flags that an instruction leaves undefined, destinations
//! that it leaves undefined for some operands, and results that are right only up to an error. Whatever
//! else makers do differently (faults, far transfers, MSRs) is written by hand here, and so the same
//! everywhere. The condition codes C0, C2 and C3 of the x87 unit, undefined behind most of its
//! arithmetic, are not listed: Intel's and AMD's CPUs leave them alone.
//!
//! Flags are the decoder's table, which is that of Intel 64 and IA-32 Architectures Software Developer's
//! Manual, volume 1, appendix A; [`BEYOND`] has what the instructions' own pages, and AMD64 Architecture
//! Programmer's Manual, volume 3, leave open beside that.

use iced_x86::{Instruction, Mnemonic, OpKind, Register, RflagsBits};
use reprise_trace::instructions::CodeWidth;

use crate::flags::{AF, ARITHMETIC, CF, OF, PF, SF, ZF};

/// Which part of an instruction's work is not the same everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Latitude {
    /// The result is right only up to an error.
    Approximation,
    /// The destination is undefined for some operands.
    Destination,
    /// Flags are undefined.
    Flags,
}

impl Latitude {
    /// As reports name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Approximation => "approximation",
            Self::Destination => "undefined destination",
            Self::Flags => "undefined flags",
        }
    }
}

/// Results, a row a family. Sources: Intel's manual, volume 2 (the instructions' pages), and volume 1,
/// 8.3.10 (transcendental instructions: less than a unit in the last place off, by no fixed algorithm).
const RESULTS: [(Latitude, &[Mnemonic]); 4] = [
    // Up to 1.5 * 2^-12 off, relatively.
    (
        Latitude::Approximation,
        &[Mnemonic::Rcpps, Mnemonic::Rcpss, Mnemonic::Rsqrtps, Mnemonic::Rsqrtss],
    ),
    (
        Latitude::Approximation,
        &[
            Mnemonic::F2xm1,
            Mnemonic::Fyl2x,
            Mnemonic::Fyl2xp1,
            Mnemonic::Fsin,
            Mnemonic::Fcos,
            Mnemonic::Fsincos,
            Mnemonic::Fptan,
            Mnemonic::Fpatan,
        ],
    ),
    // For a source of zero; AMD's manual says that the destination stays, as it does on Intel's CPUs
    // except for the upper half of a 32-bit one.
    (Latitude::Destination, &[Mnemonic::Bsf, Mnemonic::Bsr]),
    // Digits that are none.
    (Latitude::Destination, &[Mnemonic::Fbld]),
];

/// What a result leaves to makers, if it does.
pub fn of_result(instruction: &Instruction) -> Option<Latitude> {
    let mnemonic = instruction.mnemonic();
    // Of 16 bits, BSWAP and long double shifts have no meaning.
    let short_swap = mnemonic == Mnemonic::Bswap && instruction.op0_register().size() == 2;
    if short_swap || shifts_too_far(instruction) {
        return Some(Latitude::Destination);
    }
    RESULTS.iter().find(|(_, family)| family.contains(&mnemonic)).map(|(latitude, _)| *latitude)
}

/// Whether the result is right only up to an error.
pub fn approximates(mnemonic: Mnemonic) -> bool {
    RESULTS.iter().any(|(latitude, family)| {
        *latitude == Latitude::Approximation && family.contains(&mnemonic)
    })
}

/// Flags that are undefined beside the decoder's: whom for, which, and when.
type Beyond = (&'static [Mnemonic], u64, fn(&Instruction) -> bool);

/// Where the manuals' pages leave more open than the decoder's table.
const BEYOND: [Beyond; 4] = [
    // Undefined for AMD, and for Intel until its later editions left it alone.
    (&[Mnemonic::Bt, Mnemonic::Btc, Mnemonic::Btr, Mnemonic::Bts], ZF, |_| true),
    // Of a byte or a word, all bits may have been shifted out and more.
    (&[Mnemonic::Shl, Mnemonic::Sal, Mnemonic::Shr], CF, shifts_all_out),
    (&[Mnemonic::Shld, Mnemonic::Shrd], ARITHMETIC, shifts_too_far),
    // The decoder's table has what is left of a count of a byte's or a word's rounds; the manuals' pages have OF by
    // the count itself.
    (&[Mnemonic::Rcl, Mnemonic::Rcr], OF, rotates_on),
];

/// Bits of RFLAGS that the instruction leaves undefined, for at least some counts where those are in CL.
pub fn undefined_flags(instruction: &Instruction) -> u64 {
    let mnemonic = instruction.mnemonic();
    let beyond = BEYOND
        .iter()
        .filter(|(family, _, when)| family.contains(&mnemonic) && when(instruction))
        .fold(0, |flags, (_, more, _)| flags | more);
    rflags_of(instruction.rflags_undefined()) | beyond
}

/// As [`undefined_flags`], where the count in CL, if there is one, is known.
pub fn undefined_flags_for(instruction: &Instruction, cl: u8) -> u64 {
    if !counts_in_cl(instruction) {
        return undefined_flags(instruction);
    }
    let (bits, count) = (operand_bits(instruction), count(instruction, cl));
    let double = matches!(instruction.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd);
    match count {
        0 => 0,
        1 => undefined_flags(instruction) & AF,
        _ if double && count <= bits => OF | AF,
        _ if !double && count < bits => undefined_flags(instruction) & !CF,
        _ => undefined_flags(instruction),
    }
}

/// Bits of RFLAGS to which the instruction, with this count in CL if it has one there, gives a value that is
/// the same everywhere, whatever they were. What it restores from memory counts as such, though it may have
/// been undefined when it was saved.
pub fn defined_flags_for(instruction: &Instruction, cl: u8) -> u64 {
    let changes_nothing = counts_in_cl(instruction) && count(instruction, cl) == 0;
    if changes_nothing || instruction.has_rep_prefix() || instruction.has_repne_prefix() {
        return 0;
    }
    let kept = if comes_round(instruction, cl) { CF } else { 0 };
    let all = instruction.rflags_modified();
    rflags_of(all) & !undefined_flags_for(instruction, cl) & !kept
}

/// What the instruction leaves undefined of `flags`, as its name and theirs.
pub fn undefined_names(instruction: &Instruction, flags: u64) -> Option<String> {
    let names = names(flags & undefined_flags(instruction));
    (!names.is_empty())
        .then(|| format!("{names} of {}", format!("{:?}", instruction.mnemonic()).to_lowercase()))
}

/// The names of arithmetic flags.
pub fn names(flags: u64) -> String {
    let named = [(CF, "CF"), (PF, "PF"), (AF, "AF"), (ZF, "ZF"), (SF, "SF"), (OF, "OF")];
    let set = named.iter().filter(|(flag, _)| flags & flag != 0);
    set.map(|(_, name)| *name).collect::<Vec<_>>().join(", ")
}

/// Bits of RFLAGS from the decoder's.
pub fn rflags_of(bits: u32) -> u64 {
    let table = [
        (RflagsBits::CF, CF),
        (RflagsBits::PF, PF),
        (RflagsBits::AF, AF),
        (RflagsBits::ZF, ZF),
        (RflagsBits::SF, SF),
        (RflagsBits::OF, OF),
    ];
    table.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, flag)| flag).sum()
}

/// A shift's or rotation's count, as the CPU cuts it. A rotation of a byte or a word may then still go round
/// more than once; its flags are those of this count (Intel 64 and IA-32 Architectures Software Developer's
/// Manual, volume 2, RCL/RCR/ROL/ROR: OF by the masked count, CF by what is left of it).
pub(crate) fn count(instruction: &Instruction, cl: u8) -> usize {
    let bits = operand_bits(instruction);
    let count = if counts_in_cl(instruction) { cl } else { instruction.immediate8() };
    usize::from(count) & if bits == 64 { 0x3f } else { 0x1f }
}

/// The operand that has a shift's or a rotation's count.
fn count_operand(instruction: &Instruction) -> Option<u32> {
    match instruction.mnemonic() {
        Mnemonic::Shl
        | Mnemonic::Sal
        | Mnemonic::Shr
        | Mnemonic::Sar
        | Mnemonic::Rol
        | Mnemonic::Ror
        | Mnemonic::Rcl
        | Mnemonic::Rcr => Some(1),
        Mnemonic::Shld | Mnemonic::Shrd => Some(2),
        _ => None,
    }
}

pub(crate) fn counts_in_cl(instruction: &Instruction) -> bool {
    count_operand(instruction).is_some_and(|operand| {
        instruction.op_kind(operand) == OpKind::Register
            && instruction.op_register(operand) == Register::CL
    })
}

/// The most that a shift's count may be, as the CPU cuts it: to five bits, or six of a 64-bit operand.
fn most_shifted(instruction: &Instruction, bits: usize) -> usize {
    let cut = if bits == 64 { 0x3f } else { 0x1f };
    if counts_in_cl(instruction) { cut } else { usize::from(instruction.immediate8()) & cut }
}

/// Bits of the first operand.
pub(crate) fn operand_bits(instruction: &Instruction) -> usize {
    8 * match instruction.op0_kind() {
        OpKind::Register => instruction.op0_register().size(),
        _ => instruction.memory_size().size(),
    }
}

/// A rotation through CF by whole rounds, which leaves operand and CF as they were.
fn comes_round(instruction: &Instruction, cl: u8) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr)
        && count(instruction, cl).is_multiple_of(operand_bits(instruction) + 1)
}

/// A rotation by more than one place, for at least some counts.
fn rotates_on(instruction: &Instruction) -> bool {
    most_shifted(instruction, operand_bits(instruction)) > 1
}

fn shifts_all_out(instruction: &Instruction) -> bool {
    let bits = operand_bits(instruction);
    most_shifted(instruction, bits) >= bits
}

fn shifts_too_far(instruction: &Instruction) -> bool {
    let bits = operand_bits(instruction);
    matches!(instruction.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd)
        && most_shifted(instruction, bits) > bits
}

/// An instruction of a trace's block.
pub(crate) fn decoded(bytes: &[u8], width: CodeWidth) -> Instruction {
    let bits = match width {
        CodeWidth::Bits16 => 16,
        CodeWidth::Bits32 => 32,
        CodeWidth::Bits64 => 64,
    };
    iced_x86::Decoder::new(bits, bytes, crate::decode::OPTIONS).decode()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(bytes: &[u8]) -> Instruction {
        decoded(bytes, CodeWidth::Bits64)
    }

    /// Instructions, the flags that they leave undefined, and those that they define, with zero in CL.
    const FLAGS: [(&[u8], u64, u64); 27] = [
        (&[0x48, 0xf7, 0xe3], SF | ZF | AF | PF, CF | OF), // mul rbx
        (&[0x0f, 0xaf, 0xc3], SF | ZF | AF | PF, CF | OF), // imul eax, ebx
        (&[0xf7, 0xf3], ARITHMETIC, 0),                    // div ebx
        (&[0x0f, 0xbc, 0xc3], OF | SF | AF | PF | CF, ZF), // bsf eax, ebx
        (&[0x0f, 0xa3, 0xd8], OF | SF | ZF | AF | PF, CF), // bt eax, ebx
        (&[0x21, 0xd8], AF, OF | SF | ZF | PF | CF),       // and eax, ebx
        (&[0x31, 0xc0], AF, OF | SF | ZF | PF | CF),       // xor eax, eax
        (&[0xd1, 0xe0], AF, OF | SF | ZF | PF | CF),       // shl eax, 1
        (&[0xc1, 0xe0, 0x05], OF | AF, SF | ZF | PF | CF), // shl eax, 5
        (&[0xc1, 0xe0, 0x00], 0, 0),                       // shl eax, 0
        (&[0xc0, 0xe0, 0x09], OF | AF | CF, SF | ZF | PF), // shl al, 9
        (&[0xc0, 0xf8, 0x09], OF | AF, SF | ZF | PF | CF), // sar al, 9
        (&[0xd3, 0xe0], OF | AF, 0),                       // shl eax, cl
        (&[0xd2, 0xe0], OF | AF | CF, 0),                  // shl al, cl
        (&[0xc1, 0xc0, 0x05], OF, CF),                     // rol eax, 5
        (&[0xd1, 0xd0], 0, OF | CF),                       // rcl eax, 1
        (&[0xc0, 0xd0, 0x09], OF, 0),                      // rcl al, 9
        (&[0xc0, 0xd8, 0x0a], OF, CF),                     // rcr al, 10
        (&[0x66, 0xc1, 0xd0, 0x11], OF, 0),                // rcl ax, 17
        (&[0x0f, 0xa4, 0xd8, 0x05], OF | AF, SF | ZF | PF | CF), // shld eax, ebx, 5
        (&[0x66, 0x0f, 0xa4, 0xd8, 0x11], ARITHMETIC, 0),  // shld ax, bx, 17
        (&[0x66, 0x0f, 0xa5, 0xd8], ARITHMETIC, 0),        // shld ax, bx, cl
        (&[0xff, 0xc0], 0, OF | SF | ZF | AF | PF),        // inc eax
        (&[0x01, 0xd8], 0, ARITHMETIC),                    // add eax, ebx
        (&[0xf3, 0xa6], 0, 0),                             // repe cmpsb
        (&[0x9d], 0, ARITHMETIC),                          // popfq
        (&[0xf7, 0xd0], 0, 0),                             // not eax
    ];

    #[test]
    fn flags_are_as_the_manuals_have_them() {
        for (bytes, undefined, defined) in FLAGS {
            let instruction = of(bytes);
            assert_eq!(names(undefined_flags(&instruction)), names(undefined), "{instruction}");
            assert_eq!(names(defined_flags_for(&instruction, 0)), names(defined), "{instruction}");
        }
    }

    #[test]
    fn flags_are_named_with_their_instruction() {
        let mul = of(&[0x48, 0xf7, 0xe3]);
        assert_eq!(undefined_names(&mul, ARITHMETIC), Some("PF, AF, ZF, SF of mul".to_owned()));
        assert_eq!(undefined_names(&mul, CF), None);
    }

    #[test]
    fn a_count_in_cl_decides_when_it_is_known() {
        let (shl, byte) = (of(&[0xd3, 0xe0]), of(&[0xd2, 0xe0]));
        let (rcl, double) = (of(&[0xd2, 0xd0]), of(&[0x66, 0x0f, 0xa5, 0xd8]));
        let table = [
            (&shl, 0, 0),
            (&shl, 1, AF),
            (&shl, 2, OF | AF),
            (&shl, 32, 0),
            (&byte, 7, OF | AF),
            (&byte, 8, OF | AF | CF),
            (&rcl, 1, 0),
            (&rcl, 9, OF),
            (&rcl, 10, OF),
            (&rcl, 32, 0),
            (&rcl, 11, OF),
            (&double, 16, OF | AF),
            (&double, 17, ARITHMETIC),
        ];
        for (instruction, count, flags) in table {
            let found = undefined_flags_for(instruction, count);
            assert_eq!(names(found), names(flags), "{instruction}, {count}");
        }
    }

    #[test]
    fn results_are_as_the_manuals_have_them() {
        let table: [(&[u8], Option<Latitude>); 9] = [
            (&[0x0f, 0x53, 0xc1], Some(Latitude::Approximation)), // rcpps xmm0, xmm1
            (&[0xf3, 0x0f, 0x52, 0xc1], Some(Latitude::Approximation)), // rsqrtss xmm0, xmm1
            (&[0xd9, 0xfe], Some(Latitude::Approximation)),       // fsin
            (&[0xd9, 0xfa], None),                                // fsqrt, exact
            (&[0x0f, 0xbd, 0xc3], Some(Latitude::Destination)),   // bsr eax, ebx
            (&[0x66, 0x0f, 0xc8], Some(Latitude::Destination)),   // bswap ax
            (&[0x0f, 0xc8], None),                                // bswap eax
            (&[0x66, 0x0f, 0xa4, 0xd8, 0x11], Some(Latitude::Destination)), // shld ax, bx, 17
            (&[0x0f, 0xa4, 0xd8, 0x1f], None),                    // shld eax, ebx, 31
        ];
        for (bytes, latitude) in table {
            let instruction = of(bytes);
            assert_eq!(of_result(&instruction), latitude, "{instruction}");
        }
        assert!(approximates(Mnemonic::Fsin) && !approximates(Mnemonic::Bsf));
    }
}
