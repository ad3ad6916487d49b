//! A small assembler for what generated code does around guest instructions. None of its
//! instructions but those that say so touch the flags: the guest's live in the host's.

#[cfg(test)]
mod tests;

use iced_x86::{Encoder, Instruction};

/// A host general register, by its number in instruction encodings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Host(pub(super) u8);

pub(super) const RAX: Host = Host(0);
pub(super) const RCX: Host = Host(1);
pub(super) const RDX: Host = Host(2);
pub(super) const RBX: Host = Host(3);
pub(super) const RSP: Host = Host(4);
pub(super) const RBP: Host = Host(5);
pub(super) const RSI: Host = Host(6);
pub(super) const RDI: Host = Host(7);
pub(super) const R8: Host = Host(8);
pub(super) const R9: Host = Host(9);
pub(super) const R10: Host = Host(10);
pub(super) const R11: Host = Host(11);
pub(super) const R12: Host = Host(12);
pub(super) const R13: Host = Host(13);
pub(super) const R14: Host = Host(14);
pub(super) const R15: Host = Host(15);

impl Host {
    /// The register as the decoder's crate names it.
    pub(super) fn register(self) -> iced_x86::Register {
        iced_x86::Register::RAX + u32::from(self.0)
    }
}

/// A memory operand: base + (index << scale) + displacement.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) base: Option<Host>,
    pub(super) index: Option<(Host, u8)>,
    pub(super) displacement: i32,
}

/// `[base + displacement]`.
pub(super) fn at(base: Host, displacement: i32) -> Place {
    Place { base: Some(base), index: None, displacement }
}

/// `[base + (index << scale) + displacement]`.
pub(super) fn indexed(base: Host, index: Host, scale: u8, displacement: i32) -> Place {
    Place { base: Some(base), index: Some((index, scale)), displacement }
}

/// A jump whose target is not known yet.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub(super) struct Jump {
    /// Where its displacement ends, in the code emitted so far.
    pub(super) end: usize,
    bytes: u8,
}

/// Machine code in the making, for a known address.
pub(super) struct Assembler {
    bytes: Vec<u8>,
    /// Where the first byte will be executed.
    address: u64,
    encoder: Encoder,
}

/// Prefixes that a VEX-encoded instruction carries in its `pp` field.
const VEX_66: u8 = 1;
const VEX_F3: u8 = 2;
const VEX_F2: u8 = 3;

impl Assembler {
    pub(super) fn new(address: u64) -> Self {
        Self { bytes: Vec::with_capacity(1024), address, encoder: Encoder::new(64) }
    }

    /// The address of the next byte.
    pub(super) fn here(&self) -> u64 {
        self.address + self.bytes.len() as u64
    }

    pub(super) fn finish(self) -> Vec<u8> {
        self.bytes
    }

    /// How much is emitted.
    pub(super) fn length(&self) -> usize {
        self.bytes.len()
    }

    /// A guest instruction with its operands replaced, to be emitted by [`Assembler::bytes`]; `None` if
    /// there is no such instruction.
    pub(super) fn encode(&mut self, instruction: &Instruction) -> Option<Vec<u8>> {
        self.encoder.encode(instruction, 0).ok()?;
        Some(self.encoder.take_buffer())
    }

    /// An instruction made by [`Assembler::encode`].
    pub(super) fn bytes(&mut self, encoded: &[u8]) {
        self.emit(encoded);
    }

    /// MOVAPS `[place]` to a vector register.
    pub(super) fn load_vector(&mut self, number: u8, place: Place) {
        self.vector(0x28, number, place);
    }

    /// MOVAPS a vector register to `[place]`.
    pub(super) fn store_vector(&mut self, place: Place, number: u8) {
        self.vector(0x29, number, place);
    }

    fn vector(&mut self, opcode: u8, number: u8, place: Place) {
        self.rex(false, number, place);
        self.emit(&[0x0f, opcode]);
        self.place(number, place);
    }

    fn emit(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// ModRM, SIB and displacement; the register field is `register`.
    fn place(&mut self, register: u8, place: Place) {
        let register = (register & 7) << 3;
        let Place { base, index, displacement } = place;
        let Some(base) = base else {
            // No base: SIB with base 101 and a 32-bit displacement.
            let (index, scale) = index.map_or((RSP, 0), |index| index);
            self.emit(&[register | 0b100, scale << 6 | (index.0 & 7) << 3 | 0b101]);
            return self.emit(&displacement.to_le_bytes());
        };
        let short = i8::try_from(displacement).ok();
        let mode = match short {
            Some(0) if base.0 & 7 != 5 => 0b00,
            Some(_) => 0b01,
            None => 0b10,
        };
        if index.is_some() || base.0 & 7 == 4 {
            let (index, scale) = index.unwrap_or((RSP, 0));
            assert!(index != RSP || place.index.is_none(), "RSP is no index");
            self.emit(&[mode << 6 | register | 0b100]);
            self.emit(&[scale << 6 | (index.0 & 7) << 3 | base.0 & 7]);
        } else {
            self.emit(&[mode << 6 | register | base.0 & 7]);
        }
        match (mode, short) {
            (0b00, _) => {}
            (_, Some(short)) => self.emit(&short.to_le_bytes()),
            _ => self.emit(&displacement.to_le_bytes()),
        }
    }

    fn rex(&mut self, wide: bool, register: u8, place: Place) {
        let index = place.index.map_or(0, |(index, _)| index.0);
        let base = place.base.map_or(0, |base| base.0);
        let rex = 0x40 | u8::from(wide) << 3 | (register >> 3) << 2 | (index >> 3) << 1 | base >> 3;
        if rex != 0x40 {
            self.emit(&[rex]);
        }
    }

    fn with_place(&mut self, wide: bool, opcode: u8, register: u8, place: Place) {
        self.rex(wide, register, place);
        self.emit(&[opcode]);
        self.place(register, place);
    }

    /// `register = [place]`.
    pub(super) fn load(&mut self, register: Host, place: Place) {
        self.with_place(true, 0x8b, register.0, place);
    }

    /// `[place] = register`.
    pub(super) fn store(&mut self, place: Place, register: Host) {
        self.with_place(true, 0x89, register.0, place);
    }

    /// `[place] = value`, sign-extended to 64 bits.
    pub(super) fn store_immediate(&mut self, place: Place, value: i32) {
        self.with_place(true, 0xc7, 0, place);
        self.emit(&value.to_le_bytes());
    }

    /// `register = [place]`, 32 bits zero-extended.
    pub(super) fn load_32(&mut self, register: Host, place: Place) {
        self.with_place(false, 0x8b, register.0, place);
    }

    /// `[place] = register`, the low 32 bits.
    pub(super) fn store_32(&mut self, place: Place, register: Host) {
        self.with_place(false, 0x89, register.0, place);
    }

    /// `target = the low 32 bits of source`, sign-extended.
    pub(super) fn sign_extend_32(&mut self, target: Host, source: Host) {
        self.emit(&[0x48 | (target.0 >> 3) << 2 | source.0 >> 3, 0x63]);
        self.emit(&[0xc0 | (target.0 & 7) << 3 | source.0 & 7]);
    }

    /// `[place] = register`, the low 16 bits.
    pub(super) fn store_16(&mut self, place: Place, register: Host) {
        self.emit(&[0x66]);
        self.with_place(false, 0x89, register.0, place);
    }

    /// `register = [place]`, 16 bits zero-extended.
    pub(super) fn load_16(&mut self, register: Host, place: Place) {
        self.rex(false, register.0, place);
        self.emit(&[0x0f, 0xb7]);
        self.place(register.0, place);
    }

    /// `register = [place]`, 8 bits zero-extended.
    pub(super) fn load_8(&mut self, register: Host, place: Place) {
        self.rex(false, register.0, place);
        self.emit(&[0x0f, 0xb6]);
        self.place(register.0, place);
    }

    /// `[place] = value`, 32 bits.
    pub(super) fn store_immediate_32(&mut self, place: Place, value: u32) {
        self.with_place(false, 0xc7, 0, place);
        self.emit(&value.to_le_bytes());
    }

    /// `[place] = value`, 8 bits.
    pub(super) fn store_immediate_8(&mut self, place: Place, value: u8) {
        self.with_place(false, 0xc6, 0, place);
        self.emit(&[value]);
    }

    /// `[place] = MXCSR`.
    pub(super) fn store_mxcsr(&mut self, place: Place) {
        self.rex(false, 3, place);
        self.emit(&[0x0f, 0xae]);
        self.place(3, place);
    }

    /// `register = address of place`.
    pub(super) fn lea(&mut self, register: Host, place: Place) {
        self.with_place(true, 0x8d, register.0, place);
    }

    /// `target = source`.
    pub(super) fn copy(&mut self, target: Host, source: Host) {
        if target != source {
            self.emit(&[0x48 | (target.0 >> 3) << 2 | source.0 >> 3, 0x8b]);
            self.emit(&[0xc0 | (target.0 & 7) << 3 | source.0 & 7]);
        }
    }

    /// `target = the low 8 bits of source`, which is RAX to RBX.
    pub(super) fn zero_extend_8(&mut self, target: Host, source: Host) {
        assert!(source.0 < 4, "it needs no prefix to be named");
        let rex = 0x40 | (target.0 >> 3) << 2;
        if rex != 0x40 {
            self.emit(&[rex]);
        }
        self.emit(&[0x0f, 0xb6, 0xc0 | (target.0 & 7) << 3 | source.0 & 7]);
    }

    /// `target = the low 16 bits of source`.
    pub(super) fn zero_extend_16(&mut self, target: Host, source: Host) {
        let rex = 0x40 | (target.0 >> 3) << 2 | source.0 >> 3;
        if rex != 0x40 {
            self.emit(&[rex]);
        }
        self.emit(&[0x0f, 0xb7, 0xc0 | (target.0 & 7) << 3 | source.0 & 7]);
    }

    /// `target = the low 32 bits of source`.
    pub(super) fn zero_extend_32(&mut self, target: Host, source: Host) {
        let rex = 0x40 | (target.0 >> 3) << 2 | source.0 >> 3;
        if rex != 0x40 {
            self.emit(&[rex]);
        }
        self.emit(&[0x8b, 0xc0 | (target.0 & 7) << 3 | source.0 & 7]);
    }

    /// `register = value`, in its shortest form.
    pub(super) fn immediate(&mut self, register: Host, value: u64) {
        let high = register.0 >> 3;
        if let Ok(value) = u32::try_from(value) {
            if high != 0 {
                self.emit(&[0x41]);
            }
            self.emit(&[0xb8 | register.0 & 7]);
            self.emit(&value.to_le_bytes());
        } else if let Ok(value) = i32::try_from(value as i64) {
            self.emit(&[0x48 | high, 0xc7, 0xc0 | register.0 & 7]);
            self.emit(&value.to_le_bytes());
        } else {
            self.emit(&[0x48 | high, 0xb8 | register.0 & 7]);
            self.emit(&value.to_le_bytes());
        }
    }

    /// `target = source rotated right by count`.
    pub(super) fn rotate_right(&mut self, target: Host, source: Host, count: u8) {
        self.vex(3, VEX_F2, target, Host(0), source, 0xf0);
        self.emit(&[count]);
    }

    /// `target = source >> count`, the count in a register.
    pub(super) fn shift_right(&mut self, target: Host, source: Host, count: Host) {
        self.vex(2, VEX_F2, target, count, source, 0xf7);
    }

    /// `target = source >> count`, signed, the count in a register.
    pub(super) fn shift_right_signed(&mut self, target: Host, source: Host, count: Host) {
        self.vex(2, VEX_F3, target, count, source, 0xf7);
    }

    /// `target = source << count`, the count in a register.
    pub(super) fn shift_left(&mut self, target: Host, source: Host, count: Host) {
        self.vex(2, VEX_66, target, count, source, 0xf7);
    }

    /// A 64-bit VEX instruction of opcode map `map` with register operands.
    fn vex(&mut self, map: u8, prefix: u8, register: Host, second: Host, source: Host, opcode: u8) {
        let inverted = |bit: u8, place: u8| (bit ^ 1) << place;
        self.emit(&[
            0xc4,
            inverted(register.0 >> 3, 7) | inverted(0, 6) | inverted(source.0 >> 3, 5) | map,
            0x80 | (!second.0 & 15) << 3 | prefix,
            opcode,
            0xc0 | (register.0 & 7) << 3 | source.0 & 7,
        ]);
    }

    /// LAHF; SETO AL: the flags as [`crate::flags::Arithmetic`] keeps them, in AX.
    pub(super) fn flags_to_ax(&mut self) {
        self.emit(&[0x9f, 0x0f, 0x90, 0xc0]);
    }

    /// The flags from AX: adding 0x7f to AL overflows just when OF is to be set, and SAHF sets the
    /// rest from AH.
    pub(super) fn flags_from_ax(&mut self) {
        self.emit(&[0x04, 0x7f, 0x9e]);
    }

    /// LAHF.
    pub(super) fn flags_to_ah(&mut self) {
        self.emit(&[0x9f]);
    }

    /// `ecx = ah`.
    pub(super) fn ah_to_ecx(&mut self) {
        self.emit(&[0x0f, 0xb6, 0xcc]);
    }

    /// `ah = OF`.
    pub(super) fn overflow_to_ah(&mut self) {
        self.emit(&[0x0f, 0x90, 0xc4]);
    }

    /// RFLAGS in AX, as [`Assembler::flags_from_ax`] takes them: changes the flags, and RCX.
    pub(super) fn rflags_to_ax(&mut self) {
        // mov ecx, eax; shr ecx, 11; and ecx, 1; mov ah, al; mov al, cl
        self.emit(&[0x89, 0xc1, 0xc1, 0xe9, 11, 0x83, 0xe1, 1, 0x88, 0xc4, 0x88, 0xc8]);
    }

    /// `register = !register`.
    pub(super) fn complement(&mut self, register: Host) {
        self.emit(&[0x48 | register.0 >> 3, 0xf7, 0xd0 | register.0 & 7]);
    }

    /// `target ^= source`: changes the flags.
    pub(super) fn exclusive_or(&mut self, target: Host, source: Host) {
        self.emit(&[0x48 | (target.0 >> 3) << 2 | source.0 >> 3, 0x33]);
        self.emit(&[0xc0 | (target.0 & 7) << 3 | source.0 & 7]);
    }

    /// `register &= value`, the low 32 bits; the others are zero then. Changes the flags.
    pub(super) fn and_immediate_32(&mut self, register: Host, value: i32) {
        self.emit(&[0x40 | register.0 >> 3, 0x81, 0xe0 | register.0 & 7]);
        self.emit(&value.to_le_bytes());
    }

    /// Tests the bits of `value`, sign-extended: changes the flags.
    pub(super) fn test_immediate(&mut self, register: Host, value: i32) {
        self.emit(&[0x48 | register.0 >> 3, 0xf7, 0xc0 | register.0 & 7]);
        self.emit(&value.to_le_bytes());
    }

    /// Tests the bits of `[place]`: changes the flags.
    pub(super) fn test_place(&mut self, register: Host, place: Place) {
        self.with_place(true, 0x85, register.0, place);
    }

    /// TEST EAX, EAX: changes the flags.
    pub(super) fn test_eax(&mut self) {
        self.emit(&[0x85, 0xc0]);
    }

    /// Adds to RSP: changes the flags.
    pub(super) fn release_stack(&mut self, bytes: i8) {
        self.emit(&[0x48, 0x83, 0xc4, bytes as u8]);
    }

    /// Takes from RSP: changes the flags.
    pub(super) fn reserve_stack(&mut self, bytes: i8) {
        self.emit(&[0x48, 0x83, 0xec, bytes as u8]);
    }

    pub(super) fn push(&mut self, register: Host) {
        if register.0 > 7 {
            self.emit(&[0x41]);
        }
        self.emit(&[0x50 | register.0 & 7]);
    }

    pub(super) fn pop(&mut self, register: Host) {
        if register.0 > 7 {
            self.emit(&[0x41]);
        }
        self.emit(&[0x58 | register.0 & 7]);
    }

    pub(super) fn ret(&mut self) {
        self.emit(&[0xc3]);
    }

    /// Jumps to the address in a register.
    pub(super) fn jump_register(&mut self, register: Host) {
        if register.0 > 7 {
            self.emit(&[0x41]);
        }
        self.emit(&[0xff, 0xe0 | register.0 & 7]);
    }

    /// Jumps to the address at `place`.
    pub(super) fn jump_indirect(&mut self, place: Place) {
        self.with_place(false, 0xff, 4, place);
    }

    /// Jumps to the address that lies at `slot`, within 2 GiB of here.
    pub(super) fn jump_through(&mut self, slot: u64) {
        self.emit(&[0xff, 0x25]);
        self.relative_32(slot);
    }

    /// Calls the function whose address is in a register.
    pub(super) fn call_register(&mut self, register: Host) {
        if register.0 > 7 {
            self.emit(&[0x41]);
        }
        self.emit(&[0xff, 0xd0 | register.0 & 7]);
    }

    /// Jumps to code within 2 GiB.
    pub(super) fn jump_to(&mut self, target: u64) {
        self.emit(&[0xe9]);
        self.relative_32(target);
    }

    /// Calls code within 2 GiB.
    pub(super) fn call_to(&mut self, target: u64) {
        self.emit(&[0xe8]);
        self.relative_32(target);
    }

    fn relative_32(&mut self, target: u64) {
        let distance = target.wrapping_sub(self.here() + 4) as i64;
        let distance = i32::try_from(distance).expect("generated code lies within 2 GiB");
        self.emit(&distance.to_le_bytes());
    }

    /// Jumps where [`Assembler::land`] will say.
    pub(super) fn jump_forward(&mut self) -> Jump {
        self.emit(&[0xe9, 0, 0, 0, 0]);
        Jump { end: self.bytes.len(), bytes: 4 }
    }

    /// The same on condition `code` (the low nibble of Jcc).
    pub(super) fn jump_forward_if(&mut self, code: u8) -> Jump {
        self.emit(&[0x0f, 0x80 | code, 0, 0, 0, 0]);
        Jump { end: self.bytes.len(), bytes: 4 }
    }

    /// Jumps at most 127 bytes ahead.
    pub(super) fn jump_near(&mut self) -> Jump {
        self.emit(&[0xeb, 0]);
        Jump { end: self.bytes.len(), bytes: 1 }
    }

    /// Jumps if RCX is zero, at most 128 bytes back or 127 ahead.
    pub(super) fn jump_near_if_rcx_zero(&mut self) -> Jump {
        self.emit(&[0xe3, 0]);
        Jump { end: self.bytes.len(), bytes: 1 }
    }

    /// LOOP: takes one from RCX and jumps unless it is zero then, as far as
    /// [`Assembler::jump_near_if_rcx_zero`].
    pub(super) fn jump_near_unless_rcx_one(&mut self) -> Jump {
        self.emit(&[0xe2, 0]);
        Jump { end: self.bytes.len(), bytes: 1 }
    }

    /// Room for a jump that is emitted later.
    pub(super) fn room_for_jump(&mut self) -> Jump {
        self.emit(&[0xcc; 5]);
        Jump { end: self.bytes.len(), bytes: 4 }
    }

    /// Makes that room a jump; where it begins.
    pub(super) fn fill_room(&mut self, jump: Jump) -> usize {
        let start = jump.end - 5;
        self.bytes[start] = 0xe9;
        start
    }

    /// The jump leads here.
    pub(super) fn land(&mut self, jump: Jump) {
        self.land_at(jump, self.bytes.len());
    }

    /// The jump leads to what was emitted at `length`.
    pub(super) fn land_at(&mut self, jump: Jump, length: usize) {
        self.set_distance(jump, length as i64 - jump.end as i64);
    }

    /// The jump leads to an address.
    pub(super) fn land_on(&mut self, jump: Jump, target: u64) {
        let end = self.address + jump.end as u64;
        self.set_distance(jump, target.wrapping_sub(end) as i64);
    }

    fn set_distance(&mut self, jump: Jump, distance: i64) {
        let bytes = usize::from(jump.bytes);
        let fits = if bytes == 1 {
            i8::try_from(distance).is_ok()
        } else {
            i32::try_from(distance).is_ok()
        };
        assert!(fits, "a jump reaches its target");
        self.bytes[jump.end - bytes..jump.end].copy_from_slice(&distance.to_le_bytes()[..bytes]);
    }
}
