//! Cases of random bytes: most are no instruction, which both sides must find.

use iced_x86::{Decoder, DecoderError};
use reprise_kvm::user_oracle::CODE_ADDRESS;

use crate::case::{Case, DECODER, Piece};
use crate::generate::state;
use crate::opcodes::{beyond_the_model, shows_the_host};
use reprise_random::Random;

const MAX_INSTRUCTION_BYTES: usize = 15;

/// A case of one instruction, or what is none, at random.
pub(crate) fn case(seed: u64, mut random: Random) -> Case {
    let input = state(&mut random);
    loop {
        let bytes = bytes(&mut random);
        let mut decoder = Decoder::with_ip(64, &bytes, CODE_ADDRESS, DECODER);
        let instruction = decoder.decode();
        let fits = if instruction.is_invalid() {
            decoder.last_error() == DecoderError::InvalidInstruction
                && !meaning_depends_on_the_host(&bytes)
        } else {
            !beyond_the_model(&instruction) && !shows_the_host(&instruction)
        };
        if !fits || crate::preparation::must_end(&instruction) {
            continue;
        }
        let length = if instruction.is_invalid() { bytes.len() } else { instruction.len() };
        let pieces = vec![Piece::Bytes(bytes[..length].to_vec())];
        let mut case = Case { seed, pieces, input };
        case.assemble().expect("bytes need no encoder");
        return case;
    }
}

/// Prefixes, an opcode of some map, and what may follow it.
fn bytes(random: &mut Random) -> Vec<u8> {
    const PREFIXES: [u8; 10] = [0x66, 0xf2, 0xf3, 0xf0, 0x67, 0x2e, 0x64, 0x40, 0x48, 0x4f];
    let mut bytes = Vec::new();
    for _ in 0..random.below(4) {
        bytes.push(random.pick(&PREFIXES));
    }
    match random.below(8) {
        0..=2 => {}
        3..=5 => bytes.push(0x0f),
        6 => bytes.extend([0x0f, 0x38]),
        _ => bytes.extend([0x0f, 0x3a]),
    }
    while bytes.len() < MAX_INSTRUCTION_BYTES {
        bytes.push(random.next() as u8);
    }
    bytes
}

/// Opcodes that the decoder does not know and that a host may: those of extensions after its time.
pub(crate) fn meaning_depends_on_the_host(bytes: &[u8]) -> bool {
    let legacy = |byte: &u8| {
        matches!(byte, 0x66 | 0x67 | 0xf0 | 0xf2 | 0xf3 | 0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65)
    };
    let opcode: Vec<u8> =
        bytes.iter().copied().skip_while(|byte| legacy(byte) || byte & 0xf0 == 0x40).collect();
    // LOCK on the opcodes that were reserved as NOPs is undefined on Intel CPUs only.
    let locked = bytes[..bytes.len() - opcode.len()].contains(&0xf0);
    let reserved_nop = matches!(opcode[..], [0x0f, 0x07 | 0x0d | 0x18..=0x1f, ..] | [0xcf, ..]);
    // VEX, EVEX and XOP prefixes, groups that newer CPUs fill, and moves of segment, control and debug
    // registers that do not exist: which fault comes first is the CPU's own.
    locked && reserved_nop
        || matches!(
            opcode[..],
            [0xc4 | 0xc5 | 0x62 | 0x8f | 0x8c | 0x8e, ..]
                | [0x0f, 0x00 | 0x01 | 0xe7 | 0xc3 | 0xae | 0xc7 | 0x0f | 0x20..=0x27, ..]
        )
}
