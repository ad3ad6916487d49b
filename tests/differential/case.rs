//! A case: a short sequence with the state that it starts from.

use std::fmt::Write as _;

use iced_x86::{Decoder, DecoderOptions, Encoder, Formatter, GasFormatter, IcedError, Instruction};
use reprise_kvm::user_oracle::{CODE_ADDRESS, UserInput};

/// The decoder's options: opcodes mean what the CPU model's time gave them.
pub(crate) const DECODER: u32 =
    DecoderOptions::NO_MPFX_0FBC | DecoderOptions::NO_MPFX_0FBD | DecoderOptions::NO_WBNOINVD;

/// A part of a sequence.
#[derive(Clone, Debug)]
pub(crate) enum Piece {
    /// An instruction; a branch also has the number of the piece that it goes to, which may be the
    /// sequence's end.
    Instruction(Instruction, Option<usize>),
    /// Bytes as they are.
    Bytes(Vec<u8>),
}

/// A sequence with the state that it starts from.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) seed: u64,
    pub(crate) pieces: Vec<Piece>,
    /// `code` is what [`Case::assemble`] makes of the pieces.
    pub(crate) input: UserInput,
}

impl Case {
    /// Makes the code from the pieces.
    pub(crate) fn assemble(&mut self) -> Result<(), IcedError> {
        // Branches have the same length wherever they go, so a first pass finds all addresses.
        let mut starts = vec![CODE_ADDRESS];
        let mut code = Vec::new();
        for pass in 0..2 {
            code.clear();
            for (number, piece) in self.pieces.iter().enumerate() {
                let ip = CODE_ADDRESS + code.len() as u64;
                code.extend(match piece {
                    Piece::Bytes(bytes) => bytes.clone(),
                    Piece::Instruction(instruction, None) => encode(instruction, ip)?,
                    Piece::Instruction(instruction, Some(target)) => {
                        let mut branch = *instruction;
                        let known = if pass == 0 { number } else { *target };
                        branch.set_near_branch64(starts[known]);
                        encode(&branch, ip)?
                    }
                });
                if pass == 0 {
                    starts.push(CODE_ADDRESS + code.len() as u64);
                }
            }
        }
        self.input.code = code;
        Ok(())
    }

    /// Without one piece; `None` if it is the last.
    pub(crate) fn without(&self, dropped: usize) -> Option<Self> {
        let mut shorter = self.clone();
        shorter.pieces.remove(dropped);
        for piece in &mut shorter.pieces {
            if let Piece::Instruction(_, Some(target)) = piece
                && *target > dropped
            {
                *target -= 1;
            }
        }
        let assembles = shorter.assemble().is_ok();
        (assembles && !shorter.pieces.is_empty()).then_some(shorter)
    }

    /// The instructions of the code, as the decoder finds them from its start.
    pub(crate) fn instructions(&self) -> Vec<Instruction> {
        Decoder::with_ip(64, &self.input.code, CODE_ADDRESS, DECODER).iter().collect()
    }

    /// The code in AT&T syntax, an instruction a line.
    pub(crate) fn listing(&self) -> String {
        let mut formatter = GasFormatter::new();
        let mut lines = String::new();
        for instruction in self.instructions() {
            let start = (instruction.ip() - CODE_ADDRESS) as usize;
            let bytes = &self.input.code[start..start + instruction.len()];
            let mut text = String::new();
            formatter.format(&instruction, &mut text);
            let _ = writeln!(lines, "  {:#x}: {text}    {bytes:02x?}", instruction.ip());
        }
        lines
    }
}

pub(crate) fn encode(instruction: &Instruction, ip: u64) -> Result<Vec<u8>, IcedError> {
    let mut encoder = Encoder::new(64);
    encoder.encode(instruction, ip)?;
    Ok(encoder.take_buffer())
}
