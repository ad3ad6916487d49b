//! Instructions told from bytes that look like them.

use iced_x86::{Code, Decoder, DecoderOptions, Instruction as Decoded, Mnemonic, Register};

/// What is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Instruction {
    /// RDTSC.
    ReadTimeStamp,
    /// RDTSCP.
    ReadTimeStampAndProcessor,
    /// RDRAND.
    ReadRandom,
    /// RDSEED.
    ReadSeed,
    /// RDPMC.
    ReadPerformanceCounter,
    /// MONITOR.
    Monitor,
    /// MWAIT.
    MonitorWait,
    /// MOV from CR4.
    ReadControl4,
    /// MOV to CR4.
    WriteControl4,
}

impl Instruction {
    /// Its mnemonic, for a person.
    pub fn name(self) -> &'static str {
        match self {
            Self::ReadTimeStamp => "RDTSC",
            Self::ReadTimeStampAndProcessor => "RDTSCP",
            Self::ReadRandom => "RDRAND",
            Self::ReadSeed => "RDSEED",
            Self::ReadPerformanceCounter => "RDPMC",
            Self::Monitor => "MONITOR",
            Self::MonitorWait => "MWAIT",
            Self::ReadControl4 => "MOV from CR4",
            Self::WriteControl4 => "MOV to CR4",
        }
    }

    /// The instruction that begins with the first of these bytes of 64-bit code, and ends with the last.
    pub fn at_start_of(bytes: &[u8]) -> Option<Self> {
        match search(bytes, &[]).instructions[..] {
            [(0, length, instruction, _)] if usize::from(length) == bytes.len() => {
                Some(instruction)
            }
            _ => None,
        }
    }

    /// What one that is decoded as 64-bit code is, if it is looked for.
    pub fn of(decoded: &Decoded) -> Option<Self> {
        Some(match decoded.mnemonic() {
            Mnemonic::Rdtsc => Self::ReadTimeStamp,
            Mnemonic::Rdtscp => Self::ReadTimeStampAndProcessor,
            Mnemonic::Rdrand => Self::ReadRandom,
            Mnemonic::Rdseed => Self::ReadSeed,
            Mnemonic::Rdpmc => Self::ReadPerformanceCounter,
            Mnemonic::Monitor => Self::Monitor,
            Mnemonic::Mwait => Self::MonitorWait,
            Mnemonic::Mov if decoded.code() == Code::Mov_cr_r64 => {
                (decoded.op0_register() == Register::CR4).then_some(Self::WriteControl4)?
            }
            Mnemonic::Mov if decoded.code() == Code::Mov_r64_cr => {
                (decoded.op1_register() == Register::CR4).then_some(Self::ReadControl4)?
            }
            _ => return None,
        })
    }
}

/// Whether an opcode of one of these may begin here.
fn may_begin(bytes: &[u8]) -> bool {
    match *bytes {
        [0x0f, 0x31 | 0x33, ..] => true,
        [0x0f, 0x01, 0xf9 | 0xc8 | 0xc9, ..] => true,
        // RDRAND and RDSEED of a register.
        [0x0f, 0xc7, modrm, ..] => modrm >= 0xf0,
        // MOV from and to CR4.
        [0x0f, 0x20 | 0x22, modrm, ..] => modrm >> 3 & 7 == 4,
        _ => false,
    }
}

/// What was found in a piece of code.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    /// Offset, bytes, what, and whether a boundary besides the start led there.
    pub(crate) instructions: Vec<(usize, u8, Instruction, bool)>,
    /// Offsets of opcodes that are part of another instruction, or no code.
    pub(crate) mistakable: Vec<usize>,
}

/// Looks through `code`. An instruction begins at its start, and at each of `boundaries`, which are
/// offsets in order.
pub(crate) fn search(code: &[u8], boundaries: &[usize]) -> Found {
    let mut found = Found::default();
    let opcodes: Vec<usize> = (0..code.len()).filter(|at| may_begin(&code[*at..])).collect();
    let mut left = &opcodes[..];
    while let [first, ..] = *left {
        // All up to the next boundary are judged in one pass, from the last boundary on.
        let before = boundaries.partition_point(|boundary| *boundary <= first);
        let start = before.checked_sub(1).map(|index| boundaries[index]);
        let next = boundaries.get(before).copied().unwrap_or(code.len());
        let (here, behind) = left.split_at(left.partition_point(|at| *at < next));
        judge(code, start, here, &mut found);
        left = behind;
    }
    found.instructions.dedup();
    found
}

/// Sees whether there are instructions whose opcodes are at offsets `opcodes`, decoding from `start`, or from
/// where the code starts.
fn judge(code: &[u8], start: Option<usize>, opcodes: &[usize], found: &mut Found) {
    let from = start.unwrap_or(0);
    let mut decoder = Decoder::with_ip(64, &code[from..], from as u64, DecoderOptions::NONE);
    let mut left = opcodes;
    while !left.is_empty() && decoder.can_decode() {
        let offset = from + decoder.position();
        let decoded = decoder.decode();
        let end = from + decoder.position();
        // Behind data anything may begin, so the next byte is as good as any.
        if decoded.is_invalid() && decoder.set_position(offset + 1 - from).is_err() {
            break;
        }
        let (covered, behind) = left.split_at(left.partition_point(|at| *at < end));
        left = behind;
        match Instruction::of(&decoded).filter(|_| !covered.is_empty()) {
            Some(what) => {
                found.instructions.push((offset, decoded.len() as u8, what, start.is_some()));
            }
            None => found.mistakable.extend(covered),
        }
    }
    found.mistakable.extend(left);
}

/// Whether these are no-operations alone.
pub(crate) fn is_idle(code: &[u8]) -> bool {
    let decoder = Decoder::new(64, code, DecoderOptions::NONE);
    decoder.into_iter().all(|decoded| decoded.mnemonic() == Mnemonic::Nop)
}

#[cfg(test)]
mod tests {
    use reprise_random::Random;

    use super::*;

    #[test]
    fn an_immediate_that_looks_like_one_is_none() {
        // mov eax, 0x0f310f31; rdtsc; mov rax, cr4; mov cr4, rax; ret
        let code =
            [0xb8, 0x0f, 0x31, 0x0f, 0x31, 0x0f, 0x31, 0x0f, 0x20, 0xe0, 0x0f, 0x22, 0xe0, 0xc3];
        let found = search(&code, &[]);
        assert_eq!(
            found.instructions,
            [
                (5, 2, Instruction::ReadTimeStamp, false),
                (7, 3, Instruction::ReadControl4, false),
                (10, 3, Instruction::WriteControl4, false),
            ]
        );
        assert_eq!(found.mistakable, [1, 3]);
    }

    #[test]
    fn a_boundary_puts_right_what_data_before_it_leads_astray() {
        // Data that looks like the start of a long instruction, and swallows the RDTSC behind it.
        let code = [0x48, 0xb8, 0x0f, 0x31, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90];
        let astray = search(&code, &[]);
        assert_eq!((astray.instructions, astray.mistakable), (vec![], vec![2]));
        let right = search(&code, &[2]);
        assert_eq!(right.instructions, [(2, 2, Instruction::ReadTimeStamp, true)]);
    }

    #[test]
    fn registers_and_rarer_instructions_are_known() {
        // rdtscp; rdrand eax; rdseed rdx; rdpmc; monitor; mwait; mov cr3, rax
        let code = [
            0x0f, 0x01, 0xf9, 0x0f, 0xc7, 0xf0, 0x48, 0x0f, 0xc7, 0xfa, 0x0f, 0x33, 0x0f, 0x01,
            0xc8, 0x0f, 0x01, 0xc9, 0x0f, 0x22, 0xd8,
        ];
        let names: Vec<_> =
            search(&code, &[]).instructions.iter().map(|found| found.2.name()).collect();
        assert_eq!(names, ["RDTSCP", "RDRAND", "RDSEED", "RDPMC", "MONITOR", "MWAIT"]);
    }

    /// The instruction whose opcode is at offset `at`, decoding from `start`.
    fn covering(code: &[u8], start: usize, at: usize) -> Option<(usize, Decoded)> {
        let mut decoder = Decoder::with_ip(64, &code[start..], start as u64, DecoderOptions::NONE);
        while decoder.can_decode() {
            let offset = start + decoder.position();
            let decoded = decoder.decode();
            let end = start + decoder.position();
            if decoded.is_invalid() {
                // Data: what follows is anybody's guess, so the next byte is as good as any.
                decoder.set_position(offset + 1 - start).ok()?;
            }
            if offset > at {
                return None;
            }
            if end > at {
                return (!decoded.is_invalid()).then_some((offset, decoded));
            }
        }
        None
    }

    /// One opcode after the other, each from its boundary, as it is meant.
    fn search_slowly(code: &[u8], boundaries: &[usize]) -> Found {
        let mut found = Found::default();
        for at in (0..code.len()).filter(|at| may_begin(&code[*at..])) {
            let before = boundaries.partition_point(|boundary| *boundary <= at);
            let start = before.checked_sub(1).map(|index| boundaries[index]);
            let covering = covering(code, start.unwrap_or(0), at);
            match covering.and_then(|(at, it)| Instruction::of(&it).map(|what| (at, it, what))) {
                Some((offset, decoded, what)) => {
                    found.instructions.push((offset, decoded.len() as u8, what, start.is_some()));
                }
                None => found.mistakable.push(at),
            }
        }
        found.instructions.dedup();
        found
    }

    /// Half of it made of what is looked for, so that much of it is met in every way.
    #[test]
    fn one_pass_finds_what_looking_for_each_does() {
        for seed in 0..400 {
            let mut random = Random::new(seed);
            let mut code = Vec::new();
            while code.len() < 200 {
                let piece: &[u8] = match random.below(8) {
                    0 => &[0x0f, 0x31],
                    1 => &[0x0f, 0x20, 0xe0],
                    2 => &[0x48, 0xb8],
                    3 => &[0x66, 0x0f, 0x01, 0xf9],
                    4 => &[0x06],
                    _ => &[random.below(256) as u8],
                };
                code.extend_from_slice(piece);
            }
            let boundaries: Vec<usize> = (0..code.len()).filter(|_| random.one_in(20)).collect();
            for boundaries in [&boundaries[..], &[]] {
                assert_eq!(
                    search(&code, boundaries),
                    search_slowly(&code, boundaries),
                    "seed {seed}"
                );
            }
        }
    }

    /// A section of some megabytes without a table of boundaries, full of opcodes: the old way would take hours.
    #[test]
    fn a_large_section_without_boundaries_takes_no_time() {
        let code = [0x0f, 0x31, 0x90, 0x90].repeat(1 << 20);
        assert_eq!(search(&code, &[]).instructions.len(), 1 << 20);
    }
}
