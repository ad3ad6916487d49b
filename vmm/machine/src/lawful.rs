//! Where hardware lawfully keeps another CPU state than the software CPU, and how a digest still tells.
//!
//! A record holds a digest, of which nothing can be left out afterwards. But the ways in which hardware
//! may differ are few: the state at hand is given each of them, and if one has the recorded digest, that
//! difference, and no other, is what there is. What was set aside is counted and told, never silent.

use reprise_trace::cpu_state::CpuState;
use reprise_trace::moment::Moment;

/// A part of the CPU's state in which engines lawfully differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lawful {
    /// The x87 unit's last instruction: FOP, FIP and FDP. AMD keeps them only behind an unmasked
    /// exception (AMD64 Architecture Programmer's Manual, volume 2, 11.4.4: FXSAVE), newer Intel
    /// processors FDP (CPUID leaf 7, FDP_EXCPTN_ONLY) and all of them FOP likewise (Intel 64 and IA-32
    /// Architectures Software Developer's Manual, volume 1, 8.1.8 and 8.1.9).
    X87LastInstruction,
    /// Flags that the guest's last instructions left undefined, so that they are another CPU's own.
    UndefinedFlags,
    /// Accessed bits in page tables (`accessed_bits.rs`).
    AccessedBits,
}

impl std::fmt::Display for Lawful {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::X87LastInstruction => "the x87 unit's last instruction (FOP, FIP, FDP)",
            Self::UndefinedFlags => "flags that the guest's last instructions left undefined",
            Self::AccessedBits => "accessed bits of the guest's page tables",
        })
    }
}

/// What a comparison left out, because hardware may lawfully differ there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetAside {
    /// What.
    pub what: Lawful,
    /// Records at which it did.
    pub records: u64,
    /// The first of them.
    pub first: Moment,
}

impl SetAside {
    /// Adds one more record at `moment`.
    pub fn note(all: &mut Vec<Self>, what: Lawful, moment: Moment) {
        Self::add(all, Self { what, records: 1, first: moment });
    }

    /// Adds what a later part of the comparison left out.
    pub fn add(all: &mut Vec<Self>, more: Self) {
        match all.iter_mut().find(|known| known.what == more.what) {
            Some(known) => known.records += more.records,
            None => all.push(more),
        }
    }
}

/// How another CPU lawfully came to a record's digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explained {
    /// What differs.
    pub what: Vec<Lawful>,
    /// The state that it had.
    pub state: CpuState,
}

/// In what the state at hand and a recorded one may lawfully differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Permitted {
    /// In the x87 unit's last instruction, which engines keep differently.
    pub x87_last_instruction: bool,
    /// In these bits of RFLAGS, which the instructions before left undefined, so that they are a CPU's own.
    pub undefined_flags: u64,
}

/// What of FOP, FIP and FDP hardware keeps; what it does not keep reads as zero.
const KEPT: [[bool; 3]; 5] = [
    [true, true, true],
    [false, true, true],
    [true, true, false],
    [false, true, false],
    [false, false, false],
];

/// The state as hardware may have it instead, if it then has the digest of a record; and what differs.
pub fn explained(state: &CpuState, recorded: u64, permitted: Permitted) -> Option<Explained> {
    let Permitted { x87_last_instruction, undefined_flags } = permitted;
    // The first keeps all.
    let kept = if x87_last_instruction { &KEPT[..] } else { &KEPT[..1] };
    let mut flipped = 0;
    loop {
        for [opcode, instruction, data] in kept.iter().copied() {
            let mut there = state.clone();
            there.rflags ^= flipped;
            let fpu = &mut there.fpu;
            fpu.fop = if opcode { fpu.fop } else { 0 };
            fpu.fip = if instruction { fpu.fip } else { 0 };
            fpu.fdp = if data { fpu.fdp } else { 0 };
            if there != *state && there.short_digest() == recorded {
                let x87 = (there.fpu != state.fpu).then_some(Lawful::X87LastInstruction);
                let flags = (flipped != 0).then_some(Lawful::UndefinedFlags);
                return Some(Explained {
                    what: x87.into_iter().chain(flags).collect(),
                    state: there,
                });
            }
        }
        // The next set of them, in the order of binary numbers.
        flipped = flipped.wrapping_sub(undefined_flags) & undefined_flags;
        if flipped == 0 {
            return None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of another engine on the same CPU.
    const X87: Permitted = Permitted { x87_last_instruction: true, undefined_flags: 0 };

    fn behind_an_x87_instruction() -> CpuState {
        let mut state = CpuState::default();
        (state.fpu.fop, state.fpu.fip, state.fpu.fdp) = (0x1c1, 0x40_1000, 0x60_2000);
        state
    }

    #[test]
    fn what_hardware_does_not_keep_explains_a_digest() {
        let state = behind_an_x87_instruction();
        let mut there = state.clone();
        there.fpu.fdp = 0;
        let explanation = explained(&state, there.short_digest(), X87);
        let what = vec![Lawful::X87LastInstruction];
        assert_eq!(explanation, Some(Explained { what, state: there.clone() }));
        assert_eq!(explained(&state, state.short_digest(), X87), None, "nothing differs");
        let of_another_cpu = Permitted { undefined_flags: 0x8d5, ..Permitted::default() };
        assert_eq!(explained(&state, there.short_digest(), of_another_cpu), None);
    }

    #[test]
    fn undefined_flags_explain_a_digest_and_others_do_not() {
        const CF: u64 = 1;
        const AF: u64 = 1 << 4;
        const ZF: u64 = 1 << 6;
        let state = CpuState { rflags: 2 | ZF, ..behind_an_x87_instruction() };
        let there = CpuState { rflags: 2 | AF, ..state.clone() };
        let of = |there: &CpuState, undefined_flags| {
            explained(&state, there.short_digest(), Permitted { undefined_flags, ..X87 })
        };
        let what = vec![Lawful::UndefinedFlags];
        let explanation = Explained { what, state: there.clone() };
        assert_eq!(of(&there, AF | ZF), Some(explanation.clone()));
        assert_eq!(of(&there, AF | ZF | CF), Some(explanation));
        assert_eq!(of(&there, AF), None, "ZF is defined");
        assert_eq!(of(&state, AF | ZF), None, "nothing differs");
        let mut both = there;
        both.fpu.fdp = 0;
        let what = vec![Lawful::X87LastInstruction, Lawful::UndefinedFlags];
        assert_eq!(of(&both, AF | ZF), Some(Explained { what, state: both.clone() }));
        both.gpr[0] = 1;
        assert_eq!(of(&both, AF | ZF), None);
    }

    #[test]
    fn another_difference_is_not_explained() {
        let state = behind_an_x87_instruction();
        let mut there = state.clone();
        there.fpu.fdp = 0;
        there.gpr[3] = 1;
        assert_eq!(explained(&state, there.short_digest(), X87), None);
        let mut there = state.clone();
        there.fpu.fip += 1;
        assert_eq!(explained(&state, there.short_digest(), X87), None);
    }

    #[test]
    fn what_is_set_aside_is_counted_from_the_first_on() {
        let at = |tick| Moment { tick, rip: 0, rcx: 0 };
        let mut all = Vec::new();
        for tick in [5, 7, 9] {
            SetAside::note(&mut all, Lawful::X87LastInstruction, at(tick));
        }
        let first = SetAside { what: Lawful::X87LastInstruction, records: 3, first: at(5) };
        assert_eq!(all, [first]);
    }
}
