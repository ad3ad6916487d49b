//! What an instruction can end in other than success.

/// Exception vectors.
pub mod vector {
    /// Divide error.
    pub const DE: u8 = 0;
    /// Debug.
    pub const DB: u8 = 1;
    /// Non-maskable interrupt.
    pub const NMI: u8 = 2;
    /// Breakpoint (INT3).
    pub const BP: u8 = 3;
    /// Overflow (INTO).
    pub const OF: u8 = 4;
    /// BOUND range exceeded.
    pub const BR: u8 = 5;
    /// Invalid opcode.
    pub const UD: u8 = 6;
    /// Device not available.
    pub const NM: u8 = 7;
    /// Double fault.
    pub const DF: u8 = 8;
    /// Invalid TSS.
    pub const TS: u8 = 10;
    /// Segment not present.
    pub const NP: u8 = 11;
    /// Stack-segment fault.
    pub const SS: u8 = 12;
    /// General protection.
    pub const GP: u8 = 13;
    /// Page fault.
    pub const PF: u8 = 14;
    /// x87 floating-point error.
    pub const MF: u8 = 16;
    /// Alignment check.
    pub const AC: u8 = 17;
    /// SIMD floating-point exception.
    pub const XM: u8 = 19;
}

/// An exception that the guest takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Vector, 0 to 31.
    pub vector: u8,
    /// The error code that the vector pushes, if it pushes one.
    pub error_code: Option<u32>,
    /// For a page fault, the address that CR2 takes.
    pub page_fault_address: Option<u64>,
}

impl Fault {
    /// A fault without an error code.
    pub const fn plain(vector: u8) -> Self {
        Self { vector, error_code: None, page_fault_address: None }
    }

    /// A fault with an error code (a selector, or zero).
    pub const fn with_code(vector: u8, error_code: u32) -> Self {
        Self { vector, error_code: Some(error_code), page_fault_address: None }
    }

    /// #UD.
    pub const UD: Self = Self::plain(vector::UD);
    /// #NM.
    pub const NM: Self = Self::plain(vector::NM);
    /// #DE.
    pub const DE: Self = Self::plain(vector::DE);
    /// #GP(0).
    pub const GP0: Self = Self::with_code(vector::GP, 0);
    /// #SS(0).
    pub const SS0: Self = Self::with_code(vector::SS, 0);
}

/// Why an instruction did not simply retire with the next one following in the block. What goes
/// with it lies in the CPU (`pending_fault`, `pending_exit`), so that results stay in registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// A fault: nothing of the instruction has taken effect; `Cpu::pending_fault` says which.
    Fault,
    /// The board must answer an access first; the instruction then starts again and finds the
    /// answer. Nothing of the instruction has taken effect; `Cpu::pending_exit` says which.
    Exit,
    /// The instruction retired, and the block must not go on (it overwrote itself, or the mode in
    /// which it was decoded no longer holds).
    EndBlock,
    /// The instruction retired and the machine has to look (HLT); `Cpu::pending_exit` says why.
    RetiredExit,
    /// A repeated instruction has done one element, more are left, and the trap that each element
    /// earns comes now. It has not retired; it goes on from its start.
    Repeats,
}

/// [`Stop`] as the native calling convention returns it; 0 is success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Flow(pub(crate) u32);

impl Flow {
    pub(crate) const NEXT: Self = Self(0);
    pub(crate) const FAULT: Self = Self(1);
    pub(crate) const EXIT: Self = Self(2);
    pub(crate) const END_BLOCK: Self = Self(3);
    pub(crate) const RETIRED_EXIT: Self = Self(4);
    pub(crate) const REPEATS: Self = Self(5);

    /// Whether the instruction has retired.
    #[inline(always)]
    pub(crate) fn retires(self) -> bool {
        matches!(self, Self::NEXT | Self::END_BLOCK | Self::RETIRED_EXIT)
    }
}

impl From<Result<(), Stop>> for Flow {
    #[inline(always)]
    fn from(result: Result<(), Stop>) -> Self {
        match result {
            Ok(()) => Self::NEXT,
            Err(Stop::Fault) => Self::FAULT,
            Err(Stop::Exit) => Self::EXIT,
            Err(Stop::EndBlock) => Self::END_BLOCK,
            Err(Stop::RetiredExit) => Self::RETIRED_EXIT,
            Err(Stop::Repeats) => Self::REPEATS,
        }
    }
}
