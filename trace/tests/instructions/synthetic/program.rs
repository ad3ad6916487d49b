//! The programs of the synthetic machine: functions of blocks, in real encodings.

use reprise_trace::instructions::{
    AccessKind, InstructionDefinition, NO_BASE, RegisterWrite, StaticAccess,
};

use reprise_random::Random;

/// How an access finds its address.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    /// A field of the object in RBX.
    Object(u8),
    /// A local variable of the frame in RBP.
    Local(u8),
    /// The array in RCX, at the index in RDX.
    Array,
    /// A variable of its own.
    Global,
    /// Anywhere in a large table, at R9.
    Table,
    Push,
    Pop,
    /// RSI and RDI of a string instruction.
    Strings,
}

/// A kind of instruction: encoding, accesses, registers written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Form {
    pub(super) bytes: &'static [u8],
    /// The last byte of `bytes` is to be replaced by the place's displacement.
    pub(super) place: Option<(Place, AccessKind, u16)>,
    pub(super) writes: Option<(u8, u8)>,
}

pub(super) const fn form(
    bytes: &'static [u8],
    place: Option<(Place, AccessKind, u16)>,
    writes: Option<(u8, u8)>,
) -> Form {
    Form { bytes, place, writes }
}

use AccessKind::{Invalidate, Prefetch, Read, ReadWrite, Write};
use Place::{Array, Global, Local, Object, Pop, Push, Strings, Table};

pub(super) const FORMS: &[Form] = &[
    form(&[0x48, 0x8b, 0x43, 0x08], Some((Object(8), Read, 8)), Some((0, 1))),
    form(&[0x8b, 0x43, 0x10], Some((Object(16), Read, 4)), Some((0, 1))),
    form(&[0x48, 0x89, 0x43, 0x18], Some((Object(24), Write, 8)), None),
    form(&[0x01, 0x43, 0x20], Some((Object(32), ReadWrite, 4)), None),
    form(&[0x48, 0x8b, 0x45, 0xf8], Some((Local(8), Read, 8)), Some((0, 1))),
    form(&[0x48, 0x89, 0x45, 0xf0], Some((Local(16), Write, 8)), None),
    form(&[0x48, 0x8b, 0x04, 0xd1], Some((Array, Read, 8)), Some((0, 1))),
    form(&[0x8b, 0x05, 0x00, 0x10, 0x00, 0x00], Some((Global, Read, 4)), Some((0, 1))),
    form(&[0x48, 0x01, 0xc8], None, Some((0, 1))),
    form(&[0x48, 0x83, 0xc0, 0x01], None, Some((0, 1))),
    form(&[0x48, 0x85, 0xc0], None, None),
    form(&[0x31, 0xd2], None, Some((2, 1))),
    form(&[0x90], None, None),
    form(&[0x48, 0x8d, 0x34, 0x17], None, Some((6, 1))),
    form(&[0x0f, 0x18, 0x4b, 0x30], Some((Object(48), Prefetch, 1)), None),
    form(&[0x0f, 0x0d, 0x4b, 0x38], Some((Object(56), Prefetch, 1)), None),
    form(&[0x0f, 0x01, 0x7b, 0x40], Some((Object(64), Invalidate, 1)), None),
];
pub(super) const TABLE_READ: Form = form(&[0x49, 0x8b, 0x01], Some((Table, Read, 8)), Some((0, 1)));
pub(super) const VECTOR_READ: Form =
    form(&[0x0f, 0x28, 0x43, 0x40], Some((Object(64), Read, 16)), Some((16, 2)));
pub(super) const REP_MOVSQ: Form =
    form(&[0xf3, 0x48, 0xa5], Some((Strings, Read, 8)), Some((1, 1)));
pub(super) const PUSH: Form = form(&[0x53], Some((Push, Write, 8)), Some((4, 1)));
pub(super) const POP: Form = form(&[0x5b], Some((Pop, Read, 8)), Some((4, 1)));
/// MOV EAX, imm32: code that is written over changes the constant.
pub(super) const CONSTANT: Form = form(&[0xb8, 0, 0, 0, 0], None, Some((0, 1)));

/// How a piece of a function ends.
#[derive(Clone, Debug)]
pub(super) enum End {
    /// Runs this often in a row.
    Loop(u64),
    /// Jumps over the next piece on every `n`th time, or by chance.
    If {
        period: u64,
    },
    Call(Vec<usize>),
    Syscall,
    Return,
    InterruptReturn,
}

/// A piece of a function: a block.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub(super) offset: u64,
    pub(super) forms: Vec<Form>,
    pub(super) end: End,
    /// Where in the code its jump or call leads.
    pub(super) target: u64,
}

/// Code of one privilege: functions call only functions behind them.
#[derive(Clone, Debug, Default)]
pub(super) struct Code {
    pub(super) functions: Vec<Vec<Piece>>,
}

pub(super) const KERNEL_BASE: u64 = 0xffff_ffff_8100_0000;
pub(super) const USER_BASES: [u64; 2] = [0x0000_0000_0040_0000, 0x0000_5555_5540_0000];

impl End {
    pub(super) fn encode(&self, linear: u64, target: u64) -> Vec<u8> {
        let relative = |opcode: &[u8]| {
            let next = linear + opcode.len() as u64 + 4;
            [opcode, &(target.wrapping_sub(next) as u32).to_le_bytes()].concat()
        };
        match self {
            Self::Loop(_) | Self::If { .. } => relative(&[0x0f, 0x85]),
            Self::Call(targets) if targets.len() == 1 => relative(&[0xe8]),
            Self::Call(_) => vec![0xff, 0xd0],
            Self::Syscall => vec![0x0f, 0x05],
            Self::Return => vec![0xc3],
            Self::InterruptReturn => vec![0x48, 0xcf],
        }
    }

    pub(super) fn length(&self) -> u64 {
        self.encode(0, 0).len() as u64
    }
}

impl Code {
    pub(super) fn new(random: &mut Random, functions: usize, is_user: bool) -> Self {
        let mut code = Self::default();
        for number in 0..functions {
            let pieces = 2 + random.below(8);
            let function = (0..pieces).map(|piece| {
                let is_last = piece + 1 == pieces;
                let mut forms: Vec<Form> =
                    (0..1 + random.below(6)).map(|_| FORMS[random.below(14) as usize]).collect();
                for (rare, one_in) in
                    [(TABLE_READ, 20), (VECTOR_READ, 12), (REP_MOVSQ, 15), (CONSTANT, 10)]
                {
                    if random.one_in(one_in) {
                        forms.push(rare);
                    }
                }
                if piece == 0 {
                    forms.insert(0, PUSH);
                }
                let left = functions - number - 1;
                let end = match random.below(6) {
                    _ if is_last => End::Return,
                    0 => End::Loop(1 + random.below(24)),
                    1..=2 if left > 0 => {
                        let count = if random.one_in(4) { 3 } else { 1 };
                        let target = |_| number + 1 + random.below(left as u64) as usize;
                        End::Call((0..count).map(target).collect())
                    }
                    3 if is_user && random.one_in(4) => End::Syscall,
                    _ => End::If { period: [0, 1, 2, 3, 8][random.below(5) as usize] },
                };
                if is_last {
                    forms.push(POP);
                }
                Piece { offset: 0, forms, end, target: 0 }
            });
            code.functions.push(function.collect());
        }
        // Entry and exit of interrupts and system calls: function 0 calls any other.
        let calls = End::Call((1..functions).take(3).collect());
        let entry = Piece { offset: 0, forms: vec![PUSH, PUSH], end: calls, target: 0 };
        let end = if is_user { End::Return } else { End::InterruptReturn };
        let exit = Piece { offset: 0, forms: vec![POP, POP], end, target: 0 };
        code.functions[0] = vec![entry, exit];
        code.place();
        code
    }

    /// Gives every piece its place and its target.
    pub(super) fn place(&mut self) {
        let mut offset = 0xf80;
        for piece in self.functions.iter_mut().flatten() {
            let bytes: usize = piece.forms.iter().map(|form| form.bytes.len()).sum();
            piece.offset = offset;
            offset += bytes as u64 + piece.end.length();
        }
        let entries: Vec<u64> = self.functions.iter().map(|pieces| pieces[0].offset).collect();
        for function in &mut self.functions {
            let offsets: Vec<u64> = function.iter().map(|piece| piece.offset).collect();
            for (number, piece) in function.iter_mut().enumerate() {
                piece.target = match &piece.end {
                    End::If { .. } => offsets[(number + 2).min(offsets.len() - 1)],
                    End::Call(targets) => entries[targets[0]],
                    _ => piece.offset,
                };
            }
        }
    }
}

impl Form {
    pub(super) fn define(&self, version: u64) -> InstructionDefinition {
        let mut bytes = self.bytes.to_vec();
        if bytes[0] == 0xb8 {
            bytes[1..].copy_from_slice(&(version as u32).to_le_bytes());
        }
        let access = |kind, size_bytes, base, displacement, step| StaticAccess {
            kind,
            size_bytes,
            base,
            displacement,
            step,
        };
        let accesses = match self.place {
            None => vec![],
            Some((Object(displacement), kind, size)) => {
                vec![access(kind, size, 3, i32::from(displacement), 0)]
            }
            Some((Local(displacement), kind, size)) => {
                vec![access(kind, size, 5, -i32::from(displacement), 0)]
            }
            Some((Array, kind, size)) => vec![access(kind, size, 1, 0, 0)],
            Some((Global, kind, size)) => vec![access(kind, size, NO_BASE, 0, 0)],
            Some((Table, kind, size)) => vec![access(kind, size, 9, 0, 0)],
            Some((Push, kind, size)) => vec![access(kind, size, 4, -8, -8)],
            Some((Pop, kind, size)) => vec![access(kind, size, 4, 0, 8)],
            Some((Strings, _, size)) => {
                vec![access(Read, size, 6, 0, 8), access(Write, size, 7, 0, 8)]
            }
        };
        let repeated = matches!(self.place, Some((Strings, ..)));
        let writes = self.writes.iter();
        let register_writes =
            writes.map(|(register, words)| RegisterWrite { register: *register, words: *words });
        InstructionDefinition {
            bytes,
            accesses,
            repeated,
            register_writes: register_writes.collect(),
        }
    }
}

impl End {
    pub(super) fn define(&self, linear: u64, target: u64) -> InstructionDefinition {
        let access = |kind, displacement, step| StaticAccess {
            kind,
            size_bytes: 8,
            base: 4,
            displacement,
            step,
        };
        let accesses = match self {
            Self::Call(_) => vec![access(Write, -8, -8)],
            Self::Return => vec![access(Read, 0, 8)],
            Self::InterruptReturn => vec![access(Read, 0, 8); 5],
            _ => vec![],
        };
        InstructionDefinition {
            bytes: self.encode(linear, target),
            accesses,
            ..InstructionDefinition::default()
        }
    }
}
