//! Values worth computing with: those at which carries, signs, rounding and exceptions change.

use reprise_kvm::user_oracle::{
    CODE_ADDRESS, DATA_ADDRESS, DATA_BYTES, READ_ONLY_ADDRESS, SUPERVISOR_ADDRESS,
};
use reprise_trace::cpu_state::FpuState;

use reprise_random::Random;

/// An integer: a boundary, a power of two or its neighbour, few bits, or anything.
pub(crate) fn integer(random: &mut Random) -> u64 {
    const BOUNDARIES: [u64; 16] = [
        0,
        1,
        2,
        u64::MAX,
        0x7f,
        0x80,
        0xff,
        0x7fff,
        0x8000,
        0xffff,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        0x7fff_ffff_ffff_ffff,
        0x8000_0000_0000_0000,
        0xffff_ffff_8000_0000,
    ];
    match random.below(8) {
        0..=2 => random.pick(&BOUNDARIES),
        3 => {
            let power = 1u64 << random.below(64);
            power.wrapping_add(random.below(3)).wrapping_sub(1)
        }
        4 => random.below(100),
        5 => random.next() >> random.below(64),
        6 => address(random),
        _ => random.next(),
    }
}

/// An address in or near the pages that there are.
pub(crate) fn address(random: &mut Random) -> u64 {
    let data = DATA_ADDRESS + random.below(DATA_BYTES as u64);
    match random.below(16) {
        0 => CODE_ADDRESS + 0x100 + random.below(0xe00),
        1 => READ_ONLY_ADDRESS + random.below(0x1000),
        2 => SUPERVISOR_ADDRESS + random.below(0x1000),
        3..=6 => data,
        _ => data & !0xf,
    }
}

/// A single-precision pattern.
pub(crate) fn single(random: &mut Random) -> u32 {
    const SPECIAL: [u32; 20] = [
        0,
        0x8000_0000,
        0x3f80_0000,
        0xbf80_0000,
        0x7f80_0000,
        0xff80_0000,
        0x7fc0_0000,
        0xffc0_0001,
        0x7f80_0001,
        0xffbf_ffff,
        1,
        0x807f_ffff,
        0x0080_0000,
        0x7f7f_ffff,
        0x4f00_0000,
        0xcf00_0000,
        0x5f00_0000,
        0xdf00_0000,
        0x3f00_0000,
        0x4b00_0001,
    ];
    match random.below(4) {
        0 | 1 => random.pick(&SPECIAL),
        // Around one, so that sums cancel and round.
        2 => (random.next() as u32 & 0x807f_ffff) | (0x70 + random.below(0x20) as u32) << 23,
        _ => random.next() as u32,
    }
}

/// A double-precision pattern.
pub(crate) fn double(random: &mut Random) -> u64 {
    const SPECIAL: [u64; 20] = [
        0,
        0x8000_0000_0000_0000,
        0x3ff0_0000_0000_0000,
        0xbff0_0000_0000_0000,
        0x7ff0_0000_0000_0000,
        0xfff0_0000_0000_0000,
        0x7ff8_0000_0000_0000,
        0xfff8_0000_0000_0001,
        0x7ff0_0000_0000_0001,
        0xfff7_ffff_ffff_ffff,
        1,
        0x800f_ffff_ffff_ffff,
        0x0010_0000_0000_0000,
        0x7fef_ffff_ffff_ffff,
        0x41e0_0000_0000_0000,
        0xc1e0_0000_0020_0000,
        0x43e0_0000_0000_0000,
        0x3fe0_0000_0000_0000,
        0x36a0_0000_0000_0000,
        0x47ef_ffff_f000_0000,
    ];
    match random.below(4) {
        0 | 1 => random.pick(&SPECIAL),
        2 => (random.next() & 0x800f_ffff_ffff_ffff) | (0x3f0 + random.below(0x20)) << 52,
        _ => random.next(),
    }
}

/// An 80-bit pattern: the encodings that no other format has (unnormals and pseudo-anything) too.
pub(crate) fn extended(random: &mut Random) -> [u8; 10] {
    const SPECIAL: [(u16, u64); 24] = [
        (0, 0),
        (0x8000, 0),
        (0x3fff, 1 << 63),
        (0xbfff, 1 << 63),
        (0x4000, 1 << 63),
        // Infinities, quiet and signalling NaNs.
        (0x7fff, 1 << 63),
        (0xffff, 1 << 63),
        (0x7fff, 3 << 62),
        (0xffff, 3 << 62),
        (0x7fff, 3 << 62 | 5),
        (0x7fff, 1 << 63 | 1),
        (0xffff, 0xbfff_ffff_ffff_ffff),
        // Denormals, a pseudo-denormal, the smallest and the largest normal number.
        (0, 1),
        (0x8000, (1 << 63) - 1),
        (0, 1 << 63 | 7),
        (1, 1 << 63),
        (0x7ffe, u64::MAX),
        // Unnormal, pseudo-zero, pseudo-infinity, pseudo-NaN.
        (0x4005, 1 << 62),
        (0x4005, 0),
        (0x7fff, 0),
        (0x7fff, 1 << 62),
        // About the ends of 16, 32 and 64-bit integers.
        (0x400e, 1 << 63),
        (0x401e, 1 << 63),
        (0xc03e, 1 << 63),
    ];
    let (high, low) = match random.below(4) {
        0 => random.pick(&SPECIAL),
        1 => (0x3ff0 + random.below(0x20) as u16, random.next() | 1 << 63),
        2 => {
            let sign = (random.below(2) << 15) as u16;
            (sign | (0x3f80 + random.below(0x100) as u16), random.next() | 1 << 63)
        }
        _ if random.percent(40) => (random.next() as u16, random.next() | 1 << 63),
        // A small integer.
        _ => {
            let value = random.below(1000) + 1;
            let shift = value.leading_zeros();
            (0x3fff + 63 - shift as u16, value << shift)
        }
    };
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&low.to_le_bytes());
    bytes[8..].copy_from_slice(&high.to_le_bytes());
    bytes
}

/// A 128-bit register: integers, floating-point lanes, or text for the string instructions.
pub(crate) fn vector(random: &mut Random) -> u128 {
    let mut value = 0u128;
    match random.below(4) {
        0 => (0..2).for_each(|_| value = value << 64 | u128::from(integer(random))),
        1 => (0..4).for_each(|_| value = value << 32 | u128::from(single(random))),
        2 => (0..2).for_each(|_| value = value << 64 | u128::from(double(random))),
        _ => (0..16).for_each(|_| value = value << 8 | u128::from(random.below(4))),
    }
    value
}

/// Memory full of all of these.
pub(crate) fn memory(random: &mut Random, size_bytes: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size_bytes + 16);
    while bytes.len() < size_bytes {
        match random.below(8) {
            0 => bytes.extend_from_slice(&integer(random).to_le_bytes()),
            1 => {
                bytes.extend_from_slice(&extended(random));
                bytes.extend_from_slice(&[0; 6]);
            }
            2 => bytes.extend_from_slice(&address(random).to_le_bytes()),
            3 => bytes.extend_from_slice(&random.next().to_le_bytes()),
            _ => bytes.extend_from_slice(&vector(random).to_le_bytes()),
        }
    }
    bytes.truncate(size_bytes);
    bytes
}

/// An x87 control word: mostly as programs have it.
pub(crate) fn x87_control(random: &mut Random) -> u16 {
    match random.below(8) {
        0..=4 => 0x37f,
        // Rounding and precision only.
        5 => 0x7f | (random.next() as u16 & 0xf00),
        _ => 0x40 | (random.next() as u16 & 0xf3f),
    }
}

/// MXCSR: mostly as programs have it.
pub(crate) fn mxcsr(random: &mut Random) -> u32 {
    match random.below(8) {
        0..=3 => 0x1f80,
        4 => 0x1f80 | (random.next() as u32 & 0xe07f),
        5 | 6 => 0x1f80 | (random.next() as u32 & 0x6040),
        _ => random.next() as u32 & 0xffc0,
    }
}

/// x87, MMX and SSE state.
pub(crate) fn fpu(random: &mut Random) -> FpuState {
    let fcw = x87_control(random);
    let sticky = match random.below(4) {
        0 => random.next() as u16 & 0x477f,
        _ => 0,
    };
    let mut fsw = sticky | (random.below(8) as u16) << 11;
    // An exception that waits ends the sequence at its first x87 instruction: rarely.
    let pending = fsw & !fcw & 0x3f;
    if !random.percent(20) {
        fsw &= !pending;
    }
    if fsw & !fcw & 0x3f != 0 {
        fsw |= 0x8080;
    }
    let ftw = match random.below(4) {
        0 => 0,
        1 => 0xff,
        _ => random.next() as u8 | random.next() as u8,
    };
    FpuState {
        fcw,
        fsw,
        ftw,
        fop: 0,
        fip: 0,
        fdp: 0,
        st: std::array::from_fn(|_| extended(random)),
        mxcsr: mxcsr(random),
        xmm: std::array::from_fn(|_| vector(random)),
    }
}
