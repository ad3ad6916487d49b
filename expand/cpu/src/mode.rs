//! The mode in which code is decoded: what of the CPU's state a block depends on.

/// A set of bits that two blocks must share to be the same block. Everything in it changes only by
/// instructions that end a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Mode(pub u32);

impl Mode {
    /// 32-bit code segment.
    pub const CODE_32: u32 = 1 << 0;
    /// 64-bit code segment.
    pub const CODE_64: u32 = 1 << 1;
    /// SS.B: the stack pointer is ESP, not SP (outside 64-bit mode).
    pub const STACK_32: u32 = 1 << 2;
    /// A segment in use is not flat, so each access checks its limit and rights. Null segments do not
    /// count: see [`Mode::UNUSABLE`].
    pub const SEGMENTED: u32 = 1 << 3;
    /// CR0.EM or CR0.TS: x87 and MMX instructions trap.
    pub const X87_TRAPS: u32 = 1 << 4;
    /// CR0.TS: SSE instructions trap with #NM.
    pub const SSE_TRAPS: u32 = 1 << 5;
    /// CR4.OSFXSR clear or CR0.EM set: SSE instructions are undefined.
    pub const SSE_UNDEFINED: u32 = 1 << 6;
    /// An x87 exception is unmasked: each x87 instruction is checked.
    pub const X87_UNMASKED: u32 = 1 << 7;
    /// An SSE exception is unmasked: each SSE arithmetic instruction is checked.
    pub const SSE_UNMASKED: u32 = 1 << 8;
    /// EFER.LMA: 64-bit system structures.
    pub const LONG: u32 = 1 << 9;
    /// Privilege level 3. Not part of what code means, but of whether it may be fetched.
    pub const USER: u32 = 1 << 10;
    /// SMAP keeps supervisor code from user pages, and RFLAGS.AC does not override it. Not part of what
    /// code means, but of how it accesses memory.
    pub const USER_PAGES_FORBIDDEN: u32 = 1 << 11;
    /// SMAP is on, and RFLAGS.AC lets supervisor code at user pages all the same.
    pub const ACCESS_OVERRIDDEN: u32 = 1 << 16;
    /// Privilege level 1 or 2. Not part of what code means.
    pub const INNER: u32 = 1 << 17;
    /// RFLAGS.DF: strings go down. Not part of what code means, but of how it is translated.
    pub const DOWNWARDS: u32 = 1 << 18;
    /// Bits of a mode.
    pub const BITS: u32 = 19;
    /// By segment register: outside 64-bit mode it is null, so only the operations that name it
    /// check their accesses. CS and SS cannot be null there.
    pub const UNUSABLE: [u32; 8] = [1 << 12, 0, 0, 1 << 13, 1 << 14, 1 << 15, 0, 0];

    /// What decoding depends on: all but who may fetch the code and how it accesses memory.
    pub fn of_decoding(self) -> Self {
        let access = Self::USER_PAGES_FORBIDDEN | Self::ACCESS_OVERRIDDEN | Self::DOWNWARDS;
        Self(self.0 & !(Self::USER | Self::INNER | access))
    }

    /// The mode that STAC (`overridden`) or CLAC leads to from this one; `None` where SMAP is off.
    pub(crate) fn with_access(self, overridden: bool) -> Option<Self> {
        let either = Self::USER_PAGES_FORBIDDEN | Self::ACCESS_OVERRIDDEN;
        let bit = if overridden { Self::ACCESS_OVERRIDDEN } else { Self::USER_PAGES_FORBIDDEN };
        self.has(either).then_some(Self(self.0 & !either | bit))
    }

    /// Sets or clears `bit`.
    pub fn set(&mut self, bit: u32, on: bool) {
        self.0 = if on { self.0 | bit } else { self.0 & !bit };
    }

    /// Whether `bit` is set.
    #[inline(always)]
    pub fn has(self, bit: u32) -> bool {
        self.0 & bit != 0
    }

    /// Whether accesses through a segment register must be checked.
    #[inline(always)]
    pub(crate) fn checks(self, segment: u8) -> bool {
        self.has(Self::SEGMENTED | Self::UNUSABLE[usize::from(segment & 7)])
    }

    /// Bits of the code segment's default size: 16, 32 or 64.
    pub fn code_bits(self) -> u32 {
        if self.has(Self::CODE_64) {
            64
        } else if self.has(Self::CODE_32) {
            32
        } else {
            16
        }
    }

    /// What RIP is cut to.
    #[inline(always)]
    pub fn rip_mask(self) -> u64 {
        if self.has(Self::CODE_64) {
            u64::MAX
        } else if self.has(Self::CODE_32) {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    /// What the stack pointer is cut to.
    #[inline(always)]
    pub fn stack_mask(self) -> u64 {
        if self.has(Self::CODE_64) {
            u64::MAX
        } else if self.has(Self::STACK_32) {
            0xffff_ffff
        } else {
            0xffff
        }
    }
}
