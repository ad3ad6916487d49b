//! Every kind of divergence that random sequences have found, each with the seed of a case that
//! showed it. They hold for the generator as it is: a change there needs new seeds, which running
//! the cases on a soft engine with the fault put back finds.

/// A case that once differed.
pub(crate) struct Regression {
    pub(crate) seed: u64,
    /// What the soft engine did wrong.
    pub(crate) was: &'static str,
}

const fn regression(seed: u64, was: &'static str) -> Regression {
    Regression { seed, was }
}

pub(crate) const REGRESSIONS: &[Regression] = &[
    regression(0x1f0, "BTS and its like faulted as a read: error code without W"),
    regression(0x238, "BTS and its like faulted as a read: error code without W"),
    regression(0x2b4, "BTS and its like faulted as a read: error code without W"),
    regression(0x21c, "a division left the flags alone that the host changes"),
    regression(0x453, "a division left the flags alone that the host changes"),
    regression(0x51a4, "a conversion to MMX that raised #XM took the MMX state back"),
    regression(0x814, "TF trapped after the whole of a REP, not after an element"),
    regression(0x3412, "TF trapped after the whole of a REP, not after an element"),
    regression(0x64e, "no alignment check of x87 environments and 80-bit numbers"),
    regression(0x49fe, "no alignment check of x87 environments and 80-bit numbers"),
    regression(0x50da, "no alignment check of unaligned SSE operands"),
    regression(0x5b5c, "no alignment check of unaligned SSE operands"),
    regression(0x67fa, "no alignment check of masked stores"),
    regression(0x23af, "a masked store's page fault named its first chosen byte, not its first"),
    regression(0x323d, "a CS, DS, ES or SS prefix chose between #SS and #GP in 64-bit mode"),
    regression(0x4389, "a CS, DS, ES or SS prefix chose between #SS and #GP in 64-bit mode"),
    regression(0xc005_d56f, "a case that asked a device left its access to the next one"),
];
